//! The layers' KV caches: which real GPUs may have them, which tiers the rest, and what they take.

use super::{Capacity, Problem};
use crate::solve::problem::constraints::Constraints;
use crate::solve::problem::draft::DensePlace;
use anyhow::Result;
use tier_plan_runtime::formats::machine::Tier;
use tier_plan_runtime::formats::placement::{PerTier, TierIdx, attention_s};
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::{CacheShape, DenseKind, DenseShape};

/// A layer's KV cache, or its recurrent state.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerCache {
    /// Bytes of the planned context in memory of the host.
    pub bytes: u64,
    /// Bytes on a GPU, where a layer with a window holds all positions.
    pub gpu_bytes: u64,
    /// Seconds of a decoded token with the cache there.
    pub seconds: PerTier<f64>,
    /// Real GPUs that may have the layer's attention, and with it the cache.
    pub gpus: Vec<TierIdx>,
    /// Real GPUs that may have the layer's attention without the cache.
    pub apart: Vec<TierIdx>,
}

impl Capacity {
    /// Whether a layer's KV cache may be on the host though its attention is on a GPU. Keys and values
    /// that several layers read stay together, even if a shape does not say which layers those are.
    pub(super) fn can_be_apart(&self, cache: &CacheShape, layer: Option<u32>) -> bool {
        let attention = (Part::Dense(DenseKind::Attention), layer);
        cache.can_be_apart() && !self.together.contains(&attention)
    }

    /// Returns the KV cache that moves with a dense group, and its tier when the group is at
    /// `place`.
    pub fn moving_cache(
        &self,
        group: &DenseShape,
        place: DensePlace,
    ) -> Option<(&LayerCache, TierIdx)> {
        let layer = group.layer.filter(|_| group.kind == DenseKind::Attention)?;
        let cache = self
            .caches
            .get(layer as usize)
            .filter(|c| !c.gpus.is_empty())?;
        Some((
            cache,
            if self.tiers[place.tier].is_gpu() && !place.host_kv {
                place.tier
            } else {
                self.kv_tier
            },
        ))
    }

    /// Returns the bytes of the KV cache that move with attention, wherever they take most.
    pub fn moving_cache_bytes(&self) -> u64 {
        let moving = self.caches.iter().filter(|c| !c.gpus.is_empty());
        moving.fold(0, |sum, cache| {
            sum.saturating_add(cache.bytes.max(cache.gpu_bytes))
        })
    }

    /// Returns the seconds of a decoded token's attention to the cache that is set aside.
    pub fn kv_s(&self) -> f64 {
        self.caches
            .iter()
            .filter(|c| c.gpus.is_empty())
            .map(|c| c.seconds[self.kv_tier])
            .sum()
    }

    /// Adds the layers' KV caches with the real GPUs that may have them.
    ///
    /// A GPU may if it has room for the layer's attention too, and kernels for it. A cache that no
    /// GPU may have is set aside.
    pub(super) fn add_caches(
        &mut self,
        problem: &Problem<'_>,
        constraints: &Constraints,
    ) -> Result<()> {
        let Problem {
            shape,
            machine,
            kv_type,
            ..
        } = *problem;
        let (rates, position) = (machine.prompt_gflops(), problem.position().into());
        let mut attention = vec![None; shape.caches.len()];
        for group in shape
            .dense
            .iter()
            .filter(|d| d.kind == DenseKind::Attention)
        {
            if let Some(of_layer) = group
                .layer
                .and_then(|layer| attention.get_mut(layer as usize))
            {
                *of_layer = Some(group);
            }
        }
        for (cache, group) in shape.caches.iter().zip(attention) {
            let seconds = |(t, tier): (TierIdx, &Tier)| {
                let gflops = rates.get(t).copied().unwrap_or(0.0);
                attention_s(cache, kv_type, tier, gflops, position)
            };
            let bytes = cache.bytes(kv_type, problem.room());
            let gpu_bytes = cache.bytes(kv_type, problem.room().whole());
            // With the bytes of a cache, or without any.
            let may_have = |t: &TierIdx, cached: u64| {
                let fits =
                    |g: &DenseShape| g.bytes.saturating_add(cached) <= self.left_bytes[t.get()];
                let runs = |g: &DenseShape| self.runs((Part::Dense(g.kind), g.layer), *t);
                self.tiers[*t].is_gpu() && group.is_some_and(|g| fits(g) && runs(g))
            };
            let layer = group.and_then(|g| g.layer);
            let allows = |t: &TierIdx| constraints.allows_attention(layer, *t);
            let with_cache = |t: &TierIdx| may_have(t, gpu_bytes) && allows(t);
            let gpus: Vec<TierIdx> = self.tiers.indices().filter(with_cache).collect();
            let can_be_apart = self.can_be_apart(cache, layer);
            let allows = |t: &TierIdx| constraints.allows_host_kv(layer, *t);
            let without = |t: &TierIdx| can_be_apart && may_have(t, 0) && allows(t);
            let apart = self.tiers.indices().filter(without).collect();
            if gpus.is_empty() {
                self.kv_bytes = self.kv_bytes.saturating_add(bytes);
            }
            let seconds = self.tiers.enumerate().map(seconds).collect();
            self.caches.push(LayerCache {
                bytes,
                gpu_bytes,
                seconds,
                gpus,
                apart,
            });
        }
        self.check_fixed_cache(problem, constraints)
    }

    /// Returns the tiers that the cache of layers on no real GPU can be on.
    ///
    /// A token reads about half of the planned context: less of a byte than of dense weights, more
    /// than of most experts. So the fastest tier that has room for both comes first. Where no such
    /// tier is left, a real GPU stands for it: GPUs then have all attention.
    pub(super) fn cache_tiers(
        &self,
        problem: &Problem<'_>,
        constraints: &Constraints,
    ) -> Result<Vec<TierIdx>> {
        let staging = self.staging_tier;
        let fits = |t: &TierIdx| self.left_bytes[t.get()] >= self.kv_bytes;
        let in_memory = problem
            .shape
            .dense
            .iter()
            .filter(|d| !d.kind.is_named_by_tokens());
        let with_dense = in_memory
            .map(|d| d.bytes)
            .fold(self.kv_bytes, u64::saturating_add);
        let may_have = |t: &TierIdx| !self.tiers[*t].is_gpu() && constraints.allows_cache(*t);
        let allowed = || self.computing_tiers().filter(may_have);
        let beside_dense = allowed().find(|&t| self.left_bytes[t.get()] >= with_dense);
        let on_staging = Some(staging).filter(may_have).filter(fits);
        let mut tiers: Vec<TierIdx> = Vec::new();
        for tier in beside_dense
            .into_iter()
            .chain(on_staging)
            .chain(allowed().filter(fits))
        {
            if !tiers.contains(&tier) {
                tiers.push(tier);
            }
        }
        let none_allowed = allowed().next().is_none();
        if tiers.is_empty() && none_allowed {
            let all_on_gpus =
                !self.caches.is_empty() && self.caches.iter().all(|c| !c.gpus.is_empty());
            tiers.extend(
                self.caches
                    .first()
                    .filter(|_| all_on_gpus)
                    .and_then(|c| c.gpus.first()),
            );
        }
        if tiers.is_empty() {
            self.refuse_cache(problem, constraints, none_allowed)?;
        }
        Ok(tiers)
    }
}
