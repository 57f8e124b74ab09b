//! One text while it is generated.

use super::guide::{Grammar, Guided};
use crate::engine::SequenceId;
use crate::engine::draft::Acceptance;
use crate::error::RunError;
use crate::sampler::{
    Sampler, SamplerConfig, StopStrings, TokenLogProbabilities, log_probabilities,
};
use crate::tokenizer::{ThoughtMark, TokenStream, Tokenizer};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct TextOptions {
    /// Tokens to continue, at least 1.
    pub prompt: Vec<u32>,
    /// Most tokens to generate, at least 1.
    pub max_new: usize,
    /// How tokens are drawn. The second text of a request has the next seed, and so on.
    pub sampling: SamplerConfig,
    /// Texts that end it.
    pub stop: Vec<String>,
    /// Whether to continue past end-of-text tokens.
    pub ignore_eos: bool,
    /// Number of the most likely tokens whose log-probabilities are wanted beside the token's own.
    pub n_top: Option<usize>,
    /// Control tokens whose texts belong to the text that is generated.
    pub shown: Arc<[u32]>,
    /// What the text must follow.
    pub grammar: Option<Grammar>,
}

/// Why a text ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    EndToken,
    /// This stop string came.
    StopString(String),
    /// It has all tokens that it may have.
    Length,
}

/// A generated token with its log-probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenText {
    /// Where its text begins in what was generated, in bytes.
    pub start: usize,
    /// Those of the token and of the most likely ones.
    pub logprobs: TokenLogProbabilities,
}

/// What came of one drawn token. Text that may be the beginning of a stop string comes later, and so
/// do the log-probabilities of its tokens.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Drawn {
    /// Text that is certain now.
    pub text: String,
    /// Tokens whose text has begun to come, if log-probabilities are wanted.
    pub tokens: Vec<TokenText>,
    /// Where the token is in the text of all events, if it marks a thought. The place may be in text
    /// that comes later, or never.
    pub mark: Option<(Range<usize>, ThoughtMark)>,
    /// Tokens generated so far.
    pub n_new: usize,
    /// Why the text ends, if it does. No event follows.
    pub finish: Option<Finish>,
    /// Where the text ends, all of its tokens: also those of a stop string, and no end token.
    pub ids: Vec<u32>,
}

/// A text at work.
pub(super) struct Live<'a> {
    tokenizer: &'a Tokenizer,
    /// The prompt and what was generated.
    pub tokens: Vec<u32>,
    n_prompt: usize,
    max_new: usize,
    ignore_eos: bool,
    n_top: Option<usize>,
    /// Its place in the engine, unless it waits or was preempted.
    pub sequence: Option<SequenceId>,
    /// Tokens that it begins with, since the engine has them.
    pub shared: usize,
    /// Tokens that may follow the last one.
    pub draft: Vec<u32>,
    /// Whether it has drafts. One whose logits were not numbers ends them: it may be the draft that
    /// was at fault.
    pub drafts: bool,
    /// How good its drafts are.
    pub acceptance: Acceptance,
    /// Its way through a grammar, if it has one.
    pub guided: Option<Guided>,
    sampler: Sampler,
    stream: TokenStream<'a>,
    stops: StopStrings,
    /// Bytes of all text that was generated, also of what is held back.
    bytes: usize,
    /// Bytes of the text that was given out.
    given: usize,
    held: VecDeque<TokenText>,
}

impl<'a> Live<'a> {
    pub fn new(options: &TextOptions, seed: u64, tokenizer: &'a Tokenizer) -> Self {
        let config = SamplerConfig {
            seed,
            ..options.sampling.clone()
        };
        Self {
            tokenizer,
            n_prompt: options.prompt.len(),
            tokens: options.prompt.clone(),
            max_new: options.max_new,
            ignore_eos: options.ignore_eos,
            n_top: options.n_top,
            sequence: None,
            shared: 0,
            draft: Vec::new(),
            drafts: true,
            acceptance: Acceptance::default(),
            guided: None,
            sampler: Sampler::new(config),
            stream: tokenizer.stream().showing(Arc::clone(&options.shown)),
            stops: StopStrings::new(options.stop.iter().cloned()),
            bytes: 0,
            given: 0,
            held: VecDeque::new(),
        }
    }

    /// Returns the number of generated tokens.
    pub fn n_new(&self) -> usize {
        self.tokens.len() - self.n_prompt
    }

    /// Draws the next token. `scratch` is a buffer.
    ///
    /// # Errors
    /// When it has a grammar by which it cannot go on.
    pub fn draw(&mut self, logits: &[f32], scratch: &mut Vec<f32>) -> Result<Drawn, RunError> {
        scratch.clear();
        scratch.extend_from_slice(logits);
        if let Some(guided) = &mut self.guided {
            guided.restrict(scratch)?;
        }
        let token = self.sampler.sample(scratch, &self.tokens);
        // A grammar lets a text end only where it is whole.
        let ends = self.guided.is_some() || !self.ignore_eos;
        if ends && self.tokenizer.is_eog(token) {
            return Ok(self.end(String::new(), Finish::EndToken));
        }
        if let Some(guided) = &mut self.guided {
            guided.take(token);
        }
        Ok(self.push(token, logits))
    }

    /// Adds a token to the text.
    fn push(&mut self, token: u32, logits: &[f32]) -> Drawn {
        self.tokens.push(token);
        if let Some(n_top) = self.n_top {
            self.held.push_back(TokenText {
                start: self.bytes,
                logprobs: log_probabilities(logits, token, n_top),
            });
        }
        let piece = self.stream.push(token);
        self.bytes += piece.len();
        let mark = self.tokenizer.thought_mark(token).map(|mark| {
            let start = self.bytes.saturating_sub(self.tokenizer.piece(token).len());
            (start..self.bytes, mark)
        });
        let passed = self.stops.push(&piece);
        let drawn = if let Some(stop) = self.stops.found().map(str::to_string) {
            let tokens = self.certain(passed.text.len());
            Drawn {
                text: passed.text,
                tokens,
                n_new: self.n_new(),
                finish: Some(Finish::StopString(stop)),
                ids: self.tokens[self.n_prompt..].to_vec(),
                mark: None,
            }
        } else if self.n_new() >= self.max_new {
            self.end(passed.text, Finish::Length)
        } else {
            let tokens = self.certain(passed.text.len());
            Drawn {
                text: passed.text,
                tokens,
                n_new: self.n_new(),
                ..Drawn::default()
            }
        };
        Drawn { mark, ..drawn }
    }

    /// Ends the text, and gives out what was held back unless a stop string is complete in it.
    fn end(&mut self, mut text: String, finish: Finish) -> Drawn {
        let tail = self.stream.finish();
        self.bytes += tail.len();
        text.push_str(&self.stops.push(&tail).text);
        let stop = self.stops.found().map(str::to_string);
        text.push_str(&self.stops.finish());
        let tokens = match stop {
            Some(_) => self.certain(text.len()),
            None => self.held.drain(..).collect(),
        };
        Drawn {
            text,
            tokens,
            mark: None,
            n_new: self.n_new(),
            finish: Some(stop.map_or(finish, Finish::StopString)),
            ids: self.tokens[self.n_prompt..].to_vec(),
        }
    }

    /// Takes the tokens whose text has begun to come, `bytes` after what came before.
    fn certain(&mut self, bytes: usize) -> Vec<TokenText> {
        self.given += bytes;
        let n = self.held.partition_point(|token| token.start < self.given);
        self.held.drain(..n).collect()
    }
}
