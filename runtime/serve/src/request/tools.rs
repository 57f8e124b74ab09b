//! Tools of a request, and which of them an answer may call.

use super::fields::{Fields, bad, shown};
use super::{BadLine, Code};
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Most tools of a request.
pub(crate) const MAX_TOOLS: usize = 512;

/// Longest name of a tool in bytes.
const MAX_NAME_BYTES: usize = 128;

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// JSON schema of its arguments, an object.
    pub parameters: Value,
    /// Whether arguments must follow the schema.
    pub strict: bool,
}

impl Tool {
    /// Returns the tool as chat templates see it.
    pub fn value(&self) -> Value {
        let mut function = Map::new();
        function.insert("name".into(), self.name.as_str().into());
        // Templates that print it fail where it is missing.
        let description = self.description.as_deref().unwrap_or_default();
        function.insert("description".into(), description.into());
        function.insert("parameters".into(), self.parameters.clone());
        json!({ "type": "function", "function": function })
    }
}

/// What an answer may call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Choice {
    /// Nothing.
    None,
    /// Any tool, or none.
    #[default]
    Auto,
    /// One tool at least.
    Required,
    /// The tool of this name.
    Named(String),
}

/// The tools of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tools {
    /// The tools.
    pub list: Arc<[Tool]>,
    /// What an answer may call.
    pub choice: Choice,
    /// Whether an answer may have several calls.
    pub parallel: bool,
}

impl Default for Tools {
    fn default() -> Self {
        Self {
            list: Arc::new([]),
            choice: Choice::Auto,
            parallel: true,
        }
    }
}

impl Tools {
    /// Whether an answer may have calls.
    pub fn may_call(&self) -> bool {
        !self.list.is_empty() && self.choice != Choice::None
    }

    /// Returns the tools that an answer must call one of, if it must.
    pub fn demanded(&self) -> Option<Vec<&Tool>> {
        match &self.choice {
            Choice::None | Choice::Auto => None,
            Choice::Required => Some(self.list.iter().collect()),
            Choice::Named(name) => {
                Some(self.list.iter().filter(|tool| tool.name == *name).collect())
            }
        }
    }

    /// Returns the tools with their choice.
    ///
    /// # Errors
    /// When two tools have one name, or the choice is not among them.
    pub(crate) fn checked(
        body: Fields<'_>,
        list: Vec<Tool>,
        choice: Choice,
        parallel: bool,
    ) -> Result<Self, BadLine> {
        for (i, tool) in list.iter().enumerate() {
            if list[..i].iter().any(|other| other.name == tool.name) {
                let message = format!(
                    "{}[{i}]: a second tool with the name \"{}\", expected names that differ",
                    body.place("tools"),
                    tool.name
                );
                return Err(BadLine::new(Code::InvalidRequest, message));
            }
        }
        let has = |name: &str| list.iter().any(|tool| tool.name == name);
        let fits = match &choice {
            Choice::None | Choice::Auto => true,
            Choice::Required => !list.is_empty(),
            Choice::Named(name) => has(name),
        };
        if !fits {
            return Err(body.bad("tool_choice", "a tool that is among \"tools\""));
        }
        Ok(Self {
            list: list.into(),
            choice,
            parallel,
        })
    }
}

/// A call in an earlier answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// The name by which its result refers to it.
    pub id: String,
    /// Name of the tool.
    pub name: String,
    /// The arguments.
    pub arguments: Map<String, Value>,
}

/// Reads the tools of a chat.
pub(crate) fn tools(body: Fields<'_>) -> Result<Tools, BadLine> {
    let list = list(body, |place, item| {
        let outer = object(place, item)?;
        match outer.text("type")? {
            Some("function") => {}
            _ => return Err(kind(outer, "\"function\"")),
        }
        let inner = format!("{place}.function");
        let function = outer.get("function").unwrap_or(&Value::Null);
        tool(object(&inner, function)?, "parameters")
    })?;
    let choice = match body.get("tool_choice") {
        None => Choice::Auto,
        Some(Value::String(word)) => word_of(body, word)?,
        Some(Value::Object(fields)) => {
            let place = body.place("tool_choice");
            let fields = Fields::new(fields, &place);
            match (fields.text("type")?, fields.get("function")) {
                (Some("function"), Some(function)) => {
                    let inner = fields.place("function");
                    let function = object(&inner, function)?;
                    named(function, function.get("name"))?
                }
                (Some("function"), None) => named(fields, fields.get("name"))?,
                _ => return Err(kind(fields, "\"function\"")),
            }
        }
        Some(_) => return Err(body.bad("tool_choice", CHOICES)),
    };
    let parallel = body.flag("parallel_tool_calls")?.unwrap_or(true);
    Tools::checked(body, list, choice, parallel)
}

const CHOICES: &str = "\"none\", \"auto\", \"required\", or an object with the name of a function";

pub(crate) fn word_of(body: Fields<'_>, word: &str) -> Result<Choice, BadLine> {
    match word {
        "none" => Ok(Choice::None),
        "auto" => Ok(Choice::Auto),
        "required" | "any" => Ok(Choice::Required),
        _ => Err(body.bad("tool_choice", CHOICES)),
    }
}

pub(crate) fn named(fields: Fields<'_>, name: Option<&Value>) -> Result<Choice, BadLine> {
    match name {
        Some(Value::String(name)) => Ok(Choice::Named(name.clone())),
        _ => Err(fields.bad("name", "the name of a tool")),
    }
}

/// Returns the error of a `type` that is not implemented.
pub(crate) fn kind(fields: Fields<'_>, expected: &str) -> BadLine {
    match fields.get("type") {
        None => fields.bad("type", expected),
        Some(found) => {
            let place = fields.place("type");
            let found = shown(found);
            let message = format!("{place}: {found} is not supported, expected {expected}");
            BadLine::new(Code::Unsupported, message)
        }
    }
}

/// Reads the list of tools.
pub(crate) fn list<T>(
    body: Fields<'_>,
    read: impl Fn(&str, &Value) -> Result<T, BadLine>,
) -> Result<Vec<T>, BadLine> {
    let place = body.place("tools");
    match body.get("tools") {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() <= MAX_TOOLS => items
            .iter()
            .enumerate()
            .map(|(i, item)| read(&format!("{place}[{i}]"), item))
            .collect(),
        Some(_) => Err(body.bad("tools", &format!("an array of at most {MAX_TOOLS} tools"))),
    }
}

/// Returns the fields of an object.
pub(crate) fn object<'v>(place: &'v str, value: &'v Value) -> Result<Fields<'v>, BadLine> {
    match value {
        Value::Object(fields) => Ok(Fields::new(fields, place)),
        Value::Null => Err(bad(place, None, "an object")),
        other => Err(bad(place, Some(other), "an object")),
    }
}

/// Reads a tool, whose schema is in the field `schema`.
pub(crate) fn tool(fields: Fields<'_>, schema: &str) -> Result<Tool, BadLine> {
    let name = fields.text("name")?.filter(|name| is_name(name));
    let Some(name) = name else {
        let expected =
            format!("a name of 1 to {MAX_NAME_BYTES} letters, digits, or characters of \"_-.:/\"");
        return Err(fields.bad("name", &expected));
    };
    let parameters = match fields.get(schema) {
        None => json!({ "type": "object", "properties": {} }),
        Some(schema @ Value::Object(_)) => schema.clone(),
        Some(_) => return Err(fields.bad(schema, "a JSON schema, which is an object")),
    };
    Ok(Tool {
        name: name.to_string(),
        description: fields.text("description")?.map(str::to_string),
        parameters,
        strict: fields.flag("strict")?.unwrap_or(false),
    })
}

pub(crate) fn is_name(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"_-.:/".contains(&b);
    (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(fits)
}

/// Reads the calls of an earlier answer.
pub(super) fn calls(message: Fields<'_>) -> Result<Vec<ToolCall>, BadLine> {
    let items = match message.get("tool_calls") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(_) => return Err(message.bad("tool_calls", "an array of calls")),
    };
    let one = |(i, item): (usize, &Value)| {
        let place = format!("{}[{i}]", message.place("tool_calls"));
        let outer = object(&place, item)?;
        let inner = format!("{place}.function");
        let function = object(&inner, outer.get("function").unwrap_or(&Value::Null))?;
        let Some(name) = function.text("name")?.filter(|name| !name.is_empty()) else {
            return Err(function.bad("name", "the name of a tool"));
        };
        Ok(ToolCall {
            id: outer.text("id")?.unwrap_or_default().to_string(),
            name: name.to_string(),
            arguments: arguments(function, "arguments")?,
        })
    };
    items.iter().enumerate().map(one).collect()
}

/// Reads arguments: an object, or one as text.
pub(crate) fn arguments(fields: Fields<'_>, name: &str) -> Result<Map<String, Value>, BadLine> {
    let expected = "a JSON object as text";
    match fields.get(name) {
        None => Ok(Map::new()),
        Some(Value::Object(arguments)) => Ok(arguments.clone()),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(Map::new()),
        Some(Value::String(text)) => match super::value::parse(text.as_bytes()) {
            Ok(Value::Object(arguments)) => Ok(arguments),
            _ => Err(fields.bad(name, expected)),
        },
        Some(_) => Err(fields.bad(name, expected)),
    }
}
