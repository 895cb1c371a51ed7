//! What a test puts between a node and its sockets.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mainstay_io::BoxFuture;

use super::cluster::Wrap;
use crate::network::{method, read_append};
use crate::{
    Envelope, Error, ErrorKind, Handler, Hello, NodeId, PeerAddress, Result, TcpTransport, TokioRuntime, Transport,
};

/// A request on its way out.
pub(super) struct Outbound {
    pub(super) address: PeerAddress,
    expect: Option<NodeId>,
    pub(super) request: Envelope,
    timeout: Duration,
}

impl Outbound {
    /// Whether it is an append that carries entries.
    pub(super) fn has_entries(&self) -> bool {
        let append = matches!(self.request.method, method::APPEND | method::APPEND_IN_TURN);
        append && read_append::<TokioRuntime>(&self.request.body).is_ok_and(|(append, _)| !append.entries.is_empty())
    }

    /// Lets it go as it is.
    pub(super) fn send(self, tcp: &TcpTransport) -> BoxFuture<Result<Envelope>> {
        tcp.call(self.address, self.expect, self.request, self.timeout)
    }
}

/// Decides what becomes of requests.
pub(super) trait Disturb: Clone + Send + Sync + 'static {
    /// Sends `request` through `tcp`, or does not.
    fn call(&self, tcp: &TcpTransport, request: Outbound) -> BoxFuture<Result<Envelope>>;
}

/// Refuses the requests that `which` names while it is switched on; everything else goes through.
#[derive(Clone)]
pub(super) struct Refuse {
    which: fn(&Outbound) -> bool,
    on: Arc<AtomicBool>,
}

impl Refuse {
    pub(super) fn new(which: fn(&Outbound) -> bool) -> Self {
        Self { which, on: Arc::default() }
    }

    pub(super) fn set(&self, on: bool) {
        self.on.store(on, Ordering::Release);
    }
}

impl Disturb for Refuse {
    fn call(&self, tcp: &TcpTransport, outbound: Outbound) -> BoxFuture<Result<Envelope>> {
        if self.on.load(Ordering::Acquire) && (self.which)(&outbound) {
            return Box::pin(async { Err(Error::new(ErrorKind::Unavailable, "refused by the test")) });
        }
        outbound.send(tcp)
    }
}

struct Disturbed<D> {
    tcp: TcpTransport,
    by: D,
}

/// For [`super::cluster::Cluster::wrap`].
pub(super) fn disturbed(by: impl Disturb) -> Wrap {
    Arc::new(move |tcp| Arc::new(Disturbed { tcp, by: by.clone() }))
}

impl<D: Disturb> Transport for Disturbed<D> {
    fn serve(&self, hello: Hello, handler: Arc<dyn Handler>) {
        self.tcp.serve(hello, handler);
    }

    fn call(
        &self,
        address: PeerAddress,
        expect: Option<NodeId>,
        request: Envelope,
        timeout: Duration,
    ) -> BoxFuture<Result<Envelope>> {
        self.by.call(&self.tcp, Outbound { address, expect, request, timeout })
    }

    fn local_address(&self) -> PeerAddress {
        self.tcp.local_address()
    }

    fn close(&self) -> BoxFuture<()> {
        self.tcp.close()
    }
}
