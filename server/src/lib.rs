//! The reference server: the etcd v3 API and the project's own gRPC service over a replicated store.

#![forbid(unsafe_code)]

pub mod etcd;
pub mod proto;
