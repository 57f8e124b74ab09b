//! The objective: the quantity that a plan minimizes, and its value for a plan.
//!
//! | objective | minimizes | unit |
//! |---|---|---|
//! | latency | predicted time of a decoded token of one sequence | s |
//! | throughput | predicted time of a step over B sequences, divided by B | s per token |
//! | cost | price of the machine with the memory used, times the time of a token | USD · s |
//! | energy | power of the machine times the time of a token | J |
//! | memory | bytes above the last tier, by price if there are prices | USD or bytes |
//!
//! The least memory must reach a target speed.
//!
//! Energy is latency in another unit: the machine file has one power for the whole machine, so the
//! fastest plan also takes the least energy. Cost is latency too where the machine has one price
//! and its tiers have none.

use super::Problem;
use super::capacity::Capacity;
use crate::cost::batch::{self, MatmulRates, Step};
use crate::cost::token_s;
use crate::profile::Evidence;
use crate::solve::options::Objective;
use anyhow::{Context, Result, ensure};
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::formats::placement::{Goal, Placement, TierIdx};
use tier_plan_runtime::model::shape::ModelShape;

/// Sequences per batch at most.
const MAX_BATCH: u32 = 1 << 20;

/// Relative excess over a target's time that is rounding.
const TARGET_TOLERANCE: f64 = 1e-9;

/// US dollars per byte, of a price in US dollars per gigabyte.
const USD_PER_BYTE: f64 = 1e-9;

/// An objective with what it needs.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectiveFunction {
    /// The quantity to minimize.
    pub kind: Objective,
    /// The step that is timed, of the sequences that are decoded together.
    pub step: Step,
    /// Tokens per second to reach.
    pub target_tok_s: Option<f64>,
    /// `[tiers]` US dollars per byte. For the least memory without prices, 1 for each byte above
    /// the last tier.
    weights: Vec<f64>,
    /// US dollars for everything but the memory that plans use.
    rest_usd: f64,
    watts: f64,
}

/// The point at which a product of price and time is linearized.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tangent {
    /// Price of the machine and the memory used.
    pub usd: f64,
    /// Seconds per token.
    pub seconds: f64,
}

/// Weights of a column's cost.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnWeights {
    /// Weight of a second.
    pub per_second: f64,
    /// `[tiers]` weight of a byte.
    pub per_byte: Vec<f64>,
}

impl ObjectiveFunction {
    /// Makes the objective of a command line.
    ///
    /// # Errors
    /// Fails if the objective lacks what it needs: a target, a batch, a price or a power.
    pub fn new(
        kind: Objective,
        batch: Option<u32>,
        target_tok_s: Option<f64>,
        problem: &Problem<'_>,
    ) -> Result<Self> {
        let machine = problem.machine;
        if let Some(target) = target_tok_s {
            ensure!(
                target.is_finite() && target > 0.0,
                "--target-tok-s {target}: give a number above 0"
            );
        }
        ensure!(
            batch.is_none_or(|b| (1..=MAX_BATCH).contains(&b)),
            "--batch: give 1 to {MAX_BATCH} sequences"
        );
        ensure!(
            batch.is_none() || kind == Objective::Throughput,
            "--batch goes with --objective throughput; the others are of one sequence"
        );
        let (texts, planned) = (batch.unwrap_or(1), problem.sequences);
        ensure!(
            texts <= planned,
            "--batch: {texts} sequences, expected at most {planned}, the texts that the KV cache is planned for"
        );
        let mut objective = ObjectiveFunction {
            kind,
            step: Step::new(
                texts,
                &machine.computing_tiers().into(),
                MatmulRates {
                    many: &machine.prompt_gflops(),
                    few: &machine.few_gflops(),
                },
            ),
            target_tok_s,
            weights: vec![0.0; machine.tiers.len()],
            rest_usd: 0.0,
            watts: 0.0,
        };
        match kind {
            Objective::Latency => {}
            Objective::Throughput => ensure!(
                batch.is_some(),
                "--objective throughput needs --batch: how many sequences are decoded together"
            ),
            Objective::Energy => objective.watts = watts(machine)?,
            Objective::Cost => objective.set_prices(machine)?,
            Objective::Memory => objective.set_memory_weights(machine)?,
        }
        Ok(objective)
    }

    fn set_prices(&mut self, machine: &Machine) -> Result<()> {
        let prices = &machine.extras.usd_per_gb;
        let price = |name: &String| prices.get(name).copied().unwrap_or(0.0) * USD_PER_BYTE;
        self.weights = machine.tiers.iter().map(|t| price(&t.name)).collect();
        let tiers = self.weights.iter().zip(&machine.tiers);
        let memory_usd: f64 = tiers.map(|(w, t)| w * t.capacity_bytes as f64).sum();
        self.rest_usd = (machine.extras.price_usd.unwrap_or(0.0) - memory_usd).max(0.0);
        ensure!(
            self.rest_usd > 0.0 || memory_usd > 0.0,
            "--objective cost needs prices; write `price_usd`, or `usd_per_gb` of tiers, into the file of '{}'",
            machine.name
        );
        Ok(())
    }

    fn set_memory_weights(&mut self, machine: &Machine) -> Result<()> {
        ensure!(
            self.target_tok_s.is_some(),
            "--objective memory needs --target-tok-s: the speed that the least memory is to reach"
        );
        let prices = &machine.extras.usd_per_gb;
        let price = |name: &String| prices.get(name).map(|p| p * USD_PER_BYTE);
        let all_prices: Option<Vec<f64>> = machine.tiers.iter().map(|t| price(&t.name)).collect();
        let last = machine.tiers.len().saturating_sub(1);
        let above_last = || {
            (0..=last)
                .map(|t| if t < last { 1.0 } else { 0.0 })
                .collect()
        };
        self.weights = all_prices.unwrap_or_else(above_last);
        ensure!(
            last > 0,
            "--objective memory needs two tiers or more; machine '{}' has one",
            machine.name
        );
        Ok(())
    }

    /// Whether a column costs its seconds and nothing else.
    pub fn is_latency(&self) -> bool {
        !self.has_weights() && self.kind != Objective::Throughput
    }

    /// Whether bytes have a cost of their own.
    pub fn has_weights(&self) -> bool {
        self.weights.iter().any(|&w| w > 0.0)
    }

    /// Whether the time of a token is a limit rather than what is minimized.
    pub fn limits_time(&self) -> bool {
        self.has_weights() && self.target_tok_s.is_some()
    }

    /// Returns the weights of a column's seconds and bytes.
    ///
    /// For the cost, which is a product, they are those of its tangent at a plan's price and time.
    pub fn column_weights(&self, tangent: Tangent) -> ColumnWeights {
        let Tangent { usd, seconds } = tangent;
        match self.kind {
            Objective::Memory => ColumnWeights {
                per_second: 0.0,
                per_byte: self.weights.clone(),
            },
            Objective::Cost if self.has_weights() => {
                let per_byte = |w: &f64| w * seconds / usd.max(f64::MIN_POSITIVE);
                ColumnWeights {
                    per_second: 1.0,
                    per_byte: self.weights.iter().map(per_byte).collect(),
                }
            }
            Objective::Latency | Objective::Throughput | Objective::Cost | Objective::Energy => {
                ColumnWeights {
                    per_second: 1.0,
                    per_byte: vec![0.0; self.weights.len()],
                }
            }
        }
    }

    /// Returns the weighted bytes of a plan: US dollars, or bytes.
    fn weighted_bytes(&self, plan: &Placement) -> f64 {
        plan.tiers
            .iter()
            .zip(&self.weights)
            .map(|(t, w)| t.used_bytes() as f64 * w)
            .sum()
    }

    /// Returns the price of a plan's memory and of the rest of the machine, in US dollars.
    pub fn usd(&self, plan: &Placement) -> f64 {
        self.weighted_bytes(plan) + self.rest_usd
    }

    /// Returns the value of a plan, in [`unit`](Self::unit); less is better.
    pub fn value(&self, plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> f64 {
        let seconds = token_s(&plan.predicted);
        match self.kind {
            Objective::Latency => seconds,
            Objective::Throughput => {
                batch::step_s(plan, shape, evidence, self.step.texts) / f64::from(self.step.texts)
            }
            Objective::Cost => self.usd(plan) * seconds,
            Objective::Energy => self.watts * seconds,
            Objective::Memory => self.weighted_bytes(plan),
        }
    }

    /// Returns the seconds per token that the target allows.
    pub fn max_token_s(&self) -> Option<f64> {
        self.target_tok_s.map(|t| 1.0 / t)
    }

    /// Whether a plan is fast enough for the target, if there is one.
    pub fn meets_target(&self, plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> bool {
        let seconds = match self.kind {
            Objective::Throughput => self.value(plan, shape, evidence),
            _ => token_s(&plan.predicted),
        };
        self.max_token_s()
            .is_none_or(|max_s| seconds <= max_s * (1.0 + TARGET_TOLERANCE))
    }

    /// Returns the weighted bytes that no choice changes: staging, and the cache that is set aside.
    pub fn fixed_weight(&self, capacity: &Capacity) -> f64 {
        let weighted = |tier: TierIdx, bytes: u64| {
            self.weights.get(tier.get()).copied().unwrap_or(0.0) * bytes as f64
        };
        weighted(capacity.kv_tier, capacity.kv_bytes)
            + weighted(capacity.staging_tier, capacity.staging_bytes)
    }

    /// Returns the unit of the value.
    pub fn unit(&self) -> &'static str {
        match self.kind {
            Objective::Latency => "s",
            Objective::Throughput => "s a token",
            Objective::Cost => "USD for a token a second",
            Objective::Energy => "J",
            Objective::Memory if self.weights.iter().all(|w| *w == 0.0 || *w == 1.0) => "bytes",
            Objective::Memory => "USD",
        }
    }

    /// Returns a sentence about what is minimized, and whether that is latency in another unit.
    pub fn describe(&self) -> String {
        match self.kind {
            Objective::Latency => "least predicted time of a decoded token".to_string(),
            Objective::Throughput => format!(
                "least predicted time of a step over {} sequences, each distinct expert read once{}",
                self.step.texts,
                if self.step.has_arithmetic() {
                    ""
                } else {
                    "; without rates of arithmetic only reads are counted, so this is an upper limit of speed"
                }
            ),
            Objective::Cost if self.has_weights() => {
                "least predicted price of a token per second: the memory used by its price per GB, and the rest of the \
                 machine, times the time of a token; the steps that find it end where no small change is better, so \
                 nothing is proven"
                    .to_string()
            }
            Objective::Cost => {
                "least predicted price of a token per second; as the machine has one price and its tiers \
                                have none, that is least latency in another unit"
                    .to_string()
            }
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

    /// Returns what the plan's file says of the objective; `None` for plain latency.
    pub fn report(&self, value: f64, bound: Option<f64>) -> Option<Goal> {
        let plain = self.kind == Objective::Latency && self.target_tok_s.is_none();
        (!plain).then(|| Goal {
            objective: self.kind.name().to_string(),
            value,
            unit: self.unit().to_string(),
            bound,
            batch: (self.kind == Objective::Throughput).then_some(self.step.texts),
            target_tok_s: self.target_tok_s,
        })
    }
}

fn watts(machine: &Machine) -> Result<f64> {
    machine.extras.watts.with_context(|| {
        format!(
            "--objective energy needs the machine's power; write `watts` into the file of '{}'",
            machine.name
        )
    })
}
