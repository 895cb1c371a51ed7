//! Measures the devices of a volume by themselves: durable appends as the log makes them, and random reads.
//!
//! ```text
//! cargo run --release -p mainstay-io --example device_latency -- PATH [uring|threads] [OPERATIONS]
//! ```
//!
//! PATH is a directory, or a block device or file that may be overwritten; what it held is lost only if it was blank.

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use mainstay_io::sim::SimRandom;
use mainstay_io::{
    AlignedBuf, BackendChoice, IoClass, MediaOptions, Op, Target, WriteMode, Zone, block_on, create_media,
};

const WAL_BYTES: u64 = 64 << 20;
const DATA_BYTES: u64 = 256 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = PathBuf::from(args.next().ok_or("usage: device_latency PATH [uring|threads] [OPERATIONS]")?);
    let backend = match args.next().as_deref() {
        Some("uring") => BackendChoice::Uring,
        Some("threads") => BackendChoice::Threads,
        _ => BackendChoice::Auto,
    };
    let operations = args.next().map_or(Ok(20_000), |n| n.parse())?;
    let is_device = path.exists() && !path.is_dir();
    let target = if is_device { Target::Device(path) } else { Target::Directory(path) };
    let media = create_media(&target, &MediaOptions { backend })?;
    if media.is_blank()? {
        media.create_zones(WAL_BYTES).wait()?;
    }
    let (wal, extents) = media.zones(WAL_BYTES)?;
    println!("backend {:?}", media.backend());

    // As the log does: from the task that lives where its completions arrive.
    for depth in [1, 4] {
        let (wal_zone, (ended, end)) = (wal.clone(), Op::pending());
        let task = async move { end.complete(Ok(append(&wal_zone, operations, depth).await)) };
        if depth == 1 {
            let times = block_on(append(&wal, operations, 1));
            report("durable 4 KiB, from another thread, depth 1", times);
        }
        wal.device().run_resident("log", Box::pin(task));
        report(&format!("durable 4 KiB, resident, depth {depth}"), ended.wait()?);
    }

    let chunk = AlignedBuf::copy_from(&vec![7; 1 << 20]).freeze();
    extents.allocate(0, DATA_BYTES).wait()?;
    for offset in (0..DATA_BYTES).step_by(1 << 20) {
        extents.write(offset, vec![chunk.clone()], WriteMode::Cached, IoClass::Background).wait()?;
    }
    extents.flush().wait()?;
    for depth in [1, 16, 64] {
        report(&format!("random 4 KiB read, depth {depth}"), reads(&extents, operations, depth));
    }
    for device in media.devices() {
        device.shutdown(Duration::from_secs(10)).wait()?;
    }
    Ok(())
}

/// Keeps `depth` durable writes in flight, in order; the time of each.
async fn append(wal: &Zone, operations: usize, depth: usize) -> (Vec<Duration>, Duration) {
    let block = AlignedBuf::copy_from(&[5; 4096]).freeze();
    let mut flying = std::collections::VecDeque::new();
    let mut times = Vec::with_capacity(operations);
    let begin = Instant::now();
    for n in 0..operations as u64 {
        let offset = n * 4096 % WAL_BYTES;
        flying.push_back((Instant::now(), wal.write(offset, vec![block.clone()], WriteMode::Durable, IoClass::Wal)));
        if flying.len() == depth {
            let (started, op) = flying.pop_front().expect("depth is above zero");
            op.await.expect("durable");
            times.push(started.elapsed());
        }
    }
    for (started, op) in flying {
        op.await.expect("durable");
        times.push(started.elapsed());
    }
    (times, begin.elapsed())
}

fn reads(extents: &Zone, operations: usize, depth: usize) -> (Vec<Duration>, Duration) {
    let random = SimRandom::new(1);
    let begin = Instant::now();
    let one = || {
        let offset = random.below(DATA_BYTES / 4096) * 4096;
        (Instant::now(), extents.read(offset, AlignedBuf::zeroed(4096), IoClass::Foreground))
    };
    let mut flying: std::collections::VecDeque<_> = (0..depth).map(|_| one()).collect();
    let mut times = Vec::with_capacity(operations);
    while times.len() < operations {
        let (started, op) = flying.pop_front().expect("depth is above zero");
        op.wait().expect("read");
        times.push(started.elapsed());
        flying.push_back(one());
    }
    (times, begin.elapsed())
}

fn report(what: &str, (mut times, total): (Vec<Duration>, Duration)) {
    times.sort_unstable();
    let rate = times.len() as f64 / total.as_secs_f64();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_micros();
    println!("{what:45} {rate:9.0}/s  p50 {:5} us  p99 {:6} us", at(0.5), at(0.99));
}
