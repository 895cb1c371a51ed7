//! `mainstay disk-check`: whether a disk is fit for the log, by the log's own writes.
//!
//! # Place
//! over `wal` and `io`, beside the commands on volumes: what is measured is what a replica would do there, through the same code
//! # Invariants
//! 1. Of a directory nothing is left, however the process ends: the files have no name.
//! 2. A device is written only where its caller said in as many words that what it holds may be destroyed, only while nobody else has it
//!    open for himself alone, and never when a superblock of a volume is on it, or when it has partitions, which may hold one.
//! # Why not
//! fio by itself: it needs the right one of a hundred settings, does not say what a figure means here, and not whether the disk flushed.

mod device;
mod measure;
mod patience;
mod verdict;

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mainstay_io::{Backend, Environment, Media, MediaOptions, SUPERBLOCK_ZONE_BYTES, Target, Zone};
use serde::Serialize;

use self::device::{Device, Flushes, Storage};
use self::measure::{Log, Series, Written};
use self::patience::Patience;
use self::verdict::{Facts, Verdict, judge};
use crate::cli::{DiskCheckArgs, Failure, print};
use crate::units::ByteSize;

/// The ring that the log's writes go to: as large as that of a volume by default, smaller where `--size` leaves no more.
const RING_BYTES_MAX: u64 = 64 << 20;
/// The least that can be measured: a ring and an area of extents of 4 MiB each.
const SIZE_MIN: u64 = 8 << 20;
/// The most: beyond it only the file system is filled.
const SIZE_MAX: u64 = 1 << 40;
/// What a batch of the log has when few write, and when many do.
const BATCH_BYTES: [usize; 2] = [4 << 10, 64 << 10];
/// Batches that the log has in flight unless it is told otherwise.
const IN_FLIGHT: usize = 3;
/// How long the device may take for what is in flight at the end.
const GRACE: Duration = Duration::from_secs(20);

/// What the document says.
#[derive(Debug, Serialize)]
struct Report {
    path: String,
    target: &'static str,
    backend: &'static str,
    fallback_reason: Option<String>,
    direct_io: bool,
    file_system: Option<String>,
    device: Option<Device>,
    tests: Vec<Series>,
    flushes: Flushes,
    verdict: Verdict,
    reasons: Vec<String>,
}

/// Measures, prints what was found, and fails unless the disk is fit.
pub(crate) fn run(args: &DiskCheckArgs) -> Result<(), Failure> {
    let size = args.size.0;
    if !(SIZE_MIN..=SIZE_MAX).contains(&size) || !size.is_multiple_of(1 << 20) {
        let message =
            format!("the size is whole MiB from {} to {} size={}", ByteSize(SIZE_MIN), ByteSize(SIZE_MAX), size);
        return Err(Failure::usage(message));
    }
    let ring_bytes = RING_BYTES_MAX.min(size / 2);
    let mut patience = Patience::new(Environment::system().clock);
    let place = Place::open(args, ring_bytes, size - ring_bytes, &mut patience)?;
    let report = measured(args, &place, &mut patience).and_then(|report| {
        print(args.json, &report, || report.text())?;
        Ok(report)
    });
    // Behind the report: a device that does not answer may hold this up.
    place.close();
    let report = report?;
    match report.verdict {
        Verdict::Fit => Ok(()),
        Verdict::Slow | Verdict::Unfit => Err(Failure::other(format!(
            "{} is {}: {}",
            args.path.display(),
            report.verdict.name(),
            report.reasons.join("; ")
        ))),
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::other(error.to_string())
}

/// What is written to while it is measured.
struct Place {
    target: &'static str,
    wal: Zone,
    data: Zone,
    data_bytes: u64,
    /// Keeps a device locked.
    media: Option<Arc<dyn Media>>,
}

impl Place {
    fn open(args: &DiskCheckArgs, ring_bytes: u64, data_bytes: u64, patience: &mut Patience) -> Result<Self, Failure> {
        let options = MediaOptions { backend: args.backend.into() };
        let found = std::fs::metadata(&args.path);
        let found = found.map_err(|e| Failure::usage(format!("{e} path={}", args.path.display())))?;
        let raw = found.file_type().is_block_device();
        if !raw && !found.is_dir() {
            let message = format!("neither a directory nor a block device path={}", args.path.display());
            return Err(Failure::usage(message));
        }
        if raw != args.destroy_device {
            let what = match raw {
                true => "a device is written over: say --destroy-device if what it holds may be lost",
                false => "--destroy-device is for a block device: a directory keeps what it has",
            };
            return Err(Failure::usage(format!("{what} path={}", args.path.display())));
        }
        match raw {
            true => Self::device(&args.path, ring_bytes, data_bytes, &options, patience),
            false => {
                let made = mainstay_io::open_scratch(&args.path, ring_bytes, data_bytes, &options).map_err(failed)?;
                // A full file system says nothing about its disk.
                let space = made.data.allocate(0, data_bytes);
                patience.wait("space for the tests", space).map_err(failed)?.map_err(failed)?;
                Ok(Self { target: "directory", wal: made.wal, data: made.data, data_bytes, media: None })
            }
        }
    }

    /// The ranges of a device that would be the log and the extents of a volume. Its first MiB, the superblock of one, is only read.
    fn device(
        path: &Path,
        ring_bytes: u64,
        data_bytes: u64,
        options: &MediaOptions,
        patience: &mut Patience,
    ) -> Result<Self, Failure> {
        let partitions = device::partitions(path);
        if !partitions.is_empty() {
            let (path, names) = (path.display(), partitions.join(","));
            return Err(Failure::other(format!(
                "the device has partitions: name one of them path={path} partitions={names}"
            )));
        }
        let media = mainstay_io::open_media(&Target::Device(path.to_owned()), options).map_err(failed)?;
        let holds = patience.wait("looking for a volume", mainstay_engine::holds_volume(&*media));
        if holds.map_err(failed)?.map_err(failed)? {
            let message =
                format!("the device holds a volume, or what is left of one: not touched path={}", path.display());
            return Err(Failure::other(message));
        }
        let room = media.superblock().device().geometry().capacity.saturating_sub(SUPERBLOCK_ZONE_BYTES);
        if ring_bytes + data_bytes > room {
            let (path, most) = (path.display(), ByteSize(room));
            return Err(Failure::usage(format!("the device is too small: give --size less path={path} most={most}")));
        }
        let (wal, extents) = media.zones(ring_bytes).map_err(failed)?;
        // As the format of a volume does; what was in the ring is none of the log's.
        measure::fill_with_zeroes(&wal, patience).map_err(failed)?;
        Ok(Self { target: "device", wal, data: extents, data_bytes, media: Some(media) })
    }

    fn close(self) {
        // A device that answers nothing keeps its buffers; the process ends anyway.
        for zone in [&self.wal, &self.data] {
            let _ = zone.device().shutdown(GRACE).wait();
        }
    }
}

fn measured(args: &DiskCheckArgs, place: &Place, patience: &mut Patience) -> Result<Report, Failure> {
    let geometry = place.wal.device().geometry();
    let storage = Storage::of(&args.path);
    // Half of the time for the figure that decides, the rest for the others in equal parts.
    let half = Duration::from_secs(u64::from(args.seconds)) / 2;
    let eighth = half / 4;

    let mut findings = Findings::default();
    let log = Log::open(place.wal.clone(), patience).map_err(Failure::other)?;
    let before = storage.counts();
    let alone = findings.take(log.write(BATCH_BYTES[0], half, patience));
    let flushes = storage.flushes(before, storage.counts(), alone.map_or(0, |series| series.ops));
    let durable = alone.map(|series| (series.p99, series.max));
    // A disk that failed is not asked again: it may not even answer.
    if alone.is_some() && findings.take(log.write(BATCH_BYTES[1], eighth, patience)).is_some() {
        log.close(patience);
        let mut written = Written::default();
        let whole = findings
            .take(measure::write_durably(&place.wal, BATCH_BYTES[0], IN_FLIGHT, eighth, patience))
            .and_then(|_| findings.take(written.write(&place.data, place.data_bytes, eighth, patience)))
            .and_then(|_| findings.take(written.read(&place.data, eighth, patience)));
        if whole.is_some() && place.media.is_some() {
            // What was measured with means nothing to who has the device next.
            findings.failures.extend(measure::fill_with_zeroes(&place.wal, patience).err());
        }
    }
    let Findings { tests, failures } = findings;
    let (verdict, reasons) = judge(&Facts {
        failures,
        durable,
        in_memory: storage.in_memory.clone(),
        flushes: flushes.finding,
        direct_io: geometry.direct,
    });
    Ok(Report {
        path: args.path.display().to_string(),
        target: place.target,
        backend: match geometry.backend {
            Backend::Uring => "io_uring",
            Backend::Threads => "threads",
            Backend::Sim => "simulation",
        },
        fallback_reason: geometry.fallback_reason.clone(),
        direct_io: geometry.direct,
        file_system: storage.file_system,
        device: storage.device,
        tests,
        flushes,
        verdict,
        reasons,
    })
}

/// What the tests gave so far.
#[derive(Default)]
struct Findings {
    tests: Vec<Series>,
    failures: Vec<String>,
}

impl Findings {
    fn take(&mut self, series: Result<Series, String>) -> Option<Key> {
        match series {
            Ok(series) => {
                let key = Key { ops: series.ops, p99: series.p99, max: series.max };
                self.tests.push(series);
                Some(key)
            }
            Err(failure) => {
                self.failures.push(failure);
                None
            }
        }
    }
}

/// What of a test decides.
#[derive(Clone, Copy)]
struct Key {
    ops: u64,
    p99: Duration,
    max: Duration,
}

impl Report {
    fn text(&self) -> String {
        let direct = if self.direct_io { "O_DIRECT works" } else { "O_DIRECT does not work" };
        let system = self.file_system.as_deref().map(|name| format!(" on {name}")).unwrap_or_default();
        let mut text = format!("{}: {}{system}, served by {}, {direct}\n", self.path, self.target, self.backend);
        if let Some(reason) = &self.fallback_reason {
            text += &format!("  {reason}\n");
        }
        if let Some(device) = &self.device {
            text += &format!("{}\n", device.line());
        }
        text += &format!(
            "{:<18} {:>8} {:>9} {:>9} {:>12} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
            "test", "size", "in flight", "IOPS", "BW", "lat: avg", "p50", "p99", "p99.9", "max us"
        );
        text.extend(self.tests.iter().map(Series::line));
        text += &format!("flushes: {}\n", self.flushes.says);
        for reason in &self.reasons {
            text += &format!("  {reason}\n");
        }
        text + &format!("verdict: {}\n", self.verdict.name())
    }
}
