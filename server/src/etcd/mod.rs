//! The etcd v3 API: the model that decides at apply, and the gRPC services over it.

pub mod error;
pub mod model;
