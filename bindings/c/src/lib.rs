//! The C interface: the facade behind opaque handles, codes and byte slices.
//!
//! # Place
//! above the facade; the only crate besides io with `unsafe`
//! # Invariants
//! I1. No panic crosses into C: every exported function runs inside [`guard`].
//! I2. Every pointer that goes out is freed by exactly one function of this crate, named in its documentation.
//! I3. A null handle or out pointer answers `MAINSTAY_INVALID`, never a crash.

// The header carries the contract of each function; a `# Safety` section on every one would repeat it.
#![allow(clippy::missing_safety_doc, reason = "the contract stands once, in the header")]

mod batch;
mod bytes;
mod error;
mod read;
mod store;

pub use batch::*;
pub use bytes::*;
pub use error::*;
pub use read::*;
pub use store::*;
