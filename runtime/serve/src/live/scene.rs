//! A snapshot of the engine, and its JSON.

use super::decoding::Decoding;
use crate::state::State;
use crate::utilities::slot;
use serde_json::{Value, json};
use std::time::Duration;
use tier_plan_runtime::batcher::TextStatus;
use tier_plan_runtime::schedule::Pages;

/// Accesses to experts of one layer while decoding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Accesses {
    pub pinned: u64,
    pub slots: u64,
    pub misses: u64,
}

/// An expert that was chosen in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chosen {
    pub expert: usize,
    /// How often, by tokens of prompts and decoded ones.
    pub n: u32,
    /// Number of the tier where it was.
    pub tier: usize,
}

/// A layer with routed experts in a window.
#[derive(Debug, Clone)]
pub(super) struct LayerScene {
    pub layer: usize,
    pub n_expert: usize,
    pub n_used: usize,
    pub accesses: Accesses,
    pub chosen: Vec<Chosen>,
}

/// A tier in a window.
#[derive(Debug, Clone)]
pub(super) struct TierScene {
    pub name: String,
    pub kind: String,
    pub emulated: bool,
    /// Rate that it has by the machine file, in 10⁹ bytes per second; none where that is unknown.
    pub read_gbps: Option<f64>,
    pub capacity_bytes: u64,
    pub budget_bytes: u64,
    pub used_bytes: u64,
    /// Weights that were read for decoded tokens, and on the last tier for prompts.
    pub read_bytes: u64,
}

/// What the engine did in a window, and what waits.
#[derive(Debug, Clone)]
pub(crate) struct Scene {
    /// Counts up, so that a reader sees what it missed.
    pub number: u64,
    /// Name of the plan.
    pub plan: String,
    pub window: Duration,
    pub steps: usize,
    pub prompt_tokens: usize,
    pub decode_tokens: usize,
    pub decoding: Decoding,
    pub tiers: Vec<TierScene>,
    pub layers: Vec<LayerScene>,
    pub pages: Pages,
    pub max_texts: usize,
    pub running: usize,
    pub waiting: usize,
    pub texts: Vec<TextStatus>,
}

impl Scene {
    pub fn json(&self, state: &State) -> Value {
        let seconds = self.window.as_secs_f64().max(1e-9);
        let rate = |n: u64| n as f64 / seconds;
        let hits: u64 = self
            .layers
            .iter()
            .map(|l| l.accesses.pinned + l.accesses.slots)
            .sum();
        let misses: u64 = self.layers.iter().map(|l| l.accesses.misses).sum();
        let all: u64 = self.chosen(|_| true);
        let tiers = self.tiers.iter().enumerate().map(|(i, tier)| {
            let n = self.chosen(|chosen| chosen.tier == i);
            json!({
                "name": tier.name,
                "kind": tier.kind,
                "emulated": tier.emulated,
                "read_gbps": tier.read_gbps.filter(|rate| rate.is_finite()),
                "capacity_bytes": tier.capacity_bytes,
                "budget_bytes": tier.budget_bytes,
                "used_bytes": tier.used_bytes,
                "read_bytes_per_s": rate(tier.read_bytes),
                "accesses": n,
                "hit_rate": (all > 0).then(|| n as f64 / all as f64),
            })
        });
        json!({
            "number": self.number,
            "uptime_s": state.started.elapsed().as_secs_f64(),
            "window_s": seconds,
            "model": state.config.model,
            "plan": self.plan,
            "steps": self.steps,
            "decode_tokens": self.decode_tokens,
            "prompt_tokens": self.prompt_tokens,
            "predicted_tok_s": state.loaded().and_then(|loaded| loaded.promise().decode_tok_s),
            // Of all texts together, and of one of them.
            "decode_tok_s": rate(self.decode_tokens as u64),
            "text_tok_s": self.decoding.text_tok_s(),
            "decode_steps": self.decoding.steps,
            "prompt_tok_s": rate(self.prompt_tokens as u64),
            "expert_hits": hits,
            "expert_misses": misses,
            "tiers": tiers.collect::<Vec<Value>>(),
            "layers": self.layers.iter().map(LayerScene::json).collect::<Vec<Value>>(),
            "pages": { "free": self.pages.free, "total": self.pages.total },
            "queue": {
                "running": self.running,
                "waiting": self.waiting,
                "max_running": self.max_texts,
                "max_waiting": state.config.limits.max_queue,
            },
            "requests": state.metrics.outcomes().json(),
            "texts": self.texts.iter().map(slot).collect::<Vec<Value>>(),
        })
    }

    /// Counts accesses to some of the chosen experts.
    fn chosen(&self, counts: impl Fn(&Chosen) -> bool) -> u64 {
        let all = self.layers.iter().flat_map(|layer| &layer.chosen);
        all.filter(|chosen| counts(chosen))
            .map(|chosen| u64::from(chosen.n))
            .sum()
    }
}

impl LayerScene {
    fn json(&self) -> Value {
        let chosen = self.chosen.iter();
        json!({
            "layer": self.layer,
            "n_expert": self.n_expert,
            "n_used": self.n_used,
            "pinned_hits": self.accesses.pinned,
            "slot_hits": self.accesses.slots,
            "misses": self.accesses.misses,
            "experts": chosen.map(|c| json!([c.expert, c.n, c.tier])).collect::<Vec<Value>>(),
        })
    }
}
