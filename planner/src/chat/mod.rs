//! Chat with a model: reads messages from any reader and streams answers to any writer.
//!
//! Every turn renders the whole conversation anew, since templates change earlier turns (they drop
//! the model's reasoning, for instance). The common prefix with the tokens in the context is kept,
//! so that only new tokens are processed.

pub mod jinja;
pub mod message;
pub mod template;
#[cfg(test)]
mod tests;

use anyhow::{Context, Result, ensure};
use message::{Message, Role};
use std::io::{BufRead, Read, Write};
use std::ops::ControlFlow;
use std::time::Duration;
use template::Template;
use tier_plan_runtime::engine::generate::{Limits, Stop, generate};
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_runtime::tokenizer::Tokenizer;
use tier_plan_runtime::{Engine, LogitsMode};

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
    pub template: Option<Template>,
    /// System message.
    pub system: Option<String>,
    /// Most tokens per answer; `None` is as many as fit.
    pub max_tokens: Option<usize>,
    /// Sampling options.
    pub sampling: SamplerConfig,
    /// Whether to continue past end-of-text tokens.
    pub ignore_eos: bool,
    /// Text written before a message is read; empty if standard input is not a terminal.
    pub prompt: &'a str,
    /// Lines that `/plan` prints.
    pub plan: Vec<String>,
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
            if self.options.prompt.is_empty() && (self.options.signals.interrupted)() {
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
                        writeln!(output, "{line}")?;
                    }
                }
                "/stats" => self.show_stats(output)?,
                _ if text.starts_with("//") => self.turn(&text[1..], output)?,
                _ if text.starts_with('/') => {
                    writeln!(
                        output,
                        "Unknown command {}; /help lists the commands.",
                        text.split(' ').next().unwrap_or(text)
                    )?;
                }
                _ => self.turn(text, output)?,
            }
        }
    }

    /// Answers one message. Without a template, continues it.
    fn turn(&mut self, text: &str, output: &mut impl Write) -> Result<()> {
        if self.options.template.is_none() {
            let ids = self.tokenizer.encode(text, true)?;
            let context = self.engine.context();
            if ids.is_empty() || ids.len() >= context {
                writeln!(
                    output,
                    "That text has {} tokens, expected 1 to {}.",
                    ids.len(),
                    context - 1
                )?;
                return Ok(());
            }
            return self.answer(&ids, output).map(drop);
        }
        self.messages.push(Message::new(Role::User, text));
        let Some(ids) = self.fit(output)? else {
            self.messages.pop();
            return Ok(());
        };
        let answer = self.answer(&ids, output)?;
        if answer.trim().is_empty() {
            // An empty answer drops its message, since templates need turns to alternate.
            self.messages.pop();
        } else {
            self.messages.push(parse_answer(&answer));
        }
        Ok(())
    }

    /// Returns the tokens of the conversation, without its oldest turns if it has outgrown the
    /// context. Returns `None` if the last message alone is too long.
    fn fit(&mut self, output: &mut impl Write) -> Result<Option<Vec<u32>>> {
        let context = self.engine.context();
        let wanted = self
            .options
            .max_tokens
            .unwrap_or(usize::MAX)
            .min(context / 4)
            .max(1);
        let mut dropped = 0;
        let ids = loop {
            let ids = self.tokens()?;
            let first = usize::from(
                self.messages
                    .first()
                    .is_some_and(|m| m.role == Role::System),
            );
            if ids.len() + wanted <= context {
                break ids;
            }
            if self.messages.len() < first + 3 {
                if ids.len() < context {
                    break ids;
                }
                writeln!(
                    output,
                    "That message makes {} tokens, but the context holds {context}; send a shorter one, or start with a larger --context.",
                    ids.len()
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
        Ok(Some(ids))
    }

    /// Returns the tokens of the conversation as the template renders it.
    fn tokens(&self) -> Result<Vec<u32>> {
        let template = self
            .options
            .template
            .as_ref()
            .context("there is no chat template")?;
        let text = match template.render(&self.messages) {
            Ok(text) => text,
            // Some templates reject system messages. Their authors put the text before the first
            // message instead.
            Err(error) => match merge_system(&self.messages).map(|merged| template.render(&merged))
            {
                Some(Ok(text)) => text,
                _ => return Err(error),
            },
        };
        let mut ids = self.tokenizer.encode(&text, true)?;
        // Template and tokenizer may both add BOS: keep one, and drop an end token.
        if let Some(bos) = self.tokenizer.prefix()
            && ids.starts_with(&[bos, bos])
        {
            ids.remove(0);
        }
        let around = self.tokenizer.encode("", true)?.len();
        if around > usize::from(self.tokenizer.prefix().is_some()) {
            ids.pop();
        }
        ensure!(
            !ids.is_empty(),
            "the chat template rendered an empty conversation; pass another with --chat-template FILE"
        );
        Ok(ids)
    }

    /// Continues `ids`, which must fit the context, and writes the text as it is generated.
    fn answer(&mut self, ids: &[u32], output: &mut impl Write) -> Result<String> {
        let same = self
            .held
            .iter()
            .zip(ids)
            .take_while(|(a, b)| a == b)
            .count();
        // At least one token must be processed, for the logits.
        if self.engine.truncate(same.min(ids.len() - 1)).is_err() {
            // A recurrent state cannot be truncated, so the whole conversation is processed again.
            self.engine.clear();
        }
        let kept = self.engine.n_past();
        self.held.clear();
        self.held.extend_from_slice(ids);
        self.engine.reset_counters();
        let interrupted = self.options.signals.interrupted;
        // Ctrl-C is polled between batches.
        let slice = self.engine.batch();
        let mut rest = &ids[kept..];
        while rest.len() > slice && !interrupted() {
            let (now, after) = rest.split_at(slice);
            self.engine.forward(now, LogitsMode::Last)?;
            rest = after;
        }
        let mut answer = String::new();
        let mut n_answer = 0;
        if rest.len() <= slice {
            let max_tokens = self.options.max_tokens.unwrap_or(usize::MAX);
            let is_end = |token| !self.options.ignore_eos && self.tokenizer.is_eog(token);
            let mut stream = self.tokenizer.stream();
            let mut write_error = None;
            let limits = Limits {
                max_tokens,
                is_end: &is_end,
            };
            let generated = generate(self.engine, rest, &mut self.sampler, &limits, |_, token| {
                let piece = stream.push(token);
                answer.push_str(&piece);
                if let Err(error) = output
                    .write_all(piece.as_bytes())
                    .and_then(|()| output.flush())
                {
                    write_error = Some(error);
                    return ControlFlow::Break(());
                }
                if interrupted() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })?;
            if let Some(error) = write_error {
                return Err(error.into());
            }
            let tail = stream.finish();
            write!(output, "{tail}")?;
            answer.push_str(&tail);
            n_answer = generated.tokens.len();
            self.held.extend(&generated.tokens);
            match generated.stop {
                Stop::ContextFull => write!(output, "\n(the context is full)")?,
                Stop::Caller => write!(output, "\n(stopped)")?,
                Stop::Limit | Stop::EndToken => {}
            }
        } else {
            write!(output, "(stopped)")?;
        }
        // The last sampled token was not processed, nor the rest after an interruption.
        self.held.truncate(self.engine.n_past());
        self.stats = Some(Stats {
            kept,
            prompt: ids.len() - kept,
            answer: n_answer,
        });
        writeln!(output)?;
        output.flush()?;
        Ok(answer)
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
        for (tier, bytes) in self.engine.plan().tiers.iter().zip(&counters.read_bytes) {
            let each = *bytes as f64 / counters.decode_tokens.max(1) as f64 / 1e6;
            writeln!(output, "{}: {each:.2} MB read per token", tier.tier.name)?;
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

/// Reads the next message; returns `None` at the end of the input. Invalid UTF-8 becomes U+FFFD.
fn read_message(input: &mut impl BufRead) -> Result<Option<String>> {
    let mut message = String::new();
    loop {
        let mut line = Vec::new();
        let read = input
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut line)
            .context("reading the message")?;
        if read == 0 {
            return Ok((!message.is_empty()).then_some(message));
        }
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches(['\n', '\r']);
        match line.strip_suffix('\\') {
            Some(start) if (message.len() as u64) < MAX_LINE_BYTES => {
                message.push_str(start);
                message.push('\n');
            }
            _ => {
                message.push_str(line);
                return Ok(Some(message));
            }
        }
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

/// Splits a reply into reasoning and answer.
fn parse_answer(text: &str) -> Message {
    let apart = |thinking: &str, content: &str| Message {
        role: Role::Assistant,
        content: content.trim().to_string(),
        thinking: Some(thinking.trim().to_string()).filter(|t| !t.is_empty()),
    };
    // gpt-oss names a channel for each part of its reply.
    if let Some((_, thought)) = text.split_once("<|channel|>analysis<|message|>") {
        let (thinking, rest) = thought.split_once("<|end|>").unwrap_or((thought, ""));
        let content = rest
            .split_once("<|channel|>final<|message|>")
            .map_or("", |(_, content)| content);
        return apart(thinking, content.trim_end_matches("<|end|>"));
    }
    if let Some((_, content)) = text.split_once("<|channel|>final<|message|>") {
        return apart("", content.trim_end_matches("<|end|>"));
    }
    match text.split_once("</think>") {
        Some((thinking, content)) => {
            apart(thinking.trim_start().trim_start_matches("<think>"), content)
        }
        None => Message::new(Role::Assistant, text),
    }
}
