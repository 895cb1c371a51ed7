//! Which entries hold beyond a quorum, as a leader learns it from what its followers acknowledge.
//!
//! # Place
//! `write` waits here after the commit; a node that does not lead asks the leader
//! # Invariants
//! - H1. It is counted anew in each term: an acknowledgement of an entry that was replaced later says nothing of the one
//!   in its place.
//! - H2. Only committed entries are asked for, and the leader answers once it has applied the entry itself.
//! - H3. A level is never part of the commit (pitfall 13): a site that is away holds up who asked for it and nobody else.
//!
//! Lock order: the levels, then the metrics.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_engine::LogIndex;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use openraft_rt::Instant;

use crate::network::method;
use crate::node::{Inner, Running};
use crate::progress::Progress;
use crate::types::{LogId, Membership};
use crate::wire::{Reader, Writer, decode_result};
use crate::write::{FORWARDED_TIMEOUT, RETRY_PAUSE, WRITE_TIMEOUT};
use crate::{Durability, Error, ErrorKind, NodeId, Result, Runtime};

/// Levels that are followed at once: all voters, and each site. Members are at most 64.
const LEVELS_MAX: usize = 65;

/// Who has to have an entry durable beside a quorum.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Every voter.
    All,
    /// One member, voter or learner, that bears this label.
    Site(String),
}

impl Level {
    /// What a durability asks for beyond the quorum.
    pub(crate) fn of(durability: &Durability) -> Option<Self> {
        match durability {
            Durability::All => Some(Self::All),
            Durability::Site(site) => Some(Self::Site(site.clone())),
            _ => None,
        }
    }

    pub(crate) fn write(&self, out: &mut Writer) {
        match self {
            Self::All => out.u8(1),
            Self::Site(site) => out.u8(2).string(site),
        };
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self> {
        match reader.u8()? {
            1 => Ok(Self::All),
            2 => Ok(Self::Site(reader.string()?)),
            other => Err(Error::new(ErrorKind::Unsupported, format!("no such level level={other}"))),
        }
    }

    /// The last index that holds at this level, from what each member has durable. 0 while nothing does.
    pub(crate) fn holds_to(&self, membership: &Membership, durable: impl Fn(u64) -> Option<u64>) -> u64 {
        let held = match self {
            Self::All => membership.voter_ids().map(|id| durable(id).unwrap_or(0)).min(),
            Self::Site(site) => membership
                .nodes()
                .filter(|(_, m)| m.site == *site && !m.witness)
                .filter_map(|(id, _)| durable(*id))
                .max(),
        };
        held.unwrap_or(0)
    }
}

/// What is followed in one term of leadership.
struct Followed {
    term: u64,
    by_level: BTreeMap<Level, Arc<Progress>>,
}

/// The levels that somebody has asked for since this node leads.
#[derive(Default)]
pub(crate) struct Levels(Mutex<Option<Followed>>);

pub(crate) type Replicated = Option<BTreeMap<u64, Option<LogId>>>;

pub(crate) fn durable(replicated: &Replicated, id: u64) -> Option<u64> {
    replicated.as_ref()?.get(&id)?.as_ref().map(|id| id.index)
}

impl<R: Runtime> Inner<R> {
    /// Refuses a level that no member can reach.
    pub(crate) fn check_level(&self, level: &Level) -> Result<()> {
        match level {
            Level::Site(site) if !self.holders().any(|m| m.site == *site) => {
                Err(Error::new(ErrorKind::Invalid, format!("no member is at this site site={site}")))
            }
            _ => Ok(()),
        }
    }

    /// Waits until a committed entry holds at `level`.
    ///
    /// # Errors
    /// `Indeterminate`, whatever went wrong: the entry is committed and may hold by now.
    pub(crate) async fn await_level(self: &Arc<Self>, index: LogIndex, level: &Level) -> Result<()> {
        let deadline = R::Instant::now() + WRITE_TIMEOUT;
        let in_doubt = |why: &str| {
            let message =
                format!("committed by a quorum, not known to hold at its level in time level={level:?}: {why}");
            Err(Error::new(ErrorKind::Indeterminate, message))
        };
        loop {
            let result = match self.running() {
                Ok(running) => match self.leader_of(&running) {
                    Some(id) if id == running.id => self.leader_level(index, level, deadline).await,
                    Some(id) => {
                        let mut body = Writer::new();
                        body.u64(index.0);
                        level.write(&mut body);
                        let left = deadline.saturating_duration_since(R::Instant::now()).max(Duration::from_millis(1));
                        let answer = self.call_member(NodeId(id), method::AWAIT_LEVEL, body.finish(), left).await;
                        answer.and_then(|bytes| decode_result(&bytes, |_| Ok(())))
                    }
                    None => Err(Error::new(ErrorKind::Unavailable, "no leader is known")),
                },
                Err(error) => return in_doubt(&error.to_string()),
            };
            match result {
                Ok(()) => return Ok(()),
                Err(error) if R::Instant::now() + RETRY_PAUSE >= deadline => return in_doubt(&error.to_string()),
                // Asked again, of whoever leads then.
                Err(_) => R::sleep(RETRY_PAUSE).await,
            }
        }
    }

    /// Answers a node that does not lead.
    pub(crate) async fn serve_level(self: &Arc<Self>, index: LogIndex, level: &Level) -> Result<()> {
        self.leader_level(index, level, R::Instant::now() + FORWARDED_TIMEOUT).await
    }

    async fn leader_level(self: &Arc<Self>, index: LogIndex, level: &Level, deadline: R::Instant) -> Result<()> {
        let running = self.running()?;
        let reached = async {
            self.progress.reached(index).await?;
            self.follow_level(&running, level)?.reached(index).await
        };
        match R::timeout_at(deadline, reached).await {
            // Closed: the term is over.
            Ok(Err(e)) if e.kind() == ErrorKind::Closed => Err(self.not_leader(&running)),
            Ok(result) => result,
            Err(_) => Err(Error::new(ErrorKind::Unavailable, "not in time")),
        }
    }

    /// How far `level` holds in this term of leadership.
    fn follow_level(self: &Arc<Self>, running: &Arc<Running<R>>, level: &Level) -> Result<Arc<Progress>> {
        let mut followed = self.levels.0.lock().expect("nothing panics while it holds this lock");
        let metrics = running.metrics.borrow_watched();
        if metrics.state != ServerState::Leader {
            drop(metrics);
            return Err(self.not_leader(running));
        }
        let term = metrics.current_term;
        if followed.as_ref().is_none_or(|f| f.term != term) {
            if let Some(past) = followed.replace(Followed { term, by_level: BTreeMap::new() }) {
                past.by_level.values().for_each(|progress| progress.close());
            }
            let (this, running) = (self.clone(), running.clone());
            self.spawn(async move { this.follow_levels(&running, term).await });
        }
        let by_level = &mut followed.as_mut().expect("it was put there").by_level;
        if by_level.len() >= LEVELS_MAX && !by_level.contains_key(level) {
            return Err(Error::new(ErrorKind::Unavailable, "too many levels are asked for"));
        }
        let progress = by_level.entry(level.clone()).or_default().clone();
        // The next change of the metrics may be far: what is known already counts now.
        let membership = metrics.membership_config.membership();
        progress.advance(level.holds_to(membership, |id| durable(&metrics.replication, id)));
        Ok(progress)
    }

    /// Advances all that is asked for until the term ends.
    async fn follow_levels(self: &Arc<Self>, running: &Arc<Running<R>>, term: u64) {
        let mut metrics = running.metrics.clone();
        loop {
            {
                let followed = self.levels.0.lock().expect("nothing panics while it holds this lock");
                let m = metrics.borrow_and_update();
                let Some(followed) = followed.as_ref().filter(|f| f.term == term) else { return };
                if m.state != ServerState::Leader || m.current_term != term {
                    break;
                }
                let membership = m.membership_config.membership();
                for (level, progress) in &followed.by_level {
                    progress.advance(level.holds_to(membership, |id| durable(&m.replication, id)));
                }
            }
            if metrics.changed().await.is_err() {
                break;
            }
        }
        let mut followed = self.levels.0.lock().expect("nothing panics while it holds this lock");
        if let Some(past) = followed.take_if(|f| f.term == term) {
            past.by_level.values().for_each(|progress| progress.close());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::types::Member;

    #[test]
    fn a_level_holds_as_far_as_those_who_count_have_it() {
        let member = |site: &str| Member { site: site.into(), ..Member::default() };
        let nodes: BTreeMap<u64, Member> =
            [(1, member("a")), (2, member("a")), (3, member("b")), (70, member("c"))].into();
        let membership = Membership::new(vec![BTreeSet::from([1, 2, 3])], nodes).expect("every voter has a node");
        let check = |level: Level, durable: &[(u64, u64)], expect: u64| {
            let durable: BTreeMap<u64, u64> = durable.iter().copied().collect();
            let held = level.holds_to(&membership, |id| durable.get(&id).copied());
            assert_eq!(held, expect, "{level:?} {durable:?}");
        };
        let site = |name: &str| Level::Site(name.into());
        check(Level::All, &[(1, 9), (2, 8), (3, 7)], 7);
        check(Level::All, &[(1, 9), (2, 8), (3, 7), (70, 2)], 7);
        check(Level::All, &[(1, 9), (2, 8)], 0);
        check(site("a"), &[(1, 4), (2, 8), (3, 9)], 8);
        check(site("b"), &[(1, 9), (2, 8)], 0);
        check(site("b"), &[(1, 9), (2, 8), (3, 5)], 5);
        check(site("c"), &[(1, 9), (70, 6)], 6);
        check(site("elsewhere"), &[(1, 9), (2, 9), (3, 9), (70, 9)], 0);
    }

    /// In a change of voters those of both sets count.
    #[test]
    fn all_means_all_of_both_sets() {
        let nodes: BTreeMap<u64, Member> = (1..=4).map(|id| (id, Member::default())).collect();
        let configs = vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([1, 2, 4])];
        let membership = Membership::new(configs, nodes).expect("every voter has a node");
        assert_eq!(Level::All.holds_to(&membership, |id| Some(10 - id)), 6);
    }

    #[test]
    fn levels_survive_the_wire() {
        for level in [Level::All, Level::Site("x".into())] {
            let mut out = Writer::new();
            level.write(&mut out);
            let mut reader = Reader::open(&out.finish()).expect("ours");
            assert_eq!(Level::read(&mut reader).expect("ours"), level);
            reader.end().expect("nothing is left");
        }
    }
}
