//! The rate of main memory at the moment, measured apart from the tokens that are predicted with it.
//!
//! A burst multiplies weights that the engine holds, as a decoded token would, for a few
//! milliseconds between two tokens. Where a tier has routed experts, a stage of a burst is what one
//! token makes of a layer: gate and up of as many experts as it uses, the activation, and down. On
//! other tiers it is the matrices of one dense group. That is what `probe` measures a tier's rate by
//! (with `--model`, on this very model), so both rates mean the same. Nothing of a burst is counted
//! as decoding, and no text, slot, or buffer of the engine changes.
//!
//! A stage during which a thread was taken off its processor takes milliseconds instead of a
//! fraction of one. Such stages are left out, since what other programs take of the processors is
//! counted for the whole run ([`processors`](crate::os::processors)). Other programs that use the
//! memory slow all stages alike, and that is what a burst is for.

use super::Engine;
use crate::experts::view::ExpertView;
use std::time::{Duration, Instant};
use tier_plan_formats::machine::Medium;
use tier_plan_formats::model::spec::DenseGroup;
use tier_plan_formats::placement::{PerTier, PlanTier, TierIdx};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{Activations, Weights, needs_quants};

/// A stage that takes so many times as long per byte as the median was interrupted.
const INTERRUPTED: f64 = 2.0;

/// Fewest stages of a tier that give a rate.
const MIN_STAGES: usize = 3;

/// Most stages that are kept per tier: more change no median.
const MAX_STAGES: usize = 4096;

/// Values per row of 8-bit activations that have one scale.
const GROUP: usize = 32;

/// Bytes and time of one stage of a burst.
#[derive(Debug, Clone, Copy, PartialEq)]
struct StageTime {
    bytes: f64,
    seconds: f64,
}

impl StageTime {
    fn per_byte(self) -> f64 {
        self.seconds / self.bytes
    }
}

/// What the bursts of a run measured.
#[derive(Debug, Clone, Default)]
pub struct Bursts {
    experts: PerTier<Vec<StageTime>>,
    dense: PerTier<Vec<StageTime>>,
    /// The next stage among the layers with routed experts, and how often all were there.
    next: usize,
    round: usize,
    /// The next dense group.
    next_dense: usize,
    scratch: Scratch,
}

/// Buffers of a burst's stages.
#[derive(Debug, Clone, Default)]
struct Scratch {
    x: Activations,
    inner: Activations,
    gate: Vec<f32>,
    up: Vec<f32>,
    out: Vec<f32>,
}

impl Bursts {
    /// Returns the rate of each tier that the CPU computes from, in 10⁹ bytes of weights per
    /// second; `None` where nothing or too little was measured.
    pub fn gbps(&self) -> PerTier<Option<f64>> {
        let of = |(experts, dense): (&Vec<StageTime>, &Vec<StageTime>)| {
            rate(experts).or_else(|| rate(dense))
        };
        self.experts.iter().zip(&self.dense).map(of).collect()
    }

    fn add(&mut self, tier: TierIdx, is_expert: bool, stage: StageTime) {
        let of = if is_expert {
            &mut self.experts
        } else {
            &mut self.dense
        };
        let stages = &mut of[tier];
        if stage.bytes > 0.0 && stage.seconds > 0.0 && stages.len() < MAX_STAGES {
            stages.push(stage);
        }
    }
}

/// Returns the rate of the stages that were not interrupted: all their bytes by all their time.
fn rate(stages: &[StageTime]) -> Option<f64> {
    let mut per_byte: Vec<f64> = stages.iter().map(|stage| stage.per_byte()).collect();
    per_byte.sort_by(f64::total_cmp);
    let median = per_byte.get(per_byte.len() / 2).copied()?;
    let whole = stages
        .iter()
        .filter(|stage| stage.per_byte() <= INTERRUPTED * median);
    let (bytes, seconds, n) = whole.fold((0.0, 0.0, 0), |(bytes, seconds, n), stage| {
        (bytes + stage.bytes, seconds + stage.seconds, n + 1)
    });
    (n >= MIN_STAGES && seconds > 0.0).then(|| bytes / seconds / 1e9)
}

impl Engine {
    /// Multiplies resident weights for about `time`, at least one stage, and adds what it took to
    /// `bursts`; twice as long where a tier has dense weights and no experts. A caller that wants the
    /// rates of a run does so now and then between two tokens.
    ///
    /// Nothing is measured on emulated tiers and GPUs, nor while the caller cancels.
    pub fn burst(&self, time: Duration, bursts: &mut Bursts) {
        let n_tiers = self.plan.tiers.len();
        if bursts.experts.len() != n_tiers {
            bursts.experts = PerTier::from_fn(n_tiers, |_| Vec::new());
            bursts.dense = PerTier::from_fn(n_tiers, |_| Vec::new());
        }
        if self.plan.tiers.iter().any(|t| t.tier.emulated) {
            return;
        }
        let start = Instant::now();
        self.burst_experts(start, time, bursts);
        let lacks = |(planned, stages): (&PlanTier, &Vec<StageTime>)| {
            planned.tier.medium() == Medium::Addressable
                && planned.bytes.dense > 0
                && stages.is_empty()
        };
        if self.plan.tiers.iter().zip(&bursts.experts).any(lacks) {
            self.burst_dense(Instant::now(), time, bursts);
        }
    }

    /// Multiplies experts of one layer after another until `time` has passed since `start`.
    fn burst_experts(&self, start: Instant, time: Duration, bursts: &mut Bursts) {
        let store = &self.experts.store;
        let most = if store.n_layers() > 0 { MAX_STAGES } else { 0 };
        for _ in 0..most {
            let layer = bursts.next;
            let n_used = self.shape().experts.get(layer).map_or(1, |e| e.n_used);
            let first = bursts.round.wrapping_mul(n_used as usize);
            let (tier, views) = store.resident(layer, first, n_used as usize);
            bursts.next += 1;
            if bursts.next >= store.n_layers() {
                (bursts.next, bursts.round) = (0, bursts.round.wrapping_add(1));
            }
            if let Some(tier) = tier {
                let stage = self.expert_stage(&views, &mut bursts.scratch);
                if self.cancel.is_requested() {
                    return;
                }
                bursts.add(tier, true, stage);
            }
            if start.elapsed() >= time {
                return;
            }
        }
    }

    /// Multiplies one dense group after another until `time` has passed since `start`.
    fn burst_dense(&self, start: Instant, time: Duration, bursts: &mut Bursts) {
        let mut groups = self.spec().dense_groups();
        groups.retain(|group| group.layer.is_some() && !group.kind.is_named_by_tokens());
        let most = if groups.is_empty() { 0 } else { MAX_STAGES };
        for _ in 0..most {
            let group = &groups[bursts.next_dense % groups.len()];
            bursts.next_dense = (bursts.next_dense + 1) % groups.len();
            let (tier, stage) = self.dense_stage(group, &mut bursts.scratch);
            if self.cancel.is_requested() {
                return;
            }
            if let Some(tier) = tier {
                bursts.add(tier, false, stage);
            }
            if start.elapsed() >= time {
                return;
            }
        }
    }

    /// Times gate and up, the activation, and down of some experts of a layer.
    fn expert_stage(&self, experts: &[ExpertView<'_>], s: &mut Scratch) -> StageTime {
        let (pool, kernels) = (&self.backends.pool, self.backends.kernels);
        let Some(first) = experts.first() else {
            return StageTime {
                bytes: 0.0,
                seconds: 0.0,
            };
        };
        let (width, hidden) = (first.up.weights.n_rows(), first.down.weights.n_rows());
        let n = experts.len();
        s.gate.resize(n * width, 0.0);
        s.up.resize(n * width, 0.0);
        s.out.resize(n * hidden, 0.0);
        s.fill_x(kernels, first.up.weights.n_cols());
        let quantize = experts.iter().any(|e| needs_quants(e.down.weights.ty()));
        let start = Instant::now();
        let mut jobs = Vec::with_capacity(2 * n);
        let rows = s
            .gate
            .chunks_exact_mut(width)
            .zip(s.up.chunks_exact_mut(width));
        for (expert, (gate, up)) in experts.iter().zip(rows) {
            if expert.is_gated {
                jobs.push(MatJob::new(expert.gate.weights, s.x.view(), gate));
            }
            jobs.push(MatJob::new(expert.up.weights, s.x.view(), up));
        }
        matmul_all(pool, kernels, &jobs);
        drop(jobs);
        kernels.silu_mul(&mut s.gate, &s.up);
        s.inner.fill(kernels, n, width, &s.gate, quantize);
        let inner = s.inner.view();
        let rows = experts.iter().zip(s.out.chunks_exact_mut(hidden));
        let jobs: Vec<MatJob<'_>> = rows
            .enumerate()
            .map(|(i, (e, out))| MatJob::new(e.down.weights, inner.rows_range(i..i + 1), out))
            .collect();
        matmul_all(pool, kernels, &jobs);
        StageTime {
            seconds: start.elapsed().as_secs_f64(),
            bytes: experts.iter().map(expert_bytes).sum(),
        }
    }

    /// Times the matrices of a dense group that lie in main memory, one after the other.
    fn dense_stage(&self, group: &DenseGroup, s: &mut Scratch) -> (Option<TierIdx>, StageTime) {
        let weights = &self.backends.processors.cpu.weights;
        let mut stage = StageTime {
            bytes: 0.0,
            seconds: 0.0,
        };
        let mut on = None;
        for (tier, matrix) in group.tensors.iter().filter_map(|id| weights.in_memory(*id)) {
            let quantize = needs_quants(matrix.ty());
            if (quantize && !matrix.n_cols().is_multiple_of(GROUP))
                || *on.get_or_insert(tier) != tier
            {
                continue;
            }
            s.out.resize(matrix.n_rows(), 0.0);
            s.fill_x(self.backends.kernels, matrix.n_cols());
            let start = Instant::now();
            let out = &mut s.out[..matrix.n_rows()];
            let jobs = [MatJob::new(matrix, s.x.view(), out)];
            matmul_all(&self.backends.pool, self.backends.kernels, &jobs);
            stage.seconds += start.elapsed().as_secs_f64();
            stage.bytes += weight_bytes(&matrix);
        }
        (on, stage)
    }
}

impl Scratch {
    /// Makes one row of activations; what they are does not matter, as no kernel skips zeros.
    fn fill_x(&mut self, kernels: tier_plan_kernels::Kernels, width: usize) {
        if self.x.view().cols() != width {
            let values: Vec<f32> = (0..width).map(|i| (i % 17) as f32 * 0.01 - 0.08).collect();
            let quantize = width.is_multiple_of(GROUP);
            self.x.fill(kernels, 1, width, &values, quantize);
        }
    }
}

fn weight_bytes(weights: &Weights<'_>) -> f64 {
    let row = weights.ty().row_bytes(weights.n_cols() as u64);
    row.unwrap_or(0) as f64 * weights.n_rows() as f64
}

fn expert_bytes(expert: &ExpertView<'_>) -> f64 {
    let gate = if expert.is_gated {
        weight_bytes(&expert.gate.weights)
    } else {
        0.0
    };
    gate + weight_bytes(&expert.up.weights) + weight_bytes(&expert.down.weights)
}

#[cfg(test)]
#[path = "burst_tests.rs"]
mod tests;
