//! Rust types of `proto/*.proto`, one module a package.

// Generated: comments are those of the protocol files, where a field's name says all there is none.
#![allow(missing_docs, unreachable_pub, clippy::all)]

/// Services and messages of the etcd v3 protocol.
pub mod etcdserverpb {
    tonic::include_proto!("etcdserverpb");
}

/// Records of the etcd v3 protocol.
pub mod mvccpb {
    tonic::include_proto!("mvccpb");
}

/// The project's own services.
pub mod mainstay {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("mainstay.v1");
    }
}
