//! Lines of answers.

use super::request::{BadLine, Endpoint, Request};
use serde_json::{Value, json};
use std::hash::{DefaultHasher, Hasher};
use tier_plan_runtime::sampler::TokenLogProbabilities;

/// What the id of every answer begins with.
pub(super) const ID_PREFIX: &str = "batch_req_";

/// Log-probability of impossible tokens, since JSON has no infinity.
const IMPOSSIBLE: f32 = -9999.0;

/// Why an answer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop string came.
    Stop,
    /// It has all tokens that it may have, or the context is full.
    Length,
}

impl Finish {
    fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}

/// A generated token with its log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenText {
    /// Where its text begins in the answer, in bytes.
    pub start: usize,
    /// Those of the token and of the most likely ones.
    pub logprobs: TokenLogProbabilities,
}

/// One of the answers to a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The text, without reasoning that the model marks.
    pub text: String,
    /// Reasoning before the answer.
    pub thinking: Option<String>,
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
    pub piece: &'a dyn Fn(u32) -> Vec<u8>,
}

impl Answered<'_> {
    /// Returns the line of the output.
    pub fn line(&self) -> Value {
        let id = number(&self.request.custom_id);
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
            "id": format!("{ID_PREFIX}{id}"),
            "custom_id": self.request.custom_id,
            "response": {
                "status_code": 200,
                "request_id": format!("req_{id}"),
                "body": {
                    "id": format!("{name}-{id}"),
                    "object": object,
                    "created": self.created,
                    "model": self.model,
                    "choices": choices,
                    "usage": {
                        "prompt_tokens": self.prompt_tokens,
                        "completion_tokens": completion_tokens,
                        "total_tokens": self.prompt_tokens + completion_tokens,
                    },
                },
            },
            "error": null,
        })
    }

    fn choice(&self, index: usize, choice: &Choice) -> Value {
        let finish = choice.finish.name();
        if self.request.endpoint == Endpoint::Completions {
            let logprobs = choice
                .tokens
                .as_ref()
                .map(|t| self.old_logprobs(&choice.text, t));
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
        let logprobs = choice.tokens.as_ref().map(|tokens| {
            let content: Vec<Value> = tokens.iter().map(|t| self.chat_logprobs(t)).collect();
            json!({ "content": content })
        });
        json!({
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish,
        })
    }

    /// Returns the log-probabilities of a token as chats have them.
    fn chat_logprobs(&self, token: &TokenText) -> Value {
        let one = |token: u32, logprob: f32| {
            let bytes = (self.piece)(token);
            json!({
                "token": String::from_utf8_lossy(&bytes),
                "logprob": finite(logprob),
                "bytes": bytes,
            })
        };
        let chosen = token.logprobs.chosen;
        let mut value = one(chosen.token, chosen.value);
        let top = token.logprobs.top.iter().map(|t| one(t.token, t.value));
        value["top_logprobs"] = top.collect();
        value
    }

    /// Returns the log-probabilities of an answer as completions have them.
    fn old_logprobs(&self, text: &str, tokens: &[TokenText]) -> Value {
        let name = |token: u32| {
            let bytes = (self.piece)(token);
            match String::from_utf8(bytes) {
                Ok(text) => text,
                // So that different tokens have different keys.
                Err(e) => e
                    .as_bytes()
                    .iter()
                    .fold("bytes:".to_string(), |name, byte| {
                        format!("{name}\\x{byte:02x}")
                    }),
            }
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
            "text_offset": char_offsets(text, tokens),
        })
    }
}

/// Returns where each token begins in the text, in characters.
fn char_offsets(text: &str, tokens: &[TokenText]) -> Vec<usize> {
    let (mut chars, mut bytes) = (0, 0);
    let offset = |token: &TokenText| {
        let start = text.floor_char_boundary(token.start).max(bytes);
        chars += text[bytes..start].chars().count();
        bytes = start;
        chars
    };
    tokens.iter().map(offset).collect()
}

/// Returns the line of the output for a line that has no answer.
pub fn refusal(line: usize, bad: &BadLine) -> Value {
    let name = bad.custom_id.clone();
    let id = number(name.as_deref().unwrap_or(&format!("line {line}")));
    json!({
        "id": format!("{ID_PREFIX}{id}"),
        "custom_id": name,
        "line": line,
        "response": null,
        "error": { "code": bad.code.name(), "message": bad.message },
    })
}

/// Returns a number that a name has in every run.
fn number(name: &str) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(name.as_bytes());
    format!("{:016x}", hasher.finish())
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob
    } else {
        IMPOSSIBLE
    }
}
