//! The connections of the client port: HTTP/2 alone, a task each, from the socket straight to [`Front`].
//!
//! # Invariants
//! 1. A client's time limit (`grpc-timeout`) ends the wait for its answer: the request is dropped and answered with
//!    `DEADLINE_EXCEEDED`. What it proposed goes on.
//! 2. A connection beyond its limit is told to go at once ([`refuse`]), a request beyond one is answered with
//!    `RESOURCE_EXHAUSTED` before it reaches a service, or as its body outgrows what is left.
//! 3. Once `stop` is true nothing is accepted, connections are told to go, and requests under way are answered.
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
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::{Either, Ready, ready};
use h2::Reason;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tonic::Status;
use tonic::codegen::Service;
use tonic::codegen::http::{HeaderMap, Request, Response};

use crate::etcd::KvServer;
use crate::front::{Counted, Front};
use crate::limits::{Admitted, AnswerBody, Limits, Taken};

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
/// Connections that are being told to go, at most; more are closed without a word.
const REFUSALS_MAX: usize = 64;
/// Longest time for a connection to be told to go.
const REFUSAL_TIME_MAX: Duration = Duration::from_secs(1);
/// Digits of a time limit: more than eight are against the protocol.
const TIMEOUT_DIGITS_MAX: usize = 8;

/// Serves connections until `stop` is true, and then until the last has ended. Dropped, it cuts them off.
pub(crate) async fn serve(
    listener: TcpListener,
    front: Front<KvServer>,
    limits: Arc<Limits>,
    stop: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let mut refusals = JoinSet::new();
    // Of many refusals in a row one is logged.
    let mut is_full = false;
    let mut stopping = stop.clone();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // An error means that the sender is gone, which is a stop as well.
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        while connections.try_join_next().is_some() {}
        while refusals.try_join_next().is_some() {}
        match accepted {
            Ok((stream, _)) => match limits.connections.take_one() {
                Ok(place) => {
                    is_full = false;
                    let requests = Requests { front: front.clone(), limits: limits.clone() };
                    connections.spawn(serve_connection(stream, requests, place, stop.clone()));
                }
                Err(error) => {
                    if !is_full {
                        tracing::warn!(%error, "clients are refused");
                    }
                    is_full = true;
                    if refusals.len() < REFUSALS_MAX {
                        refusals.spawn(refuse(stream));
                    }
                }
            },
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Tells a client to go, in the words of HTTP/2.
async fn refuse(mut stream: TcpStream) {
    let telling = async {
        let mut connection = h2::server::handshake(&mut stream).await.map_err(std::io::Error::other)?;
        connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
        // It ends with the very error that it was told to send.
        let _ = std::future::poll_fn(|context| connection.poll_closed(context)).await;
        drop(connection);
        stream.shutdown().await?;
        // Closed at once, the socket would answer what the client still sends with a reset, and the client might see that alone.
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
    };
    // Whether it was heard changes nothing: the connection ends here.
    let _ = tokio::time::timeout(REFUSAL_TIME_MAX, telling).await;
}

async fn serve_connection(stream: TcpStream, requests: Requests, _place: Taken, mut stop: watch::Receiver<bool>) {
    // Answers are small and waited for.
    let _ = stream.set_nodelay(true);
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(stream), requests));
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
struct Requests {
    front: Front<KvServer>,
    limits: Arc<Limits>,
}

impl hyper::service::Service<Request<Incoming>> for Requests {
    type Response = Response<AnswerBody>;
    type Error = Infallible;
    type Future = Either<Limited, Ready<Result<Self::Response, Infallible>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let limit = time_limit(request.headers()).map(|limit| Box::pin(tokio::time::sleep(limit)));
        match self.limits.admit(request) {
            Ok((request, admitted)) => {
                let answering = self.front.clone().call(request);
                Either::Left(Limited { answering, limit, admitted: Some(admitted) })
            }
            Err(error) => {
                let answer = Status::from(error).into_http();
                Either::Right(ready(Ok(answer.map(|body| AnswerBody::new(body, None)))))
            }
        }
    }
}

/// An answer on its way, for as long as its client waits.
struct Limited {
    answering: Counted,
    limit: Option<Pin<Box<Sleep>>>,
    /// Goes on with the answer.
    admitted: Option<Arc<Admitted>>,
}

impl Future for Limited {
    type Output = Result<Response<AnswerBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = match (Pin::new(&mut self.answering).poll(context), &mut self.limit) {
            (Poll::Ready(Ok(answer)), _) => answer,
            (Poll::Pending, Some(limit)) => {
                std::task::ready!(limit.as_mut().poll(context));
                Status::deadline_exceeded("context deadline exceeded").into_http()
            }
            (Poll::Pending, None) => return Poll::Pending,
        };
        let admitted = self.admitted.take();
        Poll::Ready(Ok(answer.map(|body| AnswerBody::new(body, admitted))))
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
