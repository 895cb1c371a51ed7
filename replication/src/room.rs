//! Keeps room in the ring of the log while entries wait for their commit.
//!
//! # Place
//! before each command that `write` hands to openraft on the leader
//! # Invariants
//! - Q1. The commands that were admitted and are not answered yet count for at most a part in [`ON_THE_WAY_SHARE`] of the
//!   ring, or are one that is longer.
//! - Q2. While the log holds entries that are not applied, a command is admitted only if the ring is no more than three
//!   quarters full with it. So a rotation, the entry without which the log cannot be cut, finds room behind whatever was
//!   admitted; it is never held up here itself.
//!
//! # Why not
//! the log's own refusal: what it refuses waits at its end, and the rotation behind that. A leader without a quorum, or with
//! some thousand writes at once on a small ring, would stand still for ever.

use std::sync::Arc;

use mainstay_engine::{Command, CommandBody};
use mainstay_io::BLOCK_BYTES;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::node::{Inner, Running};
use crate::write::RETRY_PAUSE;
use crate::{Error, ErrorKind, Result, Runtime};

/// See Q1.
const ON_THE_WAY_SHARE: u64 = 16;
/// What a command costs in the log beside its bytes, at most, but for what fills its last block.
const OVERHEAD_BYTES: u64 = 256;
/// A longer command is no rotation.
const ROTATION_BYTES_MAX: usize = 32;

/// The right of a command to its part of the ring, until it is answered.
pub(crate) type Admitted = Option<OwnedSemaphorePermit>;

/// See the module. One for each node.
pub(crate) struct Room {
    blocks: Arc<Semaphore>,
    blocks_max: u32,
}

impl Room {
    /// For a ring of so many bytes.
    pub(crate) fn new(ring_bytes: u64) -> Self {
        let blocks = ring_bytes / ON_THE_WAY_SHARE / BLOCK_BYTES as u64;
        let blocks_max = u32::try_from(blocks).unwrap_or(u32::MAX).max(1);
        Self { blocks: Arc::new(Semaphore::new(blocks_max as usize)), blocks_max }
    }

    /// Whether nothing more may be on its way now.
    #[cfg(test)]
    pub(crate) fn is_taken(&self) -> bool {
        self.blocks.available_permits() == 0
    }

    /// Waits until a command of so many bytes may be on its way beside the others.
    async fn enter(&self, bytes: u64) -> Result<OwnedSemaphorePermit> {
        let blocks = u32::try_from(bytes.div_ceil(BLOCK_BYTES as u64)).unwrap_or(u32::MAX);
        let permit = self.blocks.clone().acquire_many_owned(blocks.min(self.blocks_max)).await;
        permit.map_err(|_| Error::new(ErrorKind::Closed, "the node is closed"))
    }
}

impl<R: Runtime> Inner<R> {
    /// Waits until the log, the memory and the disk take a command. The answer is kept until the command is answered.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn admit_command(&self, running: &Running<R>, command: &[u8]) -> Result<Admitted> {
        if makes_room(command) {
            return Ok(None);
        }
        let bytes = command.len() as u64 + OVERHEAD_BYTES;
        let permit = self.room.enter(bytes).await?;
        loop {
            self.group.admit().await?;
            // The log's queue has no bound of its own.
            self.engine.wal().admit().await.map_err(mainstay_engine::Error::from)?;
            if !self.is_crowded(running, bytes) {
                return Ok(Some(permit));
            }
            R::sleep(RETRY_PAUSE).await;
        }
    }

    /// Whether the ring would be too full with so many bytes more, for entries that are not applied.
    fn is_crowded(&self, running: &Running<R>, bytes: u64) -> bool {
        let stats = self.engine.wal().stats();
        stats.used_bytes.saturating_add(bytes) > stats.ring_bytes / 4 * 3
            && Self::metrics_of(running, |m| m.last_log_index > m.last_applied.as_ref().map(|id| id.index))
    }

    /// Why a command was not admitted in time.
    pub(crate) fn not_admitted(&self, running: &Running<R>, command: &[u8]) -> Error {
        let message = if self.is_crowded(running, command.len() as u64) {
            "the log is full of entries that no quorum has acknowledged"
        } else {
            "the store takes no more writes: flush or compaction is behind"
        };
        Error::new(ErrorKind::Unavailable, message)
    }
}

/// Whether a command is what lets the log be cut.
fn makes_room(command: &[u8]) -> bool {
    command.len() <= ROTATION_BYTES_MAX
        && Command::decode(&bytes::Bytes::copy_from_slice(command))
            .is_ok_and(|command| matches!(command.body, CommandBody::Rotate))
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn what_is_on_the_way_is_a_sixteenth_of_the_ring_or_one_command() {
        let room = Room::new(16 * 8 * BLOCK_BYTES as u64);
        let enter = |bytes| room.enter(bytes).now_or_never().map(|permit| permit.expect("open"));
        let half = enter(4 * BLOCK_BYTES as u64).expect("four of eight blocks");
        assert!(enter(4 * BLOCK_BYTES as u64 + 1).is_none(), "five blocks");
        let rest: Vec<_> = (0..4).map(|_| enter(1).expect("a block each")).collect();
        assert!(enter(1).is_none());
        drop((half, rest));
        let long = enter(u64::MAX).expect("alone");
        assert!(enter(1).is_none());
        drop(long);
        assert!(Room::new(0).enter(1).now_or_never().is_some(), "one at a time always goes");
    }

    #[test]
    fn only_a_rotation_makes_room() {
        let encode = |body| Command { time_ms: u64::MAX, body }.encode().expect("encodes");
        assert!(makes_room(&encode(CommandBody::Rotate)));
        assert!(!makes_room(&encode(CommandBody::DropCheckpoint { name: "c".into() })));
        assert!(!makes_room(b""));
        assert!(!makes_room(&[0xff; ROTATION_BYTES_MAX]));
    }
}
