//! Tests of the log on a device in memory.

mod check;
mod device;
mod faults;
mod format;
mod holes;
mod model;
mod recovery;
mod turn;
mod writing;

use std::sync::{Arc, Mutex};

use bytes::Bytes;

use self::device::{MemDevice, environment};
use crate::{ErrorKind, GroupId, Lsn, Record, RecordKind, RecordPos, Recovery, Reserve, Result, Wal, WalOptions};

pub(crate) const VOLUME: [u8; 16] = *b"volume-of-a-test";
pub(crate) const KIB: usize = 1024;
pub(crate) const MIB: usize = 1024 * KIB;

/// A log on a device in memory, and what its last open delivered.
pub(crate) struct Bench {
    pub(crate) device: Arc<MemDevice>,
    pub(crate) wal: Wal,
    pub(crate) recovery: Recovery,
    pub(crate) delivered: Vec<(GroupId, RecordKind, RecordPos, Bytes)>,
}

pub(crate) fn options(epoch: u64) -> WalOptions {
    WalOptions::new(VOLUME, epoch, Lsn(0), None)
}

impl Bench {
    pub(crate) fn open(image: Vec<u8>, options: WalOptions) -> Result<Self> {
        Self::open_on(MemDevice::new(image), options)
    }

    /// On a device that does not give the blocks at `unread`.
    pub(crate) fn open_without(image: Vec<u8>, unread: &[usize], options: WalOptions) -> Result<Self> {
        let device = MemDevice::new(image);
        unread.iter().for_each(|offset| device.fail_reads(*offset, usize::MAX));
        Self::open_on(device, options)
    }

    pub(crate) fn open_on(device: Arc<MemDevice>, options: WalOptions) -> Result<Self> {
        let mut delivered = Vec::new();
        let mut deliver = |group, kind, pos, payload| {
            delivered.push((group, kind, pos, payload));
            Ok(())
        };
        let opened = device.run(Wal::open(device.zone(), environment(), options, &mut deliver));
        opened.map(|(wal, recovery)| Self { device, wal, recovery, delivered })
    }

    pub(crate) fn blank(bytes: usize) -> Self {
        Self::open(vec![0; bytes], options(1)).expect("a ring of zeroes is an empty log")
    }

    /// As after a crash that loses what the device had not completed.
    pub(crate) fn crash(self, epoch: u64) -> Self {
        let start = self.wal.start();
        Self::open(self.device.image(), WalOptions { start, ..options(epoch) }).expect("the log opens after a crash")
    }

    pub(crate) fn append(&self, payload: &[u8]) -> Outcome {
        self.append_as(payload, Reserve::Normal)
    }

    /// Gives the device three batches, of which the last has two records, as many as those before it. Holds them.
    pub(crate) fn three_in_flight(&self, first: usize, bytes: usize) -> Vec<Outcome> {
        self.device.hold(true);
        let outcomes = [1, 1, 2].into_iter().flat_map(|records| {
            let outcomes: Vec<Outcome> = (0..records).map(|i| self.append(&payload(first + i, bytes))).collect();
            self.device.turn();
            outcomes
        });
        let outcomes = outcomes.collect();
        assert_eq!(self.device.held().len(), 3);
        outcomes
    }

    pub(crate) fn append_as(&self, payload: &[u8], reserve: Reserve) -> Outcome {
        let outcome = Outcome::default();
        self.wal.append(record(payload), reserve, outcome.setter());
        outcome
    }

    /// Appends and waits; each call is a batch of its own.
    pub(crate) fn commit(&self, payload: &[u8]) -> Result<RecordPos> {
        self.device.run(self.wal.append_wait(record(payload), Reserve::Normal))
    }

    pub(crate) fn payloads(&self) -> Vec<Vec<u8>> {
        self.delivered.iter().map(|(_, _, _, payload)| payload.to_vec()).collect()
    }
}

pub(crate) fn record(payload: &[u8]) -> Record {
    Record { group: GroupId(7), kind: RecordKind(32), payload: vec![Bytes::copy_from_slice(payload)] }
}

/// What a callback said.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome(Arc<Mutex<Option<Result<RecordPos, ErrorKind>>>>);

impl Outcome {
    pub(crate) fn setter(&self) -> crate::OnDurable {
        let slot = self.0.clone();
        Box::new(move |result| {
            let old = slot.lock().expect("callbacks do not panic").replace(result.map_err(|e| e.kind()));
            assert!(old.is_none(), "a record is answered once");
        })
    }

    pub(crate) fn get(&self) -> Option<Result<RecordPos, ErrorKind>> {
        *self.0.lock().expect("callbacks do not panic")
    }
}

/// Distinct payloads.
pub(crate) fn payload(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(31) ^ seed.wrapping_mul(97) ^ (i >> 8)) as u8).collect()
}
