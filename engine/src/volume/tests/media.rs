//! A volume in memory that remembers every write, so that a test can stop the world between any two.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use mainstay_io::sim::SimClock;
use mainstay_io::{
    AlignedBuf, AlignedBytes, Backend, BlockDevice, BoxFuture, Environment, Error, ErrorKind, Geometry, IoClass, Media,
    Op, Random, SUPERBLOCK_ZONE_BYTES, Spawner, TaskHandle, WriteMode, Zone, block_on,
};

/// Something that reached a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Write { offset: u64, data: Vec<u8>, mode: WriteMode },
    Flush,
    Allocate { offset: u64, length: u64 },
    Discard { offset: u64, length: u64 },
}

pub(crate) struct MemDevice {
    geometry: Geometry,
    state: Mutex<State>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) bytes: Vec<u8>,
    pub(crate) events: Vec<Event>,
    /// Bytes that `allocate` may still give.
    pub(crate) allocatable: Option<u64>,
    pub(crate) writes_fail: bool,
    /// Offset of a block that cannot be read.
    pub(crate) unreadable: Option<u64>,
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
        Arc::new(Self { geometry, state: Mutex::new(State { bytes, ..State::default() }) })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics while it holds the device")
    }
}

fn fail(kind: ErrorKind, op: &'static str, offset: u64) -> Error {
    Error::new(kind, op, offset, 0, "as the test asked")
}

impl BlockDevice for MemDevice {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read(&self, offset: u64, mut buf: AlignedBuf, _: IoClass) -> Op<AlignedBuf> {
        let state = self.state();
        if state.unreadable == Some(offset) {
            return Op::ready(Err(fail(ErrorKind::Media, "read", offset)));
        }
        let at = offset as usize;
        let length = buf.len();
        buf.copy_from_slice(&state.bytes[at..at + length]);
        Op::ready(Ok(buf))
    }

    fn write(&self, offset: u64, bufs: Vec<AlignedBytes>, mode: WriteMode, _: IoClass) -> Op<()> {
        let data: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).collect();
        assert!(offset.is_multiple_of(4096) && data.len().is_multiple_of(4096), "{offset} {}", data.len());
        let mut state = self.state();
        if state.writes_fail {
            return Op::ready(Err(fail(ErrorKind::Media, "write", offset)));
        }
        let at = offset as usize;
        state.bytes[at..at + data.len()].copy_from_slice(&data);
        state.events.push(Event::Write { offset, data, mode });
        Op::ready(Ok(()))
    }

    fn flush(&self) -> Op<()> {
        self.state().events.push(Event::Flush);
        Op::ready(Ok(()))
    }

    fn allocate(&self, offset: u64, length: u64) -> Op<()> {
        let mut state = self.state();
        if let Some(left) = state.allocatable {
            let Some(left) = left.checked_sub(length) else {
                return Op::ready(Err(fail(ErrorKind::OutOfSpace, "allocate", offset)));
            };
            state.allocatable = Some(left);
        }
        state.events.push(Event::Allocate { offset, length });
        Op::ready(Ok(()))
    }

    fn discard(&self, offset: u64, length: u64) -> Op<()> {
        let mut state = self.state();
        let at = offset as usize;
        state.bytes[at..at + length as usize].fill(0);
        state.events.push(Event::Discard { offset, length });
        Op::ready(Ok(()))
    }

    fn run_resident(&self, _: &str, _: BoxFuture<()>) {
        panic!("a volume runs no log");
    }

    fn poisoned(&self) -> Option<Error> {
        None
    }

    fn shutdown(&self, _: Duration) -> Op<()> {
        Op::ready(Ok(()))
    }
}

pub(crate) struct MemMedia {
    pub(crate) superblock: Arc<MemDevice>,
    pub(crate) wal: Arc<MemDevice>,
    pub(crate) extents: Arc<MemDevice>,
    created: AtomicBool,
}

pub(crate) const WAL_BYTES: u64 = 64 << 10;

impl MemMedia {
    pub(crate) fn new(extents_bytes: usize) -> Arc<Self> {
        Self::from_image(vec![0; SUPERBLOCK_ZONE_BYTES as usize], extents_bytes)
    }

    /// A superblock zone as a crash left it.
    pub(crate) fn from_image(superblock: Vec<u8>, extents_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            superblock: MemDevice::new(superblock),
            wal: MemDevice::new(vec![0; WAL_BYTES as usize]),
            extents: MemDevice::new(vec![0; extents_bytes]),
            created: AtomicBool::new(false),
        })
    }
}

fn zone(device: &Arc<MemDevice>) -> Zone {
    Zone::new(device.clone(), 0, device.geometry.capacity)
}

impl Media for MemMedia {
    fn unlock(&self) {}

    fn superblock(&self) -> Zone {
        zone(&self.superblock)
    }

    fn create_zones(&self, wal_bytes: u64) -> Op<()> {
        assert!(wal_bytes == WAL_BYTES && self.is_blank().expect("memory can be read"), "{wal_bytes}");
        self.created.store(true, Ordering::SeqCst);
        Op::ready(Ok(()))
    }

    fn zones(&self, wal_bytes: u64) -> mainstay_io::Result<(Zone, Zone)> {
        assert!(wal_bytes == WAL_BYTES, "{wal_bytes}");
        Ok((zone(&self.wal), zone(&self.extents)))
    }

    fn is_blank(&self) -> mainstay_io::Result<bool> {
        Ok(self.superblock.state().bytes.iter().all(|&b| b == 0))
    }

    fn backend(&self) -> (Backend, Option<String>) {
        (Backend::Sim, None)
    }

    fn devices(&self) -> Vec<Arc<dyn BlockDevice>> {
        vec![self.superblock.clone(), self.wal.clone(), self.extents.clone()]
    }

    fn name(&self) -> String {
        "memory".into()
    }
}

/// Counts up, so that ids differ and runs are equal.
struct Counting(Mutex<u8>);

impl Random for Counting {
    fn fill(&self, out: &mut [u8]) {
        let mut next = self.0.lock().expect("does not panic");
        *next += 1;
        out.fill(*next);
    }
}

/// Runs a task to its end in the call: every operation of the devices here completes at once.
struct Inline;

impl Spawner for Inline {
    fn spawn(&self, _: &str, task: BoxFuture<()>) -> TaskHandle {
        block_on(task);
        Box::pin(std::future::ready(()))
    }
}

pub(crate) fn environment() -> Environment {
    Environment {
        clock: Arc::new(SimClock::new(Duration::ZERO)),
        random: Arc::new(Counting(Mutex::new(0))),
        spawner: Arc::new(Inline),
    }
}
