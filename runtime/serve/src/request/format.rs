//! The form that an answer must have: JSON, one of some texts, or a grammar.

use super::fields::{Fields, bad};
use super::tools::{kind, object};
use super::{BadLine, Code};
use crate::grammar::gbnf;
use serde_json::{Value, json};

/// Longest schema or grammar as text in bytes.
const MAX_BYTES: usize = 1 << 18;

/// Most texts to choose from.
const MAX_CHOICES: usize = 4096;

/// What an answer must be.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Format {
    /// Any text.
    #[default]
    Text,
    /// JSON by this schema.
    Json(Value),
    /// A text that this regular expression matches.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text by this grammar in the syntax of Lark, as llguidance has it.
    Lark(String),
}

/// Reads the fields that say what an answer must be. Other engines have names of their own for them.
pub(super) fn format(body: Fields<'_>) -> Result<Format, BadLine> {
    let mut all = vec![("response_format", response_format(body)?)];
    for (name, kind) in [
        ("json_schema", "json"),
        ("guided_json", "json"),
        ("guided_regex", "regex"),
        ("guided_choice", "choice"),
        ("guided_grammar", "grammar"),
        ("grammar", "gbnf"),
    ] {
        // llama.cpp's clients send an empty grammar for none.
        if let Some(value) = body
            .get(name)
            .filter(|value| name != "grammar" || *value != "")
        {
            all.push((name, of_kind(&body.place(name), kind, value)?));
        }
    }
    if let Some(value) = body.get("structured_outputs") {
        let place = body.place("structured_outputs");
        let fields = object(&place, value)?;
        for kind in ["json", "regex", "choice", "grammar"] {
            if let Some(value) = fields.get(kind) {
                let format = of_kind(&fields.place(kind), kind, value)?;
                all.push(("structured_outputs", format));
            }
        }
        if fields.flag("json_object")?.unwrap_or(false) {
            all.push(("structured_outputs", any_object()));
        }
    }
    all.retain(|(_, format)| *format != Format::Text);
    match all.as_slice() {
        [] => Ok(Format::Text),
        [_] => Ok(all.remove(0).1),
        [(one, _), (other, _), ..] => Err(BadLine::new(
            Code::InvalidRequest,
            format!(
                "{}: beside {one}, expected one form of the answer",
                body.place(other)
            ),
        )),
    }
}

fn response_format(body: Fields<'_>) -> Result<Format, BadLine> {
    let Some(value) = body.get("response_format") else {
        return Ok(Format::Text);
    };
    let place = body.place("response_format");
    let fields = object(&place, value)?;
    match fields.text("type")? {
        Some("text") => Ok(Format::Text),
        Some("json_object") => match fields.get("schema") {
            None => Ok(any_object()),
            Some(schema) => of_kind(&fields.place("schema"), "json", schema),
        },
        Some("json_schema") => {
            let inner = fields.place("json_schema");
            let fields = object(&inner, fields.get("json_schema").unwrap_or(&Value::Null))?;
            match fields.get("schema") {
                None => Ok(any_object()),
                Some(schema) => of_kind(&fields.place("schema"), "json", schema),
            }
        }
        _ => Err(kind(
            fields,
            "\"text\", \"json_object\", or \"json_schema\"",
        )),
    }
}

/// Returns the form of a JSON schema.
pub(crate) fn of_schema(place: &str, schema: &Value) -> Result<Format, BadLine> {
    of_kind(place, "json", schema)
}

fn any_object() -> Format {
    Format::Json(json!({ "type": "object" }))
}

fn of_kind(place: &str, kind: &str, value: &Value) -> Result<Format, BadLine> {
    let format = match (kind, value) {
        ("json", Value::Object(_)) => Format::Json(value.clone()),
        ("json", Value::String(text)) => match super::value::parse(text.as_bytes()) {
            Ok(schema @ Value::Object(_)) => Format::Json(schema),
            _ => return Err(bad(place, Some(value), "a JSON schema")),
        },
        ("json", _) => return Err(bad(place, Some(value), "a JSON schema, which is an object")),
        ("choice", Value::Array(items)) if (1..=MAX_CHOICES).contains(&items.len()) => {
            let text = |item: &Value| item.as_str().map(str::to_string);
            let texts: Option<Vec<String>> = items.iter().map(text).collect();
            let fit = texts.filter(|texts| texts.iter().all(|text| !text.is_empty()));
            Format::Choice(fit.ok_or_else(|| bad(place, Some(value), "an array of texts"))?)
        }
        ("choice", _) => {
            let expected = format!("an array of 1 to {MAX_CHOICES} texts");
            return Err(bad(place, Some(value), &expected));
        }
        ("regex", Value::String(text)) if !text.is_empty() => Format::Regex(text.clone()),
        ("regex", _) => return Err(bad(place, Some(value), "a regular expression")),
        (_, Value::String(text)) if text.len() > MAX_BYTES => {
            return Err(too_long(place, text.len()));
        }
        ("grammar", Value::String(text)) if !text.is_empty() && !is_gbnf(text) => {
            Format::Lark(text.clone())
        }
        (_, Value::String(text)) if !text.is_empty() => match gbnf::to_lark(text) {
            Ok(lark) => return Ok(Format::Lark(lark)),
            Err(why) => {
                let message = format!("{place}: {why}");
                return Err(BadLine::new(Code::InvalidRequest, message));
            }
        },
        _ => return Err(bad(place, Some(value), "a grammar as text")),
    };
    let n = value.to_string().len();
    if n > MAX_BYTES {
        return Err(too_long(place, n));
    }
    Ok(format)
}

fn too_long(place: &str, n: usize) -> BadLine {
    let message = format!("{place}: {n} bytes, expected at most {MAX_BYTES}");
    BadLine::new(Code::InvalidRequest, message)
}

/// Whether a grammar is one in GBNF: other engines take both forms in the same field.
fn is_gbnf(text: &str) -> bool {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    text.lines().any(|line| {
        let rest = line.trim_start().trim_start_matches(is_of_name);
        rest.trim_start().starts_with("::=")
    })
}
