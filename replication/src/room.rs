//! Keeps room in the rings of the logs for the entries that let them be cut.
//!
//! # Place
//! before each command that `write` hands to openraft on the leader
//! # Invariants
//! - Q1. The commands that were admitted and are not answered yet count for at most a part in [`ON_THE_WAY_SHARE`] of the
//!   ring, or are one that is longer.
//! - Q2. While the log holds entries that are not applied or not in tables though their memtable is frozen, a command is
//!   admitted only if the ring is no more than three quarters full with it. So a rotation and an install, the entries without
//!   which the log cannot be cut, find room behind whatever was admitted; they are never held up here themselves.
//! - Q3. Nor is a command admitted that could take the ring of a follower beyond three quarters, unless a majority bears it
//!   without that one. A follower says with each answer to an append how much its ring takes; what the leader's log holds
//!   behind that, and what is on its way, counts as taken. Whom the leader has not heard lately counts for nothing, while
//!   enough others are heard, and of those only who has acknowledged as much as a majority: who died a moment ago takes
//!   nothing more. Rings differ in size, and the same entries fill one more than another.
//!
//! # Why not
//! the log's own refusal: what it refuses waits at its end, and the rotation behind that. A leader without a quorum, or with
//! some thousand writes at once on a small ring, would stand still for ever; so would one whose followers' rings fill first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mainstay_engine::{Command, CommandBody};
use mainstay_io::BLOCK_BYTES;
use mainstay_wal::GroupId;
use openraft_rt::Instant;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::lag::SiteLag;
use crate::log_store::LogStore;
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

/// See the module. One for all groups of a node.
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

    /// Bytes of the commands on their way.
    fn on_the_way(&self) -> u64 {
        (u64::from(self.blocks_max) - self.blocks.available_permits() as u64) * BLOCK_BYTES as u64
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
            self.group.admit_to_log().await?;
            if !self.is_crowded(running, bytes)
                && !self.are_others_crowded(running)
                && self.awaited_site(running).is_none()
            {
                return Ok(Some(permit));
            }
            R::sleep(RETRY_PAUSE).await;
        }
    }

    /// Bytes that the ring takes before the rest is for what makes room.
    pub(crate) fn own_room(&self) -> u64 {
        let stats = self.engine.wal().stats();
        (stats.ring_bytes / 4 * 3).saturating_sub(stats.used_bytes)
    }

    /// Whether the ring would be too full with so many bytes more (Q2).
    fn is_crowded(&self, running: &Running<R>, bytes: u64) -> bool {
        bytes > self.own_room() && (self.is_awaited(running) || self.is_another_awaited())
    }

    /// Whether the log of this group cannot be cut up to its end yet.
    fn is_awaited(&self, running: &Running<R>) -> bool {
        self.group.frozen_generations() > 0 || self.has_unapplied(running)
    }

    /// The same of the other groups in this ring.
    fn is_another_awaited(&self) -> bool {
        let host = self.host();
        let awaited = |replica: &Inner<R>| {
            replica.number != self.number && replica.running().is_ok_and(|running| replica.is_awaited(&running))
        };
        let groups: Vec<_> = host.as_deref().unwrap_or(self).groups().values().cloned().collect();
        host.as_deref().is_some_and(awaited) || groups.iter().any(|group| awaited(group))
    }

    /// The logs of the groups that this node leads.
    fn led_logs(&self) -> Vec<(GroupId, LogStore)> {
        let led = |replica: &Self| {
            let running = replica.running().ok()?;
            (replica.leader_of(&running) == Some(running.id)).then(|| (replica.number, replica.log.clone()))
        };
        let host = self.host();
        let of_host = host.as_deref().unwrap_or(self);
        let groups: Vec<_> = of_host.groups().values().cloned().collect();
        led(of_host).into_iter().chain(groups.iter().filter_map(|group| led(group))).collect()
    }

    fn has_unapplied(&self, running: &Running<R>) -> bool {
        Self::metrics_of(running, |m| m.last_log_index > m.last_applied.as_ref().map(|id| id.index))
    }

    /// Whether too few of the others take what is on its way (Q3).
    fn are_others_crowded(&self, running: &Running<R>) -> bool {
        let voters: Vec<u64> = Self::metrics_of(running, |m| m.membership_config.voter_ids().collect());
        let needed = voters.len() / 2;
        if needed == 0 {
            return false;
        }
        let others: Vec<u64> = voters.into_iter().filter(|id| *id != running.id).collect();
        let led = self.led_logs();
        let behind =
            |group, last| led.iter().find(|(number, _)| *number == group).map_or(0, |(_, log)| log.bytes_behind(last));
        let heard = 2 * self.options.election_timeout;
        let rooms = others.into_iter().map(|id| self.rooms.of(id, self.number, heard, behind));
        self.room.on_the_way() > taken_by(needed, rooms.collect())
    }

    /// Why a command was not admitted in time.
    pub(crate) fn not_admitted(&self, running: &Running<R>, command: &[u8]) -> Error {
        if let Some(SiteLag { site, bytes, time, .. }) = self.awaited_site(running) {
            let message = format!("a site lags beyond its bound site={site} lag_bytes={bytes} lag_time={time:?}");
            return Error::new(ErrorKind::Unavailable, message);
        }
        let bytes = command.len() as u64;
        let message = if bytes > self.own_room() && self.has_unapplied(running) {
            "the log is full of entries that no quorum has acknowledged"
        } else if self.is_crowded(running, bytes) || self.are_others_crowded(running) {
            "the logs of too many members are full of entries that are not in tables yet"
        } else {
            "the store takes no more writes: flush or compaction is behind"
        };
        Error::new(ErrorKind::Unavailable, message)
    }
}

/// What another node last said of its ring.
struct Said<I> {
    /// Bytes that its ring takes.
    room: u64,
    at: I,
    /// It had the entries up to here, of each group in which it said something.
    last: BTreeMap<GroupId, u64>,
}

/// See Q3. What each other node last said, by its id.
pub(crate) struct PeerRooms<R: Runtime>(Mutex<BTreeMap<u64, Said<R::Instant>>>);

impl<R: Runtime> Default for PeerRooms<R> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<R: Runtime> PeerRooms<R> {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Said<R::Instant>>> {
        self.0.lock().expect("nothing panics while it holds this lock")
    }

    /// Takes what `peer` says, which has the entries of the group up to `last`.
    pub(crate) fn note(&self, peer: u64, group: GroupId, room: u64, last: u64) {
        self.note_room(peer, room);
        if let Some(said) = self.lock().get_mut(&peer) {
            said.last.insert(group, last);
        }
    }

    /// Takes what `peer` says of its ring, and of no group.
    pub(crate) fn note_room(&self, peer: u64, room: u64) {
        let mut said = self.lock();
        let said = said.entry(peer).or_insert_with(|| Said { room, at: R::Instant::now(), last: BTreeMap::new() });
        (said.room, said.at) = (room, R::Instant::now());
    }

    /// What is left in the ring of `peer` behind what it lacks, and how far it is in the log of `group`: `behind` tells the bytes of a group's
    /// log here behind an entry. One that has said nothing yet has room.
    fn of(&self, peer: u64, group: GroupId, heard: Duration, behind: impl Fn(GroupId, u64) -> u64) -> PeerRoom {
        match self.lock().get(&peer) {
            None => PeerRoom { left: u64::MAX, last: 0, fresh: false },
            Some(said) => {
                let lacks = said.last.iter().map(|(group, last)| behind(*group, *last)).sum();
                let last = said.last.get(&group).copied().unwrap_or_default();
                PeerRoom { left: said.room.saturating_sub(lacks), last, fresh: said.at.elapsed() < heard }
            }
        }
    }

    /// Whether `peer` said within `heard` that its ring takes nothing more.
    pub(crate) fn is_full(&self, peer: u64, heard: Duration) -> bool {
        self.lock().get(&peer).is_some_and(|said| said.room == 0 && said.at.elapsed() < heard)
    }
}

/// What is left in the ring of another voter.
#[derive(Clone, Copy, Debug)]
struct PeerRoom {
    left: u64,
    /// It has acknowledged the log up to here.
    last: u64,
    /// It was heard lately.
    fresh: bool,
}

/// What at least `needed` of the others take: when enough of them are heard, of those that are and that go with the log.
fn taken_by(needed: usize, mut others: Vec<PeerRoom>) -> u64 {
    let mut acknowledged: Vec<u64> = others.iter().filter(|other| other.fresh).map(|other| other.last).collect();
    acknowledged.sort_unstable_by_key(|last| std::cmp::Reverse(*last));
    if let Some(committed) = needed.checked_sub(1).and_then(|at| acknowledged.get(at)) {
        others.retain(|other| other.fresh && other.last >= *committed);
    }
    others.sort_by_key(|other| std::cmp::Reverse(other.left));
    needed.checked_sub(1).and_then(|at| others.get(at)).map_or(u64::MAX, |other| other.left)
}

/// Whether a command is what lets the log be cut.
pub(crate) fn makes_room(command: &[u8]) -> bool {
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
    fn a_majority_has_to_take_it_of_those_that_are_heard() {
        let heard = |left| PeerRoom { left, last: 10, fresh: true };
        let behind = |left| PeerRoom { last: 9, ..heard(left) };
        let silent = |left| PeerRoom { fresh: false, ..heard(left) };
        for (needed, others, expect) in [
            (0, vec![], u64::MAX),
            (1, vec![heard(5), heard(7)], 7),
            (1, vec![heard(0), heard(7)], 7),
            (2, vec![heard(0), heard(7), heard(3), heard(9)], 7),
            // It cannot acknowledge anything: the one that can has to have room.
            (1, vec![heard(0), silent(7)], 0),
            (2, vec![heard(4), silent(9), heard(3), silent(9)], 3),
            // Alone: what they took when they were last heard.
            (1, vec![silent(5), silent(7)], 7),
            (2, vec![silent(5), heard(2), silent(7), silent(1)], 5),
            // Who lacks what a majority has may have died a moment ago.
            (1, vec![heard(0), behind(7)], 0),
            (1, vec![behind(3), behind(7)], 7),
            (2, vec![heard(0), behind(3), behind(7), silent(9)], 3),
            (2, vec![heard(4), heard(3), behind(7), behind(9)], 3),
        ] {
            assert_eq!(taken_by(needed, others.clone()), expect, "{needed} of {others:?}");
        }
    }

    #[test]
    fn what_the_ring_of_another_takes_is_less_what_it_lacks_of_every_group() {
        let rooms = PeerRooms::<crate::TokioRuntime>::default();
        let hour = Duration::from_secs(3600);
        let (first, second) = (GroupId(1), GroupId(2));
        // Ten bytes an entry in both logs, which end at 100 and 50.
        let behind = |group, last| if group == first { (100 - last) * 10 } else { (50 - last) * 10 };
        let left = |peer, heard| {
            let room = rooms.of(peer, second, heard, behind);
            (room.left, room.fresh)
        };
        assert_eq!(left(7, hour), (u64::MAX, false), "it has said nothing yet");
        rooms.note(7, first, 1000, 90);
        assert_eq!(left(7, hour), (900, true));
        rooms.note(7, second, 1000, 20);
        assert_eq!(left(7, hour), (1000 - 100 - 300, true), "both groups will fill it");
        assert_eq!(rooms.of(7, first, hour, behind).last, 90);
        assert_eq!(rooms.of(7, second, hour, behind).last, 20);
        // What it said last of its ring counts, in whatever group.
        rooms.note(7, first, 350, 100);
        assert_eq!(left(7, hour), (50, true));
        rooms.note(7, first, 0, 100);
        assert_eq!(left(7, hour), (0, true));
        assert_eq!(left(7, Duration::ZERO), (0, false), "it was heard too long ago");
        assert_eq!(left(8, hour), (u64::MAX, false));
    }

    #[test]
    fn a_ring_is_full_while_its_owner_has_just_said_so() {
        let rooms = PeerRooms::<crate::TokioRuntime>::default();
        let hour = Duration::from_secs(3600);
        assert!(!rooms.is_full(7, hour));
        rooms.note(7, GroupId(1), 1, 5);
        assert!(!rooms.is_full(7, hour));
        rooms.note(7, GroupId(2), 0, 5);
        assert!(rooms.is_full(7, hour) && !rooms.is_full(8, hour));
        assert!(!rooms.is_full(7, Duration::ZERO), "it was heard too long ago");
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
