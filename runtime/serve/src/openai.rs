//! OpenAI's endpoints: chats, completions, and the list of models.

use crate::answer::{Answered, chat_logprobs, old_logprobs, tool_call};
use crate::ask::{Answering, Delta, count_tokens, finish, prepare, receive};
use crate::calls::Part;
use crate::error::{ApiError, json_response};
use crate::http::body;
use crate::request::{Endpoint, Request};
use crate::responses::token_count;
use crate::sse::{self, Format};
use crate::state::State;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State as Shared};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;

/// Answers `/v1/chat/completions`.
pub(crate) async fn chat(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    answer(state, Endpoint::Chat, headers, body).await
}

/// Answers `/v1/completions`.
pub(crate) async fn completions(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    answer(state, Endpoint::Completions, headers, body).await
}

async fn answer(
    state: Arc<State>,
    endpoint: Endpoint,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let read = move |id: &str, body: &[u8]| Ok((Request::from_body(id, endpoint, body)?, ()));
    let (prepared, ()) = receive(&state, &headers, body, read).await?;
    let path = match endpoint {
        Endpoint::Chat => "/v1/chat/completions",
        Endpoint::Completions => "/v1/completions",
    };
    let mut answering = Answering::begin(&state, prepared, path, received)?;
    if answering.request.stream.wanted {
        let format = Chunks::new(&answering);
        return Ok(sse::response(answering, format));
    }
    let choices = match answering.collect().await {
        Ok(collected) => answering.choices(collected),
        Err(error) => return Ok(answering.failed(error)),
    };
    let answered = Answered {
        request: &answering.request,
        model: &state.config.model,
        created: answering.created,
        prompt_tokens: answering.n_prompt,
        choices: &choices,
        piece: &|token| state.tokenizer.token_bytes(token),
        id: &answering.request.custom_id,
    };
    let mut value = answered.body();
    value["usage"] = usage(&answering);
    add_truth(&mut value, &answering);
    Ok(answering.answered(&value))
}

/// Answers `/v1/chat/completions/input_tokens`: tokens of a chat's prompt.
pub(crate) async fn input_tokens(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let bytes = body::read(&state, &headers, body).await?;
    let n = prepare(&state, move |state| {
        count_tokens(state, &Request::from_body("count", Endpoint::Chat, &bytes)?)
    })
    .await?;
    Ok(json_response(StatusCode::OK, &token_count(n)))
}

/// Refuses `/v1/embeddings`.
pub(crate) async fn embeddings() -> ApiError {
    let message =
        "this server generates texts and makes no embeddings; use a server of an embedding model";
    ApiError::new(StatusCode::NOT_IMPLEMENTED, "unsupported", message)
}

/// Returns the counts of tokens.
fn usage(answering: &Answering) -> Value {
    let counts = answering.counts();
    json!({
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.new,
        "total_tokens": counts.prompt + counts.new,
        "prompt_tokens_details": { "cached_tokens": counts.cached },
        "completion_tokens_details": { "reasoning_tokens": counts.thinking },
    })
}

/// Adds the times, and the speed beside its prediction.
pub(crate) fn add_truth(value: &mut Value, answering: &Answering) {
    let counts = answering.counts();
    value["timings"] = answering.timings.json(counts);
    if let Some(loaded) = answering.state.loaded() {
        value["tier_plan"] = answering.timings.truth(counts, &loaded.promise());
    }
}

/// Events of a streamed chat or completion.
struct Chunks {
    is_chat: bool,
    /// What every chunk has, without choices.
    base: Value,
    wants_usage: bool,
    wants_logprobs: bool,
    /// Texts that have had their first chunk, with the role.
    begun: Vec<bool>,
    /// Calls that each text has had.
    n_calls: Vec<usize>,
}

impl Chunks {
    fn new(answering: &Answering) -> Self {
        let request = &answering.request;
        let is_chat = request.endpoint == Endpoint::Chat;
        let (name, object) = match request.endpoint {
            Endpoint::Chat => ("chatcmpl", "chat.completion.chunk"),
            Endpoint::Completions => ("cmpl", "text_completion"),
        };
        let base = json!({
            "id": format!("{name}-{}", request.custom_id),
            "object": object,
            "created": answering.created,
            "model": answering.state.config.model,
            "choices": [],
        });
        Self {
            is_chat,
            base,
            wants_usage: request.stream.usage,
            wants_logprobs: request.logprobs.is_some(),
            begun: vec![false; request.n],
            n_calls: vec![0; request.n],
        }
    }

    fn chunk(&self, choice: Value) -> Value {
        let mut chunk = self.base.clone();
        chunk["choices"] = json!([choice]);
        if self.wants_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// Returns the chunks of one chat text.
    fn chat(&mut self, answering: &Answering, delta: &Delta) -> Vec<Value> {
        let mut deltas = Vec::new();
        if !std::mem::replace(&mut self.begun[delta.index], true) {
            deltas.push(json!({ "role": "assistant", "content": "" }));
        }
        for part in &delta.parts {
            deltas.push(match part {
                Part::Thinking(text) => json!({ "reasoning_content": text }),
                Part::Content(text) => json!({ "content": text }),
                Part::Call(call) => {
                    let mut value = tool_call(call);
                    value["index"] = self.n_calls[delta.index].into();
                    self.n_calls[delta.index] += 1;
                    json!({ "tool_calls": [value] })
                }
            });
        }
        if deltas.is_empty() && !delta.tokens.is_empty() {
            deltas.push(json!({}));
        }
        let has_logprobs = self.wants_logprobs && !delta.tokens.is_empty();
        let mut logprobs = has_logprobs.then(|| {
            let tokenizer = &answering.state.tokenizer;
            chat_logprobs(&|token| tokenizer.token_bytes(token), &delta.tokens)
        });
        let last = deltas.len().saturating_sub(1);
        let mut choices: Vec<Value> = deltas
            .into_iter()
            .enumerate()
            .map(|(i, fields)| {
                let logprobs = if i == last { logprobs.take() } else { None };
                json!({
                    "index": delta.index,
                    "delta": fields,
                    "logprobs": logprobs,
                    "finish_reason": null,
                })
            })
            .collect();
        if delta.finish.is_some() {
            choices.push(json!({
                "index": delta.index,
                "delta": {},
                "logprobs": null,
                "finish_reason": finish(&answering.texts[delta.index]).name(),
            }));
        }
        choices
    }

    /// Returns the chunks of one completion.
    fn completion(&self, answering: &Answering, delta: &Delta) -> Vec<Value> {
        let tokenizer = &answering.state.tokenizer;
        let content = match delta.parts.as_slice() {
            [Part::Content(text)] => text.as_str(),
            _ => "",
        };
        let has_logprobs = self.wants_logprobs && !delta.tokens.is_empty();
        let logprobs = has_logprobs.then(|| {
            let piece = |token| tokenizer.token_bytes(token);
            old_logprobs(&piece, content, &delta.tokens, delta.from)
        });
        let ends = delta.finish.is_some();
        let reason = ends.then(|| finish(&answering.texts[delta.index]).name());
        vec![json!({
            "index": delta.index,
            "text": content,
            "logprobs": logprobs,
            "finish_reason": reason,
        })]
    }
}

impl Format for Chunks {
    fn delta(&mut self, answering: &Answering, delta: &Delta) -> String {
        let choices = match (self.is_chat, delta.begun) {
            (true, _) => self.chat(answering, delta),
            (false, true) => return String::new(),
            (false, false) => self.completion(answering, delta),
        };
        let is_over = answering.texts.iter().all(|text| text.finish.is_some());
        let n = choices.len();
        let mut text = String::new();
        for (i, choice) in choices.into_iter().enumerate() {
            let mut chunk = self.chunk(choice);
            if is_over && i + 1 == n {
                add_truth(&mut chunk, answering);
            }
            text += &sse::data(&chunk);
        }
        text
    }

    fn end(&mut self, answering: &Answering) -> String {
        let mut text = String::new();
        if self.wants_usage {
            let mut chunk = self.base.clone();
            chunk["usage"] = usage(answering);
            text += &sse::data(&chunk);
        }
        text + "data: [DONE]\n\n"
    }

    fn error(&mut self, error: &ApiError) -> String {
        sse::data(&error.body())
    }
}

/// Returns what a list of models says of the one that is served.
fn model(state: &State) -> Value {
    json!({
        "id": state.config.model,
        "object": "model",
        "created": 0,
        "owned_by": "tier-plan",
        "meta": { "n_ctx": state.context, "n_vocab": state.n_vocab },
    })
}

/// Answers `/v1/models`.
pub(crate) async fn models(Shared(state): Shared<Arc<State>>) -> Response {
    let list = json!({ "object": "list", "data": [model(&state)] });
    json_response(StatusCode::OK, &list)
}

/// Answers `/v1/models/{id}`.
pub(crate) async fn one_model(
    Shared(state): Shared<Arc<State>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    // Percent signs can spell what is no UTF-8.
    let Path(id) = id.unwrap_or_else(|_| Path("\u{fffd}".to_string()));
    if id == state.config.model {
        return Ok(json_response(StatusCode::OK, &model(&state)));
    }
    let message = format!("the model: \"{id}\", expected \"{}\"", state.config.model);
    Err(ApiError::new(
        StatusCode::NOT_FOUND,
        "model_not_found",
        message,
    ))
}
