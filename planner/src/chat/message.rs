//! Messages of a conversation.

use super::spoken::Spoken;
use minijinja::value::Value;
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
}

impl Role {
    /// Returns the name that templates know the role by.
    pub(super) fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
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
        Value::from_pairs(pairs)
    }
}

/// Returns a text without white space at its ends, which templates trim.
pub(super) fn core(text: &str) -> &str {
    // Python's `strip` takes these four separators for white space, too.
    text.trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c))
}
