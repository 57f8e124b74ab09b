//! Pins of a layer that come and go while it is in use.

use super::ids::{ExpertId, SlotId};
use super::layer::{ExpertBacking, LayerExperts, Layout, Part};
use crate::tiers::arena::ArenaSlice;
use std::collections::BTreeMap;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::placement::{Pins, TierIdx};

impl LayerExperts {
    /// Returns the buffer of the slot in main memory that has an expert, if one does.
    pub(super) fn slot_with(&self, expert: ExpertId) -> Option<&ArenaSlice> {
        let slot = SlotId::new(self.cache.slot(expert.get())?);
        self.slots.get(slot.index())?.as_ref()
    }

    /// Makes the buffer of an expert's slot its backing. The slot is empty then, and has no buffer.
    pub(super) fn pin_in_slot(&mut self, expert: ExpertId) {
        let slot = self.cache.slot(expert.get()).map(SlotId::new);
        let Some(bytes) = slot.and_then(|slot| self.slots[slot.index()].take()) else {
            return;
        };
        self.cache.forget(expert.get());
        self.backings[expert.index()] = ExpertBacking::Pinned {
            tier: self.slot_tier,
            bytes,
            layout: self.layout,
        };
    }

    /// Returns pinned experts that are not packed.
    pub(super) fn loose_pins(&self) -> Vec<ExpertId> {
        let loose = self.backings.iter().enumerate().filter(|(_, backing)| {
            matches!(backing, ExpertBacking::Pinned { layout, .. } if *layout != Layout::Packed)
        });
        loose.map(|(e, _)| ExpertId::new(e as u32)).collect()
    }

    /// Packs a pinned expert within its memory, and returns what that leaves, with its tier.
    pub(super) fn pack_pin(
        &mut self,
        gguf: &Gguf,
        expert: ExpertId,
    ) -> Option<(TierIdx, ArenaSlice)> {
        let backing = self.backings.get(expert.index())?;
        let &ExpertBacking::Pinned { tier, layout, .. } = backing else {
            return None;
        };
        let mut bytes = self.unpin(expert)?;
        // No part lies before its packed place, so none overwrites one that comes later.
        for part in &self.parts {
            let from = self.slice_location(gguf, part, expert.index(), layout);
            let from = from.buffer_offset;
            bytes.copy_within(from..from + part.slice_bytes, part.packed_offset);
        }
        let (bytes, rest) = bytes.restored().split(self.expert_bytes);
        self.pin(expert.index(), tier, bytes);
        Some((tier, rest))
    }

    /// Returns the bytes that pinned experts take beyond their own, with their tiers.
    pub(super) fn pin_padding(&self) -> impl Iterator<Item = (TierIdx, usize)> {
        self.backings.iter().filter_map(|backing| match backing {
            ExpertBacking::Pinned { tier, layout, .. } => {
                Some((*tier, self.buffer_bytes(*layout) - self.expert_bytes))
            }
            _ => None,
        })
    }

    /// Makes a pinned expert one of those on the slow tier, and returns its memory. Has no effect on
    /// others.
    pub(super) fn unpin(&mut self, expert: ExpertId) -> Option<ArenaSlice> {
        let backing = self.backings.get_mut(expert.index())?;
        if !matches!(backing, ExpertBacking::Pinned { .. }) {
            return None;
        }
        match std::mem::replace(backing, ExpertBacking::Pooled) {
            ExpertBacking::Pinned { bytes, .. } => Some(bytes),
            _ => None,
        }
    }

    /// Makes the GPU of a tier the backing of an expert. Returns the memory of the pin that it was, with
    /// the memory's tier, if it was one.
    pub(super) fn move_to_gpu(
        &mut self,
        expert: ExpertId,
        tier: TierIdx,
    ) -> Option<(TierIdx, ArenaSlice)> {
        self.cache.forget(expert.get());
        let backing = self.backings.get_mut(expert.index())?;
        match std::mem::replace(backing, ExpertBacking::Gpu(tier)) {
            ExpertBacking::Pinned { tier, bytes, .. } => Some((tier, bytes)),
            _ => None,
        }
    }

    /// Makes an expert on the GPU of a tier one of those on the slow tier. Returns whether it was there.
    pub(super) fn leave_gpu(&mut self, expert: ExpertId, tier: TierIdx) -> bool {
        let backing = self.backings.get_mut(expert.index());
        match backing.filter(|b| matches!(b, ExpertBacking::Gpu(at) if *at == tier)) {
            Some(backing) => {
                *backing = ExpertBacking::Pooled;
                true
            }
            None => false,
        }
    }

    /// Returns those of these experts that are not pinned on their tier and can be.
    pub(super) fn not_on_tier(&self, pins: &Pins) -> impl Iterator<Item = ExpertId> {
        let experts = pins.experts.iter().copied().map(ExpertId::new);
        experts.filter(move |expert| match self.backings.get(expert.index()) {
            Some(ExpertBacking::Pinned { tier, .. }) => *tier != pins.tier,
            Some(ExpertBacking::Mapped | ExpertBacking::Pooled) => true,
            Some(ExpertBacking::Gpu(tier)) => *tier != pins.tier,
            None => false,
        })
    }

    /// Returns the memory of a pinned expert.
    pub(super) fn pinned_mut(&mut self, expert: ExpertId) -> Option<&mut ArenaSlice> {
        match self.backings.get_mut(expert.index()) {
            Some(ExpertBacking::Pinned { bytes, .. }) => Some(bytes),
            _ => None,
        }
    }

    /// Returns whether a buffer of the layer has room for what is read of an expert on the slow
    /// tier. A packed copy that leaves the expert out makes buffers too small for the pages around
    /// its matrices.
    pub(super) fn has_room_for(&self, gguf: &Gguf, expert: ExpertId) -> bool {
        let pages = |part: &Part| part.extent(gguf, expert.index()).pages_bytes();
        self.layout == Layout::Packed
            || self.extent_in_copy(expert.index()).is_some()
            || self.parts.iter().map(pages).sum::<usize>() <= self.paged_bytes
    }

    /// Returns the pinned experts by tier, ascending.
    pub(super) fn pins(&self) -> Vec<Pins> {
        let mut pins = BTreeMap::<usize, Vec<u32>>::new();
        for (expert, backing) in self.backings.iter().enumerate() {
            if let ExpertBacking::Pinned { tier, .. } | ExpertBacking::Gpu(tier) = backing {
                pins.entry(tier.get()).or_default().push(expert as u32);
            }
        }
        pins.into_iter()
            .map(|(tier, experts)| Pins {
                tier: TierIdx::new(tier),
                experts,
            })
            .collect()
    }
}
