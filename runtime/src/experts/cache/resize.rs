//! A cache that gets more slots or fewer, or another policy, while it is in use.

use crate::experts::cache::{NONE, Policy, SlotCache};
use tier_plan_formats::placement::SlotPolicy;

impl SlotCache {
    /// Gives up all slots but `n`: empty ones, those first that were emptied last, then those of the
    /// experts that the policy would evict first. Returns the old number of each slot that stays, by its
    /// new one.
    pub fn keep_slots(&mut self, n: u32) -> Vec<u32> {
        if n >= self.table.n_slots {
            return (0..self.table.n_slots).collect();
        }
        let resident: Vec<u32> = self.resident().map(|(expert, _)| expert).collect();
        let n_leaving = resident.len().saturating_sub(n as usize);
        resident[..n_leaving].iter().for_each(|e| self.forget(*e));

        let mut kept: Vec<u32> = self.resident().map(|(_, slot)| slot).collect();
        let n_empty = n as usize - kept.len();
        // Those that were emptied last go first.
        kept.extend(self.table.unused.iter().take(n_empty));
        kept.sort_unstable();
        let mut new_number = vec![NONE; self.table.n_slots as usize];
        for (new, old) in kept.iter().enumerate() {
            new_number[*old as usize] = new as u32;
        }
        let mut held = vec![NONE; n as usize];
        for (expert, slot) in self.table.slot_of.iter_mut().enumerate() {
            if *slot != NONE {
                *slot = new_number[*slot as usize];
                held[*slot as usize] = expert as u32;
            }
        }
        let empty = (0..n).rev().filter(|slot| held[*slot as usize] == NONE);
        self.table.unused = empty.collect();
        self.table.n_slots = n;
        match &mut self.policy {
            // It knows experts, and no slots.
            Policy::Lru(_) => {}
            Policy::Lfu(scored) => scored.renumber(held),
            Policy::Adaptive(scored) => scored.renumber(held),
        }
        kept
    }

    /// Adds `n` empty slots, whose numbers follow on the others'. Slots beyond the number of experts
    /// are left out. Returns how many were added.
    pub fn add_slots(&mut self, n: u32) -> u32 {
        let table = &mut self.table;
        let n = n.min(table.slot_of.len() as u32 - table.n_slots);
        let new = table.n_slots..table.n_slots + n;
        // The next one to be filled is last.
        let older = std::mem::replace(&mut table.unused, new.rev().collect());
        table.unused.extend(older);
        table.n_slots += n;
        match &mut self.policy {
            Policy::Lru(_) => {}
            Policy::Lfu(scored) => scored.add_slots(n),
            Policy::Adaptive(scored) => scored.add_slots(n),
        }
        n
    }

    /// Returns a cache with the same experts in the same slots and another policy, which counts uses
    /// from now on. Experts leave in the order in which they would have left.
    #[must_use]
    pub fn with_policy(&self, policy: SlotPolicy) -> Self {
        let n_expert = self.table.slot_of.len() as u32;
        let mut cache = Self::new(n_expert, self.table.n_slots, policy);
        for (expert, slot) in self.resident().rev() {
            cache.preload_at(expert, slot);
        }
        cache
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::cache::preload::tests::POLICIES;
    use proptest::prelude::*;

    fn experts(cache: &SlotCache) -> Vec<u32> {
        cache.resident().map(|(expert, _)| expert).collect()
    }

    /// Fails if two experts share a slot, or an expert's slot counts as empty.
    fn check(cache: &SlotCache) {
        let mut slots: Vec<u32> = cache.resident().map(|(_, slot)| slot).collect();
        slots.extend(&cache.table.unused);
        slots.sort_unstable();
        assert!(slots.iter().copied().eq(0..cache.n_slots()), "{slots:?}");
    }

    proptest! {
        /// The experts that would have stayed longest stay, in the slots whose new numbers are told,
        /// and the cache can be used on.
        #[test]
        fn fewer_and_more_slots(
            policy in 0usize..3,
            n_slots in 0u32..9,
            steps in proptest::collection::vec(
                proptest::sample::subsequence((0u32..8).collect::<Vec<_>>(), 0..5).prop_shuffle(), 0..20),
            keep in 0u32..9,
            more in 0u32..9,
            other in 0usize..3,
        ) {
            let mut cache = SlotCache::new(8, n_slots, POLICIES[policy]);
            let mut out = Vec::new();
            let (before, after) = steps.split_at(steps.len() / 2);
            before.iter().for_each(|chosen| cache.step(chosen, &mut out));

            let (order, old) = (experts(&cache), cache.clone());
            let kept = cache.keep_slots(keep);
            check(&cache);
            prop_assert_eq!(cache.n_slots(), keep.min(old.n_slots()));
            let n_stay = order.len().min(keep as usize);
            prop_assert_eq!(experts(&cache), &order[order.len() - n_stay..]);
            for (expert, slot) in cache.resident() {
                prop_assert_eq!(old.slot(expert), Some(kept[slot as usize]));
            }

            let n_before = cache.n_slots();
            let added = cache.add_slots(more);
            check(&cache);
            prop_assert_eq!(cache.n_slots(), n_before + added);
            prop_assert_eq!(added, more.min(8 - n_before));

            let changed = cache.with_policy(POLICIES[other]);
            check(&changed);
            prop_assert_eq!(experts(&changed), experts(&cache));
            for mut cache in [cache, changed] {
                for chosen in after {
                    cache.step(chosen, &mut out);
                    check(&cache);
                }
            }
        }

        /// Slots that are added and taken away while empty change nothing of what comes.
        #[test]
        fn empty_slots_leave_no_trace(
            policy in 0usize..3,
            steps in proptest::collection::vec(
                proptest::sample::subsequence((0u32..8).collect::<Vec<_>>(), 0..5).prop_shuffle(), 0..20),
        ) {
            let (mut plain, mut resized) = (
                SlotCache::new(8, 4, POLICIES[policy]),
                SlotCache::new(8, 4, POLICIES[policy]),
            );
            let (mut expected, mut out) = (Vec::new(), Vec::new());
            for chosen in &steps {
                resized.add_slots(3);
                resized.keep_slots(4);
                plain.step(chosen, &mut expected);
                resized.step(chosen, &mut out);
                let hits = |accesses: &[crate::experts::cache::Access]| -> Vec<bool> {
                    accesses.iter().map(|a| matches!(a, crate::experts::cache::Access::Hit { .. })).collect()
                };
                prop_assert_eq!(hits(&out), hits(&expected));
                prop_assert_eq!(experts(&resized), experts(&plain));
            }
        }
    }
}
