//! Text generation: prompt in, tokens out one at a time, until a limit, an end token or the
//! callback stops it.

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
}

/// Continues `prompt`, and calls `on_token` with each new token as it comes.
///
/// The prompt is added to what is in the engine's context already.
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
/// let limits = Limits { max_tokens: 4, is_end: &|_| false };
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
    let mut logits = match engine.forward(prompt, LogitsMode::Last) {
        Ok(logits) => logits.to_vec(),
        Err(error) => return canceled(done, error),
    };
    while done.tokens.len() < limits.max_tokens {
        let token = sampler.sample(&mut logits, &recent);
        if done.tokens.is_empty() {
            done.first_token = start.elapsed();
        }
        if (limits.is_end)(token) {
            done.stop = Stop::EndToken;
            break;
        }
        done.tokens.push(token);
        recent.push(token);
        if on_token(engine, token).is_break() {
            done.stop = Stop::Caller;
            break;
        }
        if done.tokens.len() == limits.max_tokens {
            break;
        }
        if engine.n_past() >= engine.context() {
            done.stop = Stop::ContextFull;
            break;
        }
        logits.clear();
        match engine.forward(&[token], LogitsMode::Last) {
            Ok(next) => logits.extend_from_slice(next),
            Err(error) => return canceled(done, error),
        }
    }
    Ok(done)
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
