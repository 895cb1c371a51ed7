//! Requests that apply once however often they are proposed.
//!
//! # Place
//! `group::apply` runs a [`crate::CommandBody::Once`] through here, on the view that the embedder's commands have too
//! # Format
//! docs/format.md, "Clients": one pair for each client, in a keyspace of their own
//! # Invariants
//! 1. The answer of a request and what it writes are written in one step. So a request that is found answered was applied, and
//!    one that is not was not.
//! 2. A client has one request at a time: only the answer of its last one is kept.
//! 3. Only the log decides: the clock that a client is forgotten by is that of the entries.
//! 4. That a condition did not hold is an answer, and written as one: a later proposal of the request is refused as the first.
//! # Why not
//! A table in memory: it would have to be rebuilt at each open and each install, and to be replayed from where the tables end.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;

use crate::codec::Decoder;
use crate::condition::{encode_broken, first_broken};
use crate::{Apply, CommandBody, Condition, Error, ErrorKind, Result, StateMachine, WriteOp};

/// The keyspace that holds the last answer of each client, in the branch that its requests write.
pub const CLIENTS_KEYSPACE: &str = "mainstay.clients";
/// A client that was silent for so long by the clock of the entries may be forgotten: 24 hours.
pub(crate) const CLIENT_IDLE_MAX_MS: u64 = 24 * 3600 * 1000;
/// Other clients that are looked at, and forgotten if they are due, when a new one comes.
const FORGET_LOOKS: usize = 4;
const VERSION: u8 = 1;

/// Names one request of one client, so that it applies once however often it is proposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientToken {
    /// Drawn at random by the client, once.
    pub client: [u8; 16],
    /// Grows from request to request. The next one begins when this one was answered or given up.
    pub sequence: u64,
}

/// The last request of a client, and its answer.
#[derive(Debug, PartialEq)]
struct Answered {
    sequence: u64,
    time_ms: u64,
    response: Bytes,
}

impl Answered {
    fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(self.response.len().saturating_add(17));
        out.push(VERSION);
        out.extend_from_slice(&self.sequence.to_le_bytes());
        out.extend_from_slice(&self.time_ms.to_le_bytes());
        out.extend_from_slice(&self.response);
        out.into()
    }

    fn decode(bytes: Bytes) -> Result<Self> {
        let mut from = Decoder::new(bytes, "the answer to a client");
        let version = from.u8()?;
        if version != VERSION {
            let message = format!("the answer to a client is of another version version={version} known={VERSION}");
            return Err(Error::new(ErrorKind::Foreign, message));
        }
        Ok(Self { sequence: from.u64()?, time_ms: from.u64()?, response: from.rest() })
    }
}

/// Applies `body` unless the request was answered before; gives the answer in either case. On `Err` nothing is written, and
/// the same request may be tried again.
pub(crate) async fn apply_once(
    apply: &mut Apply,
    token: ClientToken,
    body: &CommandBody,
    state_machine: Option<&Arc<dyn StateMachine>>,
) -> Result<Bytes> {
    let clients = apply.keyspace(CLIENTS_KEYSPACE)?;
    match apply.get(clients, &token.client).await? {
        Some(found) => {
            let last = Answered::decode(found)?;
            if last.sequence == token.sequence {
                return Ok(last.response);
            }
            if last.sequence > token.sequence {
                let (sequence, last) = (token.sequence, last.sequence);
                let message = format!("a later request of this client was answered sequence={sequence} last={last}");
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        }
        None => {
            let after = Bound::Excluded(&token.client[..]);
            for (client, found) in apply.range(clients, after, Bound::Unbounded, false, FORGET_LOOKS).await? {
                if Answered::decode(found)?.time_ms.saturating_add(CLIENT_IDLE_MAX_MS) < apply.time_ms() {
                    apply.delete(clients, client)?;
                }
            }
        }
    }
    let response = match body {
        CommandBody::Batch(batch) => {
            write(apply, &batch.ops).await?;
            Bytes::new()
        }
        CommandBody::BatchIf(conditional) => {
            conditional.conditions.iter().try_for_each(Condition::check)?;
            match first_broken(&conditional.conditions, apply).await? {
                // Remembered, unlike other refusals: the caller may be told of it and do something else, while another proposal
                // of the request is still on its way and could find that the condition holds again.
                Some(place) => encode_broken(place),
                None => {
                    write(apply, &conditional.batch.ops).await?;
                    Bytes::new()
                }
            }
        }
        CommandBody::Custom { command, .. } => match state_machine {
            Some(state_machine) => state_machine.apply(apply, command.clone()).await?,
            None => return Err(no_state_machine()),
        },
        _ => return Err(not_once()),
    };
    let answered = Answered { sequence: token.sequence, time_ms: apply.time_ms(), response: response.clone() };
    apply.put(clients, Bytes::copy_from_slice(&token.client), answered.encode())?;
    Ok(response)
}

async fn write(apply: &mut Apply, ops: &[WriteOp]) -> Result<()> {
    ops.iter().try_for_each(|op| apply.check(op))?;
    apply.write_all(ops).await
}

pub(crate) fn no_state_machine() -> Error {
    Error::new(ErrorKind::Unsupported, "the group has no state machine for its commands")
}

/// Only what writes one branch can be remembered there.
pub(crate) fn not_once() -> Error {
    Error::new(ErrorKind::Invalid, "only a batch and a command of the state machine are applied once")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_comes_back_and_other_bytes_do_not() {
        let answered = Answered { sequence: 7, time_ms: 9, response: Bytes::from_static(b"so") };
        let bytes = answered.encode();
        assert_eq!(&bytes[..], b"\x01\x07\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0so");
        assert_eq!(Answered::decode(bytes.clone()).expect("ours"), answered);
        for cut in 0..17 {
            assert_eq!(Answered::decode(bytes.slice(..cut)).expect_err("cut").kind(), ErrorKind::Corrupt);
        }
        let newer = Answered::decode(Bytes::from_static(b"\x02rest")).expect_err("newer");
        assert_eq!(newer.kind(), ErrorKind::Foreign);
    }
}
