//! Grammars of answers: by them, the engine is kept to tokens that fit.
//!
//! What an answer must be, in front of it the thought of a model that reasons, and the frame of calls
//! are written down as one grammar in the syntax of Lark, which llguidance compiles. A vocabulary is
//! put into the form that it needs when the first grammar comes.

mod frame;
pub(crate) mod gbnf;
mod guide;
#[cfg(test)]
mod tests;

use crate::calls::forms::Form;
use crate::request::format::Format;
use crate::request::tools::Tools;
use crate::request::{BadLine, Code};
use crate::thought;
use frame::Lark;
use guide::Vocabulary;
use std::sync::{Arc, OnceLock};
use tier_plan_runtime::batcher::Grammar;
use tier_plan_runtime::tokenizer::Tokenizer;

/// Most characters of a compiler's message that an error quotes.
const MAX_MESSAGE_CHARS: usize = 400;

/// What an answer must be, and what it may have before.
pub(crate) struct Wanted<'a> {
    pub format: &'a Format,
    pub tools: &'a Tools,
    /// How the model calls tools, if it has any.
    pub form: Option<&'static Form>,
    /// Whether the answer is one of a chat, with a thought before it.
    pub is_chat: bool,
    /// The end of the prompt, where a template may have opened a thought.
    pub prompt: &'a str,
}

/// Makes the grammars of a model.
pub(crate) struct Grammars {
    tokenizer: Arc<Tokenizer>,
    vocabulary: OnceLock<Result<Vocabulary, String>>,
}

impl Grammars {
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self {
            tokenizer,
            vocabulary: OnceLock::new(),
        }
    }

    /// Returns the grammar of an answer, `None` if it may be any text.
    ///
    /// # Errors
    /// When the grammar can't be compiled, or the model's calls have no frame.
    pub fn of(&self, wanted: &Wanted<'_>) -> Result<Option<Grammar>, BadLine> {
        let demanded = wanted.tools.demanded();
        if demanded.is_none() && *wanted.format == Format::Text {
            return Ok(None);
        }
        let made = self
            .vocabulary
            .get_or_init(|| Vocabulary::new(&self.tokenizer));
        let vocabulary = made.as_ref().map_err(|why| {
            let message = format!("{}: {why}", what(wanted));
            BadLine::new(Code::Unsupported, message)
        })?;
        let lark = self.lark(wanted, vocabulary)?;
        let grammar = vocabulary.compile(&lark);
        grammar.map(Some).map_err(|why| {
            let why: String = why.chars().take(MAX_MESSAGE_CHARS).collect();
            BadLine::new(Code::InvalidRequest, format!("{}: {why}", what(wanted)))
        })
    }

    /// Returns the grammar as text.
    fn lark(&self, wanted: &Wanted<'_>, vocabulary: &Vocabulary) -> Result<String, BadLine> {
        if let (Format::Lark(text), false) = (wanted.format, wanted.is_chat) {
            return Ok(text.clone());
        }
        let mut lark = Lark::new(|text| vocabulary.control(text));
        let is_channels = wanted.form.is_some_and(Form::is_channels);
        let mut ways = Vec::new();
        if wanted.tools.may_call() {
            let frame = wanted.form.and_then(|form| form.frame.as_ref());
            let frame = frame.ok_or_else(|| {
                let message = format!(
                    "{}: calls of this model can't be demanded or go with a form of the answer, expected \
                     \"tool_choice\": \"auto\" alone",
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
