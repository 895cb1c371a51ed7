//! The executor: tasks in groups, timers, the trace hash.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use mainstay_io::{BoxFuture, TaskHandle};

use super::rng::{SimRng, mix};

/// Virtual time that one poll takes. Without it a task that is always ready would stop the clock for all.
pub const POLL_COST: Duration = Duration::from_micros(1);

/// A power domain: all tasks of one life of a node. A node that starts again gets a new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group(pub u64);

impl Group {
    /// The group of the world itself: clients, faults, checkers.
    pub const WORLD: Self = Self(0);
}

/// A task. The first one is the future given to [`Executor::block_on`].
type TaskId = u64;
const MAIN: TaskId = 0;

thread_local! {
    static CURRENT: RefCell<Option<Arc<Executor>>> = const { RefCell::new(None) };
}

/// The executor of one seed. One thread uses it; the locks are there because futures must be `Send`.
pub struct Executor {
    itself: Weak<Executor>,
    state: Mutex<State>,
}

struct State {
    now: u64,
    rng: SimRng,
    ready: Vec<TaskId>,
    /// [`MAIN`] is waiting for a poll that is already in `ready`.
    main_queued: bool,
    tasks: BTreeMap<TaskId, Task>,
    timers: BTreeMap<(u64, u64), Timer>,
    dead: BTreeSet<Group>,
    paused: BTreeMap<Group, u64>,
    /// How much faster than the world the clock of a group runs, in parts of a million.
    rates: BTreeMap<Group, i64>,
    /// Whose code runs now.
    current: Group,
    task_next: TaskId,
    timer_next: u64,
    hash: u64,
    polls: u64,
    /// A task panicked: what it left behind is leaked, since dropping it could panic again.
    broken: bool,
}

struct Task {
    name: String,
    group: Group,
    /// Absent while it is being polled.
    future: Option<BoxFuture<()>>,
    queued: bool,
}

struct Timer {
    group: Group,
    action: Action,
}

enum Action {
    Wake(Waker),
    Run(Box<dyn FnOnce() + Send>),
}

struct TaskWaker {
    id: TaskId,
    executor: Weak<Executor>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(executor) = self.executor.upgrade() {
            executor.lock().queue(self.id);
        }
    }
}

impl State {
    fn queue(&mut self, id: TaskId) {
        if id == MAIN {
            if !self.main_queued {
                self.main_queued = true;
                self.ready.push(MAIN);
            }
        } else if let Some(task) = self.tasks.get_mut(&id)
            && !task.queued
        {
            task.queued = true;
            self.ready.push(id);
        }
    }

    fn trace(&mut self, word: u64) {
        self.hash = mix(self.hash.rotate_left(5) ^ word);
    }

    fn timer(&mut self, deadline: u64, group: Group, action: Action) -> (u64, u64) {
        let key = (deadline, self.timer_next);
        self.timer_next += 1;
        self.timers.insert(key, Timer { group, action });
        key
    }
}

/// What [`Executor::step`] has to do once the lock is free.
enum Step {
    Fire(Action, Group),
    PollMain,
    Poll(TaskId, BoxFuture<()>, Group),
    Idle,
}

/// Makes an executor the current one of this thread while it lives.
struct Entered(Option<Arc<Executor>>);

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.with(|current| *current.borrow_mut() = self.0.take());
    }
}

impl Executor {
    /// An executor whose every choice follows from `seed`.
    pub fn new(seed: u64) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            itself: itself.clone(),
            state: Mutex::new(State {
                now: 0,
                rng: SimRng::new(seed),
                ready: Vec::new(),
                main_queued: false,
                tasks: BTreeMap::new(),
                timers: BTreeMap::new(),
                dead: BTreeSet::new(),
                paused: BTreeMap::new(),
                rates: BTreeMap::new(),
                current: Group::WORLD,
                task_next: MAIN + 1,
                timer_next: 0,
                hash: mix(seed),
                polls: 0,
                broken: false,
            }),
        })
    }

    /// The executor that runs the calling code.
    ///
    /// # Panics
    /// Outside [`Executor::block_on`]: the caller reached for the runtime from a place that the simulation does not own.
    pub fn current() -> Arc<Self> {
        CURRENT.with(|current| current.borrow().clone()).expect("simulated code runs inside Executor::block_on")
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `future` and every task until `future` is ready.
    ///
    /// # Panics
    /// With the panic of a task, or when nothing is ready and no timer is set although `future` still waits.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let me = self.itself.upgrade().expect("the caller holds a reference");
        let _entered = Entered(CURRENT.with(|current| current.borrow_mut().replace(me.clone())));
        let mut main = pin!(future);
        let main_waker = Waker::from(Arc::new(TaskWaker { id: MAIN, executor: self.itself.clone() }));
        self.lock().queue(MAIN);
        loop {
            match self.step() {
                Step::Fire(Action::Wake(waker), _) => waker.wake(),
                Step::Fire(Action::Run(run), group) => {
                    self.lock().current = group;
                    run();
                    self.lock().current = Group::WORLD;
                }
                Step::PollMain => {
                    if let Poll::Ready(output) = main.as_mut().poll(&mut Context::from_waker(&main_waker)) {
                        return output;
                    }
                }
                Step::Poll(id, future, group) => self.poll(id, future, group),
                Step::Idle => {
                    self.lock().broken = true;
                    panic!("deadlock: nothing is ready and no timer is set at {:?}", self.now());
                }
            }
        }
    }

    /// Decides what happens next: a timer that is due, else a seeded choice among the ready, else the next timer.
    fn step(&self) -> Step {
        let mut state = self.lock();
        loop {
            if let Some((&(deadline, _), _)) = state.timers.first_key_value()
                && (deadline <= state.now || state.ready.is_empty())
            {
                let (_, timer) = state.timers.pop_first().expect("it was there");
                state.now = state.now.max(deadline);
                return Step::Fire(timer.action, timer.group);
            }
            if state.ready.is_empty() {
                return Step::Idle;
            }
            let count = state.ready.len() as u64;
            let chosen = state.rng.below(count) as usize;
            let id = state.ready.swap_remove(chosen);
            if id == MAIN {
                state.main_queued = false;
                state.polled(id);
                return Step::PollMain;
            }
            let Some(task) = state.tasks.get_mut(&id) else { continue };
            let group = task.group;
            if let Some(until) = state.paused.get(&group).copied() {
                if until > state.now {
                    // It stays queued; the timer puts it back when the pause is over.
                    let itself = self.itself.clone();
                    let again = Action::Run(Box::new(move || {
                        if let Some(executor) = itself.upgrade() {
                            executor.lock().ready.push(id);
                        }
                    }));
                    state.timer(until, group, again);
                    continue;
                }
                state.paused.remove(&group);
            }
            let Some(task) = state.tasks.get_mut(&id) else { continue };
            task.queued = false;
            let Some(future) = task.future.take() else { continue };
            state.current = group;
            state.polled(id);
            return Step::Poll(id, future, group);
        }
    }

    fn poll(&self, id: TaskId, mut future: BoxFuture<()>, group: Group) {
        let waker = Waker::from(Arc::new(TaskWaker { id, executor: self.itself.clone() }));
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut Context::from_waker(&waker))));
        let mut state = self.lock();
        match polled {
            Ok(Poll::Pending) => {
                // The group may have been killed by this very poll: then the future drops like the others of the group.
                if let Some(task) = state.tasks.get_mut(&id) {
                    task.future = Some(future);
                    state.current = Group::WORLD;
                    return;
                }
            }
            Ok(Poll::Ready(())) => {
                state.tasks.remove(&id);
            }
            Err(panic) => {
                state.broken = true;
                let name = state.tasks.get(&id).map(|task| task.name.clone()).unwrap_or_default();
                let now = Duration::from_nanos(state.now);
                drop(state);
                std::mem::forget(future);
                eprintln!("task {name} of group {} panicked at {now:?}", group.0);
                resume_unwind(panic);
            }
        }
        drop(state);
        drop(future);
        self.lock().current = Group::WORLD;
    }

    /// Starts a task in `group`. Resolves when it has ended or was killed.
    pub fn spawn(&self, group: Group, name: &str, future: BoxFuture<()>) -> TaskHandle {
        let (ended, end) = tokio::sync::oneshot::channel::<()>();
        let future: BoxFuture<()> = Box::pin(async move {
            let _ended = ended;
            future.await;
        });
        let refused = {
            let mut state = self.lock();
            if state.dead.contains(&group) || state.broken {
                Some(future)
            } else {
                let id = state.task_next;
                state.task_next += 1;
                state.tasks.insert(id, Task { name: name.to_owned(), group, future: Some(future), queued: false });
                state.queue(id);
                None
            }
        };
        drop(refused);
        Box::pin(async move {
            // An error means that the task was dropped, which is an end as well.
            let _ = end.await;
        })
    }

    /// Cuts the power of `group`: drops all its tasks and timers where they stand. Nothing of it runs again.
    pub fn kill(&self, group: Group) {
        assert_ne!(group, Group::WORLD, "the world cannot be killed");
        let (tasks, timers, before) = {
            let mut state = self.lock();
            state.dead.insert(group);
            state.paused.remove(&group);
            state.rates.remove(&group);
            let word = group.0 ^ 0xdead << 48;
            state.trace(word);
            let ids: Vec<TaskId> = state.tasks.iter().filter(|(_, t)| t.group == group).map(|(id, _)| *id).collect();
            let tasks: Vec<Task> = ids.iter().filter_map(|id| state.tasks.remove(id)).collect();
            let keys: Vec<_> = state.timers.iter().filter(|(_, t)| t.group == group).map(|(key, _)| *key).collect();
            let timers: Vec<Timer> = keys.iter().filter_map(|key| state.timers.remove(key)).collect();
            let before = std::mem::replace(&mut state.current, group);
            (tasks, timers, before)
        };
        drop(tasks);
        drop(timers);
        self.lock().current = before;
    }

    /// Stops running tasks of `group` for a while, as a machine that swaps or a hypervisor that migrates would.
    pub fn pause(&self, group: Group, length: Duration) {
        let mut state = self.lock();
        let until = state.now + nanos(length);
        state.paused.insert(group, until);
        state.trace(group.0 ^ 0xfade << 48);
    }

    /// Runs `run` once `delay` has passed, unless `group` is killed before.
    pub fn after(&self, group: Group, delay: Duration, run: Box<dyn FnOnce() + Send>) {
        let refused = {
            let mut state = self.lock();
            if state.dead.contains(&group) || state.broken {
                Some(run)
            } else {
                let deadline = state.now + nanos(delay);
                state.timer(deadline, group, Action::Run(run));
                None
            }
        };
        drop(refused);
    }

    /// Virtual time since the executor was made.
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.lock().now)
    }

    /// Makes the monotonic clock of `group` run faster than the world's by so many parts of a million, or slower.
    pub fn set_rate(&self, group: Group, parts_per_million: i64) {
        self.lock().rates.insert(group, parts_per_million);
    }

    /// The time since the executor was made as the clock of the code that runs now shows it.
    pub fn local_now(&self) -> Duration {
        let state = self.lock();
        Duration::from_nanos(scaled(state.now, state.rate()))
    }

    /// The instant of the world at which the clock of the code that runs now shows `local`.
    pub(crate) fn world_instant(&self, local: Duration) -> Duration {
        let state = self.lock();
        let rate = state.rate();
        if rate == 0 {
            return local;
        }
        let world = i128::from(nanos(local)) * 1_000_000 / i128::from(1_000_000 + rate);
        // Rounded up: an instant that has been reached must show at least what was asked for.
        Duration::from_nanos(u64::try_from(world + 1).unwrap_or(u64::MAX / 4))
    }

    /// The group whose code runs now; [`Group::WORLD`] outside all.
    pub fn group(&self) -> Group {
        self.lock().current
    }

    /// Runs `run` as if it were code of `group`: what it spawns belongs to that group.
    pub fn run_as<T>(&self, group: Group, run: impl FnOnce() -> T) -> T {
        let before = std::mem::replace(&mut self.lock().current, group);
        let result = run();
        self.lock().current = before;
        result
    }

    /// A stream of random numbers of its own.
    pub fn fork_rng(&self) -> SimRng {
        self.lock().rng.fork()
    }

    /// Adds an event to the trace hash: what, where, how much.
    pub fn trace(&self, words: &[u64]) {
        let mut state = self.lock();
        for word in words {
            state.trace(*word);
        }
        let now = state.now;
        state.trace(now);
    }

    /// The hash over every poll and event so far. Two runs of one seed agree at every instant.
    pub fn trace_hash(&self) -> u64 {
        self.lock().hash
    }

    /// Polls so far.
    pub fn polls(&self) -> u64 {
        self.lock().polls
    }

    /// Resolves when virtual time has reached `deadline`.
    pub(crate) fn sleep_until(&self, deadline: Duration) -> Sleep {
        Sleep { executor: self.itself.clone(), deadline: nanos(deadline), timer: None }
    }

    /// Drops every task. The executor is of no use afterwards.
    pub fn shut_down(&self) {
        let (tasks, timers) = {
            let mut state = self.lock();
            let tasks = std::mem::take(&mut state.tasks);
            let timers = std::mem::take(&mut state.timers);
            let broken = std::mem::replace(&mut state.broken, true);
            if broken {
                std::mem::forget((tasks, timers));
                return;
            }
            (tasks, timers)
        };
        drop(tasks);
        drop(timers);
    }
}

impl State {
    fn rate(&self) -> i64 {
        self.rates.get(&self.current).copied().unwrap_or(0)
    }

    fn polled(&mut self, id: TaskId) {
        self.now += nanos(POLL_COST);
        self.polls += 1;
        let word = self.now ^ id.rotate_left(40);
        self.trace(word);
    }
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Executor")
    }
}

fn scaled(nanos: u64, parts_per_million: i64) -> u64 {
    let moved = i128::from(nanos) * i128::from(parts_per_million) / 1_000_000;
    u64::try_from(i128::from(nanos) + moved).unwrap_or(0)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4).min(u64::MAX / 4)
}

/// Waits for an instant of virtual time.
pub struct Sleep {
    executor: Weak<Executor>,
    deadline: u64,
    timer: Option<(u64, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(executor) = self.executor.upgrade() else { return Poll::Pending };
        let mut state = executor.lock();
        if state.now >= self.deadline {
            return Poll::Ready(());
        }
        let waker = cx.waker().clone();
        let old = match self.timer.and_then(|key| state.timers.get_mut(&key)) {
            Some(timer) => Some(std::mem::replace(&mut timer.action, Action::Wake(waker))),
            None => {
                let group = state.current;
                let key = state.timer(self.deadline, group, Action::Wake(waker));
                self.timer = Some(key);
                None
            }
        };
        drop(state);
        drop(old);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let (Some(key), Some(executor)) = (self.timer, self.executor.upgrade()) {
            let timer = executor.lock().timers.remove(&key);
            drop(timer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn run(seed: u64) -> (u64, Vec<u64>) {
        let executor = Executor::new(seed);
        let order = Arc::new(Mutex::new(Vec::new()));
        let hash = executor.block_on(async {
            let me = Executor::current();
            let mut handles = Vec::new();
            for i in 0..20 {
                let (order, me2) = (order.clone(), me.clone());
                handles.push(me.spawn(
                    Group(1),
                    "step",
                    Box::pin(async move {
                        for _ in 0..3 {
                            let at = me2.now() + Duration::from_micros(7);
                            me2.sleep_until(at).await;
                            order.lock().expect("no panic").push(i);
                        }
                    }),
                ));
            }
            for handle in handles {
                handle.await;
            }
            me.trace_hash()
        });
        executor.shut_down();
        (hash, Arc::try_unwrap(order).expect("tasks ended").into_inner().expect("no panic"))
    }

    #[test]
    fn one_seed_is_one_order_and_another_seed_is_another() {
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn time_jumps_to_the_next_timer() {
        let executor = Executor::new(1);
        executor.block_on(async {
            let me = Executor::current();
            me.sleep_until(Duration::from_secs(3600)).await;
            assert!(me.now() >= Duration::from_secs(3600));
        });
        assert!(executor.polls() < 5);
    }

    #[test]
    fn a_killed_group_never_runs_again_and_others_go_on() {
        let executor = Executor::new(7);
        let (dying, living) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        executor.block_on(async {
            let me = Executor::current();
            for (group, counter) in [(Group(1), dying.clone()), (Group(2), living.clone())] {
                let me2 = me.clone();
                let task = Box::pin(async move {
                    loop {
                        let at = me2.now() + Duration::from_millis(1);
                        me2.sleep_until(at).await;
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                });
                drop(me.spawn(group, "tick", task));
            }
            me.sleep_until(Duration::from_millis(10)).await;
            me.kill(Group(1));
            let (at_kill, other) = (dying.load(Ordering::Relaxed), living.load(Ordering::Relaxed));
            drop(me.spawn(Group(1), "late", Box::pin(async { panic!("the dead do not run") })));
            me.after(Group(1), Duration::ZERO, Box::new(|| panic!("the dead do not run")));
            me.sleep_until(Duration::from_millis(20)).await;
            assert_eq!(dying.load(Ordering::Relaxed), at_kill);
            assert!(living.load(Ordering::Relaxed) > other);
        });
        executor.shut_down();
    }

    #[test]
    fn a_paused_group_goes_on_afterwards() {
        let executor = Executor::new(7);
        let ticks = Arc::new(AtomicU64::new(0));
        let counter = ticks.clone();
        executor.block_on(async move {
            let me = Executor::current();
            let me2 = me.clone();
            let task = Box::pin(async move {
                for tick in 1..=10 {
                    me2.sleep_until(Duration::from_millis(tick)).await;
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
            let handle = me.spawn(Group(1), "tick", task);
            me.sleep_until(Duration::from_micros(2500)).await;
            me.pause(Group(1), Duration::from_millis(100));
            me.sleep_until(Duration::from_millis(50)).await;
            assert_eq!(ticks.load(Ordering::Relaxed), 2);
            handle.await;
            assert_eq!(ticks.load(Ordering::Relaxed), 10);
            assert!(me.now() >= Duration::from_millis(102));
        });
        executor.shut_down();
    }

    #[test]
    fn a_fast_clock_shows_more_time_and_its_timers_end_early() {
        for rate in [-200_000_i64, -1, 0, 1, 300_000] {
            let executor = Executor::new(7);
            executor.block_on(async {
                let me = Executor::current();
                me.set_rate(Group(1), rate);
                let (me2, begin) = (me.clone(), me.now());
                let task = Box::pin(async move {
                    let begin = me2.local_now();
                    let until = begin + Duration::from_secs(10);
                    me2.sleep_until(me2.world_instant(until)).await;
                    assert!(me2.local_now() >= until, "rate={rate}");
                    assert!(me2.local_now() < until + Duration::from_millis(1), "rate={rate}");
                });
                me.spawn(Group(1), "sleep", task).await;
                let took = (me.now() - begin).as_nanos() as i128;
                let expect = 10_000_000_000_i128 * 1_000_000 / i128::from(1_000_000 + rate);
                assert!((took - expect).abs() < 1_000_000, "rate={rate} took={took}");
            });
        }
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn a_future_that_nothing_can_wake_is_reported() {
        Executor::new(1).block_on(std::future::pending::<()>());
    }
}
