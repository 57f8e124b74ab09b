//! Room for what waits for memory: pins are packed, and buffers slide into the holes before them.

use super::ExpertStore;
use crate::experts::ids::{ExpertId, LayerExpert, SlotId};
use crate::experts::layer::ExpertBacking;
use crate::tiers::arena::ArenaSlice;
use crate::tiers::holes::skipped;
use std::collections::BTreeSet;
use tier_plan_formats::placement::TierIdx;

/// What has a buffer that can be moved.
#[derive(Debug, Clone, Copy)]
enum Owner {
    Pin(LayerExpert),
    Slot(usize, SlotId),
    Staging(usize),
    Ready(usize),
}

impl ExpertStore {
    /// Packs pins that were slots, so that the room for whole pages around them becomes holes. Returns
    /// whether any was packed.
    pub(super) fn pack_pins(&mut self, left: &mut usize) -> bool {
        let mut has_packed = false;
        for layer in &mut self.layers {
            for expert in layer.loose_pins() {
                if *left == 0 {
                    return has_packed;
                }
                if let Some((tier, rest)) = layer.pack_pin(&self.gguf, expert) {
                    self.rearranger.free(tier, rest);
                    *left = left.saturating_sub(layer.expert_bytes());
                    has_packed = true;
                }
            }
        }
        has_packed
    }

    /// Slides buffers into the holes before them, on tiers where something waits for memory. Returns
    /// whether any has moved.
    pub(super) fn slide(&mut self, left: &mut usize) -> bool {
        let slots = self.rearranger.slots.iter();
        let slots = slots.map(|slots| self.layers[slots.layer].slot_tier);
        let pins = self.rearranger.pins.iter().map(|pin| pin.tier);
        let tiers: BTreeSet<TierIdx> = pins.chain(slots).collect();
        let mut owners = self.owners();
        owners.sort_unstable_by_key(|(address, _)| *address);
        let mut has_moved = false;
        for tier in tiers {
            for (address, owner) in &owners {
                if *left == 0 {
                    return has_moved;
                }
                let Some(hole) = self.rearranger.holes(tier).take_before(*address) else {
                    continue;
                };
                let moved = self.slide_into(tier, hole, *owner);
                has_moved |= moved > 0;
                *left = left.saturating_sub(moved);
            }
        }
        has_moved
    }

    /// Slides a buffer into the hole that ends where it begins. Returns the bytes of the buffer, or
    /// 0 if it stays.
    fn slide_into(&mut self, tier: TierIdx, hole: ArenaSlice, owner: Owner) -> usize {
        let align = match owner {
            Owner::Slot(layer, _) => self.layers[layer].alignment(),
            // Whole pages need it; else a gap would be lost in a tier that is full to the last byte.
            Owner::Staging(_) => self.layers.iter().map(|l| l.alignment()).max().unwrap_or(1),
            Owner::Pin(_) | Owner::Ready(_) => 1,
        };
        let skipped = skipped(hole.address(), align);
        let (nothing, hole) = hole.split(0);
        let Some(buffer) = self.lend(owner).filter(|_| skipped < hole.capacity()) else {
            self.rearranger.free(tier, hole);
            return 0;
        };
        let buffer = std::mem::replace(buffer, nothing);
        let (len, capacity, gap) = (buffer.len(), buffer.capacity(), hole.capacity());
        let (moved, buffer) = match hole.join(buffer.restored()) {
            Ok(mut whole) => {
                whole.copy_within(gap..gap + len, skipped);
                let (before, rest) = whole.split(skipped);
                let (buffer, after) = rest.split(capacity);
                self.rearranger.free(tier, before);
                self.rearranger.free(tier, after);
                (capacity, buffer)
            }
            // Neighbors in memory that are of two arenas.
            Err((hole, buffer)) => {
                self.rearranger.free(tier, hole);
                (0, buffer)
            }
        };
        if let Some(place) = self.lend(owner) {
            *place = buffer;
            place.truncate(len);
        }
        moved
    }

    /// Returns the addresses of all buffers that can be moved between two steps.
    fn owners(&self) -> Vec<(usize, Owner)> {
        let mut owners = Vec::new();
        for (layer, in_layer) in self.layers.iter().enumerate() {
            for expert in (0..in_layer.n_expert() as u32).map(ExpertId::new) {
                if let ExpertBacking::Pinned { bytes, .. } = in_layer.backing(expert) {
                    owners.push((bytes.address(), Owner::Pin(LayerExpert { layer, expert })));
                }
            }
            for (slot, bytes) in in_layer.slots.iter().enumerate() {
                let slot = SlotId::new(slot as u32);
                owners.extend(
                    bytes
                        .iter()
                        .map(|b| (b.address(), Owner::Slot(layer, slot))),
                );
            }
        }
        let staging = self.staging.iter().enumerate();
        owners.extend(staging.map(|(i, bytes)| (bytes.address(), Owner::Staging(i))));
        let ready = self.rearranger.ready.iter().enumerate();
        owners.extend(ready.map(|(i, (_, bytes))| (bytes.address(), Owner::Ready(i))));
        owners
    }

    /// Returns the buffer of an owner.
    fn lend(&mut self, owner: Owner) -> Option<&mut ArenaSlice> {
        match owner {
            Owner::Pin(LayerExpert { layer, expert }) => self.layers[layer].pinned_mut(expert),
            Owner::Slot(layer, slot) => self.layers[layer].slots[slot.index()].as_mut(),
            Owner::Staging(i) => self.staging.get_mut(i),
            Owner::Ready(i) => self.rearranger.ready.get_mut(i).map(|(_, bytes)| bytes),
        }
    }
}
