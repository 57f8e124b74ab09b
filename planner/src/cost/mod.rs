//! Predicts how long a token takes under a placement, and states exactly what is charged.
//!
//! # What is charged
//! A decoded token lasts `token overhead + Σ layers (layer overhead + dense stage + expert stage) +
//! the dense groups of no layer` (embedding and head). The engine's emulated tiers charge the same:
//!
//! - **Dense stage**: `Σ token_bytes / rate(tier)` over the layer's groups and its KV cache, one
//!   after the other. There is no latency: the launches of an ordinary layer are part of the layer
//!   overhead, and the row of an embedding that stays on a block device counts as its bytes. A
//!   token's rows of a token table there are read at once, after the device's latency. That they
//!   are read ahead of the layers that use them is not credited: an upper limit of the time.
//! - **Expert stage**, only in layers with routed experts: the longest of the paths that overlap,
//!   which are
//!   - each tier that chosen experts compute from: `bytes / rate`, for VRAM after the latency of a
//!     launch;
//!   - for `m > 0` missed experts their transfer from the last tier: `latency + m · expert_bytes /
//!     rate`, less what prefetching hides ([`Prefetch`]). Where slots are in VRAM behind a link,
//!     the rate is that of the link if it is the slower one ([`Tier::transfer_s`]). Experts that the
//!     token alone chooses are read from when the layer's dense stage begins, `max(0, latency + m ·
//!     expert_bytes / rate − dense bytes / rate of the first tier)`.
//! - A chosen expert computes where it is pinned. A pooled one computes on its layer's slot tier if
//!   it lies in a slot or is brought into one; else it is brought into staging and computes there.
//!   So a miss is charged twice, on two paths: its transfer, and its computation from the slot or
//!   the buffer.
//! - Where the plan streams experts ([`Streaming`]) and a token brings none from the last tier, its
//!   experts of main memory and of that GPU are divided anew ([`StreamTimes::divide`]): the paths of
//!   both tiers take what the division says.
//! - Unless the last tier is a block device, a pooled expert that gets no slot computes in place:
//!   it is charged on that tier's path as a pinned one is, and nothing is staged.
//!
//! The maximum is taken token by token over recorded, held-out tokens and then averaged: the mean
//! of the maximum, not the maximum of means. Slots are replayed by their layer's policy, as
//! [`crate::profile::replay`] says. Without a profile, tokens are independent and all sets of
//! experts equally likely, and the slots hold that many pooled experts. The mean is then exact for
//! LRU. It is used for the other policies too, which can do no better there.
//!
//! On a GPU a dense stage has launches, and its router's choices come back: a layer whose attention
//! is there takes its `layer_us` more. Where a model is fully on one GPU, nothing comes back
//! between a token's number and its logits. Each layer then takes `resident_layer_us` in place of
//! the layer overhead, `layer_us` and the latency of launches.
//!
//! A dense stage also reads the keys and values of every position that the token attends to, or of
//! those within a layer's window. It reads and writes back recurrent state. All are charged at the
//! rate of the KV cache's tier: the real GPU that has the layer's attention, or the tier of all
//! other layers. Where the arithmetic of attention takes longer than that, and its rate is known,
//! that counts instead.
//!
//! The time of a token so depends on its position in the text. A prediction is for the position
//! `at`, half of the planned context unless given; a run's record has it for the middle of what the
//! run decoded.
//!
//! Prompts are the subject of [`prompt`].

pub mod batch;
pub mod fit;
pub mod observed;
pub mod prompt;
pub mod steps;

use crate::profile::prefetch::Prefetch;
use crate::profile::replay::{LayerTrace, Positions, play};
use crate::profile::{Evidence, Judged, LayerEvidence};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::OnceLock;
use tier_plan_runtime::experts::cache::{Access, SlotCache};
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{
    DensePlacement, LayerPlacement, PerTier, Pins, Placement, Prediction, SlotPolicy, StreamTimes,
    Streaming, TierIdx,
};
use tier_plan_runtime::gpu::fully_on_gpu;
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// Tokens of a prompt that are processed together.
pub const BATCH: u32 = 512;

/// Least accuracy of predictions at which the engine prefetches.
const MIN_PREFETCH_ACCURACY: f64 = 0.5;

/// Experts of a layer up to which logarithms of factorials are kept.
const USUAL_EXPERTS: usize = 1024;

/// Relative difference of two times that is rounding.
const TIME_TOLERANCE: f64 = 1e-9;

/// Whether experts on the last tier can compute in place.
pub fn home_in_place(tiers: &PerTier<Tier>) -> bool {
    tiers.last().is_some_and(|t| t.kind != TierKind::Nvme)
}

/// Returns the seconds to read bytes from a tier, latency left out.
pub fn read_s(tier: &Tier, bytes: f64) -> f64 {
    bytes / (tier.read_gbps * 1e9)
}

/// Returns the seconds of a dense group's reads for one token, with the latency of a table on a
/// block device.
pub fn group_read_s(kind: DenseKind, tier: &Tier, bytes: f64) -> f64 {
    let waits = kind == DenseKind::TokenTable && tier.kind == TierKind::Nvme;
    let latency_s = if waits { tier.latency_us * 1e-6 } else { 0.0 };
    latency_s + read_s(tier, bytes)
}

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
        let on_cpu = (Part::Experts, Some(evidence.shape.layer));
        let runs = !shape.cpu_only.iter().any(|o| (o.part, o.layer) == on_cpu);
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

/// What tokens do in one layer: the share of tokens by their experts on each path.
///
/// A key is `[tiers + 1]` experts: computed from each tier, then transferred.
pub type Outcomes = BTreeMap<Vec<u16>, f64>;

/// The paths that a layer's experts take under a placement.
struct LayerPaths<'a> {
    layer: &'a LayerPlacement,
    /// `[n_expert]` tiers of pinned experts.
    pinned_on: Vec<Option<TierIdx>>,
    n_tiers: usize,
    staging: TierIdx,
    in_place: bool,
}

impl LayerPaths<'_> {
    /// Returns the experts of a token on each path, with its pinned choices counted.
    fn of_pinned(&self, chosen: &[u16]) -> Vec<u16> {
        let mut experts = vec![0u16; self.n_tiers + 1];
        for tier in chosen
            .iter()
            .filter_map(|&e| self.pinned_on[usize::from(e)])
        {
            experts[tier.get()] += 1;
        }
        experts
    }

    /// Counts a missed choice, which is transferred unless it computes in place.
    fn add_miss(&self, experts: &mut [u16], gets_slot: bool) {
        let home = self.n_tiers - 1;
        if !gets_slot && self.in_place {
            experts[home] += 1;
        } else {
            experts[home + 1] += 1;
            let to = if gets_slot {
                self.layer.slot_tier
            } else {
                self.staging
            };
            experts[to.get()] += 1;
        }
    }

    fn is_pinned(&self) -> Vec<bool> {
        self.pinned_on.iter().map(Option::is_some).collect()
    }

    /// Steps the layer's slot cache through recorded tokens.
    fn stepped(&self, trace: &LayerTrace, n_expert: u32) -> Outcomes {
        let mut outcomes = Outcomes::new();
        let share = 1.0 / trace.tokens().max(1) as f64;
        let mut cache = SlotCache::new(n_expert, self.layer.slots, self.layer.policy);
        play(trace, &self.is_pinned(), &mut cache, |chosen, accesses| {
            let mut experts = self.of_pinned(chosen);
            for access in accesses {
                match access {
                    Access::Hit { .. } => experts[self.layer.slot_tier.get()] += 1,
                    Access::Fill { .. } => self.add_miss(&mut experts, true),
                    Access::Staged => self.add_miss(&mut experts, false),
                }
            }
            *outcomes.entry(experts).or_insert(0.0) += share;
        });
        outcomes
    }

    /// Replays recorded tokens with LRU, by stack distances.
    fn replayed_lru(&self, trace: &LayerTrace) -> Outcomes {
        let mut outcomes = Outcomes::new();
        let positions = Positions::new(trace, &self.is_pinned());
        let share = 1.0 / positions.tokens().max(1) as f64;
        let slots = self.layer.slots;
        for (token, (chosen, _)) in trace.steps().filter(|(_, counted)| *counted).enumerate() {
            let mut experts = self.of_pinned(chosen);
            let pooled = positions.token(token);
            for (at, &position) in pooled.iter().enumerate() {
                if u32::from(position) < slots {
                    experts[self.layer.slot_tier.get()] += 1;
                } else {
                    self.add_miss(&mut experts, pooled.len() - at <= slots as usize);
                }
            }
            *outcomes.entry(experts).or_insert(0.0) += share;
        }
        outcomes
    }

    /// Draws tokens whose experts are all equally likely.
    fn drawn(&self, n_expert: u32, n_used: u32) -> Outcomes {
        let mut outcomes = Outcomes::new();
        let n = self.n_tiers;
        // Groups of alike experts: pinned by tier, resident in slots, neither.
        let mut groups = vec![0u32; n];
        self.pinned_on
            .iter()
            .flatten()
            .for_each(|&tier| groups[tier.get()] += 1);
        let pooled = n_expert - groups.iter().sum::<u32>();
        let resident = self.layer.slots.min(pooled);
        groups.extend([resident, pooled - resident]);
        draw(&groups, n_used, |drawn, share| {
            let mut experts: Vec<u16> = drawn[..n].iter().map(|&n| n as u16).chain([0]).collect();
            let (hits, missed) = (drawn[n], drawn[n + 1]);
            experts[self.layer.slot_tier.get()] += hits as u16;
            for at in 0..missed {
                self.add_miss(&mut experts, hits + at < resident);
            }
            *outcomes.entry(experts).or_insert(0.0) += share;
        });
        outcomes
    }
}

/// Returns the outcomes of one layer under its placement, over the evidence's tokens.
pub fn outcomes(
    layer: &LayerPlacement,
    evidence: &LayerEvidence,
    tiers: &PerTier<Tier>,
    staging: TierIdx,
) -> Outcomes {
    let (n_expert, n_used) = (evidence.shape.n_expert, evidence.shape.n_used);
    let pinned_on = pinned_on(layer, n_expert as usize);
    let in_place = home_in_place(tiers);
    let paths = LayerPaths {
        layer,
        pinned_on,
        n_tiers: tiers.len(),
        staging,
        in_place,
    };
    match &evidence.judged {
        Judged::Recorded(trace) if layer.policy != SlotPolicy::Lru => {
            paths.stepped(trace, n_expert)
        }
        Judged::Recorded(trace) => paths.replayed_lru(trace),
        Judged::Uniform => paths.drawn(n_expert, n_used),
    }
}

/// The outcomes of a plan's layers, replayed once for layers that are alike and placed alike.
#[derive(Default)]
struct Replays<'a> {
    known: Vec<(&'a LayerPlacement, &'a LayerEvidence, Rc<Outcomes>)>,
}

impl<'a> Replays<'a> {
    /// Returns the outcomes of one layer; the tiers are those of the layers before.
    fn outcomes(
        &mut self,
        layer: &'a LayerPlacement,
        evidence: &'a LayerEvidence,
        tiers: &PerTier<Tier>,
        staging: TierIdx,
    ) -> Rc<Outcomes> {
        let is_same = |(placed, of, _): &&(&LayerPlacement, &LayerEvidence, _)| {
            evidence.is_like(of) && is_placed_alike(placed, layer)
        };
        if let Some((.., known)) = self.known.iter().find(is_same) {
            return known.clone();
        }
        let found = Rc::new(outcomes(layer, evidence, tiers, staging));
        if evidence.class.is_some() {
            self.known.push((layer, evidence, found.clone()));
        }
        found
    }
}

/// Whether two layers have the same experts in the same places.
fn is_placed_alike(one: &LayerPlacement, other: &LayerPlacement) -> bool {
    (one.slots, one.slot_tier, one.policy) == (other.slots, other.slot_tier, other.policy)
        && one.pinned == other.pinned
}

/// Returns `[n_expert]` tiers of a layer's pinned experts.
fn pinned_on(layer: &LayerPlacement, n_expert: usize) -> Vec<Option<TierIdx>> {
    let mut pinned_on = vec![None; n_expert];
    for Pins { tier, experts } in &layer.pinned {
        for &expert in experts {
            if let Some(on) = pinned_on.get_mut(expert as usize) {
                *on = Some(*tier);
            }
        }
    }
    pinned_on
}

/// Calls `each` with every way in which `k` distinct experts fall on groups of the given sizes.
///
/// The second argument is its probability when all sets are equally likely (the multivariate
/// hypergeometric distribution).
pub fn draw(groups: &[u32], k: u32, mut each: impl FnMut(&[u32], f64)) {
    let total: u32 = groups.iter().sum();
    // Logarithms for the usual counts are made once.
    static USUAL: OnceLock<Vec<f64>> = OnceLock::new();
    let usual = USUAL.get_or_init(|| ln_factorials(USUAL_EXPERTS));
    let made;
    let ln_fact = if total as usize <= USUAL_EXPERTS {
        usual
    } else {
        made = ln_factorials(total as usize);
        &made
    };
    let ln_choose =
        |n: u32, k: u32| ln_fact[n as usize] - ln_fact[k as usize] - ln_fact[(n - k) as usize];
    let all = ln_choose(total, k.min(total));
    let mut drawn = vec![0u32; groups.len()];
    fill(
        groups,
        0,
        k.min(total),
        -all,
        &mut drawn,
        &mut Draw {
            ln_choose: &ln_choose,
            each: &mut each,
        },
    );
}

/// What every level of [`draw`]'s recursion calls.
struct Draw<'a, C, E> {
    ln_choose: &'a C,
    each: &'a mut E,
}

/// Draws `left` experts from the groups at `at` and after, with `ln` the probability so far.
fn fill<C: Fn(u32, u32) -> f64, E: FnMut(&[u32], f64)>(
    groups: &[u32],
    at: usize,
    left: u32,
    ln: f64,
    drawn: &mut [u32],
    draw: &mut Draw<'_, C, E>,
) {
    if at == groups.len() {
        if left == 0 {
            (draw.each)(drawn, ln.exp());
        }
        return;
    }
    let after: u32 = groups[at + 1..].iter().sum();
    for n in left.saturating_sub(after)..=left.min(groups[at]) {
        drawn[at] = n;
        let ln = ln + (draw.ln_choose)(groups[at], n);
        fill(groups, at + 1, left - n, ln, drawn, draw);
    }
}

/// Returns `[n + 1]` natural logarithms of 0!, 1!, ..., n!.
fn ln_factorials(n: usize) -> Vec<f64> {
    let mut sum = 0.0;
    std::iter::once(0.0)
        .chain((1..=n).map(|i| {
            sum += (i as f64).ln();
            sum
        }))
        .collect()
}

/// Returns the mean seconds of the expert stage, with missed experts transferred to the tier `to`.
pub fn stage_mean_s(stage: &ExpertStage, outcomes: &Outcomes, to: TierIdx) -> f64 {
    outcomes
        .iter()
        .map(|(experts, share)| share * stage.token_s(experts, to))
        .sum()
}

/// Returns the overhead seconds per token: its own and its layers'.
pub fn overhead_s(n_layer: u32, layer_overhead_us: f64, token_overhead_us: f64) -> f64 {
    (token_overhead_us + layer_overhead_us * f64::from(n_layer)) * 1e-6
}

/// The fixed times of a plan.
#[derive(Debug, Clone)]
pub struct FixedTimes {
    /// Overhead seconds per token: its own and its layers'.
    pub overhead_s: f64,
    /// Part of that per layer, in microseconds.
    pub layer_us: f64,
    /// Seconds per token, beside that, of layers whose attention is on a GPU.
    pub dense_s: PerTier<f64>,
    /// The plan's tiers as experts compute on them. Where a model is fully on one GPU, launches
    /// have no latency.
    pub tiers: PerTier<Tier>,
}

impl FixedTimes {
    /// Returns the fixed times of a plan for a model.
    pub fn of(plan: &Placement, shape: &ModelShape) -> Self {
        let mut tiers: PerTier<Tier> = plan.tiers.iter().map(|t| t.tier.clone()).collect();
        let mut dense_s = PerTier::from_fn(tiers.len(), |_| 0.0);
        let resident = fully_on_gpu(plan, shape)
            .and_then(|tier| Some((tier, tiers[tier].accelerator.resident_layer_us?)));
        if let Some((tier, layer_us)) = resident {
            tiers[tier].latency_us = 0.0;
            return FixedTimes {
                overhead_s: overhead_s(shape.n_layer, layer_us, plan.token_overhead_us),
                layer_us,
                dense_s,
                tiers,
            };
        }
        for group in plan.dense.iter().filter(|d| d.kind == DenseKind::Attention) {
            dense_s[group.tier] += attention_fixed_s(&tiers[group.tier]);
        }
        FixedTimes {
            overhead_s: overhead_s(
                shape.n_layer,
                plan.layer_overhead_us,
                plan.token_overhead_us,
            ),
            layer_us: plan.layer_overhead_us,
            dense_s,
            tiers,
        }
    }
}

/// Returns the fixed seconds of a layer whose attention is on this tier, beside those of any layer.
pub fn attention_fixed_s(tier: &Tier) -> f64 {
    tier.accelerator.layer_us.unwrap_or(0.0) * 1e-6
}

/// Returns the bytes that a decoded token reads of the dense groups, by tier.
fn dense_bytes(shape: &ModelShape, dense: &[DensePlacement], n_tiers: usize) -> PerTier<f64> {
    let tier_of: BTreeMap<_, _> = dense.iter().map(|d| ((d.kind, d.layer), d.tier)).collect();
    let mut bytes = PerTier::from_fn(n_tiers, |_| 0.0);
    for group in &shape.dense {
        if let Some(&tier) = tier_of.get(&(group.kind, group.layer)) {
            bytes[tier] += group.token_bytes as f64;
        }
    }
    bytes
}

/// Returns the seconds of latency that a decoded token waits for tables on block devices, by tier.
fn table_latency_s(plan: &Placement, shape: &ModelShape) -> PerTier<f64> {
    let mut seconds = PerTier::from_fn(plan.tiers.len(), |_| 0.0);
    let has_table = shape.dense.iter().any(|d| d.kind == DenseKind::TokenTable);
    let tables = plan
        .dense
        .iter()
        .filter(|d| d.kind == DenseKind::TokenTable);
    for table in tables.filter(|_| has_table) {
        seconds[table.tier] += group_read_s(table.kind, &plan.tiers[table.tier].tier, 0.0);
    }
    seconds
}

/// Returns the position that predictions for a context are for: halfway.
pub fn middle(context: u32) -> u32 {
    (context / 2).max(1)
}

/// Moves a plan's prediction and its solver report to tokens that attend to `at` positions.
///
/// Every plan for this model with its KV cache on these tiers takes as much longer or shorter, so
/// the bound moves along.
pub fn move_to(plan: &mut Placement, shape: &ModelShape, at: u32) {
    let before = plan.predicted.token_s();
    let predicted = plan.predicted_at(shape, at);
    let solver = &mut plan.solver;
    // An objective of another kind does not follow the time of a token.
    if (solver.objective_s - before).abs() <= TIME_TOLERANCE * before {
        let more = predicted.token_s() - before;
        let bound = solver.bound_s.map(|bound| (bound + more).max(0.0));
        (solver.objective_s, solver.bound_s) = (predicted.token_s(), bound);
        solver.gap =
            bound.map(|bound| ((solver.objective_s - bound) / solver.objective_s).max(0.0));
    }
    plan.predicted = predicted;
}

/// Predicts a placement's speed, with its parts.
///
/// The position in the text and the arithmetic rates are those of the prediction that the plan has.
pub fn predict(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> Prediction {
    let FixedTimes {
        overhead_s,
        mut dense_s,
        tiers,
        ..
    } = FixedTimes::of(plan, shape);
    let n = tiers.len();
    let mut read_bytes = dense_bytes(shape, &plan.dense, n);
    dense_s
        .iter_mut()
        .zip(&read_bytes)
        .zip(&tiers)
        .for_each(|((s, &bytes), tier)| *s += read_s(tier, bytes));
    dense_s
        .iter_mut()
        .zip(&table_latency_s(plan, shape))
        .for_each(|(s, latency_s)| *s += latency_s);
    let (mut expert_s, mut critical) = (PerTier::from_fn(n, |_| 0.0), 0.0);
    let (mut accesses, mut missed) = (0.0, 0.0);
    let mut replays = Replays::default();
    for (layer, evidence) in plan.layers.iter().zip(&evidence.layers) {
        let stage = ExpertStage::of_plan(plan, shape, &tiers, evidence);
        let outcomes = replays.outcomes(layer, evidence, &tiers, plan.staging_tier);
        let to = layer.brought_to(plan.staging_tier);
        critical += stage_mean_s(&stage, &outcomes, to);
        accesses += f64::from(evidence.shape.n_used);
        for (experts, share) in outcomes.iter() {
            missed += share * experts[n - 1..].iter().copied().map(f64::from).sum::<f64>();
            for (path, used) in stage.paths(experts, to).into_iter().enumerate() {
                let tier = TierIdx::new(path.min(n - 1));
                let bytes = f64::from(used.experts) * evidence.shape.expert_bytes as f64;
                expert_s[tier] += share * used.seconds;
                read_bytes[tier] += share * bytes;
            }
        }
    }
    let at = plan.predicted.at;
    let kv_s = if at > 0 {
        plan.attention_s(shape, at.into())
    } else {
        0.0
    };
    let total = overhead_s + dense_s.iter().sum::<f64>() + kv_s + critical;
    Prediction {
        decode_tok_s: if total > 0.0 { 1.0 / total } else { 0.0 },
        prompt_tok_s: f64::from(BATCH)
            / prompt::batch_s(plan, shape, evidence).max(f64::MIN_POSITIVE),
        overhead_s,
        dense_s,
        expert_s,
        expert_critical_s: critical,
        hit_rate: if accesses > 0.0 {
            1.0 - missed / accesses
        } else {
            1.0
        },
        read_bytes,
        emulated: tiers.iter().all(|t| t.emulated),
        at,
        kv_s,
        prompt_gflops: plan.predicted.prompt_gflops.clone(),
        few_gflops: plan.predicted.few_gflops.clone(),
    }
}

/// Returns the seconds of a decoded token, from a prediction's parts.
pub fn token_s(prediction: &Prediction) -> f64 {
    prediction.token_s()
}

#[cfg(test)]
mod tests;
