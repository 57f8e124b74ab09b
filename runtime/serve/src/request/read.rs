//! Fields of a body.

use super::fields::{Fields, bad, shown, whole};
use super::format;
use super::tools::{self, Tools};
use super::{
    BadLine, Code, Endpoint, Message, Prompt, Request, Role, Sampling, Sender, Stream, unsupported,
};
use serde_json::{Map, Value};
use tier_plan_runtime::sampler::{LogitBias, SamplerConfig};

/// Most tokens that a request may ask for, more than any context.
pub(crate) const MAX_TOKENS: usize = 1 << 24;

/// Most answers per request.
const MAX_CHOICES: usize = 128;

/// Most log-probabilities per token beside the token's own.
pub(crate) const MAX_TOP_LOGPROBS: usize = 20;

/// Most stop strings per request, and bytes of each.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;

/// Largest `top_k`: the largest whole number that every JSON reader keeps exact.
const MAX_TOP_K: i128 = (1 << 53) - 1;

/// Most tokens with a bias.
const MAX_BIASES: usize = 1024;

/// Checks the fields of a body.
pub(crate) fn checked(
    custom_id: &str,
    endpoint: Endpoint,
    body: Fields<'_>,
    sender: Sender,
) -> Result<Request, BadLine> {
    let is_served_chat = sender == Sender::Client && endpoint == Endpoint::Chat;
    unsupported::check(body, endpoint, sender)?;
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
        stream: stream(body)?,
        tools: if is_served_chat {
            tools::tools(body)?
        } else {
            Tools::default()
        },
        variables: if endpoint == Endpoint::Chat {
            variables(body)?
        } else {
            Map::new()
        },
        format: format::format(body)?,
    })
}

/// Variables of templates that are not a client's to set.
const RESERVED: [&str; 6] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
];

/// Words for how much a model should reason.
pub(crate) const EFFORTS: [&str; 6] = ["none", "minimal", "low", "medium", "high", "xhigh"];

/// Reads the variables for the chat template.
pub(crate) fn variables(body: Fields<'_>) -> Result<Map<String, Value>, BadLine> {
    let mut variables = match body.get("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(variables)) => variables.clone(),
        Some(_) => return Err(body.bad("chat_template_kwargs", "an object")),
    };
    if let Some(name) = RESERVED.iter().find(|name| variables.contains_key(**name)) {
        let place = body.place("chat_template_kwargs");
        let message = format!("{place}: \"{name}\" is set by the program, expected other names");
        return Err(BadLine::new(Code::InvalidRequest, message));
    }
    if body.flag("add_generation_prompt")? == Some(false) {
        let place = body.place("add_generation_prompt");
        let message = format!("{place}: false is not supported, expected true");
        return Err(BadLine::new(Code::Unsupported, message));
    }
    if let Some(effort) = body.text("reasoning_effort")? {
        if !EFFORTS.contains(&effort) {
            let expected = "\"none\", \"minimal\", \"low\", \"medium\", \"high\", or \"xhigh\"";
            return Err(body.bad("reasoning_effort", expected));
        }
        variables.insert("reasoning_effort".into(), effort.into());
    }
    Ok(variables)
}

fn stream(body: Fields<'_>) -> Result<Stream, BadLine> {
    let usage = match body.get("stream_options") {
        None => None,
        Some(Value::Object(options)) => {
            let path = body.place("stream_options");
            Fields::new(options, &path).flag("include_usage")?
        }
        Some(_) => return Err(body.bad("stream_options", "an object")),
    };
    Ok(Stream {
        wanted: body.flag("stream")?.unwrap_or(false),
        usage: usage.unwrap_or(false),
    })
}

/// Reads the messages of a conversation.
pub(crate) fn messages(body: Fields<'_>) -> Result<Vec<Message>, BadLine> {
    let expected = "an array of one or more messages";
    match body.get("messages") {
        Some(Value::Array(items)) if !items.is_empty() => {
            let read = |(i, item)| message(&format!("{}[{i}]", body.place("messages")), item);
            let mut messages: Vec<Message> = items
                .iter()
                .enumerate()
                .map(read)
                .collect::<Result<_, _>>()?;
            name_results(&mut messages);
            Ok(messages)
        }
        _ => Err(body.bad("messages", expected)),
    }
}

/// Gives results of calls the names of the tools, which some templates print.
pub(crate) fn name_results(messages: &mut [Message]) {
    let mut names = std::collections::HashMap::new();
    for message in messages {
        for call in &message.calls {
            names.insert(call.id.clone(), call.name.clone());
        }
        if let Some(id) = &message.call_id
            && message.name.is_none()
        {
            message.name = names.get(id).cloned();
        }
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
        Some("tool") => Role::Tool,
        _ => {
            let expected = "\"system\", \"user\", \"assistant\", or \"tool\"";
            return Err(fields.bad("role", expected));
        }
    };
    if fields.get("function_call").is_some() {
        let place = fields.place("function_call");
        let message = format!("{place} is not supported, expected \"tool_calls\"");
        return Err(BadLine::new(Code::Unsupported, message));
    }
    let calls = match role {
        Role::Assistant => tools::calls(fields)?,
        _ => Vec::new(),
    };
    let content = match fields.get("content") {
        None if !calls.is_empty() => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => parts
            .iter()
            .enumerate()
            .map(|(i, part)| text_part(&format!("{place}.content[{i}]"), part))
            .collect::<Result<String, BadLine>>()?,
        _ => return Err(fields.bad("content", "a string or an array of parts of type \"text\"")),
    };
    let call_id = match role {
        Role::Tool => match fields.text("tool_call_id")? {
            Some(id) => Some(id.to_string()),
            None => return Err(fields.bad("tool_call_id", "the call's name")),
        },
        _ => None,
    };
    let name = match role {
        Role::Tool => fields.text("name")?.map(str::to_string),
        _ => None,
    };
    Ok(Message {
        thinking: fields.text("reasoning_content")?.map(str::to_string),
        calls,
        call_id,
        name,
        ..Message::new(role, &content)
    })
}

fn text_part(place: &str, part: &Value) -> Result<String, BadLine> {
    let Value::Object(fields) = part else {
        return Err(bad(place, Some(part), "an object with a type and a text"));
    };
    let part = Fields::new(fields, place);
    match part.text("type")? {
        Some("text") => part
            .text("text")?
            .map(str::to_string)
            .ok_or_else(|| part.bad("text", "a string")),
        _ => Err(tools::kind(part, "\"text\"")),
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
                        "{}: {} prompts, expected one; give each its own request",
                        body.place("prompt"),
                        items.len()
                    ),
                ));
            }
            _ => return Ok(Prompt::Tokens(tokens(&body.place("prompt"), items)?)),
        },
        Some(one) => one,
        None => return Err(body.bad("prompt", expected)),
    };
    match one {
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(items) => Ok(Prompt::Tokens(tokens(&body.place("prompt"), items)?)),
        _ => Err(body.bad("prompt", expected)),
    }
}

/// Reads token ids.
pub(crate) fn tokens(place: &str, items: &[Value]) -> Result<Vec<u32>, BadLine> {
    if items.is_empty() {
        let message = format!("{place}: an empty array, expected a text or one or more token ids");
        return Err(BadLine::new(Code::InvalidRequest, message));
    }
    let token = |(i, item): (usize, &Value)| {
        let token = whole(item).and_then(|n| u32::try_from(n).ok());
        token.ok_or_else(|| bad(&format!("{place}[{i}]"), Some(item), "a token id"))
    };
    items.iter().enumerate().map(token).collect()
}

fn max_tokens(body: Fields<'_>) -> Result<Option<usize>, BadLine> {
    let all = [
        ("max_tokens", body.count("max_tokens", 1..=MAX_TOKENS)?),
        (
            "max_completion_tokens",
            body.count("max_completion_tokens", 1..=MAX_TOKENS)?,
        ),
        ("n_predict", n_predict(body)?),
    ];
    let mut given = all.iter().filter_map(|(name, n)| Some((*name, (*n)?)));
    let Some((first, n)) = given.next() else {
        return Ok(None);
    };
    match given.find(|(_, other)| *other != n) {
        Some((name, _)) => {
            let expected = format!("{n} as in {first}, or one of the two fields");
            Err(body.bad(name, &expected))
        }
        None => Ok(Some(n)),
    }
}

/// Reads llama.cpp's name for the most tokens of an answer; -1 is as many as fit.
fn n_predict(body: Fields<'_>) -> Result<Option<usize>, BadLine> {
    let expected = format!("a whole number from 1 to {MAX_TOKENS}, or -1 for as many as fit");
    let read = |value: &Value| match whole(value) {
        Some(-1) => Ok(MAX_TOKENS),
        Some(n) if (1..=MAX_TOKENS as i128).contains(&n) => Ok(n as usize),
        _ => Err(body.bad("n_predict", &expected)),
    };
    body.get("n_predict").map(read).transpose()
}

pub(crate) fn sampling(body: Fields<'_>) -> Result<Sampling, BadLine> {
    // OpenAI's interface has no such field; engines that add it differ in its name.
    let repetition = body.number("repetition_penalty")?;
    let repeat = body.number("repeat_penalty")?;
    if let (Some(one), Some(other)) = (repetition, repeat)
        && one != other
    {
        let expected = format!("{one} as in repetition_penalty, or one of the two fields");
        return Err(body.bad("repeat_penalty", &expected));
    }
    let sampling = Sampling {
        temperature: body.number("temperature")?,
        top_k: top_k(body)?,
        top_p: body.number("top_p")?,
        min_p: body.number("min_p")?,
        repetition_penalty: repetition.or(repeat),
        repeat_last_n: None,
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
        Some(k) if (1..=MAX_TOP_K).contains(&k) => Ok(usize::try_from(k).unwrap_or(usize::MAX)),
        _ => {
            let expected = format!("a whole number up to {MAX_TOP_K}, or -1 for all tokens");
            Err(body.bad("top_k", &expected))
        }
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
    stop_strings(body, "stop")
}

/// Reads the field with texts that end an answer.
pub(crate) fn stop_strings(body: Fields<'_>, name: &str) -> Result<Vec<String>, BadLine> {
    let place = body.place(name);
    let expected =
        format!("a string of 1 to {MAX_STOP_BYTES} bytes, or an array of at most {MAX_STOPS}");
    let one = |item: &Value| match item.as_str() {
        Some(text) if (1..=MAX_STOP_BYTES).contains(&text.len()) => Ok(text.to_string()),
        _ => Err(bad(&place, Some(item), &expected)),
    };
    match body.get(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() <= MAX_STOPS => items.iter().map(one).collect(),
        Some(Value::Array(_)) => Err(body.bad(name, &expected)),
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
    let place = body.place("logit_bias");
    let mut biases = match body.get("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(entries)) if entries.len() <= MAX_BIASES => {
            let one = |(key, value): (&String, &Value)| {
                let token = key.parse::<u32>().ok();
                let token = token.filter(|_| key.bytes().all(|b| b.is_ascii_digit()));
                let key = shown(&Value::from(key.as_str()));
                bias(&format!("{place}[{key}]"), token, value)
            };
            entries.iter().map(one).collect::<Result<Vec<_>, _>>()?
        }
        // As llama.cpp has them.
        Some(Value::Array(pairs)) if pairs.len() <= MAX_BIASES => {
            let one = |(i, pair): (usize, &Value)| match pair.as_array().map(Vec::as_slice) {
                Some([token, value]) => {
                    let token = whole(token).and_then(|n| u32::try_from(n).ok());
                    bias(&format!("{place}[{i}]"), token, value)
                }
                _ => Err(bad(&format!("{place}[{i}]"), Some(pair), "a pair")),
            };
            let pairs = pairs.iter().enumerate().map(one);
            let mut biases = pairs.collect::<Result<Vec<_>, _>>()?;
            // Lists of forbidden words have tokens several times.
            biases.sort_by_key(|b| b.token);
            biases.dedup();
            biases
        }
        Some(_) => {
            let expected = format!(
                "an object of at most {MAX_BIASES} token ids, each with -100 to 100, or an array of such pairs"
            );
            return Err(body.bad("logit_bias", &expected));
        }
    };
    biases.sort_by_key(|b| b.token);
    match biases
        .windows(2)
        .find(|pair| pair[0].token == pair[1].token)
    {
        // As "7" and "07".
        Some(pair) => Err(BadLine::new(
            Code::InvalidRequest,
            format!(
                "{}: token {} is there twice, expected once",
                body.place("logit_bias"),
                pair[0].token
            ),
        )),
        None => Ok(biases),
    }
}

/// Reads the bias of a token; false practically forbids it.
fn bias(place: &str, token: Option<u32>, value: &Value) -> Result<LogitBias, BadLine> {
    let found = match value {
        Value::Bool(false) => Some(-100.0),
        value => value.as_f64(),
    };
    let (Some(token), Some(found)) = (token, found) else {
        let expected = "a token id with a number from -100 to 100";
        return Err(bad(place, Some(value), expected));
    };
    if !(-100.0..=100.0).contains(&found) {
        return Err(bad(place, Some(value), "-100 to 100"));
    }
    let bias = found as f32;
    Ok(LogitBias { token, bias })
}
