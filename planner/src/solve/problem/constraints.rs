//! Constraints fixed or forbidden by hand: `--fix vram:experts:3-5:0-15`, `--forbid
//! nvme:embedding`.
//!
//! Each is `TIER:WHAT[:LAYERS[:EXPERTS]]`. WHAT is `attention`, `router`, `shared_expert`,
//! `dense_ffn`, `embedding`, `token_table`, `head`, `cache` (the KV cache; fixed to a real GPU, with all
//! attention), or `experts`. `TIER:LAYERS[:EXPERTS]` means experts. Without LAYERS it holds for all layers,
//! without EXPERTS for all experts of the layers.
//!
//! An expert fixed to the last tier is never pinned. Forbidding experts forbids pins and slots of
//! the layers there.

mod parse;

use crate::profile::{Evidence, LayerEvidence};
use anyhow::{Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::formats::placement::{
    DensePlacement, LayerPlacement, Pins, Placement, TierIdx,
};
use tier_plan_runtime::model::gpu::{CpuOnly, Part};
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// Constraints on one layer's experts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerConstraints {
    /// The tier that each of some experts is fixed to, by expert.
    pub fixed: BTreeMap<u32, TierIdx>,
    /// Tiers that hold no pins but of experts fixed there, and no slots but those that are settled.
    pub forbidden: BTreeSet<TierIdx>,
    /// The tier and the number of the layer's slots, where they are settled.
    pub slots: Option<(TierIdx, u32)>,
}

impl LayerConstraints {
    /// Returns constraints under which a layer has as many pins and slots on GPUs as it has in a plan. The
    /// experts that are used most are pinned there, and of those that are used alike, the ones that are
    /// there. On the fastest GPU are those that are used most; GPUs of one rate keep what they have.
    fn keeping(placed: &LayerPlacement, gpus: &[(TierIdx, f64)], used: &LayerEvidence) -> Self {
        let now: BTreeMap<u32, TierIdx> = placed
            .pinned
            .iter()
            .filter(|pins| gpus.iter().any(|(gpu, _)| *gpu == pins.tier))
            .flat_map(|pins| pins.experts.iter().map(|e| (*e, pins.tier)))
            .collect();
        let mut experts = used.order.clone();
        experts.sort_by(|a, b| {
            let share = |e: &u32| used.share.get(*e as usize).copied().unwrap_or(0.0);
            // Those on no GPU come last.
            let place = |e: &u32| now.get(e).map_or(usize::MAX, |gpu| gpu.get());
            let by_use = share(b).total_cmp(&share(a));
            by_use.then(place(a).cmp(&place(b)))
        });
        experts.truncate(now.len());
        let mut fixed = BTreeMap::new();
        let mut experts = experts.into_iter();
        for alike in gpus.chunk_by(|a, b| a.1 == b.1) {
            let is_here = |tier: &TierIdx| alike.iter().any(|(gpu, _)| gpu == tier);
            let n = now.values().filter(|tier| is_here(tier)).count();
            let come: Vec<u32> = experts.by_ref().take(n).collect();
            let stays = |e: &u32| now.get(e).filter(|tier| is_here(tier));
            fixed.extend(come.iter().filter_map(|e| Some((*e, *stays(e)?))));
            let mut moving = come.iter().filter(|e| stays(e).is_none());
            for (gpu, _) in alike {
                let on_gpu =
                    |of: &BTreeMap<u32, TierIdx>| of.values().filter(|t| *t == gpu).count();
                let n = on_gpu(&now).saturating_sub(on_gpu(&fixed));
                fixed.extend(moving.by_ref().take(n).map(|e| (*e, *gpu)));
            }
        }
        let slots_on_gpu = gpus.iter().any(|(gpu, _)| *gpu == placed.slot_tier);
        Self {
            fixed,
            forbidden: gpus.iter().map(|(gpu, _)| *gpu).collect(),
            slots: (placed.slots > 0 && slots_on_gpu).then_some((placed.slot_tier, placed.slots)),
        }
    }

    /// Whether nothing is fixed or forbidden.
    pub fn is_empty(&self) -> bool {
        self.leaves_experts_free() && self.forbidden.is_empty()
    }

    /// Whether no expert is fixed, and no slots are settled.
    pub fn leaves_experts_free(&self) -> bool {
        self.fixed.is_empty() && self.slots.is_none()
    }

    /// Whether a layer may have these slots.
    pub fn allows_slots(&self, tier: TierIdx, n: u32) -> bool {
        match self.slots {
            Some(settled) => settled == (tier, n),
            None => n == 0 || !self.forbidden.contains(&tier),
        }
    }

    /// Whether the placement of a layer keeps the constraints. `home` is the last tier.
    fn holds(&self, placed: &LayerPlacement, home: TierIdx) -> bool {
        let on = |pins: &Pins| {
            pins.experts
                .iter()
                .map(|e| (*e, pins.tier))
                .collect::<Vec<_>>()
        };
        let pinned: BTreeMap<u32, TierIdx> = placed.pinned.iter().flat_map(on).collect();
        let is_where_fixed = |(e, tier): (&u32, &TierIdx)| pinned.get(e).unwrap_or(&home) == tier;
        let may_be = |(e, tier): (&u32, &TierIdx)| {
            !self.forbidden.contains(tier) || self.fixed.get(e) == Some(tier)
        };
        self.fixed.iter().all(is_where_fixed)
            && pinned.iter().all(may_be)
            && self.allows_slots(placed.slot_tier, placed.slots)
    }
}

/// What is fixed and forbidden by hand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Constraints {
    dense_fixed: BTreeMap<(DenseKind, Option<u32>), TierIdx>,
    dense_forbidden: BTreeMap<(DenseKind, Option<u32>), BTreeSet<TierIdx>>,
    experts: BTreeMap<u32, LayerConstraints>,
    cache_fixed: Option<TierIdx>,
    cache_forbidden: BTreeSet<TierIdx>,
    /// The layers whose KV cache is off the GPU that has their attention, where that is settled.
    host_kv: Option<BTreeSet<u32>>,
}

impl Constraints {
    /// Returns constraints under which a plan for a loaded model differs from its present one in pins
    /// and slots alone. On GPUs a layer has as many as it has now: the experts that are used most are pinned
    /// there.
    pub fn keeping(plan: &Placement, evidence: &Evidence) -> Self {
        let dense = plan.dense.iter();
        let dense_fixed = dense.map(|d| ((d.kind, d.layer), d.tier)).collect();
        let is_gpu = |tier: &TierIdx| plan.tiers.get(*tier).is_some_and(|t| t.tier.is_gpu());
        let rate = |tier| (tier, plan.tiers[tier].tier.read_gbps);
        let gpus: Vec<(TierIdx, f64)> = plan.tiers.indices().filter(is_gpu).map(rate).collect();
        let attention = |d: &DensePlacement| d.kind == DenseKind::Attention && is_gpu(&d.tier);
        let on_gpus = |placed: &LayerPlacement| {
            let mut layers = evidence.layers.iter();
            let layer = layers.find(|layer| layer.shape.layer == placed.layer)?;
            let constraints = LayerConstraints::keeping(placed, &gpus, layer);
            Some((placed.layer, constraints))
        };
        let layers = plan.layers.iter().filter(|_| !gpus.is_empty());
        let experts = layers.filter_map(on_gpus).collect();
        // Where attention is on a GPU, its keys and values are there, or where the plan has them.
        let on_gpus = plan.dense.iter().any(attention);
        let others = plan.tiers.indices();
        let others = others.filter(|t| *t != plan.kv_tier && !is_gpu(t));
        Self {
            dense_fixed,
            experts,
            cache_fixed: (!on_gpus).then_some(plan.kv_tier),
            cache_forbidden: others.filter(|_| !is_gpu(&plan.kv_tier)).collect(),
            ..Self::default()
        }
        .settling_host_kv(plan.host_kv.iter().copied())
    }

    /// Settles which layers have their KV cache off the GPU that has their attention.
    pub(crate) fn settling_host_kv(mut self, layers: impl IntoIterator<Item = u32>) -> Self {
        self.host_kv = Some(layers.into_iter().collect());
        self
    }

    /// Whether nothing is fixed or forbidden.
    pub fn is_empty(&self) -> bool {
        *self == Constraints::default()
    }

    /// Refuses what is fixed to a GPU that can't run it.
    ///
    /// # Errors
    /// Names the part, the GPU, and the reason.
    pub fn check_gpus(&self, shape: &ModelShape, machine: &Machine) -> Result<()> {
        for only in shape.cpu_only.iter().filter(|only| !only.is_together()) {
            let fixed: BTreeSet<TierIdx> = match only.part {
                Part::Dense(kind) => {
                    let fixed = self.dense_fixed.get(&(kind, only.layer));
                    fixed.copied().into_iter().collect()
                }
                Part::Experts => {
                    let of_layer = only.layer.and_then(|layer| self.experts.get(&layer));
                    let fixed = of_layer.map(|layer| layer.fixed.values().copied());
                    fixed.into_iter().flatten().collect()
                }
            };
            let tiers = fixed.iter().filter_map(|t| machine.tiers.get(t.get()));
            if let Some(gpu) = tiers.into_iter().find(|tier| tier.is_gpu()) {
                let of = only
                    .layer
                    .map_or(String::new(), |layer| format!(" of layer {layer}"));
                bail!(
                    "--fix puts {}{of} on '{}', a GPU that can't run it: {}; leave it out",
                    only.part.name(),
                    gpu.name,
                    only.why
                );
            }
        }
        self.check_together(shape, machine)
    }

    /// Refuses what puts some parts on a GPU that it can run only together with others.
    fn check_together(&self, shape: &ModelShape, machine: &Machine) -> Result<()> {
        let together: Vec<&CpuOnly> = shape.cpu_only.iter().filter(|o| o.is_together()).collect();
        let tiers: Vec<TierIdx> = (0..machine.tiers.len()).map(TierIdx::new).collect();
        let is_gpu = |tier: &TierIdx| machine.tiers[tier.get()].is_gpu();
        let (gpus, others): (Vec<TierIdx>, Vec<TierIdx>) = tiers.into_iter().partition(is_gpu);
        let off_gpus = |only: &&&CpuOnly| !others.iter().any(|t| self.allows_part(only, *t, false));
        let Some(must) = together.iter().find(off_gpus) else {
            return Ok(());
        };
        let away = |gpu: &TierIdx| together.iter().find(|o| !self.allows_part(o, *gpu, true));
        let mut away = gpus.iter().map(away);
        let Some(Some(other)) = away
            .next()
            .filter(|first| first.is_some() && away.all(|a| a.is_some()))
        else {
            return Ok(());
        };
        let name = |only: &CpuOnly| {
            let of = only
                .layer
                .map_or(String::new(), |layer| format!(" of layer {layer}"));
            only.part.name().to_string() + &of
        };
        bail!(
            "--fix and --forbid have {} on a GPU and {} elsewhere, but the first has {}; constrain them alike",
            name(must),
            name(other),
            must.why
        )
    }

    /// Whether a part may be on a tier, which is a GPU or not.
    fn allows_part(&self, only: &CpuOnly, tier: TierIdx, is_gpu: bool) -> bool {
        match only.part {
            Part::Dense(DenseKind::Attention) if is_gpu => self.allows_attention(only.layer, tier),
            Part::Dense(kind) => self.allows(kind, only.layer, tier),
            Part::Experts => true,
        }
    }

    /// Whether the parts that a GPU can run only together may all be on this one, or, without one, on none.
    pub fn allows_together(
        &self,
        shape: &ModelShape,
        machine: &Machine,
        gpu: Option<TierIdx>,
    ) -> bool {
        let mut together = shape.cpu_only.iter().filter(|only| only.is_together());
        match gpu {
            Some(gpu) => together.all(|only| self.allows_part(only, gpu, true)),
            None => together.all(|only| {
                let mut others = machine
                    .tiers
                    .iter()
                    .enumerate()
                    .filter(|(_, t)| !t.is_gpu());
                others.any(|(at, _)| self.allows_part(only, TierIdx::new(at), false))
            }),
        }
    }

    /// Whether any expert is constrained.
    pub fn of_experts(&self) -> bool {
        !self.experts.is_empty()
    }

    /// Returns the constraints on a layer's experts.
    pub fn layer(&self, layer: u32) -> LayerConstraints {
        self.experts.get(&layer).cloned().unwrap_or_default()
    }

    /// Whether a dense group may be on a tier.
    pub fn allows(&self, kind: DenseKind, layer: Option<u32>, tier: TierIdx) -> bool {
        self.dense_fixed
            .get(&(kind, layer))
            .is_none_or(|&t| t == tier)
            && self
                .dense_forbidden
                .get(&(kind, layer))
                .is_none_or(|tiers| !tiers.contains(&tier))
    }

    /// Whether the KV cache may be on a tier.
    pub fn allows_cache(&self, tier: TierIdx) -> bool {
        self.cache_fixed.is_none_or(|t| t == tier) && !self.cache_forbidden.contains(&tier)
    }

    /// Whether a layer's attention may be on a real GPU, with its KV cache.
    pub fn allows_attention(&self, layer: Option<u32>, gpu: TierIdx) -> bool {
        self.allows(DenseKind::Attention, layer, gpu)
            && self.allows_cache(gpu)
            && self.has_host_kv(layer) != Some(true)
    }

    /// Whether a layer's attention may be on a real GPU, with its KV cache elsewhere.
    pub fn allows_host_kv(&self, layer: Option<u32>, gpu: TierIdx) -> bool {
        self.allows(DenseKind::Attention, layer, gpu) && self.has_host_kv(layer) != Some(false)
    }

    /// Whether a layer's KV cache is kept off the GPU that has its attention, where that is settled.
    fn has_host_kv(&self, layer: Option<u32>) -> Option<bool> {
        let settled = self.host_kv.as_ref()?;
        Some(layer.is_some_and(|layer| settled.contains(&layer)))
    }

    /// Returns the tier that the KV cache of all layers is fixed to.
    pub fn fixed_cache(&self) -> Option<TierIdx> {
        self.cache_fixed
    }

    /// Whether the KV cache is constrained.
    pub fn of_cache(&self) -> bool {
        self.cache_fixed.is_some() || !self.cache_forbidden.is_empty()
    }

    /// Whether a plan keeps the constraints.
    pub fn holds(&self, plan: &Placement) -> bool {
        let home = plan.home_tier();
        let attention = || plan.dense.iter().filter(|d| d.kind == DenseKind::Attention);
        let caches = attention().map(|d| plan.cache_tier(d));
        let rest = (attention().next().is_none()).then_some(plan.kv_tier);
        let settled = self.host_kv.as_ref();
        settled.is_none_or(|layers| layers.iter().eq(&plan.host_kv))
            && caches.chain(rest).all(|t| self.allows_cache(t))
            && plan
                .dense
                .iter()
                .all(|d| self.allows(d.kind, d.layer, d.tier))
            && plan
                .layers
                .iter()
                .all(|placed| self.layer(placed.layer).holds(placed, home))
    }
}
