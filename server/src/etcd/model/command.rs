//! The commands of the model and their answers as bytes.
//!
//! # Format
//! docs/format.md, "etcd model". A command carries one or many requests of one branch, each with its own revision and its
//! own answer: what waits while an entry is under way goes into the next one.
//!
//! ```text
//! command:  version u8 | branch u64 | { kind u8 | bytes u32 | message } ...
//! answer:   version u8 | { status u8 | bytes u32 | message } ...
//! ```
//!
//! Numbers are little-endian; `message` is the protobuf message of the kind; status 0 is success, any other the number of a
//! [`Refusal`], with an empty message.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use bytes::{Buf, BufMut, Bytes, BytesMut};
use mainstay_engine::{BranchId, Error, ErrorKind, Result};
use prost::Message;

use crate::etcd::error::Refusal;
use crate::proto::etcdserverpb as pb;

/// First byte of commands and answers.
pub const COMMAND_VERSION: u8 = 1;
const STATUS_OK: u8 = 0;

/// One request that changes the state.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// Sets a key.
    Put(pb::PutRequest),
    /// Deletes keys.
    DeleteRange(pb::DeleteRangeRequest),
    /// Compares and changes.
    Txn(pb::TxnRequest),
    /// Makes old revisions unreadable and begins to collect them.
    Compact(pb::CompactionRequest),
    /// Makes a lease.
    LeaseGrant(pb::LeaseGrantRequest),
    /// Ends a lease and its keys.
    LeaseRevoke(pb::LeaseRevokeRequest),
    /// Goes on collecting what a compaction left.
    Collect,
}

impl Request {
    fn kind(&self) -> u8 {
        match self {
            Self::Put(_) => 1,
            Self::DeleteRange(_) => 2,
            Self::Txn(_) => 3,
            Self::Compact(_) => 4,
            Self::LeaseGrant(_) => 5,
            Self::LeaseRevoke(_) => 6,
            Self::Collect => 7,
        }
    }

    /// Bytes of its message.
    pub(crate) fn message_bytes(&self) -> usize {
        match self {
            Self::Put(message) => message.encoded_len(),
            Self::DeleteRange(message) => message.encoded_len(),
            Self::Txn(message) => message.encoded_len(),
            Self::Compact(message) => message.encoded_len(),
            Self::LeaseGrant(message) => message.encoded_len(),
            Self::LeaseRevoke(message) => message.encoded_len(),
            Self::Collect => 0,
        }
    }

    /// Appends the request to a command begun with [`begin_command`].
    pub(crate) fn append_to(&self, command: &mut BytesMut) {
        let bytes = self.message_bytes();
        command.reserve(bytes.saturating_add(5));
        command.put_u8(self.kind());
        command.put_u32_le(u32::try_from(bytes).expect("a request is limited to far less than 4 GiB"));
        match self {
            Self::Put(message) => message.encode_raw(command),
            Self::DeleteRange(message) => message.encode_raw(command),
            Self::Txn(message) => message.encode_raw(command),
            Self::Compact(message) => message.encode_raw(command),
            Self::LeaseGrant(message) => message.encode_raw(command),
            Self::LeaseRevoke(message) => message.encode_raw(command),
            Self::Collect => {}
        }
    }

    fn decode(kind: u8, message: Bytes) -> Result<Self> {
        fn of<M: Message + Default>(message: Bytes) -> Result<M> {
            M::decode(message).map_err(|_| malformed("message"))
        }
        Ok(match kind {
            1 => Self::Put(of(message)?),
            2 => Self::DeleteRange(of(message)?),
            3 => Self::Txn(of(message)?),
            4 => Self::Compact(of(message)?),
            5 => Self::LeaseGrant(of(message)?),
            6 => Self::LeaseRevoke(of(message)?),
            7 => Self::Collect,
            _ => return Err(malformed("kind")),
        })
    }
}

/// A command with no request yet.
pub(crate) fn begin_command(branch: BranchId, capacity: usize) -> BytesMut {
    let mut out = BytesMut::with_capacity(capacity.saturating_add(16));
    out.put_u8(COMMAND_VERSION);
    out.put_u64_le(branch.0);
    out
}

/// A command of one request.
pub(crate) fn encode_command(branch: BranchId, request: &Request) -> Bytes {
    let mut out = begin_command(branch, request.message_bytes());
    request.append_to(&mut out);
    out.freeze()
}

/// The branch and the requests of a command. Keys and values are slices of `command`.
///
/// # Errors
/// `Invalid` for bytes that are no command of this version.
pub fn decode_command(mut command: Bytes) -> Result<(BranchId, Vec<Request>)> {
    if command.len() < 9 || command.get_u8() != COMMAND_VERSION {
        return Err(malformed("version"));
    }
    let branch = BranchId(command.get_u64_le());
    let mut requests = Vec::with_capacity(1);
    while let Some((kind, message)) = take_item(&mut command)? {
        requests.push(Request::decode(kind, message)?);
    }
    Ok((branch, requests))
}

/// The answer to one request.
#[derive(Clone, Debug, PartialEq)]
pub enum Response {
    /// See [`Request::Put`].
    Put(pb::PutResponse),
    /// See [`Request::DeleteRange`].
    DeleteRange(pb::DeleteRangeResponse),
    /// See [`Request::Txn`].
    Txn(pb::TxnResponse),
    /// See [`Request::Compact`] and [`Request::Collect`].
    Compact(pb::CompactionResponse),
    /// See [`Request::LeaseGrant`].
    LeaseGrant(pb::LeaseGrantResponse),
    /// See [`Request::LeaseRevoke`].
    LeaseRevoke(pb::LeaseRevokeResponse),
}

/// An answer with no item yet.
pub(super) fn begin_answer() -> BytesMut {
    let mut out = BytesMut::with_capacity(32);
    out.put_u8(COMMAND_VERSION);
    out
}

/// Appends what became of one request.
pub(super) fn append_answer(answer: &mut BytesMut, outcome: &Result<Response, Refusal>) {
    fn put(answer: &mut BytesMut, message: &impl Message) {
        let bytes = message.encoded_len();
        answer.reserve(bytes.saturating_add(5));
        answer.put_u8(STATUS_OK);
        answer.put_u32_le(u32::try_from(bytes).unwrap_or(u32::MAX));
        message.encode_raw(answer);
    }
    match outcome {
        Ok(Response::Put(message)) => put(answer, message),
        Ok(Response::DeleteRange(message)) => put(answer, message),
        Ok(Response::Txn(message)) => put(answer, message),
        Ok(Response::Compact(message)) => put(answer, message),
        Ok(Response::LeaseGrant(message)) => put(answer, message),
        Ok(Response::LeaseRevoke(message)) => put(answer, message),
        Err(refusal) => {
            answer.put_u8(*refusal as u8);
            answer.put_u32_le(0);
        }
    }
}

/// The items of an answer in the order of the requests: a message, or why not.
///
/// # Errors
/// `Invalid` for bytes that are no answer of this version.
pub(crate) fn decode_answer(mut answer: Bytes) -> Result<Vec<Result<Bytes, Refusal>>> {
    if answer.is_empty() || answer.get_u8() != COMMAND_VERSION {
        return Err(malformed("version"));
    }
    let mut items = Vec::with_capacity(1);
    while let Some((status, message)) = take_item(&mut answer)? {
        items.push(match status {
            STATUS_OK => Ok(message),
            number => Err(Refusal::from_number(number).ok_or_else(|| malformed("status"))?),
        });
    }
    Ok(items)
}

/// Takes a byte and a counted message off the front; `None` at the end.
fn take_item(from: &mut Bytes) -> Result<Option<(u8, Bytes)>> {
    if from.is_empty() {
        return Ok(None);
    }
    if from.len() < 5 {
        return Err(malformed("length"));
    }
    let kind = from.get_u8();
    let bytes = usize::try_from(from.get_u32_le()).map_err(|_| malformed("length"))?;
    if bytes > from.len() {
        return Err(malformed("length"));
    }
    Ok(Some((kind, from.split_to(bytes))))
}

fn malformed(what: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("not a command of the etcd model what={what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_requests_travel_in_one_command_and_come_back_in_order() {
        let requests = vec![
            Request::Put(pb::PutRequest { key: "a".into(), value: "1".into(), ..Default::default() }),
            Request::Collect,
            Request::LeaseRevoke(pb::LeaseRevokeRequest { id: 7 }),
        ];
        let mut command = begin_command(BranchId(3), 0);
        for request in &requests {
            request.append_to(&mut command);
        }
        let command = command.freeze();
        assert_eq!(decode_command(command.clone()).expect("just encoded"), (BranchId(3), requests));
        for cut in 0..command.len() {
            // A prefix that ends between two items is a shorter command; every other is refused.
            let _ = decode_command(command.slice(..cut));
        }
        assert!(decode_command(command.slice(..command.len() - 1)).is_err());
    }

    #[test]
    fn answers_keep_refusals_and_messages_apart() {
        let mut answer = begin_answer();
        append_answer(&mut answer, &Ok(Response::Put(pb::PutResponse::default())));
        append_answer(&mut answer, &Err(Refusal::LeaseNotFound));
        let items = decode_answer(answer.freeze()).expect("just encoded");
        assert_eq!(items, vec![Ok(Bytes::new()), Err(Refusal::LeaseNotFound)]);
    }
}
