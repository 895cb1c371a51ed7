//! The simulated network: delays, losses, duplicates, cuts and partitions between nodes, all from one seed.
//!
//! # Place
//! above the executor; [`SimTransport`] is what a node takes for [`Transport`]
//! # Model
//! A call is a request and an answer, each with a delay of its own, so that calls overtake one another. A lost
//! message or one over a cut link is gone: the caller hears nothing until its timeout. A host that is down
//! refuses. A host that dies while it handles resets the connection, or falls silent.
//! # Invariants
//! - N1. `Unavailable` is answered only when the request reached no handler.
//! - N2. Both ends greet and check each other before a request is handled, as over TCP.
//! - N3. At most [`IN_FLIGHT_MAX`] calls wait between two nodes.
//! - N4. Requests that keep their order do not overtake each other on one link, as on one connection. What a loss leaves
//!   out is a gap before those behind it, which a connection would not show.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use mainstay_replication::{
    Envelope, Error, ErrorKind, Handler, Hello, NodeId, PeerAddress, Result, Runtime, Transport, fuzzing,
};
use openraft_rt::AsyncRuntime;
use tokio::sync::oneshot;

use crate::rt::{Executor, Group, SimRng, SimRuntime};

/// Calls that may wait from one node to another; a further one is refused.
pub const IN_FLIGHT_MAX: usize = 1024;

/// How bad the network is. Chances are per mille of messages.
#[derive(Clone, Copy, Debug)]
pub struct NetSettings {
    /// Shortest delay of a message.
    pub delay_min: Duration,
    /// Longest ordinary delay.
    pub delay_max: Duration,
    /// Chance of a delay up to twenty times as long.
    pub slow: u64,
    /// Chance that a message is lost.
    pub loss: u64,
    /// Chance that a request which may be repeated arrives twice.
    pub duplicate: u64,
    /// Chance that bits of a request or an answer change on the way. The frame's checksum is there to see it, and then the
    /// connection ends.
    pub corrupt: u64,
    /// Which methods may be repeated. The others are not, since a connection never does it.
    pub may_repeat: fn(u8) -> bool,
    /// Which methods keep their order among each other on a link.
    pub in_order: fn(u8) -> bool,
}

impl NetSettings {
    /// A good network: what remains when faults stop.
    pub fn calm() -> Self {
        Self {
            delay_min: Duration::from_micros(50),
            delay_max: Duration::from_micros(500),
            slow: 0,
            loss: 0,
            duplicate: 0,
            corrupt: 0,
            may_repeat: |_| false,
            in_order: mainstay_replication::keeps_order,
        }
    }
}

/// Counts of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetStats {
    /// Calls made.
    pub calls: u64,
    /// Messages lost by chance or over a cut link.
    pub lost: u64,
    /// Requests that arrived twice.
    pub duplicated: u64,
    /// Messages that arrived damaged.
    pub corrupted: u64,
    /// Handshakes refused by either end.
    pub refused: u64,
}

/// All links and hosts.
pub struct Net {
    executor: Arc<Executor>,
    itself: Weak<Net>,
    state: Mutex<State>,
}

struct State {
    rng: SimRng,
    settings: NetSettings,
    hosts: BTreeMap<PeerAddress, Host>,
    cut: BTreeSet<(PeerAddress, PeerAddress)>,
    in_flight: BTreeMap<(PeerAddress, PeerAddress), usize>,
    /// When the last request that keeps its order arrives.
    arrivals: BTreeMap<(PeerAddress, PeerAddress), Duration>,
    stats: NetStats,
}

#[derive(Clone)]
struct Host {
    group: Group,
    hello: Hello,
    handler: Arc<dyn Handler>,
}

/// The end of a call by which its answer comes. Dropped without one, the connection broke.
struct Reply {
    net: Arc<Net>,
    from: PeerAddress,
    to: PeerAddress,
    sender: Arc<Mutex<Option<oneshot::Sender<Result<Envelope>>>>>,
    handled: bool,
    done: bool,
}

impl Net {
    /// A network whose every choice follows from the executor's seed.
    pub fn new(executor: &Arc<Executor>, settings: NetSettings) -> Arc<Self> {
        Arc::new_cyclic(|itself| Self {
            executor: executor.clone(),
            itself: itself.clone(),
            state: Mutex::new(State {
                rng: executor.fork_rng(),
                settings,
                hosts: BTreeMap::new(),
                cut: BTreeSet::new(),
                in_flight: BTreeMap::new(),
                arrivals: BTreeMap::new(),
                stats: NetStats::default(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The transport of one life of a node.
    pub fn transport(&self, address: PeerAddress, group: Group) -> Arc<SimTransport> {
        let net = self.itself.upgrade().expect("the caller holds a reference");
        Arc::new(SimTransport { net, address, group, hello: Mutex::new(None), closed: Mutex::new(false) })
    }

    /// Takes the hosts of a dead group off the network.
    pub fn kill(&self, group: Group) {
        let gone: Vec<Host> = {
            let mut state = self.lock();
            let dead: Vec<PeerAddress> =
                state.hosts.iter().filter(|(_, host)| host.group == group).map(|(a, _)| a.clone()).collect();
            dead.iter().filter_map(|address| state.hosts.remove(address)).collect()
        };
        drop(gone);
    }

    /// Drops whatever goes from one node to another from now on; the other direction stays.
    pub fn cut(&self, from: &PeerAddress, to: &PeerAddress) {
        self.executor.trace(&[0xc07]);
        self.lock().cut.insert((from.clone(), to.clone()));
    }

    /// Mends one direction.
    pub fn mend(&self, from: &PeerAddress, to: &PeerAddress) {
        self.lock().cut.remove(&(from.clone(), to.clone()));
    }

    /// Mends all links.
    pub fn mend_all(&self) {
        self.lock().cut.clear();
    }

    /// Makes the network as bad as `settings` say; answers how bad it was.
    pub fn set(&self, settings: NetSettings) -> NetSettings {
        std::mem::replace(&mut self.lock().settings, settings)
    }

    /// Mends all links and makes the network good.
    pub fn calm(&self) {
        let mut state = self.lock();
        state.cut.clear();
        state.settings = NetSettings::calm();
    }

    /// Counts so far.
    pub fn stats(&self) -> NetStats {
        self.lock().stats
    }

    /// The delay of the next message, or nothing if it is lost.
    fn send(&self, from: &PeerAddress, to: &PeerAddress) -> Option<Duration> {
        let mut state = self.lock();
        let NetSettings { delay_min, delay_max, slow, loss, .. } = state.settings;
        let mut nanos = state.rng.range(delay_min.as_nanos() as u64, delay_max.as_nanos() as u64);
        if state.rng.chance(slow) {
            nanos *= state.rng.range(2, 20);
        }
        if state.cut.contains(&(from.clone(), to.clone())) || state.rng.chance(loss) {
            state.stats.lost += 1;
            return None;
        }
        Some(Duration::from_nanos(nanos))
    }

    /// The delay after which a request arrives that would take `delay` alone and keeps its order (N4).
    fn behind_others(&self, link: &(PeerAddress, PeerAddress), delay: Duration) -> Duration {
        let now = self.executor.now();
        let mut state = self.lock();
        let last = state.arrivals.entry(link.clone()).or_default();
        *last = (now + delay).max(*last + Duration::from_nanos(1));
        *last - now
    }

    /// True if a message that arrives now over this link arrives at all.
    fn arrives(&self, from: &PeerAddress, to: &PeerAddress) -> bool {
        let mut state = self.lock();
        let whole = !state.cut.contains(&(from.clone(), to.clone()));
        state.stats.lost += u64::from(!whole);
        whole
    }

    /// What arrives of a message: itself, or what its frame holds after some bits have changed; `None` when the receiver
    /// sees that and ends the connection.
    fn transmit(&self, message: Envelope, answer: bool) -> Option<Envelope> {
        let mut state = self.lock();
        let corrupt = state.settings.corrupt;
        if !state.rng.chance(corrupt) {
            return Some(message);
        }
        let mut frame = fuzzing::encode_frame(&message, answer);
        for _ in 0..state.rng.range(1, 4) {
            let at = state.rng.below(frame.len() as u64) as usize;
            frame[at] ^= 1 << state.rng.below(8);
        }
        state.stats.corrupted += 1;
        drop(state);
        fuzzing::decode_frame(&frame)
    }

    fn chance(&self, per_mille: u64) -> bool {
        self.lock().rng.chance(per_mille)
    }

    /// A request has arrived where it was sent to.
    fn deliver(&self, client: &Host, request: Envelope, expect: Option<NodeId>, mut reply: Reply) {
        if !self.arrives(&reply.from, &reply.to) {
            reply.silent();
            return;
        }
        let host = self.lock().hosts.get(&reply.to).cloned();
        let Some(host) = host else {
            let refused = Error::new(ErrorKind::Unavailable, format!("connection refused address={}", reply.to.0));
            return reply.answer(Err(refused));
        };
        let Some(request) = self.transmit(request, false) else {
            // The receiver ends the connection with the request on it: the caller cannot know what became of it.
            reply.handled = true;
            return;
        };
        self.executor.trace(&[0x4e7, u64::from(request.method), request.body.len() as u64, host.group.0]);
        let greeted = greet(client, &host, expect);
        if let Err(e) = greeted {
            self.lock().stats.refused += 1;
            return reply.answer(Err(e));
        }
        reply.handled = true;
        let from = client.hello.clone();
        // Called here and not in the task: the handler sees requests in the order of the link.
        let work = self.executor.run_as(host.group, || host.handler.handle(from, request));
        let task = Box::pin(async move { reply.answer(work.await) });
        drop(self.executor.spawn(host.group, "handler", task));
    }
}

/// The first frames of a connection: each end checks the other.
fn greet(client: &Host, server: &Host, expect: Option<NodeId>) -> Result<()> {
    server.handler.accept(&client.hello)?;
    if let Some(expect) = expect
        && expect != server.hello.node
    {
        let found = server.hello.node;
        return Err(Error::new(ErrorKind::Foreign, format!("another node answers expected={expect} found={found}")));
    }
    client.handler.accept(&server.hello)
}

impl Reply {
    /// Sends the answer over the link back.
    fn answer(mut self, answer: Result<Envelope>) {
        self.done = true;
        self.pass(answer);
    }

    /// Sends nothing, ever.
    fn silent(&mut self) {
        self.done = true;
        self.hold();
    }

    fn pass(&mut self, answer: Result<Envelope>) {
        let Some(delay) = self.net.send(&self.to, &self.from) else { return self.hold() };
        let answer = answer.and_then(|envelope| {
            let broken = || Error::new(ErrorKind::Indeterminate, format!("connection lost address={}", self.to.0));
            self.net.transmit(envelope, true).ok_or_else(broken)
        });
        let (net, from, to, sender) = (self.net.clone(), self.from.clone(), self.to.clone(), self.sender.clone());
        let arrive = Box::new(move || {
            if net.arrives(&to, &from) {
                let sender = sender.lock().unwrap_or_else(PoisonError::into_inner).take();
                if let Some(sender) = sender {
                    // The caller may have given up.
                    let _ = sender.send(answer);
                }
            } else {
                keep(&net, sender);
            }
        });
        self.net.executor.after(Group::WORLD, delay, arrive);
    }

    /// Keeps the sender alive beyond every timeout: the caller hears nothing.
    fn hold(&self) {
        keep(&self.net, self.sender.clone());
    }
}

fn keep(net: &Arc<Net>, sender: Arc<Mutex<Option<oneshot::Sender<Result<Envelope>>>>>) {
    net.executor.after(Group::WORLD, SILENCE, Box::new(move || drop(sender)));
}

/// Longer than any timeout of a call.
const SILENCE: Duration = Duration::from_secs(600);

impl Drop for Reply {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // The host died with the request in its hands: the kernel resets the connection, or the machine is gone.
        if self.net.chance(500) {
            let kind = if self.handled { ErrorKind::Indeterminate } else { ErrorKind::Unavailable };
            self.pass(Err(Error::new(kind, format!("connection reset address={}", self.to.0))));
        } else {
            self.hold();
        }
    }
}

/// The network as one life of a node sees it.
pub struct SimTransport {
    net: Arc<Net>,
    address: PeerAddress,
    group: Group,
    hello: Mutex<Option<Host>>,
    closed: Mutex<bool>,
}

impl SimTransport {
    fn host(&self) -> Option<Host> {
        self.hello.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is_closed(&self) -> bool {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a call while it waits.
struct InFlight(Arc<Net>, (PeerAddress, PeerAddress));

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(count) = self.0.lock().in_flight.get_mut(&self.1) {
            *count -= 1;
        }
    }
}

impl Transport for SimTransport {
    fn serve(&self, hello: Hello, handler: Arc<dyn Handler>) {
        let host = Host { group: self.group, hello, handler };
        let before = self.hello.lock().unwrap_or_else(PoisonError::into_inner).replace(host.clone());
        let replaced = self.net.lock().hosts.insert(self.address.clone(), host);
        drop((before, replaced));
    }

    fn call(
        &self,
        address: PeerAddress,
        expect: Option<NodeId>,
        request: Envelope,
        timeout: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Envelope>> + Send>> {
        let unavailable = |why: &str| Error::new(ErrorKind::Unavailable, format!("{why} address={}", address.0));
        if self.is_closed() {
            let e = unavailable("transport is closed");
            return Box::pin(async move { Err(e) });
        }
        let Some(client) = self.host() else {
            let e = unavailable("transport does not serve yet");
            return Box::pin(async move { Err(e) });
        };
        let link = (self.address.clone(), address.clone());
        let net = self.net.clone();
        {
            let mut state = net.lock();
            state.stats.calls += 1;
            let waiting = state.in_flight.entry(link.clone()).or_default();
            if *waiting >= IN_FLIGHT_MAX {
                let e = unavailable("too many calls wait");
                return Box::pin(async move { Err(e) });
            }
            *waiting += 1;
        }
        let counted = InFlight(net.clone(), link.clone());
        let (sender, receiver) = oneshot::channel();
        let sender = Arc::new(Mutex::new(Some(sender)));
        let (copies, in_order) = {
            let mut state = net.lock();
            let NetSettings { duplicate, may_repeat, in_order, .. } = state.settings;
            let twice = may_repeat(request.method) && state.rng.chance(duplicate);
            state.stats.duplicated += u64::from(twice);
            (1 + usize::from(twice), in_order(request.method))
        };
        for _ in 0..copies {
            let mut reply = Reply {
                net: net.clone(),
                from: link.0.clone(),
                to: link.1.clone(),
                sender: sender.clone(),
                handled: false,
                done: false,
            };
            let Some(delay) = net.send(&link.0, &link.1) else {
                reply.silent();
                continue;
            };
            let delay = if in_order { net.behind_others(&link, delay) } else { delay };
            let (net2, client, request) = (net.clone(), client.clone(), request.clone());
            let deliver = Box::new(move || net2.deliver(&client, request, expect, reply));
            net.executor.after(Group::WORLD, delay, deliver);
        }
        drop(sender);
        let executor = net.executor.clone();
        let deadline = executor.sleep_until(executor.now() + timeout);
        Box::pin(async move {
            let _counted = counted;
            let silent = || Error::new(ErrorKind::Indeterminate, format!("no answer in time address={}", link.1.0));
            match SimRuntime::select2(receiver, deadline).await {
                openraft_rt::Select2::First(Ok(answer)) => answer,
                openraft_rt::Select2::First(Err(_)) | openraft_rt::Select2::Second(()) => Err(silent()),
            }
        })
    }

    fn local_address(&self) -> PeerAddress {
        self.address.clone()
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.net.kill(self.group);
        let mine = self.hello.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(mine);
        Box::pin(std::future::ready(()))
    }
}

const _: fn() = || {
    fn is_runtime<R: Runtime>() {}
    is_runtime::<SimRuntime>();
};

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Default)]
    struct Echo {
        handled: AtomicU64,
        order: Mutex<Vec<u8>>,
        slow: bool,
    }

    impl Handler for Echo {
        fn accept(&self, hello: &Hello) -> Result<()> {
            if hello.cluster == [1; 16] { Ok(()) } else { Err(Error::new(ErrorKind::Foreign, "another cluster")) }
        }

        fn handle(&self, _: Hello, request: Envelope) -> Pin<Box<dyn Future<Output = Result<Envelope>> + Send>> {
            self.handled.fetch_add(1, Ordering::Relaxed);
            let first = request.body.first().copied().unwrap_or_default();
            self.order.lock().unwrap_or_else(PoisonError::into_inner).push(first);
            let slow = self.slow;
            Box::pin(async move {
                if slow {
                    SimRuntime::sleep(Duration::from_secs(60)).await;
                }
                Ok(request)
            })
        }
    }

    fn hello(node: u64, cluster: u8) -> Hello {
        Hello {
            cluster: [cluster; 16],
            node: NodeId(node),
            incarnation: [node as u8; 16],
            name: format!("n{node}"),
            peer_address: address(node),
            settings_fingerprint: 0,
        }
    }

    fn address(node: u64) -> PeerAddress {
        PeerAddress(format!("n{node}:1"))
    }

    struct Pair {
        executor: Arc<Executor>,
        net: Arc<Net>,
        client: Arc<SimTransport>,
        server: Arc<Echo>,
    }

    /// Two hosts, 1 and 2, in groups of their own; `with` runs inside.
    fn pair(settings: NetSettings, slow: bool, cluster: u8, with: impl AsyncFnOnce(&Pair)) {
        let executor = Executor::new(5);
        let net = Net::new(&executor, settings);
        let (client, host) = (net.transport(address(1), Group(1)), net.transport(address(2), Group(2)));
        let server = Arc::new(Echo { slow, ..Echo::default() });
        client.serve(hello(1, cluster), Arc::new(Echo::default()));
        host.serve(hello(2, 1), server.clone());
        let pair = Pair { executor: executor.clone(), net, client, server };
        executor.block_on(with(&pair));
        executor.shut_down();
    }

    impl Pair {
        async fn call(&self, expect: u64) -> Result<Envelope> {
            let request = Envelope { method: 7, body: Bytes::from_static(b"x") };
            self.client.call(address(2), Some(NodeId(expect)), request, Duration::from_secs(1)).await
        }

        fn handled(&self) -> u64 {
            self.server.handled.load(Ordering::Relaxed)
        }
    }

    fn kind<T>(result: Result<T>) -> Option<ErrorKind> {
        result.err().map(|e| e.kind())
    }

    #[test]
    fn a_call_is_answered_and_a_cut_in_either_direction_is_silence() {
        pair(NetSettings::calm(), false, 1, async |pair| {
            assert!(pair.call(2).await.is_ok());
            pair.net.cut(&address(1), &address(2));
            assert_eq!(kind(pair.call(2).await), Some(ErrorKind::Indeterminate));
            assert_eq!(pair.handled(), 1, "the request was lost");
            pair.net.calm();
            pair.net.cut(&address(2), &address(1));
            assert_eq!(kind(pair.call(2).await), Some(ErrorKind::Indeterminate));
            assert_eq!(pair.handled(), 2, "the answer was lost");
            pair.net.calm();
            assert!(pair.call(2).await.is_ok());
        });
    }

    #[test]
    fn both_ends_check_the_greeting() {
        pair(NetSettings::calm(), false, 2, async |pair| {
            assert_eq!(kind(pair.call(2).await), Some(ErrorKind::Foreign));
        });
        pair(NetSettings::calm(), false, 1, async |pair| {
            assert_eq!(kind(pair.call(3).await), Some(ErrorKind::Foreign), "another node than expected");
            assert_eq!((pair.handled(), pair.net.stats().refused), (0, 1));
        });
    }

    /// N1: after a death the caller may be told `Unavailable` only if the request had not been handled.
    #[test]
    fn a_dead_host_refuses_and_a_dying_one_leaves_the_caller_in_doubt() {
        pair(NetSettings::calm(), true, 1, async |pair| {
            let executor = pair.executor.clone();
            let net = pair.net.clone();
            let killer = pair.executor.spawn(
                Group::WORLD,
                "killer",
                Box::pin(async move {
                    executor.sleep_until(Duration::from_millis(100)).await;
                    net.kill(Group(2));
                    executor.kill(Group(2));
                }),
            );
            assert_eq!(kind(pair.call(2).await), Some(ErrorKind::Indeterminate));
            killer.await;
            assert_eq!(kind(pair.call(2).await), Some(ErrorKind::Unavailable));
            assert_eq!(pair.handled(), 1);
        });
    }

    /// On a network where later calls often arrive first.
    #[test]
    fn calls_that_keep_their_order_arrive_in_it_and_others_do_not() {
        for (in_order, expect) in [((|_| true) as fn(u8) -> bool, true), (|_| false, false)] {
            let settings = NetSettings { slow: 500, in_order, ..NetSettings::calm() };
            pair(settings, false, 1, async |pair| {
                let body = |i: u8| Envelope { method: 7, body: Bytes::from(vec![i]) };
                let calls: Vec<_> = (0..50)
                    .map(|i| pair.client.call(address(2), Some(NodeId(2)), body(i), Duration::from_secs(1)))
                    .collect();
                for call in calls {
                    call.await.expect("a calm network loses nothing");
                }
                let order = pair.server.order.lock().unwrap_or_else(PoisonError::into_inner).clone();
                assert_eq!(order.len(), 50);
                assert_eq!(order.is_sorted(), expect, "{order:?}");
            });
        }
    }

    #[test]
    fn only_methods_that_may_be_repeated_arrive_twice() {
        for (may_repeat, expect) in [((|_| true) as fn(u8) -> bool, 2), (|_| false, 1)] {
            let settings = NetSettings { duplicate: 1000, may_repeat, ..NetSettings::calm() };
            pair(settings, false, 1, async |pair| {
                assert!(pair.call(2).await.is_ok());
                pair.executor.sleep_until(Duration::from_secs(1)).await;
                assert_eq!(pair.handled(), expect);
            });
        }
    }
}
