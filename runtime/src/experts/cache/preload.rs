//! Experts that get a slot before a router has selected them.

use crate::experts::cache::{NONE, Policy, SlotCache};

impl SlotCache {
    /// Returns the number of empty slots.
    pub fn n_unused(&self) -> u32 {
        self.table.unused.len() as u32
    }

    /// Returns the empty slots, the one that will be filled last first.
    pub fn unused(&self) -> &[u32] {
        &self.table.unused
    }

    /// Gives an expert an empty slot, as if it had been used before all others, so that it is the
    /// first to leave. Of several preloaded experts the one preloaded first stays longest.
    ///
    /// Returns `None`, and changes nothing, when the expert has a slot, the layer has no such
    /// expert, or no slot is empty.
    pub fn preload(&mut self, expert: u32) -> Option<u32> {
        let slot = self.table.unused.last().copied()?;
        self.preload_at(expert, slot)
    }

    /// [`preload`](Self::preload)s an expert into this slot, if that is empty.
    pub(super) fn preload_at(&mut self, expert: u32, slot: u32) -> Option<u32> {
        let table = &mut self.table;
        if table.slot_of.get(expert as usize) != Some(&NONE) {
            return None;
        }
        let n_empty = table.unused.len() as u64;
        let at = table.unused.iter().rposition(|empty| *empty == slot)?;
        table.unused.remove(at);
        table.slot_of[expert as usize] = slot;
        match &mut self.policy {
            Policy::Lru(lru) => lru.preload(expert),
            Policy::Lfu(scored) => scored.preload(expert, slot, n_empty),
            Policy::Adaptive(scored) => scored.preload(expert, slot, n_empty),
        }
        Some(slot)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::experts::cache::Access;
    use proptest::prelude::*;
    use tier_plan_formats::placement::SlotPolicy;

    pub(in crate::experts::cache) const POLICIES: [SlotPolicy; 3] = [
        SlotPolicy::Lru,
        SlotPolicy::Lfu { half_life: 8 },
        SlotPolicy::Adaptive {
            half_life: 8,
            recent_half_life: 2,
            recent_weight: 4,
        },
    ];

    #[test]
    fn the_first_preloaded_expert_stays_longest() {
        for policy in POLICIES {
            first_stays_longest(SlotCache::new(6, 3, policy));
        }
    }

    fn first_stays_longest(mut cache: SlotCache) {
        assert_eq!(
            (cache.preload(4), cache.preload(1), cache.preload(4)),
            (Some(0), Some(1), None)
        );
        assert_eq!((cache.n_unused(), cache.preload(6)), (1, None));
        let mut out = Vec::new();
        cache.step(&[4, 5], &mut out);
        assert_eq!(
            out,
            [
                Access::Hit { slot: 0 },
                Access::Fill {
                    slot: 2,
                    evicted: None
                }
            ]
        );
        assert_eq!(cache.preload(0), None, "no slot is unused");
        cache.step(&[0], &mut out);
        assert_eq!(
            out,
            [Access::Fill {
                slot: 1,
                evicted: Some(1)
            }]
        );
        assert_eq!(
            cache.resident().map(|(e, _)| e).collect::<Vec<_>>(),
            [4, 5, 0]
        );
    }

    proptest! {
        /// A preloaded cache behaves like one in which the experts were used in the opposite order.
        #[test]
        fn a_warm_cache_is_one_that_was_used(
            warm in proptest::sample::subsequence((0u32..8).collect::<Vec<_>>(), 0..8).prop_shuffle(),
            steps in proptest::collection::vec(
                proptest::sample::subsequence((0u32..8).collect::<Vec<_>>(), 0..5).prop_shuffle(), 0..20),
            n_slots in 0u32..9,
        ) {
            let (mut warmed, mut used, mut out) = (SlotCache::new(8, n_slots, SlotPolicy::Lru), SlotCache::new(8, n_slots, SlotPolicy::Lru), Vec::new());
            let kept: Vec<u32> = warm.iter().copied().filter(|e| warmed.preload(*e).is_some()).collect();
            prop_assert_eq!(kept.len(), warm.len().min(n_slots as usize));
            kept.iter().rev().for_each(|e| used.step(&[*e], &mut out));
            for chosen in &steps {
                warmed.step(chosen, &mut out);
                let hit: Vec<bool> = out.iter().map(|a| matches!(a, Access::Hit { .. })).collect();
                used.step(chosen, &mut out);
                let expected: Vec<bool> = out.iter().map(|a| matches!(a, Access::Hit { .. })).collect();
                prop_assert_eq!(hit, expected);
            }
        }
    }
}
