//! [`SimRuntime`]: the executor as consensus sees it.

use std::fmt;
use std::future::Future;
use std::io;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use openraft_rt::{
    AsyncRuntime, Instant, Mpsc, MpscReceiver, MpscSender, MpscWeakSender, Mutex, Oneshot, OneshotSender, OptionalSend,
    SendError, TryRecvError,
};
use tokio::sync::{mpsc, oneshot};

use super::executor::{Executor, Sleep};
use super::rng::SimRng;
use super::watch::SimWatch;

/// The runtime of a simulation. Its tasks belong to the group of the task that spawned them.
pub struct SimRuntime(Arc<Executor>);

impl SimRuntime {
    /// A runtime over an executor.
    pub fn over(executor: Arc<Executor>) -> Self {
        Self(executor)
    }
}

impl fmt::Debug for SimRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimRuntime")
    }
}

impl Drop for SimRuntime {
    fn drop(&mut self) {
        self.0.shut_down();
    }
}

impl mainstay_replication::Runtime for SimRuntime {}

/// An instant of virtual time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SimInstant(Duration);

/// Instants start here, so that code which goes back from one (by a lease, by a timeout) meets no underflow.
const ORIGIN: Duration = Duration::from_secs(1 << 30);

impl Add<Duration> for SimInstant {
    type Output = Self;

    fn add(self, rhs: Duration) -> Self {
        Self(self.0 + rhs)
    }
}

impl AddAssign<Duration> for SimInstant {
    fn add_assign(&mut self, rhs: Duration) {
        self.0 += rhs;
    }
}

impl Sub<Duration> for SimInstant {
    type Output = Self;

    fn sub(self, rhs: Duration) -> Self {
        Self(self.0 - rhs)
    }
}

impl SubAssign<Duration> for SimInstant {
    fn sub_assign(&mut self, rhs: Duration) {
        self.0 -= rhs;
    }
}

impl Sub for SimInstant {
    type Output = Duration;

    fn sub(self, rhs: Self) -> Duration {
        self.0.saturating_sub(rhs.0)
    }
}

impl Instant for SimInstant {
    fn now() -> Self {
        Self(ORIGIN + Executor::current().local_now())
    }
}

/// The task was killed before it had a result. A panic is no result either: it ends the whole simulation.
#[derive(Clone, Copy, Debug)]
pub struct Killed;

impl fmt::Display for Killed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the task was killed")
    }
}

/// Resolves to what a task returned.
pub struct JoinHandle<T>(oneshot::Receiver<T>);

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, Killed>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map_err(|_| Killed)
    }
}

/// The time is over.
#[derive(Clone, Copy, Debug)]
pub struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("deadline has elapsed")
    }
}

/// A future with a deadline. The future goes first when both are ready.
pub struct Timeout<F> {
    future: Pin<Box<F>>,
    sleep: Sleep,
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = self.future.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(&mut self.sleep).poll(cx).map(|()| Err(Elapsed))
    }
}

/// The bounded queue: tokio's, which is first come, first served.
#[derive(Debug)]
pub struct SimMpsc;

/// See [`SimMpsc`].
pub struct SimSender<T>(mpsc::Sender<T>);

/// See [`SimMpsc`].
pub struct SimWeakSender<T>(mpsc::WeakSender<T>);

/// See [`SimMpsc`].
pub struct SimReceiver<T>(mpsc::Receiver<T>);

impl<T> Clone for SimSender<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Clone for SimWeakSender<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl Mpsc for SimMpsc {
    type Sender<T: OptionalSend> = SimSender<T>;
    type Receiver<T: OptionalSend> = SimReceiver<T>;
    type WeakSender<T: OptionalSend> = SimWeakSender<T>;

    fn channel<T: OptionalSend>(buffer: usize) -> (Self::Sender<T>, Self::Receiver<T>) {
        let (sender, receiver) = mpsc::channel(buffer);
        (SimSender(sender), SimReceiver(receiver))
    }
}

impl<T: OptionalSend> MpscSender<SimMpsc, T> for SimSender<T> {
    async fn send(&self, msg: T) -> Result<(), SendError<T>> {
        self.0.send(msg).await.map_err(|e| SendError(e.0))
    }

    fn downgrade(&self) -> SimWeakSender<T> {
        SimWeakSender(self.0.downgrade())
    }
}

impl<T: OptionalSend> MpscWeakSender<SimMpsc, T> for SimWeakSender<T> {
    fn upgrade(&self) -> Option<SimSender<T>> {
        self.0.upgrade().map(SimSender)
    }
}

impl<T: OptionalSend> MpscReceiver<T> for SimReceiver<T> {
    async fn recv(&mut self) -> Option<T> {
        self.0.recv().await
    }

    fn try_recv(&mut self) -> Result<T, TryRecvError> {
        self.0.try_recv().map_err(|e| match e {
            mpsc::error::TryRecvError::Empty => TryRecvError::Empty,
            mpsc::error::TryRecvError::Disconnected => TryRecvError::Disconnected,
        })
    }
}

/// The channel for one value: tokio's.
#[derive(Debug)]
pub struct SimOneshot;

/// See [`SimOneshot`].
pub struct SimOneshotSender<T>(oneshot::Sender<T>);

impl Oneshot for SimOneshot {
    type Sender<T: OptionalSend> = SimOneshotSender<T>;
    type Receiver<T: OptionalSend> = oneshot::Receiver<T>;
    type ReceiverError = oneshot::error::RecvError;

    fn channel<T: OptionalSend>() -> (Self::Sender<T>, Self::Receiver<T>) {
        let (sender, receiver) = oneshot::channel();
        (SimOneshotSender(sender), receiver)
    }
}

impl<T: OptionalSend> OneshotSender<T> for SimOneshotSender<T> {
    fn send(self, t: T) -> Result<(), T> {
        self.0.send(t)
    }
}

/// The asynchronous lock: tokio's, which is fair.
pub struct SimMutex<T>(tokio::sync::Mutex<T>);

impl<T: OptionalSend + 'static> Mutex<T> for SimMutex<T> {
    type Guard<'a> = tokio::sync::MutexGuard<'a, T>;

    fn new(value: T) -> Self {
        Self(tokio::sync::Mutex::new(value))
    }

    fn lock(&self) -> impl Future<Output = Self::Guard<'_>> + OptionalSend {
        self.0.lock()
    }
}

impl AsyncRuntime for SimRuntime {
    type JoinError = Killed;
    type JoinHandle<T: OptionalSend + 'static> = JoinHandle<T>;
    type Sleep = Sleep;
    type Instant = SimInstant;
    type TimeoutError = Elapsed;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = Timeout<T>;
    type ThreadLocalRng = SimRng;
    type Mpsc = SimMpsc;
    type Watch = SimWatch;
    type Oneshot = SimOneshot;
    type Mutex<T: OptionalSend + 'static> = SimMutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        let executor = Executor::current();
        let (sender, receiver) = oneshot::channel();
        let group = executor.group();
        let task = Box::pin(async move {
            // Nobody waits for the result of a detached task.
            let _ = sender.send(future.await);
        });
        drop(executor.spawn(group, "consensus", task));
        JoinHandle(receiver)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        let executor = Executor::current();
        executor.sleep_until(executor.world_instant(executor.local_now() + duration))
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        let executor = Executor::current();
        executor.sleep_until(executor.world_instant(deadline.0.saturating_sub(ORIGIN)))
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        Timeout { future: Box::pin(future), sleep: Self::sleep(duration) }
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: Self::Instant, future: F) -> Self::Timeout<R, F> {
        Timeout { future: Box::pin(future), sleep: Self::sleep_until(deadline) }
    }

    fn is_panic(_: &Self::JoinError) -> bool {
        false
    }

    fn thread_rng() -> Self::ThreadLocalRng {
        Executor::current().fork_rng()
    }

    fn new(_: usize) -> Self {
        Self(Executor::new(0))
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }

    /// Runs `f` in place: the simulation has one thread.
    async fn spawn_blocking<F, T>(f: F) -> Result<T, io::Error>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        Ok(f())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtime_passes_the_suite_of_consensus() {
        openraft_rt::testing::Suite::<SimRuntime>::test_all();
    }
}
