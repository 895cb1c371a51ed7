//! Followers whose ring is full and that get no further.
//!
//! # Place
//! beside the leader of a group; `tasks` purges what it asks for
//! # Invariants
//! - E1. A follower that says that its ring takes nothing more, and acknowledges nothing more for [`STUCK`] though there is more, is sent
//!   tables in place of entries: the leader has its own log rotated and keeps nothing of it behind the tables.
//! - E2. What such a follower has in its log of this group is in those tables then, and leaves its ring. So a ring that groups fill together
//!   is emptied from outside, though none of them gets the entries by which it would be cut.
//!
//! # Why not
//! waiting for the follower: what would let it cut its log are entries behind those for which it has no room. With one group the leader's
//!   log is full as well by then and is cut, which comes to the same; with several, or without further writes, it is not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::ServerState;
use openraft_rt::Instant;

use crate::Runtime;
use crate::node::{Inner, Running};

/// How long a follower with a full ring acknowledges nothing before it gets tables.
const STUCK: Duration = Duration::from_secs(3);

/// How far each follower with a full ring was, and since when.
pub(crate) struct Stuck<I>(BTreeMap<u64, (u64, I)>);

impl<I> Default for Stuck<I> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<I: Instant> Stuck<I> {
    /// Takes in which followers are full and lack something, and how far they are. The least advanced of those that have not moved for
    /// [`STUCK`].
    fn look(&mut self, full: impl Iterator<Item = (u64, u64)>, now: I) -> Option<u64> {
        let before = std::mem::take(&mut self.0);
        for (id, at) in full {
            let since = before.get(&id).filter(|(was, _)| *was == at).map_or(now, |(_, since)| *since);
            self.0.insert(id, (at, since));
        }
        let stuck = self.0.values().filter(|(_, since)| now.saturating_duration_since(*since) >= STUCK);
        stuck.map(|(at, _)| *at).min()
    }
}

impl<R: Runtime> Inner<R> {
    /// See the module. Called again and again.
    pub(crate) async fn relieve_followers(self: &Arc<Self>, running: &Arc<Running<R>>, stuck: &mut Stuck<R::Instant>) {
        let heard = 2 * self.options.election_timeout;
        let least = Self::metrics_of(running, |m| {
            if m.state != ServerState::Leader {
                return None;
            }
            let reached = m.replication.iter().flatten().map(|(id, at)| (*id, at.as_ref().map_or(0, |at| at.index)));
            let lacks = reached.filter(|(id, at)| *id != running.id && Some(*at) < m.last_log_index);
            stuck.look(lacks.filter(|(id, _)| self.rooms.is_full(*id, heard)), R::Instant::now())
        });
        let relieved = self.relieves.swap(least.is_some(), Ordering::Relaxed);
        let Some(least) = least else { return };
        if !relieved {
            tracing::warn!(
                group = self.number.0,
                least,
                "a follower whose log is full gets tables in place of entries"
            );
        }
        let flushed = self.group.flushed();
        if flushed.0 <= least {
            self.group.want_rotation();
        } else {
            self.purge(flushed).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Time = <crate::TokioRuntime as openraft_rt::AsyncRuntime>::Instant;

    #[test]
    fn who_is_full_and_does_not_move_is_stuck() {
        let begun = Time::now();
        let after = |millis| begun + Duration::from_millis(millis);
        let mut stuck = Stuck::<Time>::default();
        let mut look = |full: &[(u64, u64)], millis| stuck.look(full.iter().copied(), after(millis));
        assert_eq!(look(&[(2, 10), (3, 40)], 0), None);
        assert_eq!(look(&[(2, 10), (3, 40)], 2999), None);
        assert_eq!(look(&[(2, 11), (3, 40)], 3000), Some(40), "the other has moved");
        assert_eq!(look(&[(2, 11), (3, 40)], 6000), Some(11), "the least of both");
        assert_eq!(look(&[(2, 11)], 6001), Some(11));
        assert_eq!(look(&[], 6002), None, "it has room again");
        assert_eq!(look(&[(2, 11)], 6003), None, "and counts anew");
    }
}
