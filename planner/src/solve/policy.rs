//! How slots are refilled: the policy of each layer, chosen when pins and slots are settled.
//!
//! Half-lives and weights are learned by replaying the train prompts: one set for the plan, since a single layer's prompts
//! are too few to tell neighbours apart. Then every layer takes the policy with the most hits over all of them, or another
//! that has clearly more in this layer. What comes out is kept only if the held-out prompts agree: the plan as a whole
//! must be faster on them than with LRU.

use super::{Inputs, check};
use crate::cli::{Policy, Strategy};
use crate::cost::{predict, token_s};
use crate::profile::{Evidence, Judged};
use crate::replay::{LayerTrace, Positions, hits};
use anyhow::{Result, ensure};
use std::collections::HashMap;
use tier_plan_runtime::formats::placement::{LayerPlacement, Placement, SlotPolicy};
use tier_plan_runtime::formats::profile::{Profile, Split};

/// Half-lives of `lfu` that are tried, in tokens.
const LFU: [u32; 7] = [4, 8, 16, 32, 64, 128, 256];

/// Half-lives of the long memory of `adaptive`, half-lives of the short one, and weights that are tried.
const ADAPTIVE: [&[u32]; 3] = [&[16, 32, 64, 128, 256, 512], &[1, 2, 4, 8, 16], &[0, 1, 2, 4, 8, 16, 32]];

/// Where trying begins, and what is taken where there is nothing to learn from: the best on the bundled model.
const DEFAULTS: (SlotPolicy, SlotPolicy) = (SlotPolicy::Lfu { half_life: 16 }, adaptive([64, 2, 8]));

/// How many times the hits of the plan's best policy another must have in a layer: less is noise, and what a layer's few
/// prompts suggest then holds less often for others.
const CLEARLY: f64 = 1.02;

/// Choices that are replayed for one set of parameters, about. With more, some of the layers speak for all.
const CHOICES: usize = 1_000_000;

const fn adaptive([half_life, recent_half_life, recent_weight]: [u32; 3]) -> SlotPolicy {
    SlotPolicy::Adaptive { half_life, recent_half_life, recent_weight }
}

/// What is to be done about a plan's policies: nothing where LRU is wanted, or where the plan is to be a rule of thumb's
/// and nobody asked for a policy.
pub fn wanted(policy: Policy, strategy: Strategy) -> Option<Policy> {
    match policy {
        Policy::Lru => None,
        Policy::Auto if strategy != Strategy::Optimal => None,
        _ => Some(policy),
    }
}

/// A layer whose slots are fewer than its pooled experts: only there does it matter who leaves.
struct Busy {
    /// Position in the plan.
    at: usize,
    slots: u32,
    /// `[n_expert]`.
    pinned: Vec<bool>,
    /// Its choices on the prompts to learn from.
    trace: LayerTrace,
}

/// Chooses the policies of a plan's layers, predicts it anew, and says what came of it in a sentence; nothing if there is
/// nothing to choose.
///
/// # Errors
/// When the plan does not pass its check afterwards, which is a mistake in this program.
pub fn refill(
    plan: &mut Placement,
    inputs: &Inputs<'_>,
    evidence: &Evidence,
    policy: Policy,
) -> Result<Option<String>> {
    let busy = busy(plan, inputs, evidence);
    let recorded = !evidence.drawn && busy.iter().any(|layer| layer.trace.tokens() > 0);
    let mut refilled = plan.clone();
    if busy.is_empty() || (policy == Policy::Auto && !recorded) {
        return Ok(None);
    }
    let sample = if recorded { some(&busy) } else { Vec::new() };
    let lfu = || if recorded { best_lfu(&sample) } else { DEFAULTS.0 };
    let adaptive = || if recorded { best_adaptive(&sample) } else { DEFAULTS.1 };
    let chosen: Vec<SlotPolicy> = match policy {
        Policy::Lru => vec![SlotPolicy::Lru; busy.len()],
        Policy::Lfu => vec![lfu(); busy.len()],
        Policy::Adaptive => vec![adaptive(); busy.len()],
        Policy::Auto => {
            let candidates = [SlotPolicy::Lru, lfu(), adaptive()];
            let all: Vec<&Busy> = busy.iter().collect();
            let found: Vec<Vec<u64>> = candidates.iter().map(|&candidate| hits_of(&all, candidate)).collect();
            let most = |hits: &dyn Fn(usize) -> u64| {
                (0..candidates.len()).fold(0, |best, at| if hits(at) > hits(best) { at } else { best })
            };
            let of_plan = most(&|at| found[at].iter().sum());
            let of_layer = |layer: usize| {
                let best = most(&|at| found[at][layer]);
                let clearly = found[best][layer] as f64 > found[of_plan][layer] as f64 * CLEARLY;
                candidates[if clearly { best } else { of_plan }]
            };
            (0..busy.len()).map(of_layer).collect()
        }
    };
    for (layer, policy) in busy.iter().zip(chosen) {
        refilled.layers[layer.at].policy = policy;
    }
    refilled.predicted = predict(&refilled, inputs.shape, evidence);
    let (before, after) = (token_s(&plan.predicted), token_s(&refilled.predicted));
    refilled.solver.objective_s = after;
    let words = words(plan, &refilled, recorded);
    if policy == Policy::Auto && after >= before {
        return Ok(Some(format!("slots stay with lru: {words}")));
    }
    let wrong = check::check(&refilled, inputs.shape, evidence);
    ensure!(
        wrong.is_empty(),
        "the plan '{}' did not pass its own check after its policies were chosen, which is a mistake in this program: {}",
        plan.name,
        wrong.join("; ")
    );
    *plan = refilled;
    Ok(Some(format!("slots are refilled by {words}")))
}

/// Layers by policy, for tables: `{"adaptive": 40, "lru": 8}`; only layers that have slots.
pub fn summary(plan: &Placement) -> serde_json::Value {
    let mut layers = serde_json::Map::new();
    for layer in plan.layers.iter().filter(|l| l.slots > 0) {
        let n = layers.get(layer.policy.name()).and_then(serde_json::Value::as_u64).unwrap_or(0);
        layers.insert(layer.policy.name().to_string(), (n + 1).into());
    }
    layers.into()
}

/// What a plan's policies are and what they do beside LRU, in words.
fn words(plan: &Placement, refilled: &Placement, recorded: bool) -> String {
    let mut by_policy: Vec<(SlotPolicy, usize)> = Vec::new();
    for layer in refilled.layers.iter().filter(|l| l.slots > 0) {
        match by_policy.iter_mut().find(|(policy, _)| *policy == layer.policy) {
            Some((_, n)) => *n += 1,
            None => by_policy.push((layer.policy, 1)),
        }
    }
    by_policy.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let parts: Vec<String> = by_policy
        .iter()
        .map(|(policy, n)| format!("{policy} in {n} {}", if *n == 1 { "layer" } else { "layers" }))
        .collect();
    let (before, after) = (&plan.predicted, &refilled.predicted);
    let judged =
        if recorded { " on the tokens that plans are judged on" } else { ", which nothing was recorded to tell" };
    format!(
        "{}: predicted hit rate {:.1} % where lru has {:.1} %, {:+.1} % tok/s{judged}",
        parts.join("; "),
        after.hit_rate * 100.0,
        before.hit_rate * 100.0,
        (after.decode_tok_s / before.decode_tok_s - 1.0) * 100.0
    )
}

/// The layers where a policy matters, with what there is to learn from.
fn busy(plan: &Placement, inputs: &Inputs<'_>, evidence: &Evidence) -> Vec<Busy> {
    let profile = inputs.profile.filter(|p| p.counted.is_none());
    let mut busy = Vec::new();
    for (at, (layer, evidence)) in plan.layers.iter().zip(&evidence.layers).enumerate() {
        let pinned = pinned(layer, evidence.shape.n_expert as usize);
        let pooled = pinned.iter().filter(|p| !**p).count();
        if layer.slots == 0 || layer.slots as usize >= pooled {
            continue;
        }
        let trace = match (profile, &evidence.judged) {
            (Some(profile), Judged::Recorded(_)) => {
                let split = to_learn_from(profile);
                LayerTrace::new(profile, at, |p| p.split == split)
            }
            _ => LayerTrace::made_up(pinned.len(), evidence.shape.n_used as usize, &[], Vec::new()),
        };
        busy.push(Busy { at, slots: layer.slots, pinned, trace });
    }
    busy
}

fn pinned(layer: &LayerPlacement, n_expert: usize) -> Vec<bool> {
    let mut pinned = vec![false; n_expert];
    for &expert in layer.pinned.iter().flat_map(|pins| &pins.experts) {
        if let Some(pinned) = pinned.get_mut(expert as usize) {
            *pinned = true;
        }
    }
    pinned
}

/// The train split, unless only the other has decoded tokens.
fn to_learn_from(profile: &Profile) -> Split {
    let train = profile.prompts.iter().any(|p| p.split == Split::Train && p.decode_tokens > 0);
    if train { Split::Train } else { Split::HeldOut }
}

/// Layers evenly from first to last, so many that they have about [`CHOICES`] choices.
fn some(busy: &[Busy]) -> Vec<&Busy> {
    let all: usize = busy.iter().map(|layer| layer.trace.choices()).sum();
    busy.iter().step_by((all / CHOICES).clamp(1, busy.len().max(1))).collect()
}

/// `[layers]` hits of a policy on what there is to learn from, counted on all cores.
fn hits_of(busy: &[&Busy], policy: SlotPolicy) -> Vec<u64> {
    let count = |layer: &Busy| match policy {
        SlotPolicy::Lru => {
            let curve = Positions::new(&layer.trace, &layer.pinned).hit_curve(layer.slots as usize);
            curve.last().copied().unwrap_or(0)
        }
        _ => hits(&layer.trace, &layer.pinned, layer.slots, policy),
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(busy.len().max(1));
    let chunk = busy.len().div_ceil(threads).max(1);
    let mut found = vec![0; busy.len()];
    std::thread::scope(|scope| {
        for (layers, found) in busy.chunks(chunk).zip(found.chunks_mut(chunk)) {
            scope.spawn(move || layers.iter().zip(found).for_each(|(layer, found)| *found = count(layer)));
        }
    });
    found
}

/// The half-life with the most hits.
fn best_lfu(busy: &[&Busy]) -> SlotPolicy {
    let policies = LFU.map(|half_life| SlotPolicy::Lfu { half_life });
    let found = policies.map(|policy| hits_of(busy, policy).iter().sum::<u64>());
    let best = (0..policies.len()).fold(0, |best, at| if found[at] > found[best] { at } else { best });
    policies[best]
}

/// Parameters from which no step along one axis brings more hits, beginning with the defaults.
fn best_adaptive(busy: &[&Busy]) -> SlotPolicy {
    let mut known: HashMap<[usize; 3], u64> = HashMap::new();
    let values = |at: [usize; 3]| [ADAPTIVE[0][at[0]], ADAPTIVE[1][at[1]], ADAPTIVE[2][at[2]]];
    let mut value =
        |at: [usize; 3]| *known.entry(at).or_insert_with(|| hits_of(busy, adaptive(values(at))).iter().sum::<u64>());
    // The defaults by position.
    let mut best: [usize; 3] = [2, 1, 4];
    loop {
        let before = best;
        for axis in 0..ADAPTIVE.len() {
            for to in [best[axis].checked_sub(1), Some(best[axis] + 1)].into_iter().flatten() {
                let mut at = best;
                at[axis] = to;
                if to < ADAPTIVE[axis].len() && value(at) > value(best) {
                    best = at;
                }
            }
        }
        if best == before {
            return adaptive(values(best));
        }
    }
}

#[cfg(test)]
mod tests;
