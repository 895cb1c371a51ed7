//! A device in memory whose completions the test decides, and an executor of one task.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use mainstay_io::sim::SimClock;
use mainstay_io::{
    AlignedBuf, AlignedBytes, Backend, BlockDevice, BoxFuture, Completer, Environment, Error, ErrorKind, Geometry,
    IoClass, Op, Random, Spawner, TaskHandle, WriteMode, Zone,
};

/// What a device writes whole.
pub(crate) const SECTOR_BYTES: usize = 512;

pub(crate) struct MemDevice {
    geometry: Geometry,
    state: Mutex<State>,
    woken: Arc<Woken>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// Writes are held until the test completes them.
    hold: bool,
    held: VecDeque<Held>,
    writes: usize,
    flushes: usize,
    trace: Vec<&'static str>,
    /// How often a read of the block at this offset fails from now on.
    failing: BTreeMap<usize, usize>,
    resident: Option<BoxFuture<()>>,
}

struct Held {
    offset: u64,
    data: Vec<u8>,
    completer: Completer<()>,
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl MemDevice {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Self> {
        let geometry = Geometry {
            capacity: bytes.len() as u64,
            io_bytes_max: 1 << 20,
            backend: Backend::Sim,
            direct: true,
            fallback_reason: None,
        };
        let state = Mutex::new(State { bytes, ..State::default() });
        Arc::new(Self { geometry, state, woken: Arc::default() })
    }

    pub(crate) fn zone(self: &Arc<Self>) -> Zone {
        Zone::new(self.clone(), 0, self.geometry.capacity)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics while it holds the device")
    }

    /// Everything that a loss of power leaves, when what is held is lost.
    pub(crate) fn image(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// What a loss of power may leave: of each held write nothing, all, a first part, or any set of sectors, as `draw`
    /// decides.
    pub(crate) fn crash_image(&self, mut draw: impl FnMut() -> u64) -> Vec<u8> {
        let state = self.lock();
        let mut bytes = state.bytes.clone();
        for held in &state.held {
            let sectors = held.data.len() / SECTOR_BYTES;
            let (way, cut) = (draw() % 4, draw() as usize % sectors);
            for sector in 0..sectors {
                let kept = match way {
                    0 => false,
                    1 => true,
                    2 => sector < cut,
                    _ => draw() & 1 == 0,
                };
                if kept {
                    let from = sector * SECTOR_BYTES;
                    let at = held.offset as usize + from;
                    bytes[at..at + SECTOR_BYTES].copy_from_slice(&held.data[from..from + SECTOR_BYTES]);
                }
            }
        }
        bytes
    }

    pub(crate) fn put(&self, image: Vec<u8>) {
        self.lock().bytes = image;
    }

    /// Reads of the block at `offset` fail so many times, or until it is written.
    pub(crate) fn fail_reads(&self, offset: usize, times: usize) {
        self.lock().failing.insert(offset, times);
    }

    /// The kinds of operations in order, repeats once.
    pub(crate) fn trace(&self) -> Vec<&'static str> {
        let mut trace = self.lock().trace.clone();
        trace.dedup();
        trace
    }

    pub(crate) fn hold(&self, hold: bool) {
        self.lock().hold = hold;
    }

    /// Offset and bytes of the writes that are held, oldest first.
    pub(crate) fn held(&self) -> Vec<(u64, Vec<u8>)> {
        self.lock().held.iter().map(|h| (h.offset, h.data.clone())).collect()
    }

    /// Writes completed or held, and flushes.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.lock();
        (state.writes, state.flushes)
    }

    pub(crate) fn wakes(&self) -> usize {
        self.woken.0.load(Ordering::SeqCst)
    }

    /// Completes the held write `index`; a failed one leaves the bytes as they were.
    pub(crate) fn complete(&self, index: usize, ok: bool) {
        let held = {
            let mut state = self.lock();
            let held = state.held.remove(index).expect("the test names a held write");
            if ok {
                let at = held.offset as usize;
                state.bytes[at..at + held.data.len()].copy_from_slice(&held.data);
            }
            held
        };
        let failure =
            || Error::new(ErrorKind::Media, "write", held.offset, held.data.len() as u64, "input/output error");
        held.completer.complete(if ok { Ok(()) } else { Err(failure()) });
    }

    /// Polls the resident task once. True when it has ended.
    pub(crate) fn turn(&self) -> bool {
        let Some(mut task) = self.lock().resident.take() else { return true };
        let waker = Waker::from(self.woken.clone());
        match task.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(()) => true,
            Poll::Pending => {
                self.lock().resident = Some(task);
                false
            }
        }
    }

    /// Drops the resident task as a device does that is torn down.
    pub(crate) fn drop_resident(&self) {
        let task = self.lock().resident.take();
        drop(task);
    }

    /// Runs `future` to its end, with turns of the resident task in between.
    pub(crate) fn run<F: Future>(&self, future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        let mut cx = Context::from_waker(Waker::noop());
        for _ in 0..10_000 {
            if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
                return output;
            }
            self.turn();
        }
        panic!("the future waits for what never comes");
    }
}

impl BlockDevice for MemDevice {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read(&self, offset: u64, mut buf: AlignedBuf, _: IoClass) -> Op<AlignedBuf> {
        let at = offset as usize;
        let length = buf.len();
        let mut state = self.lock();
        state.trace.push("read");
        if let Some((&block, times)) = state.failing.range_mut(at..at + length).next() {
            *times = times.saturating_sub(1);
            if *times == 0 {
                state.failing.remove(&block);
            }
            return Op::ready(Err(Error::new(ErrorKind::Media, "read", offset, length as u64, "no such sector")));
        }
        buf.copy_from_slice(&state.bytes[at..at + length]);
        Op::ready(Ok(buf))
    }

    fn write(&self, offset: u64, bufs: Vec<AlignedBytes>, _: WriteMode, _: IoClass) -> Op<()> {
        let data: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
        assert!(offset.is_multiple_of(4096) && data.len().is_multiple_of(4096), "{offset} {}", data.len());
        let mut state = self.lock();
        state.writes += 1;
        state.trace.push("write");
        if state.hold {
            let (op, completer) = Op::pending();
            state.held.push_back(Held { offset, data, completer });
            return op;
        }
        let at = offset as usize;
        state.failing.retain(|block, _| !(at..at + data.len()).contains(block));
        state.bytes[at..at + data.len()].copy_from_slice(&data);
        Op::ready(Ok(()))
    }

    fn flush(&self) -> Op<()> {
        let mut state = self.lock();
        state.flushes += 1;
        state.trace.push("flush");
        Op::ready(Ok(()))
    }

    fn allocate(&self, _: u64, _: u64) -> Op<()> {
        Op::ready(Ok(()))
    }

    fn discard(&self, _: u64, _: u64) -> Op<()> {
        Op::ready(Ok(()))
    }

    fn run_resident(&self, _: &str, task: BoxFuture<()>) {
        let old = self.lock().resident.replace(task);
        assert!(old.is_none(), "one resident task a device");
    }

    fn poisoned(&self) -> Option<Error> {
        None
    }

    fn shutdown(&self, _: Duration) -> Op<()> {
        Op::ready(Ok(()))
    }
}

struct Nothing;

impl Random for Nothing {
    fn fill(&self, out: &mut [u8]) {
        out.fill(0);
    }
}

impl Spawner for Nothing {
    fn spawn(&self, name: &str, _: BoxFuture<()>) -> TaskHandle {
        panic!("the log starts no task of its own: {name}");
    }
}

pub(crate) fn environment() -> Environment {
    Environment {
        clock: Arc::new(SimClock::new(Duration::ZERO)),
        random: Arc::new(Nothing),
        spawner: Arc::new(Nothing),
    }
}
