//! The cache of a layer's slots: which pooled expert is where, and what each token changes.
//!
//! Pure bookkeeping, shared by the engine, which moves the bytes, and by the planner's replay, which only counts. It
//! knows nothing of tiers, bytes or time, and its arithmetic is of integers, so both see the same hits.
//!
//! A token's pooled choices are looked up together against the slots as the previous token left them; then the layer's
//! policy says which experts keep or get a slot. What it refuses is [staged](Access::Staged). A prompt batch is one step
//! over its distinct experts in the order of their last use, but each of its tokens is counted by itself.
//!
//! - [`lru`]: the slots hold the `n_slots` experts that were used last. A larger cache holds whatever a smaller one does.
//! - `lfu`: they hold those with the most uses of late ([`decayed`]). An expert gets a slot only if it is worth more
//!   than one that would lose it.
//! - [`adaptive`]: the same with uses of late and uses of very late weighed against each other, by weights that the
//!   planner learns from a profile.

mod adaptive;
mod decayed;
mod lru;
mod preload;
mod scored;
#[cfg(test)]
mod tests;

use adaptive::TwoSpeeds;
use decayed::Decayed;
use lru::Lru;
use scored::Scored;
use tier_plan_formats::placement::SlotPolicy;

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

/// No slot, or no expert.
const NONE: u32 = u32::MAX;

/// What all policies keep.
#[derive(Debug, Clone)]
struct Table {
    n_slots: u32,
    /// `[n_expert]` the slot of each expert, or [`NONE`].
    slot_of: Vec<u32>,
    /// Empty slots, next one last.
    unused: Vec<u32>,
    /// `[n_expert]` the step that last named each expert: twice its number, plus one for a policy's own use.
    mark: Vec<u64>,
    tick: u64,
}

impl Table {
    /// The slot the expert lies in.
    fn slot(&self, expert: u32) -> Option<u32> {
        self.slot_of.get(expert as usize).copied().filter(|&slot| slot != NONE)
    }

    /// Begins a step and returns its mark.
    fn begin(&mut self) -> u64 {
        self.tick += 2;
        self.tick
    }

    /// Looks a step's experts up, all at once; what is not there is staged so far.
    fn look_up(&self, chosen: &[u32], out: &mut Vec<Access>) {
        out.clear();
        out.extend(chosen.iter().map(|&expert| match self.slot(expert) {
            Some(slot) => Access::Hit { slot },
            None => Access::Staged,
        }));
    }
}

/// A policy's own bookkeeping.
#[derive(Debug, Clone)]
enum Kept {
    Lru(Lru),
    Lfu(Scored<Decayed>),
    Adaptive(Scored<TwoSpeeds>),
}

/// The slots of one layer.
#[derive(Debug, Clone)]
pub struct SlotCache {
    table: Table,
    kept: Kept,
}

impl SlotCache {
    /// An empty cache of `n_slots` slots for a layer of `n_expert` experts. More slots than experts are never used.
    pub fn new(n_expert: u32, n_slots: u32, policy: SlotPolicy) -> Self {
        let n_slots = n_slots.min(n_expert);
        let n = n_expert as usize;
        let table =
            Table { n_slots, slot_of: vec![NONE; n], unused: (0..n_slots).rev().collect(), mark: vec![0; n], tick: 0 };
        let kept = match policy {
            SlotPolicy::Lru => Kept::Lru(Lru::new(n_slots)),
            SlotPolicy::Lfu { half_life } => Kept::Lfu(Scored::new(n, n_slots, Decayed::new(n, half_life))),
            SlotPolicy::Adaptive { half_life, recent_half_life, recent_weight } => {
                let worth = TwoSpeeds::new(n, half_life, recent_half_life, recent_weight);
                Kept::Adaptive(Scored::new(n, n_slots, worth))
            }
        };
        SlotCache { table, kept }
    }

    /// Slots.
    pub fn n_slots(&self) -> u32 {
        self.table.n_slots
    }

    /// Whether the expert lies in a slot.
    pub fn contains(&self, expert: u32) -> bool {
        self.slot(expert).is_some()
    }

    /// The slot the expert lies in.
    pub fn slot(&self, expert: u32) -> Option<u32> {
        self.table.slot(expert)
    }

    /// Resident experts with their slots, the one worth least first.
    pub fn resident(&self) -> impl DoubleEndedIterator<Item = (u32, u32)> + '_ {
        let order = match &self.kept {
            Kept::Lru(lru) => lru.order().to_vec(),
            Kept::Lfu(scored) => scored.order(),
            Kept::Adaptive(scored) => scored.order(),
        };
        order.into_iter().map(|expert| (expert, self.table.slot_of[expert as usize]))
    }

    /// Frees the slot of an expert whose bytes did not come; of no effect on one that has none.
    pub fn forget(&mut self, expert: u32) {
        if let Some(slot) = self.slot(expert) {
            self.table.slot_of[expert as usize] = NONE;
            self.table.unused.push(slot);
            match &mut self.kept {
                Kept::Lru(lru) => lru.forget(expert),
                Kept::Lfu(scored) => scored.forget(slot),
                Kept::Adaptive(scored) => scored.forget(slot),
            }
        }
    }

    /// One token's step: `chosen` are its distinct pooled choices in the router's order. `out` becomes their accesses in
    /// the same order. An expert number that the layer does not have is staged.
    pub fn step(&mut self, chosen: &[u32], out: &mut Vec<Access>) {
        self.note(chosen.iter().copied());
        self.settle(chosen, out);
    }

    /// Counts a token's choices, before [`settle`](Self::settle). Those that are not pooled may be among them or not.
    pub fn note(&mut self, chosen: impl Iterator<Item = u32>) {
        if self.table.n_slots == 0 {
            return;
        }
        match &mut self.kept {
            Kept::Lru(_) => {}
            Kept::Lfu(scored) => scored.note(&mut self.table, chosen),
            Kept::Adaptive(scored) => scored.note(&mut self.table, chosen),
        }
    }

    /// Looks up and changes what the slots hold for tokens that have been [noted](Self::note): `chosen` are their
    /// distinct pooled choices, a token's in the router's order, a batch's in the order of their last use. `out` is as
    /// for [`step`](Self::step).
    pub fn settle(&mut self, chosen: &[u32], out: &mut Vec<Access>) {
        self.table.look_up(chosen, out);
        if self.table.n_slots == 0 {
            return;
        }
        match &mut self.kept {
            Kept::Lru(lru) => lru.settle(&mut self.table, chosen, out),
            Kept::Lfu(scored) => scored.settle(&mut self.table, chosen, out),
            Kept::Adaptive(scored) => scored.settle(&mut self.table, chosen, out),
        }
    }
}
