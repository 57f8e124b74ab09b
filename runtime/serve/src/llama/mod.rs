//! Completions in llama.cpp's own form: `/completion`, and `/completions`.

mod body;

use crate::answer::finite;
use crate::ask::{Answering, Delta, Prepared, receive};
use crate::calls::Part;
use crate::error::ApiError;
use crate::openai::add_truth;
use crate::request::{Prompt, Request};
use crate::sse::{self, Format};
use crate::state::State;
use axum::body::Body;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use body::Form;
pub(crate) use body::request;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Instant;
use tier_plan_runtime::batcher::{Finish, TextOptions, TokenText};
use tier_plan_runtime::tokenizer::Tokenizer;

/// Number of a slot in answers. Any text has any place here, so it names none.
const NO_SLOT: i32 = -1;

/// Answers `/completion`.
pub(crate) async fn completion(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let received = Instant::now();
    let (prepared, form) = receive(&state, &headers, body, request).await?;
    let chunks = Chunks {
        settings: settings(&prepared.options, &prepared.request, &form),
        prompt: prompt(&state.tokenizer, &prepared),
        form,
        has_new_line: false,
    };
    let mut answering = Answering::begin(&state, prepared, "/completion", received)?;
    if answering.request.stream.wanted {
        return Ok(sse::response(answering, chunks));
    }
    let text = match answering.collect().await {
        Ok(texts) => texts.into_iter().next().unwrap_or_default(),
        Err(error) => return Ok(answering.failed(error)),
    };
    let answer = chunks.ended(&answering, &content(&text.parts), &text.tokens);
    Ok(answering.answered(&chunks.cut(answer)))
}

/// Refuses to fill a gap in a text.
pub(crate) async fn infill() -> ApiError {
    let message = "filling a gap between two texts is not supported; use /completion with a prompt";
    ApiError::new(StatusCode::NOT_IMPLEMENTED, "unsupported", message)
}

/// Refuses to rank documents.
pub(crate) async fn rerank() -> ApiError {
    let message =
        "this server generates texts and ranks no documents; use a server of a reranking model";
    ApiError::new(StatusCode::NOT_IMPLEMENTED, "unsupported", message)
}

/// Returns the text of the prompt.
fn prompt(tokenizer: &Tokenizer, prepared: &Prepared) -> String {
    match &prepared.request.prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Tokens(tokens) => tokenizer.decode(tokens),
        Prompt::Messages(_) => prepared.prompt.clone(),
    }
}

/// Returns the options that an answer was generated with.
fn settings(options: &TextOptions, request: &Request, form: &Form) -> Value {
    let sampling = &options.sampling;
    let bias = sampling.logit_bias.iter();
    let last_n = i64::try_from(sampling.repeat_last_n).unwrap_or(-1);
    json!({
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_last_n": last_n,
        "repeat_penalty": sampling.repeat_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": options.stop,
        "max_tokens": options.max_new,
        "n_predict": options.max_new,
        "ignore_eos": options.ignore_eos,
        "stream": request.stream.wanted,
        "logit_bias": bias.map(|b| json!({ "token": b.token, "bias": b.bias })).collect::<Vec<_>>(),
        "n_probs": if form.has_probs { options.n_top.unwrap_or(0) } else { 0 },
    })
}

fn content(parts: &[Part]) -> String {
    let text = |part: &Part| match part {
        Part::Content(text) => text.clone(),
        // A completion is not parsed.
        Part::Thinking(_) | Part::Call(_) => String::new(),
    };
    parts.iter().map(text).collect()
}

/// Returns tokens with their log-probabilities.
fn probabilities(tokenizer: &Tokenizer, tokens: &[TokenText]) -> Value {
    let one = |token: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(token);
        json!({
            "id": token,
            "token": String::from_utf8_lossy(&bytes),
            "bytes": bytes,
            "logprob": finite(logprob),
        })
    };
    let whole = |token: &TokenText| {
        let chosen = token.logprobs.chosen;
        let mut value = one(chosen.token, chosen.value);
        let top = token.logprobs.top.iter();
        value["top_logprobs"] = top.map(|t| one(t.token, t.value)).collect();
        value
    };
    tokens.iter().map(whole).collect()
}

fn ids(tokens: &[TokenText]) -> Vec<u32> {
    let id = |token: &TokenText| token.logprobs.chosen.token;
    tokens.iter().map(id).collect()
}

/// The answer, whole or in chunks.
struct Chunks {
    form: Form,
    settings: Value,
    prompt: String,
    /// Whether what was sent has a line end.
    has_new_line: bool,
}

impl Chunks {
    /// Returns an answer that has ended, with what of it was not sent before.
    fn ended(&self, answering: &Answering, content: &str, tokens: &[TokenText]) -> Value {
        let counts = answering.counts();
        let finish = answering.texts.first().and_then(|text| text.finish.clone());
        let (stop_type, word) = match finish {
            None => ("none", String::new()),
            Some(Finish::EndToken) => ("eos", String::new()),
            Some(Finish::StopString(word)) => ("word", word),
            Some(Finish::Length) => ("limit", String::new()),
        };
        // The last token is never computed, so a full context has one token more.
        let is_full = counts.prompt + counts.new > answering.state.context;
        let is_cut = stop_type == "limit" && is_full;
        let mut answer = json!({
            "index": 0,
            "content": content,
            "tokens": if self.form.has_tokens { ids(tokens) } else { Vec::new() },
            "id_slot": NO_SLOT,
            "stop": true,
            "model": answering.state.config.model,
            "tokens_predicted": counts.new,
            "tokens_evaluated": counts.prompt,
            "generation_settings": self.settings,
            "prompt": self.prompt,
            "has_new_line": self.has_new_line || content.contains('\n'),
            "truncated": is_cut && answering.request.max_tokens != Some(counts.new),
            "stop_type": stop_type,
            "stopping_word": word,
            "tokens_cached": counts.cached,
        });
        if self.form.has_probs && !answering.request.stream.wanted {
            let tokenizer = &answering.state.tokenizer;
            answer["completion_probabilities"] = probabilities(tokenizer, tokens);
        }
        add_truth(&mut answer, answering);
        answer
    }

    /// Returns the fields of an answer that were asked for, each under its path.
    fn cut(&self, answer: Value) -> Value {
        if self.form.names.is_empty() {
            return answer;
        }
        let names = self.form.names.iter();
        let found = names.filter_map(|name| {
            let value = answer.pointer(&format!("/{name}"))?;
            Some((name.clone(), value.clone()))
        });
        Value::Object(found.collect::<Map<_, _>>())
    }
}

impl Format for Chunks {
    fn delta(&mut self, answering: &Answering, delta: &Delta) -> String {
        let content = content(&delta.parts);
        if content.is_empty() && delta.tokens.is_empty() {
            return String::new();
        }
        self.has_new_line |= content.contains('\n');
        let counts = answering.counts();
        let mut chunk = json!({
            "index": delta.index,
            "content": content,
            "tokens": ids(&delta.tokens),
            "stop": false,
            "id_slot": NO_SLOT,
            "tokens_predicted": counts.new,
            "tokens_evaluated": counts.prompt,
        });
        if self.form.has_probs {
            let tokenizer = &answering.state.tokenizer;
            chunk["completion_probabilities"] = probabilities(tokenizer, &delta.tokens);
        }
        sse::data(&chunk)
    }

    fn end(&mut self, answering: &Answering) -> String {
        let answer = self.ended(answering, "", &[]);
        sse::data(&self.cut(answer))
    }

    fn error(&mut self, error: &ApiError) -> String {
        sse::data(&error.body())
    }
}
