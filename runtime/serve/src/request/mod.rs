//! Requests of OpenAI's interface, checked: bodies of `/v1/chat/completions` and `/v1/completions`,
//! and lines of batch files.
//!
//! Requests come from strangers. [`Request::parse`] and [`Request::from_body`] take any bytes.

pub(crate) mod fields;
pub mod format;
pub(crate) mod read;
#[cfg(test)]
mod tests;
pub mod tools;
pub(crate) mod unsupported;
pub(crate) mod value;

use fields::{Fields, shown};
use format::Format;
use serde_json::{Map, Value};
use std::hash::{DefaultHasher, Hasher};
use tier_plan_runtime::printable::one_line;
use tier_plan_runtime::sampler::{LogitBias, SamplerConfig};
use tools::{ToolCall, Tools};

/// Longest name of a request in bytes.
pub const MAX_ID_BYTES: usize = 512;

/// Why a line has no answer, in words that programs can compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The line is no JSON object.
    InvalidJson,
    /// A field is missing, of the wrong type, or outside its range.
    InvalidRequest,
    /// A field asks for something that is not implemented.
    Unsupported,
    /// The prompt with the tokens asked for does not fit the context.
    ContextLengthExceeded,
    /// The request is right, and yet it failed while it was computed.
    ServerError,
}

impl Code {
    /// Returns the code as files have it.
    pub fn name(self) -> &'static str {
        match self {
            Code::InvalidJson => "invalid_json",
            Code::InvalidRequest => "invalid_request",
            Code::Unsupported => "unsupported",
            Code::ContextLengthExceeded => "context_length_exceeded",
            Code::ServerError => "server_error",
        }
    }
}

/// Why a line can't be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadLine {
    /// The name of the request, if that much could be read.
    pub custom_id: Option<String>,
    /// The kind of fault.
    pub code: Code,
    /// What is wrong, and what is expected; one line.
    pub message: String,
}

impl BadLine {
    /// Creates an error, whose text may quote a stranger's.
    pub fn new(code: Code, message: impl AsRef<str>) -> Self {
        Self {
            custom_id: None,
            code,
            message: one_line(message.as_ref()).into_owned(),
        }
    }
}

/// Author of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions before the conversation.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
    /// A tool, with the result of a call.
    Tool,
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Author of the message.
    pub role: Role,
    /// Text of the message.
    pub content: String,
    /// Reasoning before the answer.
    pub thinking: Option<String>,
    /// Calls of tools in an answer.
    pub calls: Vec<ToolCall>,
    /// Of a result: the call that it belongs to.
    pub call_id: Option<String>,
    /// Of a result: the tool, if the call is known.
    pub name: Option<String>,
}

impl Message {
    /// Creates a message of a text alone.
    pub fn new(role: Role, content: &str) -> Self {
        Self {
            role,
            content: content.to_string(),
            thinking: None,
            calls: Vec::new(),
            call_id: None,
            name: None,
        }
    }
}

/// The place that a request is sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

/// What is to be continued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// A conversation, for the model's chat template.
    Messages(Vec<Message>),
    /// A text.
    Text(String),
    /// Tokens.
    Tokens(Vec<u32>),
}

/// Options of sampling that a request gives; absent ones are the command's.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampling {
    /// See [`SamplerConfig`], here and below.
    pub temperature: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<usize>,
    /// Nucleus sampling.
    pub top_p: Option<f32>,
    /// Share of the highest probability.
    pub min_p: Option<f32>,
    /// Applies to the whole text, unless the next field says otherwise.
    pub repetition_penalty: Option<f32>,
    /// Number of last tokens that the repetition penalty counts.
    pub repeat_last_n: Option<usize>,
    /// Applies to generated tokens.
    pub presence_penalty: Option<f32>,
    /// Applies to generated tokens.
    pub frequency_penalty: Option<f32>,
    /// Sorted by token.
    pub logit_bias: Vec<LogitBias>,
    /// Seed of the random numbers.
    pub seed: Option<u64>,
}

impl Sampling {
    /// Returns the options with those of the command for absent ones.
    pub fn over(&self, defaults: &SamplerConfig) -> SamplerConfig {
        let (repeat_penalty, repeat_last_n) = match self.repetition_penalty {
            Some(penalty) => (penalty, self.repeat_last_n.unwrap_or(usize::MAX)),
            None => (
                defaults.repeat_penalty,
                self.repeat_last_n.unwrap_or(defaults.repeat_last_n),
            ),
        };
        SamplerConfig {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repeat_penalty,
            repeat_last_n,
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            logit_bias: match self.logit_bias.as_slice() {
                [] => defaults.logit_bias.clone(),
                own => own.to_vec(),
            },
            seed: self.seed.unwrap_or(defaults.seed),
        }
    }
}

/// A checked request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Name of the request.
    pub custom_id: String,
    /// Where it is sent.
    pub endpoint: Endpoint,
    /// Name of the model, as the request has it.
    pub model: Option<String>,
    /// What is to be continued.
    pub prompt: Prompt,
    /// Most tokens to generate per answer, at least 1.
    pub max_tokens: Option<usize>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Number of answers, at least 1.
    pub n: usize,
    /// Number of the most likely tokens whose log-probabilities are wanted beside the token's own.
    pub logprobs: Option<usize>,
    /// Whether to continue past end-of-text tokens.
    pub ignore_eos: bool,
    /// Whether the answer is wanted as it comes, and how.
    pub stream: Stream,
    /// Tools that the answer may call.
    pub tools: Tools,
    /// Variables for the chat template.
    pub variables: Map<String, Value>,
    /// What the answer must be.
    pub format: Format,
}

/// Who sends a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sender {
    /// A line of a file.
    Batch,
    /// A client of the server.
    Client,
}

/// Whether an answer is wanted as it comes. Batches have no use for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stream {
    /// Whether it is.
    pub wanted: bool,
    /// Whether the stream ends with the counts of tokens.
    pub usage: bool,
}

impl Request {
    /// Parses a line of a batch file, without its line end.
    ///
    /// # Errors
    /// When it is no request, or one that can't be answered by any model.
    pub fn parse(line: &[u8]) -> Result<Self, BadLine> {
        let value = value::parse(line)
            .map_err(|e| BadLine::new(Code::InvalidJson, format!("{e}, expected a JSON object")))?;
        let Value::Object(object) = &value else {
            let found = shown(&value);
            let message = format!("{found}, expected a JSON object with a custom_id and a body");
            return Err(BadLine::new(Code::InvalidJson, message));
        };
        let custom_id = custom_id(Fields::new(object, ""))?;
        parse_named(&custom_id, object).map_err(|bad| BadLine {
            custom_id: Some(custom_id),
            ..bad
        })
    }

    /// Checks the body of a request that has been given the name `id`.
    ///
    /// # Errors
    /// When it is no request, or one that can't be answered by any model.
    pub fn from_body(id: &str, endpoint: Endpoint, body: &[u8]) -> Result<Self, BadLine> {
        read::checked(
            id,
            endpoint,
            Fields::new(&object(body)?, ""),
            Sender::Client,
        )
    }

    /// Returns the seed. A request that names none has one that depends on its name, so that equal
    /// prompts have different answers, and a repeated batch has the same.
    pub fn seed(&self, default: u64) -> u64 {
        self.sampling.seed.unwrap_or_else(|| {
            let mut hasher = DefaultHasher::new();
            hasher.write_u64(default);
            hasher.write(self.custom_id.as_bytes());
            hasher.finish()
        })
    }
}

/// Parses the body of a request as an object.
pub(crate) fn object(body: &[u8]) -> Result<Map<String, Value>, BadLine> {
    let invalid = |found: String| {
        let message = format!("the body: {found}, expected a JSON object");
        BadLine::new(Code::InvalidJson, message)
    };
    match value::parse(body).map_err(|e| invalid(e.to_string()))? {
        Value::Object(object) => Ok(object),
        other => Err(invalid(shown(&other))),
    }
}

fn custom_id(line: Fields<'_>) -> Result<String, BadLine> {
    let id = line.text("custom_id")?;
    let fits = |id: &&str| (1..=MAX_ID_BYTES).contains(&id.len());
    id.filter(fits).map(str::to_string).ok_or_else(|| {
        let expected = format!("a string of 1 to {MAX_ID_BYTES} bytes that no other line has");
        line.bad("custom_id", &expected)
    })
}

fn parse_named(custom_id: &str, object: &Map<String, Value>) -> Result<Request, BadLine> {
    let line = Fields::new(object, "");
    if !line
        .text("method")?
        .is_none_or(|m| m.eq_ignore_ascii_case("POST"))
    {
        return Err(line.bad("method", "\"POST\""));
    }
    let endpoint = match line.text("url")? {
        Some("/v1/chat/completions") => Endpoint::Chat,
        Some("/v1/completions") => Endpoint::Completions,
        _ => return Err(line.bad("url", "\"/v1/chat/completions\" or \"/v1/completions\"")),
    };
    let Some(Value::Object(body)) = line.get("body") else {
        return Err(line.bad("body", "an object"));
    };
    read::checked(
        custom_id,
        endpoint,
        Fields::new(body, "body"),
        Sender::Batch,
    )
}
