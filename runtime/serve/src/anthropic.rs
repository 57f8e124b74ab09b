//! Anthropic's endpoints: messages, and their count of tokens.

mod body;

use crate::ask::{self, Answering, Delta, prepare};
use crate::calls::Part;
use crate::error::{ApiError, Protocol, json_response};
use crate::http;
use crate::openai::add_truth;
use crate::sse::{self, Format, event};
use crate::state::State;
use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
pub(crate) use body::{counted, request};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;
use tier_plan_runtime::batcher::Finish;

/// Answers `/v1/messages`.
pub(crate) async fn messages(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let answered = answer(state, headers, body).await;
    answered.map_err(|error| error.of(Protocol::Anthropic))
}

/// Answers `/v1/messages/count_tokens`.
pub(crate) async fn count_tokens(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let counted = count(state, headers, body).await;
    counted.map_err(|error| error.of(Protocol::Anthropic))
}

async fn count(state: Arc<State>, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let bytes = http::body::read(&state, &headers, body).await?;
    let n = prepare(&state, move |state| {
        ask::count_tokens(state, &counted("count", &bytes)?)
    })
    .await?;
    Ok(json_response(StatusCode::OK, &json!({ "input_tokens": n })))
}

async fn answer(state: Arc<State>, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let received = Instant::now();
    let read = |id: &str, body: &[u8]| Ok((request(id, body)?, ()));
    let (prepared, ()) = ask::receive(&state, &headers, body, read).await?;
    let mut answering = Answering::begin(&state, prepared, "/v1/messages", received)?;
    if answering.request.stream.wanted {
        return Ok(sse::response(answering, Events::default()));
    }
    let texts = match answering.collect().await {
        Ok(texts) => texts,
        Err(error) => return Ok(answering.failed(error.of(Protocol::Anthropic))),
    };
    let mut message = message_of(&answering);
    message["content"] = texts
        .iter()
        .flat_map(|text| &text.parts)
        .map(block)
        .collect();
    let end = ending(&answering);
    message["stop_reason"] = end.reason.into();
    message["stop_sequence"] = end.sequence.into();
    add_truth(&mut message, &answering);
    Ok(answering.answered(&message))
}

/// Returns the block of a part of an answer.
fn block(part: &Part) -> Value {
    match part {
        Part::Thinking(text) => json!({ "type": "thinking", "thinking": text, "signature": "" }),
        Part::Content(text) => json!({ "type": "text", "text": text }),
        Part::Call(call) => json!({
            "type": "tool_use",
            "id": call.id,
            "name": call.name,
            // Arguments are an object that was written by this program.
            "input": serde_json::from_str::<Value>(&call.arguments).unwrap_or(json!({})),
        }),
    }
}

/// Returns a message without content and end.
fn message_of(answering: &Answering) -> Value {
    json!({
        "id": format!("msg_{}", answering.request.custom_id),
        "type": "message",
        "role": "assistant",
        "model": answering.state.config.model,
        "content": [],
        "stop_reason": null,
        "stop_sequence": null,
        "usage": usage(answering),
    })
}

/// Returns the counts of tokens. Those of the prompt are apart: computed, and read from the cache.
fn usage(answering: &Answering) -> Value {
    let counts = answering.counts();
    json!({
        "input_tokens": counts.prompt.saturating_sub(counts.cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.new,
    })
}

/// Why an answer ends, in Anthropic's words.
struct Ending {
    reason: &'static str,
    sequence: Option<String>,
}

fn ending(answering: &Answering) -> Ending {
    let text = answering.texts.first();
    let finish = text.and_then(|text| text.finish.clone());
    let calls = text.is_some_and(|text| text.n_calls > 0);
    let (reason, sequence) = match finish {
        Some(Finish::Length) => ("max_tokens", None),
        Some(Finish::StopString(stop)) if answering.request.stop.contains(&stop) => {
            ("stop_sequence", Some(stop))
        }
        _ if calls => ("tool_use", None),
        _ => ("end_turn", None),
    };
    Ending { reason, sequence }
}

/// Kind of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    Tool,
}

/// Events of a streamed message.
#[derive(Default)]
struct Events {
    begun: bool,
    /// Number of the open block, or of the next one.
    index: usize,
    open: Option<Block>,
}

impl Events {
    /// Returns the events that add a part, in the block that is open if it has this kind of text.
    fn add(&mut self, part: &Part) -> String {
        let (kind, empty, delta) = match part {
            Part::Thinking(text) => (
                Block::Thinking,
                json!({ "type": "thinking", "thinking": "", "signature": "" }),
                json!({ "type": "thinking_delta", "thinking": text }),
            ),
            Part::Content(text) => (
                Block::Text,
                json!({ "type": "text", "text": "" }),
                json!({ "type": "text_delta", "text": text }),
            ),
            Part::Call(call) => (
                Block::Tool,
                json!({ "type": "tool_use", "id": call.id, "name": call.name, "input": {} }),
                json!({ "type": "input_json_delta", "partial_json": call.arguments }),
            ),
        };
        let mut events = String::new();
        if self.open != Some(kind) || kind == Block::Tool {
            events += &self.close();
            let start = json!({
                "type": "content_block_start",
                "index": self.index,
                "content_block": empty,
            });
            events += &event("content_block_start", &start);
            self.open = Some(kind);
        }
        let delta = json!({ "type": "content_block_delta", "index": self.index, "delta": delta });
        events + &event("content_block_delta", &delta)
    }

    fn close(&mut self) -> String {
        if self.open.take().is_none() {
            return String::new();
        }
        let stop = json!({ "type": "content_block_stop", "index": self.index });
        self.index += 1;
        event("content_block_stop", &stop)
    }
}

impl Format for Events {
    fn delta(&mut self, answering: &Answering, delta: &Delta) -> String {
        let mut events = String::new();
        if !std::mem::replace(&mut self.begun, true) {
            let start = json!({ "type": "message_start", "message": message_of(answering) });
            events += &event("message_start", &start);
            events += &event("ping", &json!({ "type": "ping" }));
        }
        for part in &delta.parts {
            events += &self.add(part);
        }
        events
    }

    fn end(&mut self, answering: &Answering) -> String {
        let closed = self.close();
        let end = ending(answering);
        let mut delta = json!({
            "type": "message_delta",
            "delta": { "stop_reason": end.reason, "stop_sequence": end.sequence },
            "usage": usage(answering),
        });
        add_truth(&mut delta, answering);
        let stop = json!({ "type": "message_stop" });
        closed + &event("message_delta", &delta) + &event("message_stop", &stop)
    }

    fn error(&mut self, error: &ApiError) -> String {
        event("error", &error.clone().of(Protocol::Anthropic).body())
    }

    fn ping(&self) -> &'static str {
        if self.begun {
            "event: ping\ndata: {\"type\": \"ping\"}\n\n"
        } else {
            ": waiting\n\n"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_open_and_close_in_order() {
        let mut events = Events::default();
        let call = || {
            Part::Call(crate::calls::Call {
                id: Some("i".into()),
                name: "f".into(),
                arguments: "{}".into(),
            })
        };
        let text = events.add(&Part::Thinking("a".into()))
            + &events.add(&Part::Thinking("b".into()))
            + &events.add(&Part::Content("c".into()))
            + &events.add(&call())
            + &events.add(&call())
            + &events.close()
            + &events.close();
        let names: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("event: content_block_"))
            .collect();
        let one = ["start", "delta", "stop"];
        let thought = ["start", "delta", "delta", "stop"];
        assert_eq!(names, [&thought[..], &one, &one, &one].concat());
        assert!(
            text.contains(r#""index":1,"content_block":{"type":"text""#),
            "{text}"
        );
    }
}
