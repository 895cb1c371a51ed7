//! The arithmetic of the ring: where a position lies, where the next batch begins, how much may be used.

use mainstay_io::BLOCK_BYTES;

use crate::batch::{BATCH_BYTES_LIMIT, HEADER_BYTES, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, padded};
use crate::{Error, ErrorKind, Lsn, Reserve, Result};

/// The most batches that may be in flight.
pub const IN_FLIGHT_MAX_LIMIT: usize = 8;
/// A batch is given to the device only while its end is at most this far from the durable position, unless nothing else
/// is in flight. It bounds how far recovery has to look.
pub(crate) const IN_FLIGHT_SPAN_MAX: u64 = 8 << 20;
/// The smallest ring.
pub const RING_BYTES_MIN: u64 = 64 << 10;

/// Size of the ring and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ring {
    bytes: u64,
}

impl Ring {
    /// A ring over `zone_bytes`, rounded down to whole blocks.
    pub(crate) fn new(zone_bytes: u64) -> Result<Self> {
        let bytes = zone_bytes - zone_bytes % BLOCK_BYTES as u64;
        if bytes < RING_BYTES_MIN {
            let message = format!("the log's zone is too small zone_bytes={zone_bytes} min={RING_BYTES_MIN}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(Self { bytes })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The place of `lsn` in the zone.
    pub(crate) fn place(&self, lsn: Lsn) -> u64 {
        lsn.0 % self.bytes
    }

    /// Bytes from `lsn` to the end of its lap.
    pub(crate) fn lap_rest(&self, lsn: Lsn) -> u64 {
        self.bytes - self.place(lsn)
    }

    /// Where a batch begins that does not fit behind `lsn`: the next lap. None when the longest fits, as at the start of a lap.
    pub(crate) fn lap_next(&self, lsn: Lsn) -> Option<Lsn> {
        (self.lap_rest(lsn) < self.batch_bytes_limit()).then(|| Lsn(lsn.0.saturating_add(self.lap_rest(lsn))))
    }

    /// Where a batch of `batch_bytes` begins when the one before it ended at `tail`.
    pub(crate) fn begin(&self, tail: Lsn, batch_bytes: u64) -> Lsn {
        if batch_bytes <= self.lap_rest(tail) { tail } else { Lsn(tail.0 + self.lap_rest(tail)) }
    }

    /// The longest batch of this ring: a quarter of it, so that four always fit and a skipped lap end wastes at most that.
    pub(crate) fn batch_bytes_limit(&self) -> u64 {
        let quarter = self.bytes / 4;
        BATCH_BYTES_LIMIT.min(quarter - quarter % BLOCK_BYTES as u64)
    }

    /// The longest payload of one record of this ring.
    pub(crate) fn record_bytes_max(&self) -> usize {
        RECORD_BYTES_MAX.min(self.batch_bytes_limit() as usize - HEADER_BYTES - RECORD_HEADER_BYTES)
    }

    /// Bytes between start and end of the log that `reserve` may fill.
    ///
    /// The part kept from `Normal` is a sixteenth, or enough for one longest batch, but then at most an eighth; three quarters of it are
    /// kept from `Relief`, half of it from `Vote`, a quarter from `Install`.
    pub(crate) fn usable(&self, reserve: Reserve) -> u64 {
        let kept = (self.bytes / 16).max(BATCH_BYTES_LIMIT.min(self.bytes / 8));
        match reserve {
            Reserve::Normal => self.bytes - padded(kept),
            Reserve::Relief => self.bytes - padded(kept / 4 * 3),
            Reserve::Vote => self.bytes - padded(kept / 2),
            Reserve::Install => self.bytes - padded(kept / 4),
            Reserve::Critical => self.bytes,
        }
    }

    /// How far behind a bad position a batch may begin that was in flight together with one at that position.
    ///
    /// A batch that begins later than this was submitted when the bad position was durable; so if the log goes on far
    /// enough behind damage, at least one header inside the window says so.
    pub(crate) fn window_bytes(&self) -> u64 {
        IN_FLIGHT_SPAN_MAX + 2 * self.batch_bytes_limit()
    }
}
