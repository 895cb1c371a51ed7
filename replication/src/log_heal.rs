//! Fetches what damage has taken from the log, before the node takes part.
//!
//! # Place
//! between the log store and openraft: [`Inner::run`] comes after it. `log_cases` decides, this asks and carries out
//! # Invariants
//! - G1. While anything is missing openraft does not run here: no vote is given, nothing is acknowledged, nothing truncated.
//!   The node answers only what others ask of its log, so that nodes damaged at different places heal each other.
//! - G2. An entry is taken over only when it is proven to be the one that was lost (log matching, or committed).
//! - G3. Pauses between two rounds grow, up to [`ROUND_PAUSE_MAX`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use mainstay_engine::LogIndex;

use crate::entry_index::{Damage, Missing};
use crate::log_cases::{Best, Facts, Verdict, decide};
use crate::log_store::{EntryRequest, Given};
use crate::membership::gives_up;
use crate::network::method;
use crate::node::{Inner, Phase};
use crate::priority;
use crate::state_machine::{NO_ROOM, Offer, take_tables};
use crate::types::{Entry, EntryPayload, LogId, StoredMembership, Vote, term_of};
use crate::wire::{Reader, Writer, decode_result};
use crate::{Envelope, Error, ErrorKind, MemberInfo, MemberRole, NodeId, PeerAddress, Result, Runtime};

/// How long one member may take for an answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause after a round that came to nothing; each further one waits twice as long.
const ROUND_PAUSE: Duration = Duration::from_millis(50);
/// The longest pause between two rounds.
const ROUND_PAUSE_MAX: Duration = Duration::from_secs(2);
/// Rounds of asking for one entry that cannot be read while the node runs, before who reads it is told.
const ENTRY_ROUNDS_MAX: u32 = 20;

/// The end of another log.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ends {
    pub(crate) vote: Option<Vote>,
    pub(crate) last: Option<LogId>,
    /// Its own end is not known.
    pub(crate) open: bool,
}

impl Ends {
    pub(crate) fn write(&self, out: &mut Writer) {
        out.option(self.vote.as_ref(), |w, vote| {
            w.vote(vote);
        });
        out.option_log_id(self.last.as_ref()).bool(self.open);
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Self> {
        Ok(Self { vote: reader.option(Reader::vote)?, last: reader.option(Reader::log_id)?, open: reader.bool()? })
    }
}

pub(crate) fn write_given(out: &mut Writer, given: &Given) {
    match given {
        Given::Entries(entries) => out.u8(0).entries(entries),
        Given::Purged => out.u8(1),
        Given::Damaged => out.u8(2),
        Given::Nothing => out.u8(3),
    };
}

pub(crate) fn read_given(reader: &mut Reader) -> Result<Given> {
    Ok(match reader.u8()? {
        0 => Given::Entries(reader.entries()?),
        1 => Given::Purged,
        2 => Given::Damaged,
        3 => Given::Nothing,
        _ => return Err(Error::new(ErrorKind::Corrupt, "unknown answer for lost entries")),
    })
}

/// The range of a request for lost entries.
pub(crate) fn read_lost(body: &Bytes) -> Result<(u64, u64, Option<LogId>)> {
    let mut reader = Reader::open(body)?;
    let lost = (reader.u64()?, reader.u64()?, reader.option(Reader::log_id)?);
    reader.end()?;
    Ok(lost)
}

/// Log id and membership at an index.
type Base = (LogId, StoredMembership);

fn write_wanted(out: &mut Writer, index: u64, known: LogId) {
    out.u64(index).log_id(&known);
}

/// The index and the entry of a request for what a log begins behind.
pub(crate) fn read_wanted(body: &Bytes) -> Result<(u64, LogId)> {
    let mut reader = Reader::open(body)?;
    let wanted = (reader.u64()?, reader.log_id()?);
    reader.end()?;
    Ok(wanted)
}

pub(crate) fn write_base(out: &mut Writer, base: Option<&Base>) {
    out.option(base, |w, (id, membership)| {
        w.log_id(id).stored_membership(membership);
    });
}

pub(crate) fn read_base(reader: &mut Reader) -> Result<Option<Base>> {
    reader.option(|r| Ok((r.log_id()?, r.stored_membership()?)))
}

/// Who is asked: by its id, when it is known.
pub(crate) type Voter = (Option<NodeId>, PeerAddress);

/// Another voter, and what it said.
struct Answer {
    to: Voter,
    given: Option<Given>,
}

impl<R: Runtime> Inner<R> {
    /// Mends the log, then takes part.
    pub(crate) fn start_log_healing(self: &Arc<Self>, damage: &Damage) {
        let lost = damage.missing.iter().map(|range| range.to - range.from + 1).sum();
        self.log.note_lost(lost);
        self.set_phase(Phase::Recovering(name(damage)));
        let this = self.clone();
        self.spawn(async move {
            let me = this.engine.identity().node;
            let mut pause = ROUND_PAUSE;
            let mut members = None;
            while let Some(damage) = this.log.damage() {
                match this.heal_step(&damage, members.as_deref()).await {
                    Ok(()) => pause = ROUND_PAUSE,
                    Err(error) => {
                        tracing::warn!(%error, "the log is not whole yet");
                        // What is lost may have changed them.
                        members = this.confirmed_members(me).await;
                        // That the first group says, of all.
                        if this.host.is_none() && members.as_deref().is_some_and(|members| gives_up(members, me)) {
                            return this.set_phase(Phase::Removed);
                        }
                        this.set_phase(Phase::Recovering(error.to_string()));
                        R::sleep(pause).await;
                        pause = (pause * 2).min(ROUND_PAUSE_MAX);
                    }
                }
            }
            let outcome = match this.log.straighten().await {
                Ok(()) => this.begin().await,
                Err(error) => Err(Error::new(ErrorKind::Closed, error.to_string())),
            };
            match outcome {
                Ok(()) => tracing::info!("the log is whole again"),
                Err(error) => this.set_phase(Phase::Failed(error.to_string())),
            }
        });
    }

    /// The other voters as the log knows them, and whether it does. When the membership itself is lost: whoever this process was
    /// told of.
    pub(crate) fn other_voters(&self) -> (Vec<Voter>, bool) {
        let voters = self.voters_in(&self.log.membership());
        if voters.is_empty() && self.log.membership().voter_ids().next().is_none() {
            let mine = self.transport.local_address();
            let told = self.options.peers.values().filter(|address| **address != mine);
            return (told.map(|address| (None, address.clone())).collect(), false);
        }
        (voters, true)
    }

    /// The other voters of a membership.
    fn voters_in(&self, membership: &StoredMembership) -> Vec<Voter> {
        let me = self.engine.identity().node;
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let others = membership.membership().nodes().filter(|(id, _)| **id != me && voters.contains(id));
        others.map(|(id, member)| (Some(NodeId(*id)), crate::wire::peer_address(member))).collect()
    }

    /// The other voters of `members`, whom a confirmed leader has named, or else those that the log knows.
    fn voters_of(&self, members: Option<&[MemberInfo]>) -> (Vec<Voter>, bool) {
        let me = self.engine.identity().node;
        let Some(members) = members else { return self.other_voters() };
        let others = members.iter().filter(|m| m.role == MemberRole::Voter && m.id.0 != me);
        (others.map(|m| (Some(m.id), m.peer_address.clone())).collect(), true)
    }

    async fn ask(&self, to: &Voter, method: u8, body: Bytes) -> Result<Bytes> {
        let answer = self.transport.call(to.1.clone(), to.0, Envelope { method, body }, CALL_TIMEOUT).await?;
        Ok(answer.body)
    }

    /// What the other voters say.
    async fn ask_for(&self, voters: &[Voter], lost: &Missing, anchor: Option<LogId>) -> Vec<Answer> {
        join_all(voters.iter().map(|to| async move {
            let mut body = Writer::new();
            body.u64(lost.from).u64(lost.to).option_log_id(anchor.as_ref());
            let answer = self.ask(to, method::LOG_GIVE, body.finish()).await;
            let given = answer.and_then(|bytes| decode_result(&bytes, read_given));
            let given = given.inspect_err(|error| tracing::debug!(address = %to.1.0, %error, "does not answer")).ok();
            Answer { to: to.clone(), given: given.filter(|given| follows(given, lost)) }
        }))
        .await
    }

    /// What this log begins behind, from one that has an entry of it. Nobody has to lead for that.
    async fn ask_for_base(&self, voters: &[Voter]) -> Option<Base> {
        let (index, known) = self.log.base_wanted()?;
        self.base_from(voters, index, known).await
    }

    /// The same where no entry here is known to be right: from the log that goes furthest, which has all that is committed.
    async fn base_of_most_complete(&self, voters: &[Voter]) -> Option<Base> {
        let index = self.log.decided().0;
        let (to, last, _) = self.most_complete(voters, index).await.ok()?;
        self.base_from(&[to], index, last?).await
    }

    async fn base_from(&self, voters: &[Voter], index: u64, known: LogId) -> Option<Base> {
        let mut body = Writer::new();
        write_wanted(&mut body, index, known);
        let body = body.finish();
        for to in voters {
            let answer = self.ask(to, method::LOG_BASE, body.clone()).await;
            match answer.and_then(|bytes| decode_result(&bytes, read_base)) {
                Ok(Some(base)) if base.0.index == index => return Some(base),
                Ok(_) => tracing::debug!(member = %called(to), index, "cannot tell what the log begins behind"),
                Err(error) => tracing::debug!(member = %called(to), %error, "does not answer"),
            }
        }
        None
    }

    /// One step: fills one range, or finds out how the log ends. `members` are those that a confirmed leader has named. The error
    /// says what is waited for.
    async fn heal_step(self: &Arc<Self>, damage: &Damage, members: Option<&[MemberInfo]>) -> Result<()> {
        let closed = |error: std::io::Error| Error::new(ErrorKind::Closed, error.to_string());
        let (voters, known) = self.voters_of(members);
        if damage.base {
            let alone = known && voters.is_empty();
            let base = match (alone, damage.open_from.is_some()) {
                (true, _) => Some(self.log.own_base().ok_or_else(|| halt("where the log begins", &[]))?),
                (false, true) if known => self.base_of_most_complete(&voters).await,
                (false, true) => None,
                (false, false) => self.ask_for_base(&voters).await,
            };
            return match base {
                Some((at, membership)) => {
                    tracing::info!(at = at.index, alone, "it is known what the log begins behind");
                    self.log.rebase(at, membership).await.map_err(closed)
                }
                None => self.import_state(&voters, "where the log begins is lost").await,
            };
        }
        if let Some(lost) = damage.missing.first() {
            let answers = self.ask_for(&voters, lost, lost.anchor).await;
            return match verdict(&answers, known) {
                Verdict::Fill => {
                    let entries = longest(answers).unwrap_or_default();
                    tracing::info!(from = lost.from, entries = entries.len(), "lost entries were fetched");
                    self.log.fill(entries).await.map_err(closed)
                }
                Verdict::Import => self.import_state(&voters, &range(lost)).await,
                Verdict::Follow => self.follow(voters, lost.from).await,
                Verdict::Halt => Err(halt(&range(lost), &answers)),
                Verdict::Wait => Err(wait(&range(lost), &answers)),
            };
        }
        let from = damage.open_from.unwrap_or_else(|| self.log.next());
        // How many entries there were, or whom a vote was given to, nobody here knows: every other voter is heard.
        let lost = Missing { from, to: u64::MAX, anchor: None };
        let what = format!("the entries from index={from} on, or a vote");
        let answers = self.ask_for(&voters, &lost, None).await;
        let damaged = answers.iter().any(|a| a.given == Some(Given::Damaged));
        let all = known && answers.iter().all(|a| a.given.is_some());
        let alone = known && answers.is_empty();
        if answers.iter().any(|a| a.given == Some(Given::Purged)) {
            return self.import_state(&voters, &what).await;
        }
        match (all, damaged || alone) {
            (true, false) => self.follow(voters, from).await,
            (true, true) => Err(halt(&what, &answers)),
            (false, _) => {
                let waits = wait(&what, &answers);
                match longest(answers).filter(|_| !known && from == 0) {
                    // Committed ones, the first of which says who the members are.
                    Some(entries) => self.log.replace_end(None, entries).await.map_err(closed),
                    None => Err(waits),
                }
            }
        }
    }

    /// Row D: from `from` on the log becomes that of the most complete other voter.
    async fn follow(self: &Arc<Self>, mut voters: Vec<Voter>, from: u64) -> Result<()> {
        let closed = |error: std::io::Error| Error::new(ErrorKind::Closed, error.to_string());
        let (to, entries, last, term) = loop {
            let (to, last, term) = self.most_complete(&voters, from).await?;
            let Some(entries) = self.entries_of(&to, from, last).await? else {
                return self.import_state(&voters, &format!("the entries from index={from} on are lost")).await;
            };
            // What was lost may have made others voters: they are heard too.
            let named = entries.iter().rev().find_map(|entry| match &entry.payload {
                EntryPayload::Membership(membership) => {
                    Some(StoredMembership::new(Some(entry.log_id), membership.clone()))
                }
                _ => None,
            });
            let named = self.voters_in(&named.unwrap_or_else(|| self.log.membership_before(from)));
            let more: Vec<Voter> =
                named.into_iter().filter(|(id, _)| voters.iter().all(|(asked, _)| asked != id)).collect();
            if more.is_empty() {
                break (to, entries, last, term);
            }
            voters.extend(more);
        };
        tracing::warn!(
            from,
            entries = entries.len(),
            term,
            member = %called(&to),
            "the log goes on as that of another voter does"
        );
        let after = match from.checked_sub(1) {
            None => None,
            Some(before) => match self.log.log_id(before) {
                Some(id) => Some(id),
                None => {
                    return self.import_state(&voters, &format!("the entry before index={from} is not known")).await;
                }
            },
        };
        let term = term.max(last.map_or(0, |id| term_of(&id)));
        self.log.replace_end(after, entries).await.map_err(closed)?;
        self.log.close_end(term).await.map_err(closed)
    }

    /// Whose log goes furthest, where it ends, and the highest term that one of the voters knows. All have to answer.
    async fn most_complete(&self, voters: &[Voter], from: u64) -> Result<(Voter, Option<LogId>, u64)> {
        let ends = join_all(voters.iter().map(|to| async move {
            let answer = self.ask(to, method::LOG_ENDS, Writer::new().finish()).await?;
            Ok((to.clone(), decode_result(&answer, Ends::read)?))
        }))
        .await
        .into_iter()
        .collect::<Result<Vec<_>>>()
        .map_err(|error| Error::new(ErrorKind::Unavailable, format!("waits for every other voter: {error}")))?;
        if ends.is_empty() || ends.iter().any(|(_, ends)| ends.open) {
            let message = format!("the entries from index={from} on are lost, and another voter has lost its end too");
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        let term = ends.iter().filter_map(|(_, ends)| ends.vote.map(|vote| vote.leader_id.term)).max().unwrap_or(0);
        let best = ends.into_iter().max_by_key(|(_, ends)| ends.last);
        let (to, Ends { last, .. }) = best.ok_or_else(|| Error::new(ErrorKind::Internal, "no voter"))?;
        Ok((to, last, term))
    }

    /// The entries from `from` to the end of another log; `None` when it has forgotten some.
    async fn entries_of(&self, to: &Voter, from: u64, last: Option<LogId>) -> Result<Option<Vec<Entry>>> {
        let mut entries: Vec<Entry> = Vec::new();
        let Some(last) = last.filter(|last| last.index >= from) else { return Ok(Some(entries)) };
        let moved = |said: &str| {
            let message = format!("the most complete log moved on meanwhile member={} said={said}", called(to));
            Error::new(ErrorKind::Unavailable, message)
        };
        let mut next = from;
        while next <= last.index {
            let mut body = Writer::new();
            body.u64(next).u64(last.index).option_log_id(Some(&last));
            let answer = self.ask(to, method::LOG_GIVE, body.finish()).await?;
            let lost = Missing { from: next, to: last.index, anchor: Some(last) };
            match decode_result(&answer, read_given)? {
                given if !follows(&given, &lost) => return Err(moved("other entries")),
                Given::Entries(part) => {
                    next += part.len() as u64;
                    entries.extend(part);
                }
                Given::Purged => return Ok(None),
                other => return Err(moved(&format!("{other:?}"))),
            }
        }
        match entries.last().is_some_and(|entry| entry.log_id == last) {
            true => Ok(Some(entries)),
            false => Err(moved("another last entry")),
        }
    }

    /// Takes over the state of whoever leads: what is missing is in its tables.
    async fn import_state(self: &Arc<Self>, voters: &[Voter], why: &str) -> Result<()> {
        let mut last = Error::new(ErrorKind::Unavailable, "no other voter is known");
        for to in voters {
            let answer = self.ask(to, method::OFFER, Writer::new().finish()).await;
            let offer = answer.and_then(|bytes| decode_result(&bytes, crate::network::read_offer));
            match offer {
                Ok(offer) => {
                    // Where the membership is lost too, nothing else says where it listens.
                    *self.offered_by.lock().expect("nothing panics while it holds this lock") =
                        Some((NodeId(offer.from), to.1.clone()));
                    return self.take_state(offer).await;
                }
                Err(error) => last = error,
            }
        }
        Err(Error::new(ErrorKind::Unavailable, format!("{why}: waits for the state of a leader: {last}")))
    }

    async fn take_state(self: &Arc<Self>, offer: Offer) -> Result<()> {
        let closed = |error: std::io::Error| Error::new(ErrorKind::Closed, error.to_string());
        let Some(at) = offer.meta.last_log_id else {
            return Err(Error::new(ErrorKind::Unavailable, "the leader has no state in tables yet"));
        };
        let flushed = self.group.flushed();
        let known = LogIndex(at.index) == flushed && self.log.log_id(flushed.0).is_some();
        if LogIndex(at.index) < flushed || known || at.index < self.log.purged_index() {
            let message = format!("the leader has no newer state in tables yet at={}", at.index);
            return Err(Error::new(ErrorKind::Unavailable, message));
        }
        if !self.log.begin_install(&offer.meta, flushed).await.map_err(closed)? {
            return Err(Error::new(ErrorKind::Unavailable, NO_ROOM));
        }
        if !self.is_witness() {
            let peers = Arc::new(crate::service::NodePeers(Arc::downgrade(self)));
            take_tables(&self.group, peers, &offer).await?;
        }
        self.log.rebase(at, offer.meta.last_membership).await.map_err(closed)?;
        tracing::info!(at = at.index, "the state of another replica took the place of what was lost");
        Ok(())
    }

    /// Fetches entries that cannot be read while the node takes part.
    pub(crate) fn start_entry_healing(self: &Arc<Self>) {
        let mut requests = self.log.entry_requests();
        let this = self.clone();
        self.spawn(async move {
            while let Some(EntryRequest { id, done }) = requests.recv().await {
                let node = this.clone();
                this.spawn(async move {
                    if let Some(entry) = node.fetch_entry(id).await {
                        // Who asked may have gone.
                        let _ = done.send(entry);
                    }
                });
            }
        });
    }

    async fn fetch_entry(&self, id: LogId) -> Option<Entry> {
        let lost = Missing { from: id.index, to: id.index, anchor: Some(id) };
        for round in 0..ENTRY_ROUNDS_MAX {
            let (voters, known) = self.other_voters();
            let answers = self.ask_for(&voters, &lost, Some(id)).await;
            let verdict = verdict(&answers, known);
            for answer in answers {
                if let Some(Given::Entries(entries)) = answer.given
                    && let Some(entry) = entries.into_iter().find(|entry| entry.log_id == id)
                {
                    return Some(entry);
                }
            }
            if self.log.log_id(id.index).is_some_and(|now| now != id) {
                return None;
            }
            self.give_way(verdict, round).await;
            R::sleep(ROUND_PAUSE_MAX / 4).await;
            if verdict == Verdict::Import {
                // No log will give it. Who applies it takes over the tables.
                tracing::error!(index = id.index, "an entry of the log is damaged here, and others have it in tables");
                return None;
            }
        }
        tracing::error!(index = id.index, "an entry of the log is damaged here, and no other voter gave it");
        None
    }

    /// A leader that cannot send an entry stands in the way of who lacks it. Where another voter has it in tables, that one leads and sends those. Where no
    /// other voter has it it was never committed, so any of them may lead, and the first entry of that leader takes its place here: they are told one after
    /// the other, best first, since an orderly hand-over would ask for a log as long as this one.
    async fn give_way(&self, verdict: Verdict, round: u32) {
        let Ok(running) = self.running() else { return };
        if self.leader_of(&running) != Some(running.id) {
            return;
        }
        match verdict {
            Verdict::Import => {
                let Ok(_one) = self.handing_over.acquire().await else { return };
                match self.hand_over(&running, None).await {
                    Ok(to) => tracing::warn!(to, "an entry is lost that others have in tables: one of them leads"),
                    Err(error) => tracing::warn!(%error, "leadership was not handed over"),
                }
                return;
            }
            Verdict::Follow => {}
            Verdict::Fill | Verdict::Halt | Verdict::Wait => return,
        }
        let mut heirs = self.heirs(&running);
        let mut to = None;
        for _ in 0..=round {
            to = priority::heir(&heirs);
            heirs.iter_mut().filter(|heir| Some(heir.id) == to).for_each(|heir| heir.told += 1);
        }
        let Some(to) = to else { return };
        tracing::warn!(to, "an entry is lost that no other voter has: another is to lead");
        let mut body = Writer::new();
        body.vote(&Self::metrics_of(&running, |m| m.vote)).u64(to).option_log_id(None);
        if let Err(error) = self.call_member(NodeId(to), method::TRANSFER, body.finish(), CALL_TIMEOUT).await {
            tracing::warn!(%error, to, "a voter was not told to lead");
        }
    }

    /// The end of this log, for a member that has lost its own.
    pub(crate) fn ends(&self) -> Ends {
        let (vote, last) = self.log.ends();
        let damage = self.log.damage();
        Ends { vote, last, open: damage.is_some_and(|d| d.base || d.open_from.is_some() || !d.missing.is_empty()) }
    }
}

/// The most entries that one of them gave.
fn longest(answers: Vec<Answer>) -> Option<Vec<Entry>> {
    let given = answers.into_iter().filter_map(|answer| match answer.given {
        Some(Given::Entries(entries)) => Some(entries),
        _ => None,
    });
    given.max_by_key(Vec::len)
}

/// Entries that were asked for follow each other from where they were asked for.
fn follows(given: &Given, lost: &Missing) -> bool {
    match given {
        Given::Entries(entries) => {
            !entries.is_empty()
                && entries.iter().zip(lost.from..).all(|(entry, index)| entry.log_id.index == index && index <= lost.to)
        }
        _ => true,
    }
}

fn verdict(answers: &[Answer], known: bool) -> Verdict {
    let best = answers.iter().filter_map(|answer| match &answer.given {
        Some(Given::Entries(_)) => Some(Best::Proven),
        Some(Given::Purged) => Some(Best::Purged),
        Some(Given::Damaged) => Some(Best::Damaged),
        Some(Given::Nothing) => Some(Best::Nothing),
        None => None,
    });
    // A voter alone may have been the majority: nobody else can tell that an entry was not committed.
    let best = if answers.is_empty() { Best::Damaged } else { best.max().unwrap_or(Best::Nothing) };
    let all = known && answers.iter().all(|answer| answer.given.is_some());
    let row = decide(&Facts { best, all });
    tracing::debug!(row = %row.letter, ?best, all, "lost entries judged");
    row.verdict
}

/// How a voter is named to people.
fn called(voter: &Voter) -> String {
    voter.0.map_or_else(|| voter.1.0.clone(), |id| id.to_string())
}

fn range(lost: &Missing) -> String {
    match lost.from == lost.to {
        true => format!("entry index={}", lost.from),
        false => format!("entries index={}..={}", lost.from, lost.to),
    }
}

fn name(damage: &Damage) -> String {
    let what = damage.missing.first().map(range);
    what.unwrap_or_else(|| "the end of the log".into()) + " damaged: asks the other members"
}

fn halt(what: &str, answers: &[Answer]) -> Error {
    let damaged = answers.iter().filter(|a| a.given == Some(Given::Damaged)).map(|a| called(&a.to));
    let damaged = damaged.collect::<Vec<_>>().join(",");
    Error::new(
        ErrorKind::Corrupt,
        format!("{what} damaged here and at every member that may have it members={damaged}"),
    )
}

fn wait(what: &str, answers: &[Answer]) -> Error {
    let silent = answers.iter().filter(|a| a.given.is_none()).map(|a| called(&a.to));
    let silent = silent.collect::<Vec<_>>().join(",");
    Error::new(ErrorKind::Unavailable, format!("{what} damaged: waits for members={silent}"))
}
