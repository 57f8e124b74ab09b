//! Slots for the experts that are worth most, whatever that means.
//!
//! After a step the slots hold the best of the experts that were there and those that the step used. So an expert that
//! is used once does not drive out one that is used often: it is staged. Of experts worth the same, the one used last is
//! better. While there are as many slots as a step has experts, those of them that lie in a slot stay there.

use crate::experts::cache::{Access, NONE, Table};

/// More victims than this are found by sorting.
const FEW: usize = 32;

/// What experts are worth.
pub(super) trait Worth {
    /// A token begins.
    fn token(&mut self);

    /// It uses an expert, which is within the layer's.
    fn used(&mut self, expert: usize);

    /// What an expert is worth now; only the order matters.
    fn of(&self, expert: usize) -> u64;
}

/// What an expert is worth, when it was used last, and its number (or its place in the step): no two are equal.
type Key = (u64, u64, u32);

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Scored<W> {
    worth: W,
    /// `[n_expert]` the number of each expert's last use.
    last: Vec<u64>,
    uses: u64,
    /// `[n_slots]` the expert in each slot, or [`NONE`].
    held: Vec<u32>,
    /// The step's experts that have no slot, with their places.
    missing: Vec<Key>,
    /// Experts that may have to leave, the worst first.
    victims: Vec<Key>,
}

impl<W: Worth> Scored<W> {
    pub(super) fn new(n_expert: usize, n_slots: u32, worth: W) -> Self {
        Scored {
            worth,
            last: vec![0; n_expert],
            // The numbers before are for experts that get a slot without being used.
            uses: n_expert as u64,
            held: vec![NONE; n_slots as usize],
            missing: Vec::new(),
            victims: Vec::new(),
        }
    }

    fn key(&self, expert: u32, third: u32) -> Key {
        (self.worth.of(expert as usize), self.last[expert as usize], third)
    }

    /// Resident experts, the worst first.
    pub(super) fn order(&self) -> Vec<u32> {
        let mut keys: Vec<Key> = self.held.iter().filter(|&&e| e != NONE).map(|&e| self.key(e, e)).collect();
        keys.sort_unstable();
        keys.into_iter().map(|(.., expert)| expert).collect()
    }

    pub(super) fn forget(&mut self, slot: u32) {
        self.held[slot as usize] = NONE;
    }

    /// An expert gets a slot; of several the one with the highest `rank`, at most the number of slots, stays longest.
    pub(super) fn preload(&mut self, expert: u32, slot: u32, rank: u64) {
        self.held[slot as usize] = expert;
        let last = &mut self.last[expert as usize];
        *last = rank.max(*last);
    }

    /// See [`super::SlotCache::note`].
    pub(super) fn note(&mut self, table: &mut Table, chosen: impl Iterator<Item = u32>) {
        let now = table.begin();
        self.worth.token();
        for expert in chosen {
            let Some(mark) = table.mark.get_mut(expert as usize).filter(|mark| **mark < now) else { continue };
            *mark = now;
            self.worth.used(expert as usize);
            self.uses += 1;
            self.last[expert as usize] = self.uses;
        }
    }

    /// See [`super::SlotCache::settle`]; `out` has been looked up.
    pub(super) fn settle(&mut self, table: &mut Table, chosen: &[u32], out: &mut [Access]) {
        let now = table.begin();
        self.missing.clear();
        for (place, (&expert, access)) in chosen.iter().zip(out.iter()).enumerate() {
            let Some(mark) = table.mark.get_mut(expert as usize).filter(|mark| **mark < now) else { continue };
            *mark = now;
            if *access == Access::Staged {
                let key = self.key(expert, place as u32);
                self.missing.push(key);
            }
        }
        if self.missing.is_empty() {
            return;
        }
        self.missing.sort_unstable_by(|a, b| b.cmp(a));
        let full = self.missing.len().saturating_sub(table.unused.len());
        let few = chosen.len() <= table.n_slots as usize;
        self.find_victims(full, |expert| few && table.mark[expert as usize] == now);
        let mut victims = self.victims.iter();
        for &(worth, last, place) in &self.missing {
            let expert = chosen[place as usize];
            let (slot, evicted) = match table.unused.pop() {
                Some(slot) => (slot, None),
                None => match victims.next() {
                    Some(&(least, before, victim)) if (least, before) < (worth, last) => {
                        (std::mem::replace(&mut table.slot_of[victim as usize], NONE), Some(victim))
                    }
                    // Neither is any other of the step's experts worth more than any other victim.
                    _ => break,
                },
            };
            table.slot_of[expert as usize] = slot;
            self.held[slot as usize] = expert;
            out[place as usize] = Access::Fill { slot, evicted };
        }
    }

    /// The `most` worst residents that need not stay.
    fn find_victims(&mut self, most: usize, stays: impl Fn(u32) -> bool) {
        self.victims.clear();
        if most == 0 {
            return;
        }
        for &expert in self.held.iter().filter(|&&e| e != NONE && !stays(e)) {
            let key = (self.worth.of(expert as usize), self.last[expert as usize], expert);
            if most > FEW {
                self.victims.push(key);
                continue;
            }
            if self.victims.len() == most {
                if self.victims.last().is_some_and(|worst| *worst < key) {
                    continue;
                }
                self.victims.pop();
            }
            let at = self.victims.partition_point(|other| *other < key);
            self.victims.insert(at, key);
        }
        if most > FEW {
            self.victims.sort_unstable();
            self.victims.truncate(most);
        }
    }
}
