//! What the clients ask for.

use crate::serve::tools::schema;
use serde_json::{Value, json};
use tier_plan_testing::Random;

/// Characters that several prompts begin with.
const BEGINNINGS: [usize; 4] = [0, 200, 600, 1200];

const SENTENCES: [&str; 6] = [
    "And the earth was without form, and void; and darkness was upon the face of the deep. ",
    "let mut rows = Vec::with_capacity(plan.rows.len());\n",
    "The quick brown fox jumps over the lazy dog, 12345 times. ",
    "Größe, naïveté, 東京, Привет, 🙂👍🏽. ",
    "In the middle of the journey of our life I found myself within a dark wood. ",
    "{\"name\": \"value\", \"list\": [1, 2, 3]} ",
];

/// A protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Completion,
    Chat,
    Message,
    Response,
}

impl Kind {
    pub fn path(self) -> &'static str {
        match self {
            Kind::Completion => "/v1/completions",
            Kind::Chat => "/v1/chat/completions",
            Kind::Message => "/v1/messages",
            Kind::Response => "/v1/responses",
        }
    }
}

/// A request.
#[derive(Debug)]
pub struct Asked {
    pub kind: Kind,
    body: Value,
}

impl Asked {
    /// Returns the body, of a request for a whole answer or for a stream.
    pub fn text(&self, streamed: bool) -> String {
        let mut body = self.body.clone();
        if streamed {
            body["stream"] = true.into();
            if matches!(self.kind, Kind::Completion | Kind::Chat) {
                body["stream_options"] = json!({"include_usage": true});
            }
        }
        body.to_string()
    }
}

/// Returns so many requests: at all endpoints, short and long, greedy and drawn.
pub fn all(n: usize) -> Vec<Asked> {
    let mut draw = Random(29);
    let asked = |i: usize| {
        let kind = [Kind::Completion, Kind::Chat, Kind::Message, Kind::Response][i % 4];
        let prompt = prompt(i / 4, &mut draw);
        let max_tokens = 4 + draw.below(100);
        let mut body = match kind {
            Kind::Completion => completion(prompt, i / 4),
            Kind::Chat => chat(prompt, i / 4),
            Kind::Message => message(prompt, i / 4),
            Kind::Response => response(prompt, i / 4),
        };
        let limit = if kind == Kind::Response {
            "max_output_tokens"
        } else {
            "max_tokens"
        };
        body[limit] = max_tokens.into();
        if matches!(kind, Kind::Completion | Kind::Chat) && i.is_multiple_of(3) {
            body["temperature"] = json!(0.9);
            body["seed"] = i.into();
        } else {
            body["temperature"] = 0.into();
        }
        Asked { kind, body }
    };
    (0..n).map(asked).collect()
}

/// Returns a prompt of its own that begins as others do.
fn prompt(i: usize, draw: &mut Random) -> String {
    let n = BEGINNINGS[i % BEGINNINGS.len()];
    let mut text: String = SENTENCES
        .iter()
        .cycle()
        .flat_map(|s| s.chars())
        .take(n)
        .collect();
    text += &format!("Part {i}. ");
    for _ in 0..draw.below(4) {
        text += SENTENCES[draw.below(SENTENCES.len() as u64) as usize];
    }
    text
}

fn completion(prompt: String, i: usize) -> Value {
    let mut body = json!({"prompt": prompt});
    match i % 8 {
        1 => body["n"] = 2.into(),
        3 => body["stop"] = json!(["e", ". "]),
        5 => body["guided_regex"] = json!("[a-f]{3,9}(, [0-9]+)?"),
        7 => body["logprobs"] = 5.into(),
        _ => {}
    }
    body
}

fn chat(prompt: String, i: usize) -> Value {
    let mut body = json!({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": prompt},
    ]});
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": schema()}});
    match i % 8 {
        1 => {
            body["response_format"] =
                json!({"type": "json_schema", "json_schema": {"schema": schema()}})
        }
        3 => {
            body["tools"] = json!([tool]);
            body["tool_choice"] = "required".into();
        }
        5 => body["tools"] = json!([tool]),
        6 => {
            body["logprobs"] = true.into();
            body["top_logprobs"] = 20.into();
        }
        7 => {
            let messages = body["messages"].as_array_mut().unwrap();
            messages.push(json!({"role": "assistant", "content": "Yes."}));
            messages.push(json!({"role": "user", "content": "Why?"}));
        }
        _ => {}
    }
    body
}

fn message(prompt: String, i: usize) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}]});
    match i % 4 {
        1 => body["system"] = "Be brief.".into(),
        3 => {
            body["tools"] = json!([{"name": "weather", "input_schema": schema()}]);
            body["tool_choice"] = json!({"type": "any"});
        }
        _ => {}
    }
    body
}

fn response(prompt: String, i: usize) -> Value {
    let mut body = json!({"input": prompt});
    match i % 4 {
        1 => body["instructions"] = "Be brief.".into(),
        2 => {
            body["text"] =
                json!({"format": {"type": "json_schema", "name": "w", "schema": schema()}})
        }
        3 => {
            body["tools"] =
                json!([{"type": "function", "name": "weather", "parameters": schema()}]);
            body["tool_choice"] = "required".into();
        }
        _ => {}
    }
    body
}
