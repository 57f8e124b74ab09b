//! Chat with a model: reads messages from any reader and streams answers to any writer.
//!
//! Every turn renders the whole conversation anew, since templates change earlier turns (they drop
//! the model's reasoning, for instance). Where the result has an answer as the model gave it, it
//! gets the tokens that the model produced. The common prefix with the tokens in the context is
//! kept, so that only new tokens are processed.

mod answer;
pub mod dialect;
#[cfg(test)]
mod dialect_tests;
pub mod jinja;
mod marks;
pub mod message;
mod serving;
pub mod spoken;
pub mod template;
#[cfg(test)]
mod tests;
pub(crate) mod thought;
#[cfg(test)]
mod tool_tests;

use crate::auto::Learner;
use crate::printable::printable;
use crate::screen::Screen;
use crate::text::decode;
use anyhow::{Context, Result, ensure};
use dialect::{Dialect, Rendered};
use message::{Message, Role};
pub use serving::SharedDialect;
use spoken::Spoken;
use std::io::{BufRead, Read, Write};
use std::sync::Arc;
use std::time::Duration;
use tier_plan_runtime::Engine;
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_runtime::tokenizer::{Tokenizer, TokenizerError};

/// Longest line of a message in bytes, far more than any context holds.
const MAX_LINE_BYTES: u64 = 64 << 20;

const HELP: &str = "\
/reset  forget the conversation
/plan   what lives where
/stats  what the last answer took
/quit   end (as does Ctrl-D)
A \\ at the end of a line continues the message on the next; // at its start sends a /.
Ctrl-C stops an answer.
";

/// Callbacks about interruption by the user.
#[derive(Clone, Copy)]
pub struct Signals<'a> {
    /// Returns whether the answer should stop.
    pub interrupted: &'a dyn Fn() -> bool,
    /// Called with true before a message is read and with false after. Forgets an earlier
    /// interruption.
    pub waiting: &'a dyn Fn(bool),
}

/// Options of a chat.
pub struct Options<'a> {
    /// Chat template; without one every message is a text to continue.
    pub template: Option<Dialect>,
    /// System message.
    pub system: Option<String>,
    /// Most tokens per answer; `None` is as many as fit.
    pub max_tokens: Option<usize>,
    /// Sampling options.
    pub sampling: SamplerConfig,
    /// Whether to continue past end-of-text tokens.
    pub ignore_eos: bool,
    /// Tokens per draft at most.
    pub draft: usize,
    /// Text written before a message is read; empty if standard input is not a terminal.
    pub prompt: &'a str,
    /// Filter of what is written of answers and messages.
    pub screen: Screen,
    /// Lines that `/plan` prints.
    pub plan: Vec<String>,
    /// What records which experts answers choose, if they are recorded.
    pub learner: Option<&'a mut Learner>,
    /// Callbacks about interruption.
    pub signals: Signals<'a>,
}

/// Token counts of the last answer.
#[derive(Debug, Clone, Copy, Default)]
struct Stats {
    kept: usize,
    prompt: usize,
    answer: usize,
}

/// A conversation as the model gets it.
struct Prompt {
    /// Text of the prompt; empty without a template.
    text: String,
    /// The tokens, unless they are more than the context holds.
    tokens: Vec<u32>,
    /// Number of the tokens; at least so many if they are more than the context holds.
    n_tokens: usize,
}

/// A chat with its history.
pub struct Chat<'a> {
    engine: &'a mut Engine,
    tokenizer: &'a Tokenizer,
    options: Options<'a>,
    sampler: Sampler,
    messages: Vec<Message>,
    /// Tokens in the engine's context.
    held: Vec<u32>,
    stats: Option<Stats>,
    /// Whether the user knows that control tokens in messages are plain text.
    told: bool,
}

impl<'a> Chat<'a> {
    /// Creates an empty chat, and clears the engine's context.
    pub fn new(engine: &'a mut Engine, tokenizer: &'a Tokenizer, options: Options<'a>) -> Self {
        let sampler = Sampler::new(options.sampling.clone());
        let mut chat = Self {
            engine,
            tokenizer,
            options,
            sampler,
            messages: Vec::new(),
            held: Vec::new(),
            stats: None,
            told: false,
        };
        chat.reset();
        chat
    }

    fn reset(&mut self) {
        self.engine.clear();
        self.held.clear();
        let system = self
            .options
            .system
            .iter()
            .map(|text| Message::new(Role::System, text));
        self.messages = system.collect();
    }

    /// Reads messages and answers them until `/quit` or the end of the input.
    ///
    /// # Errors
    /// When reading or writing fails, the model fails, or its template is unusable.
    pub fn talk(&mut self, input: &mut impl BufRead, output: &mut impl Write) -> Result<()> {
        if self.options.template.is_none() {
            writeln!(
                output,
                "This model has no chat template: the model continues each message as a text of its own. \
                 --chat-template FILE gives it one."
            )?;
        }
        loop {
            // Without a terminal, an interruption ends the chat and not only the answer.
            let interrupted =
                self.options.prompt.is_empty() && (self.options.signals.interrupted)();
            // SIGTERM and SIGHUP end the chat in any case.
            if interrupted || crate::interrupt::terminated() {
                return Ok(());
            }
            write!(output, "{}", self.options.prompt)?;
            output.flush()?;
            (self.options.signals.waiting)(true);
            let message = read_message(input);
            (self.options.signals.waiting)(false);
            let Some(message) = message? else {
                if !self.options.prompt.is_empty() {
                    writeln!(output)?;
                }
                return Ok(());
            };
            let message = match decode("that message", message) {
                Ok(message) => message,
                Err(error) => {
                    writeln!(output, "{error}; it was not sent.")?;
                    continue;
                }
            };
            let text = message.trim();
            match text {
                "" => {}
                "/quit" | "/exit" => return Ok(()),
                "/help" => write!(output, "{HELP}")?,
                "/reset" => {
                    self.reset();
                    writeln!(output, "The conversation is forgotten.")?;
                }
                "/plan" => {
                    for line in &self.options.plan {
                        writeln!(output, "{}", printable(line))?;
                    }
                }
                "/stats" => self.show_stats(output)?,
                _ if text.starts_with("//") => self.turn(&text[1..], output)?,
                _ if text.starts_with('/') => {
                    let command = text.split(' ').next().unwrap_or(text);
                    let command = printable(command);
                    writeln!(
                        output,
                        "Unknown command {command}; /help lists the commands."
                    )?;
                }
                _ => self.turn(text, output)?,
            }
        }
    }

    /// Says once that control tokens in the user's texts are plain text, since someone may have
    /// meant them.
    fn tell_of_controls(&mut self, text: &str) {
        let texts = [Some(text), self.options.system.as_deref()];
        let mut texts = texts.into_iter().flatten();
        if let Some(token) = texts.find_map(|text| self.tokenizer.structure_in(text))
            && !self.told
        {
            let token = printable(token);
            eprintln!("'{token}' in a message is sent as plain text and not as the control token");
            self.told = true;
        }
    }

    /// Answers one message. Without a template, continues it.
    fn turn(&mut self, text: &str, output: &mut impl Write) -> Result<()> {
        if self.options.template.is_none() {
            let context = self.engine.context();
            let ids = match self.tokenizer.encode_within(text, true, context - 1) {
                Err(TokenizerError::TooLong { most, .. }) => {
                    writeln!(
                        output,
                        "That text has more than {most} tokens, the most that fit."
                    )?;
                    return Ok(());
                }
                encoded => encoded?,
            };
            if ids.is_empty() {
                writeln!(output, "That text has no tokens.")?;
                return Ok(());
            }
            return self.answer(&ids, output).map(drop);
        }
        self.tell_of_controls(text);
        self.messages.push(Message::new(Role::User, text));
        let Some(prompt) = self.fit(output)? else {
            self.messages.pop();
            return Ok(());
        };
        let answer = self.answer(&prompt.tokens, output)?;
        if answer.text.trim().is_empty() {
            // An empty answer drops its message, since templates need turns to alternate.
            self.messages.pop();
        } else {
            let mut message = answer.message(&prompt.text);
            message.spoken = Spoken::new(&answer.tokens, self.tokenizer).map(Arc::new);
            self.messages.push(message);
        }
        Ok(())
    }

    /// Returns the conversation as a prompt, without its oldest turns if it has outgrown the
    /// context. Returns `None` if the last message cannot be sent, and writes why.
    fn fit(&mut self, output: &mut impl Write) -> Result<Option<Prompt>> {
        let context = self.engine.context();
        let wanted = self
            .options
            .max_tokens
            .unwrap_or(usize::MAX)
            .min(context / 4)
            .max(1);
        let mut dropped = 0;
        let prompt = loop {
            let prompt = match self.prompt()? {
                Ok(prompt) => prompt,
                Err(token) => {
                    let token = printable(&token);
                    writeln!(
                        output,
                        "That message was not sent: the chat template takes messages apart, so that '{token}' in one cannot \
                         be told from the template's own. Write it differently, or /reset the conversation."
                    )?;
                    return Ok(None);
                }
            };
            let tokens = prompt.n_tokens;
            let first = usize::from(
                self.messages
                    .first()
                    .is_some_and(|m| m.role == Role::System),
            );
            if tokens.saturating_add(wanted) <= context {
                break prompt;
            }
            if self.messages.len() < first + 3 {
                if tokens < context {
                    break prompt;
                }
                writeln!(
                    output,
                    "That message makes {tokens} tokens or more, but the context holds {context}; send a shorter one, or start with a larger --context."
                )?;
                return Ok(None);
            }
            self.messages.drain(first..first + 2);
            dropped += 1;
        };
        if dropped > 0 {
            writeln!(
                output,
                "(The context of {context} tokens is full: the oldest {dropped} of the turns left it.)"
            )?;
        }
        Ok(Some(prompt))
    }

    /// Returns the conversation as a prompt, or the control token in a message that makes it
    /// impossible.
    fn prompt(&self) -> Result<Result<Prompt, String>> {
        let dialect = self
            .options
            .template
            .as_ref()
            .context("there is no chat template")?;
        let (text, plain, answers) = match dialect.render(&self.messages, self.tokenizer)? {
            Rendered::Prompt {
                text,
                plain,
                answers,
            } => (text, plain, answers),
            Rendered::Mixed { token } => return Ok(Err(token)),
        };
        let context = self.engine.context();
        let known = spoken::known(&text, &plain, &answers, &self.messages);
        let encoded = self.tokenizer.encode_known(&text, &plain, &known, context);
        let (tokens, n_tokens) = match encoded {
            Err(TokenizerError::TooLong { least, .. }) => (Vec::new(), least),
            encoded => {
                let tokens = encoded?;
                let n_tokens = tokens.len();
                (tokens, n_tokens)
            }
        };
        ensure!(
            n_tokens > 0,
            "the chat template rendered an empty conversation; pass another with --chat-template FILE"
        );
        Ok(Ok(Prompt {
            text,
            tokens,
            n_tokens,
        }))
    }

    fn show_stats(&self, output: &mut impl Write) -> Result<()> {
        let Some(stats) = self.stats else {
            writeln!(output, "No answer yet.")?;
            return Ok(());
        };
        let counters = self.engine.counters();
        let rate = |n: u64, time: Duration| n as f64 / time.as_secs_f64().max(1e-9);
        writeln!(
            output,
            "message: {} tokens processed, {} kept from before, {:.1} tok/s",
            stats.prompt,
            stats.kept,
            rate(counters.prompt_tokens, counters.prompt)
        )?;
        writeln!(
            output,
            "answer: {} tokens, {:.1} tok/s",
            stats.answer,
            rate(counters.decode_tokens, counters.decode)
        )?;
        let (hits, misses) = counters.layers.iter().fold((0, 0), |(hits, misses), l| {
            (hits + l.pinned_hits + l.slot_hits, misses + l.misses)
        });
        if hits + misses > 0 {
            writeln!(
                output,
                "experts: {:.1} % resident in fast tiers",
                hits as f64 * 100.0 / (hits + misses) as f64
            )?;
        }
        let streamed: u64 = counters.layers.iter().map(|l| l.streamed).sum();
        if streamed > 0 {
            writeln!(
                output,
                "experts: {:.1} % streamed from main memory to a GPU",
                streamed as f64 * 100.0 / (hits + misses) as f64
            )?;
        }
        for (tier, bytes) in self.engine.plan().tiers.iter().zip(&counters.read_bytes) {
            let each = *bytes as f64 / counters.decode_tokens.max(1) as f64 / 1e6;
            let name = printable(&tier.tier.name);
            writeln!(output, "{name}: {each:.2} MB read per token")?;
        }
        writeln!(
            output,
            "context: {} of {} tokens",
            self.engine.n_past(),
            self.engine.context()
        )?;
        Ok(())
    }
}

/// Reads the next message; returns `None` at the end of the input.
fn read_message(input: &mut impl BufRead) -> Result<Option<Vec<u8>>> {
    let mut message = Vec::new();
    loop {
        let start = message.len();
        let read = input
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut message)
            .context("reading the message")?;
        if read == 0 {
            return Ok((!message.is_empty()).then_some(message));
        }
        while message.len() > start && matches!(message.last(), Some(b'\n' | b'\r')) {
            message.pop();
        }
        if message.len() == start || message.last() != Some(&b'\\') {
            return Ok(Some(message));
        }
        if message.len() as u64 >= MAX_LINE_BYTES {
            return Ok(Some(message));
        }
        message.pop();
        message.push(b'\n');
    }
}
