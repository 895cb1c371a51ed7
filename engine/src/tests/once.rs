//! Requests that are proposed more than once.

use bytes::Bytes;

use super::harness::*;
use crate::once::{CLIENT_IDLE_MAX_MS, CLIENTS_KEYSPACE};
use crate::{Applied, ClientToken, Command, CommandBody, ErrorKind, MAIN, WriteBatch};

fn token(client: u8, sequence: u64) -> ClientToken {
    ClientToken { client: [client; 16], sequence }
}

fn once(client: u8, sequence: u64, key: &str, value: &[u8]) -> CommandBody {
    CommandBody::Once { token: token(client, sequence), body: Box::new(put(MAIN, key, value)) }
}

fn clients(store: &Store) -> usize {
    let snapshot = store.group().snapshot(MAIN).expect("main");
    snapshot.keyspace(CLIENTS_KEYSPACE).map_or(0, |keyspace| all(&snapshot, keyspace).len())
}

fn at(store: &Store, time_ms: u64, body: CommandBody) -> Applied {
    mainstay_io::block_on(store.log.propose(Command { time_ms, body })).expect("the log takes it")
}

/// The second proposal of a request must not undo what came between.
#[test]
fn a_request_that_was_applied_is_answered_and_not_applied_again() {
    let media = media();
    let store = Store::open(&media);
    let first = store.must(once(1, 1, "k", b"one"));
    store.put("k", b"between");
    let again = store.must(once(1, 1, "k", b"one"));
    assert_eq!(first.response.expect("applied"), again.response.expect("the same answer"));
    assert_eq!(store.get("k").as_deref(), Some(&b"between"[..]));
    // Also after a flush, after a clean restart, and after one that replays.
    store.flush();
    store.must(once(1, 1, "k", b"one"));
    store.close();
    let store = Store::open(&media);
    store.must(once(1, 1, "k", b"one"));
    store.must(once(1, 2, "k", b"two"));
    store.put("k", b"between");
    drop(store);
    media.crash(1);
    let store = Store::open(&media);
    assert!(store.replayed > 0);
    store.must(once(1, 2, "k", b"two"));
    assert_eq!(store.get("k").as_deref(), Some(&b"between"[..]));
    // Another client with the same number is another request.
    store.must(once(2, 2, "k", b"three"));
    assert_eq!(store.get("k").as_deref(), Some(&b"three"[..]));
    assert_eq!(clients(&store), 2);
    store.close();
    check_no_leak(&media);
}

#[test]
fn what_came_too_late_and_what_is_refused_writes_nothing() {
    let media = media();
    let store = Store::open(&media);
    store.must(once(1, 5, "k", b"five"));
    let late = store.propose(once(1, 4, "k", b"four")).expect("logged").response.expect_err("too late");
    assert_eq!(late.kind(), ErrorKind::Invalid);
    let batch = CommandBody::Batch(WriteBatch { branch: crate::BranchId(77), ops: vec![] });
    let nowhere = CommandBody::Once { token: token(1, 6), body: Box::new(batch) };
    assert_eq!(store.propose(nowhere).expect("logged").response.expect_err("no branch").kind(), ErrorKind::NotFound);
    // It left no trace: the number may be used again.
    store.must(once(1, 6, "k", b"six"));
    assert_eq!(store.get("k").as_deref(), Some(&b"six"[..]));
    let rotate = CommandBody::Once { token: token(1, 7), body: Box::new(CommandBody::Rotate) };
    assert_eq!(store.propose(rotate).expect_err("refused before the log").kind(), ErrorKind::Invalid);
    store.close();
}

#[test]
fn clients_that_are_silent_for_a_day_make_room_for_new_ones() {
    let media = media();
    let store = Store::open(&media);
    for client in 1..=100 {
        at(&store, 1000, once(client, 1, "k", b"v")).response.expect("applied");
    }
    let later = 1001 + CLIENT_IDLE_MAX_MS;
    at(&store, later - 2, once(0, 1, "k", b"v")).response.expect("applied");
    assert_eq!(clients(&store), 101, "nobody was silent for a day");
    at(&store, later, once(50, 2, "k", b"v")).response.expect("applied");
    assert_eq!(clients(&store), 101, "one that is known looks for nobody");
    for client in 101..=140 {
        at(&store, later, once(client, 1, "k", b"v")).response.expect("applied");
    }
    let mut low = [0; 16];
    for n in 1..=40 {
        low[15] = n;
        let token = ClientToken { client: low, sequence: 1 };
        let body = CommandBody::Once { token, body: Box::new(put(MAIN, "k", b"v")) };
        at(&store, later, body).response.expect("applied");
    }
    // 0, the hundred, forty above and forty below them: all those of the first day are gone but 50 and 0.
    assert_eq!(clients(&store), 82, "each new one has looked at four others");
    assert_eq!(store.get("k").as_deref(), Some(&b"v"[..]));
    store.close();
}

#[test]
fn a_token_is_part_of_the_encoding() {
    let command = Command { time_ms: 3, body: once(9, 300, "k", b"v") };
    let bytes = command.encode().expect("within the limits");
    assert_eq!(bytes.get(..2), Some(&[1, 12][..]));
    assert_eq!(bytes.get(10..26), Some(&[9; 16][..]));
    assert_eq!(bytes.get(26..29), Some(&[0xac, 0x02, 1][..]), "sequence, then the kind inside");
    assert_eq!(Command::decode(&bytes).expect("encoded above"), command);
    let mut nested = bytes.to_vec();
    nested[28] = 11;
    assert_eq!(
        Command::decode(&Bytes::from(nested)).expect_err("a kind that is not allowed").kind(),
        ErrorKind::Foreign
    );
}
