//! The cache of a layer's slots: which pooled expert is where, and what each token changes.
//!
//! Pure bookkeeping, shared by the engine, which moves the bytes, and by the planner's replay, which only counts. It
//! knows nothing of tiers, bytes or time.
//!
//! The policy is least recently used with one step a token: a token's pooled choices are looked up together against
//! the slots as the previous token left them, then recency is updated in the router's order (later in the list is
//! more recent). After a step the slots hold the `n_slots` most recent experts, so a choice hits exactly when fewer
//! than `n_slots` pooled experts are more recent than it: a larger cache holds whatever a smaller one does. A prompt
//! batch is one step over its distinct experts in the order of their last use.

mod preload;

/// Where a chosen expert's weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// They lie in a slot already.
    Hit {
        /// The slot.
        slot: u32,
    },
    /// They are to be read into a slot and stay there.
    Fill {
        /// The slot.
        slot: u32,
        /// The expert that leaves it. Only when a step names more experts than there are slots can this be an expert
        /// that the same step uses; its slot must then not be overwritten before it has computed.
        evicted: Option<u32>,
    },
    /// They are to be read into a staging buffer and are not kept.
    Staged,
}

/// No slot.
const NONE: u32 = u32::MAX;

/// The slots of one layer.
#[derive(Debug, Clone)]
pub struct SlotCache {
    n_slots: u32,
    /// `[n_expert]` the slot of each expert, or [`NONE`].
    slot_of: Vec<u32>,
    /// Resident experts, least recently used first.
    order: Vec<u32>,
    /// Slots that were never filled, next one last.
    unused: Vec<u32>,
    /// `[n_expert]` the step that last chose each expert: twice its number, plus one if it keeps or gets a slot.
    mark: Vec<u64>,
    tick: u64,
    victims: Vec<u32>,
}

impl SlotCache {
    /// An empty cache of `n_slots` slots for a layer of `n_expert` experts. More slots than experts are never used.
    pub fn new(n_expert: u32, n_slots: u32) -> Self {
        let n_slots = n_slots.min(n_expert);
        SlotCache {
            n_slots,
            slot_of: vec![NONE; n_expert as usize],
            order: Vec::with_capacity(n_slots as usize),
            unused: (0..n_slots).rev().collect(),
            mark: vec![0; n_expert as usize],
            tick: 0,
            victims: Vec::new(),
        }
    }

    /// Slots.
    pub fn n_slots(&self) -> u32 {
        self.n_slots
    }

    /// Whether the expert lies in a slot.
    pub fn contains(&self, expert: u32) -> bool {
        self.slot(expert).is_some()
    }

    /// The slot the expert lies in.
    pub fn slot(&self, expert: u32) -> Option<u32> {
        self.slot_of.get(expert as usize).copied().filter(|&slot| slot != NONE)
    }

    /// Resident experts with their slots, least recently used first.
    pub fn resident(&self) -> impl DoubleEndedIterator<Item = (u32, u32)> + '_ {
        self.order.iter().map(|&expert| (expert, self.slot_of[expert as usize]))
    }

    /// Frees the slot of an expert whose bytes did not come; of no effect on one that has none.
    pub fn forget(&mut self, expert: u32) {
        if let Some(slot) = self.slot(expert) {
            self.slot_of[expert as usize] = NONE;
            self.order.retain(|&e| e != expert);
            self.unused.push(slot);
        }
    }

    /// One step: `chosen` are the distinct pooled experts of a token in the router's order, or of a batch in the order
    /// of their last use. `out` becomes their accesses in the same order. An expert number that the layer does not have
    /// is staged.
    pub fn step(&mut self, chosen: &[u32], out: &mut Vec<Access>) {
        out.clear();
        self.tick += 2;
        let (passing, kept) = (self.tick, self.tick + 1);
        let mut room = self.n_slots;
        let mut fills = 0;
        for &expert in chosen.iter().rev() {
            let Some(mark) = self.mark.get_mut(expert as usize) else { continue };
            if *mark >= passing {
                continue;
            }
            *mark = passing;
            if room > 0 {
                room -= 1;
                *mark = kept;
                fills += usize::from(self.slot_of[expert as usize] == NONE);
            }
        }

        // Every victim's slot is refilled in this step: first those the step does not use, longest unused first.
        let needed = fills.saturating_sub(self.unused.len());
        let mark = &self.mark;
        self.victims.clear();
        let idle = self.order.iter().filter(|&&e| mark[e as usize] < passing);
        let leaving = self.order.iter().filter(|&&e| mark[e as usize] == passing);
        self.victims.extend(idle.chain(leaving).take(needed));
        self.victims.reverse();

        out.extend(chosen.iter().map(|&expert| match self.slot(expert) {
            Some(slot) => Access::Hit { slot },
            None => Access::Staged,
        }));
        for (&expert, access) in chosen.iter().zip(out.iter_mut()) {
            if *access != Access::Staged || self.mark.get(expert as usize) != Some(&kept) {
                continue;
            }
            if let Some(slot) = self.slot(expert) {
                *access = Access::Hit { slot };
                continue;
            }
            let (slot, evicted) = match (self.unused.pop(), self.victims.pop()) {
                (Some(slot), victim) => {
                    self.victims.extend(victim);
                    (slot, None)
                }
                (None, Some(victim)) => (std::mem::replace(&mut self.slot_of[victim as usize], NONE), Some(victim)),
                (None, None) => continue,
            };
            self.slot_of[expert as usize] = slot;
            *access = Access::Fill { slot, evicted };
        }

        let (slot_of, mark) = (&self.slot_of, &mut self.mark);
        self.order.retain(|&e| slot_of[e as usize] != NONE && mark[e as usize] < passing);
        for &expert in chosen {
            if mark.get(expert as usize) == Some(&kept) {
                mark[expert as usize] = passing;
                self.order.push(expert);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Distinct choices of up to `k` of `n` experts, token by token.
    fn steps(n: u32, k: usize) -> impl Strategy<Value = Vec<Vec<u32>>> {
        let ids: Vec<u32> = (0..n).collect();
        let step = proptest::sample::subsequence(ids, 0..=k).prop_shuffle();
        proptest::collection::vec(step, 1..40)
    }

    /// The contract in its plainest form: all experts ever used, most recent first.
    fn naive(recent: &mut Vec<u32>, chosen: &[u32], n_slots: usize) -> Vec<bool> {
        let hits = chosen.iter().map(|e| recent.iter().position(|r| r == e).is_some_and(|p| p < n_slots)).collect();
        for &e in chosen {
            recent.retain(|&r| r != e);
            recent.insert(0, e);
        }
        hits
    }

    proptest! {
        #[test]
        fn slots_hold_the_most_recent(steps in steps(9, 6), n_slots in 0u32..10) {
            let mut cache = SlotCache::new(9, n_slots);
            let (mut recent, mut out) = (Vec::new(), Vec::new());
            // What the slots hold by applying the accesses, as an engine does.
            let mut held = vec![None; n_slots as usize];
            for chosen in &steps {
                let before = held.clone();
                let hits = naive(&mut recent, chosen, n_slots as usize);
                cache.step(chosen, &mut out);
                prop_assert_eq!(out.len(), chosen.len());
                for ((access, &expert), hit) in out.iter().zip(chosen).zip(hits) {
                    match *access {
                        Access::Hit { slot } => {
                            prop_assert!(hit);
                            prop_assert_eq!(before[slot as usize], Some(expert));
                        }
                        Access::Fill { slot, evicted } => {
                            prop_assert!(!hit);
                            prop_assert_eq!(held[slot as usize], evicted);
                            if chosen.len() <= n_slots as usize {
                                prop_assert!(evicted.is_none_or(|v| !chosen.contains(&v)));
                            }
                            held[slot as usize] = Some(expert);
                        }
                        Access::Staged => prop_assert!(!hit && chosen.len() > n_slots as usize),
                    }
                }
                let resident: Vec<u32> = cache.resident().map(|(e, _)| e).rev().collect();
                prop_assert_eq!(&resident[..], &recent[..recent.len().min(n_slots as usize)]);
                for (expert, slot) in cache.resident() {
                    prop_assert_eq!(held[slot as usize], Some(expert));
                }
            }
        }

        #[test]
        fn a_larger_cache_holds_what_a_smaller_one_does(steps in steps(8, 5), small in 0u32..8, more in 1u32..4) {
            let (mut a, mut b) = (SlotCache::new(8, small), SlotCache::new(8, small + more));
            let mut out = Vec::new();
            for chosen in &steps {
                a.step(chosen, &mut out);
                b.step(chosen, &mut out);
                prop_assert!(a.resident().all(|(e, _)| b.contains(e)));
            }
        }
    }

    #[test]
    fn a_forgotten_expert_leaves_its_slot() {
        let mut cache = SlotCache::new(4, 2);
        let mut out = Vec::new();
        cache.step(&[3, 1], &mut out);
        cache.forget(3);
        cache.forget(0);
        assert_eq!(cache.resident().collect::<Vec<_>>(), [(1, 1)]);
        cache.step(&[3], &mut out);
        assert_eq!(out, [Access::Fill { slot: 0, evicted: None }]);
        cache.step(&[2], &mut out);
        assert_eq!(out, [Access::Fill { slot: 1, evicted: Some(1) }]);
    }

    #[test]
    fn what_does_not_fit_is_staged_in_router_order() {
        let mut cache = SlotCache::new(4, 2);
        let mut out = Vec::new();
        cache.step(&[3, 1, 2], &mut out);
        assert_eq!(
            out,
            [Access::Staged, Access::Fill { slot: 0, evicted: None }, Access::Fill { slot: 1, evicted: None }]
        );
        cache.step(&[1, 0], &mut out);
        assert_eq!(out, [Access::Hit { slot: 0 }, Access::Fill { slot: 1, evicted: Some(2) }]);
    }

    #[test]
    fn bad_input_does_no_harm() {
        let mut cache = SlotCache::new(3, 2);
        let mut out = Vec::new();
        cache.step(&[7, 1, 1, u32::MAX], &mut out);
        assert_eq!(out.len(), 4);
        assert_eq!((out[0], out[3]), (Access::Staged, Access::Staged));
        assert_eq!(cache.resident().count(), 1);
        assert_eq!(SlotCache::new(3, 9).n_slots(), 3);
    }
}
