//! Marks around texts that a template renders, by which the texts are found again in the result.

use super::message::{Call, CallParts, Message, Role, core};
use serde_json::Value as Json;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;

/// Marks of one conversation: digits, since templates that trim, split, change case, or write JSON
/// leave them alone. 64 bits of them are random, so that no text has them by chance or by intent.
#[derive(Debug, Clone)]
pub(super) struct Marks {
    prefix: String,
}

/// A rendered text without its marks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unmarked {
    pub text: String,
    /// Where the marked texts are, in bytes; sorted and apart.
    pub inside: Vec<Range<usize>>,
    /// Those of them that are the model's answers.
    pub answers: Vec<Range<usize>>,
}

impl Marks {
    /// Creates marks that no text contains.
    pub fn new() -> Self {
        // The standard library's hash keys are the system's random numbers.
        let bits = RandomState::new().build_hasher().finish();
        Self {
            prefix: format!("{bits:020}"),
        }
    }

    /// Returns the mark with a number below 10.
    pub fn numbered(&self, number: u8) -> String {
        format!("{}{number}", self.prefix)
    }

    /// Returns a message with marks around its texts. White space at their ends stays outside,
    /// since templates trim it.
    pub fn around(&self, message: &Message) -> Message {
        let by = if message.role == Role::Assistant {
            2
        } else {
            0
        };
        let mark = |text: &String| self.around_text(text, by);
        let calls = message.tools.calls.iter().map(|call| Call {
            arguments: self.around_strings(&call.arguments),
            ..call.clone()
        });
        Message {
            content: mark(&message.content),
            thinking: message.thinking.as_ref().map(mark),
            tools: CallParts {
                calls: calls.collect(),
                ..message.tools.clone()
            },
            ..message.clone()
        }
    }

    fn around_text(&self, text: &str, by: u8) -> String {
        let core = core(text);
        if core.is_empty() {
            return text.to_string();
        }
        let start = core.as_ptr() as usize - text.as_ptr() as usize;
        let (before, after) = (&text[..start], &text[start + core.len()..]);
        let (open, close) = (self.numbered(by), self.numbered(1));
        format!("{before}{open}{core}{close}{after}")
    }

    /// Returns a value with marks around its strings.
    pub fn around_strings(&self, value: &Json) -> Json {
        match value {
            Json::String(text) => self.around_text(text, 0).into(),
            Json::Array(items) => items.iter().map(|item| self.around_strings(item)).collect(),
            Json::Object(fields) => {
                let fields = fields.iter();
                let marked = fields.map(|(key, value)| (key.clone(), self.around_strings(value)));
                Json::Object(marked.collect())
            }
            other => other.clone(),
        }
    }

    /// Returns a tool with marks around its descriptions. Its other strings are words that templates
    /// compare.
    pub fn around_descriptions(&self, value: &Json) -> Json {
        match value {
            Json::Array(items) => items
                .iter()
                .map(|item| self.around_descriptions(item))
                .collect(),
            Json::Object(fields) => {
                let marked = fields.iter().map(|(key, value)| {
                    let value = match value {
                        Json::String(text) if key == "description" => {
                            self.around_text(text, 0).into()
                        }
                        value => self.around_descriptions(value),
                    };
                    (key.clone(), value)
                });
                Json::Object(marked.collect())
            }
            other => other.clone(),
        }
    }

    /// Takes the marks out of a rendering of marked messages. Returns `None` if the template took
    /// a text apart, so that a mark is missing.
    pub fn remove(&self, rendered: &str) -> Option<Unmarked> {
        let mut text = String::with_capacity(rendered.len());
        let mut inside: Vec<Range<usize>> = Vec::new();
        let mut answers = Vec::new();
        let mut opened = None;
        let mut rest = rendered;
        while let Some((before, after)) = rest.split_once(&self.prefix) {
            text.push_str(before);
            match (opened.take(), after.chars().next()) {
                (None, Some(by @ ('0' | '2'))) => opened = Some((text.len(), by)),
                (Some((start, by)), Some('1')) => {
                    inside.push(start..text.len());
                    if by == '2' {
                        answers.push(start..text.len());
                    }
                }
                _ => return None,
            }
            rest = &after[1..];
        }
        text.push_str(rest);
        // A template that cuts texts to a length leaves parts of marks.
        let (start, end) = self.prefix.split_at(self.prefix.len() / 2);
        let is_cut = text.contains(start) || text.contains(end);
        (opened.is_none() && !is_cut).then_some(Unmarked {
            text,
            inside,
            answers,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_texts_are_found_again() {
        let marks = Marks::new();
        let marked = marks.around(&Message::new(Role::User, " \u{1c}Hé \n"));
        assert!(marked.content.starts_with(" \u{1c}") && marked.content.ends_with(" \n"));
        let rendered = format!("<u>{}</u>{0}", marked.content.trim());
        assert_eq!(marks.remove(&rendered).unwrap().inside.len(), 2);
        let found = marks.remove(&format!("<u>{}</u>", marked.content)).unwrap();
        assert_eq!(found.text, "<u> \u{1c}Hé \n</u>");
        assert_eq!(&found.text[found.inside[0].clone()], "Hé");
        assert_eq!(marks.around(&Message::new(Role::User, " ")).content, " ");
        assert!(found.answers.is_empty());
        let answer = marks.around(&Message::new(Role::Assistant, "Yo"));
        let both = format!("{}{}", marked.content, answer.content);
        let found = marks.remove(&both).unwrap();
        assert_eq!((found.inside.len(), found.answers.len()), (2, 1));
        assert_eq!(&found.text[found.answers[0].clone()], "Yo");
    }

    #[test]
    fn a_text_that_was_taken_apart_is_noticed() {
        let marks = Marks::new();
        let (open, close) = (marks.numbered(0), marks.numbered(1));
        for rendered in [
            format!("{open}a"),
            format!("a{close}"),
            format!("{open}{open}a{close}{close}"),
            marks.prefix.clone(),
            open[..15].to_string(),
            open[8..].to_string(),
        ] {
            assert_eq!(marks.remove(&rendered), None);
        }
        // Marks of another conversation are text.
        let other = Marks::new();
        assert_ne!(other.prefix, marks.prefix);
        assert!(other.remove(&format!("{open}a")).unwrap().inside.is_empty());
    }
}
