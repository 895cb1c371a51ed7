//! A state machine of one's own: a bank whose transfers are decided at apply, the same on every replica.
//!
//! Run: `cargo run --example state_machine`. It runs on a store alone; `NodeOptions::storage` takes the same builder.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use mainstay::{Apply, ApplyError, ErrorKind, Result, StateMachine, Store};

/// Commands: `deposit NAME AMOUNT` and `transfer FROM TO AMOUNT`. The answer is the new balance of the first account.
struct Bank;

type Answer = std::result::Result<Bytes, ApplyError>;

fn refuse<T>(why: &str) -> std::result::Result<T, ApplyError> {
    Err(ApplyError::new(ErrorKind::Invalid, why))
}

impl StateMachine for Bank {
    fn apply<'a>(&'a self, apply: &'a mut Apply, command: Bytes) -> Pin<Box<dyn Future<Output = Answer> + Send + 'a>> {
        Box::pin(async move {
            let Ok(command) = std::str::from_utf8(&command) else { return refuse("not text") };
            let words: Vec<&str> = command.split(' ').collect();
            match words[..] {
                ["deposit", name, amount] => change(apply, name, parse(amount)?).await,
                ["transfer", from, to, amount] => {
                    let amount = parse(amount)?;
                    // On a refusal nothing of this command is written, also not what came before it.
                    change(apply, to, amount).await?;
                    change(apply, from, -amount).await
                }
                _ => refuse("unknown command"),
            }
        })
    }
}

/// Adds to an account. What an earlier step of the same command wrote is seen here.
async fn change(apply: &mut Apply, name: &str, amount: i64) -> Answer {
    let accounts = apply.keyspace("accounts")?;
    let balance = match apply.get(accounts, name.as_bytes()).await? {
        Some(balance) => parse(std::str::from_utf8(&balance).unwrap_or_default())?,
        None => 0,
    };
    let Some(balance) = balance.checked_add(amount) else { return refuse("too much money") };
    if balance < 0 {
        return refuse("not enough money");
    }
    let balance = Bytes::from(balance.to_string());
    apply.put(accounts, Bytes::copy_from_slice(name.as_bytes()), balance.clone())?;
    Ok(balance)
}

fn parse(number: &str) -> std::result::Result<i64, ApplyError> {
    number.parse().or_else(|_| refuse("not a number"))
}

fn main() -> Result<()> {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let store = Store::builder().state_machine(Arc::new(Bank)).open(scratch.path().join("bank"))?;
    for command in ["deposit ada 100", "transfer ada alan 30", "transfer alan ada 31", "transfer alan ada 5"] {
        match store.execute(command) {
            Ok(balance) => println!("{command}: {}", String::from_utf8_lossy(&balance)),
            Err(e) => println!("{command}: refused, {e}"),
        }
    }
    store.close()
}
