//! Transactions through the facade: stories, and a model that knows every version.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Barrier;

use mainstay::{
    ClientToken, Commit, Entry, Error, ErrorKind, Isolation, Keyspace, LogIndex, Result, Store, TRANSACT_ATTEMPTS_MAX,
    TRANSACTION_BYTES_MAX, Transaction, TransactionScan,
};
use proptest::prelude::*;

fn open(folder: &tempfile::TempDir) -> Store {
    let builder = Store::builder().wal_bytes(8 << 20).memory_bytes(32 << 20);
    builder.open(folder.path().join("store")).expect("opens")
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn kind<T>(result: Result<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

fn pairs(scan: impl Iterator<Item = Result<Entry>>) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    let pair = |entry: Result<Entry>| entry.map(|entry| (text(&entry.key), text(&entry.value))).expect("readable");
    scan.map(pair).collect()
}

fn keys(scan: impl Iterator<Item = Result<Entry>>) -> Vec<String> {
    pairs(scan).into_iter().map(|(key, _)| key).collect()
}

/// Two doctors are on call, one must stay: each sees the other and leaves.
#[test]
fn write_skew_is_refused_where_it_is_serializable_and_allowed_at_a_snapshot() {
    let folder = folder();
    let store = open(&folder);
    let on_call = store.keyspace("on-call").expect("made");
    let both_leave = |isolation| {
        for name in ["ada", "alan"] {
            on_call.insert(name, "yes").expect("written");
        }
        let leave = |name: &str| {
            let mut transaction = store.transaction(isolation).expect("begun");
            let others = transaction.iter(&on_call).filter(|e| e.as_ref().is_ok_and(|e| e.key != name)).count();
            assert_eq!(others, 1);
            transaction.remove(&on_call, name).expect("recorded");
            transaction
        };
        let (ada, alan) = (leave("ada"), leave("alan"));
        (kind(ada.commit()), kind(alan.commit()))
    };
    assert_eq!(both_leave(Isolation::Snapshot), (None, None));
    assert_eq!(keys(on_call.iter()), [""; 0]);
    assert_eq!(both_leave(Isolation::Serializable), (None, Some(ErrorKind::Conflict)));
    assert_eq!(keys(on_call.iter()), ["alan"]);
    store.close().expect("closes");
}

#[test]
fn a_lost_update_is_refused_at_every_isolation_and_a_read_for_update_counts_as_a_write() {
    let folder = folder();
    let store = open(&folder);
    let counters = store.keyspace("counters").expect("made");
    for isolation in [Isolation::Snapshot, Isolation::Serializable] {
        counters.insert("n", "1").expect("written");
        let mut slow = store.transaction(isolation).expect("begun");
        assert_eq!(slow.get(&counters, "n").expect("readable").as_deref(), Some(&b"1"[..]));
        counters.insert("n", "2").expect("written");
        slow.insert(&counters, "n", "1+1").expect("recorded");
        assert_eq!(kind(slow.commit()), Some(ErrorKind::Conflict));
        assert_eq!(counters.get("n").expect("readable").as_deref(), Some(&b"2"[..]));
        // Without having read it, too.
        let mut blind = store.transaction(isolation).expect("begun");
        counters.remove("n").expect("written");
        blind.insert(&counters, "n", "3").expect("recorded");
        assert_eq!(kind(blind.commit()), Some(ErrorKind::Conflict));
        assert_eq!(counters.get("n").expect("readable"), None);
        let mut reader = store.transaction(isolation).expect("begun");
        assert_eq!(reader.get_for_update(&counters, "n").expect("readable"), None);
        reader.insert(&counters, "other", "1").expect("recorded");
        counters.insert("n", "4").expect("written");
        assert_eq!(kind(reader.commit()), Some(ErrorKind::Conflict));
    }
    store.close().expect("closes");
}

/// What comes into a range that was read, leaves it, or changes in it is a phantom, but not what lies behind the part that was seen.
#[test]
fn phantoms_are_refused_in_the_part_of_a_range_that_was_seen() {
    let folder = folder();
    let store = open(&folder);
    let names = store.keyspace("names").expect("made");
    let check = |read: &dyn Fn(&Transaction), change: &dyn Fn(), expect: Option<ErrorKind>| {
        for name in ["b", "d", "f", "h"] {
            names.insert(name, "1").expect("written");
        }
        names.remove("e").expect("written");
        let mut transaction = store.transaction(Isolation::Serializable).expect("begun");
        read(&transaction);
        change();
        transaction.insert(&names, "result", "1").expect("recorded");
        assert_eq!(kind(transaction.commit()), expect);
    };
    let conflict = Some(ErrorKind::Conflict);
    let all = |transaction: &Transaction| assert_eq!(transaction.range(&names, "b".."h").count(), 3);
    check(&all, &|| drop(names.insert("e", "new")), conflict);
    check(&all, &|| drop(names.remove("d")), conflict);
    check(&all, &|| drop(names.insert("f", "other")), conflict);
    check(&all, &|| drop(names.insert("f", "1")), conflict);
    check(&all, &|| drop(names.insert("h", "outside")), None);
    check(&all, &|| drop(names.remove("e")), None);
    // As many as before, but others.
    let swapped = || {
        names.remove("d").expect("written");
        names.insert("e", "1").expect("written");
    };
    check(&all, &swapped, conflict);
    let first = |transaction: &Transaction| assert_eq!(keys(transaction.range(&names, "a".."h").take(1)), ["b"]);
    check(&first, &|| drop(names.remove("b")), conflict);
    check(&first, &|| drop(names.insert("c", "behind")), None);
    names.remove("c").expect("written");
    let last = |transaction: &Transaction| assert_eq!(keys(transaction.prefix(&names, "").rev().take(1)), ["result"]);
    check(&last, &|| drop(names.insert("s", "behind")), conflict);
    names.remove("s").expect("written");
    check(&last, &|| drop(names.insert("g", "before")), None);
    let none = |transaction: &Transaction| drop(transaction.iter(&names));
    check(&none, &|| drop(names.insert("e", "unseen")), None);
    store.close().expect("closes");
}

#[test]
fn own_writes_are_seen_over_the_snapshot_and_by_nobody_else() {
    let folder = folder();
    let store = open(&folder);
    let names = store.keyspace("names").expect("made");
    for (name, value) in [("a", "1"), ("c", "1"), ("e", "1")] {
        names.insert(name, value).expect("written");
    }
    let mut transaction = store.transaction(Isolation::Serializable).expect("begun");
    names.insert("z", "later").expect("written");
    transaction.insert(&names, "b", "own").expect("recorded");
    transaction.insert(&names, "c", "own").expect("recorded");
    transaction.remove(&names, "e").expect("recorded");
    transaction.remove(&names, "never").expect("recorded");
    let before = transaction.iter(&names);
    transaction.insert(&names, "d", "after the scan").expect("recorded");
    let text = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<Vec<_>>();
    assert_eq!(pairs(before), text(&[("a", "1"), ("b", "own"), ("c", "own")]));
    let all = text(&[("a", "1"), ("b", "own"), ("c", "own"), ("d", "after the scan")]);
    assert_eq!(pairs(transaction.iter(&names)), all);
    assert_eq!(pairs(transaction.iter(&names).rev()), all.iter().rev().cloned().collect::<Vec<_>>());
    assert_eq!(keys(transaction.range(&names, "b"..="c")), ["b", "c"]);
    assert_eq!(keys(transaction.prefix(&names, "c")), ["c"]);
    // Both ends meet, and no pair is given twice.
    let mut scan: TransactionScan = transaction.iter(&names);
    let ends: Vec<_> = (0..5)
        .map(|n| if n % 2 == 0 { scan.next_back() } else { scan.next() })
        .map(|entry| entry.map(|entry| entry.expect("readable").key))
        .collect();
    assert_eq!(ends, [Some("d".into()), Some("a".into()), Some("c".into()), Some("b".into()), None]);
    let found = transaction.multi_get(&names, &["a", "c", "e", "z"]).expect("readable");
    assert_eq!(found, [Some("1".into()), Some("own".into()), None, None]);
    assert!(!transaction.contains_key(&names, "e").expect("readable"));
    assert_eq!(keys(names.iter()), ["a", "c", "e", "z"], "nobody else sees them");
    drop(transaction);
    assert_eq!(keys(names.iter()), ["a", "c", "e", "z"], "and dropped they never were");
    store.close().expect("closes");
}

/// Own writes stand exactly at the bounds, where the snapshot has nothing.
#[test]
fn own_writes_at_the_bounds_of_a_range_count_as_the_bounds_say() {
    let folder = folder();
    let store = open(&folder);
    let names = store.keyspace("names").expect("made");
    let mut transaction = store.transaction(Isolation::Serializable).expect("begun");
    for name in ["b", "m", "y"] {
        transaction.insert(&names, name, "own").expect("recorded");
    }
    let check = |bounds: (Bound<&str>, Bound<&str>), expect: &[&str]| {
        assert_eq!(keys(transaction.range::<&str>(&names, bounds)), expect, "{bounds:?}");
        let back: Vec<_> = expect.iter().rev().copied().collect();
        assert_eq!(keys(transaction.range::<&str>(&names, bounds).rev()), back, "{bounds:?} from behind");
    };
    check((Bound::Included("b"), Bound::Included("y")), &["b", "m", "y"]);
    check((Bound::Included("b"), Bound::Excluded("y")), &["b", "m"]);
    check((Bound::Excluded("b"), Bound::Included("y")), &["m", "y"]);
    check((Bound::Unbounded, Bound::Included("b")), &["b"]);
}

#[test]
fn a_removed_range_is_seen_by_its_transaction_and_is_no_read() {
    let folder = folder();
    let store = open(&folder);
    let names = store.keyspace("names").expect("made");
    for name in ["a", "b1", "b2", "c"] {
        names.insert(name, "1").expect("written");
    }
    let mut transaction = store.transaction(Isolation::Serializable).expect("begun");
    transaction.insert(&names, "b0", "before").expect("recorded");
    transaction.remove_prefix(&names, "b").expect("recorded");
    transaction.insert(&names, "b2", "after").expect("recorded");
    assert_eq!(transaction.get(&names, "b1").expect("readable"), None);
    assert_eq!(transaction.get(&names, "b0").expect("readable"), None);
    assert_eq!(keys(transaction.range(&names, "a".."c")), ["a", "b2"]);
    assert_eq!(keys(transaction.iter(&names).rev()), ["c", "b2", "a"]);
    assert_eq!(kind(transaction.remove_range(&names, "c".."b")), Some(ErrorKind::Invalid));
    assert_eq!(keys(names.iter()), ["a", "b1", "b2", "c"], "nobody else sees it");
    transaction.commit().expect("nothing has changed");
    assert_eq!(keys(names.iter()), ["a", "b2", "c"]);

    // Others write into a range that is removed and not read: that is gone too, and nobody conflicts.
    let mut blind = store.transaction(Isolation::Serializable).expect("begun");
    blind.remove_range(&names, "b".."c").expect("recorded");
    names.insert("b9", "late").expect("written");
    blind.commit().expect("it has read nothing");
    assert_eq!(keys(names.iter()), ["a", "c"]);
    // Who has read of a range conflicts with its removal, at a key and at a range, and who has only written it too.
    let conflicts = |depend: &dyn Fn(&mut Transaction)| {
        let mut transaction = store.transaction(Isolation::Serializable).expect("begun");
        depend(&mut transaction);
        transaction.insert(&names, "z", "").expect("recorded");
        names.remove_range("a".."b").expect("written");
        let outcome = kind(transaction.commit());
        names.insert("a", "1").expect("written");
        outcome
    };
    assert_eq!(conflicts(&|transaction| drop(transaction.get(&names, "a"))), Some(ErrorKind::Conflict));
    assert_eq!(conflicts(&|transaction| drop(keys(transaction.iter(&names)))), Some(ErrorKind::Conflict));
    assert_eq!(conflicts(&|transaction| drop(transaction.insert(&names, "a", "2"))), Some(ErrorKind::Conflict));
    assert_eq!(conflicts(&|transaction| drop(transaction.get(&names, "c"))), None);
    store.close().expect("closes");
}

#[test]
fn what_only_reads_commits_without_an_entry() {
    let folder = folder();
    let store = open(&folder);
    let names = store.keyspace("names").expect("made");
    let commit = names.insert("a", "1").expect("written");
    let transaction = store.transaction(Isolation::Serializable).expect("begun");
    assert_eq!(transaction.get(&names, "a").expect("readable").as_deref(), Some(&b"1"[..]));
    let later = names.insert("a", "2").expect("written");
    assert_eq!(transaction.index(), commit.index());
    assert_eq!(transaction.commit().expect("it read one state").index(), commit.index());
    assert_eq!(names.insert("b", "1").expect("written").index().0, later.index().0 + 1);
    store.close().expect("closes");
}

#[test]
fn what_a_transaction_records_is_bounded() {
    let folder = folder();
    let store = open(&folder);
    let names = store.keyspace("names").expect("made");
    let mut transaction = store.transaction(Isolation::Snapshot).expect("begun");
    let refused = transaction.insert(&names, "k", vec![0; TRANSACTION_BYTES_MAX]);
    assert_eq!(kind(refused), Some(ErrorKind::Invalid));
    assert_eq!(kind(transaction.commit()), Some(ErrorKind::Invalid), "it is not committed without");
    let mut transaction = store.transaction(Isolation::Snapshot).expect("begun");
    transaction.insert(&names, "", "an empty key").expect("recorded");
    assert_eq!(kind(transaction.commit()), Some(ErrorKind::Invalid));
    assert_eq!(keys(names.iter()), [""; 0]);
    store.close().expect("closes");
}

#[test]
fn a_token_answers_the_first_outcome_of_a_transaction() {
    let folder = folder();
    let store = open(&folder);
    let names = store.keyspace("names").expect("made");
    let token = |sequence| ClientToken { client: [5; 16], sequence };
    let add = |sequence| {
        let mut transaction = store.transaction(Isolation::Serializable).expect("begun");
        let found = transaction.get(&names, "n").expect("readable");
        let n = found.map_or(0, |value| value[0]);
        transaction.insert(&names, "n", [n + 1]).expect("recorded");
        (transaction.commit_once(token(sequence)), n + 1)
    };
    assert_eq!(add(1).0.map(|_| ()).map_err(|e| e.kind()), Ok(()));
    // Given again under the same token: it was applied, though the value has moved on.
    assert!(add(1).0.is_ok());
    assert_eq!(names.get("n").expect("readable").as_deref(), Some(&[1][..]));
    let mut late = store.transaction(Isolation::Serializable).expect("begun");
    assert!(late.get(&names, "n").expect("readable").is_some());
    late.insert(&names, "n", [9]).expect("recorded");
    names.insert("n", [7]).expect("written");
    assert_eq!(kind(late.commit_once(token(2))), Some(ErrorKind::Conflict));
    assert_eq!(kind(add(2).0), Some(ErrorKind::Conflict), "that is the outcome of the token");
    assert!(add(3).0.is_ok());
    assert_eq!(names.get("n").expect("readable").as_deref(), Some(&[8][..]));
    store.close().expect("closes");
}

#[test]
fn transact_tries_again_after_a_conflict_and_not_without_end() {
    let folder = folder();
    let store = open(&folder);
    let names = store.keyspace("names").expect("made");
    let mut attempts = 0;
    let always = store.transact(Isolation::Serializable, |transaction| {
        attempts += 1;
        let _ = transaction.get(&names, "n")?;
        names.insert("n", attempts.to_string())?;
        transaction.insert(&names, "n", "never")
    });
    assert_eq!((kind(always), attempts), (Some(ErrorKind::Conflict), TRANSACT_ATTEMPTS_MAX));
    let given_up = store.transact(Isolation::Serializable, |transaction| {
        transaction.insert(&names, "n", "never")?;
        Err::<(), _>(Error::new(ErrorKind::Invalid, "not this one"))
    });
    assert_eq!(kind(given_up), Some(ErrorKind::Invalid));
    assert_eq!(names.get("n").expect("readable").as_deref(), Some(TRANSACT_ATTEMPTS_MAX.to_string().as_bytes()));
    store.close().expect("closes");
}

/// Threads that add to a few counters: nothing is lost, and all that were answered are in the sums.
#[test]
fn counters_of_many_threads_add_up() {
    const THREADS: usize = 4;
    const EACH: usize = 25;
    let folder = folder();
    let store = open(&folder);
    let counters = store.keyspace("counters").expect("made");
    let begin = Barrier::new(THREADS);
    let number = |value: Option<mainstay::Value>| -> u64 {
        value.map_or(0, |value| String::from_utf8_lossy(&value).parse().expect("a number"))
    };
    let done: u64 = std::thread::scope(|scope| {
        let add = |thread: usize| {
            let (store, counters, begin) = (&store, &counters, &begin);
            move || {
                begin.wait();
                let one = |n: usize| {
                    store.transact(Isolation::Snapshot, |transaction| {
                        for key in [format!("k{}", (n + thread) % 3), "all".to_owned()] {
                            let sum = number(transaction.get(counters, &key)?) + 1;
                            transaction.insert(counters, &key, sum.to_string())?;
                        }
                        Ok(())
                    })
                };
                let ended: Vec<Result<_>> = (0..EACH).map(one).collect();
                assert!(ended.iter().flat_map(|e| e.as_ref().err()).all(|e| e.kind() == ErrorKind::Conflict));
                ended.iter().filter(|ended| ended.is_ok()).count() as u64
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(add(thread))).collect();
        threads.into_iter().map(|thread| thread.join().expect("ended")).sum()
    });
    assert!(done > 0);
    assert_eq!(number(counters.get("all").expect("readable")), done);
    let parts: u64 = (0..3).map(|n| number(counters.get(format!("k{n}")).expect("readable"))).sum();
    assert_eq!(parts, done);
    store.close().expect("closes");
}

#[test]
fn the_async_forms_do_the_same() {
    let folder = folder();
    let store = open(&folder);
    let names = store.keyspace("names").expect("made");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let of = names.clone();
        let work = store.transact_async(Isolation::Serializable, move |transaction| {
            let names = of.clone();
            Box::pin(async move {
                let found = transaction.get_async(&names, "n").await?;
                let many = transaction.multi_get_async(&names, &["n", "m"]).await?;
                assert_eq!(many, [found.clone(), None]);
                let mut scan = transaction.iter(&names);
                assert_eq!(scan.next_async().await?.is_some(), found.is_some());
                transaction.insert(&names, "n", "1")?;
                Ok(found)
            })
        });
        let (found, commit): (_, Commit) = work.await.expect("nobody else is there");
        assert_eq!(found, None);
        let snapshot = store.snapshot_async().await.expect("a view");
        assert_eq!(snapshot.version_async(&names, "n").await.expect("readable"), Some(commit.index()));
        let mut transaction = store.transaction_async(Isolation::Snapshot).await.expect("begun");
        let found = transaction.get_for_update_async(&names, "n").await.expect("readable");
        assert_eq!(found.as_deref(), Some(&b"1"[..]));
        transaction.remove(&names, "n").expect("recorded");
        names.insert_async("n", "2").await.expect("written");
        let token = ClientToken { client: [1; 16], sequence: 1 };
        assert_eq!(kind(transaction.commit_once_async(token).await), Some(ErrorKind::Conflict));
    });
    store.close().expect("closes");
}

const SLOTS: usize = 3;
const KEYS: u8 = 6;

/// Values by key, with the entry that wrote each.
type Model = BTreeMap<u8, (LogIndex, u8)>;

#[derive(Clone, Debug)]
enum Step {
    Get(u8),
    /// From, to, from which end, how many.
    Range(u8, u8, bool, usize),
    Insert(u8, u8),
    Remove(u8),
    /// From, to.
    RemoveRange(u8, u8),
    Commit,
    Drop,
}

fn step() -> impl Strategy<Value = (usize, Step)> {
    let key = || 0..KEYS;
    let step = prop_oneof![
        3 => key().prop_map(Step::Get),
        3 => (key(), 0..=KEYS, any::<bool>(), 0..5_usize).prop_map(|(a, b, back, count)| Step::Range(a, b, back, count)),
        3 => (key(), any::<u8>()).prop_map(|(key, value)| Step::Insert(key, value)),
        2 => key().prop_map(Step::Remove),
        2 => (key(), key()).prop_map(|(a, b)| Step::RemoveRange(a.min(b), a.max(b) + 1)),
        4 => Just(Step::Commit),
        1 => Just(Step::Drop),
    ];
    (0..SLOTS, step)
}

/// A transaction and what the model knows of it.
struct Open {
    transaction: Transaction,
    began: Model,
    own: BTreeMap<u8, Option<u8>>,
    /// Keys that it depends on: from, to before.
    depends: Vec<(u8, u8)>,
    /// Those that it depends on since it writes them.
    written: BTreeSet<u8>,
    /// What it did and saw, to be done again at its place in the order of commits.
    seen: Vec<(Step, Vec<(u8, u8)>)>,
}

fn view(model: &Model, own: &BTreeMap<u8, Option<u8>>) -> BTreeMap<u8, u8> {
    let mut view: BTreeMap<u8, u8> = model.iter().map(|(key, (_, value))| (*key, *value)).collect();
    for (key, value) in own {
        match value {
            Some(value) => view.insert(*key, *value),
            None => view.remove(key),
        };
    }
    view
}

/// What a step sees of a state.
fn look(view: &BTreeMap<u8, u8>, step: &Step) -> Vec<(u8, u8)> {
    match *step {
        Step::Get(key) => view.get(&key).map(|value| (key, *value)).into_iter().collect(),
        Step::Range(from, to, back, count) => {
            let within = view.iter().filter(|(key, _)| from <= **key && **key < to).map(|(key, value)| (*key, *value));
            let within: Vec<_> = within.collect();
            if back { within.into_iter().rev().take(count).collect() } else { within.into_iter().take(count).collect() }
        }
        _ => Vec::new(),
    }
}

/// The keys that a step has seen something of.
fn seen_keys(step: &Step, found: &[(u8, u8)]) -> (u8, u8) {
    match *step {
        Step::Get(key) => (key, key + 1),
        Step::Range(from, to, back, count) => match found.last() {
            // Fewer than were asked for: it has seen the end.
            _ if found.len() < count => (from, to),
            None => (from, from),
            Some((last, _)) if back => (*last, to),
            Some((last, _)) => (from, last + 1),
        },
        _ => (0, 0),
    }
}

impl Open {
    fn begin(store: &Store, isolation: Isolation, model: &Model) -> Self {
        let transaction = store.transaction(isolation).expect("begun");
        let (own, depends, written, seen) = Default::default();
        Self { transaction, began: model.clone(), own, depends, written, seen }
    }

    /// Does a step that is no end, and checks what it sees against the snapshot.
    fn step(&mut self, keyspace: &Keyspace, step: Step) -> std::result::Result<(), TestCaseError> {
        let pair = |entry: Result<Entry>| entry.map(|entry| (entry.key[0], entry.value[0])).expect("readable");
        let found: Vec<(u8, u8)> = match step {
            Step::Get(key) => {
                let value = self.transaction.get(keyspace, [key]).expect("readable");
                value.map(|value| (key, value[0])).into_iter().collect()
            }
            Step::Range(from, to, back, count) => {
                let scan = self.transaction.range(keyspace, [from]..[to]);
                if back { scan.rev().take(count).map(pair).collect() } else { scan.take(count).map(pair).collect() }
            }
            Step::Insert(key, value) => {
                self.transaction.insert(keyspace, [key], [value]).expect("recorded");
                self.own.insert(key, Some(value));
                self.written.insert(key);
                Vec::new()
            }
            Step::Remove(key) => {
                self.transaction.remove(keyspace, [key]).expect("recorded");
                self.own.insert(key, None);
                self.written.insert(key);
                Vec::new()
            }
            Step::RemoveRange(from, to) => {
                self.transaction.remove_range(keyspace, [from]..[to]).expect("recorded");
                self.own.extend((from..to).map(|key| (key, None)));
                self.written.retain(|key| !(from..to).contains(key));
                Vec::new()
            }
            Step::Commit | Step::Drop => Vec::new(),
        };
        if matches!(step, Step::Get(_) | Step::Range(..)) {
            prop_assert_eq!(&found, &look(&view(&self.began, &self.own), &step), "{:?}", &step);
            let is_own = matches!(step, Step::Get(key) if self.own.contains_key(&key));
            if self.transaction.isolation() == Isolation::Serializable && !is_own {
                self.depends.push(seen_keys(&step, &found));
            }
        }
        self.seen.push((step, found));
        Ok(())
    }

    /// Commits, and checks that it is refused exactly when something it depends on has changed.
    fn commit(self, model: &mut Model) -> std::result::Result<(), TestCaseError> {
        let part = |model: &Model, from: u8, to: u8| -> Vec<_> {
            model.iter().filter(|(key, _)| from <= **key && **key < to).map(|(k, v)| (*k, *v)).collect()
        };
        let written = self.written.iter().map(|key| (*key, key + 1));
        let changed =
            self.depends.iter().copied().chain(written).any(|(a, b)| part(&self.began, a, b) != part(model, a, b));
        let isolation = self.transaction.isolation();
        let commit = match self.transaction.commit() {
            Err(error) => {
                prop_assert_eq!(error.kind(), ErrorKind::Conflict);
                prop_assert!(changed && !self.own.is_empty(), "refused without a reason: {:?}", self.seen);
                return Ok(());
            }
            Ok(commit) => commit,
        };
        prop_assert!(!changed || self.own.is_empty(), "committed in spite of a change: {:?}", self.seen);
        if isolation == Isolation::Serializable {
            // As if it had run alone, here. One that only read ran where it began.
            let at = if self.own.is_empty() { &self.began } else { &*model };
            let mut own = BTreeMap::new();
            for (step, found) in &self.seen {
                match *step {
                    Step::Insert(key, value) => {
                        own.insert(key, Some(value));
                    }
                    Step::Remove(key) => {
                        own.insert(key, None);
                    }
                    Step::RemoveRange(from, to) => own.extend((from..to).map(|key| (key, None))),
                    _ => prop_assert_eq!(&look(&view(at, &own), step), found, "{:?}", step),
                }
            }
        }
        for (key, value) in self.own {
            match value {
                Some(value) => model.insert(key, (commit.index(), value)),
                None => model.remove(&key),
            };
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// Transactions in turns against a map that knows every version: what they read is their snapshot and their own writes, they are refused
    /// exactly when what they depend on has changed, and those that are serializable equal the same ones after each other, in the order
    /// of their commits.
    #[test]
    fn committed_transactions_equal_a_serial_order(
        steps in prop::collection::vec(step(), 1..90),
        serializable in prop::array::uniform3(prop::bool::weighted(0.7)),
    ) {
        let folder = folder();
        let store = open(&folder);
        let keyspace = store.keyspace("model").expect("made");
        let mut model = Model::new();
        let isolation = |slot: usize| {
            if serializable[slot] { Isolation::Serializable } else { Isolation::Snapshot }
        };
        let mut open: [Option<Open>; SLOTS] = [const { None }; SLOTS];
        for (slot, step) in steps {
            let mut now = open[slot].take().unwrap_or_else(|| Open::begin(&store, isolation(slot), &model));
            match step {
                Step::Commit => now.commit(&mut model)?,
                Step::Drop => drop(now),
                step => {
                    now.step(&keyspace, step)?;
                    open[slot] = Some(now);
                }
            }
            let found: Vec<_> = keyspace.iter().map(|e| e.map(|e| (e.key[0], e.value[0])).expect("readable")).collect();
            let expect: Vec<_> = view(&model, &BTreeMap::new()).into_iter().collect();
            prop_assert_eq!(found, expect);
        }
    }
}
