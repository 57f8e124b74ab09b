//! Anthropic's endpoints: messages, and their count of tokens.

use crate::answer::Choice;
use crate::ask::{Answering, Delta, Prepared, mark_logged, prepare};
use crate::error::{ApiError, Protocol, json_response};
use crate::http::body;
use crate::openai::add_truth;
use crate::request::fields::{Fields, bad, shown};
use crate::request::read::{MAX_TOKENS, sampling, stop_strings};
use crate::request::{BadLine, Code, Endpoint, Message, Prompt, Request, Role, Stream, object};
use crate::sse::{self, Format, event};
use crate::state::State;
use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;
use tier_plan_runtime::batcher::Finish;

/// Fields that would change an answer in a way that is not implemented.
const UNSUPPORTED: [&str; 7] = [
    "tools",
    "tool_choice",
    "mcp_servers",
    "container",
    "context_management",
    "output_format",
    "output_config",
];

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
    let bytes = body::read(&state, &headers, body).await?;
    let n = prepare(&state, move |state| {
        let body = object(&bytes)?;
        let body = Fields::new(&body, "");
        check(body)?;
        let (tokens, _) = state.prompts().messages(&conversation(body)?)?;
        Ok(tokens.len())
    })
    .await?;
    Ok(json_response(StatusCode::OK, &json!({ "input_tokens": n })))
}

async fn answer(state: Arc<State>, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let received = Instant::now();
    let bytes = body::read(&state, &headers, body).await?;
    let id = state.new_id();
    let prepared = prepare(&state, move |state| {
        let request = request(&id, &bytes)?;
        drop(bytes);
        Prepared::new(state, request)
    })
    .await?;
    let mut answering = Answering::begin(&state, prepared, "/v1/messages", received)?;
    if answering.request.stream.wanted {
        return Ok(sse::response(answering, Events::default()));
    }
    let choices = match answering.collect().await {
        Ok(choices) => choices,
        Err(error) => return Ok(answering.failed(error.of(Protocol::Anthropic))),
    };
    let mut message = message_of(&answering);
    message["content"] = choices.iter().flat_map(blocks).collect();
    let end = ending(&answering);
    message["stop_reason"] = end.reason.into();
    message["stop_sequence"] = end.sequence.into();
    add_truth(&mut message, &answering);
    answering.log(200, None);
    let mut response = json_response(StatusCode::OK, &message);
    mark_logged(&mut response);
    Ok(response)
}

/// Checks the body of a request.
pub(crate) fn request(id: &str, bytes: &[u8]) -> Result<Request, BadLine> {
    let body = object(bytes)?;
    let body = Fields::new(&body, "");
    check(body)?;
    let max_tokens = body.count("max_tokens", 1..=MAX_TOKENS)?;
    if max_tokens.is_none() {
        return Err(body.bad("max_tokens", "a whole number from 1"));
    }
    Ok(Request {
        custom_id: id.to_string(),
        endpoint: Endpoint::Chat,
        model: body.text("model")?.map(str::to_string),
        prompt: Prompt::Messages(conversation(body)?),
        max_tokens,
        sampling: sampling(body)?,
        stop: stop_strings(body, "stop_sequences")?,
        n: 1,
        logprobs: None,
        ignore_eos: false,
        stream: Stream {
            wanted: body.flag("stream")?.unwrap_or(false),
            usage: true,
        },
    })
}

/// Refuses what is not implemented.
fn check(body: Fields<'_>) -> Result<(), BadLine> {
    let empty = |value: &Value| matches!(value, Value::Array(items) if items.is_empty());
    let asked = |name: &&&str| body.get(name).is_some_and(|value| !empty(value));
    match UNSUPPORTED.iter().find(asked) {
        Some(name) => Err(BadLine::new(
            Code::Unsupported,
            format!("{name}: not supported, and would change the result; leave the field out"),
        )),
        None => Ok(()),
    }
}

/// Returns the system message and those of the conversation.
fn conversation(body: Fields<'_>) -> Result<Vec<Message>, BadLine> {
    let mut all = Vec::new();
    if let Some(system) = body.get("system") {
        let parts = parts("system", system)?;
        all.push(Message::new(Role::System, &parts.text));
    }
    let items = match body.get("messages") {
        Some(Value::Array(items)) if !items.is_empty() => items,
        _ => return Err(body.bad("messages", "an array of one or more messages")),
    };
    for (i, item) in items.iter().enumerate() {
        let place = format!("messages[{i}]");
        let Value::Object(fields) = item else {
            return Err(bad(
                &place,
                Some(item),
                "an object with a role and a content",
            ));
        };
        let fields = Fields::new(fields, &place);
        let role = match fields.text("role")? {
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            _ => return Err(fields.bad("role", "\"user\" or \"assistant\"")),
        };
        let Some(content) = fields.get("content") else {
            return Err(fields.bad("content", "a string or an array of blocks"));
        };
        let parts = parts(&fields.place("content"), content)?;
        all.push(Message {
            thinking: Some(parts.thinking).filter(|t| !t.is_empty() && role == Role::Assistant),
            ..Message::new(role, &parts.text)
        });
    }
    if all.last().is_some_and(|last| last.role == Role::Assistant) {
        let last = items.len() - 1;
        let message = format!(
            "messages[{last}].role: \"assistant\" as the last message is not supported, expected \"user\""
        );
        return Err(BadLine::new(Code::Unsupported, message));
    }
    Ok(all)
}

/// Texts of a message's blocks.
#[derive(Default)]
struct Parts {
    text: String,
    thinking: String,
}

/// Reads a content: a string, or blocks of text and of thought.
fn parts(place: &str, content: &Value) -> Result<Parts, BadLine> {
    let mut parts = Parts::default();
    let blocks = match content {
        Value::String(text) => {
            parts.text.clone_from(text);
            return Ok(parts);
        }
        Value::Array(blocks) => blocks,
        _ => return Err(bad(place, Some(content), "a string or an array of blocks")),
    };
    for (i, block) in blocks.iter().enumerate() {
        let place = format!("{place}[{i}]");
        let Value::Object(fields) = block else {
            return Err(bad(&place, Some(block), "an object with a type"));
        };
        let fields = Fields::new(fields, &place);
        let kind = fields.text("type")?;
        let (name, onto) = match kind {
            Some("text") => ("text", &mut parts.text),
            Some("thinking") => ("thinking", &mut parts.thinking),
            Some(_) => {
                let found = fields.get("type").map_or_else(String::new, shown);
                let message = format!(
                    "{}: {found} is not supported, expected \"text\" or \"thinking\"",
                    fields.place("type")
                );
                return Err(BadLine::new(Code::Unsupported, message));
            }
            None => return Err(fields.bad("type", "\"text\" or \"thinking\"")),
        };
        match fields.text(name)? {
            Some(text) => onto.push_str(text),
            None => return Err(fields.bad(name, "a string")),
        }
    }
    Ok(parts)
}

/// Returns the blocks of an answer.
fn blocks(choice: &Choice) -> Vec<Value> {
    let mut blocks = Vec::new();
    if let Some(thinking) = &choice.thinking {
        blocks.push(json!({ "type": "thinking", "thinking": thinking, "signature": "" }));
    }
    if !choice.text.is_empty() {
        blocks.push(json!({ "type": "text", "text": choice.text }));
    }
    blocks
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
    let finish = answering.texts.first().and_then(|text| text.finish.clone());
    let (reason, sequence) = match finish {
        Some(Finish::Length) => ("max_tokens", None),
        Some(Finish::StopString(stop)) => ("stop_sequence", Some(stop)),
        Some(Finish::EndToken) | None => ("end_turn", None),
    };
    Ending { reason, sequence }
}

/// Kind of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
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
    /// Returns the events that add text to a block, which begins if it is not open.
    fn add(&mut self, block: Block, text: &str) -> String {
        let mut events = String::new();
        if self.open != Some(block) {
            events += &self.close();
            let empty = match block {
                Block::Thinking => json!({ "type": "thinking", "thinking": "", "signature": "" }),
                Block::Text => json!({ "type": "text", "text": "" }),
            };
            let start = json!({
                "type": "content_block_start",
                "index": self.index,
                "content_block": empty,
            });
            events += &event("content_block_start", &start);
            self.open = Some(block);
        }
        let delta = match block {
            Block::Thinking => json!({ "type": "thinking_delta", "thinking": text }),
            Block::Text => json!({ "type": "text_delta", "text": text }),
        };
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
        if !delta.thinking.is_empty() {
            events += &self.add(Block::Thinking, &delta.thinking);
        }
        if !delta.content.is_empty() {
            events += &self.add(Block::Text, &delta.content);
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

    fn read(body: Value) -> Result<Request, BadLine> {
        request("id", body.to_string().as_bytes())
    }

    #[test]
    fn contents_are_strings_or_blocks() {
        let request = read(json!({
            "model": "m", "max_tokens": 7, "stop_sequences": ["\n"], "temperature": 0.5, "top_k": 3,
            "stream": true, "metadata": {"user_id": "u"}, "tools": [],
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "t", "signature": "x"}, {"type": "text", "text": "b"},
                ]},
                {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
            ],
        }))
        .unwrap();
        let expected = vec![
            Message::new(Role::System, "s"),
            Message::new(Role::User, "a"),
            Message {
                thinking: Some("t".into()),
                ..Message::new(Role::Assistant, "b")
            },
            Message::new(Role::User, "cd"),
        ];
        assert_eq!(request.prompt, Prompt::Messages(expected));
        assert_eq!((request.max_tokens, request.stream.wanted), (Some(7), true));
        assert_eq!(request.stop, ["\n"]);
        assert_eq!(request.sampling.top_k, Some(3));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let one = |content: Value| json!([{"role": "user", "content": content}]);
        for (body, words) in [
            (json!({"messages": one(json!("a"))}), "max_tokens: missing"),
            (json!({"max_tokens": 1}), "messages: missing"),
            (
                json!({"max_tokens": 1, "messages": []}),
                "messages: an array",
            ),
            (json!({"max_tokens": 1, "messages": [7]}), "messages[0]: 7"),
            (
                json!({"max_tokens": 1, "messages": one(json!(7))}),
                "messages[0].content: 7",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!([7]))}),
                "messages[0].content[0]: 7",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!([{"type": "image"}]))}),
                "messages[0].content[0].type: \"image\" is not supported",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!([{"type": "text"}]))}),
                "messages[0].content[0].text: missing",
            ),
            (
                json!({"max_tokens": 1, "messages": [{"role": "system", "content": "a"}]}),
                "messages[0].role: \"system\"",
            ),
            (
                json!({"max_tokens": 1, "messages": [{"role": "assistant", "content": "a"}]}),
                "messages[0].role: \"assistant\" as the last",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "system": 7}),
                "system: 7, expected a string",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "tools": [{}]}),
                "tools: not supported",
            ),
            (
                json!({"max_tokens": 1, "messages": one(json!("a")), "stop_sequences": [""]}),
                "stop_sequences: \"\"",
            ),
        ] {
            let bad = read(body).unwrap_err();
            assert!(
                bad.message.starts_with(words),
                "{words:?} in {}",
                bad.message
            );
        }
    }

    #[test]
    fn blocks_open_and_close_in_order() {
        let mut events = Events::default();
        let text = events.add(Block::Thinking, "a")
            + &events.add(Block::Thinking, "b")
            + &events.add(Block::Text, "c")
            + &events.close()
            + &events.close();
        let names: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("event: content_block_"))
            .collect();
        let expected = ["start", "delta", "delta", "stop", "start", "delta", "stop"];
        assert_eq!(names, expected);
        assert!(
            text.contains(r#""index":1,"content_block":{"type":"text""#),
            "{text}"
        );
    }
}
