//! Endpoints beside generation: health, metrics, properties, and the tokenizer.

use crate::ask::prepare;
use crate::error::{ApiError, json_response};
use crate::http::body;
use crate::job::Command;
use crate::prompts::Conversation;
use crate::request::fields::Fields;
use crate::request::read::{messages, tokens, variables};
use crate::request::tools::{Tools, tools};
use crate::request::{BadLine, Message, object};
use crate::state::State;
use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Duration;
use tier_plan_runtime::batcher::TextStatus;
use tier_plan_runtime::schedule::TextState;
use tokio::sync::oneshot;

/// Longest wait for a step to end.
pub(crate) const STATUS_TIME: Duration = Duration::from_secs(10);

/// Answers `/health`: whether requests are taken.
pub(crate) async fn health(Shared(state): Shared<Arc<State>>) -> Response {
    if state.is_stopping() {
        return ApiError::stopping().into_response();
    }
    if state.loaded().is_some() {
        return json_response(StatusCode::OK, &json!({ "status": "ok" }));
    }
    let progress = state.progress();
    let mut body = ApiError::loading(progress).body();
    body["status"] = "loading model".into();
    body["progress"] = progress.into();
    let mut response = json_response(StatusCode::SERVICE_UNAVAILABLE, &body);
    let seconds = header::HeaderValue::from_static("5");
    response.headers_mut().insert(header::RETRY_AFTER, seconds);
    response
}

/// Answers `/metrics`.
pub(crate) async fn metrics(Shared(state): Shared<Arc<State>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], state.metrics.text()).into_response()
}

/// Answers `/props`: the model and the options of sampling.
pub(crate) async fn props(Shared(state): Shared<Arc<State>>) -> Response {
    let sampling = &state.config.sampling;
    let loaded = state.loaded();
    let spelled = |token: Option<u32>| {
        let bytes = token.map_or(&[][..], |token| state.tokenizer.piece(token));
        String::from_utf8_lossy(bytes).into_owned()
    };
    let value = json!({
        "model_alias": state.config.model,
        "model_path": state.config.file,
        "total_slots": loaded.map(|loaded| loaded.max_texts),
        "n_ctx": state.context,
        "n_vocab": state.n_vocab,
        "has_chat_template": state.chats.is_some(),
        "chat_template": state.chats.as_ref().map_or("", |chats| chats.source()),
        "bos_token": spelled(state.tokenizer.bos()),
        "eos_token": spelled(state.tokenizer.eos()),
        "modalities": { "vision": false, "audio": false },
        "build_info": concat!("tier-plan ", env!("CARGO_PKG_VERSION")),
        "uptime_s": state.started.elapsed().as_secs(),
        "tiers": loaded.map(|loaded| loaded.promise().tiers.clone()),
        "emulated": loaded.map(|loaded| loaded.promise().emulated),
        "predicted_tok_s": loaded.and_then(|loaded| loaded.promise().decode_tok_s),
        "default_generation_settings": { "n_ctx": state.context, "params": {
            "seed": sampling.seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repeat_penalty,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
        }},
    });
    json_response(StatusCode::OK, &value)
}

/// Answers `/slots`: as many places as there are texts at once, each with its text or idle, and the
/// texts that wait for one.
pub(crate) async fn slots(Shared(state): Shared<Arc<State>>) -> Result<Response, ApiError> {
    let Some(loaded) = state.loaded() else {
        return Err(ApiError::loading(state.progress()));
    };
    let (reply, answer) = oneshot::channel();
    let sent = state.inbox.send(Command::Status(reply));
    sent.map_err(|_| ApiError::stopping())?;
    let statuses = match tokio::time::timeout(STATUS_TIME, answer).await {
        Ok(Ok(statuses)) => statuses,
        Ok(Err(_)) => return Err(ApiError::stopping()),
        Err(_) => return Err(ApiError::slow_step()),
    };
    let (at_work, waiting): (Vec<_>, Vec<_>) = statuses.iter().partition(|s| is_at_work(s));
    let n_idle = loaded.max_texts.saturating_sub(at_work.len());
    let idle = json!({
        "id": -1,
        "is_processing": false,
        "state": "idle",
        "n_prompt_tokens": 0,
        "n_prompt_done": null,
        "n_decoded": 0,
    });
    let mut list: Vec<Value> = at_work.into_iter().map(slot).collect();
    list.extend(std::iter::repeat_n(idle, n_idle));
    list.extend(waiting.into_iter().map(slot));
    for place in &mut list {
        place["n_ctx"] = state.context.into();
    }
    Ok(json_response(StatusCode::OK, &Value::from(list)))
}

/// Whether a text is computed in steps.
fn is_at_work(status: &TextStatus) -> bool {
    matches!(
        status.state,
        TextState::Running | TextState::InPrompt { .. }
    )
}

/// Returns what a text is doing.
pub(crate) fn slot(status: &TextStatus) -> Value {
    let (name, done) = match status.state {
        TextState::Waiting => ("waiting", None),
        TextState::InPrompt { done } => ("prompt", Some(done)),
        TextState::Running => ("generating", None),
        TextState::Preempted => ("preempted", None),
    };
    json!({
        "id": status.id.0,
        "is_processing": is_at_work(status),
        "state": name,
        "n_prompt_tokens": status.n_prompt,
        "n_prompt_done": done,
        "n_decoded": status.n_new,
    })
}

/// A text whose tokens are wanted.
pub(crate) struct ToTokenize {
    content: String,
    add_special: bool,
    with_pieces: bool,
}

impl ToTokenize {
    /// Checks the body of a request.
    pub fn read(bytes: &[u8]) -> Result<Self, BadLine> {
        let body = object(bytes)?;
        let body = Fields::new(&body, "");
        let Some(content) = body.text("content")? else {
            return Err(body.bad("content", "a string"));
        };
        Ok(Self {
            content: content.to_string(),
            add_special: body.flag("add_special")?.unwrap_or(false),
            with_pieces: body.flag("with_pieces")?.unwrap_or(false),
        })
    }
}

/// Answers `/tokenize` as llama.cpp does.
pub(crate) async fn tokenize(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let bytes = body::read(&state, &headers, body).await?;
    let value = prepare(&state, move |state| {
        let wanted = ToTokenize::read(&bytes)?;
        let encoded = state.tokenizer.encode(&wanted.content, wanted.add_special);
        let ids = encoded.map_err(|e| ApiError::invalid(format!("content: {e}")))?;
        if !wanted.with_pieces {
            return Ok(json!({ "tokens": ids }));
        }
        let piece = |id: &u32| {
            let bytes = state.tokenizer.piece(*id);
            let text = std::str::from_utf8(bytes).map(Value::from);
            json!({ "id": id, "piece": text.unwrap_or_else(|_| bytes.into()) })
        };
        Ok(json!({ "tokens": ids.iter().map(piece).collect::<Vec<_>>() }))
    })
    .await?;
    Ok(json_response(StatusCode::OK, &value))
}

/// Checks the body of a request for the text of tokens.
pub(crate) fn to_detokenize(bytes: &[u8]) -> Result<Vec<u32>, BadLine> {
    let body = object(bytes)?;
    let body = Fields::new(&body, "");
    match body.get("tokens") {
        Some(Value::Array(items)) if items.is_empty() => Ok(Vec::new()),
        Some(Value::Array(items)) => tokens("tokens", items),
        _ => Err(body.bad("tokens", "an array of token ids")),
    }
}

/// Answers `/detokenize` as llama.cpp does.
pub(crate) async fn detokenize(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let bytes = body::read(&state, &headers, body).await?;
    let text = prepare(&state, move |state| {
        let ids = to_detokenize(&bytes)?;
        let past = ids.iter().position(|id| *id as usize >= state.n_vocab);
        if let Some(i) = past {
            let last = state.n_vocab.saturating_sub(1);
            let message = format!("tokens[{i}]: {}, expected a token id up to {last}", ids[i]);
            return Err(ApiError::invalid(message));
        }
        Ok(state.tokenizer.decode(&ids))
    })
    .await?;
    Ok(json_response(StatusCode::OK, &json!({ "content": text })))
}

/// A conversation whose prompt is wanted.
pub(crate) struct ToRender {
    messages: Vec<Message>,
    tools: Tools,
    variables: Map<String, Value>,
}

impl ToRender {
    /// Checks the body of a request.
    pub fn read(bytes: &[u8]) -> Result<Self, BadLine> {
        let body = object(bytes)?;
        let body = Fields::new(&body, "");
        Ok(Self {
            messages: messages(body)?,
            tools: tools(body)?,
            variables: variables(body)?,
        })
    }
}

/// Answers `/apply-template` as llama.cpp does.
pub(crate) async fn apply_template(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let bytes = body::read(&state, &headers, body).await?;
    let text = prepare(&state, move |state| {
        let wanted = ToRender::read(&bytes)?;
        let conversation = Conversation {
            messages: &wanted.messages,
            tools: &wanted.tools.list,
            variables: &wanted.variables,
        };
        Ok(state.prompts().rendered(conversation)?.text)
    })
    .await?;
    Ok(json_response(StatusCode::OK, &json!({ "prompt": text })))
}
