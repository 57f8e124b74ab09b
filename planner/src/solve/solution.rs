//! A finished plan, what to compare it with, and sentences about it.

use crate::profile::replay::ceiling;
use crate::profile::{Evidence, Judged};
use tier_plan_runtime::formats::placement::Placement;

/// A finished plan and what to compare it with.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    /// The plan that was asked for, slot policies and position included.
    pub plan: Placement,
    /// The baselines that fit, at the same budgets.
    pub baselines: Vec<Placement>,
    /// What the reader should know, in sentences.
    pub notes: Vec<String>,
    /// Hit rate that no policy can exceed with as many resident experts. `None` without recorded
    /// tokens.
    pub ceiling_hit_rate: Option<f64>,
    /// What pins and slots are worth, and which tier more bytes would help most, in sentences.
    pub summary: Vec<String>,
}

/// Returns the hit rate that knowing the future would give a plan's resident experts.
pub(super) fn ceiling_hit_rate(plan: &Placement, evidence: &Evidence) -> Option<f64> {
    if evidence.drawn {
        return None;
    }
    let (mut hits, mut accesses) = (0, 0);
    for (layer, evidence) in plan.layers.iter().zip(&evidence.layers) {
        let Judged::Recorded(trace) = &evidence.judged else {
            return None;
        };
        let pinned = layer
            .pinned
            .iter()
            .map(|pins| pins.experts.len())
            .sum::<usize>();
        hits += ceiling(trace, pinned + layer.slots as usize);
        accesses += (trace.tokens() * trace.n_used()) as u64;
    }
    (accesses > 0).then(|| hits as f64 / accesses as f64)
}
