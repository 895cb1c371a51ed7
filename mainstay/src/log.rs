//! Who turns commands into entries: a log of one voter, or a replicated one. The rest of the crate does not know which.
//!
//! # Place
//! Above `engine::LocalLog` and `replication::Node`, below every public handle.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use mainstay_engine::{Applied, ClientToken, Command, CommandBody, Engine, Group, LocalLog};
use mainstay_io::{BoxFuture, Environment};
use mainstay_replication as replication;
use tokio::runtime::{Handle, Runtime};

use crate::{Branch, CommitToken, Durability, Error, ErrorKind, ReadLevel, Result};

/// The log under a store. Cloning shares it.
#[derive(Clone)]
pub(crate) enum Log {
    Alone(Arc<Alone>),
    Replicated(Arc<Replicated>),
}

pub(crate) struct Alone {
    pub(crate) engine: Engine,
    pub(crate) log: LocalLog,
    pub(crate) environment: Environment,
    /// Set by `close`: reads would still be answered from memory.
    pub(crate) closed: AtomicBool,
}

pub(crate) struct Replicated {
    pub(crate) node: Arc<replication::Node>,
    pub(crate) engine: Engine,
    pub(crate) handle: Handle,
    /// Set when the node made its own runtime ([`crate::Node::start_blocking`]).
    pub(crate) runtime: Mutex<Option<Runtime>>,
    /// For another group than the first: that one, whose runtime both use.
    pub(crate) _first: Option<Arc<Replicated>>,
}

impl Drop for Replicated {
    fn drop(&mut self) {
        // The last handle may be dropped inside an async task, where waiting for a runtime is refused.
        if let Some(runtime) = self.runtime.get_mut().ok().and_then(Option::take) {
            runtime.shutdown_background();
        }
    }
}

/// Polls a future with the node's runtime entered, so that it works under any executor.
struct Entered<T> {
    handle: Handle,
    future: BoxFuture<T>,
}

impl<T> Future for Entered<T> {
    type Output = T;

    fn poll(mut self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<T> {
        let this = &mut *self;
        let _entered = this.handle.enter();
        this.future.as_mut().poll(cx)
    }
}

thread_local! {
    /// Set while a future is polled by [`Log::wait`]: nothing else runs on this thread until it is ready, so an entry may as well
    /// be written and applied by it.
    static WAITS_HERE: Cell<bool> = const { Cell::new(false) };
}

/// Sets [`WAITS_HERE`] to what it was, after a panic too.
struct Restored(bool);

impl Drop for Restored {
    fn drop(&mut self) {
        WAITS_HERE.set(self.0);
    }
}

impl Log {
    pub(crate) fn engine(&self) -> &Engine {
        match self {
            Self::Alone(alone) => &alone.engine,
            Self::Replicated(replicated) => &replicated.engine,
        }
    }

    pub(crate) fn group(&self) -> &Group {
        match self {
            Self::Alone(alone) => alone.log.group(),
            Self::Replicated(replicated) => replicated.node.group(),
        }
    }

    pub(crate) fn replayed(&self) -> u64 {
        match self {
            Self::Alone(alone) => alone.log.replayed(),
            Self::Replicated(replicated) => replicated.node.status().replayed,
        }
    }

    /// Makes a future independent of the executor that polls it.
    pub(crate) fn bind<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> BoxFuture<T> {
        match self {
            Self::Alone(_) => Box::pin(future),
            Self::Replicated(replicated) => {
                Box::pin(Entered { handle: replicated.handle.clone(), future: Box::pin(future) })
            }
        }
    }

    /// As [`Log::bind`] for a future that borrows.
    pub(crate) async fn enter<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        std::future::poll_fn(|cx| {
            let _entered = match self {
                Self::Alone(_) => None,
                Self::Replicated(replicated) => Some(replicated.handle.enter()),
            };
            future.as_mut().poll(cx)
        })
        .await
    }

    /// Waits on this thread. What the future writes alone on this node may block it: see [`WAITS_HERE`].
    pub(crate) fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        match self {
            Self::Alone(_) => {
                let mut future = std::pin::pin!(future);
                mainstay_io::block_on(std::future::poll_fn(|cx| {
                    let _restored = Restored(WAITS_HERE.replace(true));
                    future.as_mut().poll(cx)
                }))
            }
            Self::Replicated(replicated) => {
                let _entered = replicated.handle.enter();
                mainstay_io::block_on(future)
            }
        }
    }

    /// Proposes and waits for the durability; a refusal decided at apply is an `Err`.
    pub(crate) async fn write(&self, body: CommandBody, durability: Durability) -> Result<(Applied, CommitToken)> {
        let applied = match self {
            Self::Alone(alone) => {
                match durability {
                    // One voter: its own disk is the quorum and all of it.
                    Durability::Local | Durability::Quorum | Durability::All => {}
                    other => return Err(unsupported(&other)),
                }
                let time_ms = u64::try_from(alone.environment.clock.unix().as_millis()).unwrap_or(u64::MAX);
                let command = Command { time_ms, body };
                match WAITS_HERE.get() {
                    true => alone.log.propose_here(command).await?,
                    false => alone.log.propose(command).await?,
                }
            }
            Self::Replicated(replicated) => {
                if durability == Durability::Local {
                    let token = replicated.node.write_local(body).await?;
                    let response = Ok(bytes::Bytes::new());
                    return Ok((Applied { index: token.index, response }, token));
                }
                replicated.node.write(replication::Write { body, durability }).await?
            }
        };
        let token = CommitToken { term: 0, index: applied.index };
        Ok((applied, token))
    }

    /// As [`Log::write`] for a request that applies once.
    pub(crate) async fn write_once(
        &self,
        client: ClientToken,
        body: CommandBody,
        durability: Durability,
    ) -> Result<(Applied, CommitToken)> {
        let applied = match self {
            Self::Alone(_) => {
                let body = CommandBody::Once { token: client, body: Box::new(body) };
                return Box::pin(self.write(body, durability)).await;
            }
            Self::Replicated(replicated) => {
                Box::pin(replicated.node.write_once(client, replication::Write { body, durability })).await?
            }
        };
        let token = CommitToken { term: 0, index: applied.index };
        Ok((applied, token))
    }

    /// Waits until what was answered at `Local` holds at `durability`.
    pub(crate) async fn wait_durable(&self, token: CommitToken, durability: Durability) -> Result<()> {
        match self {
            Self::Alone(_) => Ok(()),
            Self::Replicated(_) if token.term == 0 && matches!(durability, Durability::Local | Durability::Quorum) => {
                Ok(())
            }
            Self::Replicated(replicated) => {
                Box::pin(replicated.node.wait(token, durability)).await?.response?;
                Ok(())
            }
        }
    }

    pub(crate) async fn snapshot(&self, branch: &Branch, level: ReadLevel) -> Result<mainstay_engine::Snapshot> {
        match self {
            Self::Alone(alone) => {
                if let ReadLevel::AtLeast(index) = level
                    && alone.log.group().applied() < index
                {
                    let message = format!("index was never written here index={index}");
                    return Err(Error::new(ErrorKind::Invalid, message));
                }
                if alone.closed.load(Ordering::Relaxed) {
                    return Err(Error::new(ErrorKind::Closed, "the store was closed"));
                }
                Ok(alone.log.group().snapshot(branch.id)?)
            }
            Self::Replicated(replicated) => Ok(replicated.node.snapshot(&branch.name, level).await?),
        }
    }

    pub(crate) async fn barrier(&self, level: ReadLevel) -> Result<()> {
        if let Self::Replicated(replicated) = self {
            replicated.node.read_barrier(level).await?;
        }
        Ok(())
    }

    pub(crate) async fn close(&self) -> Result<()> {
        match self {
            Self::Alone(alone) => {
                alone.closed.store(true, Ordering::Relaxed);
                alone.log.close().await?;
                alone.engine.close().await?;
            }
            Self::Replicated(replicated) => replicated.node.close().await?,
        }
        Ok(())
    }
}

fn unsupported(durability: &Durability) -> Error {
    Error::new(ErrorKind::Unsupported, format!("a store alone has no such durability durability={durability:?}"))
}
