//! The cache of a layer's slots: which pooled expert is in which slot, and what each token changes.
//!
//! This is pure bookkeeping. The engine uses it to move bytes, and the planner's replay to count
//! hits. It knows nothing of tiers, bytes, or time, and its arithmetic is of integers, so both see
//! the same hits.
//!
//! A token's pooled choices are looked up together, against the slots as the previous token left
//! them. Then the layer's policy decides which experts keep or get a slot; an expert that it
//! refuses is [staged](Access::Staged). A prompt batch is one step over its distinct experts in the
//! order of their last use, but each of its tokens is counted by itself.
//!
//! The policies:
//!
//! - `lru` (least recently used): the slots hold the `n_slots` experts that were used last. A
//!   larger cache holds whatever a smaller one does.
//! - `lfu` (least frequently used, with decay): the slots hold the experts with the most recent
//!   uses, where a use loses half its weight per half-life. An expert gets a slot only if its score
//!   exceeds that of the expert that would lose it.
//! - `adaptive`: like `lfu`, with the weighted sum of two such counts as score, one of a long and
//!   one of a short half-life. The planner learns the weight from a profile.
//!
//! With few slots and a recurring working set, frequency beats recency. Expert 0 is used every
//! other token:
//!
//! ```
//! use tier_plan_runtime::experts::cache::{Access, SlotCache};
//! use tier_plan_runtime::formats::placement::SlotPolicy;
//!
//! let hits = |policy| {
//!     let mut cache = SlotCache::new(4, 1, policy);
//!     let (mut accesses, mut hits) = (Vec::new(), 0);
//!     for expert in [0, 1, 0, 2, 0, 3, 0] {
//!         cache.step(&[expert], &mut accesses);
//!         hits += usize::from(matches!(accesses[0], Access::Hit { .. }));
//!     }
//!     hits
//! };
//! assert_eq!(hits(SlotPolicy::Lru), 0);
//! assert!(hits(SlotPolicy::Lfu { half_life: 8 }) > 0);
//! ```

mod adaptive;
mod decayed;
mod lru;
mod preload;
mod resize;
mod scored;
#[cfg(test)]
mod tests;

use adaptive::TwoHalfLives;
use decayed::Decayed;
use lru::Lru;
use scored::Scored;
use tier_plan_formats::placement::SlotPolicy;

/// How a step gets the weights of an expert that it uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// They are in a slot.
    Hit {
        /// Number of the slot, from 0.
        slot: u32,
    },
    /// They are read into a slot and stay there.
    Fill {
        /// Number of the slot, from 0.
        slot: u32,
        /// The expert that leaves the slot, if any. It may be an expert of this step when the step
        /// uses more experts than there are slots. The slot must then not be overwritten before
        /// that one has computed.
        evicted: Option<u32>,
    },
    /// They are read into a staging buffer and not kept.
    Staged,
}

/// Stands for no slot in a table of slots, and for no expert in a table of experts.
const NONE: u32 = u32::MAX;

/// The part of the bookkeeping that all policies share.
#[derive(Debug, Clone)]
struct SlotTable {
    n_slots: u32,
    /// `[n_expert]` the slot of each expert, or `NONE`.
    slot_of: Vec<u32>,
    /// Empty slots; the next one to be filled is last.
    unused: Vec<u32>,
    /// `[n_expert]` the step that last used each expert: twice the step's number, plus a bit for
    /// the policy.
    mark: Vec<u64>,
    tick: u64,
}

impl SlotTable {
    /// Returns the slot of an expert, if it has one.
    fn slot(&self, expert: u32) -> Option<u32> {
        self.slot_of
            .get(expert as usize)
            .copied()
            .filter(|&slot| slot != NONE)
    }

    /// Begins a step and returns its mark.
    fn begin(&mut self) -> u64 {
        self.tick += 2;
        self.tick
    }

    /// Looks up all experts of a step. Experts without a slot are staged until the policy decides.
    fn look_up(&self, chosen: &[u32], out: &mut Vec<Access>) {
        out.clear();
        out.extend(chosen.iter().map(|&expert| match self.slot(expert) {
            Some(slot) => Access::Hit { slot },
            None => Access::Staged,
        }));
    }
}

/// A policy with its bookkeeping.
#[derive(Debug, Clone)]
enum Policy {
    Lru(Lru),
    Lfu(Scored<Decayed>),
    Adaptive(Scored<TwoHalfLives>),
}

/// The slots of one layer.
///
/// ```
/// use tier_plan_runtime::experts::cache::{Access, SlotCache};
/// use tier_plan_runtime::formats::placement::SlotPolicy;
///
/// // Two slots for a layer of eight experts, of which each token uses two.
/// let mut cache = SlotCache::new(8, 2, SlotPolicy::Lru);
/// let (mut accesses, mut hits) = (Vec::new(), 0);
/// for chosen in [[3, 1], [1, 5], [5, 1], [3, 5]] {
///     cache.step(&chosen, &mut accesses);
///     hits += accesses.iter().filter(|access| matches!(access, Access::Hit { .. })).count();
/// }
/// // Token 2 finds expert 1, token 3 both of its experts, token 4 expert 5.
/// assert_eq!(hits, 4);
/// assert!(cache.contains(3) && cache.contains(5));
/// ```
#[derive(Debug, Clone)]
pub struct SlotCache {
    table: SlotTable,
    policy: Policy,
}

impl SlotCache {
    /// Makes an empty cache of `n_slots` slots for a layer of `n_expert` experts. Slots beyond the
    /// number of experts are left out.
    pub fn new(n_expert: u32, n_slots: u32, policy: SlotPolicy) -> Self {
        let n_slots = n_slots.min(n_expert);
        let n = n_expert as usize;
        let table = SlotTable {
            n_slots,
            slot_of: vec![NONE; n],
            unused: (0..n_slots).rev().collect(),
            mark: vec![0; n],
            tick: 0,
        };
        let policy = match policy {
            SlotPolicy::Lru => Policy::Lru(Lru::new(n_slots)),
            SlotPolicy::Lfu { half_life } => {
                Policy::Lfu(Scored::new(n, n_slots, Decayed::new(n, half_life)))
            }
            SlotPolicy::Adaptive {
                half_life,
                recent_half_life,
                recent_weight,
            } => {
                let score = TwoHalfLives::new(n, half_life, recent_half_life, recent_weight);
                Policy::Adaptive(Scored::new(n, n_slots, score))
            }
        };
        SlotCache { table, policy }
    }

    /// Returns the number of slots.
    pub fn n_slots(&self) -> u32 {
        self.table.n_slots
    }

    /// Whether the expert is in a slot.
    pub fn contains(&self, expert: u32) -> bool {
        self.slot(expert).is_some()
    }

    /// Returns the slot of an expert, if it has one.
    pub fn slot(&self, expert: u32) -> Option<u32> {
        self.table.slot(expert)
    }

    /// Returns the resident experts with their slots, in the order in which the policy would evict
    /// them.
    pub fn resident(&self) -> impl DoubleEndedIterator<Item = (u32, u32)> + '_ {
        let order = match &self.policy {
            Policy::Lru(lru) => lru.order().to_vec(),
            Policy::Lfu(scored) => scored.order(),
            Policy::Adaptive(scored) => scored.order(),
        };
        order
            .into_iter()
            .map(|expert| (expert, self.table.slot_of[expert as usize]))
    }

    /// Frees the slot of an expert, whose bytes failed to be read; has no effect on one without a
    /// slot.
    pub fn forget(&mut self, expert: u32) {
        if let Some(slot) = self.slot(expert) {
            self.table.slot_of[expert as usize] = NONE;
            self.table.unused.push(slot);
            match &mut self.policy {
                Policy::Lru(lru) => lru.forget(expert),
                Policy::Lfu(scored) => scored.forget(slot),
                Policy::Adaptive(scored) => scored.forget(slot),
            }
        }
    }

    /// Takes one token's step. `chosen` are its distinct pooled choices in the router's order.
    /// `out` becomes their accesses, in that order. A number that is no expert of the layer is
    /// staged.
    pub fn step(&mut self, chosen: &[u32], out: &mut Vec<Access>) {
        self.note(chosen.iter().copied());
        self.settle(chosen, out);
    }

    /// Counts a token's choices, before [`settle`](Self::settle). Experts that are not pooled may
    /// be among them.
    pub fn note(&mut self, chosen: impl Iterator<Item = u32>) {
        if self.table.n_slots == 0 {
            return;
        }
        match &mut self.policy {
            Policy::Lru(_) => {}
            Policy::Lfu(scored) => scored.note(&mut self.table, chosen),
            Policy::Adaptive(scored) => scored.note(&mut self.table, chosen),
        }
    }

    /// Looks up the choices of tokens that have been [noted](Self::note), and updates the slots.
    /// `chosen` are their distinct pooled choices, a token's in the router's order, a batch's in
    /// the order of last use. `out` becomes their accesses, in that order.
    pub fn settle(&mut self, chosen: &[u32], out: &mut Vec<Access>) {
        self.table.look_up(chosen, out);
        if self.table.n_slots == 0 {
            return;
        }
        match &mut self.policy {
            Policy::Lru(lru) => lru.settle(&mut self.table, chosen, out),
            Policy::Lfu(scored) => scored.settle(&mut self.table, chosen, out),
            Policy::Adaptive(scored) => scored.settle(&mut self.table, chosen, out),
        }
    }
}
