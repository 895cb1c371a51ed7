//! Records and messages as earlier builds wrote them: read whole, and written by this build as they were.

use std::collections::BTreeMap;
use std::io::Write;

use bytes::Bytes;

use crate::entry_index::Recovered;
use crate::groups::read_grouped;
use crate::log_heal::read_base;
use crate::network::{method, read_append, read_offer};
use crate::wire::{Reader, decode_result};
use crate::{ErrorKind, Result, TokioRuntime, fuzzing, record};

/// A line a message: its name, and its bytes in hexadecimal digits. Nothing in it is ever written again.
const MESSAGES: &str = include_str!("../../testdata/messages-1.txt");

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes_of(digits: &str) -> Bytes {
    let pairs = digits.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).expect("digits"));
    pairs.map(|pair| u8::from_str_radix(pair, 16).expect("two digits")).collect()
}

/// Reads the message as who gets it does, and says something of what it holds.
fn read(name: &str, bytes: &Bytes) -> Result<String> {
    let recovered = |kind| {
        Ok::<_, crate::Error>(match record::decode(kind, bytes)? {
            Recovered::Entry(entry) => format!("entry {}", entry.log_id.index),
            Recovered::Vote(vote) => format!("vote {} {}", vote.leader_id.term, vote.leader_id.voted_for),
            Recovered::Truncate(at) => format!("truncate {:?}", at.map(|at| at.index)),
            Recovered::Purge(at, stored) => format!("purge {} {}", at.index, stored.membership().nodes().count()),
            other => format!("{other:?}"),
        })
    };
    match name {
        "entry-membership" => recovered(record::ENTRY),
        "vote" => recovered(record::VOTE),
        "truncate" => recovered(record::TRUNCATE),
        "anchor" => recovered(record::PURGE),
        "append" => Ok(format!("append {}", read_append::<TokioRuntime>(bytes)?.0.entries.len())),
        "base" => Ok(format!("base {:?}", decode_result(bytes, read_base)?.map(|(at, _)| at.index))),
        "offer" => Ok(format!("offer {:?}", decode_result(bytes, read_offer)?.manifest)),
        "members" | "members-raised" => {
            let members = decode_result(bytes, Reader::member_infos)?;
            let names: Vec<_> =
                members.iter().map(|m| format!("{}@{} {} {}", m.name, m.site, m.priority, m.version)).collect();
            Ok(names.join(", "))
        }
        "refusal" => {
            let error = decode_result(bytes, |_| Ok(())).expect_err("it is one");
            if error.kind() == ErrorKind::NotLeader { Ok(format!("{:?}", error.leader())) } else { Err(error) }
        }
        "hello" => Ok(format!("hello {}", crate::tcp::decode_hello(bytes)?.name)),
        "member-add" => Ok(format!("{:?}", crate::membership::Change::decode(bytes)?)),
        "grouped" => {
            let (group, inner) = read_grouped(bytes)?;
            assert_eq!((inner.method, &inner.body[..]), (method::VOTE, &b"vote"[..]));
            Ok(format!("group {}", group.0))
        }
        other => panic!("a message that is not read here: {other}"),
    }
}

#[test]
fn the_messages_in_git_are_read_and_written_as_they_were() {
    let mut golden: BTreeMap<&str, &str> = MESSAGES.lines().map(|line| line.split_once(' ').expect("a name")).collect();
    let mut missing = Vec::new();
    for (name, bytes) in fuzzing::seeds() {
        let written = hexadecimal(&bytes);
        let Some(stored) = golden.remove(name) else {
            missing.push(format!("{name} {written}"));
            continue;
        };
        assert_eq!(
            written, stored,
            "{name} is written otherwise than by the builds before: a mixed cluster parts here"
        );
        let bytes = bytes_of(stored);
        let told = read(name, &bytes).unwrap_or_else(|error| panic!("{name} is not read: {error}"));
        assert_eq!(told, expected(name), "{name}");
        let newer = Bytes::from([&[2], &bytes[1..]].concat());
        assert_eq!(read(name, &newer).expect_err("of a later version").kind(), ErrorKind::Foreign, "{name}");
    }
    if !missing.is_empty() && std::env::var_os("MAINSTAY_WRITE_GOLDEN").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/messages-1.txt");
        let mut file = std::fs::File::options().append(true).open(path).expect("the file is there");
        missing.iter().for_each(|line| writeln!(file, "{line}").expect("written"));
    }
    assert!(missing.is_empty(), "no build before has written these: {missing:?}");
    assert!(golden.is_empty(), "nobody writes these any more: {:?}", golden.keys());
}

fn expected(name: &str) -> &'static str {
    match name {
        "entry-membership" => "entry 7",
        "vote" => "vote 3 2",
        "truncate" => "truncate Some(2)",
        "anchor" => "purge 9 3",
        "append" => "append 3",
        "base" => "base Some(9)",
        "offer" => "offer b\"pages\"",
        "members" => "a@here 9 0, b@here 9 0, c@here 9 0",
        "members-raised" => "a@here 9 2, b@here 9 2, c@here 9 2",
        "refusal" => "Some((NodeId(7), \"there:1\"))",
        "hello" => "hello a",
        "member-add" => "Add { name: \"d\", address: \"d:1\", voter: true }",
        "grouped" => "group 2",
        other => panic!("a message that is not read here: {other}"),
    }
}
