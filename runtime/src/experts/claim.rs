//! What a beginning step makes of the prefetches for its layer: it claims those that it needs, and
//! takes back the buffers of the rest.
//!
//! A prefetch into staging is claimed like a read of the step's own that goes there. One into a lent
//! slot goes to the slot that the cache gives the expert by an exchange of the two slots' buffers,
//! without a copy. Where the cache gives it none, the expert borrows the slot: it computes there, and
//! whichever expert the cache gives that slot moves in afterwards, as where an evicted expert
//! computes in the step that evicts it.

use super::gpu::FillFrom;
use super::ids::{ExpertId, LayerExpert, SlotId, StepPos};
use super::prefetch::{Abandoned, LandedExpert, Prefetch, PrefetchState};
use super::step::{DeferredMove, ExpertState, LoadTarget, Step};
use super::store::ExpertStore;
use crate::tiers::arena::ArenaSlice;
use crate::tiers::file::ReadError;
use tier_plan_cuda::transfers::TransferOrder;

impl ExpertStore {
    /// Takes the buffer of an empty slot for a prefetch, if the layer has one that nothing else may
    /// fill meanwhile.
    pub(super) fn lend_slot(&mut self, layer: usize) -> Option<(SlotId, ArenaSlice)> {
        // Warm-up and rearrangement give slots away on their own. An expert that borrows a slot must
        // compute from the tier that it would be staged on.
        let is_free = self.warmup.is_done() && !self.rearranger.is_active();
        let layer_slots = &self.layers[layer];
        if !is_free || layer_slots.slots_on_gpu || layer_slots.slot_tier != self.staging_tier {
            return None;
        }
        let mut is_taken: Vec<bool> = layer_slots.slots.iter().map(Option::is_none).collect();
        let prefetches = self.prefetcher.prefetches.iter();
        let of_layer = prefetches.filter(|p| p.target.layer == layer);
        of_layer
            .filter_map(|p| p.slot)
            .for_each(|slot| is_taken[slot.index()] = true);
        let mut empty = layer_slots.cache.unused().iter().copied().map(SlotId::new);
        let slot = empty.find(|slot| !is_taken[slot.index()])?;
        let buffer = self.layers[layer].slots[slot.index()].take()?;
        Some((slot, buffer))
    }

    /// Whether the buffer of a slot is lent to a read in flight.
    #[cfg(test)]
    pub(super) fn is_lent(&self, layer: usize, slot: SlotId) -> bool {
        let reads = self.prefetcher.prefetches.iter();
        let reads = reads.filter(|p| !matches!(p.state, PrefetchState::Landed(_)));
        let lent = reads.map(|p| (p.target.layer, p.slot));
        let abandoned = self.prefetcher.abandoned.iter().map(|a| (a.layer, a.slot));
        lent.chain(abandoned).any(|l| l == (layer, Some(slot)))
    }

    /// Gives back the buffer of a prefetch that nothing needs.
    pub(super) fn free_prefetch_buffer(
        &mut self,
        layer: usize,
        slot: Option<SlotId>,
        buffer: ArenaSlice,
    ) {
        match slot {
            Some(slot) => self.layers[layer].slots[slot.index()] = Some(buffer),
            None => self.free_staging(buffer),
        }
    }

    /// Whether the buffer of a slot in main memory is away: with a read, most likely one that it was
    /// lent to and that nothing needs any more.
    pub(super) fn is_away(&self, layer: usize, slot: SlotId) -> bool {
        let layer = &self.layers[layer];
        !layer.slots_on_gpu && layer.slots[slot.index()].is_none()
    }

    /// Waits until the buffer of a slot is back. The step has no reads in flight.
    ///
    /// # Errors
    /// When no reader thread runs.
    pub(super) fn wait_for_slot(&mut self, layer: usize, slot: SlotId) -> Result<(), ReadError> {
        while self.is_away(layer, slot) {
            let files = self.files.as_ref().ok_or(ReadError::Stopped)?;
            let completion = files.wait()?;
            let _ = self.take_completion(completion);
        }
        Ok(())
    }

    /// Waits until no slot's buffer is lent to a read in flight. Predictions are dropped. May be called
    /// only between steps.
    pub(super) fn reclaim_slots(&mut self) {
        self.drop_predictions();
        while self.prefetcher.abandoned.iter().any(|a| a.slot.is_some()) {
            let Some(Ok(completion)) = self.files.as_ref().map(|files| files.wait()) else {
                return;
            };
            let _ = self.take_completion(completion);
        }
    }

    /// Gives the beginning step what was prefetched for it, and takes back the buffers of the rest.
    pub(super) fn claim_prefetches(&mut self, step: &mut Step) {
        self.prefetcher.score(step);
        if self.prefetcher.is_used() || self.warmup.is_reading() {
            self.poll_completions();
        }
        if self.prefetcher.prefetches.is_empty() {
            return;
        }
        let mut claimed = Vec::new();
        for at in (0..step.states.len()).map(StepPos::new) {
            if !matches!(
                step.state(at),
                ExpertState::NeedsSlot { .. } | ExpertState::NeedsStaging
            ) {
                continue;
            }
            let wanted = LayerExpert {
                layer: step.layer,
                expert: step.expert(at),
            };
            let mut prefetches = self.prefetcher.prefetches.iter();
            let Some(i) = prefetches.position(|p| p.target == wanted) else {
                continue;
            };
            self.prefetcher.count.useful += 1;
            let target = match self.prefetcher.prefetches[i].slot {
                Some(lent) => self.target_of_lent(step, at, lent),
                None => self.target_of_staged(step, at),
            };
            claimed.extend(self.claim(step, at, target, i));
        }
        self.wait_for_borrowers(step);
        self.drop_unclaimed(&claimed);
    }

    /// Returns where the step wants a prefetch in staging that it claims.
    fn target_of_staged(&self, step: &mut Step, at: StepPos) -> LoadTarget {
        match *step.state(at) {
            // A GPU's slot is filled from staging as soon as the bytes are there.
            ExpertState::NeedsSlot { slot, after: None }
                if self.layers[step.layer].slots_on_gpu =>
            {
                LoadTarget::Slot(slot)
            }
            ExpertState::NeedsSlot { slot, after } => {
                step.deferred.push(DeferredMove { at, slot, after });
                LoadTarget::Staging
            }
            _ => LoadTarget::Staging,
        }
    }

    /// Returns the slot where the step's expert computes whose prefetch goes into the slot `lent`.
    fn target_of_lent(&mut self, step: &mut Step, at: StepPos, lent: SlotId) -> LoadTarget {
        match *step.state(at) {
            ExpertState::NeedsSlot { slot, .. } => {
                self.exchange_slots(step, slot, lent);
                LoadTarget::Slot(slot)
            }
            _ => LoadTarget::Slot(lent),
        }
    }

    /// Exchanges the buffers of two slots of the step's layer, with whatever is or will be in them: an
    /// expert of the step computes where its bytes go.
    fn exchange_slots(&mut self, step: &mut Step, a: SlotId, b: SlotId) {
        if a == b {
            return;
        }
        let other = |slot: SlotId| match slot {
            slot if slot == a => b,
            slot if slot == b => a,
            slot => slot,
        };
        self.layers[step.layer].slots.swap(a.index(), b.index());
        for state in &mut step.states {
            match state {
                ExpertState::InSlot(slot) | ExpertState::Loading(LoadTarget::Slot(slot)) => {
                    *slot = other(*slot);
                }
                _ => {}
            }
        }
        let of_layer = |p: &&mut Prefetch| p.target.layer == step.layer;
        let prefetches = self.prefetcher.prefetches.iter_mut();
        let slots = prefetches.filter(of_layer).map(|p| &mut p.slot);
        let abandoned = self.prefetcher.abandoned.iter_mut();
        let abandoned = abandoned.filter(|a| a.layer == step.layer);
        for slot in slots.chain(abandoned.map(|a| &mut a.slot)) {
            *slot = slot.map(other);
        }
    }

    /// Has experts whose slots others of the step borrow wait for these.
    fn wait_for_borrowers(&self, step: &mut Step) {
        let cache = &self.layers[step.layer].cache;
        for borrower in (0..step.states.len()).map(StepPos::new) {
            let borrowed = match *step.state(borrower) {
                ExpertState::InSlot(slot) | ExpertState::Loading(LoadTarget::Slot(slot))
                    if cache.slot(step.expert(borrower).get()) != Some(slot.get()) =>
                {
                    slot
                }
                _ => continue,
            };
            for state in &mut step.states {
                if let ExpertState::NeedsSlot { slot, after } = state
                    && *slot == borrowed
                {
                    *after = Some(borrower);
                }
            }
            let moves = step.deferred.iter_mut().filter(|m| m.slot == borrowed);
            moves.for_each(|deferred| deferred.after = Some(borrower));
        }
    }

    /// Gives prefetch `i` to the step's expert at a position. Returns its key if it is still in
    /// flight.
    fn claim(&mut self, step: &mut Step, at: StepPos, target: LoadTarget, i: usize) -> Option<u64> {
        let prefetch = &mut self.prefetcher.prefetches[i];
        if let PrefetchState::Reading = prefetch.state {
            prefetch.state = PrefetchState::Claimed(at);
            step.set_state(at, ExpertState::Loading(target));
            step.in_flight += 1;
            return Some(prefetch.key);
        }
        if let PrefetchState::Landed(LandedExpert { staged, time }) =
            self.prefetcher.prefetches.swap_remove(i).state
        {
            self.prefetcher.count.in_time += 1;
            step.add_read_time(time);
            let state = match (target, staged) {
                (LoadTarget::Staging, Some(bytes)) => ExpertState::Staged(bytes),
                (LoadTarget::Slot(slot), Some(bytes)) => {
                    self.fill_from_prefetch(step.layer, step.expert(at), slot, bytes)
                }
                (LoadTarget::Slot(slot), None) => ExpertState::InSlot(slot),
                (LoadTarget::Staging, None) => {
                    unreachable!("what is in a lent slot computes in a slot")
                }
            };
            step.set_state(at, state);
        }
        None
    }

    /// Sends a prefetched expert to its slot on a GPU.
    fn fill_from_prefetch(
        &mut self,
        layer: usize,
        expert: ExpertId,
        slot: SlotId,
        bytes: ArenaSlice,
    ) -> ExpertState {
        let (from, order) = (FillFrom::Staging(bytes), TransferOrder::AtOnce);
        self.fill_gpu_slot(layer, expert, slot, from, order);
        ExpertState::InSlot(slot)
    }

    /// Drops all predictions and their prefetches.
    pub(super) fn drop_predictions(&mut self) {
        self.prefetcher.forget_predictions();
        self.drop_unclaimed(&[]);
    }

    /// Drops all prefetches that no step has claimed. Reads with the keys `claimed` become demand
    /// reads.
    fn drop_unclaimed(&mut self, claimed: &[u64]) {
        for prefetch in std::mem::take(&mut self.prefetcher.prefetches) {
            match prefetch.state {
                PrefetchState::Claimed(_) => self.prefetcher.prefetches.push(prefetch),
                PrefetchState::Landed(LandedExpert { staged, .. }) => {
                    self.prefetcher.count.wasted += 1;
                    if let Some(bytes) = staged {
                        self.free_staging(bytes);
                    }
                }
                PrefetchState::Reading => {
                    self.prefetcher.count.wasted += 1;
                    self.prefetcher.abandoned.push(Abandoned {
                        key: prefetch.key,
                        layer: prefetch.target.layer,
                        slot: prefetch.slot,
                    });
                }
            }
        }
        if let Some(files) = &self.files {
            files.resolve_predicted(claimed);
        }
    }
}
