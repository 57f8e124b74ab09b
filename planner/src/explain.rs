//! Explains a plan: what each layer does in a token's time, its bottleneck, and what more of a tier
//! is worth.
//!
//! A plan is the cheapest choice at certain shadow prices of the tiers' bytes: every layer takes
//! what saves more time than its bytes cost. So the prices, beside the use of the experts on either
//! side of each border, are the reason for where things are.

use crate::cost::{ExpertStage, FixedTimes, outcomes, stage_mean_s};
use crate::printable::printable;
use crate::profile::{Evidence, LayerEvidence};
use crate::solve::{Problem, shadow_prices};
use anyhow::{Result, ensure};
use tier_plan_runtime::formats::machine::{Extras, Machine, Tier};
use tier_plan_runtime::formats::placement::{
    LayerPlacement, PerTier, Pins, Placement, SlotPolicy, TierIdx,
};
use tier_plan_runtime::model::shape::ModelShape;

/// One layer's experts under a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerReason {
    /// Number of the layer.
    pub layer: u32,
    /// Whether the token alone chooses the experts.
    pub by_token: bool,
    /// Bytes per expert.
    pub expert_bytes: u64,
    /// Number of experts pinned to each tier.
    pub pinned: PerTier<u32>,
    /// Slots, and their tier.
    pub slots: (u32, TierIdx),
    /// Policy of the slots.
    pub policy: SlotPolicy,
    /// Share of the choices that pins serve.
    pub pin_hits: f64,
    /// Share of the choices that slots serve.
    pub slot_hits: f64,
    /// Seconds per token of the expert stage.
    pub seconds: f64,
    /// Path that takes longest on average.
    pub longest: Path,
    /// Least share of tokens that choose an expert that is pinned, and the largest that choose one
    /// that is not.
    pub border: (Option<f64>, Option<f64>),
}

/// One of the paths that overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Computation from this tier.
    Computing(TierIdx),
    /// Reads from the last tier into slots or buffers.
    Reading,
}

/// What one tier's budget is worth.
#[derive(Debug, Clone, PartialEq)]
pub struct TierReason {
    /// Name of the tier.
    pub name: String,
    /// Seconds per token that one more GiB would save, at the margin.
    pub seconds_per_gib: f64,
    /// Tokens per second that one more GiB would bring.
    pub tok_s_per_gib: f64,
    /// Bytes of the budget that are not used.
    pub spare_bytes: u64,
}

/// Reasons of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Explanation {
    /// One per layer with experts.
    pub layers: Vec<LayerReason>,
    /// One per tier.
    pub tiers: PerTier<TierReason>,
}

/// Returns the machine that a plan was made for, as far as the plan says.
pub fn machine_of(plan: &Placement) -> Machine {
    let home = plan.tiers.last().map(|t| t.tier.name.clone());
    let copies = Some(plan.reads.copies.clone()).filter(|copies| !copies.is_empty());
    Machine {
        name: plan.machine.name.clone(),
        description: String::new(),
        tiers: plan.tiers.iter().map(|t| t.tier.clone()).collect(),
        layer_overhead_us: plan.layer_overhead_us,
        token_overhead_us: plan.token_overhead_us,
        // The efficiency is part of a plan's rates.
        extras: Extras {
            prompt_gflops: plan.by_name(&plan.predicted.prompt_gflops),
            few_gflops: plan.by_name(&plan.predicted.few_gflops),
            io: home.clone().zip(plan.reads.io).into_iter().collect(),
            copies: home.zip(copies).into_iter().collect(),
            ..Extras::default()
        },
        id: plan.machine.clone(),
    }
}

/// Explains a plan of this model, judged on this evidence.
///
/// # Errors
/// Fails if the plan does not hold for the model, or its prices cannot be found.
pub fn explain(
    plan: &Placement,
    shape: &ModelShape,
    evidence: &Evidence,
    time_limit_s: f64,
) -> Result<Explanation> {
    let wrong = crate::solve::verify::verify(plan, shape, evidence);
    ensure!(
        wrong.is_empty(),
        "the plan '{}' does not hold for this model and profile: {}; give those that it was made from",
        printable(&plan.name),
        wrong.join("; ")
    );
    let machine = machine_of(plan);
    let problem = Problem {
        shape,
        profile: None,
        machine: &machine,
        budgets: plan.tiers.iter().map(|t| t.budget_bytes).collect(),
        context: plan.context,
        sequences: plan.sequences,
        kv_type: plan.kv_type,
        position: (plan.predicted.at > 0).then_some(plan.predicted.at),
    };
    let prices = shadow_prices(&problem, evidence, plan, time_limit_s)?;
    let total = crate::cost::token_s(&plan.predicted).max(f64::MIN_POSITIVE);
    let tiers = plan.tiers.iter().zip(&prices).map(|(tier, price)| {
        let seconds_per_gib = price * f64::from(1u32 << 30);
        TierReason {
            name: tier.tier.name.clone(),
            seconds_per_gib,
            // The derivative of 1 / seconds.
            tok_s_per_gib: seconds_per_gib / (total * total),
            spare_bytes: tier.budget_bytes.saturating_sub(tier.used_bytes()),
        }
    });
    let rates = FixedTimes::of(plan, shape).tiers;
    let layers = plan.layers.iter().zip(&evidence.layers);
    Ok(Explanation {
        layers: layers
            .map(|(l, e)| layer(plan, shape, l, e, &rates))
            .collect(),
        tiers: tiers.collect(),
    })
}

fn layer(
    plan: &Placement,
    shape: &ModelShape,
    layer: &LayerPlacement,
    evidence: &LayerEvidence,
    tiers: &PerTier<Tier>,
) -> LayerReason {
    let stage = ExpertStage::of_plan(plan, shape, tiers, evidence);
    let found = outcomes(layer, evidence, tiers, plan.staging_tier);
    let to = layer.brought_to(plan.staging_tier);
    let mut paths = vec![0.0; tiers.len() + 1];
    for (experts, share) in &found {
        let uses = stage.paths(experts, to);
        paths
            .iter_mut()
            .zip(uses)
            .for_each(|(seconds, used)| *seconds += share * used.seconds);
    }
    let longest = (0..paths.len())
        .max_by(|&a, &b| paths[a].total_cmp(&paths[b]))
        .unwrap_or(0);
    let mut is_pinned = vec![false; evidence.shape.n_expert as usize];
    let mut pinned = PerTier::from_fn(tiers.len(), |_| 0);
    for Pins { tier, experts } in &layer.pinned {
        pinned[*tier] += experts.len() as u32;
        for &expert in experts {
            if let Some(this) = is_pinned.get_mut(expert as usize) {
                *this = true;
            }
        }
    }
    let used = f64::from(evidence.shape.n_used).max(1.0);
    let home = tiers.len() - 1;
    let mut missed = 0.0;
    for (experts, share) in &found {
        missed += share * experts[home..].iter().copied().map(f64::from).sum::<f64>();
    }
    let of = |wanted: bool| {
        is_pinned
            .iter()
            .zip(&evidence.share)
            .filter(move |(p, _)| **p == wanted)
            .map(|(_, s)| *s)
    };
    let pin_hits: f64 = match &evidence.judged {
        crate::profile::Judged::Recorded(trace) => {
            let share = trace.decode_share();
            is_pinned
                .iter()
                .zip(share)
                .filter(|(p, _)| **p)
                .map(|(_, s)| s)
                .sum::<f64>()
                / used
        }
        crate::profile::Judged::Uniform => of(true).sum::<f64>() / used,
    };
    LayerReason {
        layer: layer.layer,
        by_token: evidence.shape.by_token,
        expert_bytes: evidence.shape.expert_bytes,
        pinned,
        slots: (layer.slots, layer.slot_tier),
        policy: layer.policy,
        pin_hits,
        slot_hits: (1.0 - missed / used - pin_hits).max(0.0),
        seconds: stage_mean_s(&stage, &found, to),
        longest: if longest < tiers.len() {
            Path::Computing(TierIdx::new(longest))
        } else {
            Path::Reading
        },
        border: (
            of(true).min_by(f64::total_cmp),
            of(false).max_by(f64::total_cmp),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue;
    use crate::profile::pattern::Pattern;
    use crate::solve::options::Strategy;
    use crate::solve::{Options, solve_with_evidence};

    /// Prices agree with what a GiB more of a tier brings when solved again.
    #[test]
    fn prices_are_what_more_bytes_bring() -> Result<()> {
        let known = catalogue::model(std::path::Path::new("qwen3-30b-a3b"), Some("q4_k_m"))?;
        let machine = catalogue::machine(std::path::Path::new("desktop-4090-ddr5-nvme"))?;
        let evidence = Evidence::supposed(&known.sizes, Pattern::Zipf)?;
        let solve = |vram: u64| {
            let budgets = vec![vram, 6 << 30, 2_000_000_000_000];
            let kv_type = Default::default();
            let problem = Problem {
                shape: &known.sizes,
                profile: None,
                machine: &machine,
                budgets,
                context: 1024,
                sequences: 1,
                kv_type,
                position: None,
            };
            let options = Options {
                strategy: Strategy::Optimal,
                time_limit_s: 4.0,
                ..Options::default()
            };
            Ok::<_, anyhow::Error>(solve_with_evidence(&problem, &evidence, &options)?.plan)
        };
        let plan = solve(4 << 30)?;
        let why = explain(&plan, &known.sizes, &evidence, 4.0)?;
        assert_eq!((why.tiers.len(), why.layers.len()), (3, 48));
        let more = solve((4 << 30) + (1 << 29))?;
        let saved = (plan.solver.objective_s - more.solver.objective_s) * 2.0;
        let said = why.tiers[TierIdx::FIRST].seconds_per_gib;
        // The worth falls as bytes grow, and both plans have a small gap.
        assert!(
            said > 0.0 && saved > 0.3 * said && saved < 1.3 * said,
            "{said} {saved}"
        );
        assert!(
            why.tiers[TierIdx::new(2)].seconds_per_gib.abs() < 1e-9,
            "nobody lacks room on the drive"
        );
        // The sums are those of the prediction.
        let seconds: f64 = why.layers.iter().map(|l| l.seconds).sum();
        assert!((seconds - plan.predicted.expert_critical_s).abs() < 1e-9);
        let hits = why
            .layers
            .iter()
            .map(|l| l.pin_hits + l.slot_hits)
            .sum::<f64>()
            / 48.0;
        assert!((hits - plan.predicted.hit_rate).abs() < 1e-6, "{hits}");
        // Favorites are pinned before others.
        for l in &why.layers {
            if let (Some(least), Some(most)) = l.border {
                assert!(least >= most, "layer {}", l.layer);
            }
        }
        let other = Evidence::uniform(&known.sizes)?;
        let error = explain(&plan, &known.sizes, &other, 1.0)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("give those that it was made from"),
            "{error}"
        );
        Ok(())
    }
}
