//! Filling slots that are empty, in the background, with experts that are likely to be wanted.
//!
//! An expert is read into a buffer that nobody needs at the moment, and gets its slot when it has arrived, through the
//! cache: until then the slots are as if nothing were being read, so that a step never waits for such a read. What is
//! wanted meanwhile is read by itself and the copy that comes second is dropped.

use super::layer::Home;
use super::prefetch::LEFT_FREE;
use super::store::{ExpertStore, keep, whole};
use crate::experts::cache::SlotCache;
use crate::tiers::arena::{Arena, ArenaError, Piece};
use crate::tiers::file::{Arrival, FileTier, Urgency};
use std::collections::VecDeque;

/// Set in the keys of these reads.
const WARM: u64 = 1 << 62;

/// Experts that are being read at once.
const AT_ONCE: usize = 2;

/// See the module.
#[derive(Default)]
pub(crate) struct Warm {
    /// Layer and expert, the next one first.
    queue: VecDeque<(usize, u32)>,
    in_flight: Vec<(u64, usize, u32)>,
    /// Where there is no staging: a buffer for this alone.
    own: Option<Piece>,
    next_key: u64,
    filled: u64,
}

impl Warm {
    /// Whether a buffer is still to come back.
    pub(super) fn is_reading(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Whether a read with this key belongs here.
    pub(super) fn has(key: u64) -> bool {
        key & WARM != 0 && key >> 63 == 0
    }

    /// Staging buffers that are in use.
    #[cfg(test)]
    pub(super) fn buffers(&self) -> usize {
        self.in_flight.len()
    }
}

impl ExpertStore {
    /// From now on fills empty slots with these experts, those of a layer (by position) in their order, all layers
    /// alike. Returns how many there are slots for.
    ///
    /// # Errors
    /// When there is no memory for a buffer.
    pub(crate) fn warm_up(&mut self, layers: &[(usize, Vec<u32>)]) -> Result<u64, ArenaError> {
        if self.files.is_none() {
            return Ok(0);
        }
        if self.n_staging == 0 && self.warm.own.is_none() {
            let room = self.layers.iter().map(|l| l.buffer_bytes(l.layout)).max().unwrap_or(0);
            self.warm.own = Some(Arena::new("", room as u64)?.take(room)?);
        }
        let mut wanted: Vec<(usize, usize, u32)> = Vec::new();
        for (layer, experts) in layers {
            let Some(store) = self.layers.get(*layer) else { continue };
            let mut seen = vec![false; store.homes.len()];
            let mut is_wanted = |e: &u32| {
                let pooled = matches!(store.homes.get(*e as usize), Some(Home::Pooled)) && !store.cache.contains(*e);
                pooled && !std::mem::replace(&mut seen[*e as usize], true)
            };
            let experts = experts.iter().copied().filter(|e| is_wanted(e)).take(store.cache.n_unused() as usize);
            wanted.extend(experts.enumerate().map(|(rank, expert)| (rank, *layer, expert)));
        }
        wanted.sort_unstable();
        self.warm.queue = wanted.iter().map(|(_, layer, expert)| (*layer, *expert)).collect();
        Ok(wanted.len() as u64)
    }

    /// Slots that were filled so.
    pub(crate) fn warmed(&self) -> u64 {
        self.warm.filled
    }

    /// What the slots of each layer (by position) hold, the most recently used first.
    pub(crate) fn residents(&self) -> Vec<Vec<u32>> {
        let experts = |cache: &SlotCache| cache.resident().rev().map(|(expert, _)| expert).collect();
        self.layers.iter().map(|layer| experts(&layer.cache)).collect()
    }

    /// Starts reads while there is a buffer to spare.
    pub(super) fn read_warm(&mut self) {
        while self.warm.in_flight.len() < AT_ONCE
            && let Some((layer, expert)) = self.warm.queue.pop_front()
        {
            let store = &self.layers[layer];
            if store.cache.contains(expert) || store.cache.n_unused() == 0 {
                continue;
            }
            let piece = if self.n_staging == 0 {
                self.warm.own.take()
            } else if self.staging.len() > LEFT_FREE.min(self.n_staging - 1) {
                self.staging.pop()
            } else {
                None
            };
            let Some(mut piece) = piece else {
                self.warm.queue.push_front((layer, expert));
                return;
            };
            piece.truncate(store.buffer_bytes(store.layout));
            let key = WARM | self.warm.next_key;
            self.warm.next_key = (self.warm.next_key + 1) % WARM;
            self.warm.in_flight.push((key, layer, expert));
            self.fetch(key, layer, expert, piece, Urgency::Background);
        }
    }

    /// Puts away what has been read so far, of this kind or ahead; only while no step has reads in flight.
    pub(super) fn land_quietly(&mut self) {
        while let Some(arrival) = self.files.as_ref().and_then(FileTier::poll) {
            let _ = self.land_ahead(arrival);
        }
    }

    /// Gives what was read its slot, if one is still unused and the expert has none.
    pub(super) fn land_warm(&mut self, arrival: Arrival) {
        let Arrival { key, mut piece, result, .. } = arrival;
        let Some(i) = self.warm.in_flight.iter().position(|(k, ..)| *k == key) else { return };
        let (_, layer, expert) = self.warm.in_flight.swap_remove(i);
        let store = &mut self.layers[layer];
        // One that failed is read again if it is needed, and fails where somebody can be told.
        if result.is_ok()
            && let Some(slot) = store.cache.preload(expert)
        {
            if store.slots_on_gpu {
                self.fill(layer, expert, slot as usize, Some(&piece));
                self.warm.filled += u64::from(self.layers[layer].cache.contains(expert));
            } else if store.slots[slot as usize].is_some() {
                piece = keep(&mut store.slots, slot as usize, piece);
                self.warm.filled += 1;
            } else {
                // Its buffer was lost with a reader.
                store.cache.forget(expert);
            }
        }
        if self.n_staging == 0 {
            self.warm.own = Some(whole(piece));
        } else {
            self.staging.push(whole(piece));
        }
    }
}
