//! Reads a log that is open and checks what lies there: rot is found before a restart needs what it has taken.
//!
//! # Place
//! beside `recovery`, whose reader it uses; called by the scrubber of the engine
//! # Invariants
//! 1. Only what is durable and not released is judged. What is released while it is read is no damage.
//! 2. A misread is no damage: what does not match is read once more.

use mainstay_io::IoClass;

use crate::batch::Header;
use crate::recovery::Reader;
use crate::wal::Wal;
use crate::{Lsn, Result};

/// What [`Wal::check`] has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checked {
    /// Where to go on: the end of the last whole batch.
    pub next: Lsn,
    /// Where bytes lie that were acknowledged and are not what was written. A log that is released up to a later position is
    /// whole again.
    pub damaged: Option<Lsn>,
}

impl Wal {
    /// Reads the batches from `from` on, which is the start of the log or where the last call ended, and checks every byte of them:
    /// until `bytes_max` are read, the durable end is reached, or something does not match. At least one batch.
    ///
    /// # Errors
    /// `Io` but for places that cannot be read, which are damage; `Closed`.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is changed.
    pub async fn check(&self, from: Lsn, bytes_max: u64) -> Result<Checked> {
        let end = self.durable();
        let mut at = from;
        let mut read = 0;
        let mut reader = self.reader(end);
        while at < end && (read == 0 || read < bytes_max) {
            // Released meanwhile: the place may be written over.
            at = at.max(self.start());
            if let Some(header) = self.next_whole(&mut reader, at).await? {
                read += header.end().0 - at.0;
                at = header.end();
                continue;
            }
            reader = self.reader(end);
            if self.next_whole(&mut reader, at).await?.is_none() && at >= self.start() {
                return Ok(Checked { next: at, damaged: Some(at) });
            }
        }
        Ok(Checked { next: at, damaged: None })
    }

    fn reader(&self, limit: Lsn) -> Reader {
        Reader::new(self.zone.clone(), self.shared.ring, limit, IoClass::Background)
    }

    /// The batch behind `at` if it is whole, there or at the start of the next lap.
    async fn next_whole(&self, reader: &mut Reader, at: Lsn) -> Result<Option<Header>> {
        for place in [Some(at), self.shared.ring.lap_next(at)].into_iter().flatten() {
            let Some(header) = reader.header(place).await? else { continue };
            let skips = place != at && header.follows != at;
            if header.lsn != place || header.volume != self.volume || skips {
                continue;
            }
            let batch = reader.read(place, u64::from(header.batch_bytes)).await?;
            if batch.is_some_and(|batch| header.body_matches(&batch)) {
                return Ok(Some(header));
            }
        }
        Ok(None)
    }
}
