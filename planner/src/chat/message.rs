//! Messages of a conversation.

use super::spoken::Spoken;
use minijinja::value::Value;
use serde_json::Value as Json;
use std::sync::Arc;

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

impl Role {
    /// Returns the name that templates know the role by.
    pub(super) fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// How a template gets the content of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// As a string.
    #[default]
    Text,
    /// As a list with one part of type `text`, which models for pictures expect.
    Parts,
}

/// A call of a tool in an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The name by which its result refers to it.
    pub id: String,
    /// Name of the tool.
    pub name: String,
    /// The arguments, an object.
    pub arguments: Json,
}

/// How a template gets calls of tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CallStyle {
    /// Whether the content of an answer that only calls is none, and not an empty text.
    pub null_content: bool,
    /// Whether arguments are JSON as text, and not an object.
    pub text_arguments: bool,
}

/// What a message with calls, or with the result of one, has beside its text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CallParts {
    /// Calls in an answer.
    pub calls: Vec<Call>,
    /// How the template gets them.
    pub style: CallStyle,
    /// Of a result: the call that it belongs to.
    pub call_id: Option<String>,
    /// Of a result: the tool.
    pub name: Option<String>,
}

/// A message of the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Author of the message.
    pub role: Role,
    /// Text of the message.
    pub content: String,
    /// Reasoning before the answer, if the model marks it.
    pub thinking: Option<String>,
    /// How the template gets the content.
    pub form: Form,
    /// The tokens of the whole answer, where the model produced it.
    pub spoken: Option<Arc<Spoken>>,
    /// Calls of tools, or of which one this is the result.
    pub tools: CallParts,
}

impl Message {
    /// Creates a message without reasoning.
    pub fn new(role: Role, content: &str) -> Self {
        Self {
            role,
            content: content.to_string(),
            thinking: None,
            form: Form::Text,
            spoken: None,
            tools: CallParts::default(),
        }
    }

    /// Whether `text` is the content or the thought, but for white space around it.
    pub(super) fn says(&self, text: &str) -> bool {
        let texts = [Some(&self.content), self.thinking.as_ref()];
        let mut texts = texts.into_iter().flatten();
        texts.any(|own| core(own) == text)
    }

    /// Returns the message as templates see it.
    pub(super) fn value(&self) -> Value {
        let content = Value::from(self.content.as_str());
        let content = match self.form {
            _ if self.is_call_only() && self.tools.style.null_content => Value::from(()),
            Form::Text => content,
            Form::Parts => Value::from(vec![Value::from_pairs([
                ("type", Value::from("text")),
                ("text", content),
            ])]),
        };
        let mut pairs = vec![
            ("role", Value::from(self.role.name())),
            ("content", content),
        ];
        if let Some(thinking) = &self.thinking {
            // gpt-oss and the Qwen and DeepSeek families name it differently.
            pairs.push(("thinking", Value::from(thinking.as_str())));
            pairs.push(("reasoning_content", Value::from(thinking.as_str())));
        }
        self.tools.add_to(&mut pairs);
        Value::from_pairs(pairs)
    }

    /// Whether the message is nothing but calls.
    fn is_call_only(&self) -> bool {
        self.content.is_empty() && !self.tools.calls.is_empty()
    }

    /// Returns about how many bytes the message has.
    pub(super) fn n_bytes(&self) -> usize {
        let thinking = self.thinking.as_ref().map_or(0, String::len);
        let calls = self.tools.calls.iter();
        let calls =
            calls.map(|call| call.arguments.to_string().len() + call.name.len() + call.id.len());
        calls.fold(
            self.content.len().saturating_add(thinking),
            usize::saturating_add,
        )
    }

    /// Calls `see` with the texts of the message.
    pub(super) fn texts<'m>(&'m self, see: &mut dyn FnMut(&'m str)) {
        see(&self.content);
        if let Some(thinking) = &self.thinking {
            see(thinking);
        }
        for call in &self.tools.calls {
            strings(&call.arguments, see);
        }
    }
}

/// Returns JSON as a value of templates.
pub(super) fn value_of(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(is_true) => Value::from(*is_true),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from(items.iter().map(value_of).collect::<Vec<Value>>()),
        Json::Object(fields) => {
            let fields = fields.iter();
            Value::from_pairs(fields.map(|(key, value)| (key.clone(), value_of(value))))
        }
    }
}

/// Calls `see` with the strings in a value.
pub(super) fn strings<'v>(value: &'v Json, see: &mut dyn FnMut(&'v str)) {
    match value {
        Json::String(text) => see(text),
        Json::Array(items) => items.iter().for_each(|item| strings(item, see)),
        Json::Object(fields) => fields.values().for_each(|value| strings(value, see)),
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
    }
}

impl CallParts {
    /// Adds the fields that templates know them by.
    fn add_to(&self, pairs: &mut Vec<(&'static str, Value)>) {
        let call = |call: &Call| {
            let arguments = if self.style.text_arguments {
                Value::from(call.arguments.to_string())
            } else {
                value_of(&call.arguments)
            };
            let function = Value::from_pairs([
                ("name", Value::from(call.name.as_str())),
                ("arguments", arguments),
            ]);
            Value::from_pairs([
                ("id", Value::from(call.id.as_str())),
                ("type", Value::from("function")),
                ("function", function),
            ])
        };
        if !self.calls.is_empty() {
            let calls: Vec<Value> = self.calls.iter().map(call).collect();
            pairs.push(("tool_calls", Value::from(calls)));
        }
        if let Some(id) = &self.call_id {
            pairs.push(("tool_call_id", Value::from(id.as_str())));
        }
        if let Some(name) = &self.name {
            pairs.push(("name", Value::from(name.as_str())));
        }
    }
}

/// Returns a text without white space at its ends, which templates trim.
pub(super) fn core(text: &str) -> &str {
    // Python's `strip` takes these four separators for white space, too.
    text.trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c))
}
