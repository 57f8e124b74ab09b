//! Messages of a conversation.

use minijinja::value::Value;

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

/// A message of the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Author of the message.
    pub role: Role,
    /// Text of the message.
    pub content: String,
    /// Reasoning before the answer, if the model marks it.
    pub thinking: Option<String>,
}

impl Message {
    /// Creates a message without reasoning.
    pub fn new(role: Role, content: &str) -> Self {
        Self {
            role,
            content: content.to_string(),
            thinking: None,
        }
    }

    /// Returns the message as templates see it.
    pub(super) fn value(&self) -> Value {
        let mut pairs = vec![
            ("role", Value::from(self.role.name())),
            ("content", Value::from(self.content.as_str())),
        ];
        if let Some(thinking) = &self.thinking {
            // gpt-oss and the Qwen and DeepSeek families name it differently.
            pairs.push(("thinking", Value::from(thinking.as_str())));
            pairs.push(("reasoning_content", Value::from(thinking.as_str())));
        }
        Value::from_pairs(pairs)
    }
}
