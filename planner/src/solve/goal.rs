//! What a plan is to make least, and what that comes to for a plan.
//!
//! | objective | makes least | unit |
//! |---|---|---|
//! | latency | predicted time of a decoded token of one sequence | s |
//! | throughput | predicted time of a step that decodes one token of each of B sequences, by the B tokens | s a token |
//! | cost | price of the memory used and of the rest of the machine, times the time of a token | US dollars for a token a second |
//! | energy | the machine's power times the time of a token | J |
//! | memory | bytes of the tiers above the last one, by price if there are prices, at no less than a target speed | US dollars or bytes |
//!
//! Energy is latency in another unit: the machine file has one power for the whole machine, so the fastest plan is the
//! thriftiest. So is cost where the machine has one price and no prices of its tiers.

use super::room::Room;
use super::{Inputs, batch};
use crate::cost::token_s;
use crate::profile::Evidence;
use crate::solve::options::Objective;
use anyhow::{Context, Result, bail, ensure};
use tier_plan_runtime::formats::placement::{Goal as Stored, Placement};
use tier_plan_runtime::model::shape::ModelShape;

/// An objective with what it needs.
#[derive(Debug, Clone, PartialEq)]
pub struct Goal {
    /// What it is.
    pub objective: Objective,
    /// Sequences that are decoded together.
    pub batch: u32,
    /// Tokens a second to reach.
    pub target_tok_s: Option<f64>,
    /// `[tiers]` US dollars a byte, or for the least memory without prices 1 for each byte above the last tier.
    weights: Vec<f64>,
    /// US dollars for everything but the memory that plans use.
    rest_usd: f64,
    watts: f64,
}

impl Goal {
    /// The goal of a command line.
    ///
    /// # Errors
    /// When the objective lacks what it needs: a target, a batch, a price or a power.
    pub fn new(
        objective: Objective,
        batch: Option<u32>,
        target_tok_s: Option<f64>,
        inputs: &Inputs<'_>,
    ) -> Result<Self> {
        let extras = &inputs.machine.extras;
        let name = &inputs.machine.name;
        if let Some(target) = target_tok_s {
            ensure!(target.is_finite() && target > 0.0, "--target-tok-s {target}: give a number above 0");
        }
        ensure!(batch.is_none_or(|b| (1..=1 << 20).contains(&b)), "--batch: give 1 to {} sequences", 1 << 20);
        ensure!(
            batch.is_none() || objective == Objective::Throughput,
            "--batch goes with --objective throughput; the others are of one sequence"
        );
        let prices: Option<Vec<f64>> =
            inputs.machine.tiers.iter().map(|t| extras.usd_per_gb.get(&t.name).map(|p| p * 1e-9)).collect();
        let some_prices = || -> Vec<f64> {
            let of = |t: &tier_plan_runtime::formats::machine::Tier| extras.usd_per_gb.get(&t.name).copied();
            inputs.machine.tiers.iter().map(|t| of(t).unwrap_or(0.0) * 1e-9).collect()
        };
        let last = inputs.machine.tiers.len().saturating_sub(1);
        let mut goal = Goal {
            objective,
            batch: batch.unwrap_or(1),
            target_tok_s,
            weights: vec![0.0; inputs.machine.tiers.len()],
            rest_usd: 0.0,
            watts: 0.0,
        };
        match objective {
            Objective::Latency => {}
            Objective::Throughput => {
                ensure!(
                    batch.is_some(),
                    "--objective throughput needs --batch: how many sequences are decoded together"
                );
            }
            Objective::Energy => {
                goal.watts = extras.watts.with_context(|| {
                    format!("--objective energy needs the machine's power; write `watts` into the file of '{name}'")
                })?;
            }
            Objective::Cost => {
                goal.weights = some_prices();
                let all: f64 =
                    goal.weights.iter().zip(&inputs.machine.tiers).map(|(w, t)| w * t.capacity_bytes as f64).sum();
                goal.rest_usd = (extras.price_usd.unwrap_or(0.0) - all).max(0.0);
                ensure!(
                    goal.rest_usd > 0.0 || all > 0.0,
                    "--objective cost needs prices; write `price_usd`, or `usd_per_gb` of tiers, into the file of '{name}'"
                );
            }
            Objective::Memory => {
                ensure!(
                    target_tok_s.is_some(),
                    "--objective memory needs --target-tok-s: the speed that the least memory is to reach"
                );
                goal.weights = match prices {
                    Some(prices) => prices,
                    None => (0..=last).map(|t| if t < last { 1.0 } else { 0.0 }).collect(),
                };
                if last == 0 {
                    bail!("--objective memory needs two tiers or more; machine '{name}' has one");
                }
            }
        }
        Ok(goal)
    }

    /// Whether a column costs its seconds and nothing else.
    pub fn is_latency(&self) -> bool {
        self.batch == 1 && !self.has_weights() && self.objective != Objective::Throughput
    }

    /// Whether bytes have a cost of their own.
    pub fn has_weights(&self) -> bool {
        self.weights.iter().any(|&w| w > 0.0)
    }

    /// Whether the time of a token is a limit rather than what is made least.
    pub fn limits_time(&self) -> bool {
        self.has_weights() && self.target_tok_s.is_some()
    }

    /// What columns cost: a weight for their seconds, and one for each byte of a tier. For the cost, which is a product,
    /// those of its tangent at a plan with this price and time.
    pub fn columns(&self, usd: f64, seconds: f64) -> (f64, Vec<f64>) {
        match self.objective {
            Objective::Memory => (0.0, self.weights.clone()),
            Objective::Cost if self.has_weights() => {
                (1.0, self.weights.iter().map(|w| w * seconds / usd.max(f64::MIN_POSITIVE)).collect())
            }
            _ => (1.0, vec![0.0; self.weights.len()]),
        }
    }

    /// What a plan's bytes come to: US dollars, or bytes.
    fn weighed(&self, plan: &Placement) -> f64 {
        plan.tiers.iter().zip(&self.weights).map(|(t, w)| t.used_bytes() as f64 * w).sum()
    }

    /// Price of a plan's memory and of the rest of the machine, in US dollars.
    pub fn usd(&self, plan: &Placement) -> f64 {
        self.weighed(plan) + self.rest_usd
    }

    /// What a plan comes to.
    pub fn value(&self, plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> f64 {
        let seconds = token_s(&plan.predicted);
        match self.objective {
            Objective::Latency => seconds,
            Objective::Throughput => batch::step_s(plan, shape, evidence, self.batch) / f64::from(self.batch),
            Objective::Cost => self.usd(plan) * seconds,
            Objective::Energy => self.watts * seconds,
            Objective::Memory => self.weighed(plan),
        }
    }

    /// Seconds a token that a target allows.
    pub fn most_s(&self) -> Option<f64> {
        self.target_tok_s.map(|t| 1.0 / t)
    }

    /// Whether a plan is fast enough for the target, if there is one.
    pub fn reached(&self, plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> bool {
        let seconds = match self.objective {
            Objective::Throughput => self.value(plan, shape, evidence),
            _ => token_s(&plan.predicted),
        };
        // The last digits are rounding.
        self.most_s().is_none_or(|most| seconds <= most * (1.0 + 1e-9))
    }

    /// What the bytes left for weights cost whatever the choice: staging is the same in every plan, and the cache that is set aside.
    pub fn fixed_weight(&self, room: &Room) -> f64 {
        let at = |tier: usize, bytes: u64| self.weights.get(tier).copied().unwrap_or(0.0) * bytes as f64;
        at(room.kv_tier, room.kv_bytes) + at(room.staging_tier, room.staging_bytes)
    }

    /// The unit of the value.
    pub fn unit(&self) -> &'static str {
        match self.objective {
            Objective::Latency => "s",
            Objective::Throughput => "s a token",
            Objective::Cost => "USD for a token a second",
            Objective::Energy => "J",
            Objective::Memory if self.weights.iter().all(|w| *w == 0.0 || *w == 1.0) => "bytes",
            Objective::Memory => "USD",
        }
    }

    /// What is made least, in words; says where that is nothing else than latency.
    pub fn words(&self) -> String {
        match self.objective {
            Objective::Latency => "least predicted time of a decoded token".to_string(),
            Objective::Throughput => format!(
                "least predicted time of a step over {} sequences, each distinct expert read once; arithmetic is not \
                 reckoned, so this is an upper limit of speed",
                self.batch
            ),
            Objective::Cost if self.has_weights() => {
                "least predicted price of a token a second: the memory used by its price a GB, and the rest of the \
                 machine, times the time of a token; the steps that find it end where no small change is better, so \
                 nothing is proven"
                    .to_string()
            }
            Objective::Cost => "least predicted price of a token a second; as the machine has one price and its tiers \
                                have none, that is least latency in another unit"
                .to_string(),
            Objective::Energy => {
                "least predicted energy of a token; as the machine has one power, that is least latency \
                                  in another unit"
                    .to_string()
            }
            Objective::Memory => format!(
                "least memory {} that is predicted to reach {} tok/s",
                if self.unit() == "USD" { "by price" } else { "above the last tier" },
                self.target_tok_s.unwrap_or_default()
            ),
        }
    }

    /// What the plan's file says of it; nothing for the plain objective.
    pub fn stored(&self, value: f64, bound: Option<f64>) -> Option<Stored> {
        let plain = self.objective == Objective::Latency && self.target_tok_s.is_none();
        (!plain).then(|| Stored {
            objective: self.objective.name().to_string(),
            value,
            unit: self.unit().to_string(),
            bound,
            batch: (self.objective == Objective::Throughput).then_some(self.batch),
            target_tok_s: self.target_tok_s,
        })
    }
}
