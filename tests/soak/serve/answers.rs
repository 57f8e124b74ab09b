//! What an answer says, in one form for all protocols, whole and streamed.

use super::connection::Answer;
use super::requests::Kind;
use serde_json::{Value, json};

/// Returns the texts of an answer: of each what is thought, content, and calls, why it ends, and
/// log-probabilities; and the number of new tokens.
pub fn of(kind: Kind, answer: &Answer) -> Value {
    let text = answer.text();
    if answer.is_stream {
        let events = events(&text);
        return match kind {
            Kind::Completion | Kind::Chat => chunks(&events),
            Kind::Message => message_events(&events),
            Kind::Response => response_events(&events),
        };
    }
    let body: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    match kind {
        Kind::Completion | Kind::Chat => choices(&body),
        Kind::Message => message(&body),
        Kind::Response => response(&body),
    }
}

/// Returns the data of all events.
fn events(text: &str) -> Vec<Value> {
    let parts = text
        .split("\n\n")
        .filter(|part| !part.is_empty() && !part.starts_with(':'));
    let data = |part: &str| {
        let data = part.lines().find_map(|line| line.strip_prefix("data: "));
        let data = data.unwrap_or_else(|| panic!("{part:?} in {text}"));
        let value: Value = serde_json::from_str(data).unwrap_or_else(|_| data.into());
        assert!(value.get("error").is_none_or(Value::is_null), "{value}");
        value
    };
    parts.map(data).collect()
}

/// A text of an answer.
#[derive(Default)]
struct Text {
    content: String,
    thinking: String,
    /// Name and arguments of each.
    calls: Vec<[String; 2]>,
    finish: Value,
    logprobs: Vec<Value>,
}

impl Text {
    fn value(self) -> Value {
        json!({
            "content": self.content, "thinking": self.thinking, "calls": self.calls,
            "finish": self.finish, "logprobs": self.logprobs,
        })
    }

    /// Adds a choice, its message, or its delta.
    fn add(&mut self, choice: &Value) {
        let part = choice
            .get("message")
            .or(choice.get("delta"))
            .unwrap_or(choice);
        for name in ["text", "content"] {
            self.content += part[name].as_str().unwrap_or("");
        }
        self.thinking += part["reasoning_content"].as_str().unwrap_or("");
        let calls = part["tool_calls"].as_array().into_iter().flatten();
        self.calls.extend(calls.map(|call| {
            let field = |name: &str| call["function"][name].as_str().unwrap().to_string();
            [field("name"), field("arguments")]
        }));
        if !choice["finish_reason"].is_null() {
            self.finish = choice["finish_reason"].clone();
        }
        let logprobs = &choice["logprobs"];
        for name in ["content", "token_logprobs"] {
            let of = logprobs[name].as_array().into_iter().flatten();
            self.logprobs.extend(of.cloned());
        }
    }
}

fn ended(texts: Vec<Text>, n_tokens: &Value) -> Value {
    assert!(n_tokens.is_u64(), "no count of tokens");
    let texts: Vec<Value> = texts.into_iter().map(Text::value).collect();
    json!({ "texts": texts, "tokens": n_tokens })
}

fn choices(body: &Value) -> Value {
    let choices = body["choices"]
        .as_array()
        .unwrap_or_else(|| panic!("{body}"));
    let text = |choice| {
        let mut text = Text::default();
        text.add(choice);
        text
    };
    ended(
        choices.iter().map(text).collect(),
        &body["usage"]["completion_tokens"],
    )
}

fn chunks(events: &[Value]) -> Value {
    let (last, events) = events.split_last().expect("events");
    assert_eq!(last, "[DONE]");
    let mut texts = Vec::new();
    let mut n_tokens = Value::Null;
    for event in events {
        for choice in event["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            if texts.len() <= index {
                texts.resize_with(index + 1, Text::default);
            }
            texts[index].add(choice);
        }
        if !event["usage"].is_null() {
            n_tokens = event["usage"]["completion_tokens"].clone();
        }
    }
    ended(texts, &n_tokens)
}

fn message(body: &Value) -> Value {
    let mut text = Text::default();
    for block in body["content"]
        .as_array()
        .unwrap_or_else(|| panic!("{body}"))
    {
        text.content += block["text"].as_str().unwrap_or("");
        text.thinking += block["thinking"].as_str().unwrap_or("");
        if block["type"] == "tool_use" {
            let name = block["name"].as_str().unwrap().to_string();
            text.calls.push([name, block["input"].to_string()]);
        }
    }
    text.finish = body["stop_reason"].clone();
    ended(vec![text], &body["usage"]["output_tokens"])
}

fn message_events(events: &[Value]) -> Value {
    assert_eq!(events.last().expect("events")["type"], "message_stop");
    let mut text = Text::default();
    let mut n_tokens = Value::Null;
    for event in events {
        let (block, delta) = (&event["content_block"], &event["delta"]);
        if block["type"] == "tool_use" {
            let name = block["name"].as_str().unwrap().to_string();
            text.calls.push([name, String::new()]);
        }
        text.content += delta["text"].as_str().unwrap_or("");
        text.thinking += delta["thinking"].as_str().unwrap_or("");
        if let Some(json) = delta["partial_json"].as_str() {
            text.calls.last_mut().unwrap()[1] += json;
        }
        if event["type"] == "message_delta" {
            text.finish = delta["stop_reason"].clone();
            n_tokens = event["usage"]["output_tokens"].clone();
        }
    }
    for [_, arguments] in &mut text.calls {
        let value: Value = serde_json::from_str(arguments).expect("arguments");
        *arguments = value.to_string();
    }
    ended(vec![text], &n_tokens)
}

fn response(body: &Value) -> Value {
    let mut text = Text::default();
    for item in body["output"]
        .as_array()
        .unwrap_or_else(|| panic!("{body}"))
    {
        let contents = item["content"].as_array().into_iter().flatten();
        let contents: String = contents.filter_map(|c| c["text"].as_str()).collect();
        match item["type"].as_str() {
            Some("message") => text.content += &contents,
            Some("reasoning") => text.thinking += &contents,
            Some("function_call") => {
                let field = |name: &str| item[name].as_str().unwrap().to_string();
                text.calls.push([field("name"), field("arguments")]);
            }
            other => panic!("{other:?}"),
        }
    }
    text.finish = body["status"].clone();
    ended(vec![text], &body["usage"]["output_tokens"])
}

fn response_events(events: &[Value]) -> Value {
    let whole = response(&events.last().expect("events")["response"]);
    let of = |kind: &str| -> String {
        let deltas = events.iter().filter(|event| event["type"] == kind);
        deltas
            .map(|event| event["delta"].as_str().unwrap())
            .collect()
    };
    assert_eq!(
        whole["texts"][0]["content"],
        of("response.output_text.delta")
    );
    whole
}
