//! The log of a node: records of all groups in one ring on one zone.
//!
//! One writer task takes what waits, pads it to whole blocks and issues one durable write; a few batches may be in
//! flight, acknowledged strictly in order. While nothing is in flight and nothing waits, a caller that blocks may write a batch of its own: [`Turn`]. It knows bytes and positions, not keys and not terms.

#![forbid(unsafe_code)]

mod batch;
mod cases;
mod check;
mod error;
mod inspect;
mod record;
mod recovery;
mod ring;
mod shared;
mod turn;
mod wal;
mod writer;

/// Entry points for the fuzz targets and benches of this workspace; no part of the interface.
#[doc(hidden)]
pub mod hooks;

#[cfg(test)]
mod tests;

pub use batch::{RECORD_BYTES_MAX, WAL_FORMAT_VERSION};
pub use check::Checked;
pub use error::{Error, ErrorKind, Result};
pub use inspect::{BatchInfo, RecordInfo, inspect};
pub use record::{GroupId, Lsn, RecordKind, RecordPos};
pub use ring::{IN_FLIGHT_MAX_LIMIT, RING_BYTES_MIN};
pub use shared::QUEUED_BYTES_MAX;
pub use turn::{OwnWrite, Turn};
pub use wal::{Batch, OnDurable, Record, Recovery, Reserve, Wal, WalOptions, WalStats};
