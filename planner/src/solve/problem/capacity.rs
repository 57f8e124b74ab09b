//! Capacity: the tiers, the bytes that every plan needs, and the bytes left to choose about.
//!
//! Every plan needs staging buffers and the KV cache. Layers whose attention may be on a real GPU
//! have their cache there, or else with the rest, so columns count it. The rest of the cache is set
//! aside here. Each tier that can hold that rest gives a [`Capacity`] of its own, and so does each GPU
//! that may have parts which run on one only together.

mod caches;
mod check;

pub use caches::LayerCache;

use super::constraints::Constraints;
use super::draft::DensePlace;
use super::{Problem, hint};
use crate::cost::home_in_place;
use anyhow::{Result, bail};
use check::check_tiers;
use std::collections::BTreeSet;
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{PerTier, TierIdx};
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::{DenseKind, DenseShape, ModelShape};
use tier_plan_runtime::units::show_bytes;

/// Tiers above the last one, at most.
pub const MAX_FAST: usize = 7;

/// Rows at most: the bytes of each tier, and a token's time.
pub const MAX_ROWS: usize = MAX_FAST + 2;

/// Units per second of time, where it is limited as bytes are.
pub const TICKS_PER_S: f64 = 1e12;

/// Experts in flight beyond those of one token that staging has room for.
const SPARE_STAGING_EXPERTS: u32 = 2;

/// Bytes of pages that an expert's slices touch beyond their own: two pages for each of three
/// slices.
const MAX_PAGE_PADDING_BYTES: u64 = 6 * 4096;

/// Smallest and largest share of a budget that page padding takes.
const PAGE_SHARE_RANGE: [f64; 2] = [0.005, 0.03];

/// The tiers with what every plan needs set aside.
#[derive(Debug, Clone, PartialEq)]
pub struct Capacity {
    /// Fastest first. The last one has the backing copies of what is not pinned.
    pub tiers: PerTier<Tier>,
    /// Bytes that a plan may use.
    pub budget_bytes: PerTier<u64>,
    /// `[rows]` bytes left for dense groups, pins, slots and backing copies. With a target, the
    /// time left for them follows, in units of [`TICKS_PER_S`].
    pub left_bytes: Vec<u64>,
    /// Tier of the KV cache of layers that have theirs on no real GPU.
    pub kv_tier: TierIdx,
    /// Bytes of the KV cache that are there in every plan: of layers that no real GPU may have.
    pub kv_bytes: u64,
    /// `[n_layer]` KV caches or recurrent states.
    pub caches: Vec<LayerCache>,
    /// Tier of the staging buffers.
    pub staging_tier: TierIdx,
    /// Experts that the staging buffers hold.
    pub staging_experts: u32,
    /// Bytes of the staging buffers.
    pub staging_bytes: u64,
    /// Parts that no GPU can run, by layer; none on a machine without a real GPU.
    pub cpu_only: BTreeSet<(Part, Option<u32>)>,
    /// Parts that a GPU can run only together.
    pub together: BTreeSet<(Part, Option<u32>)>,
    /// The GPU that has all of these; without one, no GPU has any.
    pub together_on: Option<TierIdx>,
    /// Whether experts on the last tier compute in place, so that nothing is staged.
    pub in_place: bool,
}

impl Capacity {
    /// Returns the last tier, which has the backing copies.
    pub fn home(&self) -> TierIdx {
        TierIdx::new(self.fast())
    }

    /// Returns the number of fast tiers: all but the last.
    pub fn fast(&self) -> usize {
        self.tiers.len() - 1
    }

    /// Returns the worth of the bytes left of all tiers, in seconds.
    pub fn priced_left(&self, price: &[f64]) -> f64 {
        price
            .iter()
            .zip(&self.left_bytes)
            .map(|(p, &left)| p * left as f64)
            .sum()
    }

    /// Returns the tiers that compute.
    pub fn computing_tiers(&self) -> impl Iterator<Item = TierIdx> + '_ {
        self.tiers
            .indices()
            .filter(|&t| self.tiers[t].kind != TierKind::Nvme)
    }

    /// Returns the places that can hold a dense group, by tier.
    ///
    /// A dense group computes where it is held. A token reads so little of the embedding that it
    /// may stay in the file. Attention on a real GPU has its KV cache there, or leaves it to the CPU;
    /// other attention has it in memory of the host.
    pub fn dense_places(&self, group: &DenseShape) -> impl Iterator<Item = DensePlace> + '_ {
        let may_stay_in_file = group.kind.is_named_by_tokens();
        let cache = (group.kind == DenseKind::Attention).then(|| {
            group
                .layer
                .and_then(|layer| self.caches.get(layer as usize))
        });
        let on_host = !self.tiers[self.kv_tier].is_gpu();
        let has_cache = move |DensePlace { tier: t, host_kv }: &DensePlace| match cache {
            None => !host_kv,
            Some(cache) if *host_kv => on_host && cache.is_some_and(|c| c.apart.contains(t)),
            Some(cache) if self.tiers[*t].is_gpu() => cache.is_some_and(|c| c.gpus.contains(t)),
            Some(_) => on_host,
        };
        let computes = move |t: TierIdx| may_stay_in_file || self.tiers[t].kind != TierKind::Nvme;
        let part = (Part::Dense(group.kind), group.layer);
        let tiers = self.tiers.indices();
        let tiers = tiers.filter(move |&t| computes(t) && self.runs(part, t));
        let places = tiers.flat_map(|tier| {
            let place = |host_kv| DensePlace { tier, host_kv };
            [false, true].map(place)
        });
        places.filter(has_cache)
    }

    /// Whether a part of a layer, or of the model, runs on a tier: it does unless that is a real GPU
    /// which can't, or it is one of several that are together elsewhere.
    pub fn runs(&self, part: (Part, Option<u32>), tier: TierIdx) -> bool {
        let is_gpu = self.tiers[tier].is_gpu();
        if self.together.contains(&part) && (is_gpu || self.together_on.is_some()) {
            return self.together_on == Some(tier) && !self.cpu_only.contains(&part);
        }
        !is_gpu || !self.cpu_only.contains(&part)
    }

    /// Whether a layer's routed experts run on a tier.
    pub fn runs_experts(&self, layer: u32, tier: TierIdx) -> bool {
        self.runs((Part::Experts, Some(layer)), tier)
    }

    /// Returns `[tiers]` bytes that a dense group at a place takes, with the cache that moves with
    /// it.
    pub fn taken(&self, group: &DenseShape, place: DensePlace) -> Vec<u64> {
        let mut bytes = vec![0; self.tiers.len()];
        bytes[place.tier.get()] = group.bytes;
        if let Some((cache, cache_tier)) = self.moving_cache(group, place) {
            let sum = &mut bytes[cache_tier.get()];
            let held = if self.tiers[cache_tier].is_gpu() {
                cache.gpu_bytes
            } else {
                cache.bytes
            };
            *sum = sum.saturating_add(held);
        }
        bytes
    }

    /// Returns the tiers that can hold slots.
    ///
    /// Slots in VRAM in front of DRAM would be filled over a link whose rate the machine file does
    /// not have.
    pub fn slot_tiers(
        &self,
    ) -> impl DoubleEndedIterator<Item = TierIdx> + ExactSizeIterator + Clone + use<> {
        let has_slots = !matches!(
            self.tiers[self.home()].kind,
            TierKind::Dram | TierKind::Vram
        );
        TierIdx::first(if has_slots { self.fast() } else { 0 })
    }

    /// Sets aside what every plan needs, with the KV cache on the tier that is most likely the
    /// best.
    ///
    /// # Errors
    /// As [`per_kv_tier`](Self::per_kv_tier).
    pub fn new(problem: &Problem<'_>) -> Result<Self> {
        Ok(Self::per_kv_tier(problem, &Constraints::default())?.swap_remove(0))
    }

    /// Sets aside what every plan needs, once per tier that can have the KV cache. Where parts of the
    /// model are on a GPU only together, that is repeated for each GPU that may have them.
    ///
    /// The tier that is most likely the best comes first.
    ///
    /// # Errors
    /// Fails if the machine file makes no sense for planning, or the budgets cannot hold the dense
    /// groups, the cache, the staging buffers and a backing copy of every expert.
    pub fn per_kv_tier(problem: &Problem<'_>, constraints: &Constraints) -> Result<Vec<Self>> {
        let common = Self::without_cache(problem)?;
        let allows = |gpu| constraints.allows_together(problem.shape, problem.machine, gpu);
        if common.together.is_empty() {
            return common.with_caches(problem, constraints);
        }
        let mut all = if allows(None) {
            common.clone().with_caches(problem, constraints)
        } else {
            Ok(Vec::new())
        };
        let gpus = common.tiers.indices();
        let gpus = gpus.filter(|t| common.tiers[*t].is_gpu() && allows(Some(*t)));
        let mut first_error = None;
        for gpu in gpus {
            let together = Capacity {
                together_on: Some(gpu),
                ..common.clone()
            };
            match (&mut all, together.with_caches(problem, constraints)) {
                (Ok(all), Ok(more)) => all.extend(more),
                (Err(_), Ok(more)) => all = Ok(more),
                (_, Err(error)) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        match (all, first_error) {
            (Ok(all), Some(error)) if all.is_empty() => Err(error),
            (all, _) => all,
        }
    }

    /// Sets the KV cache aside, once per tier that can have it.
    fn with_caches(
        mut self,
        problem: &Problem<'_>,
        constraints: &Constraints,
    ) -> Result<Vec<Self>> {
        self.add_caches(problem, constraints)?;
        let common = self;
        let mut capacities = Vec::new();
        let mut first_error = None;
        for tier in common.cache_tiers(problem, constraints)? {
            let mut capacity = common.clone();
            capacity.kv_tier = tier;
            capacity.left_bytes[tier.get()] -= capacity.kv_bytes;
            let checked = capacity.check_attention(problem, constraints);
            match checked.and_then(|()| capacity.check_sums(problem)) {
                Ok(()) => {
                    capacity.leave_for_pages(problem.shape);
                    capacities.push(capacity);
                }
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        match first_error {
            Some(error) if capacities.is_empty() => Err(error),
            _ => Ok(capacities),
        }
    }

    /// Checks the tiers and sets the staging buffers aside.
    ///
    /// Staging goes to DRAM, or without DRAM to the fastest host tier.
    fn without_cache(problem: &Problem<'_>) -> Result<Self> {
        let shape = problem.shape;
        let tiers = PerTier::from(problem.machine.computing_tiers());
        check_tiers(problem, &tiers)?;
        let home = tiers.len() - 1;
        let in_place = home_in_place(&tiers);
        let staging_tier = if in_place && home == 0 {
            TierIdx::FIRST
        } else {
            let find = |wanted: &dyn Fn(TierKind) -> bool| tiers.position(|t| wanted(t.kind));
            let far_memory = |kind| matches!(kind, TierKind::Cxl | TierKind::Pmem);
            find(&|kind| kind == TierKind::Dram)
                .or_else(|| find(&far_memory).filter(|t| t.get() < home))
                .unwrap_or(TierIdx::FIRST)
        };
        let largest = shape
            .experts
            .iter()
            .map(|e| e.expert_bytes)
            .max()
            .unwrap_or(0);
        let in_flight = shape
            .experts
            .iter()
            .map(|e| (e.n_used + SPARE_STAGING_EXPERTS).min(e.n_expert));
        let staging_experts = if in_place {
            0
        } else {
            in_flight.max().unwrap_or(0)
        };
        let mut capacity = Capacity {
            left_bytes: problem.budgets.clone(),
            budget_bytes: problem.budgets.clone().into(),
            kv_tier: staging_tier,
            kv_bytes: 0,
            caches: Vec::new(),
            staging_tier,
            staging_experts,
            staging_bytes: u64::from(staging_experts).saturating_mul(largest),
            in_place,
            cpu_only: cpu_only(shape, &tiers, false),
            together: cpu_only(shape, &tiers, true),
            together_on: None,
            tiers,
        };
        capacity.set_staging_aside(problem)?;
        Ok(capacity)
    }

    /// Keeps bytes free for page padding, where experts are read from a real drive.
    ///
    /// Slots and staging then have room for whole pages; without it every read is copied. Nothing
    /// is kept where all experts fit above the drive. Dense groups have no padding.
    fn leave_for_pages(&mut self, shape: &ModelShape) {
        let (home, fast) = (&self.tiers[self.home()], self.fast());
        let is_real_drive = home.kind == TierKind::Nvme && !home.emulated;
        let total = u128::from(shape.weight_bytes());
        let above: u128 = self.left_bytes[..fast]
            .iter()
            .map(|&left| u128::from(left))
            .sum();
        if !is_real_drive || above >= total {
            return;
        }
        let dense: u64 = shape.dense.iter().map(|d| d.bytes).sum();
        let dense = dense.saturating_add(self.moving_cache_bytes());
        let share = page_share(shape);
        for tier in 0..fast {
            let staging = if tier == self.staging_tier.get() {
                self.staging_bytes
            } else {
                0
            };
            let padded = self.left_bytes[tier].saturating_sub(dense) + staging;
            let padding = (padded as f64 * share) as u64;
            self.left_bytes[tier] -= padding.min(self.left_bytes[tier].saturating_sub(dense));
        }
    }

    fn set_staging_aside(&mut self, problem: &Problem<'_>) -> Result<()> {
        let staging = self.staging_tier;
        let left = self.left_bytes[staging.get()];
        let Some(after) = left.checked_sub(self.staging_bytes) else {
            bail!(
                "tier '{}' has a budget of {}, but buffers for {} experts in flight alone need {}; {}",
                self.tiers[staging].name,
                show_bytes(left),
                self.staging_experts,
                show_bytes(self.staging_bytes),
                hint(problem, staging, self.staging_bytes - left)
            );
        };
        self.left_bytes[staging.get()] = after;
        Ok(())
    }
}

/// Returns the parts that can't be on any of the tiers that are real GPUs, or, if `together`, only
/// together.
fn cpu_only(
    shape: &ModelShape,
    tiers: &PerTier<Tier>,
    together: bool,
) -> BTreeSet<(Part, Option<u32>)> {
    let has_gpu = tiers.iter().any(Tier::is_gpu);
    let parts = shape.cpu_only.iter().filter(|_| has_gpu);
    let parts = parts.filter(|only| only.is_together() == together);
    parts.map(|only| (only.part, only.layer)).collect()
}

/// Returns the share of a budget for experts that page padding takes: half a percent to three.
pub fn page_share(shape: &ModelShape) -> f64 {
    let least = shape
        .experts
        .iter()
        .map(|e| e.expert_bytes)
        .min()
        .unwrap_or(u64::MAX)
        .max(1);
    let padding = MAX_PAGE_PADDING_BYTES as f64 / least as f64;
    let [min, max] = PAGE_SHARE_RANGE;
    (padding / (1.0 + padding)).clamp(min, max)
}
