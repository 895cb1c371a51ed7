//! Which processes of a cluster are alive and which groups each leads, known once for all groups of a process.
//!
//! # Place
//! beside the host of the groups ([`crate::groups`]), which asks the other members ([`crate::network::method::PULSE`]); [`crate::rest`]
//! draws its conclusions for each group
//! # Invariants
//! - L1. One pulse a heartbeat goes between two processes, whichever of them asks, however many groups they share; none where there is
//!   but the first group.
//! - L2. Nothing that is safe rests on it. It says when an election is asked for, and refuses votes that Raft would grant; it grants none.
//!   A lease is that of openraft: an acknowledgement within the lease, which each voter keeps by its own clock.
//! - L3. Who claims to lead a group hears a majority of its voters. So a leader that only a few hear is given up by them.
//! - L4. A process that was never heard counts as heard when this one started.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use mainstay_wal::GroupId;
use openraft_rt::Instant;

use crate::wire::{MEMBERS_MAX, Reader, Writer};
use crate::{Error, ErrorKind, Result, Runtime};

/// Groups of one pulse at most.
const CLAIMS_MAX: u32 = 1 << 12;

/// What a process says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pulse {
    /// Bytes that its ring takes.
    pub(crate) room: u64,
    /// The groups beside the first that it leads (L3), and in which term.
    pub(crate) leads: BTreeMap<GroupId, u64>,
}

impl Pulse {
    pub(crate) fn write(&self, out: &mut Writer) {
        out.u64(self.room).u32(self.leads.len().min(CLAIMS_MAX as usize) as u32);
        for (group, term) in self.leads.iter().take(CLAIMS_MAX as usize) {
            out.u64(group.0).u64(*term);
        }
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self> {
        let (room, count) = (reader.u64()?, reader.u32()?);
        if count > CLAIMS_MAX {
            return Err(Error::new(ErrorKind::Corrupt, "a process claims to lead too many groups"));
        }
        let mut leads = BTreeMap::new();
        for _ in 0..count {
            leads.insert(GroupId(reader.u64()?), reader.u64()?);
        }
        Ok(Self { room, leads })
    }
}

/// A pulse as the whole of a request.
pub(crate) fn read_pulse(body: &bytes::Bytes) -> Result<Pulse> {
    let mut reader = Reader::open(body)?;
    let pulse = Pulse::read(&mut reader)?;
    reader.end()?;
    Ok(pulse)
}

/// Another process.
struct Peer<I> {
    /// Anything came from it.
    heard: I,
    /// It was asked for a pulse.
    asked: Option<I>,
    /// A pulse came, asked for or not.
    pulsed: Option<I>,
    leads: BTreeMap<GroupId, u64>,
}

/// See the module. By the ids of members.
pub(crate) struct Liveness<R: Runtime> {
    began: R::Instant,
    peers: Mutex<BTreeMap<u64, Peer<R::Instant>>>,
    /// What this process claims to lead.
    own: Mutex<BTreeMap<GroupId, u64>>,
}

impl<R: Runtime> Default for Liveness<R> {
    fn default() -> Self {
        Self { began: R::Instant::now(), peers: Mutex::default(), own: Mutex::default() }
    }
}

impl<R: Runtime> Liveness<R> {
    fn peers(&self) -> MutexGuard<'_, BTreeMap<u64, Peer<R::Instant>>> {
        self.peers.lock().expect("nothing panics while it holds this lock")
    }

    fn with<T>(&self, peer: u64, change: impl FnOnce(&mut Peer<R::Instant>) -> T) -> T {
        let mut peers = self.peers();
        if peers.len() > 2 * MEMBERS_MAX && !peers.contains_key(&peer) {
            // Members are heard again in a moment.
            peers.clear();
        }
        let began = self.began;
        change(peers.entry(peer).or_insert_with(|| Peer {
            heard: began,
            asked: None,
            pulsed: None,
            leads: BTreeMap::new(),
        }))
    }

    /// This process leads these groups, in these terms.
    pub(crate) fn claim(&self, leads: BTreeMap<GroupId, u64>) {
        *self.own.lock().expect("nothing panics while it holds this lock") = leads;
    }

    /// What it last claimed.
    pub(crate) fn claims(&self) -> BTreeMap<GroupId, u64> {
        self.own.lock().expect("nothing panics while it holds this lock").clone()
    }

    /// Something came from `peer`.
    pub(crate) fn hear(&self, peer: u64) {
        self.with(peer, |peer| peer.heard = R::Instant::now());
    }

    /// A pulse came from `peer`.
    pub(crate) fn note(&self, peer: u64, pulse: Pulse) {
        let now = R::Instant::now();
        self.with(peer, |peer| {
            (peer.heard, peer.pulsed, peer.leads) = (now, Some(now), pulse.leads);
        });
    }

    /// Whether `peer` is to be asked now, since none came and none was asked for within `interval`. Then it counts as asked.
    pub(crate) fn ask(&self, peer: u64, interval: Duration) -> bool {
        let now = R::Instant::now();
        self.with(peer, |peer| {
            let rests = |at: Option<R::Instant>| at.is_none_or(|at| now.saturating_duration_since(at) >= interval);
            let asks = rests(peer.asked) && rests(peer.pulsed);
            if asks {
                peer.asked = Some(now);
            }
            asks
        })
    }

    /// Whether anything came from `peer` within this time.
    pub(crate) fn is_heard(&self, peer: u64, within: Duration) -> bool {
        let heard = self.peers().get(&peer).map_or(self.began, |peer| peer.heard);
        R::Instant::now().saturating_duration_since(heard) < within
    }

    /// Whether `peer` has said after `since` that it does not lead `group` in `term` or a later one.
    pub(crate) fn disowns(&self, peer: u64, group: GroupId, term: u64, since: R::Instant) -> bool {
        let peers = self.peers();
        let Some(peer) = peers.get(&peer) else { return false };
        peer.pulsed.is_some_and(|at| at > since) && peer.leads.get(&group).is_none_or(|led| *led < term)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokioRuntime;

    #[test]
    fn a_pulse_survives_the_wire() {
        let pulse = Pulse { room: 7, leads: [(GroupId(2), 3), (GroupId(9), u64::MAX)].into() };
        let mut out = Writer::new();
        pulse.write(&mut out);
        assert_eq!(read_pulse(&out.finish()).expect("ours"), pulse);
        let mut out = Writer::new();
        out.u64(0).u32(CLAIMS_MAX + 1);
        assert_eq!(read_pulse(&out.finish()).map_err(|e| e.kind()), Err(ErrorKind::Corrupt));
        assert!(read_pulse(&bytes::Bytes::from_static(b"?")).is_err());
    }

    #[test]
    fn one_of_two_processes_asks() {
        let liveness = Liveness::<TokioRuntime>::default();
        let hour = Duration::from_secs(3600);
        assert!(liveness.ask(2, hour), "nothing came yet");
        assert!(!liveness.ask(2, hour), "it was asked");
        assert!(liveness.ask(2, Duration::ZERO), "too long ago");
        liveness.note(3, Pulse::default());
        assert!(!liveness.ask(3, hour), "it has asked itself");
    }

    #[test]
    fn who_does_not_claim_a_group_disowns_it() {
        let liveness = Liveness::<TokioRuntime>::default();
        let before = liveness.began - Duration::from_secs(1);
        let group = GroupId(2);
        assert!(!liveness.disowns(7, group, 4, before), "it has said nothing");
        assert!(liveness.is_heard(7, Duration::from_secs(3600)) && !liveness.is_heard(7, Duration::ZERO));
        liveness.hear(7);
        assert!(!liveness.disowns(7, group, 4, before), "no pulse came");
        liveness.note(7, Pulse { room: 0, leads: [(group, 4)].into() });
        let disowned = [3, 4, 5].map(|term| liveness.disowns(7, group, term, before));
        assert_eq!(disowned, [false, false, true]);
        assert!(liveness.disowns(7, GroupId(3), 1, before));
        let later = before + Duration::from_secs(3600);
        assert!(!liveness.disowns(7, GroupId(3), 1, later), "it spoke before");
    }

    #[test]
    fn only_so_many_are_kept() {
        let liveness = Liveness::<TokioRuntime>::default();
        (0..10_000).for_each(|peer| liveness.hear(peer));
        assert!(liveness.peers().len() <= 2 * MEMBERS_MAX + 1);
    }
}
