//! System messages after the first message, which agents send in the middle of a conversation.
//!
//! Templates differ in what they do with one: some print it, some reject the conversation, some leave
//! it out without a word. Where it would not reach the model, its text goes to the message of the user,
//! or the result of a tool, beside it.

use super::{ChatError, Chats, Conversation, Rendered};
use crate::request::{Message, Role};
use tier_plan_runtime::tokenizer::Tokenizer;

/// What is between two texts that are joined.
const BREAK: &str = "\n\n";

/// Renders a conversation so that the model sees every system message of it.
///
/// # Errors
/// Those of the template.
pub(super) fn render(
    template: &dyn Chats,
    conversation: Conversation<'_>,
    tokenizer: &Tokenizer,
) -> Result<Rendered, ChatError> {
    let rendered = template.render(conversation, tokenizer);
    let after_first = conversation.messages.iter().skip(1);
    let late: Vec<&Message> = after_first
        .filter(|message| message.role == Role::System)
        .collect();
    let fits = match &rendered {
        Ok(rendered) => late
            .iter()
            .all(|message| rendered.text.contains(message.content.trim())),
        Err(ChatError::Rejected(_)) => late.is_empty(),
        Err(_) => true,
    };
    if fits {
        return rendered;
    }
    let messages = folded(conversation.messages);
    let folded = Conversation {
        messages: &messages,
        ..conversation
    };
    match (template.render(folded, tokenizer), rendered) {
        // The reason is another one.
        (Err(ChatError::Rejected(_)), Err(first)) => Err(first),
        (folded, _) => folded,
    }
}

/// Returns the messages with one system message at most, at the start.
fn folded(messages: &[Message]) -> Vec<Message> {
    let mut all: Vec<Message> = Vec::with_capacity(messages.len());
    // Text that waits for the next message of the user.
    let mut held = String::new();
    for message in messages {
        match (message.role, all.last_mut()) {
            (Role::System, Some(last)) if last.role != Role::Assistant => {
                join(&mut last.content, &message.content);
            }
            (Role::System, Some(_)) => join(&mut held, &message.content),
            (Role::User, _) if !held.is_empty() => {
                let mut content = std::mem::take(&mut held);
                join(&mut content, &message.content);
                all.push(Message {
                    content,
                    ..message.clone()
                });
            }
            _ => all.push(message.clone()),
        }
    }
    if !held.is_empty() {
        all.push(Message::new(Role::User, &held));
    }
    all
}

/// Adds a text to another one.
fn join(onto: &mut String, text: &str) {
    if !onto.is_empty() && !text.is_empty() {
        onto.push_str(BREAK);
    }
    onto.push_str(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(words: &str) -> Vec<Message> {
        let message = |word: &str| {
            let (role, text) = word.split_once(':').unwrap();
            let role = match role {
                "s" => Role::System,
                "u" => Role::User,
                "a" => Role::Assistant,
                _ => Role::Tool,
            };
            Message::new(role, text)
        };
        words.split(' ').map(message).collect()
    }

    #[test]
    fn late_instructions_join_what_the_model_reads_there() {
        for (words, expected) in [
            ("s:1 u:2", "s:1 u:2"),
            ("s:1 s:2 u:3", "s:1/2 u:3"),
            ("u:1 s:2", "u:1/2"),
            (
                "s:0 u:1 s:2 a:3 t:4 s:5 s:6 a:7",
                "s:0 u:1/2 a:3 t:4/5/6 a:7",
            ),
            ("u:1 a:2 s:3 s:4 u:5", "u:1 a:2 u:3/4/5"),
            ("u:1 a:2 s:3", "u:1 a:2 u:3"),
            ("u:1 a:2 s:3 t:4 u:5", "u:1 a:2 t:4 u:3/5"),
        ] {
            let expected: Vec<Message> = talk(expected)
                .into_iter()
                .map(|m| Message {
                    content: m.content.replace('/', BREAK),
                    ..m
                })
                .collect();
            assert_eq!(folded(&talk(words)), expected, "{words}");
        }
    }
}
