//! The seam to the async runtime: tokio in production, the seeded executor in the simulation.

/// An async runtime: openraft's own trait with a name of ours. `Instant::now` of it is the only time that consensus reads.
pub trait Runtime: openraft_rt::AsyncRuntime + Send + Sync {}

/// tokio.
pub type TokioRuntime = openraft_rt_tokio::TokioRuntime;

impl Runtime for TokioRuntime {}
