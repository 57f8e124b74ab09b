//! Least recently used: every expert that is used gets a slot, and the one whose last use is longest ago leaves.
//!
//! Within a token, later in the router's order is more recent. After a step the slots hold the `n_slots` most recent
//! experts, so a choice hits exactly when fewer than `n_slots` pooled experts are more recent than it.

use crate::experts::cache::{Access, NONE, Table};

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Lru {
    /// Resident experts, least recently used first.
    order: Vec<u32>,
    victims: Vec<u32>,
}

impl Lru {
    pub(super) fn new(n_slots: u32) -> Self {
        Lru { order: Vec::with_capacity(n_slots as usize), victims: Vec::new() }
    }

    pub(super) fn order(&self) -> &[u32] {
        &self.order
    }

    pub(super) fn forget(&mut self, expert: u32) {
        self.order.retain(|&e| e != expert);
    }

    pub(super) fn preload(&mut self, expert: u32) {
        self.order.insert(0, expert);
    }

    /// See [`super::SlotCache::settle`]; `out` has been looked up.
    pub(super) fn settle(&mut self, table: &mut Table, chosen: &[u32], out: &mut [Access]) {
        let passing = table.begin();
        let kept = passing + 1;
        let mut room = table.n_slots;
        let mut fills = 0;
        for &expert in chosen.iter().rev() {
            let Some(mark) = table.mark.get_mut(expert as usize) else { continue };
            if *mark >= passing {
                continue;
            }
            *mark = passing;
            if room > 0 {
                room -= 1;
                *mark = kept;
                fills += usize::from(table.slot_of[expert as usize] == NONE);
            }
        }

        // Every victim's slot is refilled in this step: first those the step does not use, longest unused first.
        let needed = fills.saturating_sub(table.unused.len());
        let mark = &table.mark;
        self.victims.clear();
        let idle = self.order.iter().filter(|&&e| mark[e as usize] < passing);
        let leaving = self.order.iter().filter(|&&e| mark[e as usize] == passing);
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
                (None, Some(victim)) => (std::mem::replace(&mut table.slot_of[victim as usize], NONE), Some(victim)),
                (None, None) => continue,
            };
            table.slot_of[expert as usize] = slot;
            *access = Access::Fill { slot, evicted };
        }

        let (slot_of, mark) = (&table.slot_of, &mut table.mark);
        self.order.retain(|&e| slot_of[e as usize] != NONE && mark[e as usize] < passing);
        for &expert in chosen {
            if mark.get(expert as usize) == Some(&kept) {
                mark[expert as usize] = passing;
                self.order.push(expert);
            }
        }
    }
}
