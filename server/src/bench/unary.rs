//! Requests with one message each way over one HTTP/2 connection, as gRPC has them: what a load needs and no more.
//!
//! # Place
//! under the clients of `mainstay bench`; over h2
//!
//! # Why not
//! tonic's client, with or without its channel: around a request it puts a task for the body, boxed bodies and futures, and maps
//! of metadata, which cost more than half of what the whole request costs here. Where client and servers share a machine that
//! time is taken from what is measured, and the more of it the faster the server is.
//!
//! # Sources
//! "gRPC over HTTP2", the protocol's own description: requests, responses, and the prefix of a message.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use prost::Message;
use tokio::net::TcpStream;
use tonic::codegen::http::{HeaderMap, HeaderValue, Method, Request, Uri, header};
use tonic::{Code, Status};

use crate::cli::Failure;

/// What stands before a message: whether it is compressed, and its length in four bytes.
const PREFIX_BYTES: usize = 5;
/// Bytes on the way on one request before the client has taken them.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Bytes on the way on the connection.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A connection on which requests go out as they come. Cloning gives another handle.
#[derive(Clone)]
pub(super) struct Connection {
    requests: SendRequest<Bytes>,
    address: String,
}

/// One method of a service, with what every request of it carries.
pub(super) struct Route {
    uri: Uri,
    headers: HeaderMap,
}

impl Connection {
    /// Connects to `HOST:PORT`.
    ///
    /// # Errors
    /// Nobody listens there, speaks HTTP/2, or answers in time.
    pub(super) async fn open(address: &str, timeout: Duration) -> Result<Self, Failure> {
        let failed = |e: &dyn std::fmt::Display| Failure::other(format!("no connection: {e} address={address}"));
        let connecting = async {
            let stream = TcpStream::connect(address).await.map_err(|e| failed(&e))?;
            stream.set_nodelay(true)?;
            let mut builder = h2::client::Builder::new();
            builder
                .initial_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .enable_push(false);
            builder.handshake(stream).await.map_err(|e| failed(&e))
        };
        let connected = tokio::time::timeout(timeout, connecting).await;
        let (requests, connection) = connected.map_err(|_| failed(&"no answer in time"))??;
        // Ends with the last handle; its failure is that of the requests on it.
        tokio::spawn(connection);
        Ok(Self { requests, address: address.to_owned() })
    }

    /// The method at `path`, `/package.Service/Method`. `metadata` goes with each request.
    pub(super) fn method(&self, path: &str, metadata: &[(&'static str, HeaderValue)]) -> Result<Route, Failure> {
        let uri = format!("http://{}{path}", self.address);
        let uri = uri.parse().map_err(|e| Failure::usage(format!("no address: {e} address={}", self.address)))?;
        let mut headers = HeaderMap::new();
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        for (name, value) in metadata {
            headers.insert(*name, value.clone());
        }
        Ok(Route { uri, headers })
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// What went wrong: the connection, or the status that the server gave.
    pub(super) async fn call<A: Message + Default>(
        &mut self,
        method: &Route,
        request: &impl Message,
    ) -> Result<A, String> {
        let mut head = Request::new(());
        *head.method_mut() = Method::POST;
        *head.uri_mut() = method.uri.clone();
        *head.headers_mut() = method.headers.clone();
        let broken = |error: h2::Error| format!("the connection: {error}");
        std::future::poll_fn(|context| self.requests.poll_ready(context)).await.map_err(broken)?;
        let (answer, mut body) = self.requests.send_request(head, false).map_err(broken)?;
        body.send_data(framed(request)?, true).map_err(broken)?;
        read(answer).await
    }
}

/// A message as it is sent.
fn framed(message: &impl Message) -> Result<Bytes, String> {
    let length = message.encoded_len();
    let mut out = BytesMut::with_capacity(PREFIX_BYTES + length);
    out.put_u8(0);
    out.put_u32(u32::try_from(length).map_err(|_| "the request is too long")?);
    message.encode(&mut out).map_err(|e| e.to_string())?;
    Ok(out.freeze())
}

async fn read<A: Message + Default>(answer: ResponseFuture) -> Result<A, String> {
    let broken = |error: h2::Error| format!("the answer: {error}");
    let answer = answer.await.map_err(broken)?;
    if !answer.status().is_success() {
        return Err(format!("HTTP status {}", answer.status()));
    }
    // An answer without a message may have its status here.
    check_status(answer.headers(), false)?;
    let mut body = answer.into_body();
    let mut message = Bytes::new();
    while let Some(part) = body.data().await {
        let part = part.map_err(broken)?;
        body.flow_control().release_capacity(part.len()).map_err(broken)?;
        if message.len() + part.len() > ANSWER_BYTES_MAX {
            return Err(format!("the answer is longer than {ANSWER_BYTES_MAX} bytes"));
        }
        message = if message.is_empty() { part } else { [message, part].concat().into() };
    }
    let trailers = body.trailers().await.map_err(broken)?.unwrap_or_default();
    check_status(&trailers, true)?;
    if message.len() < PREFIX_BYTES {
        return Err("an answer without a message".into());
    }
    let (compressed, length) = (message.get_u8(), message.get_u32());
    if compressed != 0 || length as usize != message.len() {
        return Err("the answer is not one plain message".into());
    }
    A::decode(message).map_err(|e| format!("the answer does not decode: {e}"))
}

/// Whether the headers say that all went well; they must say something if it is `needed`.
fn check_status(headers: &HeaderMap, needed: bool) -> Result<(), String> {
    match Status::from_header_map(headers) {
        Some(status) if status.code() == Code::Ok => Ok(()),
        Some(status) => Err(format!("status {}: {}", status.code() as i32, status.message())),
        None if needed => Err("an answer without a status".into()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::etcdserverpb::{PutRequest, PutResponse};

    #[test]
    fn a_message_is_sent_behind_its_length() {
        let put = PutRequest { key: "k".into(), ..Default::default() };
        assert_eq!(framed(&put).expect("short")[..], [0, 0, 0, 0, 3, 0x0a, 1, b'k']);
    }

    /// HTTP status, parts of the body, `grpc-status`.
    type Answer = (u16, Vec<&'static [u8]>, Option<&'static str>);

    /// Answers each request on one connection as its turn says.
    async fn served(answers: Vec<Answer>) -> Connection {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.expect("the client connects");
            let mut connection = h2::server::handshake(stream).await.expect("the client speaks HTTP/2");
            for (status, parts, grpc_status) in answers {
                let (request, mut respond) = connection.accept().await.expect("a request").expect("whole");
                assert_eq!(request.uri().path(), "/etcdserverpb.KV/Put");
                assert_eq!(request.headers()["content-type"], "application/grpc");
                assert_eq!(request.headers()["x-mark"], "seven");
                let head = tonic::codegen::http::Response::builder().status(status).body(()).expect("a head");
                let mut body = respond.send_response(head, false).expect("open");
                for part in parts {
                    body.send_data(Bytes::from_static(part), false).expect("open");
                }
                let mut trailers = HeaderMap::new();
                if let Some(grpc_status) = grpc_status {
                    trailers.insert("grpc-status", HeaderValue::from_static(grpc_status));
                    trailers.insert("grpc-message", HeaderValue::from_static("said%20so"));
                }
                body.send_trailers(trailers).expect("open");
            }
            // Goes on until the client is gone.
            while connection.accept().await.is_some() {}
        });
        Connection::open(&address, Duration::from_secs(10)).await.expect("it listens")
    }

    #[tokio::test]
    async fn answers_are_taken_only_if_they_are_whole_and_say_so() {
        let revision = |answer: Result<PutResponse, String>| answer.map(|put| put.header.unwrap_or_default().revision);
        let cases: Vec<(Answer, Result<i64, &str>)> = vec![
            ((200, vec![&[0, 0, 0, 0, 4, 0x0a, 2, 0x18, 9]], Some("0")), Ok(9)),
            ((200, vec![&[0, 0, 0, 0], &[4, 0x0a, 2], &[0x18, 9]], Some("0")), Ok(9)),
            ((200, vec![&[0, 0, 0, 0, 0]], Some("0")), Ok(0)),
            ((200, vec![], Some("14")), Err("status 14: said so")),
            ((200, vec![&[0, 0, 0, 0, 0]], None), Err("without a status")),
            ((200, vec![], Some("0")), Err("without a message")),
            ((200, vec![&[1, 0, 0, 0, 0]], Some("0")), Err("plain")),
            ((200, vec![&[0, 0, 0, 0, 9, 1]], Some("0")), Err("plain")),
            ((200, vec![&[0, 0, 0, 0, 1, 0xff]], Some("0")), Err("decode")),
            ((503, vec![], Some("0")), Err("503")),
        ];
        let answers = cases.iter().map(|(answer, _)| answer.clone()).collect();
        let mut connection = served(answers).await;
        let mark = [("x-mark", HeaderValue::from_static("seven"))];
        let method = connection.method("/etcdserverpb.KV/Put", &mark).expect("a path");
        for (n, (_, expect)) in cases.into_iter().enumerate() {
            let answer = revision(connection.call(&method, &PutRequest::default()).await);
            match expect {
                Ok(expect) => assert_eq!(answer, Ok(expect), "case {n}"),
                Err(part) => assert!(answer.as_ref().is_err_and(|e| e.contains(part)), "case {n}: {answer:?}"),
            }
        }
    }
}
