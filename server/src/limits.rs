//! How much clients may have of this process at once: connections, requests, open streams, and bytes of requests; and how much data
//! its volume may hold.
//!
//! # Place
//! `connections` takes from the quotas before anything is done for a client; `metrics` shows them. Peers, admin and metrics
//! take nothing.
//!
//! # Invariants
//! 1. What does not fit is refused at once: nobody waits for a quota.
//! 2. What was taken is given back when its holder is dropped, whatever ended it.
//! 3. A stream takes nothing from the requests: however many watches are open, requests go on.
//!
//! # Why not
//! - a semaphore: it is there for those who wait (1), and takes a lock each time that something is given back.
//! - HTTP/2's own bound of streams: a client above it waits without a word, and it is one connection's alone.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::Request;

use crate::settings::ServeSettings;

/// Calls that last for as long as their client likes.
const STREAMS: [&str; 3] =
    ["/etcdserverpb.Watch/Watch", "/etcdserverpb.Lease/LeaseKeepAlive", "/etcdserverpb.Maintenance/Snapshot"];
/// Open files that clients leave to the volume, the peers and the other ports.
const FILES_RESERVED: u64 = 256;

/// More was asked for than a setting allows.
#[derive(Debug, thiserror::Error)]
#[error("too many {what} setting={setting} limit={limit}")]
pub(crate) struct OverLimit {
    what: &'static str,
    setting: &'static str,
    limit: u64,
}

impl From<OverLimit> for Status {
    fn from(error: OverLimit) -> Self {
        Status::resource_exhausted(format!("mainstay: {error}"))
    }
}

/// A count with a bound.
#[derive(Debug)]
pub(crate) struct Quota {
    what: &'static str,
    setting: &'static str,
    limit: u64,
    in_use: AtomicU64,
    refused: AtomicU64,
}

impl Quota {
    pub(crate) fn new(what: &'static str, setting: &'static str, limit: u64) -> Arc<Self> {
        Arc::new(Self { what, setting, limit, in_use: AtomicU64::new(0), refused: AtomicU64::new(0) })
    }

    /// Takes one.
    pub(crate) fn take_one(self: &Arc<Self>) -> Result<Taken, OverLimit> {
        let taken = Taken::nothing_of(self);
        taken.take(1)?;
        Ok(taken)
    }

    /// Of what is not taken by anybody but looked at from time to time: so much is in use now.
    pub(crate) fn observe(&self, in_use: u64) {
        self.in_use.store(in_use, Ordering::Relaxed);
    }

    /// False when no more may be added to what was last observed; counted as a refusal.
    pub(crate) fn admits(&self) -> bool {
        let admits = self.in_use() < self.limit;
        self.refused.fetch_add(u64::from(!admits), Ordering::Relaxed);
        admits
    }

    /// As [`Quota::admits`], with what to say when it does not.
    pub(crate) fn admit_more(&self) -> Result<(), OverLimit> {
        let Self { what, setting, limit, .. } = *self;
        if self.admits() { Ok(()) } else { Err(OverLimit { what, setting, limit }) }
    }

    pub(crate) fn is_reached(&self) -> bool {
        self.in_use() >= self.limit
    }

    pub(crate) fn in_use(&self) -> u64 {
        self.in_use.load(Ordering::Relaxed)
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

/// What somebody has of a quota, given back when it is dropped.
pub(crate) struct Taken {
    quota: Arc<Quota>,
    count: AtomicU64,
}

impl Taken {
    fn nothing_of(quota: &Arc<Quota>) -> Self {
        Self { quota: quota.clone(), count: AtomicU64::new(0) }
    }

    /// Takes so many more, or none.
    fn take(&self, count: u64) -> Result<(), OverLimit> {
        let Quota { what, setting, limit, in_use, refused } = &*self.quota;
        let fits = |in_use: u64| in_use.checked_add(count).filter(|in_use| in_use <= limit);
        if in_use.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_err() {
            refused.fetch_add(1, Ordering::Relaxed);
            return Err(OverLimit { what, setting, limit: *limit });
        }
        self.count.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.quota.in_use.fetch_sub(*self.count.get_mut(), Ordering::Relaxed);
    }
}

/// All quotas of the client port.
pub(crate) struct Limits {
    pub(crate) connections: Arc<Quota>,
    pub(crate) requests: Arc<Quota>,
    pub(crate) streams: Arc<Quota>,
    pub(crate) request_bytes: Arc<Quota>,
    /// Observed, not taken: what is written is stored later, and in another size.
    pub(crate) data: Arc<Quota>,
}

impl Limits {
    pub(crate) fn new(settings: &ServeSettings) -> Arc<Self> {
        Arc::new(Self {
            connections: Quota::new("connections of clients", "connections-max", settings.connections_max),
            requests: Quota::new("requests under way", "requests-max", settings.requests_max),
            streams: Quota::new("open streams", "streams-max", settings.streams_max),
            request_bytes: Quota::new("bytes of requests under way", "requests-memory", settings.requests_memory_bytes),
            data: Quota::new("bytes of data", "data-max", settings.data_bytes_max.unwrap_or(u64::MAX)),
        })
    }

    /// Lets a request in, and gives its body to whom it is for.
    pub(crate) fn admit(&self, request: Request<Incoming>) -> Result<(Request<Body>, Arc<Admitted>), OverLimit> {
        let is_stream = STREAMS.contains(&request.uri().path());
        let place = if is_stream { &self.streams } else { &self.requests }.take_one()?;
        let admitted = Arc::new(Admitted { _place: place, bytes: Taken::nothing_of(&self.request_bytes) });
        let request = request.map(|body| match is_stream {
            // Its messages are gone once they are answered, so there is nothing to add up: each stream holds one at most.
            true => Body::new(body),
            false => Body::new(RequestBody { body, admitted: admitted.clone() }),
        });
        Ok((request, admitted))
    }
}

/// What a request has of the quotas, until its answer is sent: what was decoded from its body outlives the body.
pub(crate) struct Admitted {
    _place: Taken,
    bytes: Taken,
}

/// The body of a request: its bytes are counted as they arrive.
struct RequestBody {
    body: Incoming,
    admitted: Arc<Admitted>,
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        Poll::Ready(frame.map(|frame| {
            let frame = frame.map_err(|error| Status::from_error(error.into()))?;
            self.admitted.bytes.take(frame.data_ref().map_or(0, |data| data.len() as u64))?;
            Ok(frame)
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of an answer, with what its request has of the quotas.
pub(crate) struct AnswerBody {
    body: Body,
    admitted: Option<Arc<Admitted>>,
}

impl AnswerBody {
    pub(crate) fn new(body: Body, admitted: Option<Arc<Admitted>>) -> Self {
        Self { body, admitted }
    }
}

impl HttpBody for AnswerBody {
    type Data = AnswerBytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<AnswerBytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        let counted = |bytes| AnswerBytes { bytes, _admitted: self.admitted.clone() };
        Poll::Ready(frame.map(|frame| Ok(frame?.map_data(counted))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A part of an answer. The connection takes all of it at once, however little the client reads, and drops it when it is sent.
pub(crate) struct AnswerBytes {
    bytes: Bytes,
    _admitted: Option<Arc<Admitted>>,
}

impl Buf for AnswerBytes {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}

/// Connections of clients that the files which this process may have open leave room for.
pub(crate) fn connections_possible() -> u64 {
    let files = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    files.saturating_sub(FILES_RESERVED).max(1)
}

/// Lets this process have as many open files as it may: what it begins with is often 1,024.
pub(crate) fn raise_open_files() -> std::io::Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_is_given_back_and_what_does_not_fit_takes_nothing() {
        let quota = Quota::new("bytes of requests under way", "requests-memory", 10);
        let body = Taken::nothing_of(&quota);
        body.take(4).expect("fits");
        body.take(5).expect("fits");
        let error = body.take(2).expect_err("eleven of ten");
        assert_eq!(error.to_string(), "too many bytes of requests under way setting=requests-memory limit=10");
        assert_eq!((quota.in_use(), quota.refused()), (9, 1));
        body.take(u64::MAX).expect_err("more than there is");
        let one = quota.take_one().expect("the tenth");
        assert!(quota.take_one().is_err() && quota.in_use() == 10);
        drop(body);
        assert_eq!((quota.in_use(), quota.refused()), (1, 3));
        drop(one);
        assert_eq!(quota.in_use(), 0);
    }

    /// A call that streams and is not in the list would take a place of the requests for as long as it is open.
    #[test]
    fn every_call_that_streams_is_in_the_list() {
        let mut found = Vec::new();
        for text in [include_str!("../proto/etcdserverpb.proto"), include_str!("../proto/mainstay.proto")] {
            let mut package = "";
            let mut service = "";
            for line in text.lines().map(str::trim) {
                let name = |rest: &'static str| rest.split([' ', ';', '(', '{']).next().unwrap_or_default();
                if let Some(rest) = line.strip_prefix("package ") {
                    package = name(rest);
                } else if let Some(rest) = line.strip_prefix("service ") {
                    service = name(rest);
                } else if let Some(rest) = line.strip_prefix("rpc ").filter(|rest| rest.contains("stream ")) {
                    found.push(format!("/{package}.{service}/{}", name(rest)));
                }
            }
        }
        assert_eq!(found, STREAMS);
    }
}
