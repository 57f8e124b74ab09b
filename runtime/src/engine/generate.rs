//! Text generation: prompt in, tokens out one at a time, until a limit, an end token or the
//! callback stops it.

use super::draft::{self, MAX_DRAFT, Payoff};
use crate::engine::{Engine, LogitsMode};
use crate::error::RunError;
use crate::sampler::Sampler;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// The reason why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The requested number of tokens is reached.
    Limit,
    /// The model ended its text.
    EndToken,
    /// The context has no room for another token.
    ContextFull,
    /// The callback returned [`ControlFlow::Break`].
    Caller,
    /// The caller canceled a pass. The tokens so far are good; those of a canceled prompt are not
    /// in the context.
    Canceled,
}

/// A finished generation.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The tokens, without an end token.
    pub tokens: Vec<u32>,
    /// Why generation ended.
    pub stop: Stop,
    /// Time from the call to the first token.
    pub first_token: Duration,
}

/// Limits of a generation.
pub struct Limits<'a> {
    /// Number of tokens to generate at most.
    pub max_tokens: usize,
    /// Returns whether a token ends the text.
    pub is_end: &'a dyn Fn(u32) -> bool,
    /// Tokens that are drafted at a time at most: what followed the last tokens earlier in the text
    /// is checked together with the next one. The text is the same; 0 for no drafts. A model with
    /// recurrent states, or on a GPU, drafts none.
    pub draft: usize,
}

/// Continues `prompt`, and calls `on_token` with each new token as it comes.
///
/// The prompt is added to what is in the engine's context already. Into an empty context, what is
/// [kept](Engine::keep) of the prompt's beginning is taken instead of computed.
///
/// ```
/// # use tier_plan_runtime::{Engine, KvType, LoadOptions, model::Model, plans::in_memory::all_in_memory};
/// use std::ops::ControlFlow;
/// use tier_plan_runtime::engine::generate::{Limits, Stop, generate};
/// use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
///
/// # let model = Model::open("../profiles/demo/demo.gguf".as_ref())?;
/// # let plan = all_in_memory(model.shape(), 32, KvType::F16);
/// # let mut engine = Engine::load(model.gguf().clone(), &plan, &LoadOptions::default(), &mut |_, _| ())?;
/// let mut sampler = Sampler::new(SamplerConfig { temperature: 0.8, seed: 7, ..SamplerConfig::default() });
/// let limits = Limits { max_tokens: 4, is_end: &|_| false, draft: 0 };
/// let mut seen = Vec::new();
/// let generated = generate(&mut engine, &[5, 6, 7], &mut sampler, &limits, |_, token| {
///     seen.push(token);
///     ControlFlow::Continue(())
/// })?;
/// assert_eq!(generated.tokens, seen);
/// assert_eq!(generated.stop, Stop::Limit);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// When the prompt is empty or does not fit the context, or a pass fails.
pub fn generate(
    engine: &mut Engine,
    prompt: &[u32],
    sampler: &mut Sampler,
    limits: &Limits<'_>,
    mut on_token: impl FnMut(&Engine, u32) -> ControlFlow<()>,
) -> Result<Generated, RunError> {
    let start = Instant::now();
    let mut recent = prompt.to_vec();
    let mut done = Generated {
        tokens: Vec::new(),
        stop: Stop::Limit,
        first_token: Duration::ZERO,
    };
    let kept = engine.begin(prompt)?;
    let mut logits = match engine.forward(&prompt[kept..], LogitsMode::Last) {
        Ok(logits) => logits.to_vec(),
        Err(error) => return canceled(done, error),
    };
    let mut ahead = Ahead::new(engine, limits.draft);
    let result = loop {
        if done.tokens.len() >= limits.max_tokens {
            break Ok(());
        }
        let token = sampler.sample(&mut logits, &recent);
        if done.tokens.is_empty() {
            done.first_token = start.elapsed();
        }
        if (limits.is_end)(token) {
            done.stop = Stop::EndToken;
            break Ok(());
        }
        done.tokens.push(token);
        recent.push(token);
        if on_token(engine, token).is_break() {
            done.stop = Stop::Caller;
            break Ok(());
        }
        let left = limits.max_tokens - done.tokens.len();
        if left == 0 {
            break Ok(());
        }
        if ahead.n_text >= engine.context() {
            done.stop = Stop::ContextFull;
            break Ok(());
        }
        if let Err(error) = ahead.next(engine, &recent, left, &mut logits) {
            break Err(error);
        }
    };
    ahead.end(engine)?;
    match result {
        Ok(()) => Ok(done),
        Err(error) => canceled(done, error),
    }
}

/// What the engine has of a text beyond its tokens: a draft, of which the first are right.
struct Ahead {
    payoff: Payoff,
    /// Tokens per draft at most.
    most: usize,
    draft: Vec<u32>,
    /// `[1 + draft, n_vocab]`.
    logits: Vec<f32>,
    /// Tokens of the draft that were right so far.
    right: usize,
    /// Time of the step with the draft.
    time: Duration,
    /// Tokens of the text in the engine's context.
    n_text: usize,
}

impl Ahead {
    fn new(engine: &Engine, most: usize) -> Self {
        Self {
            payoff: Payoff::default(),
            most: if engine.repeats() {
                most.min(MAX_DRAFT)
            } else {
                0
            },
            draft: Vec::new(),
            logits: Vec::new(),
            right: 0,
            time: Duration::ZERO,
            n_text: engine.n_past(),
        }
    }

    /// Takes the last token of `text` through the network, perhaps with a draft of up to `left`
    /// tokens, or finds it in the last draft. Writes the logits after it.
    fn next(
        &mut self,
        engine: &mut Engine,
        text: &[u32],
        left: usize,
        logits: &mut Vec<f32>,
    ) -> Result<(), RunError> {
        let n_vocab = engine.spec().n_vocab;
        let token = text[text.len() - 1];
        if self.draft.get(self.right) == Some(&token) {
            self.right += 1;
        } else {
            self.end(engine)?;
            let room = engine.context() - self.n_text - 1;
            let found = draft::look_up(text, self.most.min(left - 1).min(room));
            self.draft.clear();
            self.draft.push(token);
            self.draft.extend(&found[..self.payoff.best(found.len())]);
            let start = Instant::now();
            let mode = LogitsMode::All;
            let rows = engine.decode(&self.draft, mode);
            self.time = start.elapsed();
            if rows.is_err() {
                self.draft.clear();
            }
            self.logits.clear();
            self.logits.extend_from_slice(rows?);
            self.draft.remove(0);
        }
        self.n_text += 1;
        logits.clear();
        logits.extend_from_slice(&self.logits[self.right * n_vocab..][..n_vocab]);
        Ok(())
    }

    /// Has the engine forget the rest of the draft, and counts it.
    fn end(&mut self, engine: &mut Engine) -> Result<(), RunError> {
        if !self.time.is_zero() {
            self.payoff.count(self.draft.len(), self.right, self.time);
        }
        let wrong = self.draft.len() - self.right;
        self.time = Duration::ZERO;
        self.draft.clear();
        self.right = 0;
        if wrong > 0 {
            engine.take_back(wrong)?;
        }
        Ok(())
    }
}

/// Returns what was generated before a pass was canceled, and any other error as it is.
fn canceled(done: Generated, error: RunError) -> Result<Generated, RunError> {
    match error {
        RunError::Canceled => Ok(Generated {
            stop: Stop::Canceled,
            ..done
        }),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::LoadOptions;
    use crate::plans::in_memory::all_in_memory;
    use crate::sampler::SamplerConfig;
    use tier_plan_formats::model::Model;
    use tier_plan_formats::model::kv::KvType;

    /// An engine with the bundled model.
    fn demo(context: u32) -> Engine {
        let model = Model::open(&tier_plan_testing::demo_model()).unwrap();
        let plan = all_in_memory(model.shape(), context, KvType::F16);
        let options = LoadOptions::default();
        Engine::load(model.gguf().clone(), &plan, &options, &mut |_, _| ()).unwrap()
    }

    /// Texts of a model that repeats itself, with and without drafts.
    #[test]
    fn drafts_change_no_token() {
        let mut engine = demo(200);
        // A prompt that says the same again and again.
        let prompt: Vec<u32> = (0..60).map(|i| 300 + i % 12 * 7).collect();
        for (temperature, max_tokens) in [(0.0, 100), (0.0, 7), (0.8, 100), (0.3, 500)] {
            let mut texts = Vec::new();
            for draft in [0, 1, MAX_DRAFT] {
                engine.clear();
                engine.reset_counters();
                let config = SamplerConfig {
                    temperature,
                    seed: 5,
                    ..SamplerConfig::default()
                };
                let limits = Limits {
                    max_tokens,
                    is_end: &|_| false,
                    draft,
                };
                let mut sampler = Sampler::new(config);
                let go_on = |_: &Engine, _| ControlFlow::Continue(());
                let done = generate(&mut engine, &prompt, &mut sampler, &limits, go_on).unwrap();
                let decoded = engine.counters().decode_tokens;
                assert_eq!(decoded as usize, engine.n_past() - prompt.len());
                // The context goes on as it would have.
                let next = engine.forward(&[5], LogitsMode::Last);
                let next = next.map(<[f32]>::to_vec).map_err(|error| error.to_string());
                texts.push((done.tokens, done.stop, engine.n_past(), next));
            }
            assert!(
                texts.iter().all(|text| *text == texts[0]),
                "{temperature} {max_tokens}"
            );
        }
    }
}
