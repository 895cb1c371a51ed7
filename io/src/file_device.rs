//! The device over an opened file: checks and admits operations and hands them to its backend.

use std::sync::Arc;
use std::time::Duration;

use crate::file::OpenFile;
use crate::gate::Gate;
use crate::request::{Body, Executor, Request, refused};
use crate::transfer::IO_BYTES_MAX;
use crate::{
    AlignedBuf, AlignedBytes, BLOCK_BYTES, Backend, BlockDevice, BoxFuture, Error, ErrorKind, Geometry, IoClass, Op,
    Result, WriteMode,
};

const BLOCK: u64 = BLOCK_BYTES as u64;

/// A file or block device served by a ring or by threads.
pub(crate) struct FileDevice {
    geometry: Geometry,
    gate: Arc<Gate>,
    executor: Arc<dyn Executor>,
    name: String,
}

impl FileDevice {
    /// A device over `file`; `fallback_reason` says why it is not the backend that was asked for.
    pub(crate) fn over(
        file: Arc<OpenFile>,
        backend: Backend,
        executor: Arc<dyn Executor>,
        fallback_reason: Option<String>,
    ) -> Arc<dyn BlockDevice> {
        let reasons: Vec<_> = fallback_reason.as_deref().into_iter().chain(file.buffered()).collect();
        let geometry = Geometry {
            capacity: file.capacity(),
            io_bytes_max: IO_BYTES_MAX,
            backend,
            direct: file.buffered().is_none(),
            fallback_reason: (!reasons.is_empty()).then(|| reasons.join("; ")),
        };
        let name = file.path().display().to_string();
        Arc::new(Self { geometry, gate: Gate::new(file), executor, name })
    }

    fn check(&self, op: &'static str, offset: u64, length: u64) -> Result<()> {
        if !offset.is_multiple_of(BLOCK) || !length.is_multiple_of(BLOCK) {
            let message = format!("offset and length must be multiples of {BLOCK_BYTES}");
            return Err(Error::new(ErrorKind::Misaligned, op, offset, length, message));
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.geometry.capacity => Ok(()),
            _ => {
                let message = format!("{} ends at {}", self.name, self.geometry.capacity);
                Err(Error::new(ErrorKind::OutOfRange, op, offset, length, message))
            }
        }
    }

    fn start<T>(
        &self,
        op: &'static str,
        (offset, length, changes): (u64, u64, bool),
        class: IoClass,
        body: impl FnOnce(crate::Completer<T>) -> Body,
    ) -> Op<T> {
        self.prepare(op, (offset, length, changes), class, body, |request| self.executor.submit(request))
    }

    /// Checks and admits an operation, and hands it to who runs it.
    fn prepare<T>(
        &self,
        op: &'static str,
        (offset, length, changes): (u64, u64, bool),
        class: IoClass,
        body: impl FnOnce(crate::Completer<T>) -> Body,
        run: impl FnOnce(Request),
    ) -> Op<T> {
        match self.check(op, offset, length).and_then(|()| self.gate.enter(op, offset, length, changes)) {
            Ok(ticket) => {
                let (pending, done) = Op::pending();
                run(Request { ticket, class, body: body(done) });
                pending
            }
            Err(e) => refused(e),
        }
    }

    fn prepare_write(
        &self,
        offset: u64,
        bufs: Vec<AlignedBytes>,
        mode: WriteMode,
        class: IoClass,
        run: impl FnOnce(Request),
    ) -> Op<()> {
        let length = bufs.iter().map(|b| b.len() as u64).sum();
        if !bufs.iter().all(AlignedBytes::is_aligned) {
            let message = format!("every buffer must begin and end at a multiple of {BLOCK_BYTES}");
            return refused(Error::new(ErrorKind::Misaligned, "write", offset, length, message));
        }
        self.prepare("write", (offset, length, true), class, |done| Body::Write { offset, bufs, mode, done }, run)
    }
}

impl BlockDevice for FileDevice {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read(&self, offset: u64, buf: AlignedBuf, class: IoClass) -> Op<AlignedBuf> {
        let range = (offset, buf.len() as u64, false);
        self.start("read", range, class, |done| Body::Read { offset, buf, done })
    }

    fn read_many(&self, reads: Vec<(u64, AlignedBuf)>, class: IoClass) -> Vec<Op<AlignedBuf>> {
        let mut started = Vec::with_capacity(reads.len());
        let mut requests = Vec::with_capacity(reads.len());
        for (offset, buf) in reads {
            let length = buf.len() as u64;
            let admitted = self.check("read", offset, length).and_then(|()| {
                self.gate.try_enter("read", offset, length).unwrap_or_else(|| {
                    self.executor.submit_reads(std::mem::take(&mut requests));
                    self.gate.enter("read", offset, length, false)
                })
            });
            started.push(match admitted {
                Ok(ticket) => {
                    let (pending, done) = Op::pending();
                    requests.push(Request { ticket, class, body: Body::Read { offset, buf, done } });
                    pending
                }
                Err(e) => refused(e),
            });
        }
        if !requests.is_empty() {
            self.executor.submit_reads(requests);
        }
        started
    }

    fn write(&self, offset: u64, bufs: Vec<AlignedBytes>, mode: WriteMode, class: IoClass) -> Op<()> {
        self.prepare_write(offset, bufs, mode, class, |request| self.executor.submit(request))
    }

    fn write_here(&self, offset: u64, bufs: Vec<AlignedBytes>, mode: WriteMode, class: IoClass) -> Op<()> {
        self.prepare_write(offset, bufs, mode, class, Request::run)
    }

    fn flush(&self) -> Op<()> {
        self.start("flush", (0, 0, true), IoClass::Wal, |done| Body::Flush { done })
    }

    fn allocate(&self, offset: u64, length: u64) -> Op<()> {
        let range = (offset, length, true);
        self.start("allocate", range, IoClass::Background, |done| Body::Allocate { offset, length, done })
    }

    fn discard(&self, offset: u64, length: u64) -> Op<()> {
        let range = (offset, length, true);
        self.start("discard", range, IoClass::Background, |done| Body::Discard { offset, length, done })
    }

    fn run_resident(&self, name: &str, task: BoxFuture<()>) {
        if let Some(ticket) = self.gate.enter_resident() {
            self.executor.resident(name, task, ticket);
        }
    }

    fn poisoned(&self) -> Option<Error> {
        self.gate.poisoned()
    }

    fn shutdown(&self, grace: Duration) -> Op<()> {
        self.gate.close();
        if self.gate.drain(Duration::ZERO) == (0, 0) {
            return Op::ready(Ok(()));
        }
        let (op, done) = Op::pending();
        let (gate, executor) = (self.gate.clone(), self.executor.clone());
        let wait = move || {
            let left = gate.drain(grace);
            if left == (0, 0) {
                return done.complete(Ok(()));
            }
            executor.abandon(&gate);
            let message = format!(
                "the grace of {grace:?} has passed; buffers still in flight are kept for good operations={} residents={}",
                left.0, left.1
            );
            done.complete(Err(Error::new(ErrorKind::Closed, "shutdown", 0, 0, message)));
        };
        // Without a thread the completer is dropped, which answers `Closed`.
        if let Err(e) = std::thread::Builder::new().name("io-shutdown".to_owned()).spawn(wait) {
            tracing::error!(error = %e, "no thread to wait for operations in flight");
        }
        op
    }
}

impl Drop for FileDevice {
    /// Operations in flight keep the file open until they have ended.
    fn drop(&mut self) {
        self.gate.close();
    }
}
