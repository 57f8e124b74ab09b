//! Conversations of requests, for batches and the server.

use super::dialect::{self, Dialect};
use super::message::{Message, Role};
use crate::interrupt::Interrupted;
use std::sync::{Mutex, PoisonError};
use tier_plan_runtime::tokenizer::Tokenizer;
use tier_plan_serve::prompts::{ChatError, Chats, Rendered};
use tier_plan_serve::request;

impl Chats for Dialect {
    fn render(
        &self,
        messages: &[request::Message],
        tokenizer: &Tokenizer,
    ) -> Result<Rendered, ChatError> {
        let messages: Vec<Message> = messages.iter().map(message).collect();
        match Dialect::render(self, &messages, tokenizer) {
            Ok(dialect::Rendered::Prompt { text, plain, .. }) => Ok(Rendered { text, plain }),
            Ok(dialect::Rendered::Mixed { token }) => Err(ChatError::Mixed { token }),
            Err(error) if error.is::<Interrupted>() => Err(ChatError::Interrupted),
            Err(error) => Err(ChatError::Rejected(format!("{error:#}"))),
        }
    }
}

/// A template that several threads use, one after the other.
pub struct SharedDialect(Mutex<Dialect>);

impl SharedDialect {
    /// Shares a template.
    pub fn new(dialect: Dialect) -> Self {
        Self(Mutex::new(dialect))
    }
}

impl Chats for SharedDialect {
    fn render(
        &self,
        messages: &[request::Message],
        tokenizer: &Tokenizer,
    ) -> Result<Rendered, ChatError> {
        let dialect = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Chats::render(&*dialect, messages, tokenizer)
    }
}

fn message(message: &request::Message) -> Message {
    let role = match message.role {
        request::Role::System => Role::System,
        request::Role::User => Role::User,
        request::Role::Assistant => Role::Assistant,
    };
    Message {
        thinking: message.thinking.clone(),
        ..Message::new(role, &message.content)
    }
}
