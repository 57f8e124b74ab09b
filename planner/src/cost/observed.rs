//! Predicts a plan with the rates that a run's machine really had.
//!
//! A plan counts on the rates of its machine file. While it ran, memory, drive, and processors may
//! have given less, or more. [`Observed`] has what they gave, each measured apart from the tokens
//! that are predicted: memory by multiplying weights between tokens, the drive by its busy time,
//! the processors by the system's count of who waited. [`predict`](Observed::predict) puts them in
//! place of the plan's rates and asks the same cost model:
//!
//! - a tier that the CPU computes from has `rate · share`, where `rate` is the measured one or else
//!   the plan's, and `share` is that of the processors;
//! - a drive has its measured rate, or else the plan's; its readers hardly need a processor;
//! - the fixed times of layers and tokens are divided by the share, and the arithmetic rates of the
//!   CPU are multiplied by it;
//! - GPUs and emulated tiers stay as planned: the one is not measured, the other is declared.
//!
//! Which experts are missed stays as planned too. So what is left between this prediction and the
//! measured speed is the text's own choice of experts, and errors of the model.

use crate::profile::Evidence;
use tier_plan_runtime::formats::machine::{Medium, Tier};
use tier_plan_runtime::formats::placement::{PerTier, Placement, Prediction};
use tier_plan_runtime::model::shape::ModelShape;

/// Relative difference of a rate or share below which it is as planned.
const AS_PLANNED: f64 = 0.01;

/// Least share of the processors that is computed with, so that no time becomes infinite.
const MIN_SHARE: f64 = 1e-6;

/// What a machine gave during a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Observed {
    /// Share of the processors' time that tokens got, above 0 and at most 1; `None` where the
    /// system does not tell, which counts as all.
    pub share: Option<f64>,
    /// Rates of the plan's tiers, in 10⁹ bytes per second; `None` where none was measured.
    pub gbps: PerTier<Option<f64>>,
}

impl Observed {
    fn share(&self) -> f64 {
        let share = self.share.filter(|share| *share > 0.0).unwrap_or(1.0);
        share.clamp(MIN_SHARE, 1.0)
    }

    /// Returns the measured rate of each tier that this may say anything about, with the tier.
    pub fn rates<'a>(&'a self, plan: &'a Placement) -> impl Iterator<Item = (&'a Tier, f64)> + 'a {
        let tiers = plan.tiers.iter().map(|t| &t.tier);
        let measured = tiers.zip(&self.gbps);
        measured.filter_map(|(tier, gbps)| {
            let gbps = gbps.filter(|gbps| gbps.is_finite() && *gbps > 0.0)?;
            (!tier.emulated && tier.medium() != Medium::Gpu).then_some((tier, gbps))
        })
    }

    /// Whether nothing differs from what the plan counts on.
    pub fn is_as_planned(&self, plan: &Placement) -> bool {
        let near = |(tier, gbps): (&Tier, f64)| (gbps / tier.read_gbps - 1.0).abs() < AS_PLANNED;
        1.0 - self.share() < AS_PLANNED && self.rates(plan).all(near)
    }

    /// Returns the plan with these rates in place of its own. Its prediction is still the old one.
    #[must_use]
    pub fn replaced(&self, plan: &Placement) -> Placement {
        let share = self.share();
        let mut plan = plan.clone();
        if plan.tiers.iter().all(|t| t.tier.emulated) {
            return plan;
        }
        let found: Vec<(String, f64)> = self
            .rates(&plan)
            .map(|(tier, gbps)| (tier.name.clone(), gbps))
            .collect();
        for planned in plan.tiers.iter_mut().filter(|t| !t.tier.emulated) {
            let tier = &mut planned.tier;
            if let Some((_, gbps)) = found.iter().find(|(name, _)| *name == tier.name) {
                tier.read_gbps = *gbps;
            }
            if tier.medium() == Medium::Addressable {
                tier.read_gbps *= share;
            }
        }
        plan.layer_overhead_us /= share;
        plan.token_overhead_us /= share;
        let media: Vec<Medium> = plan.tiers.iter().map(|t| t.tier.medium()).collect();
        let predicted = &mut plan.predicted;
        for rates in [&mut predicted.prompt_gflops, &mut predicted.few_gflops] {
            let rates = rates.iter_mut().zip(&media);
            for (rate, _) in rates.filter(|(_, medium)| **medium != Medium::Gpu) {
                *rate *= share;
            }
        }
        plan
    }

    /// Predicts a plan's decode speed for a token that attends to `at` positions, with these rates.
    ///
    /// Without the evidence that the plan was made from, its parts are rescaled.
    pub fn predict(
        &self,
        plan: &Placement,
        shape: &ModelShape,
        evidence: Option<&Evidence>,
        at: u32,
    ) -> Prediction {
        let mut now = self.replaced(plan);
        if now.predicted.at > 0 && at > 0 {
            now.predicted.at = at;
        }
        match evidence {
            Some(evidence) => super::predict(&now, shape, evidence),
            None => rescaled(plan, &now, shape, self.share()),
        }
    }
}

/// Returns a plan's prediction with every part as much longer as its tier is slower in `now`, which
/// has other rates.
///
/// How paths of an expert stage overlap is taken as planned: the longest paths keep their ratio to
/// the sum of all, and take at least the time of the slowest tier. Latencies and what prefetch hides
/// scale along, so that this is an estimate of what [`predict`](super::predict) gives.
fn rescaled(plan: &Placement, now: &Placement, shape: &ModelShape, share: f64) -> Prediction {
    let was = &plan.predicted;
    let slower: Vec<f64> = plan
        .tiers
        .iter()
        .zip(&now.tiers)
        .map(|(was, now)| was.tier.read_gbps / now.tier.read_gbps)
        .collect();
    let scale = |parts: &PerTier<f64>| -> PerTier<f64> {
        parts
            .iter()
            .zip(&slower)
            .map(|(s, slower)| s * slower)
            .collect()
    };
    let (dense_s, expert_s) = (scale(&was.dense_s), scale(&was.expert_s));
    let sum = |parts: &PerTier<f64>| parts.iter().sum::<f64>();
    let overlap = if sum(&was.expert_s) > 0.0 {
        was.expert_critical_s / sum(&was.expert_s)
    } else {
        0.0
    };
    let longest = expert_s.iter().copied().fold(0.0, f64::max);
    let mut predicted = Prediction {
        overhead_s: was.overhead_s / share,
        expert_critical_s: (overlap * sum(&expert_s)).max(longest),
        dense_s,
        expert_s,
        kv_s: if now.predicted.at > 0 {
            now.attention_s(shape, now.predicted.at.into())
        } else {
            0.0
        },
        at: now.predicted.at,
        prompt_gflops: now.predicted.prompt_gflops.clone(),
        few_gflops: now.predicted.few_gflops.clone(),
        ..was.clone()
    };
    let total = predicted.token_s();
    predicted.decode_tok_s = if total > 0.0 { 1.0 / total } else { 0.0 };
    predicted
}

#[cfg(test)]
#[path = "observed_tests.rs"]
mod tests;
