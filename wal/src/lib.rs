//! The log of a node: records of all groups in one ring on one zone.
//!
//! One writer task takes what waits, pads it to whole blocks and issues one durable write; a few batches may be in
//! flight, acknowledged strictly in order. It knows bytes and positions, not keys and not terms.

mod error;
mod record;
mod wal;

pub use error::{Error, ErrorKind, Result};
pub use record::{GroupId, Lsn, RecordKind, RecordPos};
pub use wal::{OnDurable, Record, Recovery, Reserve, Wal, WalOptions, WalStats};
