//! `mainstay placed` and `mainstay range`.

use bytes::Bytes;
use serde::Serialize;
use tonic::transport::Channel;
use tonic::{Code, Request};

use crate::cli::{BytesArgs, EndpointsArgs, Failure, PlacedCommand, RangeCommand, ScanArgs, print};
use crate::client::{WORK_TIMEOUT, connect_any, refused};
use crate::etcd::{DURABILITY_KEY, READ_LEVEL_KEY};
use crate::proto::mainstay::v1 as pb;
use crate::serve::MESSAGE_BYTES_MAX;
use crate::status::hex;
use pb::placed_client::PlacedClient;

/// Pairs of one page of a scan.
const PAGE_PAIRS: u32 = 1_000;

async fn client(endpoints: &EndpointsArgs) -> Result<PlacedClient<Channel>, Failure> {
    let channel = connect_any(&endpoints.endpoints, endpoints.timeout.0).await?;
    Ok(PlacedClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// A request with one word of metadata, which the command line has checked.
fn asking<T>(message: T, key: &'static str, word: &str) -> Result<Request<T>, Failure> {
    let mut request = Request::new(message);
    let word = word.parse().map_err(|_| Failure::usage(format!("not a level found='{word}'")))?;
    request.metadata_mut().insert(key, word);
    Ok(request)
}

impl BytesArgs {
    /// A key or a value as it was given.
    fn read(self, text: &str) -> Result<Bytes, Failure> {
        if !self.hex {
            return Ok(Bytes::copy_from_slice(text.as_bytes()));
        }
        let refused = || Failure::usage(format!("not hexadecimal, two digits a byte found='{text}'"));
        // A sign is read as a part of a number.
        if !text.len().is_multiple_of(2) || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(refused());
        }
        let byte = |pair: &[u8]| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok());
        text.as_bytes().chunks(2).map(byte).collect::<Option<Vec<u8>>>().map(Bytes::from).ok_or_else(refused)
    }

    fn show(self, bytes: &[u8]) -> String {
        if self.hex { hex(bytes) } else { bytes.escape_ascii().to_string() }
    }
}

#[derive(Serialize)]
struct PairRow {
    key: String,
    value: String,
}

#[derive(Serialize)]
struct Scanned {
    pairs: Vec<PairRow>,
    /// Where it goes on; nothing when that was all.
    next: Option<String>,
}

pub(crate) async fn placed(command: PlacedCommand) -> Result<(), Failure> {
    match command {
        PlacedCommand::Create { keyspace, endpoints } => {
            let request = pb::CreatePlacedRequest { keyspace: keyspace.clone() };
            client(&endpoints).await?.create(request).await.map_err(refused)?;
            print(endpoints.json, &serde_json::json!({ "keyspace": keyspace }), || keyspace.clone())
        }
        PlacedCommand::List { endpoints } => {
            let answer = client(&endpoints).await?.list(pb::ListPlacedRequest {}).await.map_err(refused)?;
            let names = answer.into_inner().keyspaces;
            print(endpoints.json, &names, || names.join("\n"))
        }
        PlacedCommand::Put { keyspace, key, value, durability, bytes, endpoints } => {
            let (key, value) = (bytes.read(&key)?, bytes.read(&value)?);
            let shown = bytes.show(&key);
            let request = asking(pb::PutRequest { keyspace, key, value }, DURABILITY_KEY, &durability)?;
            client(&endpoints).await?.put(request).await.map_err(refused)?;
            print(endpoints.json, &serde_json::json!({ "put": shown }), || format!("put {shown}"))
        }
        PlacedCommand::Get { keyspace, key, read_level, bytes, endpoints } => {
            let key = bytes.read(&key)?;
            let shown = bytes.show(&key);
            let request = asking(pb::GetRequest { keyspace, key }, READ_LEVEL_KEY, &read_level)?;
            let answer = client(&endpoints).await?.get(request).await.map_err(refused)?.into_inner();
            let value = answer.value.ok_or_else(|| Failure::other(format!("no such key key={shown}")))?;
            let row = PairRow { key: shown, value: bytes.show(&value) };
            print(endpoints.json, &row, || row.value.clone())
        }
        PlacedCommand::Delete { keyspace, key, durability, bytes, endpoints } => {
            let key = bytes.read(&key)?;
            let shown = bytes.show(&key);
            let request = asking(pb::DeleteRequest { keyspace, key }, DURABILITY_KEY, &durability)?;
            client(&endpoints).await?.delete(request).await.map_err(refused)?;
            print(endpoints.json, &serde_json::json!({ "deleted": shown }), || format!("deleted {shown}"))
        }
        PlacedCommand::Scan(args) => scan(args).await,
    }
}

async fn scan(args: ScanArgs) -> Result<(), Failure> {
    let ScanArgs { keyspace, from, to, limit, reverse, read_level, bytes, endpoints } = args;
    let mut client = client(&endpoints).await?;
    let mut range = pb::KeyRange { start: bytes.read(&from)?, end: bytes.read(&to)? };
    let mut pairs = Vec::new();
    let next = loop {
        let left = limit.saturating_sub(u32::try_from(pairs.len()).unwrap_or(u32::MAX));
        let message = pb::ScanRequest {
            keyspace: keyspace.clone(),
            range: Some(range.clone()),
            limit: left.min(PAGE_PAIRS),
            reverse,
        };
        let request = asking(message, READ_LEVEL_KEY, &read_level)?;
        let page = client.scan(request).await.map_err(refused)?.into_inner();
        let shown = |pair: pb::Pair| PairRow { key: bytes.show(&pair.key), value: bytes.show(&pair.value) };
        pairs.extend(page.pairs.into_iter().map(shown));
        if page.next.is_empty() || pairs.len() >= limit as usize {
            break page.next;
        }
        *(if reverse { &mut range.end } else { &mut range.start }) = page.next;
    };
    let next = (!next.is_empty()).then(|| bytes.show(&next));
    if let (Some(next), false) = (&next, endpoints.json) {
        eprintln!("more follow: {} {next}", if reverse { "--to" } else { "--from" });
    }
    let scanned = Scanned { pairs, next };
    print(endpoints.json, &scanned, || scanned.pairs.iter().map(|row| format!("{} {}\n", row.key, row.value)).collect())
}

#[derive(Serialize)]
struct RangeRow {
    first: String,
    /// Nothing for the last range.
    end: Option<String>,
    /// Empty for the first group.
    group: String,
    is_moving: bool,
}

impl RangeRow {
    fn text(&self) -> String {
        let Self { first, group, is_moving, .. } = self;
        let first = if first.is_empty() { "''" } else { first };
        let group = if group.is_empty() { "''" } else { group };
        format!("{first:<32} group={group}{}\n", if *is_moving { " moving" } else { "" })
    }
}

pub(crate) async fn range(command: RangeCommand) -> Result<(), Failure> {
    match command {
        RangeCommand::List { keyspace, bytes, endpoints } => {
            let request = pb::ListRangesRequest { keyspace };
            let answer = client(&endpoints).await?.list_ranges(request).await.map_err(refused)?.into_inner();
            let row = |range: pb::Range| RangeRow {
                first: bytes.show(&range.first),
                end: range.end.map(|end| bytes.show(&end)),
                group: range.group,
                is_moving: range.is_moving,
            };
            let rows: Vec<RangeRow> = answer.ranges.into_iter().map(row).collect();
            print(endpoints.json, &rows, || rows.iter().map(RangeRow::text).collect())
        }
        RangeCommand::Split { keyspace, key, bytes, endpoints } => {
            let key = bytes.read(&key)?;
            let shown = bytes.show(&key);
            client(&endpoints).await?.split(pb::SplitRequest { keyspace, key }).await.map_err(refused)?;
            print(endpoints.json, &serde_json::json!({ "split": shown }), || format!("split at {shown}"))
        }
        RangeCommand::Join { keyspace, key, bytes, endpoints } => {
            let key = bytes.read(&key)?;
            let shown = bytes.show(&key);
            client(&endpoints).await?.join(pb::JoinRequest { keyspace, key }).await.map_err(refused)?;
            print(endpoints.json, &serde_json::json!({ "joined": shown }), || format!("joined at {shown}"))
        }
        RangeCommand::Move { keyspace, key, to, bytes, endpoints } => {
            let key = bytes.read(&key)?;
            let shown = bytes.show(&key);
            let channel = connect_any(&endpoints.endpoints, endpoints.timeout.0.max(WORK_TIMEOUT)).await?;
            let request = pb::MoveRequest { keyspace, key, to: to.clone() };
            PlacedClient::new(channel).r#move(request).await.map_err(not_moved)?;
            let document = serde_json::json!({ "moved": shown, "group": to });
            print(endpoints.json, &document, || format!("moved {shown} to group={to}"))
        }
    }
}

/// A move is not done or left undone: part of it may be.
fn not_moved(status: tonic::Status) -> Failure {
    match status.code() {
        Code::Unavailable | Code::Unknown | Code::DeadlineExceeded | Code::Cancelled => Failure::other(format!(
            "{} (part of the range may have moved, and it may go on: the same command again waits for it or goes on)",
            status.message()
        )),
        _ => refused(status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_as_they_are_shown_in_hexadecimal() {
        let (text, hex) = (BytesArgs { hex: false }, BytesArgs { hex: true });
        assert_eq!(text.read("a\\x00").expect("as it is"), "a\\x00");
        assert_eq!(text.show(b"a\x00\xff"), "a\\x00\\xff");
        for bytes in [&b""[..], b"\x00", b"a\xff\x10"] {
            assert_eq!(hex.read(&hex.show(bytes)).expect("as shown"), bytes);
        }
        assert_eq!(hex.read("0aFF").expect("either case"), &b"\x0a\xff"[..]);
        for bad in ["0", "0g", "+1", "0x10", "é"] {
            assert_eq!(hex.read(bad).expect_err("no bytes").status(), 2, "{bad}");
        }
    }

    #[test]
    fn a_move_without_an_answer_is_not_said_to_be_undone() {
        for code in [Code::Unavailable, Code::Unknown, Code::DeadlineExceeded, Code::Cancelled] {
            let failure = not_moved(tonic::Status::new(code, "no leader"));
            assert_eq!(failure.status(), 1);
            assert!(failure.to_string().contains("part of the range may have moved"), "{failure}");
        }
        let failure = not_moved(tonic::Status::not_found("no such group name=x"));
        assert_eq!(failure.to_string(), "no such group name=x");
    }
}
