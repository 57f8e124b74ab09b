//! How a chat template takes a conversation, and the prompt that it makes of one.
//!
//! Templates drop what they do not expect without an error. So a chat begins with a trial: marked
//! texts are rendered, and looked for in the result.
//!
//! A prompt is the text that the template renders, as in transformers. To tell a person's text from
//! the template's own, the conversation is rendered a second time with marks around the texts. If
//! the result is equal but for the marks, they say where the texts are, and no control token comes
//! of what is written there. Templates that compare or split texts may see the marks. Then the
//! plain rendering counts if no text names a control token, and else the marked one.

use super::marks::{Marks, Unmarked};
use super::message::{Call, CallParts, CallStyle, Form, Message, Role, strings};
use super::template::{Surroundings, Template};
use crate::interrupt::Interrupted;
use anyhow::{Result, anyhow};
use serde_json::json;
use std::cell::OnceCell;
use std::ops::Range;
use tier_plan_runtime::tokenizer::Tokenizer;

/// How the template gets a system message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SystemForm {
    /// As a message of its own.
    Message(Form),
    /// Before the text of the first message.
    InFirst,
}

/// A template with the way it takes messages.
pub struct Dialect {
    template: Template,
    marks: Marks,
    user: Form,
    assistant: Form,
    system: SystemForm,
    /// What the trial found missing. The template may still take what a person writes.
    doubt: Option<Doubt>,
    /// How it takes tools, once that was tried.
    tools: OnceCell<ToolStyle>,
}

/// How a template takes tools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ToolStyle {
    /// Whether it prints them.
    pub prints_tools: bool,
    /// How it prints calls and their results, if it does.
    pub calls: Option<CallStyle>,
}

/// What a trial found missing.
enum Doubt {
    /// The texts of other messages than a single one.
    Earlier(String),
    /// The trial's texts, in every form. Each conversation is tried again.
    All(String),
}

/// A rendered conversation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Rendered {
    /// The prompt.
    Prompt {
        /// Text of the prompt.
        text: String,
        /// Ranges of bytes that are texts of messages.
        plain: Vec<Range<usize>>,
        /// Those of them that are the model's answers.
        answers: Vec<Range<usize>>,
    },
    /// The template takes a message apart in which this control token is written out, so that it
    /// cannot be told from the template's own.
    Mixed {
        /// Text of the control token.
        token: String,
    },
}

impl From<Unmarked> for Rendered {
    fn from(found: Unmarked) -> Self {
        Rendered::Prompt {
            text: found.text,
            plain: found.inside,
            answers: found.answers,
        }
    }
}

/// The texts that a trial looks for, in the order in which they are missed.
const TRIAL: [(Role, &str); 3] = [
    (Role::User, "earlier messages"),
    (Role::Assistant, "earlier answers"),
    (Role::User, "the user's message"),
];

impl Dialect {
    /// Finds out how `template` takes messages, with system messages only if there will be one.
    /// A template that the trial's texts do not suit is tried again with each conversation.
    ///
    /// # Errors
    /// On Ctrl-C.
    pub fn probe(template: Template, with_system: bool) -> Result<Self> {
        use Form::{Parts, Text};
        let mut dialect = Self {
            template,
            marks: Marks::new(),
            user: Text,
            assistant: Text,
            system: SystemForm::Message(Text),
            doubt: None,
            tools: OnceCell::new(),
        };
        // The error of the form that gets furthest.
        let mut failed: Option<(usize, anyhow::Error)> = None;
        // Parts last: a template for strings may print the list.
        for (user, assistant) in [(Text, Text), (Parts, Text), (Text, Parts), (Parts, Parts)] {
            (dialect.user, dialect.assistant) = (user, assistant);
            match dialect.misses(&TRIAL.map(|(role, _)| role)) {
                Ok(missed) if missed.is_empty() => {
                    if with_system {
                        dialect.probe_system();
                    }
                    return Ok(dialect);
                }
                Ok(missed) => {
                    let found = TRIAL.len() - missed.len();
                    // Without the last message, nothing else matters.
                    let what = missed.last().map_or("", |i| TRIAL[*i].1);
                    if failed.as_ref().is_none_or(|(most, _)| found > *most) {
                        let error = anyhow!(
                            "the chat template leaves out {what}, expected a template that renders \
                             every message; give another with --chat-template FILE"
                        );
                        failed = Some((found, error));
                    }
                }
                Err(error) if error.is::<Interrupted>() => return Err(error),
                Err(error) => failed = failed.or(Some((0, error))),
            }
        }
        let missing = failed.map_or_else(String::new, |(_, error)| error.to_string());
        for form in [Text, Parts] {
            (dialect.user, dialect.assistant) = (form, form);
            if matches!(dialect.misses(&[Role::User]), Ok(missed) if missed.is_empty()) {
                dialect.doubt = Some(Doubt::Earlier(missing));
                if with_system {
                    dialect.probe_system();
                }
                return Ok(dialect);
            }
        }
        (dialect.user, dialect.assistant) = (Text, Text);
        dialect.doubt = Some(Doubt::All(missing));
        Ok(dialect)
    }

    /// Finds out how the template takes tools, calls, and their results: as with messages, marked
    /// texts are looked for in what it renders.
    pub(crate) fn tool_style(&self) -> ToolStyle {
        *self.tools.get_or_init(|| {
            self.template.begin_turn();
            let user = Message::new(Role::User, &self.marks.numbered(0));
            let name = format!("f{}", self.marks.numbered(3));
            let around = Surroundings {
                tools: vec![json!({
                    "type": "function",
                    "function": {
                        "name": name,
                        "description": "A trial.",
                        "parameters": { "type": "object", "properties": {
                            "a": { "type": "string", "description": "A text." },
                        }, "required": ["a"] },
                    },
                })],
                ..Surroundings::default()
            };
            let alone = self.formed(std::slice::from_ref(&user));
            let printed = self.template.render_in(&alone, &around);
            let printed = printed.is_ok_and(|text| text.contains(&name));
            // Objects and texts first, which most templates take.
            let styles = [(false, false), (false, true), (true, false), (true, true)];
            let styles = styles.map(|(null_content, text_arguments)| CallStyle {
                null_content,
                text_arguments,
            });
            let around = if printed {
                around
            } else {
                Surroundings::default()
            };
            let mut takes = styles.into_iter();
            ToolStyle {
                prints_tools: printed,
                calls: takes.find(|style| self.prints_call(*style, &name, &around)),
            }
        })
    }

    /// Whether the template prints a call and its result.
    fn prints_call(&self, style: CallStyle, name: &str, around: &Surroundings) -> bool {
        let [user, argument, result] = [0, 4, 5].map(|number| self.marks.numbered(number));
        // Mistral's templates take nothing but nine letters or digits.
        let id = "trial0001".to_string();
        let call = Call {
            id: id.clone(),
            name: name.to_string(),
            arguments: json!({ "a": argument }),
        };
        let answer = Message {
            tools: CallParts {
                calls: vec![call],
                style,
                ..CallParts::default()
            },
            ..Message::new(Role::Assistant, "")
        };
        let came = Message {
            tools: CallParts {
                call_id: Some(id),
                name: Some(name.to_string()),
                ..CallParts::default()
            },
            ..Message::new(Role::Tool, &result)
        };
        let messages = self.formed(&[Message::new(Role::User, &user), answer, came]);
        let text = self.template.render_in(&messages, around);
        text.is_ok_and(|text| {
            // After the user's message, where the tools are not.
            let after = text.split_once(&user).map_or("", |(_, after)| after);
            [name, &argument, &result]
                .iter()
                .all(|part| after.contains(*part))
        })
    }

    fn probe_system(&mut self) {
        for form in [Form::Text, Form::Parts] {
            self.system = SystemForm::Message(form);
            let missed = self.misses(&[Role::System, Role::User]);
            if missed.is_ok_and(|missed| missed.is_empty()) {
                return;
            }
        }
        self.system = SystemForm::InFirst;
    }

    /// Renders one marked message per role, and returns the indices of those that are missing in
    /// the result.
    fn misses(&self, roles: &[Role]) -> Result<Vec<usize>> {
        let numbered = |(i, _)| self.marks.numbered(i);
        let marks: Vec<String> = (0..).zip(roles).map(numbered).collect();
        let messages: Vec<Message> = roles
            .iter()
            .zip(&marks)
            .map(|(role, mark)| Message::new(*role, mark))
            .collect();
        let text = self.template.render(&self.formed(&messages))?;
        let missing = |(i, mark): (usize, &String)| (!text.contains(mark.as_str())).then_some(i);
        Ok(marks.iter().enumerate().filter_map(missing).collect())
    }

    /// Returns what the user should know about the template, if anything.
    pub fn note(&self) -> Option<String> {
        match &self.doubt {
            Some(Doubt::Earlier(missing)) => Some(format!("warning: {missing}")),
            _ if self.system == SystemForm::InFirst => Some(
                "the chat template has no system message: --system is put before the first message"
                    .to_string(),
            ),
            _ => None,
        }
    }

    /// Renders a conversation up to where the model should answer.
    ///
    /// # Errors
    /// When the template rejects the conversation.
    pub(crate) fn render(&self, messages: &[Message], tokenizer: &Tokenizer) -> Result<Rendered> {
        self.render_in(messages, &Surroundings::default(), tokenizer)
    }

    /// Returns the text of the template.
    pub(crate) fn source(&self) -> &str {
        self.template.source()
    }

    /// Renders a conversation with tools and variables. Calls must be in the
    /// [style](Self::tool_style) of the template.
    ///
    /// # Errors
    /// When the template rejects the conversation.
    pub(crate) fn render_in(
        &self,
        messages: &[Message],
        around: &Surroundings,
        tokenizer: &Tokenizer,
    ) -> Result<Rendered> {
        self.template.begin_turn();
        let (messages, text) = self.rendered(messages, around)?;
        let marked: Vec<Message> = messages.iter().map(|m| self.marks.around(m)).collect();
        let tools = around.tools.iter();
        let marked_around = Surroundings {
            tools: tools
                .map(|tool| self.marks.around_descriptions(tool))
                .collect(),
            variables: around.variables.clone(),
        };
        // A template may reject what it would accept without marks.
        let unmarked = self.template.render_in(&marked, &marked_around).ok();
        let unmarked = unmarked.and_then(|text| self.marks.remove(&text));
        let named = || {
            let mut found = None;
            let mut see = |text: &str| {
                if found.is_none() {
                    found = tokenizer.structure_in(text).map(str::to_string);
                }
            };
            messages.iter().for_each(|message| message.texts(&mut see));
            around.tools.iter().for_each(|tool| strings(tool, &mut see));
            found
        };
        Ok(match unmarked {
            Some(found) if found.text == text => found.into(),
            other => match (named(), other) {
                (None, _) => Rendered::Prompt {
                    text,
                    plain: Vec::new(),
                    answers: Vec::new(),
                },
                (Some(_), Some(found)) => found.into(),
                (Some(token), None) => Rendered::Mixed { token },
            },
        })
    }

    /// Returns the messages in the forms that the template takes, and the text that it makes.
    fn rendered(
        &self,
        messages: &[Message],
        around: &Surroundings,
    ) -> Result<(Vec<Message>, String)> {
        let Some(Doubt::All(missing)) = &self.doubt else {
            let messages = self.formed(messages);
            let text = self.template.render_in(&messages, around)?;
            return Ok((messages, text));
        };
        let mut failed = None;
        for form in [Form::Text, Form::Parts] {
            let mut messages = self.formed(messages);
            messages.iter_mut().for_each(|m| m.form = form);
            let text = match self.template.render_in(&messages, around) {
                Ok(text) => text,
                Err(error) => {
                    failed = failed.or(Some(error));
                    continue;
                }
            };
            if self.uses_last(&messages, around, &text) {
                return Ok((messages, text));
            }
        }
        Err(failed.unwrap_or_else(|| anyhow!("{missing}")))
    }

    /// Returns whether the prompt would differ from `text` if the last message said something else.
    fn uses_last(&self, messages: &[Message], around: &Surroundings, text: &str) -> bool {
        let mark = self.marks.numbered(0);
        let Some((last, before)) = messages.split_last() else {
            return false;
        };
        [
            format!("{}{mark}", last.content),
            format!("{mark}{}", last.content),
        ]
        .into_iter()
        .any(|content| {
            let other = Message {
                content,
                ..last.clone()
            };
            let other = self
                .template
                .render_in(&[before, &[other]].concat(), around);
            other.ok().as_deref() != Some(text)
        })
    }

    /// Returns the messages in the forms that the template takes.
    fn formed(&self, messages: &[Message]) -> Vec<Message> {
        let mut messages = messages.to_vec();
        if self.system == SystemForm::InFirst
            && let Some(merged) = merge_system(&messages)
        {
            messages = merged;
        }
        for message in &mut messages {
            message.form = match (message.role, self.system) {
                (Role::User, _) => self.user,
                (Role::Assistant, _) => self.assistant,
                (Role::System, SystemForm::Message(form)) => form,
                (Role::System, SystemForm::InFirst) => Form::Text,
                (Role::Tool, _) => Form::Text,
            };
        }
        messages
    }
}

/// Returns the conversation with the system message merged into the first message after it.
fn merge_system(messages: &[Message]) -> Option<Vec<Message>> {
    let [system, first, rest @ ..] = messages else {
        return None;
    };
    if system.role != Role::System {
        return None;
    }
    let mut merged = vec![Message::new(
        first.role,
        &format!("{}\n\n{}", system.content, first.content),
    )];
    merged.extend_from_slice(rest);
    Some(merged)
}
