//! The service behind the client port: hands a request to the service that its path names and counts it.
//!
//! # Place
//! Between the HTTP/2 connections of `serve` and the generated services.
//!
//! # Why not
//! one axum router for all, which tonic makes by default: it matches a tree of paths and boxes a service, a body and a future
//! for each request, several times where there are layers. The KV service takes nearly all requests, so its path is looked
//! at first and its service is called as it is.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tonic::service::Routes;

use crate::metrics::{Counting, Metrics};

type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// See the module.
#[derive(Clone)]
pub(crate) struct Front<K> {
    kv: K,
    others: Routes,
    metrics: Arc<Metrics>,
}

impl<K> Front<K> {
    pub(crate) fn new(kv: K, others: Routes, metrics: Arc<Metrics>) -> Self {
        Self { kv, others: others.prepare(), metrics }
    }
}

impl<K> Service<Request<Body>> for Front<K>
where
    K: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answering> + NamedService,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Counted;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Generated services and routes are always ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Counted {
        let counting = self.metrics.begin(request.uri().path());
        let is_kv = request.uri().path().strip_prefix('/').and_then(|path| path.strip_prefix(K::NAME));
        let answering = match is_kv {
            Some(method) if method.starts_with('/') => self.kv.call(request),
            _ => Box::pin(self.others.call(request)),
        };
        Counted { answering, counting: Some(counting) }
    }
}

/// An answer on its way, counted when its head is there. Dropped before, as when the client goes, it is not counted.
pub(crate) struct Counted {
    answering: Answering,
    counting: Option<Counting>,
}

impl Future for Counted {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answered = self.answering.as_mut().poll(context);
        if let Poll::Ready(Ok(response)) = &answered
            && let Some(counting) = self.counting.take()
        {
            counting.end(response.status(), response.headers());
        }
        answered
    }
}
