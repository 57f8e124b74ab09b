//! What a request took, beside what was predicted.

use serde_json::{Map, Value, json};
use std::time::{Duration, Instant};
use tier_plan_runtime::Engine;
use tier_plan_runtime::experts::counters::Counters;

/// Counts of the engine at a moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Snapshot {
    decode_tokens: u64,
    pinned_hits: u64,
    slot_hits: u64,
    misses: u64,
    missed_bytes: u64,
    /// Bytes that prompts read from the last tier.
    prompt_bytes: u64,
    /// Bytes read while decoding, by tier.
    read_bytes: Vec<u64>,
}

impl Snapshot {
    pub fn of(counters: &Counters) -> Self {
        let sum = |of: fn(&tier_plan_runtime::experts::counters::LayerCounters) -> u64| {
            counters.layers.iter().map(of).sum()
        };
        Self {
            decode_tokens: counters.decode_tokens,
            pinned_hits: sum(|layer| layer.pinned_hits),
            slot_hits: sum(|layer| layer.slot_hits),
            misses: sum(|layer| layer.misses),
            missed_bytes: sum(|layer| layer.missed_bytes),
            prompt_bytes: counters.prompt_missed_bytes,
            read_bytes: counters.read_bytes.iter().copied().collect(),
        }
    }

    /// Returns what was counted since an earlier moment.
    pub fn since(&self, earlier: &Self) -> Self {
        let bytes = self.read_bytes.iter().enumerate();
        let before = |tier: usize| earlier.read_bytes.get(tier).copied().unwrap_or(0);
        Self {
            decode_tokens: self.decode_tokens.saturating_sub(earlier.decode_tokens),
            pinned_hits: self.pinned_hits.saturating_sub(earlier.pinned_hits),
            slot_hits: self.slot_hits.saturating_sub(earlier.slot_hits),
            misses: self.misses.saturating_sub(earlier.misses),
            missed_bytes: self.missed_bytes.saturating_sub(earlier.missed_bytes),
            prompt_bytes: self.prompt_bytes.saturating_sub(earlier.prompt_bytes),
            read_bytes: bytes
                .map(|(tier, n)| n.saturating_sub(before(tier)))
                .collect(),
        }
    }

    pub fn hits(&self) -> u64 {
        self.pinned_hits + self.slot_hits
    }

    pub fn misses(&self) -> u64 {
        self.misses
    }

    pub fn prompt_bytes(&self) -> u64 {
        self.prompt_bytes
    }

    pub fn read_bytes(&self) -> &[u64] {
        &self.read_bytes
    }
}

/// What the plan says of itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Promise {
    /// Names of the tiers.
    pub tiers: Vec<String>,
    /// Predicted tokens per second of a text alone, if the plan predicts.
    pub decode_tok_s: Option<f64>,
    /// Whether a tier is emulated, so that measured speeds are not those of a machine.
    pub emulated: bool,
}

impl Promise {
    pub fn of(engine: &Engine) -> Self {
        let plan = engine.plan();
        let predicted = plan.predicted.decode_tok_s;
        Self {
            tiers: plan.tiers.iter().map(|t| t.tier.name.clone()).collect(),
            decode_tok_s: (predicted > 0.0 && predicted.is_finite()).then_some(predicted),
            emulated: plan.tiers.iter().any(|t| t.tier.emulated),
        }
    }
}

/// When a text was received, admitted, and so on.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    pub received: Instant,
    pub begun: Option<Instant>,
    pub first: Option<Instant>,
    /// The engine's counts when its first token was drawn.
    pub before: Snapshot,
}

/// Times of a text that has ended.
#[derive(Debug, Clone, Default)]
pub(crate) struct Timings {
    pub queue: Duration,
    /// From admission to the first token.
    pub prompt: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// What the engine counted between the two, for all texts at work.
    pub window: Snapshot,
}

impl Clock {
    /// Returns the times of a text that ends now.
    pub fn end(&self, now: Instant, counters: &Counters) -> Timings {
        let begun = self.begun.unwrap_or(now);
        let first = self.first.unwrap_or(now);
        Timings {
            queue: begun.saturating_duration_since(self.received),
            prompt: first.saturating_duration_since(begun),
            decode: now.saturating_duration_since(first),
            window: Snapshot::of(counters).since(&self.before),
        }
    }
}

/// Tokens of a text.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub prompt: usize,
    /// Tokens of the prompt that were not computed.
    pub cached: usize,
    pub new: usize,
    /// Those of them that are thought.
    pub thinking: usize,
}

/// Returns tokens per second.
fn rate(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64().max(1e-9)
}

impl Timings {
    /// Returns the measured speed: tokens after the first per second since it.
    pub fn decode_tok_s(&self, new: usize) -> Option<f64> {
        (new > 1).then(|| rate(new - 1, self.decode))
    }

    /// Returns the times under the names that llama.cpp has for them.
    pub fn json(&self, counts: Counts) -> Value {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let computed = counts.prompt.saturating_sub(counts.cached);
        let decoded = counts.new.saturating_sub(1);
        json!({
            "queue_ms": ms(self.queue),
            "cache_n": counts.cached,
            "prompt_n": computed,
            "prompt_ms": ms(self.prompt),
            "prompt_per_token_ms": ms(self.prompt) / computed.max(1) as f64,
            "prompt_per_second": rate(computed, self.prompt),
            "predicted_n": counts.new,
            "predicted_ms": ms(self.decode),
            "predicted_per_token_ms": ms(self.decode) / decoded.max(1) as f64,
            "predicted_per_second": rate(decoded, self.decode),
        })
    }

    /// Returns the speed beside the prediction, and where experts came from meanwhile.
    pub fn truth(&self, counts: Counts, promise: &Promise) -> Value {
        let window = &self.window;
        let accesses = window.hits() + window.misses;
        let share = |n: u64| (accesses > 0).then(|| n as f64 / accesses as f64);
        let tiers: Map<String, Value> = promise
            .tiers
            .iter()
            .zip(&window.read_bytes)
            .map(|(name, bytes)| (name.clone(), (*bytes).into()))
            .collect();
        json!({
            "predicted_tok_s": promise.decode_tok_s,
            "measured_tok_s": self.decode_tok_s(counts.new),
            "emulated": promise.emulated,
            // Of all texts that were decoded at the same time.
            "window": {
                "decode_tokens": window.decode_tokens,
                "expert_hits": window.hits(),
                "expert_misses": window.misses,
                "hit_rate": share(window.hits()),
                "missed_bytes": window.missed_bytes,
                "read_bytes": tiers,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_their_names_and_no_infinity() {
        let counts = Counts {
            prompt: 10,
            cached: 4,
            new: 1,
            thinking: 0,
        };
        let timings = Timings {
            prompt: Duration::from_millis(60),
            ..Timings::default()
        };
        let value = timings.json(counts);
        assert_eq!(
            (&value["prompt_n"], &value["cache_n"]),
            (&json!(6), &json!(4))
        );
        assert!((value["prompt_per_second"].as_f64().unwrap() - 100.0).abs() < 1e-6);
        assert_eq!(value["predicted_per_second"], 0.0);
        let truth = timings.truth(counts, &Promise::default());
        assert_eq!(truth["measured_tok_s"], Value::Null);
        assert_eq!(truth["window"]["hit_rate"], Value::Null);
    }

    #[test]
    fn a_window_is_a_difference() {
        let at = |n: u64| Snapshot {
            decode_tokens: n,
            slot_hits: 2 * n,
            misses: n,
            read_bytes: vec![10 * n],
            ..Snapshot::default()
        };
        let window = at(7).since(&at(3));
        assert_eq!(
            (window.decode_tokens, window.hits(), window.misses()),
            (4, 8, 4)
        );
        assert_eq!(window.read_bytes(), [40]);
        assert_eq!(at(7).since(&Snapshot::default()).read_bytes(), [70]);
    }
}
