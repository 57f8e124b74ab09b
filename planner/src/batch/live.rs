//! An answer while it is generated.

use super::{Choice, Endpoint, Finish, Request, TokenText};
use crate::chat::thought::Answer;
use tier_plan_runtime::engine::SequenceId;
use tier_plan_runtime::engine::draft::Acceptance;
use tier_plan_runtime::sampler::{Sampler, SamplerConfig, StopStrings, log_probabilities};
use tier_plan_runtime::tokenizer::{TokenStream, Tokenizer};

/// One answer: its tokens so far, and the text that came of them.
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
    /// Tokens that it began with, since the engine had kept them.
    pub shared: usize,
    /// Tokens that may follow the last one.
    pub draft: Vec<u32>,
    /// Whether it has drafts. One whose logits were not numbers ends them: it may be the draft that
    /// was at fault.
    pub drafts: bool,
    /// How good its drafts are.
    pub acceptance: Acceptance,
    sampler: Sampler,
    stream: TokenStream<'a>,
    stops: StopStrings,
    answer: Answer,
    /// Bytes of all text that was generated, also of what is held back.
    bytes: usize,
    token_texts: Option<Vec<TokenText>>,
}

/// What a text is at the moment it begins.
pub(super) struct Beginning<'a, 'd> {
    pub tokenizer: &'a Tokenizer,
    pub prompt: Vec<u32>,
    pub max_new: usize,
    /// Number of the answer among those to the request.
    pub index: usize,
    /// Options for what the request does not say.
    pub defaults: &'d SamplerConfig,
}

impl<'a> Live<'a> {
    pub fn new(request: &Request, beginning: Beginning<'a, '_>) -> Self {
        let Beginning {
            tokenizer,
            prompt,
            max_new,
            index,
            defaults,
        } = beginning;
        let config = SamplerConfig {
            seed: request.seed(defaults.seed).wrapping_add(index as u64),
            ..request.sampling.over(defaults)
        };
        Self {
            tokenizer,
            n_prompt: prompt.len(),
            tokens: prompt,
            max_new,
            ignore_eos: request.ignore_eos,
            n_top: request.logprobs,
            sequence: None,
            shared: 0,
            draft: Vec::new(),
            drafts: true,
            acceptance: Acceptance::default(),
            sampler: Sampler::new(config),
            stream: tokenizer.stream(),
            stops: StopStrings::new(request.stop.iter().cloned()),
            answer: Answer::default(),
            bytes: 0,
            token_texts: request.logprobs.map(|_| Vec::new()),
        }
    }

    /// Returns the number of generated tokens.
    pub fn n_new(&self) -> usize {
        self.tokens.len() - self.n_prompt
    }

    /// Draws the next token. `scratch` is a buffer. Returns why the answer ends, if it does.
    pub fn draw(&mut self, logits: &[f32], scratch: &mut Vec<f32>) -> Option<Finish> {
        scratch.clear();
        scratch.extend_from_slice(logits);
        let token = self.sampler.sample(scratch, &self.tokens);
        if !self.ignore_eos && self.tokenizer.is_eog(token) {
            return Some(Finish::Stop);
        }
        self.tokens.push(token);
        if let (Some(texts), Some(n_top)) = (&mut self.token_texts, self.n_top) {
            texts.push(TokenText {
                start: self.bytes,
                logprobs: log_probabilities(logits, token, n_top),
            });
        }
        let piece = self.stream.push(token);
        self.bytes += piece.len();
        if let Some(mark) = self.tokenizer.thought_mark(token) {
            let start = self.bytes.saturating_sub(self.tokenizer.piece(token).len());
            self.answer.marks.push((start..self.bytes, mark));
        }
        let passed = self.stops.push(&piece);
        self.answer.text.push_str(&passed.text);
        if passed.stopped {
            Some(Finish::Stop)
        } else {
            (self.n_new() >= self.max_new).then_some(Finish::Length)
        }
    }

    /// Returns the finished answer to a request whose prompt is `prompt` as text.
    pub fn finish(mut self, finish: Finish, endpoint: Endpoint, prompt: &str) -> Choice {
        let tail = self.stream.finish();
        let passed = self.stops.push(&tail);
        self.answer.text.push_str(&passed.text);
        self.answer.text.push_str(&self.stops.finish());
        let end = self.answer.text.len();
        if self.stops.is_stopped() {
            self.answer.marks.retain(|(place, _)| place.end <= end);
            if let Some(texts) = &mut self.token_texts {
                texts.retain(|t| t.start < end);
            }
        }
        let n_tokens = self.n_new();
        let (text, thinking) = match endpoint {
            Endpoint::Completions => (self.answer.text, None),
            Endpoint::Chat => {
                let message = self.answer.message(prompt);
                (message.content, message.thinking)
            }
        };
        Choice {
            text,
            thinking,
            finish,
            n_tokens,
            tokens: self.token_texts,
        }
    }
}
