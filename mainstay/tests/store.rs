//! The store of one node through the facade.

use mainstay::{
    Batch, Change, ChangeKind, ClientToken, Entry, ErrorKind, LogIndex, ReadLevel, Result, Store, StoreBuilder, WriteOp,
};

fn builder() -> StoreBuilder {
    Store::builder().wal_bytes(8 << 20).memory_bytes(32 << 20)
}

fn keys(scan: impl Iterator<Item = Result<Entry>>) -> Vec<String> {
    scan.map(|entry| String::from_utf8(entry.expect("readable").key.to_vec()).expect("text")).collect()
}

#[test]
fn what_was_written_is_there_after_a_close_and_after_a_crash() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    for round in 0..4u32 {
        let store = builder().open(&path).expect("opens");
        let numbers = store.keyspace("numbers").expect("a keyspace");
        for earlier in 0..round {
            assert_eq!(numbers.get(earlier.to_be_bytes()).expect("readable").as_deref(), Some(&b"here"[..]));
        }
        numbers.insert(round.to_be_bytes(), "here").expect("written");
        if round % 2 == 0 {
            store.close().expect("closes");
        }
        // Else the handles are dropped: the next open replays the log.
    }
}

#[test]
fn a_clean_close_leaves_next_to_nothing_to_replay() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let fill = |store: &Store| {
        let numbers = store.keyspace("numbers").expect("a keyspace");
        for n in 0..100u32 {
            numbers.insert(n.to_be_bytes(), "here").expect("written");
        }
    };
    let store = builder().open(&path).expect("opens");
    fill(&store);
    store.close().expect("closes");
    let store = builder().open(&path).expect("opens");
    assert!(store.status().replayed <= 2, "{}", store.status().replayed);
    // The count counts: what is not closed is replayed.
    fill(&store);
    drop(store);
    let store = builder().open(&path).expect("opens");
    assert!(store.status().replayed >= 100, "{}", store.status().replayed);
    store.close().expect("closes");
}

#[test]
fn a_batch_is_all_or_nothing_over_keyspaces() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = builder().open(folder.path().join("store")).expect("opens");
    let (left, right) = (store.keyspace("left").expect("made"), store.keyspace("right").expect("made"));
    let mut batch = Batch::new();
    batch.insert(&left, "k", "1").insert(&right, "k", "2").remove(&right, "absent");
    let commit = store.commit(batch).expect("written");
    assert_eq!(store.snapshot().expect("a view").index(), commit.index());
    let mut wrong = Batch::new();
    wrong.insert(&left, "k", "changed").insert(&right, "", "an empty key");
    let refused = store.commit(wrong).expect_err("an empty key");
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert_eq!(left.get("k").expect("readable").as_deref(), Some(&b"1"[..]));
    assert_eq!(right.get("k").expect("readable").as_deref(), Some(&b"2"[..]));
    store.close().expect("closes");
}

#[test]
fn a_batch_is_applied_if_its_conditions_hold_and_else_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = builder().open(folder.path().join("store")).expect("opens");
    let (a, b) = (store.keyspace("a").expect("made"), store.keyspace("b").expect("made"));
    let mut first = Batch::new();
    first.require_absent(&a, "k").insert(&a, "k", "1").insert(&b, "k", "1");
    let commit = store.commit(first.clone()).expect("absent");
    let error = store.commit(first.clone()).expect_err("there by now");
    assert_eq!((error.kind(), error.is_retryable()), (ErrorKind::Conflict, false));
    assert!(error.to_string().ends_with("keyspace=a key=k"), "{error}");
    let snapshot = store.snapshot().expect("a view");
    assert_eq!(snapshot.version(&a, "k").expect("readable"), Some(commit.index()));
    assert_eq!(snapshot.version(&a, "none").expect("readable"), None);

    let attempt = |mut batch: Batch| {
        batch.insert(&b, "k", "2");
        store.commit(batch).err().map(|error| error.kind())
    };
    let conflict = Some(ErrorKind::Conflict);
    assert_eq!(attempt(Batch::new().require_value(&a, "k", "2").clone()), conflict);
    assert_eq!(attempt(Batch::new().require_present(&a, "none").clone()), conflict);
    assert_eq!(attempt(Batch::new().require_version(&a, "k", Some(LogIndex(1))).clone()), conflict);
    assert_eq!(attempt(Batch::new().require_version(&a, "k", None).clone()), conflict);
    assert_eq!(b.get("k").expect("readable").as_deref(), Some(&b"1"[..]));
    let mut all = Batch::new();
    all.require_value(&a, "k", "1").require_present(&b, "k").require_absent(&a, "none");
    all.require_version(&a, "k", Some(commit.index()));
    assert_eq!(attempt(all), None);
    assert_eq!(b.get("k").expect("readable").as_deref(), Some(&b"2"[..]));
    first.clear();
    assert!(first.is_empty() && first.bytes() == 0);
    store.close().expect("closes");
}

#[test]
fn ranges_and_prefixes_run_both_ways_and_meet() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = builder().open(folder.path().join("store")).expect("opens");
    let names = store.keyspace("names").expect("made");
    for name in ["ada", "alan", "barbara", "edsger", "grace"] {
        names.insert(name, "").expect("written");
    }
    assert_eq!(keys(names.iter()), ["ada", "alan", "barbara", "edsger", "grace"]);
    assert_eq!(keys(names.prefix("a").rev()), ["alan", "ada"]);
    assert_eq!(keys(names.range("alan".."edsger")), ["alan", "barbara"]);
    assert_eq!(keys(names.range("alan"..="edsger").rev()), ["edsger", "barbara", "alan"]);
    assert_eq!(keys(names.range::<&str>(..)), keys(names.iter()));
    let mut scan = names.iter();
    let ends = [scan.next(), scan.next_back(), scan.next(), scan.next_back(), scan.next(), scan.next_back()];
    assert_eq!(keys(ends.into_iter().flatten()), ["ada", "grace", "alan", "edsger", "barbara"]);
    assert!(scan.next().is_none());
    let mut scan = names.iter();
    scan.seek("b").expect("readable");
    assert_eq!(keys(scan), ["barbara", "edsger", "grace"]);
    assert_eq!(names.first().expect("readable").expect("not empty").key, "ada");
    assert_eq!(names.last().expect("readable").expect("not empty").key, "grace");
    let many = names.multi_get(&["grace", "nobody"]).expect("readable");
    assert_eq!(many.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false]);
    let before = store.snapshot().expect("a view");
    names.insert("grace", "hopper").expect("written");
    let many = before.multi_get(&names, &["nobody", "grace", "grace"]).expect("readable");
    assert_eq!(many.iter().map(Option::as_deref).collect::<Vec<_>>(), [None, Some(&b""[..]), Some(&b""[..])]);
    let now = mainstay_io::block_on(store.snapshot().expect("a view").multi_get_async(&names, &["grace"]));
    assert_eq!(now.expect("readable"), [Some("hopper".into())]);
    store.close().expect("closes");
}

#[test]
fn ranges_and_prefixes_are_removed_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = builder().open(folder.path().join("store")).expect("opens");
    let (names, others) = (store.keyspace("names").expect("made"), store.keyspace("others").expect("made"));
    let fill = || {
        for name in ["ada", "alan", "barbara", "edsger", "grace"] {
            names.insert(name, "").expect("written");
            others.insert(name, "").expect("written");
        }
    };
    fill();
    let before = store.snapshot().expect("a view");
    names.remove_range("alan".."edsger").expect("written");
    assert_eq!(keys(names.iter()), ["ada", "edsger", "grace"]);
    names.remove_range("edsger"..="edsger").expect("written");
    assert_eq!(keys(names.iter().rev()), ["grace", "ada"]);
    names.remove_prefix("a").expect("written");
    assert_eq!(keys(names.iter()), ["grace"]);
    names.remove_range::<&str>(..).expect("written");
    assert!(names.first().expect("readable").is_none());
    assert_eq!(keys(before.iter(&names)).len(), 5, "a snapshot keeps what it has");
    assert_eq!(keys(others.iter()).len(), 5, "a keyspace is its own");
    fill();
    let mut batch = Batch::new();
    batch
        .insert(&names, "bob", "")
        .remove_range(&names, "b".."f")
        .insert(&names, "carl", "")
        .remove_prefix(&others, "");
    assert_eq!(batch.len(), 4);
    store.commit(batch).expect("written");
    assert_eq!(keys(names.iter()), ["ada", "alan", "carl", "grace"]);
    assert!(others.first().expect("readable").is_none());
    assert_eq!(names.remove_range("b".."b").expect_err("no key").kind(), ErrorKind::Invalid);
    assert_eq!(names.remove_range("c".."b").expect_err("no key").kind(), ErrorKind::Invalid);
    pollster(names.remove_range_async("a".."b")).expect("written");
    pollster(names.remove_prefix_async("c")).expect("written");
    store.close().expect("closes");
    let store = builder().open(folder.path().join("store")).expect("opens again");
    assert_eq!(keys(store.keyspace("names").expect("there").iter()), ["grace"]);
    store.close().expect("closes");
}

#[test]
fn a_snapshot_stays_while_the_store_moves_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = builder().open(folder.path().join("store")).expect("opens");
    let data = store.keyspace("data").expect("made");
    data.insert("a", "1").expect("written");
    let before = store.snapshot().expect("a view");
    data.insert("a", "2").expect("written");
    data.insert("b", "2").expect("written");
    assert_eq!(before.get(&data, "a").expect("readable").as_deref(), Some(&b"1"[..]));
    assert_eq!(keys(before.iter(&data)), ["a"]);
    assert_eq!(keys(data.iter()), ["a", "b"]);
    store.close().expect("closes");
}

#[test]
fn checkpoints_and_clones_live_on_their_own_and_survive_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    {
        let store = builder().open(&path).expect("opens");
        let data = store.keyspace("data").expect("made");
        data.insert("a", "first").expect("written");
        let checkpoint = store.checkpoint("monday").expect("taken");
        assert_eq!(checkpoint.name, "monday");
        assert_eq!(store.checkpoint("monday").expect_err("the name is taken").kind(), ErrorKind::Invalid);
        data.insert("a", "second").expect("written");
        let clone = store.create_clone("trial", "monday").expect("made");
        assert_eq!(clone.branch_name(), "trial");
        let trial = clone.keyspace("data").expect("there");
        assert_eq!(trial.get("a").expect("readable").as_deref(), Some(&b"first"[..]));
        trial.insert("a", "third").expect("written");
        assert_eq!(store.create_clone("x", "absent").err().expect("no such checkpoint").kind(), ErrorKind::NotFound);
        store.close().expect("closes");
    }
    let store = builder().open(&path).expect("opens");
    let data = store.keyspace("data").expect("there");
    assert_eq!(data.get("a").expect("readable").as_deref(), Some(&b"second"[..]));
    let frozen = store.open_checkpoint("monday").expect("there");
    assert_eq!(frozen.get(&data, "a").expect("readable").as_deref(), Some(&b"first"[..]));
    let trial = store.open_clone("trial").expect("there").keyspace("data").expect("there");
    assert_eq!(trial.get("a").expect("readable").as_deref(), Some(&b"third"[..]));
    assert_eq!(store.clones().iter().map(|clone| clone.name.as_str()).collect::<Vec<_>>(), ["trial"]);
    store.drop_checkpoint("monday").expect("dropped");
    assert_eq!(trial.get("a").expect("readable").as_deref(), Some(&b"third"[..]));
    store.drop_clone("trial").expect("dropped");
    assert!(store.open_clone("trial").is_err());
    assert!(store.checkpoints().is_empty());
    store.close().expect("closes");
}

#[test]
fn the_async_forms_run_under_a_foreign_executor() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    // No tokio here: the crate's own futures need nothing but a waker.
    let answer = pollster(async move {
        let store = builder().open_async(&path).await?;
        let data = store.keyspace_async("data").await?;
        data.insert_async("a", "1").await?;
        let mut scan = data.prefix("a");
        let found = scan.next_async().await?.map(|entry| entry.value);
        store.close_async().await?;
        Ok::<_, mainstay::Error>(found)
    });
    assert_eq!(answer.expect("no error").as_deref(), Some(&b"1"[..]));
}

/// The smallest executor: parks the thread until it is woken.
fn pollster<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        if let std::task::Poll::Ready(answer) = future.as_mut().poll(&mut context) {
            return answer;
        }
        std::thread::park();
    }
}

#[test]
fn wrong_targets_are_refused_by_kind_and_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let store = builder().open(&path).expect("opens");
    let second = builder().open(&path).err().expect("it is open already");
    assert_eq!(second.kind(), ErrorKind::Locked, "{second}");
    store.close().expect("closes");
    assert_eq!(store.snapshot().err().expect("closed").kind(), ErrorKind::Closed);
    drop(store);

    let foreign = folder.path().join("foreign");
    std::fs::create_dir(&foreign).expect("a folder");
    std::fs::write(foreign.join("superblock"), vec![7u8; 1 << 20]).expect("written");
    let refused = builder().open(&foreign).err().expect("not a volume");
    assert!(matches!(refused.kind(), ErrorKind::Foreign | ErrorKind::Corrupt), "{refused}");
    assert_eq!(std::fs::read(foreign.join("superblock")).expect("there"), vec![7u8; 1 << 20], "left as it was");

    let absent = builder().format_if_blank(false).open(folder.path().join("absent"));
    assert!(absent.is_err());
}

#[test]
fn limits_and_levels_are_typed_errors() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = builder().wal_bytes(64 << 20).open(folder.path().join("store")).expect("opens");
    let data = store.keyspace("data").expect("made");
    let refused = data.insert("big", vec![0; (16 << 20) + 1]).expect_err("over the limit");
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
    let refused = data.insert(vec![b'k'; (64 << 10) + 1], "").expect_err("over the limit");
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
    let site = store.with_durability(mainstay::Durability::Site("b".into())).keyspace("data").expect("there");
    assert_eq!(site.insert("a", "").expect_err("alone").kind(), ErrorKind::Unsupported);
    let commit = data.insert("a", "1").expect("written");
    let later = store.with_read_level(ReadLevel::AtLeast(commit.index())).keyspace("data").expect("there");
    assert!(later.contains_key("a").expect("readable"));
    store.close().expect("closes");
}

#[test]
fn a_batch_with_a_token_applies_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let token = |sequence| ClientToken { client: [5; 16], sequence };
    let one = |keyspace: &mainstay::Keyspace, value: &str| {
        let mut batch = Batch::new();
        batch.insert(keyspace, "k", value);
        batch
    };
    let store = builder().open(&path).expect("opens");
    let numbers = store.keyspace("numbers").expect("made");
    store.commit_once(token(1), one(&numbers, "1")).expect("written");
    numbers.insert("k", "between").expect("written");
    store.commit_once(token(1), one(&numbers, "1")).expect("answered");
    store.close().expect("closes");
    let store = builder().open(&path).expect("opens");
    let numbers = store.keyspace("numbers").expect("there");
    store.commit_once(token(1), one(&numbers, "1")).expect("answered");
    assert_eq!(numbers.get("k").expect("readable").as_deref(), Some(&b"between"[..]));
    store.commit_once(token(2), one(&numbers, "2")).expect("written");
    assert_eq!(numbers.get("k").expect("readable").as_deref(), Some(&b"2"[..]));
    let late = store.commit_once(token(1), one(&numbers, "1")).expect_err("a later one was answered");
    assert_eq!(late.kind(), ErrorKind::Invalid);
    store.close().expect("closes");
}

#[test]
fn a_compaction_on_demand_gives_the_space_of_a_range_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = builder().open(folder.path().join("store")).expect("opens");
    let (numbers, others) = (store.keyspace("numbers").expect("made"), store.keyspace("others").expect("made"));
    let value =
        |n: u32| (0..256u32).flat_map(|at| (n ^ at).wrapping_mul(2_654_435_761).to_be_bytes()).collect::<Vec<u8>>();
    let mut batch = Batch::new();
    for n in 0..2000u32 {
        batch.insert(&numbers, n.to_be_bytes(), value(n)).insert(&others, n.to_be_bytes(), "small");
    }
    store.commit(batch).expect("written");
    store.compact::<&[u8]>(&numbers, ..).expect("compacted");
    let before = store.status().group.table_bytes;
    let mut batch = Batch::new();
    for n in 0..1000u32 {
        batch.remove(&numbers, n.to_be_bytes());
    }
    store.commit(batch).expect("removed");
    store.compact(&numbers, 0u32.to_be_bytes()..=999u32.to_be_bytes()).expect("compacted");
    let after = store.status().group.table_bytes;
    assert!(after * 3 < before * 2, "half of it is gone: before={before} after={after}");
    assert_eq!((numbers.iter().count(), others.iter().count()), (1000, 2000));

    store.checkpoint("c").expect("made");
    let trial = store.create_clone("trial", "c").expect("made");
    store.drop_clone("trial").expect("dropped");
    let refused = trial.compact::<&[u8]>(&numbers, ..).expect_err("the clone is gone");
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    store.close().expect("closes");
}

/// A reader goes on where it was, after the store and itself were restarted, and knows what it missed.
#[test]
fn changes_go_on_where_a_reader_was() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let store = builder().open(&path).expect("opens");
    let names = store.keyspace("names").expect("made");
    let unrecorded = store.changes(LogIndex(1)).err().map(|error| error.kind());
    assert_eq!(unrecorded, Some(ErrorKind::Unsupported));
    names.insert("before", "").expect("written");
    let from = store.record_changes().expect("recorded");
    assert!(store.record_changes().expect("again") > from);
    assert!(!store.keyspaces().iter().any(|name| name.starts_with("mainstay.")));
    let told = store.changes(LogIndex(1)).err().map(|error| error.kind());
    assert_eq!(told, Some(ErrorKind::Purged { oldest: from }));

    let mut changes = store.changes(from).expect("recorded");
    let first = names.insert("ada", "1815").expect("written");
    let mut batch = Batch::new();
    batch.require_absent(&names, "ada").insert(&names, "ada", "never");
    assert_eq!(store.commit(batch).expect_err("it is there").kind(), ErrorKind::Conflict);
    let ops = |change: Change| match change.kind {
        ChangeKind::Writes(ops) => (change.index, ops),
        other => panic!("{other:?}"),
    };
    let (index, written) = ops(changes.next().expect("never ends").expect("written"));
    assert_eq!(index, first.index());
    let put = WriteOp::Put { keyspace: names.id(), key: "ada".into(), value: "1815".into() };
    assert_eq!(written, [put]);
    assert!(changes.try_next().expect("readable").is_none(), "what was refused is no change");
    let position = changes.position();
    drop(changes);
    names.remove_prefix("a").expect("written");
    drop((names, store));

    let store = builder().open(&path).expect("opens");
    let mut changes = store.changes(position).expect("recorded");
    let (_, removed) = ops(changes.try_next().expect("readable").expect("missed"));
    assert!(matches!(&removed[..], [WriteOp::DeleteRange { range, .. }] if range.contains(b"alan")), "{removed:?}");
    assert!(mainstay_io::block_on(changes.try_next_async()).expect("readable").is_none());
    drop(changes);
    store.close().expect("closes");
}

fn keys_of(keyspace: &mainstay::Keyspace) -> u64 {
    keyspace.iter().fold(0, |count, entry| entry.map(|_| count + 1).expect("readable"))
}

/// How often the threads of this process with that name have gone to sleep.
fn sleeps(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("a process has threads");
    let of_task = |task: std::path::PathBuf| {
        // A thread that ends meanwhile has neither.
        let comm = std::fs::read_to_string(task.join("comm")).ok().filter(|comm| comm.trim() == name)?;
        let status = std::fs::read_to_string(task.join("status")).ok()?;
        let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches:"))?;
        let count = line.rsplit('\t').next().and_then(|count| count.trim().parse::<u64>().ok());
        Some(count.unwrap_or_else(|| panic!("{comm}: {line}")))
    };
    tasks.filter_map(|task| of_task(task.ok()?.path())).sum()
}

#[test]
fn a_commit_that_blocks_wakes_neither_the_log_nor_the_applier() {
    const COMMITS: u64 = 200;
    let folder = tempfile::tempdir().expect("a folder");
    let store = builder().open(folder.path().join("store")).expect("opens");
    let names = store.keyspace("names").expect("made");
    names.insert("first", "").expect("written");
    let count = || sleeps("io-wal") + sleeps("mainstay-apply");
    let before = count();
    for n in 0..COMMITS {
        names.insert(n.to_be_bytes(), "value").expect("written");
    }
    let blocking = count() - before;
    let before = count();
    for n in 0..COMMITS {
        mainstay_io::block_on(names.insert_async(n.to_be_bytes(), "value")).expect("written");
    }
    let other = count() - before;
    // The store has its own reasons to write a record now and then.
    assert!(blocking < COMMITS / 4, "{blocking} sleeps of the threads of the log in {COMMITS} commits");
    assert!(other >= COMMITS, "{other}: what does not block passes through them");
    store.close().expect("closes");
}

/// Threads that block and tasks that do not, on one store: what each was told is there, in an order that all agree on.
#[test]
fn commits_that_block_and_that_do_not_share_a_log() {
    const WRITERS: u64 = 6;
    const COMMITS: u64 = 150;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let store = builder().open(&path).expect("opens");
    let names = store.keyspace("names").expect("made");
    let write = |writer: u64| {
        let names = names.clone();
        move || -> Vec<u64> {
            let commit = |n: u64| {
                let key = [writer.to_be_bytes(), n.to_be_bytes()].concat();
                let committed = match writer % 2 {
                    0 => names.insert(&key, n.to_be_bytes()),
                    _ => mainstay_io::block_on(names.insert_async(&key, n.to_be_bytes())),
                };
                let index = committed.expect("written").index().0;
                assert!(names.get(&key).expect("readable").is_some(), "an answer means that it can be read");
                index
            };
            (0..COMMITS).map(commit).collect()
        }
    };
    let mut indexes: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..WRITERS).map(|writer| scope.spawn(write(writer))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a writer does not panic")).collect()
    });
    indexes.sort_unstable();
    indexes.dedup();
    assert_eq!(indexes.len() as u64, WRITERS * COMMITS, "an index for each");
    store.close().expect("what is on its way is waited for");
    drop((names, store));
    let store = builder().open(&path).expect("opens");
    let names = store.keyspace("names").expect("there");
    assert_eq!(keys_of(&names), WRITERS * COMMITS);
}
