//! The log against a model: random work, completions in any order, crashes that keep any sectors of what was in flight.

use proptest::prelude::*;

use super::turn::Finish;
use super::*;

#[derive(Clone, Debug)]
enum Step {
    Append {
        bytes: usize,
        reserve: Reserve,
    },
    /// By the caller, if the log is idle.
    OwnAppend {
        bytes: usize,
        reserve: Reserve,
    },
    /// The caller of an own write looks whether it is complete.
    Finish,
    Turn,
    Complete {
        which: prop::sample::Index,
    },
    Release {
        which: prop::sample::Index,
    },
    Crash {
        seed: u64,
    },
    CloseAndOpen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let bytes = prop_oneof![4 => 0_usize..600, 2 => 600_usize..9000, 1 => 9000_usize..16_000];
    let reserve = prop_oneof![7 => Just(Reserve::Normal), 1 => Just(Reserve::Relief), 1 => Just(Reserve::Vote),
        1 => Just(Reserve::Install), 2 => Just(Reserve::Critical)];
    let step = prop_oneof![
        6 => (bytes.clone(), reserve.clone()).prop_map(|(bytes, reserve)| Step::Append { bytes, reserve }),
        3 => (bytes, reserve).prop_map(|(bytes, reserve)| Step::OwnAppend { bytes, reserve }),
        3 => Just(Step::Finish),
        5 => Just(Step::Turn),
        5 => any::<prop::sample::Index>().prop_map(|which| Step::Complete { which }),
        2 => any::<prop::sample::Index>().prop_map(|which| Step::Release { which }),
        1 => any::<u64>().prop_map(|seed| Step::Crash { seed }),
        1 => Just(Step::CloseAndOpen),
    ];
    prop::collection::vec(step, 1..300)
}

/// What the model knows of a record that was not refused.
struct Known {
    payload: Vec<u8>,
    outcome: Outcome,
    /// From an earlier life: its place is known and it is durable.
    pos: Option<RecordPos>,
}

impl Known {
    fn durable(&self) -> Option<RecordPos> {
        self.pos.or_else(|| self.outcome.get().and_then(Result::ok))
    }
}

/// SplitMix64.
fn generator(mut state: u64) -> impl FnMut() -> u64 {
    move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

struct Run {
    bench: Bench,
    epoch: u64,
    clean_end: Option<Lsn>,
    known: Vec<Known>,
    appended: usize,
    /// Of the own write on its way.
    finish: Option<Finish>,
}

impl Run {
    fn new() -> Self {
        // The smallest ring of which a block is for what relieves it.
        let bench = Bench::blank(128 * KIB);
        bench.device.hold(true);
        Self { bench, epoch: 1, clean_end: None, known: Vec::new(), appended: 0, finish: None }
    }

    fn forget_refused(&mut self) {
        self.known.retain(|k| !matches!(k.outcome.get(), Some(Err(ErrorKind::OutOfSpace))));
    }

    /// Opens what a crash left, and holds what is delivered against what was promised.
    fn reopen(&mut self, image: Vec<u8>) {
        self.forget_refused();
        self.finish = None;
        self.epoch += 1;
        let start = self.bench.wal.start();
        let options = WalOptions { start, clean_end: self.clean_end, ..options(self.epoch) };
        self.bench = Bench::open(image, options).expect("a crash never makes the log corrupt");
        self.bench.device.hold(true);
        let acknowledged = self.known.iter().filter(|k| k.durable().is_some()).count();
        let delivered = self.bench.payloads();
        assert!(delivered.len() >= acknowledged, "{} of {acknowledged} acknowledged records", delivered.len());
        let expected: Vec<&Vec<u8>> = self.known.iter().take(delivered.len()).map(|k| &k.payload).collect();
        assert_eq!(delivered.iter().collect::<Vec<_>>(), expected);
        self.known.truncate(delivered.len());
        for (known, (_, _, pos, _)) in self.known.iter_mut().zip(&self.bench.delivered) {
            assert!(known.durable().is_none_or(|before| before == *pos));
            known.pos = Some(*pos);
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Append { bytes, reserve } => {
                let payload = payload(self.appended, *bytes);
                self.appended += 1;
                let outcome = self.bench.append_as(&payload, *reserve);
                self.known.push(Known { payload, outcome, pos: None });
            }
            Step::OwnAppend { bytes, reserve } => {
                let Some(turn) = self.bench.wal.turn() else { return };
                let payload = payload(self.appended, *bytes);
                self.appended += 1;
                let outcome = Outcome::default();
                let write = turn.append(record(&payload), *reserve, outcome.setter());
                self.known.push(Known { payload, outcome, pos: None });
                self.forget_refused();
                if let Some(mut write) = write.map(Finish::of) {
                    assert!(write.poll().is_pending(), "the device holds it");
                    self.finish = Some(write);
                }
            }
            Step::Finish => {
                if self.finish.as_mut().is_some_and(|finish| finish.poll().is_ready()) {
                    self.finish = None;
                }
                self.forget_refused();
            }
            Step::Turn => {
                self.bench.device.turn();
                self.forget_refused();
                // The prefix rule: nothing is acknowledged behind what is not.
                let acknowledged = self.known.iter().map(|k| k.durable().is_some());
                assert!(acknowledged.is_sorted_by(|a, b| a >= b));
            }
            Step::Complete { which } => {
                let held = self.bench.device.held().len();
                if held > 0 {
                    self.bench.device.complete(which.index(held), true);
                }
            }
            Step::Release { which } => {
                let durable: Vec<Lsn> = self.known.iter().filter_map(|k| k.durable()).map(|p| p.batch).collect();
                if !durable.is_empty() {
                    let start = durable[which.index(durable.len())];
                    self.bench.wal.release(start);
                    self.known.retain(|k| k.durable().is_none_or(|pos| pos.batch >= start));
                }
            }
            Step::Crash { seed } => {
                let image = self.bench.device.crash_image(generator(*seed));
                self.reopen(image);
            }
            Step::CloseAndOpen => {
                self.bench.device.hold(false);
                let mut finish = self.finish.take();
                while !self.bench.device.held().is_empty() {
                    self.bench.device.complete(0, true);
                }
                assert!(finish.as_mut().is_none_or(|finish| finish.poll().is_ready()));
                self.clean_end = Some(self.bench.device.run(self.bench.wal.close()).expect("closes"));
                let before = self.known.len();
                self.reopen(self.bench.device.image());
                self.forget_refused();
                assert!(self.known.len() <= before);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_acknowledged_record_is_lost_and_none_is_invented(steps in steps()) {
        let mut run = Run::new();
        for step in &steps {
            run.step(step);
        }
        run.step(&Step::Crash { seed: 1 });
    }
}
