//! The connections of the client port: HTTP/2 alone, a task each, from the socket straight to [`Front`].
//!
//! # Invariants
//! 1. A client's time limit (`grpc-timeout`) ends the wait for its answer: the request is dropped and answered with
//!    `DEADLINE_EXCEEDED`. What it proposed goes on.
//! 2. Once `stop` is true nothing is accepted, connections are told to go, and requests under way are answered.
//!
//! # Why not
//! tonic's own server: around each request it puts a boxed service and layers for limits, spans and errors that nothing here
//! asks for, and made of them a tenth of what a put cost the leader.
//!
//! # Sources
//! gRPC over HTTP/2, "Request-Headers", for the form of `grpc-timeout`.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{HeaderMap, Request, Response};

use crate::etcd::KvServer;
use crate::front::{Counted, Front};

/// Requests in flight on one connection.
const STREAMS_MAX: u32 = 4096;
/// An idle connection is asked whether it lives.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A connection that does not answer is closed.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Bytes on the way on one connection before the reader has taken them.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// Bytes on the way on one request.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Pause after a connection could not be accepted: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Digits of a time limit: more than eight are against the protocol.
const TIMEOUT_DIGITS_MAX: usize = 8;

/// Serves connections until `stop` is true, and then until the last has ended. Dropped, it cuts them off.
pub(crate) async fn serve(listener: TcpListener, front: Front<KvServer>, stop: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    let mut stopping = stop.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // An error means that the sender is gone, which is a stop as well.
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) => {
                connections.spawn(serve_connection(stream, front.clone(), stop.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn serve_connection(stream: TcpStream, front: Front<KvServer>, mut stop: watch::Receiver<bool>) {
    // Answers are small and waited for.
    let _ = stream.set_nodelay(true);
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), Requests(front)));
    let mut told = false;
    loop {
        tokio::select! {
            ended = &mut connection => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "the connection of a client ended");
                }
                return;
            }
            _ = stop.wait_for(|stop| *stop), if !told => {
                told = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// The requests of one connection.
struct Requests(Front<KvServer>);

impl hyper::service::Service<Request<Incoming>> for Requests {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Limited;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let limit = time_limit(request.headers()).map(|limit| Box::pin(tokio::time::sleep(limit)));
        Limited { answering: self.0.clone().call(request.map(Body::new)), limit }
    }
}

/// An answer on its way, for as long as its client waits.
struct Limited {
    answering: Counted,
    limit: Option<Pin<Box<Sleep>>>,
}

impl Future for Limited {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(answer) = Pin::new(&mut self.answering).poll(context) {
            return Poll::Ready(answer);
        }
        match &mut self.limit {
            Some(limit) => {
                std::task::ready!(limit.as_mut().poll(context));
                Poll::Ready(Ok(Status::deadline_exceeded("context deadline exceeded").into_http()))
            }
            None => Poll::Pending,
        }
    }
}

/// How long the client waits: up to eight digits and a unit. What is malformed is no limit.
fn time_limit(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > TIMEOUT_DIGITS_MAX || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_limit_is_digits_and_a_unit() {
        let check = |value: &str, expect: Option<Duration>| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", value.parse().expect("a header"));
            assert_eq!(time_limit(&headers), expect, "{value:?}");
        };
        assert_eq!(time_limit(&HeaderMap::new()), None);
        check("2H", Some(Duration::from_secs(7200)));
        check("3M", Some(Duration::from_secs(180)));
        check("5S", Some(Duration::from_secs(5)));
        check("4999m", Some(Duration::from_millis(4999)));
        check("7u", Some(Duration::from_micros(7)));
        check("99999999n", Some(Duration::from_nanos(99_999_999)));
        check("99999999H", Some(Duration::from_secs(99_999_999 * 3600)));
        for malformed in ["", "S", "5", "5s", "123456789S", "-1S", "+1S", "1.5S", "5é", " 5S"] {
            if let Ok(value) = tonic::codegen::http::HeaderValue::from_bytes(malformed.as_bytes()) {
                let mut headers = HeaderMap::new();
                headers.insert("grpc-timeout", value);
                assert_eq!(time_limit(&headers), None, "{malformed:?}");
            }
        }
    }
}
