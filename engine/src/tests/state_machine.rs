//! Commands of the embedder: they read what was applied and their own writes, and all or nothing of them is written.

use std::ops::Bound;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Waker};

use bytes::Bytes;
use mainstay_io::block_on;

use super::harness::*;
use crate::{Apply, Command, CommandBody, Error, ErrorKind, LogIndex, MAIN, Result, StateMachine};

/// `add key n` adds to a counter in the keyspace `counters`, `sum` adds all, `swap a b` exchanges two, `many n`
/// writes and reads n counters, `read` gives many beside own writes, `clear a b` removes those from a up to b but for one that it makes, `fail` writes and fails.
#[derive(Default)]
struct Counters {
    applied: AtomicU64,
    restored: AtomicU64,
}

async fn number(apply: &Apply, keyspace: crate::KeyspaceId, key: &str) -> Result<u64> {
    let value = apply.get(keyspace, key.as_bytes()).await?;
    Ok(value.map_or(0, |v| String::from_utf8_lossy(&v).parse().expect("only numbers are written")))
}

impl StateMachine for Counters {
    fn apply<'a>(
        &'a self,
        apply: &'a mut Apply,
        command: Bytes,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes>> + Send + 'a>> {
        Box::pin(async move {
            let command = String::from_utf8_lossy(&command).into_owned();
            let words: Vec<&str> = command.split(' ').collect();
            let counters = apply.keyspace("counters")?;
            match words[..] {
                ["add", key, n] => {
                    let sum = number(apply, counters, key).await? + n.parse::<u64>().expect("a number");
                    apply.put(counters, key.to_owned(), sum.to_string())?;
                    assert_eq!(number(apply, counters, key).await?, sum, "own writes are read");
                    Ok(sum.to_string().into())
                }
                ["swap", a, b] => {
                    let (x, y) = (number(apply, counters, a).await?, number(apply, counters, b).await?);
                    apply.put(counters, a.to_owned(), y.to_string())?;
                    apply.put(counters, b.to_owned(), x.to_string())?;
                    apply.delete(counters, "gone")?;
                    let pairs = apply.range(counters, Bound::Unbounded, Bound::Unbounded, true, 10).await?;
                    assert!(pairs.iter().all(|(key, _)| key != "gone"));
                    assert!(pairs.is_sorted_by(|p, q| p.0 > q.0));
                    Ok(pairs.len().to_string().into())
                }
                ["many", n] => {
                    for i in 0..n.parse::<u64>().expect("a number") {
                        apply.put(counters, format!("many{i:08}"), "1")?;
                        assert_eq!(number(apply, counters, &format!("many{i:08}")).await?, 1);
                    }
                    Ok(Bytes::new())
                }
                ["read", ref keys @ ..] => {
                    apply.put(counters, "own", "9")?;
                    apply.delete(counters, "k01")?;
                    let found = apply.get_many(counters, keys).await?;
                    let each = found
                        .into_iter()
                        .map(|value| value.map_or("-".into(), |v| String::from_utf8_lossy(&v).into_owned()));
                    Ok(each.collect::<Vec<_>>().join(" ").into())
                }
                ["clear", a, b] => {
                    let (first, end) = (Bytes::from(a.to_owned()), Bytes::from(b.to_owned()));
                    let count = |pairs: Vec<_>| pairs.len();
                    let all = |reverse| apply.range(counters, Bound::Unbounded, Bound::Unbounded, reverse, usize::MAX);
                    let before = count(all(false).await?);
                    apply.put(counters, a.to_owned(), "7")?;
                    apply.delete_range(counters, Bound::Included(first.clone()), Bound::Excluded(end.clone()))?;
                    let refused = apply.delete_range(counters, Bound::Included(end), Bound::Excluded(first));
                    assert_eq!(refused.expect_err("no key").kind(), ErrorKind::Invalid);
                    assert_eq!(apply.get(counters, a.as_bytes()).await?, None, "what it wrote before is gone");
                    let kept = format!("{a}+");
                    apply.put(counters, kept.clone(), "1")?;
                    assert_eq!(number(apply, counters, &kept).await?, 1, "and what it writes behind is not");
                    let all = |reverse| apply.range(counters, Bound::Unbounded, Bound::Unbounded, reverse, usize::MAX);
                    let (mut there, back) = (all(false).await?, all(true).await?);
                    assert!(
                        there.iter().all(|(key, _)| *key == kept || !(a.as_bytes()..b.as_bytes()).contains(&&key[..]))
                    );
                    there.reverse();
                    assert_eq!(there, back);
                    Ok(format!("{} of {before}", there.len()).into())
                }
                ["sum"] => {
                    let pairs = apply.range(counters, Bound::Unbounded, Bound::Unbounded, false, usize::MAX).await?;
                    let sum: u64 =
                        pairs.iter().map(|(_, v)| String::from_utf8_lossy(v).parse::<u64>().expect("numbers")).sum();
                    Ok(format!("{sum} at {} {}", apply.index(), apply.time_ms()).into())
                }
                _ => {
                    apply.keyspace("never")?;
                    apply.put(counters, "gone", "1")?;
                    Err(Error::new(ErrorKind::Invalid, "as asked"))
                }
            }
        })
    }

    fn applied(&self, index: LogIndex) {
        self.applied.store(index.0, Ordering::SeqCst);
    }

    fn restored(&self, index: LogIndex) {
        self.restored.store(index.0, Ordering::SeqCst);
    }
}

fn custom(command: &str) -> CommandBody {
    CommandBody::Custom { branch: MAIN, command: Bytes::copy_from_slice(command.as_bytes()) }
}

fn answer(store: &Store, command: &str) -> Result<String> {
    let applied = store.propose(custom(command)).expect("the log takes it");
    applied.response.map(|response| String::from_utf8_lossy(&response).into_owned())
}

#[test]
fn commands_decide_the_same_before_and_after_a_crash() {
    let media = media();
    let counters = Arc::new(Counters::default());
    let store = Store::with_state_machine(&media, counters.clone());
    for n in 0..300 {
        answer(&store, &format!("add k{} {n}", n % 7)).expect("counted");
        if n == 100 {
            store.flush();
        }
    }
    assert_eq!(answer(&store, "fail").expect_err("as asked").kind(), ErrorKind::Invalid);
    assert_eq!(store.group().keyspace("never"), None);
    assert_eq!(answer(&store, "swap k1 k2").expect("exchanged"), "7");
    let sum = answer(&store, "sum").expect("summed");
    assert!(sum.starts_with("44850 at "), "{sum}");
    assert_eq!(counters.applied.load(Ordering::SeqCst), store.group().applied().0);
    let id = store.group().keyspace("counters").expect("made by the first command");
    let before = all(&store.group().snapshot(MAIN).expect("main"), id);
    drop(store);
    media.crash(5);

    let counters = Arc::new(Counters::default());
    let store = Store::with_state_machine(&media, counters.clone());
    assert_eq!(counters.restored.load(Ordering::SeqCst), store.group().flushed().0);
    assert_eq!(store.group().keyspace("counters"), Some(id));
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), id), before);
    assert!(answer(&store, "sum").expect("summed").starts_with("44850 at "));
    assert_eq!(store.group().status().divergences, 0);
    store.close();
}

#[test]
fn a_command_that_removes_a_range_reads_what_is_left_of_it() {
    let media = media();
    let store = Store::with_state_machine(&media, Arc::new(Counters::default()));
    for n in 0..30 {
        answer(&store, &format!("add k{n:02} 1")).expect("counted");
        if n == 15 {
            store.flush();
        }
    }
    assert_eq!(answer(&store, "clear k05 k25").expect("cleared"), "11 of 30");
    assert_eq!(answer(&store, "clear k a").map_err(|error| error.kind()), Err(ErrorKind::Invalid));
    let id = store.group().keyspace("counters").expect("made by the first command");
    let before = all(&store.group().snapshot(MAIN).expect("main"), id);
    assert_eq!((before.len(), before.contains_key(&b"k05+"[..])), (11, true));
    drop(store);
    media.crash(2);

    let store = Store::with_state_machine(&media, Arc::new(Counters::default()));
    store.settle();
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), id), before);
    assert!(answer(&store, "sum").expect("summed").starts_with("11 at "));
    store.close();
}

#[test]
fn a_command_reads_many_keys_beside_its_own_writes() {
    let media = media();
    let store = Store::with_state_machine(&media, Arc::new(Counters::default()));
    for n in 0..200 {
        answer(&store, &format!("add k{n:02} {n}")).expect("counted");
        if n == 90 {
            store.settle();
        }
    }
    let asked: Vec<String> = (0..150).map(|n| format!("k{n:02}")).collect();
    let expected: Vec<String> = (0..150).map(|n| if n == 1 { "-".to_owned() } else { n.to_string() }).collect();
    assert_eq!(answer(&store, "read none own k03").expect("read"), "- 9 3");
    assert_eq!(answer(&store, &format!("read {}", asked.join(" "))).expect("read"), expected.join(" "));
    store.close();
}

/// A delete of a large range of the etcd API held the thread of consensus for seconds: the leader lost its followers.
#[test]
fn a_large_command_lets_others_run() {
    let media = media();
    let store = Store::with_state_machine(&media, Arc::new(Counters::default()));
    answer(&store, "add k 1").expect("counted");
    let index = LogIndex(store.group().applied().0 + 1);
    let command = Command { time_ms: 1000, body: custom("many 10000") };
    let (mut pauses, mut context) = (0, Context::from_waker(Waker::noop()));
    {
        let mut apply = std::pin::pin!(store.group().apply(index, &command));
        while apply.as_mut().poll(&mut context).is_pending() {
            pauses += 1;
            // Nobody holds what a status needs, and nothing of the entry can be seen.
            assert!(store.group().status().applied < index);
        }
    }
    assert!(pauses >= 10_000 / 64 + 10_000 / 2048, "{pauses}");
    assert_eq!(store.group().applied(), index);
    let id = store.group().keyspace("counters").expect("made by the first command");
    assert_eq!(all(&store.group().snapshot(MAIN).expect("main"), id).len(), 10_001);
}

#[test]
fn without_a_state_machine_commands_are_refused() {
    let media = media();
    let store = Store::open(&media);
    assert_eq!(answer(&store, "sum").expect_err("nobody to ask").kind(), ErrorKind::Unsupported);
    store.put("k", b"v");
    assert_eq!(store.get("k").as_deref(), Some(&b"v"[..]));
    store.close();
}

/// A store whose counter `k` is 5, in a table and not in memory.
fn counted(media: &mainstay_io::sim::SimMedia) -> Store {
    let store = Store::with_state_machine(media, Arc::new(Counters::default()));
    assert_eq!(answer(&store, "add k 5").expect("counted"), "5");
    store.settle();
    store.close();
    Store::with_state_machine(media, Arc::new(Counters::default()))
}

/// Two of three replicas read a counter and add to it; the third met a read error there, had the state machine answer with that
/// error, wrote nothing, and went on: it differed from then on, and no digest told before the next flush.
#[test]
fn a_read_error_of_one_replica_is_never_an_answer() {
    let media = media();
    let store = counted(&media);
    // A read that fails is tried once more, and then the block is damaged.
    media.extents_disk().fail_next(mainstay_io::sim::IoKind::Read);
    media.extents_disk().fail_next(mainstay_io::sim::IoKind::Read);
    let error = store.propose(custom("add k 1")).expect_err("the replica leaves service instead of answering");
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    assert!(store.group().failure().is_some());
    assert!(store.propose(custom("add k 1")).is_err(), "and stays out of it");
    drop(store);
    media.kill(3);

    // The entry is in the log, and is applied once it can be.
    let store = Store::with_state_machine(&media, Arc::new(Counters::default()));
    assert_eq!(answer(&store, "add k 10").expect("counted"), "16");
    store.close();
}

/// What another replica may yet give is waited for: the entry is not applied, and may be again.
#[test]
fn an_entry_that_reads_what_may_yet_be_had_is_applied_later() {
    struct Silent;
    impl crate::TablePeers for Silent {
        fn count(&self) -> usize {
            1
        }

        fn read_table(
            &self,
            _: usize,
            id: crate::TableId,
            _: u64,
            _: u64,
        ) -> mainstay_io::BoxFuture<crate::Result<Bytes>> {
            let error = crate::Error::new(ErrorKind::Unavailable, format!("no answer table={id}"));
            Box::pin(std::future::ready(Err(error)))
        }
    }
    let media = media();
    let store = counted(&media);
    store.group().set_table_peers(Some(Arc::new(Silent)));
    let disk = media.extents_disk();
    disk.set_faults(mainstay_io::sim::Faults { read_error: 1_000_000, ..Default::default() });
    let index = crate::LogIndex(store.group().applied().0 + 1);
    let command = Command { time_ms: 1, body: custom("add k 1") };
    for _ in 0..2 {
        let error = block_on(store.group().apply(index, &command)).expect_err("not to be read");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(store.group().status().applier_waits && store.group().failure().is_none());
        assert!(store.group().applied() < index);
    }
    disk.heal();
    let applied = block_on(store.group().apply(index, &command)).expect("read");
    assert_eq!(applied.response.expect("counted"), "6");
    assert!(!store.group().status().applier_waits);
}

/// A command made a keyspace and wrote nothing into it. When it was replayed after a crash nobody was shown the keyspace, and the next
/// command made it once more: under a number of its own in replay, and with a failed assertion behind it.
#[test]
fn a_keyspace_made_by_a_command_that_writes_nothing_is_there_after_a_replay() {
    let media = media();
    let store = Store::with_state_machine(&media, Arc::new(Counters::default()));
    assert!(answer(&store, "sum").expect("summed").starts_with("0 at "));
    let id = store.group().keyspace("counters").expect("made by the command");
    drop(store);
    media.crash(1);

    let store = Store::with_state_machine(&media, Arc::new(Counters::default()));
    assert_eq!(answer(&store, "add k 2").expect("counted"), "2");
    assert_eq!(store.group().keyspace("counters"), Some(id));
    store.close();
}
