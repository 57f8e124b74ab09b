//! The expert stage of one layer: its paths, and how long they take.

use super::outcomes::Outcomes;
use super::read_s;
use crate::profile::LayerEvidence;
use crate::profile::prefetch::Prefetch;
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{PerTier, Placement, StreamTimes, Streaming, TierIdx};
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::ModelShape;

/// Least accuracy of predictions at which the engine prefetches.
const MIN_PREFETCH_ACCURACY: f64 = 0.5;

/// Returns the seconds of a layer's transfers that are over when its experts begin, if any is
/// missed.
///
/// The engine prefetches one expert per layer from a block device that is not emulated, while at
/// least half of its predictions come true. It has the time of the dense stage, taken to lie on the
/// fastest tier. Where the token alone chooses the experts, all of them are read in that time, from
/// an emulated device too.
fn prefetch_hidden_s(prefetch: Prefetch, tiers: &PerTier<Tier>, expert_s: f64) -> f64 {
    let (Some(first), Some(home)) = (tiers.first(), tiers.last()) else {
        return 0.0;
    };
    let is_drive = home.kind == TierKind::Nvme && tiers.len() > 1;
    let dense_s = read_s(first, prefetch.dense_bytes as f64);
    if prefetch.is_exact && is_drive {
        dense_s
    } else if prefetch.accuracy >= MIN_PREFETCH_ACCURACY && is_drive && !home.emulated {
        prefetch.accuracy.min(1.0) * expert_s.min(dense_s)
    } else {
        0.0
    }
}

/// Time of the experts on one path of an expert stage.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PathTime {
    /// Seconds of each expert.
    pub per_expert_s: f64,
    /// Seconds of the path beside its experts, if there is any expert: less than 0 where more is
    /// hidden. The path then takes at least 0 seconds.
    pub fixed_s: f64,
}

impl PathTime {
    /// Returns the seconds of a number of experts, which may be a mean.
    pub fn seconds(self, experts: f64) -> f64 {
        if experts > 0.0 {
            (self.fixed_s + experts * self.per_expert_s).max(0.0)
        } else {
            0.0
        }
    }

    /// Returns times that are no longer for any whole number of experts, with a fixed part that is
    /// not negative: `max(0, fixed + n · each) ≥ n · max(0, fixed + each)` where `fixed < 0`.
    #[must_use]
    pub fn without_negative(self) -> Self {
        if self.fixed_s >= 0.0 {
            return self;
        }
        PathTime {
            per_expert_s: (self.per_expert_s + self.fixed_s).max(0.0),
            fixed_s: 0.0,
        }
    }
}

/// The expert stage of one layer on given tiers.
#[derive(Debug, Clone)]
pub struct ExpertStage {
    /// `[tiers]` time of experts that compute from there.
    compute: Vec<PathTime>,
    /// Time of experts that are transferred there.
    transfers: PerTier<PathTime>,
    streamed: Option<Box<StreamedStage>>,
}

/// How a stage streams experts of main memory to a GPU.
#[derive(Debug, Clone, Copy)]
struct StreamedStage {
    tier: TierIdx,
    from: TierIdx,
    times: StreamTimes,
}

/// What one token does on one path of an expert stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PathUse {
    /// Experts that take the path.
    pub experts: u32,
    /// Seconds of the path, before any overlap.
    pub seconds: f64,
}

impl ExpertStage {
    /// Makes the stage of a layer under a plan, which may stream experts. `tiers` are the plan's, as
    /// experts compute on them.
    pub fn of_plan(
        plan: &Placement,
        shape: &ModelShape,
        tiers: &PerTier<Tier>,
        evidence: &LayerEvidence,
    ) -> Self {
        let bytes = evidence.shape.expert_bytes;
        let mut stage = Self::new(tiers, bytes, evidence.prefetch);
        let layer = Some(evidence.shape.layer);
        let runs = !shape.cpu_only.iter().any(|o| o.is(Part::Experts, layer));
        let streamed = |s: &Streaming| {
            Box::new(StreamedStage {
                tier: s.tier,
                from: s.from,
                times: StreamTimes::new(s, &tiers[s.tier], &tiers[s.from], bytes),
            })
        };
        stage.streamed = plan.streaming.as_ref().filter(|_| runs).map(streamed);
        stage
    }

    /// Makes the stage of a layer whose experts have `expert_bytes` bytes.
    pub fn new(tiers: &PerTier<Tier>, expert_bytes: u64, prefetch: Prefetch) -> Self {
        let expert_s = |tier: &Tier| read_s(tier, expert_bytes as f64);
        let compute = |tier: &Tier| {
            let is_vram = tier.kind == TierKind::Vram;
            let fixed_s = if is_vram { tier.latency_us * 1e-6 } else { 0.0 };
            PathTime {
                per_expert_s: expert_s(tier),
                fixed_s,
            }
        };
        let transfer = |to: &Tier| {
            let Some(home) = tiers.last() else {
                return PathTime::default();
            };
            let fixed_s =
                home.latency_us * 1e-6 - prefetch_hidden_s(prefetch, tiers, expert_s(home));
            PathTime {
                per_expert_s: to.transfer_s(home, expert_bytes as f64),
                fixed_s,
            }
        };
        ExpertStage {
            compute: tiers.iter().map(compute).collect(),
            transfers: tiers.iter().map(transfer).collect(),
            streamed: None,
        }
    }

    /// Returns the time of one path. Paths are the tiers, then the transfers to the tier `to`.
    pub fn path(&self, path: usize, to: TierIdx) -> PathTime {
        self.compute
            .get(path)
            .copied()
            .unwrap_or_else(|| self.transfers[to])
    }

    /// Returns the seconds of one path for a number of experts, before any overlap.
    pub fn path_s(&self, path: usize, experts: f64, to: TierIdx) -> f64 {
        self.path(path, to).seconds(experts)
    }

    /// Returns the seconds of the stage for `[tiers + 1]` mean numbers of experts on the paths.
    pub fn seconds(&self, experts: &[f64], to: TierIdx) -> f64 {
        experts
            .iter()
            .enumerate()
            .map(|(path, &n)| self.path_s(path, n, to))
            .fold(0.0, f64::max)
    }

    /// Returns what `[tiers + 1]` experts of one token do on the paths, some of which may be streamed
    /// from one to another.
    pub fn paths(&self, experts: &[u16], to: TierIdx) -> Vec<PathUse> {
        let plain = |(path, &n): (usize, &u16)| PathUse {
            experts: n.into(),
            seconds: self.path_s(path, n.into(), to),
        };
        let mut paths: Vec<PathUse> = experts.iter().enumerate().map(plain).collect();
        let brought = experts.last().copied().unwrap_or(0);
        if let Some(s) = self.streamed.as_ref().filter(|_| brought == 0) {
            let [on_gpu, in_memory] = [s.tier, s.from].map(|tier| paths[tier.get()].experts);
            let division = s.times.divide(in_memory, in_memory, on_gpu);
            let n = division.streamed;
            paths[s.tier.get()] = PathUse {
                experts: on_gpu + n,
                seconds: division.gpu_s,
            };
            paths[s.from.get()] = PathUse {
                experts: in_memory - n,
                seconds: division.cpu_s,
            };
        }
        paths
    }

    /// Returns the seconds of the stage for `[tiers + 1]` experts of one token on the paths.
    pub fn token_s(&self, experts: &[u16], to: TierIdx) -> f64 {
        if self.streamed.is_some() {
            let paths = self.paths(experts, to);
            return paths.iter().map(|path| path.seconds).fold(0.0, f64::max);
        }
        let seconds = |(&n, time): (&u16, &PathTime)| {
            if n > 0 {
                time.fixed_s + f64::from(n) * time.per_expert_s
            } else {
                0.0
            }
        };
        let paths = self.compute.iter().chain([&self.transfers[to]]);
        experts.iter().zip(paths).map(seconds).fold(0.0, f64::max)
    }
}

/// Returns the mean seconds of the expert stage, with missed experts transferred to the tier `to`.
pub fn stage_mean_s(stage: &ExpertStage, outcomes: &Outcomes, to: TierIdx) -> f64 {
    outcomes
        .iter()
        .map(|(experts, share)| share * stage.token_s(experts, to))
        .sum()
}
