//! A zone: one part of a volume, a file of its own or a range of a raw device.

use std::fmt;

use crate::device::DeviceRef;
use crate::{AlignedBuf, AlignedBytes, BlockDevice, Error, ErrorKind, IoClass, Op, WriteMode};

/// A range of a device with addresses that begin at zero.
///
/// The same bytes stand at the same zone offset in a directory and on a raw device; only the map differs.
#[derive(Clone)]
pub struct Zone {
    device: DeviceRef,
    base: u64,
    length: u64,
}

impl Zone {
    /// The `length` bytes of `device` from `base`.
    pub fn new(device: DeviceRef, base: u64, length: u64) -> Self {
        Self { device, base, length }
    }

    /// Bytes that can be addressed.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The device underneath.
    pub fn device(&self) -> &dyn BlockDevice {
        &*self.device
    }

    /// See [`BlockDevice::read`].
    pub fn read(&self, offset: u64, buf: AlignedBuf, class: IoClass) -> Op<AlignedBuf> {
        match self.locate("read", offset, buf.len() as u64) {
            Ok(at) => self.device.read(at, buf, class),
            Err(e) => Op::ready(Err(e)),
        }
    }

    /// See [`BlockDevice::read_many`].
    pub fn read_many(&self, reads: Vec<(u64, AlignedBuf)>, class: IoClass) -> Vec<Op<AlignedBuf>> {
        let located: Vec<_> =
            reads.iter().map(|(offset, buf)| self.locate("read", *offset, buf.len() as u64)).collect();
        let inside = reads.into_iter().zip(&located).filter_map(|((_, buf), at)| Some((*at.as_ref().ok()?, buf)));
        let mut started = self.device.read_many(inside.collect(), class).into_iter();
        let answer = |at: Result<u64, Error>| match at {
            Ok(_) => started.next().expect("a device answers every read"),
            Err(e) => Op::ready(Err(e)),
        };
        located.into_iter().map(answer).collect()
    }

    /// See [`BlockDevice::write`].
    pub fn write(&self, offset: u64, bufs: Vec<AlignedBytes>, mode: WriteMode, class: IoClass) -> Op<()> {
        let length = bufs.iter().map(|b| b.len() as u64).sum();
        match self.locate("write", offset, length) {
            Ok(at) => self.device.write(at, bufs, mode, class),
            Err(e) => Op::ready(Err(e)),
        }
    }

    /// See [`BlockDevice::write_here`].
    pub fn write_here(&self, offset: u64, bufs: Vec<AlignedBytes>, mode: WriteMode, class: IoClass) -> Op<()> {
        let length = bufs.iter().map(|b| b.len() as u64).sum();
        match self.locate("write", offset, length) {
            Ok(at) => self.device.write_here(at, bufs, mode, class),
            Err(e) => Op::ready(Err(e)),
        }
    }

    /// See [`BlockDevice::flush`].
    pub fn flush(&self) -> Op<()> {
        self.device.flush()
    }

    /// See [`BlockDevice::allocate`].
    pub fn allocate(&self, offset: u64, length: u64) -> Op<()> {
        match self.locate("allocate", offset, length) {
            Ok(at) => self.device.allocate(at, length),
            Err(e) => Op::ready(Err(e)),
        }
    }

    /// See [`BlockDevice::discard`].
    pub fn discard(&self, offset: u64, length: u64) -> Op<()> {
        match self.locate("discard", offset, length) {
            Ok(at) => self.device.discard(at, length),
            Err(e) => Op::ready(Err(e)),
        }
    }

    fn locate(&self, op: &'static str, offset: u64, length: u64) -> Result<u64, Error> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length => Ok(self.base + offset),
            _ => Err(Error::new(ErrorKind::OutOfRange, op, offset, length, format!("zone ends at {}", self.length))),
        }
    }
}

impl fmt::Debug for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Zone").field("base", &self.base).field("length", &self.length).finish_non_exhaustive()
    }
}
