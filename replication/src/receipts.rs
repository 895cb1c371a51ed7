//! What this node remembers of the promises of other members, so that one whose volume went back is told.
//!
//! # Place
//! `network` notes what others answer; `service` gives it to the member that it is about; a member that starts asks for it before it
//! takes part, and one that denies it is told. docs/replication.md, "A volume that went back"
//! # Invariants
//! - B1. A receipt says no more than what the member had durable when it answered: a vote in that term, and the log up to that
//!   entry. A leader gives its followers one with each append.
//! - B2. Receipts are in memory: a node that starts anew has none. So they tell of a volume that went back only while those who
//!   remember run.
//! - B3. No member denies a receipt whose volume did not go back: in a later term its log may have been cut, and is not judged.
//!
//! # Why not
//! the count of openings in the superblock: a copy that was made during this life and is restored after it counts on as the original
//! would have.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;

use crate::membership::Who;
use crate::network::method;
use crate::node::{Inner, Phase};
use crate::types::{LogId, Vote};
use crate::wire::{MEMBERS_MAX, Reader, Writer, decode_result};
use crate::{Envelope, Error, ErrorKind, NodeId, PeerAddress, Result, Runtime};

/// How long the process at this member's address may take to say who it is.
const WHO_TIMEOUT: Duration = Duration::from_millis(500);

/// Between two looks whether the processes that this one was told of still refuse it.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);

/// Rounds of asking at a start: those that are known, and whom they follow.
const ASK_ROUNDS: usize = 2;

/// What a member has promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Receipt {
    /// It votes for no other in this term, nor in one before.
    pub(crate) term: u64,
    /// Acknowledged in this term: its log went up to here.
    pub(crate) last: Option<LogId>,
}

impl Receipt {
    /// Both were promised.
    fn join(self, other: Self) -> Self {
        match self.term.cmp(&other.term) {
            std::cmp::Ordering::Less => other,
            std::cmp::Ordering::Equal => Self { last: self.last.max(other.last), ..self },
            std::cmp::Ordering::Greater => self,
        }
    }

    /// Whether a member with this vote and a log that ends at `last` has forgotten it.
    pub(crate) fn is_denied_by(&self, vote: Option<Vote>, last: Option<LogId>) -> bool {
        let term = vote.map_or(0, |vote| vote.leader_id.term);
        term < self.term || (term == self.term && last < self.last)
    }

    pub(crate) fn write(&self, out: &mut Writer) {
        out.u64(self.term).option_log_id(self.last.as_ref());
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self> {
        Ok(Self { term: reader.u64()?, last: reader.option(Reader::log_id)? })
    }
}

/// A receipt as the whole of a request.
pub(crate) fn read_receipt(body: &Bytes) -> Result<Receipt> {
    let mut reader = Reader::open(body)?;
    let receipt = Receipt::read(&mut reader)?;
    reader.end()?;
    Ok(receipt)
}

/// An answer to [`method::RECEIPT`].
#[derive(Debug)]
pub(crate) struct Remembered {
    receipt: Option<Receipt>,
    /// Where the leader listens that the node knows.
    leader: Option<PeerAddress>,
}

impl Remembered {
    pub(crate) fn write(&self, out: &mut Writer) {
        out.option(self.receipt, |w, receipt| receipt.write(w));
        out.option(self.leader.as_ref(), |w, address| {
            w.string(&address.0);
        });
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self> {
        Ok(Self { receipt: reader.option(Receipt::read)?, leader: reader.option(|r| Ok(PeerAddress(r.string()?)))? })
    }
}

/// Those of each other member, by its id.
#[derive(Default)]
pub(crate) struct Receipts(Mutex<BTreeMap<u64, Receipt>>);

impl Receipts {
    pub(crate) fn note(&self, member: u64, receipt: Receipt) {
        let mut all = self.0.lock().expect("nothing panics while it holds this lock");
        let joined = all.get(&member).map_or(receipt, |known| known.join(receipt));
        all.insert(member, joined);
        if all.len() > 2 * MEMBERS_MAX {
            // Who is a member has promised something in a late term.
            let gone = all.iter().min_by_key(|(id, receipt)| (receipt.term, **id)).map(|(id, _)| *id);
            gone.and_then(|id| all.remove(&id));
        }
    }

    pub(crate) fn of(&self, member: u64) -> Option<Receipt> {
        let known = self.0.lock().expect("nothing panics while it holds this lock").get(&member).copied();
        known.filter(|_| !mainstay_io::mutant!(ForgetReceipts))
    }

    /// What a member has acknowledged that says in the same term that its log lacks `prev`, if that goes as far.
    pub(crate) fn contradict(&self, member: u64, term: u64, prev: Option<LogId>) -> Option<Receipt> {
        self.of(member).filter(|receipt| receipt.term == term && prev.is_some() && receipt.last >= prev)
    }
}

impl<R: Runtime> Inner<R> {
    /// As [`Inner::take_part`], once one of the processes that this one was told of takes it for a member, or none says that it is
    /// none.
    pub(crate) async fn begin(self: &Arc<Self>) -> Result<()> {
        self.set_phase(Phase::Starting);
        let Some(mut refusal) = self.refusal().await else { return self.take_part().await };
        let this = self.clone();
        self.spawn(async move {
            loop {
                let message = foreign_message(&refusal);
                if this.phase() == Phase::Starting {
                    tracing::error!(message);
                }
                this.set_phase(Phase::Foreign(message));
                R::sleep(REFUSED_PAUSE).await;
                match this.refusal().await {
                    Some(again) => refusal = again,
                    None => break,
                }
            }
            if let Err(error) = this.take_part().await {
                this.set_phase(Phase::Failed(error.to_string()));
            }
        });
        Ok(())
    }

    /// Why no process that this one was told of takes it for a member, if one of them says so and none takes it for one.
    async fn refusal(&self) -> Option<Error> {
        let others = self.options.peers.iter().filter(|(name, _)| **name != self.options.name);
        let asked = others.map(|(_, address)| {
            let request = Envelope { method: method::WHO, body: Writer::new().finish() };
            R::timeout(WHO_TIMEOUT, self.transport.call(address.clone(), None, request, WHO_TIMEOUT))
        });
        let answers: Vec<_> = join_all(asked).await.into_iter().flatten().collect();
        if answers.iter().any(Result::is_ok) {
            return None;
        }
        answers.into_iter().filter_map(Result::err).find(|error| error.kind() == ErrorKind::Foreign)
    }

    /// Takes part, once the log is whole, unless the volume went back: then what was promised is fetched first, as by a member that
    /// has lost the end of its log. Where that end was judged already with every other voter heard nobody knows better.
    pub(crate) async fn take_part(self: &Arc<Self>) -> Result<()> {
        self.set_phase(Phase::Starting);
        let denied = if self.log.end_is_judged() { None } else { self.denied_receipt().await };
        let Some(Receipt { term, last }) = denied else { return self.mend_vote_and_run().await };
        tracing::error!(term, ?last, "the volume went back behind what this member has promised: it is an older copy");
        self.log.lose_end();
        let damage = self.log.damage().expect("the end was just lost");
        self.start_log_healing(&damage);
        Ok(())
    }

    /// What another member remembers of this one, and this one does not. Those are asked that the log names and the processes that
    /// this one was told of, and whom they follow: an old copy knows the members of its time.
    async fn denied_receipt(&self) -> Option<Receipt> {
        let (vote, last) = self.log.ends();
        let mine = self.transport.local_address();
        let voters = self.other_voters().0.into_iter().map(|(_, address)| address);
        let mut ask: BTreeSet<PeerAddress> = voters.chain(self.options.peers.values().cloned()).collect();
        let mut asked = BTreeSet::from([mine]);
        for _ in 0..ASK_ROUNDS {
            let now: Vec<PeerAddress> = ask.difference(&asked).take(2 * MEMBERS_MAX).cloned().collect();
            asked.extend(now.iter().cloned());
            let answers = join_all(now.into_iter().map(|address| self.ask_for_receipt(address))).await;
            for remembered in answers.into_iter().flatten() {
                if let Some(receipt) = remembered.receipt.filter(|receipt| receipt.is_denied_by(vote, last)) {
                    return Some(receipt);
                }
                ask.extend(remembered.leader);
            }
        }
        None
    }

    async fn ask_for_receipt(&self, address: PeerAddress) -> Option<Remembered> {
        let request = Envelope { method: method::RECEIPT, body: Writer::new().finish() };
        // No longer than it waits before it votes: who does not answer then may hold a receipt, and tells it later.
        let call = self.transport.call(address, None, request, self.options.election_timeout);
        let answer = R::timeout(self.options.election_timeout, call).await.ok()?.ok()?;
        decode_result(&answer.body, Remembered::read).ok()
    }

    /// What this node remembers of `member`.
    pub(crate) fn remembered(&self, member: u64) -> Remembered {
        let leader = self.running().ok().and_then(|running| self.leader_of(&running));
        let leader = leader.and_then(|id| self.member(NodeId(id))).map(|member| member.peer_address);
        Remembered { receipt: self.receipts.of(member), leader }
    }

    /// A peer says that this member has denied a promise. True when that is so: then this node has left service.
    pub(crate) async fn told_of(&self, receipt: Receipt) -> bool {
        let (vote, last) = self.log.ends();
        if !receipt.is_denied_by(vote, last) {
            return false;
        }
        self.log.note_went_back();
        let message = "the volume went back behind what this member has promised: start the process again, and it asks the \
                       other members for what is missing";
        self.leave_service(message.into()).await;
        true
    }

    /// Another process that answers at the address which the members know of this one, with the same identity.
    pub(crate) async fn twin(&self) -> Option<String> {
        let identity = self.engine.identity();
        let address = crate::wire::peer_address(self.log.membership().membership().get_node(&identity.node)?);
        if address == self.transport.local_address() {
            return None;
        }
        let request = Envelope { method: method::WHO, body: Writer::new().finish() };
        let call = self.transport.call(address.clone(), None, request, WHO_TIMEOUT);
        let who = decode_result(&R::timeout(WHO_TIMEOUT, call).await.ok()?.ok()?.body, Who::read).ok()?;
        let same = who.cluster == identity.cluster && who.node == identity.node && who.opening != self.opening;
        same.then_some(address.0)
    }

    /// Serves nothing from here on: another process is this member.
    pub(crate) async fn stand_back(&self, address: String) {
        tracing::error!(address, "another process is this member: one of the two has a copy of the other's volume");
        self.stop(Phase::Twin(address)).await;
    }
}

/// What a node in [`Phase::Twin`] says.
pub(crate) fn twin_message(address: &str) -> String {
    format!(
        "another process is this member: one of the two has a copy of the other's volume, so end this one and wipe its volume \
         address={address}"
    )
}

/// What a node in [`Phase::Foreign`] says.
fn foreign_message(refusal: &Error) -> String {
    format!(
        "the processes that this one was told of refuse its volume: give it the volume that is theirs, or lay this one out anew, \
         which loses what it holds, and it joins them as a new one: {refusal}"
    )
}

/// The refusal of a member that has denied what it had promised: openraft would take it for the loss of a disk, and stop.
pub(crate) fn went_back(member: u64) -> Error {
    Error::new(ErrorKind::Unavailable, format!("the volume of this member went back: it was told id={member}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::log_id;

    fn receipt(term: u64, last: Option<(u64, u64)>) -> Receipt {
        Receipt { term, last: last.map(|(term, index)| log_id(term, index)) }
    }

    #[test]
    fn a_receipt_is_denied_by_less_of_the_same_term_and_by_an_earlier_one() {
        let given = receipt(5, Some((5, 90)));
        for (term, last, denied) in [
            (5, Some((5, 90)), false),
            (5, Some((5, 91)), false),
            (5, Some((5, 89)), true),
            (5, Some((4, 99)), true),
            (5, None, true),
            (4, Some((4, 200)), true),
            // In a later term a leader may have cut what was not committed.
            (6, Some((4, 80)), false),
        ] {
            let last = last.map(|(term, index)| log_id(term, index));
            assert_eq!(given.is_denied_by(Some(Vote::new(term, 1)), last), denied, "{term} {last:?}");
        }
        assert!(receipt(1, None).is_denied_by(None, None), "a vote that it does not know of");
        assert!(!receipt(0, None).is_denied_by(None, None));
    }

    #[test]
    fn the_promises_of_the_latest_term_count() {
        let receipts = Receipts::default();
        receipts.note(7, receipt(3, None));
        receipts.note(7, receipt(3, Some((3, 10))));
        receipts.note(7, receipt(3, Some((3, 8))));
        assert_eq!(receipts.of(7), Some(receipt(3, Some((3, 10)))));
        assert!(receipts.contradict(7, 3, Some(log_id(3, 10))).is_some());
        assert!(receipts.contradict(7, 3, Some(log_id(3, 11))).is_none());
        assert!(receipts.contradict(7, 4, Some(log_id(3, 9))).is_none(), "another leader may have cut it");
        receipts.note(7, receipt(5, None));
        receipts.note(7, receipt(4, Some((4, 99))));
        assert_eq!(receipts.of(7), Some(receipt(5, None)));
        assert_eq!(receipts.of(8), None);
    }

    #[test]
    fn only_so_many_are_kept() {
        let receipts = Receipts::default();
        receipts.note(1, receipt(9, None));
        (2..1000).for_each(|id| receipts.note(id, receipt(1, None)));
        assert_eq!((receipts.of(1), receipts.of(2)), (Some(receipt(9, None)), None), "a founder goes on promising");
        assert_eq!(receipts.of(999), Some(receipt(1, None)));
    }
}
