//! Bytes of the log's records and of the requests between nodes. docs/format.md, "Raft records" and "Peer protocol", owns
//! the layouts.
//!
//! # Place
//! pure: bytes to values and back, no I/O, no clock
//! # Invariants
//! - W1. Decoding never panics, and allocates no more than the input justifies: a count is checked against the bytes
//!   that are left before anything is reserved.
//! - W2. Every message begins with [`VERSION`]; another one is `Foreign`. Bytes behind a message are `Corrupt`.
//! # Why not
//! serde over openraft's types: its documentation says that they are no stable format (pitfall 8)
#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, Bytes, BytesMut};
use mainstay_engine::{Applied, LogIndex, TableId};

use crate::types::{Entry, EntryPayload, LogId, Member, Membership, Payload, StoredMembership, Vote, log_id, term_of};
use crate::{CLUSTER_VERSION_MAX, Error, ErrorKind, MemberInfo, MemberRole, NodeId, PeerAddress, Result};

/// Version of every record and message here.
pub(crate) const VERSION: u8 = 1;
/// The kinds of errors by their number on the wire; numbers are only added. Any other is [`ErrorKind::Internal`].
const KINDS: [ErrorKind; 13] = [
    ErrorKind::Invalid,
    ErrorKind::NotFound,
    ErrorKind::NotLeader,
    ErrorKind::Unavailable,
    ErrorKind::Indeterminate,
    ErrorKind::OutOfSpace,
    ErrorKind::Corrupt,
    ErrorKind::Foreign,
    ErrorKind::Locked,
    ErrorKind::Unsupported,
    ErrorKind::Closed,
    ErrorKind::Io,
    ErrorKind::Conflict,
];
const KIND_INTERNAL: u8 = 255;
/// Longest name or address.
pub(crate) const NAME_BYTES_MAX: usize = 255;
/// Set in the length of a member's name: a site follows. Members without one are written as before there were sites.
pub(crate) const SITE_FLAG: u16 = 0x8000;
/// Set in the same length: a priority other than 0 follows, behind the site if there is one.
pub(crate) const PRIORITY_FLAG: u16 = 0x4000;
/// Set in the same length: the member is a witness. Nothing follows for it.
pub(crate) const WITNESS_FLAG: u16 = 0x2000;
/// Set in the same length: the version of the cluster follows, behind the site and the priority. Not set while it is the first.
pub(crate) const VERSION_FLAG: u16 = 0x1000;
const FLAGS: u16 = SITE_FLAG | PRIORITY_FLAG | WITNESS_FLAG | VERSION_FLAG;
// No length of a name sets a flag.
const _: () = assert!(NAME_BYTES_MAX & FLAGS as usize == 0 && NAME_BYTES_MAX < VERSION_FLAG as usize);
const _: () = assert!(FLAGS.count_ones() == 4);
/// Nodes of a membership, learners included.
pub(crate) const MEMBERS_MAX: usize = 64;
/// Voter sets of a membership: one, or the two of a joint configuration; a few more are read.
const CONFIGS_MAX: usize = 4;
/// Entries of one append request. openraft sends at most `max_payload_entries`.
pub(crate) const ENTRIES_MAX: usize = 1 << 16;

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("message is damaged what={what}"))
}

/// Takes values off the front of a buffer; slices of it share its memory.
pub(crate) struct Reader {
    rest: Bytes,
}

impl Reader {
    /// Begins to read a message, whose version it checks.
    pub(crate) fn open(bytes: &Bytes) -> Result<Self> {
        let mut reader = Self { rest: bytes.clone() };
        match reader.u8()? {
            VERSION => Ok(reader),
            other => Err(Error::new(ErrorKind::Foreign, format!("message of another version version={other}"))),
        }
    }

    /// Ends: nothing may be left.
    pub(crate) fn end(self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(corrupt("trailing bytes")) }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let Some(array) = self.rest.first_chunk::<N>().copied() else {
            return Err(corrupt("too short"));
        };
        let _ = self.rest.split_to(N);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn id(&mut self) -> Result<[u8; 16]> {
        self.array()
    }

    pub(crate) fn bool(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(corrupt("flag")),
        }
    }

    fn take(&mut self, length: usize) -> Result<Bytes> {
        if self.rest.len() < length {
            return Err(corrupt("length"));
        }
        Ok(self.rest.split_to(length))
    }

    pub(crate) fn bytes(&mut self) -> Result<Bytes> {
        let length = self.u32()? as usize;
        self.take(length)
    }

    pub(crate) fn rest(self) -> Bytes {
        self.rest
    }

    pub(crate) fn string(&mut self) -> Result<String> {
        let length = self.u16()?;
        self.string_of(length)
    }

    fn string_of(&mut self, length: u16) -> Result<String> {
        let length = usize::from(length);
        if length > NAME_BYTES_MAX {
            return Err(corrupt("string too long"));
        }
        String::from_utf8(self.take(length)?.to_vec()).map_err(|_| corrupt("string"))
    }

    /// A longer text: an error message.
    pub(crate) fn text(&mut self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.bytes()?).into_owned())
    }

    /// A count of things of at least `least` bytes each, refused when the rest cannot hold them (W1).
    fn count(&mut self, max: usize, least: usize) -> Result<usize> {
        let count = self.u32()? as usize;
        if count > max || count.saturating_mul(least) > self.rest.len() {
            return Err(corrupt("count"));
        }
        Ok(count)
    }

    pub(crate) fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<Option<T>> {
        if self.bool()? { read(self).map(Some) } else { Ok(None) }
    }

    pub(crate) fn log_id(&mut self) -> Result<LogId> {
        let term = self.u64()?;
        Ok(log_id(term, self.u64()?))
    }

    pub(crate) fn vote(&mut self) -> Result<Vote> {
        let term = self.u64()?;
        let node = self.u64()?;
        Ok(if self.bool()? { Vote::new_committed(term, node) } else { Vote::new(term, node) })
    }

    pub(crate) fn member(&mut self) -> Result<Member> {
        let length = self.u16()?;
        let name = self.string_of(length & !FLAGS)?;
        let (peer_address, client_address) = (self.string()?, self.string()?);
        let incarnation = self.id()?;
        let site = if length & SITE_FLAG == 0 { String::new() } else { self.string()? };
        let priority = match length & PRIORITY_FLAG {
            0 => 0,
            // Without a priority there is no flag, so that a member has one form only.
            _ => Some(self.u8()?).filter(|priority| *priority > 0).ok_or_else(|| corrupt("priority"))?,
        };
        let version = match length & VERSION_FLAG {
            0 => 0,
            // The first has no flag, for the same reason.
            _ => Some(self.u16()?).filter(|version| *version > 1).ok_or_else(|| corrupt("version"))?,
        };
        if version > CLUSTER_VERSION_MAX {
            let message = format!(
                "the cluster has a version of a newer build: start the newer build version={version} newest={CLUSTER_VERSION_MAX}"
            );
            return Err(Error::new(ErrorKind::Foreign, message));
        }
        let witness = length & WITNESS_FLAG != 0;
        Ok(Member { name, peer_address, client_address, incarnation, site, priority, witness, version })
    }

    pub(crate) fn membership(&mut self) -> Result<Membership> {
        let count = self.count(CONFIGS_MAX, 4)?;
        let mut configs = Vec::with_capacity(count);
        for _ in 0..count {
            let voters = self.count(MEMBERS_MAX, 8)?;
            let mut config = BTreeSet::new();
            for _ in 0..voters {
                config.insert(self.u64()?);
            }
            configs.push(config);
        }
        let count = self.count(MEMBERS_MAX, 30)?;
        let mut nodes = BTreeMap::new();
        for _ in 0..count {
            let id = self.u64()?;
            nodes.insert(id, self.member()?);
        }
        if configs.is_empty() && nodes.is_empty() {
            return Ok(Membership::default());
        }
        Membership::new(configs, nodes).map_err(|_| corrupt("membership"))
    }

    pub(crate) fn stored_membership(&mut self) -> Result<StoredMembership> {
        let at = self.option(Self::log_id)?;
        Ok(StoredMembership::new(at, self.membership()?))
    }

    pub(crate) fn entry(&mut self) -> Result<Entry> {
        let kind = self.u8()?;
        let log_id = self.log_id()?;
        let mut payload = Self { rest: self.bytes()? };
        let payload = match kind {
            0 => {
                payload.end()?;
                EntryPayload::Blank
            }
            1 => EntryPayload::Normal(Payload::new(payload.rest)),
            2 => {
                let membership = payload.membership()?;
                payload.end()?;
                EntryPayload::Membership(membership)
            }
            other => return Err(Error::new(ErrorKind::Foreign, format!("entry of an unknown kind kind={other}"))),
        };
        Ok(Entry { log_id, payload })
    }

    pub(crate) fn entries(&mut self) -> Result<Vec<Entry>> {
        let count = self.count(ENTRIES_MAX, 21)?;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            entries.push(self.entry()?);
        }
        Ok(entries)
    }

    fn kind(&mut self) -> Result<ErrorKind> {
        Ok(KINDS.get(usize::from(self.u8()?)).copied().unwrap_or(ErrorKind::Internal))
    }

    fn engine_error(&mut self) -> Result<mainstay_engine::Error> {
        Ok(mainstay_engine::Error::new(self.kind()?, self.text()?))
    }

    pub(crate) fn applied(&mut self) -> Result<Applied> {
        let index = LogIndex(self.u64()?);
        let response = if self.bool()? { Ok(self.bytes()?) } else { Err(self.engine_error()?) };
        Ok(Applied { index, response })
    }

    pub(crate) fn table_id(&mut self) -> Result<TableId> {
        let job = mainstay_engine::JobId(self.u64()?);
        Ok(TableId { job, ordinal: self.u32()? })
    }

    pub(crate) fn error(&mut self) -> Result<Error> {
        let kind = self.kind()?;
        if kind == ErrorKind::NotLeader {
            let leader = self.option(|r| Ok((NodeId(r.u64()?), r.string()?)))?;
            return Ok(Error::not_leader(leader, self.text()?));
        }
        Ok(Error::new(kind, self.text()?))
    }

    pub(crate) fn member_info(&mut self) -> Result<MemberInfo> {
        let id = self.u64()?;
        let role = if self.bool()? { MemberRole::Voter } else { MemberRole::Learner };
        Ok(self.member()?.info(id, role))
    }

    pub(crate) fn member_infos(&mut self) -> Result<Vec<MemberInfo>> {
        let count = self.count(MEMBERS_MAX, 31)?;
        let mut infos = Vec::with_capacity(count);
        for _ in 0..count {
            infos.push(self.member_info()?);
        }
        Ok(infos)
    }

    pub(crate) fn strings(&mut self) -> Result<Vec<String>> {
        let count = self.count(MEMBERS_MAX, 2)?;
        let mut strings = Vec::with_capacity(count);
        for _ in 0..count {
            strings.push(self.string()?);
        }
        Ok(strings)
    }
}

/// Appends values to a buffer. What is encoded here is ours: a name over its limit was refused when it entered.
pub(crate) struct Writer {
    out: BytesMut,
}

impl Writer {
    /// Begins a message.
    pub(crate) fn new() -> Self {
        Self::with_capacity(64)
    }

    pub(crate) fn with_capacity(bytes: usize) -> Self {
        let mut out = BytesMut::with_capacity(bytes);
        out.put_u8(VERSION);
        Self { out }
    }

    pub(crate) fn finish(self) -> Bytes {
        self.out.freeze()
    }

    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.out.put_u8(value);
        self
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.out.put_u16_le(value);
        self
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.out.put_u32_le(value);
        self
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.out.put_u64_le(value);
        self
    }

    pub(crate) fn id(&mut self, value: &[u8; 16]) -> &mut Self {
        self.out.put_slice(value);
        self
    }

    pub(crate) fn bool(&mut self, value: bool) -> &mut Self {
        self.u8(u8::from(value))
    }

    pub(crate) fn bytes(&mut self, value: &[u8]) -> &mut Self {
        let length = u32::try_from(value.len()).expect("values are bounded by the frame limit");
        self.u32(length);
        self.out.put_slice(value);
        self
    }

    /// Cuts what is longer than [`NAME_BYTES_MAX`]; callers refuse such a name before.
    pub(crate) fn string(&mut self, value: &str) -> &mut Self {
        self.string_with(value, 0)
    }

    fn string_with(&mut self, value: &str, flag: u16) -> &mut Self {
        let cut = value.as_bytes().get(..NAME_BYTES_MAX).unwrap_or(value.as_bytes());
        self.u16(u16::try_from(cut.len()).expect("at most 255") | flag);
        self.out.put_slice(cut);
        self
    }

    fn count(&mut self, count: usize) -> &mut Self {
        self.u32(u32::try_from(count).expect("counts are bounded"))
    }

    pub(crate) fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) -> &mut Self {
        self.bool(value.is_some());
        if let Some(value) = value {
            write(self, value);
        }
        self
    }

    pub(crate) fn log_id(&mut self, value: &LogId) -> &mut Self {
        self.u64(term_of(value)).u64(value.index)
    }

    pub(crate) fn option_log_id(&mut self, value: Option<&LogId>) -> &mut Self {
        self.option(value, |w, v| {
            w.log_id(v);
        })
    }

    pub(crate) fn vote(&mut self, value: &Vote) -> &mut Self {
        self.u64(value.leader_id.term).u64(value.leader_id.voted_for).bool(value.committed)
    }

    pub(crate) fn member(&mut self, value: &Member) -> &mut Self {
        let site = if value.site.is_empty() { 0 } else { SITE_FLAG };
        let priority = if value.priority == 0 { 0 } else { PRIORITY_FLAG };
        let witness = if value.witness { WITNESS_FLAG } else { 0 };
        let version = if value.version == 0 { 0 } else { VERSION_FLAG };
        self.string_with(&value.name, site | priority | witness | version)
            .string(&value.peer_address)
            .string(&value.client_address);
        self.id(&value.incarnation);
        if site != 0 {
            self.string(&value.site);
        }
        if priority != 0 {
            self.u8(value.priority);
        }
        if version != 0 {
            self.u16(value.version);
        }
        self
    }

    pub(crate) fn membership(&mut self, value: &Membership) -> &mut Self {
        let configs = value.get_joint_config();
        self.count(configs.len());
        for config in configs {
            self.count(config.len());
            for id in config {
                self.u64(*id);
            }
        }
        let nodes: Vec<_> = value.nodes().collect();
        self.count(nodes.len());
        for (id, member) in nodes {
            self.u64(*id).member(member);
        }
        self
    }

    pub(crate) fn stored_membership(&mut self, value: &StoredMembership) -> &mut Self {
        self.option_log_id(value.log_id().as_ref()).membership(value.membership())
    }

    pub(crate) fn entry(&mut self, value: &Entry) -> &mut Self {
        let (kind, payload) = entry_parts(value);
        self.u8(kind).log_id(&value.log_id).bytes(&payload)
    }

    pub(crate) fn entries(&mut self, value: &[Entry]) -> &mut Self {
        self.count(value.len());
        for entry in value {
            self.entry(entry);
        }
        self
    }

    fn kind(&mut self, value: ErrorKind) -> &mut Self {
        let at = KINDS.iter().position(|kind| *kind == value).and_then(|at| u8::try_from(at).ok());
        self.u8(at.unwrap_or(KIND_INTERNAL))
    }

    fn engine_error(&mut self, value: &mainstay_engine::Error) -> &mut Self {
        self.kind(value.kind()).bytes(value.to_string().as_bytes())
    }

    pub(crate) fn applied(&mut self, value: &Applied) -> &mut Self {
        self.u64(value.index.0).bool(value.response.is_ok());
        match &value.response {
            Ok(bytes) => self.bytes(bytes),
            Err(error) => self.engine_error(error),
        }
    }

    pub(crate) fn table_id(&mut self, value: TableId) -> &mut Self {
        self.u64(value.job.0).u32(value.ordinal)
    }

    pub(crate) fn error(&mut self, value: &Error) -> &mut Self {
        self.kind(value.kind());
        if value.kind() == ErrorKind::NotLeader {
            self.option(value.leader(), |w, (id, address)| {
                w.u64(id.0).string(address);
            });
        }
        self.bytes(value.to_string().as_bytes())
    }

    pub(crate) fn member_info(&mut self, value: &MemberInfo) -> &mut Self {
        self.u64(value.id.0).bool(value.role == MemberRole::Voter).member(&Member::from(value))
    }

    pub(crate) fn member_infos(&mut self, value: &[MemberInfo]) -> &mut Self {
        self.count(value.len());
        for info in value {
            self.member_info(info);
        }
        self
    }

    pub(crate) fn strings(&mut self, value: &[String]) -> &mut Self {
        self.count(value.len());
        for string in value {
            self.string(string);
        }
        self
    }
}

/// The kind and the payload of an entry; a normal entry's payload is shared, not copied.
pub(crate) fn entry_parts(entry: &Entry) -> (u8, Bytes) {
    match &entry.payload {
        EntryPayload::Blank => (0, Bytes::new()),
        EntryPayload::Normal(payload) => (1, payload.bytes.clone()),
        EntryPayload::Membership(membership) => {
            let mut writer = Writer { out: BytesMut::new() };
            writer.membership(membership);
            (2, writer.finish())
        }
    }
}

/// Encodes a result of an operation between nodes.
pub(crate) fn encode_result<T>(result: Result<T>, write: impl FnOnce(&mut Writer, T)) -> Bytes {
    let mut writer = Writer::new();
    match result {
        Ok(value) => {
            writer.bool(true);
            write(&mut writer, value);
        }
        Err(error) => {
            writer.bool(false).error(&error);
        }
    }
    writer.finish()
}

/// Decodes what [`encode_result`] made.
pub(crate) fn decode_result<T>(bytes: &Bytes, read: impl FnOnce(&mut Reader) -> Result<T>) -> Result<T> {
    let mut reader = Reader::open(bytes)?;
    if reader.bool()? {
        let value = read(&mut reader)?;
        reader.end()?;
        Ok(value)
    } else {
        let error = reader.error()?;
        reader.end()?;
        Err(error)
    }
}

/// Decodes a member from a result.
pub(crate) fn peer_address(member: &Member) -> PeerAddress {
    PeerAddress(member.peer_address.clone())
}
