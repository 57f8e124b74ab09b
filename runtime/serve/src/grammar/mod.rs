//! Grammars of answers: by them, the engine is kept to tokens that fit.
//!
//! What an answer must be, in front of it the thought of a model that reasons, and the frame of calls
//! are written down as one grammar in the syntax of Lark, which llguidance compiles. A vocabulary is
//! put into the form that it needs when the first grammar comes. Requests with equal grammars share
//! what was compiled; the last few are kept.

mod compiled;
mod frame;
pub(crate) mod gbnf;
mod guide;
#[cfg(test)]
mod tests;

use crate::calls::forms::{self, Form};
use crate::request::format::Format;
use crate::request::tools::Tools;
use crate::request::{BadLine, Code, Endpoint, Request};
use crate::thought;
use compiled::Compiled;
use frame::Lark;
use guide::Vocabulary;
use std::sync::{Arc, OnceLock};
use tier_plan_runtime::batcher::Grammar;
use tier_plan_runtime::tokenizer::Tokenizer;

/// Most characters of a compiler's message that an error quotes.
const MAX_MESSAGE_CHARS: usize = 400;

/// What an answer must be, and what it may have before.
struct Wanted<'a> {
    format: &'a Format,
    tools: &'a Tools,
    /// Whether the answer is one of a chat, with a thought before it.
    is_chat: bool,
    /// The end of the prompt, where a template may have opened a thought.
    prompt: &'a str,
}

/// Makes the grammars of a model.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    vocabulary: OnceLock<Result<Vocabulary, String>>,
    /// How the model calls tools, if that is known.
    form: Option<&'static Form>,
    /// What the names of fields have before them in errors.
    path: &'static str,
    compiled: Compiled,
}

impl Grammars {
    /// Creates the grammars of a model with this chat template, if it has one. In errors, the names of
    /// fields have `path` before them, such as `body.`.
    pub fn new(tokenizer: Arc<Tokenizer>, template: Option<&str>, path: &'static str) -> Self {
        let form = template.and_then(forms::of_template);
        Self {
            path,
            ..Self::with_form(tokenizer, form)
        }
    }

    /// Creates the grammars of a model that calls tools in this form.
    pub(crate) fn with_form(tokenizer: Arc<Tokenizer>, form: Option<&'static Form>) -> Self {
        Self {
            tokenizer,
            vocabulary: OnceLock::new(),
            form,
            path: "",
            compiled: Compiled::default(),
        }
    }

    /// Returns the grammar of the answer to a request, `None` if it may be any text. `prompt` is the
    /// text that a template made of the messages. Equal requests get one grammar.
    ///
    /// # Errors
    /// When the grammar can't be compiled, or the model's calls have no frame.
    pub fn of(&self, request: &Request, prompt: &str) -> Result<Option<Grammar>, BadLine> {
        self.wanted(&Wanted {
            format: &request.format,
            tools: &request.tools,
            is_chat: request.endpoint == Endpoint::Chat,
            prompt,
        })
    }

    /// Returns the grammar of an answer, `None` if it may be any text.
    fn wanted(&self, wanted: &Wanted<'_>) -> Result<Option<Grammar>, BadLine> {
        let demanded = wanted.tools.demanded();
        if demanded.is_none() && *wanted.format == Format::Text {
            return Ok(None);
        }
        let refused = |code, why: &str| {
            let message = format!("{}{}: {why}", self.path, what(wanted));
            BadLine::new(code, message)
        };
        let made = self
            .vocabulary
            .get_or_init(|| Vocabulary::new(&self.tokenizer));
        let vocabulary = made
            .as_ref()
            .map_err(|why| refused(Code::Unsupported, why))?;
        let lark = self.lark(wanted, vocabulary)?;
        let grammar = self.compiled.get(lark, |lark| {
            let grammar = vocabulary.compile(lark);
            grammar.map_err(|why| why.chars().take(MAX_MESSAGE_CHARS).collect())
        });
        grammar
            .map(Some)
            .map_err(|why| refused(Code::InvalidRequest, &why))
    }

    /// Returns the grammar as text.
    fn lark(&self, wanted: &Wanted<'_>, vocabulary: &Vocabulary) -> Result<String, BadLine> {
        if let (Format::Lark(text), false) = (wanted.format, wanted.is_chat) {
            return Ok(text.clone());
        }
        let mut lark = Lark::new(|text| vocabulary.control(text));
        let is_channels = self.form.is_some_and(Form::is_channels);
        let mut ways = Vec::new();
        if wanted.tools.may_call() {
            let frame = self.form.and_then(|form| form.frame.as_ref());
            let frame = frame.ok_or_else(|| {
                let message = format!(
                    "{}{}: calls of this model can't be demanded or go with a form of the answer, expected \
                     \"tool_choice\": \"auto\" alone",
                    self.path,
                    what(wanted)
                );
                BadLine::new(Code::Unsupported, message)
            })?;
            let all: Vec<_> = wanted.tools.list.iter().collect();
            let tools = wanted.tools.demanded().unwrap_or(all);
            ways.push(lark.calls(frame, &tools, wanted.tools.parallel));
        }
        if wanted.tools.demanded().is_none() {
            let answer = lark.format(wanted.format);
            ways.push(if is_channels {
                format!("{} {answer}", lark.text("<|channel|>final<|message|>"))
            } else {
                answer
            });
        }
        let before = match wanted.is_chat {
            true => thought::before(wanted.prompt, is_channels, |text| vocabulary.has(text)),
            false => thought::Before::Nothing,
        };
        let before = lark.thought(&before);
        Ok(lark.finish(&format!("{before} ({})", ways.join(" | "))))
    }
}

/// Returns the field of a request that asks for a grammar.
fn what(wanted: &Wanted<'_>) -> &'static str {
    if *wanted.format == Format::Text {
        "tool_choice"
    } else {
        "response_format"
    }
}
