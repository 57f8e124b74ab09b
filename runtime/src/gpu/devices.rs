//! The devices behind a plan's tiers: each real VRAM tier that holds bytes is one GPU.

use crate::error::LoadError;
use std::sync::Arc;
use tier_plan_cuda::{CudaError, Device, Gpu};
use tier_plan_formats::placement::{PerTier, Placement, TierIdx};

/// Opens the GPU with an ordinal, from 0. Tests return the GPU emulator.
pub type GiveDevice<'a> = &'a dyn Fn(usize) -> Result<Arc<dyn Device>, CudaError>;

/// The GPUs of a plan, by tier.
#[derive(Debug, Clone, Default)]
pub(crate) struct Devices {
    by_tier: PerTier<Option<Arc<dyn Device>>>,
}

impl Devices {
    /// Opens the GPU of each real VRAM tier that holds bytes. Its ordinal is the one that the tier
    /// names, or else the tier's index among the plan's real VRAM tiers, with or without bytes.
    ///
    /// # Errors
    /// When a GPU is missing, or can't be used.
    pub(crate) fn open(plan: &Placement, give: Option<GiveDevice<'_>>) -> Result<Self, LoadError> {
        let mut index = 0;
        let mut by_tier = Vec::with_capacity(plan.tiers.len());
        for t in &plan.tiers {
            let ordinal = t.tier.device().map_or(index, |device| device as usize);
            let opened = t.uses_gpu().then(|| match give {
                Some(give) => give(ordinal),
                None => Gpu::open(ordinal).map(|gpu| gpu as Arc<dyn Device>),
            });
            by_tier.push(opened.transpose().map_err(|source| LoadError::Gpu {
                plan: plan.name.clone(),
                source,
            })?);
            index += usize::from(t.tier.is_gpu());
        }
        Ok(Self {
            by_tier: by_tier.into(),
        })
    }

    /// Returns the device of a tier.
    pub(crate) fn of(&self, tier: TierIdx) -> Option<&Arc<dyn Device>> {
        self.by_tier.get(tier).and_then(Option::as_ref)
    }

    /// Returns every device with its tier.
    pub(crate) fn all(&self) -> impl Iterator<Item = (TierIdx, &Arc<dyn Device>)> {
        self.by_tier
            .enumerate()
            .filter_map(|(tier, device)| device.as_ref().map(|device| (tier, device)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plans::in_memory::all_in_memory;
    use std::cell::RefCell;
    use std::path::Path;
    use tier_plan_cuda::shim;
    use tier_plan_formats::gguf::Gguf;
    use tier_plan_formats::machine::TierKind;
    use tier_plan_formats::model::kv::KvType;
    use tier_plan_formats::model::{describe, shape::shape_of};
    use tier_plan_formats::placement::TierBytes;

    #[test]
    fn the_ordinal_of_a_gpu_is_that_of_its_tier_among_gpus() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch/qwen3moe.gguf");
        let gguf = Gguf::open(&path).unwrap();
        let mut plan = all_in_memory(&shape_of(&gguf, &describe(&gguf).unwrap()), 8, KvType::F16);
        let vram = |emulated, pinned_bytes| {
            let mut t = plan.tiers[TierIdx::FIRST].clone();
            (t.tier.kind, t.tier.emulated) = (TierKind::Vram, emulated);
            t.bytes = TierBytes {
                pinned: pinned_bytes,
                ..TierBytes::default()
            };
            t
        };
        let tiers = [
            vram(false, 0),
            vram(true, 5),
            vram(false, 7),
            vram(false, 1),
        ];
        plan.tiers = tiers.into_iter().chain(plan.tiers.clone()).collect();
        let asked = RefCell::new(Vec::new());
        let give = |number| {
            asked.borrow_mut().push(number);
            Ok(shim::shared() as Arc<dyn Device>)
        };
        let devices = Devices::open(&plan, Some(&give)).unwrap();
        assert_eq!(*asked.borrow(), [1, 2]);
        asked.borrow_mut().clear();
        plan.tiers[TierIdx::new(2)].tier.unit = Some(5);
        Devices::open(&plan, Some(&give)).unwrap();
        assert_eq!(*asked.borrow(), [5, 2]);
        assert_eq!(
            devices.all().map(|(tier, _)| tier).collect::<Vec<_>>(),
            [2, 3].map(TierIdx::new)
        );
        let has_device = |tier| devices.of(TierIdx::new(tier)).is_some();
        assert!(!has_device(0) && has_device(2) && !has_device(99));
    }
}
