//! One client's run: waits until an operation is due, carries it out, counts its latency, and looks at what it found.
//!
//! # Place
//! between `ycsb`, which says what to do, `pace`, which says when, and `target`, which does it

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::pace::Pace;
use super::records::{Book, Finding, Values, key_of};
use super::report::{Recorder, Verified};
use super::target::{Clock, Target};
use super::ycsb::{Kind, Operation, Population, Source};

/// After an error: a server that is gone refuses at once.
const ERROR_PAUSE: Duration = Duration::from_millis(5);
/// Reads without an answer, one after the other, behind which a record is not asked for again when all are read back.
const READ_BACK_ATTEMPTS: u32 = 200;
/// As many, behind which a client asks for no record any more: a store that is gone is not waited for record by record.
const READ_BACK_FAILURES_MAX: u32 = 2 * READ_BACK_ATTEMPTS;
/// Between two of them.
const READ_BACK_PAUSE: Duration = Duration::from_millis(50);

/// What all clients of a run share.
pub(super) struct Run {
    pub(super) values: Arc<Values>,
    pub(super) population: Arc<Population>,
    /// Kept when what was written is to be verified.
    pub(super) book: Option<Arc<Book>>,
    /// A read during the run finds everything that was acknowledged before it was sent.
    pub(super) reads_are_current: bool,
    pub(super) end: Option<Duration>,
    pub(super) rate: Option<u64>,
    pub(super) clients: u32,
    /// Each for some of the clients.
    pub(super) recorders: Vec<Mutex<Recorder>>,
}

impl Run {
    fn recorder(&self, client: u32) -> MutexGuard<'_, Recorder> {
        let recorder = &self.recorders[client as usize % self.recorders.len()];
        recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Operations of one client, of so many in all.
    pub(super) fn share(&self, ops: u64, client: u32) -> u64 {
        let clients = u64::from(self.clients.max(1));
        ops / clients + u64::from(u64::from(client) < ops % clients)
    }
}

/// Does `ops` operations from `source`, or as many as there are before the end.
pub(super) async fn drive<T: Target, C: Clock>(
    run: Arc<Run>,
    clock: Arc<C>,
    mut target: T,
    mut source: Source,
    client: u32,
    ops: u64,
) {
    let mut pace = Pace::new(run.rate, client, run.clients);
    for begun in 0..ops {
        let now = clock.now();
        let due = pace.next(now);
        let begin = due.max(now);
        if let Some(end) = run.end.filter(|end| begin >= *end) {
            // Nor more than there were to do.
            run.recorder(client).not_begun += pace.due_before(due, end).min(ops - begun);
            return;
        }
        if due > now {
            clock.sleep_until(due).await;
        }
        let operation = source.next(&run.population);
        let mut findings = Verified::default();
        let done = carry_out(&run, &mut target, &operation, &mut findings).await;
        if operation.kind == Kind::Insert {
            run.population.settle(operation.record);
        }
        let now = clock.now();
        let error = {
            let mut recorder = run.recorder(client);
            // Also what a read found before the write after it failed.
            recorder.verified.add(findings);
            match done {
                Ok(()) => {
                    recorder.answered(operation.kind, operation.level, due, now);
                    false
                }
                Err(error) => {
                    recorder.failed(error);
                    true
                }
            }
        };
        if error {
            clock.sleep_until(now + ERROR_PAUSE).await;
        }
    }
}

async fn carry_out<T: Target>(
    run: &Run,
    target: &mut T,
    operation: &Operation,
    findings: &mut Verified,
) -> Result<(), String> {
    let Operation { kind, record, pairs, level } = *operation;
    match kind {
        Kind::Read => read(run, target, record, findings).await,
        Kind::Update | Kind::Insert => write(run, target, record, level).await,
        Kind::ReadModifyWrite => {
            read(run, target, record, findings).await?;
            write(run, target, record, level).await
        }
        Kind::Scan => scan(run, target, record, pairs, findings).await,
    }
}

async fn read<T: Target>(run: &Run, target: &mut T, record: u64, findings: &mut Verified) -> Result<(), String> {
    let book = run.book.as_ref();
    // What was acknowledged so far, if a read has to find it.
    let expect = book.filter(|_| run.reads_are_current).map(|book| book.expect(record)).unwrap_or_default();
    let value = target.read(key_of(record)).await?;
    if let Some(book) = book {
        findings.during += 1;
        note(findings, record, book.judge(&run.values, record, expect, value.as_deref()));
    }
    Ok(())
}

async fn write<T: Target>(run: &Run, target: &mut T, record: u64, level: usize) -> Result<(), String> {
    let begun = run.book.as_ref().map(|book| (book, book.begin(record)));
    let version = begun.map_or(1, |(_, write)| write.version);
    target.write(key_of(record), run.values.value(record, version), level).await?;
    if let Some((book, write)) = begun {
        book.acknowledge(write);
    }
    Ok(())
}

async fn scan<T: Target>(
    run: &Run,
    target: &mut T,
    record: u64,
    pairs: u64,
    findings: &mut Verified,
) -> Result<(), String> {
    let from = key_of(record);
    let found = target.scan(from.clone(), pairs).await?;
    if run.book.is_none() {
        return Ok(());
    }
    findings.during += found.len() as u64;
    let mut wrong = |text: String| {
        findings.wrong += 1;
        findings.example(text);
    };
    if found.len() as u64 > pairs {
        wrong(format!("a scan gave {} pairs of {pairs}", found.len()));
    }
    if !found.is_sorted_by(|(a, _), (b, _)| a < b) || found.first().is_some_and(|(key, _)| *key < from) {
        wrong(format!("a scan from record {record} is not in order"));
    }
    for (key, value) in &found {
        match run.values.read(value) {
            Some(stamp) if key_of(stamp.record) == key => {}
            _ => wrong(format!("the value at {} is not one that was written there", key.escape_ascii())),
        }
    }
    Ok(())
}

fn note(findings: &mut Verified, record: u64, finding: Finding) {
    match finding {
        Finding::Right => {}
        Finding::Missing => {
            findings.missing += 1;
            findings.example(format!("record {record} was acknowledged and is not there"));
        }
        Finding::Wrong(what) => {
            findings.wrong += 1;
            findings.example(what);
        }
    }
}

/// Reads every `clients`th record that was written, from that of `client` on, when nothing is written any more.
pub(super) async fn read_back<T: Target, C: Clock>(
    run: Arc<Run>,
    clock: Arc<C>,
    mut target: T,
    records: Arc<Vec<u64>>,
    client: u32,
) -> Verified {
    let mut findings = Verified::default();
    let Some(book) = run.book.as_ref() else { return findings };
    let mut failures = 0;
    for record in records.iter().skip(client as usize).step_by(run.clients.max(1) as usize) {
        findings.after += 1;
        if failures >= READ_BACK_FAILURES_MAX {
            findings.unread += 1;
            continue;
        }
        let expect = book.expect(*record);
        loop {
            match target.read(key_of(*record)).await {
                Ok(value) => {
                    failures = 0;
                    note(&mut findings, *record, book.judge(&run.values, *record, expect, value.as_deref()));
                    break;
                }
                Err(error) => {
                    failures += 1;
                    clock.sleep_until(clock.now() + READ_BACK_PAUSE).await;
                    if failures >= READ_BACK_ATTEMPTS {
                        findings.unread += 1;
                        findings.example(format!("record {record} cannot be read: {error}"));
                        break;
                    }
                }
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicU64, Ordering};

    use bytes::Bytes;

    use super::super::target::Pair;
    use super::super::ycsb::mix;
    use super::*;
    use crate::cli::Workload;

    /// Time that passes only where the test says so.
    #[derive(Default)]
    struct Virtual(AtomicU64);

    impl Clock for Virtual {
        fn now(&self) -> Duration {
            Duration::from_nanos(self.0.load(Ordering::Relaxed))
        }

        async fn sleep_until(&self, at: Duration) {
            self.0.fetch_max(at.as_nanos() as u64, Ordering::Relaxed);
        }
    }

    /// What is wrong with a store.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Fault {
        None,
        /// Every tenth acknowledged write is not done.
        Loses,
        /// Every tenth read finds the value of another record.
        Mixes,
        /// A scan leaves its order.
        Disorders,
        /// Nothing is answered but with an error.
        Refuses,
        /// Reads find nothing, and writes are answered with an error.
        Forgets,
    }

    struct Memory {
        clock: Arc<Virtual>,
        pairs: BTreeMap<Bytes, Bytes>,
        fault: Fault,
        calls: u64,
        /// The call that takes long, and how long.
        stall: Option<(u64, Duration)>,
    }

    impl Memory {
        fn new(clock: &Arc<Virtual>, fault: Fault) -> Self {
            Self { clock: clock.clone(), pairs: BTreeMap::new(), fault, calls: 0, stall: None }
        }

        /// True for every tenth call of a store with this fault.
        fn call(&mut self, fault: Fault) -> Result<bool, String> {
            self.calls += 1;
            let took = match self.stall {
                Some((call, time)) if call == self.calls => time,
                _ => Duration::from_millis(1),
            };
            self.clock.0.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
            if self.fault == Fault::Refuses {
                return Err("refused".to_owned());
            }
            Ok(self.fault == fault && self.calls.is_multiple_of(10))
        }
    }

    impl Target for &mut Memory {
        async fn read(&mut self, key: Bytes) -> Result<Option<Bytes>, String> {
            let other = self.call(Fault::Mixes)?;
            if self.fault == Fault::Forgets {
                return Ok(None);
            }
            let found = if other { self.pairs.values().next() } else { self.pairs.get(&key) };
            Ok(found.cloned())
        }

        async fn scan(&mut self, from: Bytes, pairs: u64) -> Result<Vec<Pair>, String> {
            let disorder = self.call(Fault::Disorders)?;
            let found = self.pairs.range(from..).take(pairs as usize);
            let mut found: Vec<Pair> = found.map(|(key, value)| (key.clone(), value.clone())).collect();
            if disorder {
                found.reverse();
            }
            Ok(found)
        }

        async fn write(&mut self, key: Bytes, value: Bytes, _level: usize) -> Result<(), String> {
            if self.fault == Fault::Forgets {
                return Err("refused".to_owned());
            }
            if !self.call(Fault::Loses)? {
                self.pairs.insert(key, value);
            }
            Ok(())
        }
    }

    fn run(rate: Option<u64>, end: Option<Duration>, records: u64) -> Arc<Run> {
        Arc::new(Run {
            values: Arc::new(Values::new(64, 1).expect("short")),
            population: Arc::new(Population::new(records)),
            book: Some(Arc::new(Book::new())),
            reads_are_current: true,
            end,
            rate,
            clients: 1,
            recorders: vec![Mutex::new(Recorder::new(end))],
        })
    }

    fn driven(run: &Arc<Run>, memory: &mut Memory, workload: Workload, ops: u64) {
        let clock = memory.clock.clone();
        let source = Source::new(mix(workload), 1, 1, 0);
        mainstay_io::block_on(drive(run.clone(), clock, memory, source, 0, ops));
    }

    /// One operation stalls for 100 ms at a hundred operations a second. Those that were due meanwhile waited too, and a client that asks
    /// again only after an answer never sees that.
    #[test]
    fn a_stall_raises_the_latencies_of_what_was_due_meanwhile() {
        let stalled = |rate: Option<u64>| {
            let clock = Arc::new(Virtual::default());
            let mut memory = Memory::new(&clock, Fault::None);
            memory.stall = Some((11, Duration::from_millis(100)));
            let run = run(rate, None, 100);
            driven(&run, &mut memory, Workload::Put, 50);
            let all = run.recorder(0).all().expect("figures");
            let above = |ms: u64| (all.count_between(ms * 1_000_000, u64::MAX), all.len());
            (above(2), above(45), all.max() / 1_000_000)
        };
        // Due at 100, answered at 200: after it those due at 110, 120, ... are begun late and take 91, 82, ... ms.
        let (late, half, max) = stalled(Some(100));
        assert_eq!(
            (late.0, half.0, late.1),
            (11, 7, 50),
            "100, 91, 82, 73, 64, 55, 46, 37, 28, 19, 10 ms, then 1 ms again"
        );
        assert!(max.abs_diff(100) <= 1, "{max}");
        let (late, half, max) = stalled(None);
        assert_eq!((late.0, half.0, late.1), (1, 1, 50), "at full speed one alone is slow");
        assert!(max.abs_diff(100) <= 1, "{max}");
    }

    #[test]
    fn what_was_due_and_not_begun_is_said() {
        let clock = Arc::new(Virtual::default());
        let mut memory = Memory::new(&clock, Fault::None);
        memory.stall = Some((51, Duration::from_secs(10)));
        let run = run(Some(100), Some(Duration::from_secs(1)), 100);
        driven(&run, &mut memory, Workload::Put, u64::MAX);
        let recorder = run.recorder(0);
        assert_eq!((recorder.all().expect("figures").len(), recorder.not_begun), (51, 49), "a hundred were due");
        drop(recorder);

        // What was never to be done is not missing.
        let run = self::run(Some(100), Some(Duration::from_secs(1)), 100);
        let mut memory = Memory::new(&Arc::default(), Fault::None);
        memory.stall = Some((51, Duration::from_secs(10)));
        driven(&run, &mut memory, Workload::Put, 60);
        let recorder = run.recorder(0);
        assert_eq!((recorder.all().expect("figures").len(), recorder.not_begun), (51, 9), "sixty were asked for");
    }

    #[test]
    fn what_a_store_does_wrong_is_found_and_what_it_does_right_is_not() {
        for fault in [Fault::None, Fault::Loses, Fault::Mixes, Fault::Disorders] {
            for workload in [Workload::A, Workload::D, Workload::E, Workload::F, Workload::Put] {
                let clock = Arc::new(Virtual::default());
                let mut memory = Memory::new(&clock, fault);
                let run = run(None, None, 0);
                driven(&run, &mut memory, Workload::Fill, 50);
                driven(&run, &mut memory, workload, 500);
                let records = Arc::new(run.book.as_ref().expect("kept").records());
                let mut found = run.recorder(0).verified.clone();
                found.add(mainstay_io::block_on(read_back(run.clone(), clock, &mut memory, records, 0)));
                assert!(found.after >= 50, "{fault:?} {workload:?}: {found:?}");
                let sound = match fault {
                    Fault::None => true,
                    Fault::Loses | Fault::Mixes => false,
                    Fault::Disorders => workload != Workload::E,
                    Fault::Refuses | Fault::Forgets => unreachable!("not among these"),
                };
                assert_eq!(found.is_sound(), sound, "{fault:?} {workload:?}: {found:?}");
                assert_eq!(found.examples.is_empty(), sound, "{found:?}");
            }
        }
    }

    #[test]
    fn what_is_not_answered_is_an_error_and_not_read_back_unread() {
        let clock = Arc::new(Virtual::default());
        let mut memory = Memory::new(&clock, Fault::None);
        let run = run(None, None, 0);
        driven(&run, &mut memory, Workload::Fill, 5);
        memory.fault = Fault::Refuses;
        driven(&run, &mut memory, Workload::Read, 5);
        let records = Arc::new(run.book.as_ref().expect("kept").records());
        let found = mainstay_io::block_on(read_back(run.clone(), clock, &mut memory, records, 0));
        assert_eq!((found.after, found.unread, found.is_sound()), (5, 5, false));
        let recorder = run.recorder(0);
        assert_eq!((recorder.errors, recorder.first_error.as_deref()), (5, Some("refused")));
    }

    /// A store that is gone would otherwise be waited for as long as the first record was, once more for each record.
    #[test]
    fn a_store_that_is_gone_is_given_up() {
        let clock = Arc::new(Virtual::default());
        let mut memory = Memory::new(&clock, Fault::None);
        let run = run(None, None, 0);
        driven(&run, &mut memory, Workload::Fill, 5_000);
        memory.fault = Fault::Refuses;
        let before = memory.calls;
        let records = Arc::new(run.book.as_ref().expect("kept").records());
        let found = mainstay_io::block_on(read_back(run.clone(), clock, &mut memory, records, 0));
        assert_eq!((found.after, found.unread), (5_000, 5_000));
        assert_eq!(memory.calls - before, u64::from(READ_BACK_FAILURES_MAX));
    }

    /// A read-modify-write that fails is an error; what its read found counts all the same.
    #[test]
    fn what_was_found_before_a_write_failed_counts() {
        let clock = Arc::new(Virtual::default());
        let mut memory = Memory::new(&clock, Fault::None);
        let run = run(None, None, 0);
        driven(&run, &mut memory, Workload::Fill, 50);
        memory.fault = Fault::Forgets;
        driven(&run, &mut memory, Workload::F, 100);
        let recorder = run.recorder(0);
        assert!(recorder.errors > 0, "half of them write");
        assert_eq!((recorder.verified.during, recorder.verified.missing), (100, 100), "all of them read");
    }

    #[test]
    fn operations_are_divided_without_a_rest() {
        let run = Arc::try_unwrap(run(None, None, 0)).unwrap_or_else(|_| panic!("nobody else has it"));
        let run = Run { clients: 7, ..run };
        for ops in [0, 1, 6, 7, 8, 100] {
            assert_eq!((0..7).map(|client| run.share(ops, client)).sum::<u64>(), ops);
        }
        assert_eq!((run.share(8, 0), run.share(8, 1)), (2, 1));
    }
}
