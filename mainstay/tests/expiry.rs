//! Pairs that expire, by real clocks.

use std::time::{Duration, Instant};

use mainstay::{Batch, ErrorKind, Isolation, Store};

/// Longest wait for what is due in a second or two.
const WAIT_MAX: Duration = Duration::from_secs(30);

fn until(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < WAIT_MAX, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_pair_is_gone_after_its_time_though_nothing_is_written_and_after_a_restart_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let open = || Store::builder().wal_bytes(16 << 20).open(folder.path().join("store")).expect("opens");
    let store = open();
    let sessions = store.keyspace_expiring("sessions").expect("made");
    let long = Duration::from_secs(3600);
    sessions.insert_for("short", "1", Duration::from_millis(900)).expect("written");
    sessions.insert_for("long", "2", long).expect("written");
    sessions.insert("forever", "3").expect("written");
    let mut transaction = store.transaction(Isolation::Serializable).expect("begun");
    transaction.insert_for(&sessions, "within", "4", long).expect("recorded");
    transaction.insert_for(&sessions, "short within", "5", Duration::from_millis(900)).expect("recorded");
    transaction.insert_for(&sessions, "renewed", "6", Duration::from_millis(1)).expect("recorded");
    transaction.insert(&sessions, "renewed", "7").expect("recorded");
    transaction.commit().expect("valid");
    let count = |store: &Store| store.keyspace_expiring("sessions").expect("there").iter().count();
    assert_eq!(count(&store), 6);
    until("two have ended", || count(&store) == 4);
    assert_eq!(sessions.get("short").expect("read"), None);
    assert_eq!(sessions.get("renewed").expect("read").as_deref(), Some(&b"7"[..]));
    sessions.insert_for("last", "8", Duration::from_millis(1500)).expect("written");
    drop((store, sessions));
    // Without a clean close: the log is replayed.
    let store = open();
    until("it has ended, by the clock of before", || count(&store) == 4);
    store.close().expect("closes");
    drop(store);
    let store = open();
    assert_eq!(count(&store), 4);
    store.close().expect("closes");
}

#[test]
fn a_keyspace_stays_what_it_was_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::builder().wal_bytes(16 << 20).open(folder.path().join("store")).expect("opens");
    let plain = store.keyspace("plain").expect("made");
    let error = store.keyspace_expiring("plain").err().expect("it is another");
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let error = plain.insert_for("key", "value", Duration::from_secs(1)).expect_err("it does not expire");
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let expiring = store.keyspace_expiring("expiring").expect("made");
    assert_eq!(store.keyspace("expiring").expect("there").name(), expiring.name(), "by either call");
    let error = expiring.insert_for("key", "value", Duration::from_micros(999)).expect_err("less than a millisecond");
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    let mut batch = Batch::new();
    batch.insert(&plain, "key", "value").insert_for(&expiring, "key", "value", Duration::MAX);
    store.commit(batch).expect("written");
    assert_eq!(expiring.get("key").expect("read").as_deref(), Some(&b"value"[..]));
    store.close().expect("closes");
}
