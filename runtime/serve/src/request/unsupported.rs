//! Fields of a request that would change its result in a way that is not implemented. Ignoring them
//! would answer another question than was asked.

use super::fields::{Fields, shown};
use super::{BadLine, Code, Endpoint, Sender};
use serde_json::{Value, json};

/// A field that is not implemented, and the values beside null, false, 0, and empty ones that change nothing.
pub(crate) struct Unsupported {
    pub name: &'static str,
    pub neutral: fn() -> Vec<Value>,
}

/// Returns a field that has no other neutral values.
pub(crate) const fn never(name: &'static str) -> Unsupported {
    Unsupported {
        name,
        neutral: Vec::new,
    }
}

/// What only chats of the server have.
const TOOLS: &[Unsupported] = &[
    never("tools"),
    Unsupported {
        name: "tool_choice",
        neutral: || vec![json!("none"), json!("auto")],
    },
];

/// What only chats have.
const OF_CHATS: &[Unsupported] = &[never("reasoning_effort"), never("chat_template_kwargs")];

const UNSUPPORTED: &[Unsupported] = &[
    never("functions"),
    Unsupported {
        name: "function_call",
        neutral: || vec![json!("none"), json!("auto")],
    },
    Unsupported {
        name: "modalities",
        neutral: || vec![json!(["text"])],
    },
    never("audio"),
    never("reasoning"),
    never("verbosity"),
    never("web_search_options"),
    never("suffix"),
    never("echo"),
    Unsupported {
        name: "best_of",
        neutral: || vec![json!(1)],
    },
    // Of other engines that take this format.
    never("min_tokens"),
    never("stop_token_ids"),
    never("bad_words"),
    never("allowed_token_ids"),
    never("use_beam_search"),
    Unsupported {
        name: "length_penalty",
        neutral: || vec![json!(1)],
    },
    Unsupported {
        name: "typical_p",
        neutral: || vec![json!(1)],
    },
    never("mirostat"),
    never("dry_multiplier"),
    never("xtc_probability"),
    never("dynatemp_range"),
    never("logits_processors"),
    never("chat_template"),
    never("continue_final_message"),
    never("documents"),
    never("truncate_prompt_tokens"),
    never("prompt_embeds"),
];

/// Refuses a body with a field that would change the result.
pub(super) fn check(body: Fields<'_>, endpoint: Endpoint, sender: Sender) -> Result<(), BadLine> {
    let (tools, of_chats) = match (sender, endpoint) {
        (_, Endpoint::Completions) => (TOOLS, OF_CHATS),
        (Sender::Batch, Endpoint::Chat) => (TOOLS, &[][..]),
        (Sender::Client, Endpoint::Chat) => (&[][..], &[][..]),
    };
    [tools, of_chats, UNSUPPORTED]
        .into_iter()
        .try_for_each(|fields| refuse(body, fields))
}

/// Refuses a body with one of some fields that asks for something.
pub(crate) fn refuse(body: Fields<'_>, fields: &[Unsupported]) -> Result<(), BadLine> {
    let asked = fields.iter().find_map(|field| {
        let value = body.get(field.name)?;
        let changes = !is_neutral(value) && !(field.neutral)().iter().any(|n| equal(n, value));
        changes.then_some((field.name, value))
    });
    match asked {
        None => Ok(()),
        Some((name, value)) => Err(BadLine::new(
            Code::Unsupported,
            format!(
                "{}: {} is not supported and would change the result; leave the field out",
                body.place(name),
                shown(value)
            ),
        )),
    }
}

/// Whether a value says that nothing is asked for.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

/// Whether values are equal; numbers count by value, so that 1 is 1.0.
fn equal(one: &Value, other: &Value) -> bool {
    match (one.as_f64(), other.as_f64()) {
        (Some(one), Some(other)) => one == other,
        _ => one == other,
    }
}
