//! Slots for the experts with the highest scores, whatever the score is.
//!
//! After a step the slots hold the best of the experts that were there and those that the step
//! used. So an expert that is used once does not evict one that is used often: it is staged. Of
//! experts with equal scores the one used last is better. If a step uses no more experts than there
//! are slots, its resident experts stay.

use crate::experts::cache::{Access, NONE, SlotTable};

/// Most victims that are found by insertion; more are found by sorting.
const MAX_INSERTION_VICTIMS: usize = 32;

/// The score of each expert of a layer.
pub(super) trait Score {
    /// Begins a token.
    fn token(&mut self);

    /// Counts a use of an expert by the token; `expert` is below `n_expert`.
    fn used(&mut self, expert: usize);

    /// Returns the present score of an expert; only the order of scores matters.
    fn score(&self, expert: usize) -> u64;
}

/// The rank of an expert, compared by score, then last use, then id. No two ranks of a step are
/// equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    score: u64,
    last_use: u64,
    /// The expert's number, or its position in the step.
    id: u32,
}

impl Rank {
    /// Whether this rank is better than another's by score or last use, whatever the ids.
    fn beats(self, other: Self) -> bool {
        (self.score, self.last_use) > (other.score, other.last_use)
    }
}

/// A policy that keeps the experts with the highest scores.
#[derive(Debug, Clone)]
pub(super) struct Scored<S> {
    scores: S,
    /// `[n_expert]` the number of each expert's last use.
    last: Vec<u64>,
    uses: u64,
    /// `[n_slots]` the expert in each slot, or [`NONE`].
    held: Vec<u32>,
    /// Scratch of [`settle`](Self::settle): the step's experts without a slot, by position, best
    /// first.
    missing: Vec<Rank>,
    /// Scratch of [`settle`](Self::settle): experts that may have to leave, worst first.
    victims: Vec<Rank>,
}

impl<S: Score> Scored<S> {
    pub(super) fn new(n_expert: usize, n_slots: u32, scores: S) -> Self {
        Scored {
            scores,
            last: vec![0; n_expert],
            // Lower numbers are for preloaded experts, which have a slot before their first use.
            uses: n_expert as u64,
            held: vec![NONE; n_slots as usize],
            missing: Vec::new(),
            victims: Vec::new(),
        }
    }

    fn rank(&self, expert: u32, id: u32) -> Rank {
        Rank {
            score: self.scores.score(expert as usize),
            last_use: self.last[expert as usize],
            id,
        }
    }

    /// Returns the resident experts, worst first.
    pub(super) fn order(&self) -> Vec<u32> {
        let mut ranks: Vec<Rank> = self
            .held
            .iter()
            .filter(|&&e| e != NONE)
            .map(|&e| self.rank(e, e))
            .collect();
        ranks.sort_unstable();
        ranks.into_iter().map(|rank| rank.id).collect()
    }

    /// Empties a slot.
    pub(super) fn forget(&mut self, slot: u32) {
        self.held[slot as usize] = NONE;
    }

    /// Says which expert is in each slot, where that has changed.
    pub(super) fn renumber(&mut self, held: Vec<u32>) {
        self.held = held;
    }

    /// Adds empty slots.
    pub(super) fn add_slots(&mut self, n: u32) {
        self.held.resize(self.held.len() + n as usize, NONE);
    }

    /// Gives an expert a slot before its first use. Of several, the one with the highest `rank`, at
    /// most the number of slots, stays longest.
    pub(super) fn preload(&mut self, expert: u32, slot: u32, rank: u64) {
        self.held[slot as usize] = expert;
        let last = &mut self.last[expert as usize];
        *last = rank.max(*last);
    }

    /// Implements [`SlotCache::note`](super::SlotCache::note).
    pub(super) fn note(&mut self, table: &mut SlotTable, chosen: impl Iterator<Item = u32>) {
        let now = table.begin();
        self.scores.token();
        for expert in chosen {
            let Some(mark) = table
                .mark
                .get_mut(expert as usize)
                .filter(|mark| **mark < now)
            else {
                continue;
            };
            *mark = now;
            self.scores.used(expert as usize);
            self.uses += 1;
            self.last[expert as usize] = self.uses;
        }
    }

    /// Implements [`SlotCache::settle`](super::SlotCache::settle); `out` has been looked up.
    pub(super) fn settle(&mut self, table: &mut SlotTable, chosen: &[u32], out: &mut [Access]) {
        let now = table.begin();
        self.missing.clear();
        for (position, (&expert, access)) in chosen.iter().zip(out.iter()).enumerate() {
            let Some(mark) = table
                .mark
                .get_mut(expert as usize)
                .filter(|mark| **mark < now)
            else {
                continue;
            };
            *mark = now;
            if *access == Access::Staged {
                let rank = self.rank(expert, position as u32);
                self.missing.push(rank);
            }
        }
        if self.missing.is_empty() {
            return;
        }
        self.missing.sort_unstable_by(|a, b| b.cmp(a));
        let n_evictions = self.missing.len().saturating_sub(table.unused.len());
        let all_fit = chosen.len() <= table.n_slots as usize;
        self.find_victims(n_evictions, |expert| {
            all_fit && table.mark[expert as usize] == now
        });
        let mut victims = self.victims.iter();
        for &rank in &self.missing {
            let expert = chosen[rank.id as usize];
            let (slot, evicted) = match table.unused.pop() {
                Some(slot) => (slot, None),
                None => match victims.next() {
                    Some(&victim) if rank.beats(victim) => (
                        std::mem::replace(&mut table.slot_of[victim.id as usize], NONE),
                        Some(victim.id),
                    ),
                    // The remaining experts are no better than this one, and the remaining victims
                    // no worse.
                    _ => break,
                },
            };
            table.slot_of[expert as usize] = slot;
            self.held[slot as usize] = expert;
            out[rank.id as usize] = Access::Fill { slot, evicted };
        }
    }

    /// Finds the `most` worst residents for which `stays` is false.
    fn find_victims(&mut self, most: usize, stays: impl Fn(u32) -> bool) {
        self.victims.clear();
        if most == 0 {
            return;
        }
        for &expert in self.held.iter().filter(|&&e| e != NONE && !stays(e)) {
            let rank = self.rank(expert, expert);
            if most > MAX_INSERTION_VICTIMS {
                self.victims.push(rank);
                continue;
            }
            if self.victims.len() == most {
                if self.victims.last().is_some_and(|best| *best < rank) {
                    continue;
                }
                self.victims.pop();
            }
            let position = self.victims.partition_point(|other| *other < rank);
            self.victims.insert(position, rank);
        }
        if most > MAX_INSERTION_VICTIMS {
            self.victims.sort_unstable();
            self.victims.truncate(most);
        }
    }
}
