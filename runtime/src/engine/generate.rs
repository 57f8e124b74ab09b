//! Text generation: prompt in, tokens out one at a time, until a limit, an end token or the caller says stop.

use crate::engine::{Engine, LogitsMode};
use crate::error::RunError;
use crate::sampler::Sampler;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The asked number of tokens is there.
    Limit,
    /// The model ended its text.
    EndToken,
    /// No room in the context.
    ContextFull,
    /// The caller said so.
    Caller,
}

/// What a generation did.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The tokens, without an end token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
    /// Time from the call to the first token.
    pub first_token: Duration,
}

/// Limits of a generation.
pub struct Limits<'a> {
    /// Tokens at most.
    pub max_tokens: usize,
    /// Whether a token ends the text.
    pub is_end: &'a dyn Fn(u32) -> bool,
}

/// Continues `prompt`, calling `on_token` with each new token as it comes.
///
/// The prompt is added to what is in the engine's context already.
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
    let mut logits = engine.forward(prompt, LogitsMode::Last)?.to_vec();
    let mut done = Generated { tokens: Vec::new(), stop: Stop::Limit, first_token: Duration::ZERO };
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
        logits.extend_from_slice(engine.forward(&[token], LogitsMode::Last)?);
    }
    Ok(done)
}
