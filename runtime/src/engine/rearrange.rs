//! Another plan for a loaded model: pins and slots move while texts go on.

use super::Engine;
use crate::experts::rearrange::Rearranged;
use std::fmt;
use thiserror::Error;
use tier_plan_formats::placement::{
    LayerPlacement, PerTier, Placement, TierIdx, Violation, validate,
};

/// Why a loaded model can't be rearranged.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RearrangeError {
    /// Another rearrangement is under way.
    #[error("pins and slots are moving already")]
    UnderWay,
    /// The plan contradicts itself, or is for another model.
    #[error("plan '{plan}' does not fit the model: {violation}")]
    Plan {
        /// Name of the plan.
        plan: String,
        /// The first violation.
        violation: Box<Violation>,
    },
    /// The plan differs from the present one in more than pins and slots.
    #[error("plan '{plan}' has another {what}; only pins and slots can move in a loaded model")]
    Other {
        /// Name of the plan.
        plan: String,
        /// What differs.
        what: &'static str,
    },
    /// The plan has more pins, or another number of slots, of a layer on a GPU, or fewer pins where the
    /// GPU has the whole model.
    #[error(
        "plan '{plan}' has {wanted} of layer {layer} on tier '{tier}', where the loaded model has {held}; a GPU has no room \
         for more pins of a layer, and keeps its slots, and all pins of a model that is fully on it"
    )]
    Gpu {
        /// Name of the plan.
        plan: String,
        /// The layer.
        layer: u32,
        /// Name of the tier.
        tier: String,
        /// The plan's pins and slots.
        wanted: OnGpu,
        /// Those that there is room for.
        held: OnGpu,
    },
    /// All experts compute where the file is mapped, and no tier has memory for them.
    #[error("all of the model is on one tier, so there is nowhere to move experts to")]
    OneTier,
    /// The plan wants more memory for experts than the present one.
    #[error(
        "plan '{plan}' has {wanted} bytes of pins and slots on tier '{tier}', where the loaded model has {held}"
    )]
    Memory {
        /// Name of the plan.
        plan: String,
        /// Name of the tier.
        tier: String,
        /// Bytes of the plan's pins and slots.
        wanted: u64,
        /// Bytes of those that are there.
        held: u64,
    },
    /// An expert would be read from the model's file into buffers made for a packed copy without it.
    #[error(
        "the packed copy of the experts lacks expert {expert} of layer {layer}, which the plan does not pin"
    )]
    Pack {
        /// The expert.
        expert: u32,
        /// Its layer.
        layer: u32,
    },
}

/// What a layer has on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnGpu {
    /// Pinned experts.
    pub pins: usize,
    /// Slots.
    pub slots: u32,
}

impl OnGpu {
    fn of(placed: &LayerPlacement, tier: TierIdx) -> Self {
        let pins = placed.pinned.iter().filter(|pins| pins.tier == tier);
        Self {
            pins: pins.map(|pins| pins.experts.len()).sum(),
            slots: match placed.slot_tier == tier {
                true => placed.slots,
                false => 0,
            },
        }
    }
}

impl fmt::Display for OnGpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pins and {} slots", self.pins, self.slots)
    }
}

/// Where pins and slots are moving to, and what became of it.
#[derive(Default)]
pub(super) struct Rearrangement {
    /// The plan, while they move.
    to: Option<Box<Placement>>,
    /// What has become of the last plan.
    ended: Option<Rearranged>,
    /// Bytes of pins and slots by tier, as the model was loaded.
    loaded_bytes: Option<PerTier<u64>>,
}

impl Engine {
    /// Begins to move pins and slots to where a plan has them, beside the steps to come. Every step
    /// goes on with it for a few milliseconds, and so does
    /// [`continue_rearranging`](Self::continue_rearranging).
    ///
    /// Where no expert is on a GPU, no token depends on it; a GPU rounds otherwise than the CPU. Until an
    /// expert's bytes are at its new place, it counts as one of the slow tier. On a GPU, it is copied
    /// over an expert of its layer that leaves. [`plan`](Self::plan) has what is in place at the moment,
    /// and the plan's name and prediction once all of it is. Where holes in memory are too small even
    /// after buffers have been slid together, some pins or slots are left out.
    ///
    /// # Errors
    /// When the plan differs in more than pins and slots, or wants more memory for experts than the
    /// present one has, on a GPU for the experts of any layer; when a rearrangement is under way.
    pub fn rearrange(&mut self, plan: Placement) -> Result<(), RearrangeError> {
        self.check_rearrangement(&plan)?;
        self.rearrangement.loaded_bytes = Some(self.bytes_for_experts());
        self.experts.store.rearrange(&plan.layers);
        self.rearrangement.to = Some(Box::new(plan));
        self.note_arrangement();
        Ok(())
    }

    /// Goes on with what [`rearrange`](Self::rearrange) began, where no step does. Returns what has
    /// become of it when it ends.
    pub fn continue_rearranging(&mut self) -> Option<Rearranged> {
        let before = self.experts.store.rearranging()?;
        let ended = self.experts.store.continue_rearranging();
        if ended.is_some() || self.experts.store.rearranging() != Some(before) {
            self.note_arrangement();
        }
        let ended = ended?;
        if let Some(wanted) = self.rearrangement.to.take() {
            let Placement {
                name,
                profile,
                solver,
                predicted,
                ..
            } = *wanted;
            self.plan.name = name;
            self.plan.profile = profile;
            self.plan.solver = solver;
            self.plan.predicted = predicted;
        }
        self.rearrangement.ended = Some(ended);
        Some(ended)
    }

    /// Returns how far a rearrangement is, if one is under way.
    pub fn rearranging(&self) -> Option<Rearranged> {
        self.experts.store.rearranging()
    }

    /// Returns what has become of the last rearrangement that ended.
    pub fn rearranged(&self) -> Option<Rearranged> {
        self.rearrangement.ended
    }

    /// Returns the bytes by tier that a plan may have for pins and slots together.
    pub fn bytes_for_experts(&self) -> PerTier<u64> {
        let loaded = self.rearrangement.loaded_bytes.clone();
        loaded.unwrap_or_else(|| {
            let bytes = self
                .plan
                .tiers
                .iter()
                .map(|t| t.bytes.pinned + t.bytes.slots);
            bytes.collect()
        })
    }

    /// Makes the plan say where experts are now.
    fn note_arrangement(&mut self) {
        let padding = self.experts.store.padding_bytes();
        let arrangement = self.experts.store.arrangement();
        for (placed, now) in self.plan.layers.iter_mut().zip(arrangement) {
            (placed.pinned, placed.slots, placed.slot_tier) = (now.pins, now.slots, now.slot_tier);
            placed.policy = now.policy;
        }
        self.plan.fill_sums(self.model.shape());
        let tiers = self.plan.tiers.enumerate();
        for (tier, planned) in tiers {
            self.memory.resident_bytes[tier] = planned.used_bytes();
        }
        for (tier, bytes) in self.memory.padding_bytes.iter_mut().enumerate() {
            *bytes = padding.get(tier).copied().unwrap_or(0);
        }
    }

    fn check_rearrangement(&self, plan: &Placement) -> Result<(), RearrangeError> {
        if self.experts.store.rearranging().is_some() {
            return Err(RearrangeError::UnderWay);
        }
        if let Some(violation) = validate(plan, self.model.shape()).into_iter().next() {
            return Err(RearrangeError::Plan {
                plan: plan.name.clone(),
                violation: Box::new(violation),
            });
        }
        if let Some(what) = other_than_experts(&self.plan, plan) {
            return Err(RearrangeError::Other {
                plan: plan.name.clone(),
                what,
            });
        }
        self.check_gpus(plan)?;
        if !self.experts.store.has_files() && !self.experts.store.has_experts_on_gpus() {
            return Err(RearrangeError::OneTier);
        }
        for (held, planned) in self.bytes_for_experts().into_iter().zip(&plan.tiers) {
            let wanted = planned.bytes.pinned + planned.bytes.slots;
            if wanted > held {
                return Err(RearrangeError::Memory {
                    plan: plan.name.clone(),
                    tier: planned.tier.name.clone(),
                    wanted,
                    held,
                });
            }
        }
        match self.experts.store.too_large(&plan.layers) {
            Some((at, expert)) => Err(RearrangeError::Pack {
                expert,
                layer: plan.layers.get(at).map_or(0, |placed| placed.layer),
            }),
            None => Ok(()),
        }
    }

    fn check_gpus(&self, plan: &Placement) -> Result<(), RearrangeError> {
        let is_gpu = |tier: &TierIdx| self.plan.tiers[*tier].tier.is_gpu();
        for tier in self.plan.tiers.indices().filter(is_gpu) {
            let layers = self.plan.layers.iter().zip(&plan.layers);
            for (at, (placed, other)) in layers.enumerate() {
                let [mut held, wanted] = [placed, other].map(|placed| OnGpu::of(placed, tier));
                held.pins = self.experts.store.places_on_gpu(at, tier);
                let lacks_some = wanted.pins < held.pins && self.fully_on_gpu == Some(tier);
                if wanted.slots != held.slots || wanted.pins > held.pins || lacks_some {
                    return Err(RearrangeError::Gpu {
                        plan: plan.name.clone(),
                        layer: other.layer,
                        tier: plan.tiers[tier].tier.name.clone(),
                        wanted,
                        held,
                    });
                }
            }
        }
        Ok(())
    }
}

/// Returns what two plans differ in beside pins, slots, and what they say of themselves.
fn other_than_experts(a: &Placement, b: &Placement) -> Option<&'static str> {
    let tiers = |plan: &Placement| -> Vec<_> {
        let tiers = plan.tiers.iter().map(|t| &t.tier);
        tiers
            .map(|t| (t.name.clone(), t.kind, t.emulated))
            .collect()
    };
    let dense = |plan: &Placement| {
        let mut dense = plan.dense.clone();
        dense.sort_by_key(|group| (group.kind, group.layer));
        dense
    };
    let cache = |plan: &Placement| {
        let (tier, layers) = (plan.kv_tier, plan.host_kv.clone());
        (tier, layers, plan.kv_type, plan.room())
    };
    let staging = |plan: &Placement| (plan.staging_tier, plan.staging_experts);
    [
        ("model", a.model == b.model),
        ("set of tiers", tiers(a) == tiers(b)),
        ("place of dense tensors", dense(a) == dense(b)),
        ("KV cache", cache(a) == cache(b)),
        ("staging", staging(a) == staging(b)),
        ("streaming", a.streaming == b.streaming),
    ]
    .into_iter()
    .find_map(|(what, is_equal)| (!is_equal).then_some(what))
}
