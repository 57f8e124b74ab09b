//! Answers that are sent as they come: server-sent events.

use crate::ask::{Answering, Delta};
use crate::error::ApiError;
use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use hyper::body::Frame;
use serde_json::Value;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// Time without an event after which a sign of life is sent, so that no proxy gives up.
const PING: Duration = Duration::from_secs(10);

/// Pieces of text that wait for a slow reader. What comes beyond waits in the request's own channel.
const MAX_WAITING: usize = 16;

/// How a protocol writes the events of an answer.
pub(crate) trait Format: Send + 'static {
    /// Returns the events for what came.
    fn delta(&mut self, answering: &Answering, delta: &Delta) -> String;
    /// Returns the events at the end of an answer whose texts have all ended.
    fn end(&mut self, answering: &Answering) -> String;
    /// Returns the event of an error that ends the answer.
    fn error(&mut self, error: &ApiError) -> String;
    /// Returns a sign of life.
    fn ping(&self) -> &'static str {
        ": waiting\n\n"
    }
}

/// Returns one event without a name.
pub(crate) fn data(value: &Value) -> String {
    format!("data: {value}\n\n")
}

/// Returns one event with a name.
pub(crate) fn event(name: &str, value: &Value) -> String {
    format!("event: {name}\ndata: {value}\n\n")
}

/// Returns a response that sends an answer as it comes.
pub(crate) fn response(answering: Answering, format: impl Format) -> Response {
    let (sender, receiver) = channel(MAX_WAITING);
    tokio::spawn(pump(answering, format, sender));
    let mut response = stream(receiver);
    crate::ask::mark_logged(&mut response);
    response
}

/// Returns a response whose events come through a channel.
pub(crate) fn stream(events: Receiver<Bytes>) -> Response {
    let mut response = Response::new(Body::new(Pieces(events)));
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        // Proxies that collect answers would hold events up.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Writes events until the answer ends or the reader is gone. Dropping the answer ends its texts.
async fn pump(mut answering: Answering, mut format: impl Format, out: Sender<Bytes>) {
    loop {
        let came = tokio::select! {
            biased;
            () = out.closed() => return,
            came = tokio::time::timeout(PING, answering.next()) => came,
        };
        let (text, is_end) = match came {
            Err(_) => (format.ping().to_string(), false),
            Ok(Ok(Some(delta))) => (format.delta(&answering, &delta), false),
            Ok(Ok(None)) => {
                answering.log(200, None);
                (format.end(&answering), true)
            }
            Ok(Err(error)) => {
                answering.log(error.status.as_u16(), Some(&error.message));
                (format.error(&error), true)
            }
        };
        if !text.is_empty() && out.send(text.into()).await.is_err() {
            return;
        }
        if is_end {
            return;
        }
    }
}

/// A body of pieces that come through a channel.
struct Pieces(Receiver<Bytes>);

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.0.poll_recv(cx);
        piece.map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}
