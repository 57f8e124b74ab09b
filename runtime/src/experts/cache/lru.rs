//! Least recently used: every expert that is used gets a slot, and the one whose last use is
//! longest ago leaves.
//!
//! Within a token, later in the router's order is more recent. After a step the slots hold the
//! `n_slots` most recent experts. So a choice hits exactly when fewer than `n_slots` pooled experts
//! are more recent.

use crate::experts::cache::{Access, NONE, SlotTable};

/// The order of use of the resident experts.
#[derive(Debug, Clone)]
pub(super) struct Lru {
    /// Resident experts, least recently used first.
    order: Vec<u32>,
    /// Scratch of [`settle`](Self::settle): experts to evict, the next one last.
    victims: Vec<u32>,
}

impl Lru {
    pub(super) fn new(n_slots: u32) -> Self {
        Lru {
            order: Vec::with_capacity(n_slots as usize),
            victims: Vec::new(),
        }
    }

    /// Returns the resident experts, least recently used first.
    pub(super) fn order(&self) -> &[u32] {
        &self.order
    }

    /// Removes an expert that lost its slot.
    pub(super) fn forget(&mut self, expert: u32) {
        self.order.retain(|&e| e != expert);
    }

    /// Adds an expert that counts as used before all others.
    pub(super) fn preload(&mut self, expert: u32) {
        self.order.insert(0, expert);
    }

    /// Implements [`SlotCache::settle`](super::SlotCache::settle); `out` has been looked up.
    pub(super) fn settle(&mut self, table: &mut SlotTable, chosen: &[u32], out: &mut [Access]) {
        // Marks of this step: an expert that it uses, and one that also keeps or gets a slot.
        let used = table.begin();
        let kept = used + 1;
        let mut slots_left = table.n_slots;
        let mut fills = 0;
        for &expert in chosen.iter().rev() {
            let Some(mark) = table.mark.get_mut(expert as usize) else {
                continue;
            };
            if *mark >= used {
                continue;
            }
            *mark = used;
            if slots_left > 0 {
                slots_left -= 1;
                *mark = kept;
                fills += usize::from(table.slot_of[expert as usize] == NONE);
            }
        }

        // Exactly as many victims as fills need, since every victim's slot is refilled in this
        // step. Experts that the step does not use leave first, least recently used first.
        let needed = fills.saturating_sub(table.unused.len());
        let mark = &table.mark;
        self.victims.clear();
        let idle = self.order.iter().filter(|&&e| mark[e as usize] < used);
        let leaving = self.order.iter().filter(|&&e| mark[e as usize] == used);
        self.victims.extend(idle.chain(leaving).take(needed));
        self.victims.reverse();

        for (&expert, access) in chosen.iter().zip(out.iter_mut()) {
            if *access != Access::Staged || table.mark.get(expert as usize) != Some(&kept) {
                continue;
            }
            if let Some(slot) = table.slot(expert) {
                *access = Access::Hit { slot };
                continue;
            }
            let (slot, evicted) = match (table.unused.pop(), self.victims.pop()) {
                (Some(slot), victim) => {
                    self.victims.extend(victim);
                    (slot, None)
                }
                (None, Some(victim)) => (
                    std::mem::replace(&mut table.slot_of[victim as usize], NONE),
                    Some(victim),
                ),
                (None, None) => continue,
            };
            table.slot_of[expert as usize] = slot;
            *access = Access::Fill { slot, evicted };
        }

        let (slot_of, mark) = (&table.slot_of, &mut table.mark);
        self.order
            .retain(|&e| slot_of[e as usize] != NONE && mark[e as usize] < used);
        for &expert in chosen {
            if mark.get(expert as usize) == Some(&kept) {
                mark[expert as usize] = used;
                self.order.push(expert);
            }
        }
    }
}
