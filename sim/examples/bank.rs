//! An embedder's state machine under the simulator: a bank whose transfers must neither make money nor lose any.
//!
//! `cargo run --profile sim -p mainstay-sim --example bank -- 20` runs 20 seeds: three or five replicas, their disks, their
//! network and four clients each, with crashes, partitions, full and failing disks, wiped volumes and changes of
//! membership. The state machine here is what a product would give to `GroupSettings::state_machine`; nothing of it
//! knows that it is simulated. `--broken` has it forget the debit of one transfer in 64, and a seed must notice.

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use mainstay_engine::{Apply, Error, ErrorKind, Result, Snapshot, StateMachine};
use mainstay_replication::ReadLevel;
use mainstay_sim::application::{Answer, Application, Session, Step};
use mainstay_sim::world;

const ACCOUNTS: u8 = 10;
/// What each account opens with.
const OPENING: u64 = 100;
const KEYSPACE: &str = "bank";

fn balance(bytes: Option<&Bytes>) -> Result<u64> {
    // An account that nobody has touched holds its opening balance.
    let Some(bytes) = bytes else { return Ok(OPENING) };
    let word = bytes.as_ref().try_into().map_err(|_| Error::new(ErrorKind::Corrupt, "not a balance"))?;
    Ok(u64::from_le_bytes(word))
}

/// The product's own code: a command is (from, to, amount), the answer the new balance of `from`.
struct Bank {
    broken: bool,
}

impl StateMachine for Bank {
    fn apply<'a>(&'a self, apply: &'a mut Apply, command: Bytes) -> Step<'a, Result<Bytes>> {
        Box::pin(async move {
            let accounts = apply.keyspace(KEYSPACE)?;
            let &[from, to, amount] = command.as_ref() else {
                return Err(Error::new(ErrorKind::Invalid, "not a transfer"));
            };
            let source = balance(apply.get(accounts, &[from]).await?.as_ref())?;
            let target = balance(apply.get(accounts, &[to]).await?.as_ref())?;
            let Some(rest) = source.checked_sub(u64::from(amount)) else {
                return Err(Error::new(ErrorKind::Invalid, "not enough money"));
            };
            let forgotten = self.broken && apply.index().0.is_multiple_of(64);
            let rest = if forgotten { source } else { rest };
            apply.put(accounts, vec![from], rest.to_le_bytes().to_vec())?;
            if from != to {
                apply.put(accounts, vec![to], (target + u64::from(amount)).to_le_bytes().to_vec())?;
            } else {
                apply.put(accounts, vec![to], source.to_le_bytes().to_vec())?;
            }
            Ok(Bytes::copy_from_slice(&rest.to_le_bytes()))
        })
    }
}

/// What the clients do and what must hold.
struct Test {
    broken: bool,
    /// What each replica holds in the end, and the first thing that was wrong on the way.
    seen: Mutex<(Vec<Vec<u64>>, Option<String>)>,
}

async fn all_accounts(view: Snapshot) -> Result<Vec<u64>> {
    let Some(accounts) = view.keyspace(KEYSPACE) else { return Ok(vec![OPENING; usize::from(ACCOUNTS)]) };
    let mut balances = Vec::new();
    for account in 0..ACCOUNTS {
        balances.push(balance(view.get(accounts, &[account]).await?.as_ref())?);
    }
    Ok(balances)
}

fn audit(balances: &[u64]) -> std::result::Result<(), String> {
    let sum: u64 = balances.iter().sum();
    let expect = OPENING * u64::from(ACCOUNTS);
    if sum == expect { Ok(()) } else { Err(format!("the bank holds {sum} and not {expect}: {balances:?}")) }
}

impl Application for Test {
    fn state_machine(&self) -> Arc<dyn StateMachine> {
        Arc::new(Bank { broken: self.broken })
    }

    fn step<'a>(&'a self, session: &'a mut Session) -> Step<'a, ()> {
        Box::pin(async move {
            if session.below(3) > 0 {
                let mut account = || session.below(u64::from(ACCOUNTS)) as u8;
                let (from, to) = (account(), account());
                let amount = session.below(30) as u8;
                // A refusal is an answer too; what is unknown is found out by the audits.
                if let Answer::Done(..) = session.propose(Bytes::copy_from_slice(&[from, to, amount])).await {
                    session.count("transfers");
                }
                return;
            }
            // One view is one instant, at every level: no transfer is seen half done.
            let level = if session.below(2) == 0 { ReadLevel::Local } else { ReadLevel::Linearizable };
            if let Some(balances) = session.read(level, |view| Box::pin(all_accounts(view))).await {
                session.count("audits");
                if let Err(e) = audit(&balances) {
                    self.seen.lock().unwrap_or_else(PoisonError::into_inner).1.get_or_insert(e);
                }
            }
        })
    }

    fn look<'a>(&'a self, session: &'a mut Session) -> Step<'a, std::result::Result<(), String>> {
        Box::pin(async move {
            let read = session.read(ReadLevel::Linearizable, |view| Box::pin(all_accounts(view))).await;
            let balances = read.ok_or("no answer to the last audit")?;
            audit(&balances)?;
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).0.push(balances);
            Ok(())
        })
    }

    fn judge(&self) -> std::result::Result<(), String> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match &seen.1 {
            Some(problem) => Err(problem.clone()),
            None if seen.0.windows(2).any(|pair| pair[0] != pair[1]) => Err(format!("replicas differ: {:?}", seen.0)),
            None => Ok(()),
        }
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let broken = args.iter().any(|arg| arg == "--broken");
    let seeds = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(4_u64);
    let mut failed = 0;
    for seed in 1..=seeds {
        let test = Arc::new(Test { broken, seen: Mutex::default() });
        let summary = world::run_with(seed, test, |_| {});
        println!("seed {seed} {summary}");
        for problem in summary.problems.iter().take(3) {
            println!("  {problem}");
        }
        failed += u64::from(!summary.problems.is_empty());
    }
    println!("{} seeds passed, {failed} failed", seeds - failed);
    if (failed > 0) == broken { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
