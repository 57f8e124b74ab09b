//! Conversations of requests, for batches and the server.

use super::dialect::{self, Dialect};
use super::message::{Call, CallParts, CallStyle, Message, Role};
use super::template::Surroundings;
use crate::interrupt::Interrupted;
use std::sync::{Mutex, PoisonError};
use tier_plan_runtime::tokenizer::Tokenizer;
use tier_plan_serve::prompts::{ChatError, Chats, Conversation, Rendered};
use tier_plan_serve::request;

impl Chats for Dialect {
    fn render(
        &self,
        conversation: Conversation<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<Rendered, ChatError> {
        let Conversation {
            messages,
            tools,
            variables,
        } = conversation;
        let is_of_calls =
            |m: &request::Message| !m.calls.is_empty() || m.role == request::Role::Tool;
        let has_calls = messages.iter().any(is_of_calls);
        let mut style = CallStyle::default();
        if has_calls || !tools.is_empty() {
            let takes = self.tool_style();
            if !tools.is_empty() && !takes.prints_tools {
                return Err(ChatError::NoTools("tools"));
            }
            style = match takes.calls {
                Some(style) => style,
                None if has_calls => return Err(ChatError::NoTools("messages")),
                None => style,
            };
        }
        let messages: Vec<Message> = messages.iter().map(|m| message(m, style)).collect();
        let around = Surroundings {
            tools: tools.iter().map(request::tools::Tool::value).collect(),
            variables: variables.clone(),
        };
        match self.render_in(&messages, &around, tokenizer) {
            Ok(dialect::Rendered::Prompt { text, plain, .. }) => Ok(Rendered { text, plain }),
            Ok(dialect::Rendered::Mixed { token }) => Err(ChatError::Mixed { token }),
            Err(error) if error.is::<Interrupted>() => Err(ChatError::Interrupted),
            Err(error) => Err(ChatError::Rejected(format!("{error:#}"))),
        }
    }

    fn source(&self) -> &str {
        Dialect::source(self)
    }
}

/// A template that several threads use, one after the other.
pub struct SharedDialect {
    source: String,
    dialect: Mutex<Dialect>,
}

impl SharedDialect {
    /// Shares a template.
    pub fn new(dialect: Dialect) -> Self {
        Self {
            source: Dialect::source(&dialect).to_string(),
            dialect: Mutex::new(dialect),
        }
    }
}

impl Chats for SharedDialect {
    fn render(
        &self,
        conversation: Conversation<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<Rendered, ChatError> {
        let dialect = self.dialect.lock().unwrap_or_else(PoisonError::into_inner);
        Chats::render(&*dialect, conversation, tokenizer)
    }

    fn source(&self) -> &str {
        &self.source
    }
}

fn message(message: &request::Message, style: CallStyle) -> Message {
    let role = match message.role {
        request::Role::System => Role::System,
        request::Role::User => Role::User,
        request::Role::Assistant => Role::Assistant,
        request::Role::Tool => Role::Tool,
    };
    let calls = message.calls.iter().map(|call| Call {
        id: call.id.clone(),
        name: call.name.clone(),
        arguments: call.arguments.clone().into(),
    });
    Message {
        thinking: message.thinking.clone(),
        tools: CallParts {
            calls: calls.collect(),
            style,
            call_id: message.call_id.clone(),
            name: message.name.clone(),
        },
        ..Message::new(role, &message.content)
    }
}
