//! Chat templates: Jinja as Hugging Face runs it, so that the model sees the format it was trained
//! on.
//!
//! Templates come with model files and are programs of strangers. What renders them is in
//! [`jinja`](super::jinja), what bounds them in [`worker`].

use super::jinja::{Compiled, worker};
use super::message::Message;
use anyhow::{Result, anyhow, ensure};
use minijinja::value::Value;
use serde_json::{Map, Value as Json};
use std::borrow::Cow;
use std::cell::Cell;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

/// Most bytes of a conversation, several times the largest context of any model.
const MAX_CONVERSATION_BYTES: usize = 16 << 20;

/// What a template sees beside the messages.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Surroundings {
    /// Tools, each with a type and a function.
    pub tools: Vec<Json>,
    /// Variables with other names than those that every template sees.
    pub variables: Map<String, Json>,
}

/// A chat template with the tokens that it may write.
pub struct Template {
    source: String,
    place: Place,
    bos: String,
    eos: String,
}

/// Where a template is rendered.
enum Place {
    /// In this process, which only bounds the number of steps.
    Here(Box<Compiled>),
    /// In a process per rendering, which bounds memory, stack, and time.
    Worker {
        /// Why the template used up its limits once. It is not run again.
        spent: OnceLock<String>,
        /// Time left for the renderings of a turn together.
        time: Cell<Duration>,
    },
}

impl Template {
    /// Compiles `source`, to be rendered in this process: for templates that are trusted, and for
    /// the worker itself. `bos` and `eos` are the texts of the BOS and EOS tokens.
    ///
    /// # Errors
    /// When the template cannot be compiled.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        Self::at(source, bos, eos, None)
    }

    /// Compiles `source` like [`new`](Self::new), with `now` in UTC instead of the local time.
    pub fn at(source: &str, bos: &str, eos: &str, now: Option<SystemTime>) -> Result<Self> {
        let compiled = Compiled::new(source, now).map_err(refused)?;
        Ok(Self {
            source: source.to_string(),
            place: Place::Here(Box::new(compiled)),
            bos: bos.to_string(),
            eos: eos.to_string(),
        })
    }

    /// Takes a template of a stranger, to be rendered by a process of its own, and checks there
    /// that it compiles. Only for the program `tier-plan`, which that process runs again.
    ///
    /// # Errors
    /// When the template cannot be compiled within its limits, or no process can be started.
    pub fn isolated(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let template = Self {
            source: source.to_string(),
            place: Place::Worker {
                spent: OnceLock::new(),
                time: Cell::new(worker::MAX_TIME),
            },
            bos: bos.to_string(),
            eos: eos.to_string(),
        };
        template.ask(None, &Surroundings::default())?;
        Ok(template)
    }

    /// Returns the text of the template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Begins a turn: its renderings have the whole time of a process together.
    pub(super) fn begin_turn(&self) {
        if let Place::Worker { time, .. } = &self.place {
            time.set(worker::MAX_TIME);
        }
    }

    /// Renders a conversation up to where the model should answer.
    ///
    /// # Errors
    /// When the template rejects the conversation or exceeds its limits, and on Ctrl-C.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        self.render_in(messages, &Surroundings::default())
    }

    /// Renders a conversation with tools and variables.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_in(&self, messages: &[Message], around: &Surroundings) -> Result<String> {
        let values: Vec<Value> = messages.iter().map(Message::value).collect();
        let bytes = messages.iter().map(Message::n_bytes);
        let tools = around.tools.iter().chain(around.variables.values());
        let bytes = bytes.chain(tools.map(|tool| tool.to_string().len()));
        let bytes = bytes.fold(0, usize::saturating_add);
        ensure!(
            bytes <= MAX_CONVERSATION_BYTES,
            "the conversation has {bytes} bytes, expected at most {MAX_CONVERSATION_BYTES}; send shorter messages"
        );
        match &self.place {
            Place::Here(compiled) => compiled
                .render(values, around, &self.bos, &self.eos)
                .map_err(refused),
            Place::Worker { .. } => self.ask(Some(values), around),
        }
    }

    /// Has a worker compile the template, and render `messages` if there are any.
    fn ask(&self, messages: Option<Vec<Value>>, around: &Surroundings) -> Result<String> {
        let Place::Worker { spent, time, .. } = &self.place else {
            unreachable!("only templates of strangers go to a worker")
        };
        if let Some(reason) = spent.get() {
            return Err(refused(reason.clone()));
        }
        let request = worker::Request {
            source: self.source.as_str().into(),
            bos: self.bos.as_str().into(),
            eos: self.eos.as_str().into(),
            messages,
            tools: Cow::Borrowed(&around.tools),
            variables: Cow::Borrowed(&around.variables),
        };
        let mut left = time.get();
        let reply = worker::ask(&request, &mut left);
        time.set(left);
        match reply? {
            worker::Reply::Rendered(text) => Ok(text),
            worker::Reply::Refused(reason) => Err(refused(reason)),
            worker::Reply::Spent(reason) => Err(refused(spent.get_or_init(|| reason).clone())),
        }
    }
}

/// Returns the error of a template that failed for `reason`.
fn refused(reason: String) -> anyhow::Error {
    anyhow!("the chat template {reason}; give another with --chat-template FILE")
}
