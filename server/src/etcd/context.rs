//! What the metadata of a request asks for beside the request itself. docs/etcd.md lists the keys.

use std::time::Duration;

use mainstay_engine::{BranchId, ClientToken, LogIndex, MAIN};
use mainstay_replication::{Durability, ReadLevel};
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::backend::Backend;
use super::error::Refusal;
use super::service::Core;

/// Serves the clone of that name.
pub const BRANCH_KEY: &str = "mainstay-branch";
/// What the answer to a write promises.
pub const DURABILITY_KEY: &str = "mainstay-durability";
/// Which request of which client a write is, so that it applies once however often it is sent.
pub const CLIENT_TOKEN_KEY: &str = "mainstay-client-token";
/// What a read promises.
pub const READ_LEVEL_KEY: &str = "mainstay-read-level";
/// In the answer to a write at `local`: term and index of its entry.
pub const COMMIT_TOKEN_KEY: &str = "mainstay-commit-token";
/// etcd's own: refuse while no leader is known.
const HAS_LEADER_KEY: &str = "hasleader";

/// What a request asks for.
#[derive(Clone, Debug)]
pub(super) struct Context {
    pub(super) branch: BranchId,
    pub(super) durability: Durability,
    pub(super) read_level: Option<ReadLevel>,
    pub(super) token: Option<ClientToken>,
    pub(super) needs_leader: bool,
}

impl Context {
    /// Reads the metadata of a request.
    pub(super) fn of<B: Backend>(core: &Core<B>, metadata: &MetadataMap) -> Result<Self, Status> {
        let mut context =
            Self { branch: MAIN, durability: Durability::Quorum, read_level: None, token: None, needs_leader: false };
        if metadata.is_empty() {
            return Ok(context);
        }
        if let Some(name) = text(metadata, BRANCH_KEY)? {
            context.branch = core
                .backend
                .branch(name)
                .ok_or_else(|| Status::not_found(format!("mainstay: no branch of that name name={name}")))?;
        }
        if let Some(durability) = asked_durability(metadata)? {
            context.durability = durability;
        }
        context.read_level = asked_read_level(metadata)?;
        if let Some(token) = text(metadata, CLIENT_TOKEN_KEY)? {
            context.token = Some(parse_client_token(token).ok_or_else(|| unknown(CLIENT_TOKEN_KEY, token))?);
        }
        context.needs_leader = text(metadata, HAS_LEADER_KEY)? == Some("true");
        if context.needs_leader && core.facts().leader.is_none() {
            return Err(Refusal::NoLeader.into());
        }
        Ok(context)
    }
}

/// The durability that the metadata of a request names.
pub(crate) fn asked_durability(metadata: &MetadataMap) -> Result<Option<Durability>, Status> {
    let named = text(metadata, DURABILITY_KEY)?;
    named.map(|named| parse_durability(named).ok_or_else(|| unknown(DURABILITY_KEY, named))).transpose()
}

/// The level of reads that the metadata of a request names.
pub(crate) fn asked_read_level(metadata: &MetadataMap) -> Result<Option<ReadLevel>, Status> {
    let named = text(metadata, READ_LEVEL_KEY)?;
    named.map(|named| parse_read_level(named).ok_or_else(|| unknown(READ_LEVEL_KEY, named))).transpose()
}

/// `local`, `quorum`, `all`, `archive`, `site:NAME`.
pub fn parse_durability(text: &str) -> Option<Durability> {
    Some(match text {
        "local" => Durability::Local,
        "quorum" => Durability::Quorum,
        "all" => Durability::All,
        "archive" => Durability::Archive,
        _ => Durability::Site(text.strip_prefix("site:").filter(|name| !name.is_empty())?.to_owned()),
    })
}

/// `linearizable`, `lease`, `local`, `at-least:INDEX`, `stale:MILLISECONDS`.
pub fn parse_read_level(text: &str) -> Option<ReadLevel> {
    Some(match text {
        "linearizable" => ReadLevel::Linearizable,
        "lease" => ReadLevel::Lease,
        "local" => ReadLevel::Local,
        _ => match text.split_once(':')? {
            ("at-least", index) => ReadLevel::AtLeast(LogIndex(index.parse().ok()?)),
            ("stale", milliseconds) => ReadLevel::Stale(Duration::from_millis(milliseconds.parse().ok()?)),
            _ => return None,
        },
    })
}

/// `CLIENT-SEQUENCE`: 32 hexadecimal digits and a decimal number.
fn parse_client_token(text: &str) -> Option<ClientToken> {
    let (client, sequence) = text.split_once('-')?;
    if client.len() != 32 || !client.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let client = u128::from_str_radix(client, 16).ok()?.to_be_bytes();
    Some(ClientToken { client, sequence: sequence.parse().ok()? })
}

fn text<'a>(metadata: &'a MetadataMap, key: &str) -> Result<Option<&'a str>, Status> {
    metadata.get(key).map(|value| value.to_str().map_err(|_| unknown(key, "?"))).transpose()
}

fn unknown(key: &str, value: &str) -> Status {
    Status::invalid_argument(format!("mainstay: metadata is not understood key={key} value={value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_by_name() {
        assert_eq!(parse_durability("local"), Some(Durability::Local));
        assert_eq!(parse_durability("site:b"), Some(Durability::Site("b".to_owned())));
        assert_eq!(parse_durability("site:"), None);
        assert_eq!(parse_durability("fast"), None);
        assert_eq!(parse_read_level("at-least:7"), Some(ReadLevel::AtLeast(LogIndex(7))));
        assert_eq!(parse_read_level("stale:20"), Some(ReadLevel::Stale(Duration::from_millis(20))));
        assert_eq!(parse_read_level("stale:soon"), None);
        let token = parse_client_token("000102030405060708090a0b0c0d0e0f-17").expect("a token");
        assert_eq!((token.client[1], token.client[15], token.sequence), (1, 15, 17));
        for bad in [
            "17",
            "0011-17",
            "000102030405060708090a0b0c0d0e0g-17",
            "000102030405060708090a0b0c0d0e0f-",
            "+00102030405060708090a0b0c0d0e0f-1",
        ] {
            assert_eq!(parse_client_token(bad), None, "{bad}");
        }
    }
}
