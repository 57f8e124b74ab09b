//! Slot contents, exported and restored, so that a run does not begin with empty slots.

use super::Engine;
use crate::tiers::arena::ArenaError;
use std::collections::HashMap;
use tier_plan_formats::slots::LayerSlots;

impl Engine {
    /// Fills empty slots with these experts of each layer, the most wanted first. Returns how many
    /// there are slots for.
    ///
    /// The reads run at idle priority, while tokens are computed. A plan's prediction supposes
    /// slots that begin empty.
    ///
    /// On an emulated last tier nothing is filled: its reads would take no declared time.
    ///
    /// # Errors
    /// When there is no memory for a buffer.
    pub fn warm_up(&mut self, layers: &[LayerSlots]) -> Result<u64, ArenaError> {
        if self.plan().tiers.last().is_none_or(|t| t.tier.emulated) {
            return Ok(0);
        }
        let positions: HashMap<u32, usize> = self
            .plan()
            .layers
            .iter()
            .enumerate()
            .map(|(position, placed)| (placed.layer, position))
            .collect();
        let known = |l: &LayerSlots| {
            positions
                .get(&l.layer)
                .map(|position| (*position, l.experts.clone()))
        };
        let layers: Vec<(usize, Vec<u32>)> = layers.iter().filter_map(known).collect();
        self.experts.store.warm_up(&layers)
    }

    /// Returns how many slots [`warm_up`](Self::warm_up) has filled so far.
    pub fn warmed(&self) -> u64 {
        self.experts.store.warmed()
    }

    /// Returns what the slots of each layer hold, the most recently used first; leaves out layers
    /// without slots.
    pub fn slot_contents(&self) -> Vec<LayerSlots> {
        let layers = self
            .plan()
            .layers
            .iter()
            .zip(self.experts.store.residents());
        let with_slots = layers.filter(|(placed, _)| placed.slots > 0);
        with_slots
            .map(|(placed, experts)| LayerSlots {
                layer: placed.layer,
                experts,
            })
            .collect()
    }
}
