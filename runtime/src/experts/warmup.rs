//! Warm-up: fills empty slots in the background with the experts that are most likely to be used.
//!
//! A warm-up read goes into a buffer that is not needed at the moment, and its expert gets a slot
//! through the cache once it has landed. Until then the cache does not know of it, so no step ever
//! waits for a warm-up read. If a step reads the expert meanwhile, the copy that lands second is
//! dropped.

use super::cache::SlotCache;
use super::gpu::FillFrom;
use super::ids::{ExpertId, LayerExpert, SlotId};
use super::prefetch::RESERVED_STAGING_BUFFERS;
use super::store::ExpertStore;
use crate::tiers::arena::{Arena, ArenaError, ArenaSlice};
use crate::tiers::file::{Completion, FileTier, Priority};
use std::collections::VecDeque;
use tier_plan_cuda::transfers::TransferOrder;

/// Set in the keys of warm-up reads.
const WARMUP_KEY_BIT: u64 = 1 << 62;

/// Warm-up reads in flight at once.
const MAX_IN_FLIGHT: usize = 2;

/// A warm-up read in flight.
struct WarmupRead {
    key: u64,
    target: LayerExpert,
}

/// The experts that are still to be read into empty slots.
#[derive(Default)]
pub(super) struct Warmup {
    /// The next one first.
    queue: VecDeque<LayerExpert>,
    in_flight: Vec<WarmupRead>,
    /// The only buffer of warm-up reads where there is no staging.
    buffer: Option<ArenaSlice>,
    next_key: u64,
    n_filled: u64,
}

impl Warmup {
    /// Whether nothing is being read, or waits to be.
    pub(super) fn is_done(&self) -> bool {
        self.queue.is_empty() && self.in_flight.is_empty()
    }

    /// Whether a warm-up read is in flight, so that its buffer is still to come back.
    pub(super) fn is_reading(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Whether a read with this key is a warm-up read.
    pub(super) fn owns(key: u64) -> bool {
        key & WARMUP_KEY_BIT != 0 && key >> 63 == 0
    }

    /// Returns the staging buffers that warm-up reads hold.
    #[cfg(test)]
    pub(super) fn buffers(&self) -> usize {
        self.in_flight.len()
    }
}

impl ExpertStore {
    /// Fills empty slots from now on with these experts: per layer (by position) in the given
    /// order, all layers in step. Returns how many of the experts there are slots for.
    ///
    /// # Errors
    /// When a buffer can't be allocated.
    pub(crate) fn warm_up(&mut self, layers: &[(usize, Vec<u32>)]) -> Result<u64, ArenaError> {
        if self.files.is_none() {
            return Ok(0);
        }
        self.reclaim_slots();
        if self.n_staging == 0 && self.warmup.buffer.is_none() {
            let len = self
                .layers
                .iter()
                .map(|l| l.buffer_bytes(l.layout))
                .max()
                .unwrap_or(0);
            self.warmup.buffer = Some(Arena::new("", len as u64)?.take(len)?);
        }
        let mut ranked: Vec<(usize, LayerExpert)> = Vec::new();
        for (layer, experts) in layers {
            let Some(in_layer) = self.layers.get(*layer) else {
                continue;
            };
            let mut seen = vec![false; in_layer.n_expert()];
            let mut is_wanted = |expert: &ExpertId| {
                let is_missing =
                    in_layer.is_pooled(*expert) && !in_layer.cache.contains(expert.get());
                is_missing && !std::mem::replace(&mut seen[expert.index()], true)
            };
            let experts = experts
                .iter()
                .copied()
                .map(ExpertId::new)
                .filter(|expert| is_wanted(expert));
            let experts = experts.take(in_layer.cache.n_unused() as usize);
            ranked.extend(experts.enumerate().map(|(rank, expert)| {
                (
                    rank,
                    LayerExpert {
                        layer: *layer,
                        expert,
                    },
                )
            }));
        }
        ranked.sort_unstable();
        self.warmup.queue = ranked.iter().map(|(_, target)| *target).collect();
        Ok(ranked.len() as u64)
    }

    /// Returns the slots that warm-up reads have filled.
    pub(crate) fn warmed(&self) -> u64 {
        self.warmup.n_filled
    }

    /// Returns the experts in the slots of each layer (by position), most recently used first.
    pub(crate) fn residents(&self) -> Vec<Vec<u32>> {
        let experts =
            |cache: &SlotCache| cache.resident().rev().map(|(expert, _)| expert).collect();
        self.layers
            .iter()
            .map(|layer| experts(&layer.cache))
            .collect()
    }

    /// Starts warm-up reads while there is a buffer to spare.
    pub(super) fn start_warmup_reads(&mut self) {
        while self.warmup.in_flight.len() < MAX_IN_FLIGHT
            && let Some(target) = self.warmup.queue.pop_front()
        {
            let LayerExpert { layer, expert } = target;
            let (in_layer, cache) = (&self.layers[layer], &self.layers[layer].cache);
            if !in_layer.is_pooled(expert) || cache.contains(expert.get()) || cache.n_unused() == 0
            {
                continue;
            }
            let Some(buffer) = self.take_warmup_buffer(layer) else {
                self.warmup.queue.push_front(target);
                return;
            };
            let key = WARMUP_KEY_BIT | self.warmup.next_key;
            self.warmup.next_key = (self.warmup.next_key + 1) % WARMUP_KEY_BIT;
            self.warmup.in_flight.push(WarmupRead { key, target });
            self.start_read(key, layer, expert, buffer, Priority::Background);
        }
    }

    /// Takes a buffer for an expert of a layer, if one can be spared.
    fn take_warmup_buffer(&mut self, layer: usize) -> Option<ArenaSlice> {
        if self.n_staging > 0 {
            let can_spare = self.staging.len() > RESERVED_STAGING_BUFFERS.min(self.n_staging - 1);
            return if can_spare {
                self.take_staging(layer)
            } else {
                None
            };
        }
        let mut buffer = self.warmup.buffer.take()?;
        let layer = &self.layers[layer];
        buffer.truncate(layer.buffer_bytes(layer.layout));
        Some(buffer)
    }

    /// Puts away prefetches and warm-up reads that have finished, without waiting. May be called
    /// only while no step has reads in flight.
    pub(super) fn poll_completions(&mut self) {
        while let Some(completion) = self.files.as_ref().and_then(FileTier::poll) {
            let _ = self.take_completion(completion);
        }
    }

    /// Gives a landed expert its slot, if one is still empty and the expert has none.
    pub(super) fn land_warmup_read(&mut self, completion: Completion) {
        let Completion {
            key,
            mut buffer,
            result,
            ..
        } = completion;
        let Some(i) = self
            .warmup
            .in_flight
            .iter()
            .position(|read| read.key == key)
        else {
            return;
        };
        let LayerExpert { layer, expert } = self.warmup.in_flight.swap_remove(i).target;
        let in_layer = &mut self.layers[layer];
        // After a failure a step that needs the expert reads it again, and its caller gets the
        // error.
        if result.is_ok()
            && in_layer.is_pooled(expert)
            && let Some(slot) = in_layer.cache.preload(expert.get()).map(SlotId::new)
        {
            if in_layer.slots_on_gpu {
                let order = TransferOrder::AfterCompute;
                let lent = FillFrom::Lent(&buffer);
                self.fill_gpu_slot(layer, expert, slot, lent, order);
                self.warmup.n_filled += u64::from(self.layers[layer].cache.contains(expert.get()));
            } else if in_layer.slots[slot.index()].is_some() {
                buffer = in_layer.exchange(slot, buffer, self.staging_tier);
                self.warmup.n_filled += 1;
            } else {
                // A reader thread has taken the slot's buffer with it.
                in_layer.cache.forget(expert.get());
            }
        }
        if self.n_staging == 0 {
            self.warmup.buffer = Some(buffer.restored());
        } else {
            self.free_staging(buffer);
        }
    }
}
