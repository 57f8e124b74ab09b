//! Answers in the form of OpenAI's interface.

pub use crate::calls::Call;
use crate::request::{Endpoint, Request};
use serde_json::{Value, json};
use tier_plan_runtime::batcher::TokenText;

/// Returns the bytes of a token.
pub type Piece<'a> = dyn Fn(u32) -> Vec<u8> + 'a;

/// Log-probability of impossible tokens, since JSON has no infinity.
const IMPOSSIBLE: f32 = -9999.0;

/// Why an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop string came.
    Stop,
    /// It has all tokens that it may have, or the context is full.
    Length,
    /// It calls tools.
    ToolCalls,
}

impl Finish {
    /// Returns the word for it.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::ToolCalls => "tool_calls",
        }
    }
}

/// One of the answers to a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The text, without reasoning that the model marks.
    pub text: String,
    /// Reasoning before the answer.
    pub thinking: Option<String>,
    /// Calls of tools.
    pub calls: Vec<Call>,
    /// Why it ends.
    pub finish: Finish,
    /// Tokens generated, also those that are not in the text.
    pub n_tokens: usize,
    /// The tokens of the text, if their log-probabilities were asked for.
    pub tokens: Option<Vec<TokenText>>,
}

/// An answered request.
pub struct Answered<'a> {
    /// The request.
    pub request: &'a Request,
    /// Name of the model.
    pub model: &'a str,
    /// Seconds since 1970.
    pub created: u64,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Answers, in order.
    pub choices: &'a [Choice],
    /// Returns the bytes of a token.
    pub piece: &'a Piece<'a>,
    /// What the id has after the word for the kind of answer.
    pub id: &'a str,
}

impl Answered<'_> {
    /// Returns the body of the answer.
    pub fn body(&self) -> Value {
        let (name, object) = match self.request.endpoint {
            Endpoint::Chat => ("chatcmpl", "chat.completion"),
            Endpoint::Completions => ("cmpl", "text_completion"),
        };
        let completion_tokens: usize = self.choices.iter().map(|c| c.n_tokens).sum();
        let choices: Vec<Value> = self
            .choices
            .iter()
            .enumerate()
            .map(|(i, choice)| self.choice(i, choice))
            .collect();
        json!({
            "id": format!("{name}-{}", self.id),
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": {
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": self.prompt_tokens + completion_tokens,
            },
        })
    }

    fn choice(&self, index: usize, choice: &Choice) -> Value {
        let finish = choice.finish.name();
        if self.request.endpoint == Endpoint::Completions {
            let tokens = choice.tokens.as_deref();
            let logprobs =
                tokens.map(|t| old_logprobs(self.piece, &choice.text, t, Place::default()));
            return json!({
                "index": index,
                "text": choice.text,
                "logprobs": logprobs,
                "finish_reason": finish,
            });
        }
        let mut message = json!({ "role": "assistant", "content": choice.text });
        if let Some(thinking) = &choice.thinking {
            message["reasoning_content"] = thinking.as_str().into();
        }
        if !choice.calls.is_empty() {
            message["tool_calls"] = choice.calls.iter().map(tool_call).collect();
            if choice.text.is_empty() {
                message["content"] = Value::Null;
            }
        }
        let tokens = choice.tokens.as_deref();
        let logprobs = tokens.map(|tokens| chat_logprobs(self.piece, tokens));
        json!({
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish,
        })
    }
}

/// Returns a call as chats have it.
pub(crate) fn tool_call(call: &Call) -> Value {
    json!({
        "id": call.id,
        "type": "function",
        "function": { "name": call.name, "arguments": call.arguments },
    })
}

/// Returns the log-probabilities of tokens as chats have them.
pub fn chat_logprobs(piece: &Piece<'_>, tokens: &[TokenText]) -> Value {
    let one = |token: u32, logprob: f32| {
        let bytes = piece(token);
        json!({
            "token": String::from_utf8_lossy(&bytes),
            "logprob": finite(logprob),
            "bytes": bytes,
        })
    };
    let whole = |token: &TokenText| {
        let chosen = token.logprobs.chosen;
        let mut value = one(chosen.token, chosen.value);
        let top = token.logprobs.top.iter().map(|t| one(t.token, t.value));
        value["top_logprobs"] = top.collect();
        value
    };
    json!({ "content": tokens.iter().map(whole).collect::<Vec<_>>() })
}

/// A place in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Bytes before it.
    pub bytes: usize,
    /// Characters before it.
    pub chars: usize,
}

impl Place {
    /// Returns the place after `text`, which begins here.
    pub fn after(self, text: &str) -> Self {
        Self {
            bytes: self.bytes + text.len(),
            chars: self.chars + text.chars().count(),
        }
    }
}

/// Returns the log-probabilities of the tokens of `text`, which begins at `from`, as completions have
/// them.
pub fn old_logprobs(piece: &Piece<'_>, text: &str, tokens: &[TokenText], from: Place) -> Value {
    let name = |token: u32| match String::from_utf8(piece(token)) {
        Ok(text) => text,
        // So that different tokens have different keys.
        Err(error) => error
            .as_bytes()
            .iter()
            .fold("bytes:".to_string(), |name, byte| {
                format!("{name}\\x{byte:02x}")
            }),
    };
    let top = |t: &TokenText| -> Value {
        let entries = t.logprobs.top.iter();
        let entries = entries.map(|t| (name(t.token), finite(t.value).into()));
        Value::Object(entries.collect())
    };
    let chosen = |t: &TokenText| t.logprobs.chosen;
    json!({
        "tokens": tokens.iter().map(|t| name(chosen(t).token)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| finite(chosen(t).value)).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": char_offsets(text, tokens, from),
    })
}

/// Returns where each token begins in the answer, in characters.
fn char_offsets(text: &str, tokens: &[TokenText], from: Place) -> Vec<usize> {
    let (mut chars, mut bytes) = (from.chars, 0);
    let offset = |token: &TokenText| {
        let start = token.start.saturating_sub(from.bytes);
        let start = text.floor_char_boundary(start).max(bytes);
        chars += text[bytes..start].chars().count();
        bytes = start;
        chars
    };
    tokens.iter().map(offset).collect()
}

/// Returns a log-probability as JSON can have it.
pub(crate) fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        IMPOSSIBLE
    }
}
