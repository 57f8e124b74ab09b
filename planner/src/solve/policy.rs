//! Slot policies: how each layer's slots are refilled, chosen once pins and slots are settled.
//!
//! Half-lives and weights are learned by replaying the train prompts. There is one set for the
//! plan, since a single layer's prompts are too few to tell neighboring values apart. Every layer
//! then takes the policy with the most hits over all layers, or another that has clearly more in
//! this layer. The outcome is kept only if the held-out prompts agree: the plan as a whole must be
//! faster on them than with LRU.

use super::options::{Policy, Strategy};
use super::problem::Problem;
use super::verify;
use crate::cost::{predict, token_s};
use crate::profile::replay::{LayerTrace, Positions, hits};
use crate::profile::{Evidence, Judged};
use anyhow::{Result, ensure};
use std::collections::HashMap;
use tier_plan_runtime::formats::placement::{LayerPlacement, Placement, SlotPolicy};
use tier_plan_runtime::formats::profile::{Profile, Split};
use tier_plan_runtime::kernels::scoped::spawn_or_run;

/// Half-lives of `lfu` that are tried, in tokens.
const LFU_HALF_LIVES: [u32; 7] = [4, 8, 16, 32, 64, 128, 256];

/// Parameters of `adaptive` that are tried: half-lives of the long memory and of the short one, in
/// tokens, and weights of the short one.
const ADAPTIVE_AXES: [&[u32]; 3] = [
    &[16, 32, 64, 128, 256, 512],
    &[1, 2, 4, 8, 16],
    &[0, 1, 2, 4, 8, 16, 32],
];

/// `lfu` where there is nothing to learn from: the best on the bundled model.
const DEFAULT_LFU: SlotPolicy = SlotPolicy::Lfu { half_life: 16 };

/// `adaptive` where there is nothing to learn from, and where the search begins: the best on the
/// bundled model.
const DEFAULT_ADAPTIVE: SlotPolicy = adaptive([64, 2, 8]);

/// Position of the default in [`ADAPTIVE_AXES`].
const DEFAULT_ADAPTIVE_AT: [usize; 3] = [2, 1, 4];

/// Hits that another policy must have in a layer, as a multiple of those of the plan's policy. A
/// smaller gain on a layer's few prompts is noise, and seldom holds for others.
const MIN_HIT_RATIO: f64 = 1.02;

/// Choices that are replayed per set of parameters, approximately. With more, some of the layers
/// stand for all.
const TARGET_CHOICES: usize = 1_000_000;

const fn adaptive([half_life, recent_half_life, recent_weight]: [u32; 3]) -> SlotPolicy {
    SlotPolicy::Adaptive {
        half_life,
        recent_half_life,
        recent_weight,
    }
}

/// Returns the policy to apply to a finished plan, if any.
///
/// LRU needs none, since columns are priced with it. Baselines keep LRU unless another policy is
/// asked for.
pub fn to_apply(policy: Policy, strategy: Strategy) -> Option<Policy> {
    match policy {
        Policy::Lru => None,
        Policy::Auto if strategy != Strategy::Optimal => None,
        _ => Some(policy),
    }
}

/// A layer with fewer slots than pooled experts: only there does it matter which expert is evicted.
struct ContendedLayer {
    /// Position in the plan.
    at: usize,
    slots: u32,
    /// `[n_expert]`
    pinned: Vec<bool>,
    /// Choices on the prompts to learn from.
    trace: LayerTrace,
}

/// Chooses the policies of a plan's layers and predicts the plan anew.
///
/// Returns a sentence about the outcome, or `None` if there is nothing to choose.
///
/// # Errors
/// Fails if the plan does not pass verification afterwards, which is a bug.
pub fn refill(
    plan: &mut Placement,
    problem: &Problem<'_>,
    evidence: &Evidence,
    policy: Policy,
) -> Result<Option<String>> {
    let contended = contended_layers(plan, problem, evidence);
    let recorded = !evidence.drawn && contended.iter().any(|layer| layer.trace.tokens() > 0);
    if contended.is_empty() || (policy == Policy::Auto && !recorded) {
        return Ok(None);
    }
    let mut refilled = plan.clone();
    for (layer, policy) in contended.iter().zip(choose(&contended, policy, recorded)) {
        refilled.layers[layer.at].policy = policy;
    }
    refilled.predicted = predict(&refilled, problem.shape, evidence);
    let (before, after) = (token_s(&plan.predicted), token_s(&refilled.predicted));
    refilled.solver.objective_s = after;
    let description = describe(plan, &refilled, recorded);
    if policy == Policy::Auto && after >= before {
        return Ok(Some(format!("slots stay with lru: {description}")));
    }
    let wrong = verify::verify(&refilled, problem.shape, evidence);
    ensure!(
        wrong.is_empty(),
        "the plan '{}' did not pass its own check after its policies were chosen, which is a mistake in this \
         program: {}",
        plan.name,
        wrong.join("; ")
    );
    *plan = refilled;
    Ok(Some(format!("slots are refilled by {description}")))
}

/// Returns the policies of the contended layers.
fn choose(contended: &[ContendedLayer], policy: Policy, recorded: bool) -> Vec<SlotPolicy> {
    let n = contended.len();
    let sample = if recorded {
        sample(contended)
    } else {
        Vec::new()
    };
    let lfu = || {
        if recorded {
            best_lfu(&sample)
        } else {
            DEFAULT_LFU
        }
    };
    let adaptive = || {
        if recorded {
            best_adaptive(&sample)
        } else {
            DEFAULT_ADAPTIVE
        }
    };
    match policy {
        Policy::Lru => vec![SlotPolicy::Lru; n],
        Policy::Lfu => vec![lfu(); n],
        Policy::Adaptive => vec![adaptive(); n],
        Policy::Auto => {
            let candidates = [SlotPolicy::Lru, lfu(), adaptive()];
            let layers: Vec<&ContendedLayer> = contended.iter().collect();
            let hits = candidates.map(|candidate| hits_of(&layers, candidate));
            let best_of_plan = first_max(candidates.len(), |c| hits[c].iter().sum());
            let of_layer = |layer: usize| {
                let best = first_max(candidates.len(), |c| hits[c][layer]);
                let needed = hits[best_of_plan][layer] as f64 * MIN_HIT_RATIO;
                candidates[if hits[best][layer] as f64 > needed {
                    best
                } else {
                    best_of_plan
                }]
            };
            (0..n).map(of_layer).collect()
        }
    }
}

/// Returns the first position of the largest value.
fn first_max(n: usize, value: impl Fn(usize) -> u64) -> usize {
    (0..n).fold(
        0,
        |best, at| if value(at) > value(best) { at } else { best },
    )
}

/// Counts layers with slots by policy: `{"adaptive": 40, "lru": 8}`.
pub fn summary(plan: &Placement) -> serde_json::Value {
    let mut layers = serde_json::Map::new();
    for layer in plan.layers.iter().filter(|l| l.slots > 0) {
        let n = layers
            .get(layer.policy.name())
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(0);
        layers.insert(layer.policy.name().to_string(), (n + 1).into());
    }
    layers.into()
}

/// Describes a plan's policies and what they gain over LRU.
fn describe(plan: &Placement, refilled: &Placement, recorded: bool) -> String {
    let mut by_policy: Vec<(SlotPolicy, usize)> = Vec::new();
    for layer in refilled.layers.iter().filter(|l| l.slots > 0) {
        match by_policy
            .iter_mut()
            .find(|(policy, _)| *policy == layer.policy)
        {
            Some((_, n)) => *n += 1,
            None => by_policy.push((layer.policy, 1)),
        }
    }
    by_policy.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let parts: Vec<String> = by_policy
        .iter()
        .map(|(policy, n)| {
            format!(
                "{policy} in {n} {}",
                if *n == 1 { "layer" } else { "layers" }
            )
        })
        .collect();
    let (before, after) = (&plan.predicted, &refilled.predicted);
    let judged = if recorded {
        " on the tokens that plans are judged on"
    } else {
        ", which nothing was recorded to tell"
    };
    format!(
        "{}: predicted hit rate {:.1} % where lru has {:.1} %, {:+.1} % tok/s{judged}",
        parts.join("; "),
        after.hit_rate * 100.0,
        before.hit_rate * 100.0,
        (after.decode_tok_s / before.decode_tok_s - 1.0) * 100.0
    )
}

/// Returns the layers where a policy matters, with the choices to learn from.
fn contended_layers(
    plan: &Placement,
    inputs: &Problem<'_>,
    evidence: &Evidence,
) -> Vec<ContendedLayer> {
    let profile = inputs.profile.filter(|p| p.counted.is_none());
    let mut contended = Vec::new();
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
            _ => LayerTrace::made_up(
                pinned.len(),
                evidence.shape.n_used as usize,
                &[],
                Vec::new(),
            ),
        };
        contended.push(ContendedLayer {
            at,
            slots: layer.slots,
            pinned,
            trace,
        });
    }
    contended
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

/// Returns the split to learn from: train, unless only held-out prompts have decoded tokens.
fn to_learn_from(profile: &Profile) -> Split {
    let train = profile
        .prompts
        .iter()
        .any(|p| p.split == Split::Train && p.decode_tokens > 0);
    if train { Split::Train } else { Split::HeldOut }
}

/// Returns layers evenly from first to last that have about [`TARGET_CHOICES`] choices together.
fn sample(layers: &[ContendedLayer]) -> Vec<&ContendedLayer> {
    let total: usize = layers.iter().map(|layer| layer.trace.choices()).sum();
    layers
        .iter()
        .step_by((total / TARGET_CHOICES).clamp(1, layers.len().max(1)))
        .collect()
}

/// Returns `[layers]` hits of a policy on the choices to learn from, counted on all cores.
fn hits_of(layers: &[&ContendedLayer], policy: SlotPolicy) -> Vec<u64> {
    let count = |layer: &ContendedLayer| match policy {
        SlotPolicy::Lru => {
            let curve = Positions::new(&layer.trace, &layer.pinned).hit_curve(layer.slots as usize);
            curve.last().copied().unwrap_or(0)
        }
        _ => hits(&layer.trace, &layer.pinned, layer.slots, policy),
    };
    let threads = std::thread::available_parallelism()
        .map_or(1, |n| n.get())
        .min(layers.len().max(1));
    let chunk = layers.len().div_ceil(threads).max(1);
    let mut hit_counts = vec![0; layers.len()];
    std::thread::scope(|scope| {
        for (layers, hit_counts) in layers.chunks(chunk).zip(hit_counts.chunks_mut(chunk)) {
            spawn_or_run(scope, move || {
                layers
                    .iter()
                    .zip(hit_counts)
                    .for_each(|(layer, hit_counts)| *hit_counts = count(layer))
            });
        }
    });
    hit_counts
}

/// Returns `lfu` with the half-life that has the most hits.
fn best_lfu(layers: &[&ContendedLayer]) -> SlotPolicy {
    let policies = LFU_HALF_LIVES.map(|half_life| SlotPolicy::Lfu { half_life });
    let hit_counts = policies.map(|policy| hits_of(layers, policy).iter().sum::<u64>());
    policies[first_max(policies.len(), |at| hit_counts[at])]
}

/// Returns `adaptive` with parameters from which no step along one axis brings more hits.
///
/// The coordinate search begins with the default.
fn best_adaptive(layers: &[&ContendedLayer]) -> SlotPolicy {
    let mut known: HashMap<[usize; 3], u64> = HashMap::new();
    let values = |at: [usize; 3]| {
        [
            ADAPTIVE_AXES[0][at[0]],
            ADAPTIVE_AXES[1][at[1]],
            ADAPTIVE_AXES[2][at[2]],
        ]
    };
    let mut value = |at: [usize; 3]| {
        *known
            .entry(at)
            .or_insert_with(|| hits_of(layers, adaptive(values(at))).iter().sum::<u64>())
    };
    let mut best: [usize; 3] = DEFAULT_ADAPTIVE_AT;
    loop {
        let before = best;
        for axis in 0..ADAPTIVE_AXES.len() {
            for to in [best[axis].checked_sub(1), Some(best[axis] + 1)]
                .into_iter()
                .flatten()
            {
                let mut at = best;
                at[axis] = to;
                if to < ADAPTIVE_AXES[axis].len() && value(at) > value(best) {
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
