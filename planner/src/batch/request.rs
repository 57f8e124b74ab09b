//! One line of a batch file as a checked request.

use super::fields::{Fields, bad, shown, whole};
use super::{MAX_ID_BYTES, unsupported, value};
use crate::chat::message::{Message, Role};
use crate::printable::one_line;
use serde_json::{Map, Value};
use tier_plan_runtime::sampler::{LogitBias, SamplerConfig};

/// Most tokens that a request may ask for, more than any context.
const MAX_TOKENS: usize = 1 << 24;

/// Most answers per request.
const MAX_CHOICES: usize = 128;

/// Most log-probabilities per token beside the token's own.
const MAX_TOP_LOGPROBS: usize = 20;

/// Most stop strings per request, and bytes of each.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;

/// Most tokens with a bias.
const MAX_BIASES: usize = 1024;

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
    /// Applies to the whole text.
    pub repetition_penalty: Option<f32>,
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
            Some(penalty) => (penalty, usize::MAX),
            None => (defaults.repeat_penalty, defaults.repeat_last_n),
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
    let body = Fields::new(body, "body");
    unsupported::check(body)?;
    let prompt = match endpoint {
        Endpoint::Chat => Prompt::Messages(messages(body)?),
        Endpoint::Completions => prompt(body)?,
    };
    Ok(Request {
        custom_id: custom_id.to_string(),
        endpoint,
        model: body.text("model")?.map(str::to_string),
        prompt,
        max_tokens: max_tokens(body)?,
        sampling: sampling(body)?,
        stop: stops(body)?,
        n: body.count("n", 1..=MAX_CHOICES)?.unwrap_or(1),
        logprobs: logprobs(body, endpoint)?,
        ignore_eos: body.flag("ignore_eos")?.unwrap_or(false),
    })
}

fn messages(body: Fields<'_>) -> Result<Vec<Message>, BadLine> {
    let expected = "an array of one or more messages";
    match body.get("messages") {
        Some(Value::Array(items)) if !items.is_empty() => items
            .iter()
            .enumerate()
            .map(|(i, item)| message(&format!("body.messages[{i}]"), item))
            .collect(),
        _ => Err(body.bad("messages", expected)),
    }
}

fn message(place: &str, item: &Value) -> Result<Message, BadLine> {
    let Value::Object(object) = item else {
        return Err(bad(
            place,
            Some(item),
            "an object with a role and a content",
        ));
    };
    let fields = Fields::new(object, place);
    let role = match fields.text("role")? {
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        _ => return Err(fields.bad("role", "\"system\", \"user\", or \"assistant\"")),
    };
    for name in ["tool_calls", "function_call"] {
        if fields
            .get(name)
            .is_some_and(|v| *v != Value::Array(Vec::new()))
        {
            let message = format!(
                "{} is not supported; leave the field out",
                fields.place(name)
            );
            return Err(BadLine::new(Code::Unsupported, message));
        }
    }
    let content = match fields.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts
            .iter()
            .enumerate()
            .map(|(i, part)| text_part(&format!("{place}.content[{i}]"), part))
            .collect::<Result<String, BadLine>>()?,
        _ => return Err(fields.bad("content", "a string or an array of parts of type \"text\"")),
    };
    Ok(Message {
        thinking: fields.text("reasoning_content")?.map(str::to_string),
        ..Message::new(role, &content)
    })
}

fn text_part<'a>(place: &str, part: &'a Value) -> Result<&'a str, BadLine> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (Some("text"), None) => Err(bad(&format!("{place}.text"), part.get("text"), "a string")),
        (Some(_), _) => {
            let other = shown(&part["type"]);
            let message = format!("{place}.type: {other} is not supported, expected \"text\"");
            Err(BadLine::new(Code::Unsupported, message))
        }
        (None, _) => Err(bad(place, Some(part), "an object with a type and a text")),
    }
}

fn prompt(body: Fields<'_>) -> Result<Prompt, BadLine> {
    let expected = "a string, an array of one string, or an array of token ids";
    let one = match body.get("prompt") {
        Some(Value::Array(items)) => match &items[..] {
            [one @ (Value::String(_) | Value::Array(_))] => one,
            [Value::String(_) | Value::Array(_), ..] => {
                return Err(BadLine::new(
                    Code::Unsupported,
                    format!(
                        "body.prompt: {} prompts, expected one; give each its own line",
                        items.len()
                    ),
                ));
            }
            _ => return Ok(Prompt::Tokens(tokens(items)?)),
        },
        Some(one) => one,
        None => return Err(body.bad("prompt", expected)),
    };
    match one {
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(items) => Ok(Prompt::Tokens(tokens(items)?)),
        _ => Err(body.bad("prompt", expected)),
    }
}

fn tokens(items: &[Value]) -> Result<Vec<u32>, BadLine> {
    if items.is_empty() {
        let message = "body.prompt: an empty array, expected a text or one or more token ids";
        return Err(BadLine::new(Code::InvalidRequest, message));
    }
    let token = |(i, item): (usize, &Value)| {
        let token = whole(item).and_then(|n| u32::try_from(n).ok());
        token.ok_or_else(|| bad(&format!("body.prompt[{i}]"), Some(item), "a token id"))
    };
    items.iter().enumerate().map(token).collect()
}

fn max_tokens(body: Fields<'_>) -> Result<Option<usize>, BadLine> {
    let old = body.count("max_tokens", 1..=MAX_TOKENS)?;
    let new = body.count("max_completion_tokens", 1..=MAX_TOKENS)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(body.bad(
            "max_completion_tokens",
            &format!("{old} as in max_tokens, or one of the two fields"),
        )),
        _ => Ok(new.or(old)),
    }
}

fn sampling(body: Fields<'_>) -> Result<Sampling, BadLine> {
    // OpenAI's interface has no such field; engines that add it differ in its name.
    let repetition = body.number("repetition_penalty")?;
    let sampling = Sampling {
        temperature: body.number("temperature")?,
        top_k: top_k(body)?,
        top_p: body.number("top_p")?,
        min_p: body.number("min_p")?,
        repetition_penalty: repetition.or(body.number("repeat_penalty")?),
        presence_penalty: body.number("presence_penalty")?,
        frequency_penalty: body.number("frequency_penalty")?,
        logit_bias: logit_bias(body)?,
        seed: seed(body)?,
    };
    let checked = sampling.over(&SamplerConfig::default()).check();
    checked.map_err(|wrong| {
        let name = match wrong.option {
            "repeat_penalty" => "repetition_penalty",
            name => name,
        };
        let place = body.place(name);
        let message = format!("{place}: {}, expected {}", wrong.found, wrong.expected);
        BadLine::new(Code::InvalidRequest, message)
    })?;
    Ok(sampling)
}

fn top_k(body: Fields<'_>) -> Result<Option<usize>, BadLine> {
    let as_count = |value: &Value| match whole(value) {
        // llama.cpp and vLLM take both for all tokens.
        Some(-1 | 0) => Ok(0),
        Some(k) if k > 0 => Ok(usize::try_from(k).unwrap_or(usize::MAX)),
        _ => Err(body.bad("top_k", "a whole number, or -1 for all tokens")),
    };
    body.get("top_k").map(as_count).transpose()
}

fn seed(body: Fields<'_>) -> Result<Option<u64>, BadLine> {
    let as_seed = |value: &Value| {
        let negative = value.as_i64().map(i64::cast_unsigned);
        let seed = value.as_u64().or(negative);
        let float = || {
            whole(value)
                .and_then(|n| i64::try_from(n).ok())
                .map(i64::cast_unsigned)
        };
        seed.or_else(float)
            .ok_or_else(|| body.bad("seed", "a whole number of 64 bits"))
    };
    body.get("seed").map(as_seed).transpose()
}

fn stops(body: Fields<'_>) -> Result<Vec<String>, BadLine> {
    let expected =
        format!("a string of 1 to {MAX_STOP_BYTES} bytes, or an array of at most {MAX_STOPS}");
    let one = |item: &Value| match item.as_str() {
        Some(text) if (1..=MAX_STOP_BYTES).contains(&text.len()) => Ok(text.to_string()),
        _ => Err(bad("body.stop", Some(item), &expected)),
    };
    match body.get("stop") {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() <= MAX_STOPS => items.iter().map(one).collect(),
        Some(Value::Array(_)) => Err(body.bad("stop", &expected)),
        Some(item) => Ok(vec![one(item)?]),
    }
}

fn logprobs(body: Fields<'_>, endpoint: Endpoint) -> Result<Option<usize>, BadLine> {
    let top = 0..=MAX_TOP_LOGPROBS;
    if endpoint == Endpoint::Completions {
        return body.count("logprobs", top);
    }
    let n_top = body.count("top_logprobs", top)?;
    match (body.flag("logprobs")?.unwrap_or(false), n_top) {
        (true, n_top) => Ok(Some(n_top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(body.bad("top_logprobs", "\"logprobs\": true beside it")),
    }
}

fn logit_bias(body: Fields<'_>) -> Result<Vec<LogitBias>, BadLine> {
    let expected = format!("an object of at most {MAX_BIASES} token ids, each with -100 to 100");
    let entries = match body.get("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(entries)) if entries.len() <= MAX_BIASES => entries,
        Some(_) => return Err(body.bad("logit_bias", &expected)),
    };
    let mut biases = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        let place = format!("body.logit_bias[{}]", shown(&Value::from(key.as_str())));
        let (Ok(token), Some(bias)) = (key.parse::<u32>(), value.as_f64()) else {
            return Err(bad(
                &place,
                Some(value),
                "a token id with a number from -100 to 100",
            ));
        };
        let bias = bias as f32;
        if !(-100.0..=100.0).contains(&bias) {
            return Err(bad(&place, Some(value), "-100 to 100"));
        }
        biases.push(LogitBias { token, bias });
    }
    biases.sort_by_key(|b| b.token);
    match biases
        .windows(2)
        .find(|pair| pair[0].token == pair[1].token)
    {
        // As "7" and "07".
        Some(pair) => Err(BadLine::new(
            Code::InvalidRequest,
            format!(
                "body.logit_bias: token {} is there twice, expected once",
                pair[0].token
            ),
        )),
        None => Ok(biases),
    }
}
