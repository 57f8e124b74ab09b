//! Log-probabilities of tokens, as the model gives them.

use super::{Candidate, by_logit, clean};

/// A token with the natural logarithm of its probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogProbability {
    /// The token.
    pub token: u32,
    /// At most 0; negative infinity for a token that is impossible.
    pub value: f32,
}

/// The log-probabilities at one position of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogProbabilities {
    /// That of the token in the text.
    pub chosen: LogProbability,
    /// Those of the most likely tokens, most likely first.
    pub top: Vec<LogProbability>,
}

/// Returns the log-probabilities of `chosen` and of the `n_top` most likely tokens.
///
/// `logits`, `[n_vocab]`, are those of the model, before any bias, penalty, or temperature. The sum
/// runs in the order of ids, so equal logits give equal bits. A token past the vocabulary is
/// impossible.
///
/// ```
/// use tier_plan_runtime::sampler::log_probabilities;
///
/// let found = log_probabilities(&[0.0, 0.0, f32::NEG_INFINITY], 0, 1);
/// assert!((found.chosen.value - 0.5f32.ln()).abs() < 1e-6);
/// assert_eq!((found.top.len(), found.top[0].token), (1, 0));
/// ```
pub fn log_probabilities(logits: &[f32], chosen: u32, n_top: usize) -> TokenLogProbabilities {
    let highest = logits
        .iter()
        .map(|l| clean(*l))
        .fold(f32::NEG_INFINITY, f32::max);
    let above = |logit: f32| f64::from(clean(logit)) - f64::from(highest);
    let log_sum = if highest == f32::NEG_INFINITY {
        0.0
    } else {
        logits.iter().map(|l| above(*l).exp()).sum::<f64>().ln()
    };
    let of = |logit: f32| {
        if clean(logit) == f32::NEG_INFINITY {
            f32::NEG_INFINITY
        } else {
            (above(logit) - log_sum) as f32
        }
    };
    let logit = logits
        .get(chosen as usize)
        .copied()
        .unwrap_or(f32::NEG_INFINITY);
    let named = |c: &Candidate| LogProbability {
        token: c.id,
        value: of(c.logit),
    };
    TokenLogProbabilities {
        chosen: LogProbability {
            token: chosen,
            value: of(logit),
        },
        top: most_likely(logits, n_top).iter().map(named).collect(),
    }
}

/// Returns the `n` highest logits, highest first and of equals the lowest id first.
fn most_likely(logits: &[f32], n: usize) -> Vec<Candidate> {
    let mut top: Vec<Candidate> = Vec::with_capacity(n.min(logits.len()) + 1);
    if n == 0 {
        return top;
    }
    for (id, logit) in (0u32..).zip(logits) {
        let logit = clean(*logit);
        // Equal logits come later in the order of ids, so they never displace.
        if top.len() == n && top.last().is_some_and(|last| logit <= last.logit) {
            continue;
        }
        let new = Candidate { id, logit };
        let at = top.partition_point(|held| by_logit(held, &new).is_lt());
        top.insert(at, new);
        top.truncate(n);
    }
    top
}
