//! Records of the Raft log in the node's log. docs/format.md, "Raft records".
//!
//! # Invariants
//! - Kinds and layouts are fixed by [`crate::wire::VERSION`]; a record of another version is `Foreign`, a damaged one
//!   `Corrupt`. The log checks the bytes before they come here.
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::Bytes;
use mainstay_wal::RecordKind;

use crate::entry_index::Recovered;
use crate::types::{Entry, EntryPayload, LogId, Payload, StoredMembership, Vote};
use crate::wire::{Reader, Writer, entry_parts};
use crate::{Error, ErrorKind, Result};

/// An entry of the Raft log.
pub(crate) const ENTRY: RecordKind = RecordKind(32);
/// The vote.
pub(crate) const VOTE: RecordKind = RecordKind(33);
/// The entries after an index are gone.
pub(crate) const TRUNCATE: RecordKind = RecordKind(34);
/// The entries up to an index are gone: they are in tables.
pub(crate) const PURGE: RecordKind = RecordKind(35);
/// The state at an index is about to be taken over from a peer.
pub(crate) const INSTALL: RecordKind = RecordKind(36);

/// An entry that takes the place of one that damage has taken; what follows it stays.
pub(crate) const REPAIR: RecordKind = RecordKind(37);

/// Nothing: it lies behind what was durable when it was written, and so proves it.
pub(crate) const SEAL: RecordKind = RecordKind(38);

/// Bytes before the command in the record of an entry.
pub(crate) const ENTRY_HEADER_BYTES: usize = 18;

/// The parts of an entry's record: a header of [`ENTRY_HEADER_BYTES`], and the command as the proposer gave it.
pub(crate) fn encode_entry(entry: &Entry) -> Vec<Bytes> {
    let (kind, payload) = entry_parts(entry);
    let mut header = Writer::with_capacity(ENTRY_HEADER_BYTES);
    header.u8(kind).log_id(&entry.log_id);
    if payload.is_empty() { vec![header.finish()] } else { vec![header.finish(), payload] }
}

pub(crate) fn encode_vote(vote: &Vote) -> Vec<Bytes> {
    let mut writer = Writer::new();
    writer.vote(vote);
    vec![writer.finish()]
}

/// The version of a note, below the bit that says that the vote is committed.
pub(crate) const VOTE_NOTE_VERSION: u8 = 1;
const COMMITTED: u8 = 0x80;

/// A vote beside the ring: short, since those of all groups have one block.
pub(crate) fn encode_vote_note(vote: &Vote) -> Bytes {
    let mut out = vec![if vote.committed { VOTE_NOTE_VERSION | COMMITTED } else { VOTE_NOTE_VERSION }];
    for mut value in [vote.leader_id.term, vote.leader_id.voted_for] {
        while value >= 0x80 {
            out.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        out.push(value.to_le_bytes()[0]);
    }
    out.into()
}

/// Reads what [`encode_vote_note`] wrote.
pub(crate) fn decode_vote_note(bytes: &Bytes) -> Result<Vote> {
    let damaged = || Error::new(ErrorKind::Corrupt, "a vote in the superblock is damaged");
    let (first, mut rest) = bytes.split_first().ok_or_else(damaged)?;
    let version = first & !COMMITTED;
    if version != VOTE_NOTE_VERSION {
        let message =
            format!("a vote in the superblock of another version version={version} known={VOTE_NOTE_VERSION}");
        return Err(Error::new(ErrorKind::Foreign, message));
    }
    let mut number = || {
        let mut value = 0_u64;
        for shift in (0..u64::BITS).step_by(7) {
            let (byte, left) = rest.split_first().ok_or_else(damaged)?;
            rest = left;
            let bits = u64::from(byte & 0x7f);
            let here =
                bits.checked_shl(shift).filter(|here| here.checked_shr(shift) == Some(bits)).ok_or_else(damaged)?;
            value |= here;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(damaged())
    };
    let (term, node) = (number()?, number()?);
    if !rest.is_empty() {
        return Err(damaged());
    }
    Ok(if first & COMMITTED == 0 { Vote::new(term, node) } else { Vote::new_committed(term, node) })
}

pub(crate) fn encode_truncate(after: Option<&LogId>) -> Vec<Bytes> {
    let mut writer = Writer::new();
    writer.option_log_id(after);
    vec![writer.finish()]
}

/// The body of [`PURGE`] and of [`INSTALL`].
pub(crate) fn encode_anchor(at: &LogId, membership: &StoredMembership) -> Vec<Bytes> {
    let mut writer = Writer::new();
    writer.log_id(at).stored_membership(membership);
    vec![writer.finish()]
}

pub(crate) fn encode_seal() -> Vec<Bytes> {
    vec![Writer::new().finish()]
}

/// Decodes the record of an entry; the payload shares the memory of `bytes`.
pub(crate) fn decode_entry(bytes: &Bytes) -> Result<Entry> {
    let mut reader = Reader::open(bytes)?;
    let kind = reader.u8()?;
    let log_id = reader.log_id()?;
    let payload = match kind {
        0 => {
            reader.end()?;
            EntryPayload::Blank
        }
        1 => EntryPayload::Normal(Payload::new(reader.rest())),
        2 => {
            let membership = reader.membership()?;
            reader.end()?;
            EntryPayload::Membership(membership)
        }
        other => return Err(Error::new(ErrorKind::Foreign, format!("entry of an unknown kind kind={other}"))),
    };
    Ok(Entry { log_id, payload })
}

/// Decodes a record of the log's owner.
pub(crate) fn decode(kind: RecordKind, bytes: &Bytes) -> Result<Recovered> {
    match kind {
        ENTRY => return decode_entry(bytes).map(Recovered::Entry),
        REPAIR => return decode_entry(bytes).map(Recovered::Repair),
        RecordKind::HOLE => return Ok(Recovered::Hole),
        SEAL => return Ok(Recovered::Seal),
        _ => {}
    }
    let mut reader = Reader::open(bytes)?;
    let record = match kind {
        VOTE => Recovered::Vote(reader.vote()?),
        TRUNCATE => Recovered::Truncate(reader.option(Reader::log_id)?),
        PURGE => Recovered::Purge(reader.log_id()?, reader.stored_membership()?),
        INSTALL => Recovered::Install(reader.log_id()?, reader.stored_membership()?),
        other => {
            return Err(Error::new(ErrorKind::Foreign, format!("record of an unknown kind kind={}", other.0)));
        }
    };
    reader.end()?;
    Ok(record)
}
