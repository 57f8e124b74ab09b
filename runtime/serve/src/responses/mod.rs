//! OpenAI's responses: `/v1/responses`, and its count of tokens.
//!
//! The server keeps no conversations, so each request has all of one.

mod body;

use crate::ask::{Answering, Collected, Delta, count_tokens, prepare, receive};
use crate::calls::Part;
use crate::error::{ApiError, json_response};
use crate::http;
use crate::openai::add_truth;
use crate::sse::{self, Format, event};
use crate::state::State;
use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use body::placed;
pub(crate) use body::request;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;
use tier_plan_runtime::batcher::Finish;

/// Answers `/v1/responses`.
pub(crate) async fn responses(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let (prepared, echo) = receive(&state, &headers, body, request).await?;
    let mut answering = Answering::begin(&state, prepared, "/v1/responses", received)?;
    if answering.request.stream.wanted {
        return Ok(sse::response(answering, Events::new(echo)));
    }
    let texts = match answering.collect().await {
        Ok(texts) => texts,
        Err(error) => return Ok(answering.failed(error)),
    };
    let parts = texts.into_iter().next().unwrap_or_default();
    let items = items(&echo, &answering, &parts);
    let mut response = ended(&echo, &answering, items);
    add_truth(&mut response, &answering);
    Ok(answering.answered(&response))
}

/// Answers `/v1/responses/input_tokens`.
pub(crate) async fn input_tokens(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let bytes = http::body::read(&state, &headers, body).await?;
    let n = prepare(&state, move |state| {
        count_tokens(state, &request("count", &bytes)?.0)
    })
    .await?;
    Ok(json_response(StatusCode::OK, &token_count(n)))
}

/// Returns the answer of endpoints that count tokens.
pub(crate) fn token_count(n: usize) -> Value {
    json!({ "object": "response.input_tokens", "input_tokens": n })
}

/// Returns a response without an end.
fn response(echo: &Value, answering: &Answering, status: &str, output: Vec<Value>) -> Value {
    let mut response = json!({
        "id": format!("resp_{}", answering.request.custom_id),
        "object": "response",
        "created_at": answering.created,
        "status": status,
        "error": null,
        "incomplete_details": null,
        "model": answering.state.config.model,
        "output": output,
        "previous_response_id": null,
        "store": false,
        "truncation": "disabled",
        "metadata": {},
        "usage": null,
    });
    if let (Value::Object(fields), Value::Object(echo)) = (&mut response, echo) {
        fields.extend(echo.clone());
    }
    response
}

/// Returns a response that has ended.
fn ended(echo: &Value, answering: &Answering, output: Vec<Value>) -> Value {
    let text = answering.texts.first();
    let is_cut = text.is_some_and(|text| text.finish == Some(Finish::Length));
    let status = if is_cut { "incomplete" } else { "completed" };
    let mut response = response(echo, answering, status, output);
    if is_cut {
        response["incomplete_details"] = json!({ "reason": "max_output_tokens" });
    }
    let counts = answering.counts();
    response["usage"] = json!({
        "input_tokens": counts.prompt,
        "input_tokens_details": { "cached_tokens": counts.cached },
        "output_tokens": counts.new,
        "output_tokens_details": { "reasoning_tokens": counts.thinking },
        "total_tokens": counts.prompt + counts.new,
    });
    response
}

/// Returns the items of an answer.
fn items(echo: &Value, answering: &Answering, collected: &Collected) -> Vec<Value> {
    let parts = collected.parts.iter().enumerate();
    parts
        .map(|(i, part)| item(echo, part, &item_id(answering, part, i), "completed"))
        .collect()
}

/// Returns the name of an item.
fn item_id(answering: &Answering, part: &Part, index: usize) -> String {
    let kind = match part {
        Part::Thinking(_) => "rs",
        Part::Content(_) => "msg",
        Part::Call(_) => "fc",
    };
    format!("{kind}_{}_{index}", answering.request.custom_id)
}

/// Returns an item of the output.
fn item(echo: &Value, part: &Part, id: &str, status: &str) -> Value {
    match part {
        Part::Thinking(_) => json!({
            "id": id,
            "type": "reasoning",
            "status": status,
            "summary": [],
            "content": contents(part),
        }),
        Part::Content(_) => json!({
            "id": id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": contents(part),
        }),
        Part::Call(call) => {
            let mut item = json!({
                "id": id,
                "type": "function_call",
                "status": status,
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
            });
            if let Some(placed) = placed(&echo["tools"], &call.name) {
                item["name"] = placed.name.into();
                item["namespace"] = placed.namespace.into();
            }
            item
        }
    }
}

/// Returns the contents of an item: none while it has no text.
fn contents(part: &Part) -> Vec<Value> {
    match part {
        Part::Thinking(text) | Part::Content(text) if text.is_empty() => Vec::new(),
        part => vec![content(part)],
    }
}

fn content(part: &Part) -> Value {
    match part {
        Part::Thinking(text) => json!({ "type": "reasoning_text", "text": text }),
        Part::Content(text) => {
            json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
        }
        Part::Call(_) => Value::Null,
    }
}

/// Returns the same kind of part without its text.
fn emptied(part: &Part) -> Part {
    match part {
        Part::Thinking(_) => Part::Thinking(String::new()),
        Part::Content(_) => Part::Content(String::new()),
        Part::Call(call) => Part::Call(crate::calls::Call {
            arguments: String::new(),
            ..call.clone()
        }),
    }
}

/// An item that is still coming.
struct Open {
    id: String,
    part: Part,
}

/// Events of a streamed response.
struct Events {
    echo: Value,
    begun: bool,
    number: u64,
    /// Items that are whole.
    done: Vec<Value>,
    open: Option<Open>,
}

impl Events {
    fn new(echo: Value) -> Self {
        Self {
            echo,
            begun: false,
            number: 0,
            done: Vec::new(),
            open: None,
        }
    }

    /// Returns an event with its number.
    fn event(&mut self, name: &str, mut value: Value) -> String {
        value["type"] = name.into();
        value["sequence_number"] = self.number.into();
        self.number += 1;
        event(name, &value)
    }

    /// Returns an event about the item at hand.
    fn of_item(&mut self, name: &str, id: &str, mut value: Value) -> String {
        value["item_id"] = id.into();
        value["output_index"] = self.done.len().into();
        self.event(name, value)
    }

    /// Returns the events that add a part, in the item that is open if it has this kind of text.
    fn add(&mut self, answering: &Answering, part: &Part) -> String {
        let is_open = self.open.as_ref().is_some_and(|open| {
            let same = std::mem::discriminant(&open.part) == std::mem::discriminant(part);
            same && !matches!(part, Part::Call(_))
        });
        let mut events = String::new();
        if !is_open {
            events += &self.close();
            events += &self.begin(answering, part);
        }
        let Some(mut open) = self.open.take() else {
            return events;
        };
        let (name, text) = match (&mut open.part, part) {
            (Part::Thinking(all), Part::Thinking(text)) => {
                all.push_str(text);
                ("response.reasoning_text.delta", text)
            }
            (Part::Content(all), Part::Content(text)) => {
                all.push_str(text);
                ("response.output_text.delta", text)
            }
            (Part::Call(all), Part::Call(call)) => {
                all.arguments.push_str(&call.arguments);
                ("response.function_call_arguments.delta", &call.arguments)
            }
            _ => return events,
        };
        let mut delta = json!({ "delta": text });
        if !matches!(part, Part::Call(_)) {
            delta["content_index"] = 0.into();
        }
        if matches!(part, Part::Content(_)) {
            delta["logprobs"] = json!([]);
        }
        events += &self.of_item(name, &open.id, delta);
        self.open = Some(open);
        events
    }

    fn begin(&mut self, answering: &Answering, part: &Part) -> String {
        let id = item_id(answering, part, self.done.len());
        let part = emptied(part);
        let added = json!({
            "output_index": self.done.len(),
            "item": item(&self.echo, &part, &id, "in_progress"),
        });
        let mut events = self.event("response.output_item.added", added);
        if !matches!(part, Part::Call(_)) {
            let part = json!({ "content_index": 0, "part": content(&part) });
            events += &self.of_item("response.content_part.added", &id, part);
        }
        self.open = Some(Open { id, part });
        events
    }

    /// Returns the events that end the item at hand.
    fn close(&mut self) -> String {
        let Some(Open { id, part }) = self.open.take() else {
            return String::new();
        };
        let mut events = match &part {
            Part::Thinking(text) => {
                let done = json!({ "content_index": 0, "text": text });
                self.of_item("response.reasoning_text.done", &id, done)
            }
            Part::Content(text) => {
                let done = json!({ "content_index": 0, "text": text, "logprobs": [] });
                self.of_item("response.output_text.done", &id, done)
            }
            Part::Call(call) => {
                let name = placed(&self.echo["tools"], &call.name).map_or(&*call.name, |p| p.name);
                let done = json!({ "name": name, "arguments": call.arguments });
                self.of_item("response.function_call_arguments.done", &id, done)
            }
        };
        if !matches!(part, Part::Call(_)) {
            let part = json!({ "content_index": 0, "part": content(&part) });
            events += &self.of_item("response.content_part.done", &id, part);
        }
        let item = item(&self.echo, &part, &id, "completed");
        let done = json!({ "output_index": self.done.len(), "item": item });
        events += &self.event("response.output_item.done", done);
        self.done.push(item);
        events
    }
}

impl Format for Events {
    fn delta(&mut self, answering: &Answering, delta: &Delta) -> String {
        let mut events = String::new();
        if !std::mem::replace(&mut self.begun, true) {
            for name in ["response.created", "response.in_progress"] {
                let response = response(&self.echo, answering, "in_progress", Vec::new());
                events += &self.event(name, json!({ "response": response }));
            }
        }
        for part in &delta.parts {
            events += &self.add(answering, part);
        }
        events
    }

    fn end(&mut self, answering: &Answering) -> String {
        let closed = self.close();
        let mut response = ended(&self.echo, answering, self.done.clone());
        add_truth(&mut response, answering);
        let name = match response["status"].as_str() {
            Some("incomplete") => "response.incomplete",
            _ => "response.completed",
        };
        closed + &self.event(name, json!({ "response": response }))
    }

    fn error(&mut self, error: &ApiError) -> String {
        let body = error.body();
        let (code, message) = (&body["error"]["code"], &body["error"]["message"]);
        let failed = json!({
            "object": "response",
            "status": "failed",
            "error": { "code": code, "message": message },
            "output": self.done,
        });
        let told = json!({ "code": code, "message": message, "param": null });
        self.event("error", told) + &self.event("response.failed", json!({ "response": failed }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_events_go_up_and_a_failure_says_why() {
        let mut events = Events::new(json!({}));
        let text = events.error(&ApiError::stopping());
        let values: Vec<Value> = text
            .lines()
            .filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok())
            .collect();
        assert_eq!(values.len(), 2);
        assert_eq!(
            (&values[0]["sequence_number"], &values[1]["sequence_number"]),
            (&json!(0), &json!(1))
        );
        assert_eq!(values[1]["response"]["error"]["code"], "shutting_down");
    }
}
