//! Runs seeds with planted bugs until each is caught: who checks that the checks can fail.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::Duration;

use mainstay_io::mutants::{Mutant, plant};

use crate::world;

/// Seeds that a bug has to show in.
const SEEDS_MAX: u64 = 150;

/// What one seed said of a planted bug.
struct Verdict {
    mutant: Mutant,
    seed: u64,
    caught: Option<String>,
}

/// Plants each bug (or the one of that name) and runs seeds until a check fails; prints a table. True if all were caught.
pub fn hunt(seeds: Option<Range<u64>>, jobs: u64, only: Option<&str>, patience: Duration) -> bool {
    let seeds = seeds.unwrap_or(1..SEEDS_MAX + 1);
    let mut waiting: Vec<Mutant> =
        Mutant::ALL.iter().rev().copied().filter(|m| only.is_none_or(|name| m.name() == name)).collect();
    if waiting.is_empty() {
        println!(
            "no such planted bug; there are: {}",
            Mutant::ALL.iter().map(|m| m.name()).collect::<Vec<_>>().join(", ")
        );
        return false;
    }
    let (done, verdicts) = mpsc::channel();
    let (mut running, mut caught, mut survived) = (0, 0, Vec::new());
    println!("| planted bug | seed | what the check said |\n|---|---|---|");
    loop {
        while running < jobs
            && let Some(mutant) = waiting.pop()
        {
            start(mutant, seeds.start, &done);
            running += 1;
        }
        if running == 0 {
            break;
        }
        let Ok(verdict) = verdicts.recv_timeout(patience) else {
            println!("no seed has ended in {patience:?}: given up");
            return false;
        };
        let Verdict { mutant, seed, caught: what } = verdict;
        match what {
            Some(what) => {
                caught += 1;
                running -= 1;
                let line = what.lines().next().unwrap_or_default().replace('|', "/");
                let short: String = line.chars().take(160).collect();
                println!("| {} | {seed} | {short} |", mutant.name());
            }
            None if seed + 1 < seeds.end => start(mutant, seed + 1, &done),
            None => {
                running -= 1;
                println!("| {} | - | SURVIVED {} seeds: {} |", mutant.name(), seeds.end - seeds.start, mutant.what());
                survived.push(mutant.name());
            }
        }
    }
    println!("{caught} planted bugs caught, {} survived {survived:?}", survived.len());
    println!("{caught} seeds passed, {} failed", survived.len());
    survived.is_empty()
}

/// One seed on a thread of its own, with the bug planted on it.
fn start(mutant: Mutant, seed: u64, done: &mpsc::Sender<Verdict>) {
    let done = done.clone();
    let life = move || {
        plant(Some(mutant));
        let summary = catch_unwind(AssertUnwindSafe(|| world::run(seed, |_| {})));
        let caught = match summary {
            Ok(summary) => summary.problems.first().cloned(),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or(panic.downcast_ref::<&str>().copied());
                Some(format!("panic: {}", text.unwrap_or("without a message")))
            }
        };
        // The receiver is gone only when the hunt has been given up.
        let _ = done.send(Verdict { mutant, seed, caught });
    };
    let thread = std::thread::Builder::new().name(format!("seed-{seed}")).stack_size(16 << 20).spawn(life);
    drop(thread.expect("the machine has room for a thread"));
}
