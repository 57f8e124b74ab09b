//! The expert store: pinned experts, slots that the pooled experts share, and reads from the slow
//! tier.
//!
//! A layer's accesses for a token or a batch are one [`Step`]. All choices are looked up together,
//! reads of what is missing are submitted as far as there are buffers, and each expert can compute
//! once it is [ready](Step::is_ready). [`SlotCache`](super::cache::SlotCache) alone decides which
//! experts stay in the slots; it is the code that the planner replays.
//!
//! Each expert of a step goes through these [states](ExpertState):
//!
//! ```text
//!                      begin: look all experts up
//!          ┌────────────────────┬──────────────────┐
//!     no pooled expert         hit                miss
//!          │                    │        NeedsSlot or NeedsStaging
//!          │                    │                  │  submit: a buffer is free
//!          │                    │               Loading ── read failed ──▶ give_up
//!          │                    │                  │  wait: the read has landed
//!       InPlace              InSlot         InSlot or Staged
//!          └────────────────────┼──────────────────┘
//!                               │  the expert computes
//!                               ▼  release: its buffer is free
//!                            Released
//! ```
//!
//! A step may give an expert the slot of another one that it uses too. While that one has not
//! computed, the bytes take a detour through staging, as a [`DeferredMove`]: the expert computes
//! there, and its bytes move to the slot when both have computed. Where no staging buffer can be
//! spared for that long, [`finish`](ExpertStore::finish) reads the slot ([`SlotRefill`]).
//!
//! If a read fails, the step is [given up](ExpertStore::give_up): all its buffers come back, the
//! cache forgets every expert whose slot does not hold it, and the store can be used as before.

use super::cache::Access;
use super::checksums::{Checksums, TensorSlice};
use super::copies::ExpertReads;
use super::gpu::{FillFrom, GpuExperts};
use super::ids::{ExpertId, SlotId, StepPos};
use super::layer::{ExpertBacking, LayerExperts, Layout};
use super::prefetch::{Prefetcher, StepRead};
use super::rearrange::Rearranger;
use super::step::{DeferredMove, ExpertState, HeldExpert, LoadTarget, SlotRefill};
use super::streamed::TokenStream;
use super::view::ExpertView;
use super::warmup::Warmup;
use crate::cancel::Cancel;
use crate::tiers::arena::ArenaSlice;
use crate::tiers::file::{Completion, FileTier, Priority, ReadError};
use crate::tiers::transit::InTransit;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::transfers::TransferOrder;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::placement::TierIdx;

pub(crate) use super::step::Step;

/// Reads of a step in flight at once, unless there are more staging buffers.
const MIN_READ_WINDOW: usize = 8;

/// All routed experts of a loaded model.
pub(crate) struct ExpertStore {
    pub(super) gguf: Arc<Gguf>,
    /// By position among the layers with routed experts.
    pub(super) layers: Vec<LayerExperts>,
    /// `None` only where every expert computes from its backing copy.
    pub(super) files: Option<FileTier>,
    /// Polled between the experts of a batch.
    pub(crate) cancel: Cancel,
    /// Free staging buffers.
    pub(super) staging: Vec<ArenaSlice>,
    /// Staging buffers in all; 0 where the slow tier is mapped.
    pub(super) n_staging: usize,
    pub(super) staging_tier: TierIdx,
    pub(super) mapped_tier: TierIdx,
    /// Scratch of [`begin`](Self::begin).
    accesses: Vec<Access>,
    /// Scratch of [`begin`](Self::begin).
    pooled: Vec<u32>,
    pub(super) prefetcher: Prefetcher,
    pub(super) warmup: Warmup,
    pub(super) rearranger: Rearranger,
    /// What every read is compared with.
    pub(super) checksums: Option<Arc<Checksums>>,
    pub(super) gpus: Vec<GpuExperts>,
    /// Staging buffers that GPUs read, with the number of the GPU, in the order of the transfers.
    pub(super) in_transit: VecDeque<(usize, InTransit)>,
    /// Why an expert could not be copied to its slot on a GPU.
    pub(super) gpu_error: Option<CudaError>,
    pub(super) token_stream: TokenStream,
}

impl ExpertStore {
    /// `files` may be absent only where no expert is pooled. `prefetches` says whether they are on
    /// a real device, where speculative reads save time.
    pub(crate) fn new(
        gguf: Arc<Gguf>,
        layers: Vec<LayerExperts>,
        files: Option<FileTier>,
        staging: Vec<ArenaSlice>,
        staging_tier: TierIdx,
        mapped_tier: TierIdx,
        prefetches: bool,
    ) -> Self {
        let prefetcher = Prefetcher::new(prefetches && files.is_some(), staging.len());
        let n_staging = staging.len();
        Self {
            gguf,
            layers,
            files,
            cancel: Cancel::default(),
            staging,
            n_staging,
            staging_tier,
            mapped_tier,
            accesses: Vec::new(),
            pooled: Vec::new(),
            prefetcher,
            warmup: Warmup::default(),
            rearranger: Rearranger::default(),
            checksums: None,
            gpus: Vec::new(),
            in_transit: VecDeque::new(),
            gpu_error: None,
            token_stream: TokenStream::default(),
        }
    }

    /// Compares every expert that is read from now on with its checksums.
    pub(crate) fn verify(&mut self, checksums: Arc<Checksums>) {
        self.checksums = Some(checksums);
    }

    /// Returns the slices of all experts that are read where they are mapped.
    pub(crate) fn in_place(&self) -> Vec<TensorSlice> {
        self.layers
            .iter()
            .flat_map(LayerExperts::mapped_slices)
            .collect()
    }

    /// Returns the bytes of one expert of a layer.
    pub(crate) fn expert_bytes(&self, layer: usize) -> u64 {
        self.layers[layer].expert_bytes() as u64
    }

    /// Counts one token's choices for the slot policy. All tokens of a step are counted before it
    /// begins.
    pub(crate) fn note(&mut self, layer: usize, chosen: &[u16]) {
        self.layers[layer]
            .cache
            .note(chosen.iter().copied().map(u32::from));
    }

    /// Looks up all `used` experts, in order of last use, and submits the first reads. They will
    /// compute in the order given by `order`, a permutation of `used`.
    pub(crate) fn begin(&mut self, layer: usize, used: &[u32], order: Vec<u32>) -> Step {
        self.forget_requests();
        let experts = &mut self.layers[layer];
        self.pooled.clear();
        self.pooled.extend(
            used.iter()
                .filter(|e| experts.is_pooled(ExpertId::new(**e))),
        );
        self.accesses.clear();
        experts.cache.settle(&self.pooled, &mut self.accesses);
        let mut step = Step::new(layer, order);
        step.pinned_hits = (used.len() - self.pooled.len()) as u64;
        for at in (0..step.experts().len()).map(StepPos::new) {
            let expert = step.expert(at).get();
            let access = self
                .pooled
                .iter()
                .position(|p| *p == expert)
                .map(|i| self.accesses[i]);
            self.add_access(&mut step, at, access);
        }
        step.residency = (0..step.states.len()).map(|at| step.is_ready(at)).collect();
        self.claim_prefetches(&mut step);
        self.submit(&mut step);
        self.start_idle_reads(&step);
        step
    }

    /// Counts one access of a beginning step, and sets the expert's first state; `None` is an
    /// access to an expert that is not pooled.
    fn add_access(&self, step: &mut Step, at: StepPos, access: Option<Access>) {
        let is_mapped = self.n_staging == 0;
        let state = match access {
            None => ExpertState::InPlace,
            Some(Access::Hit { slot }) => ExpertState::InSlot(SlotId::new(slot)),
            Some(Access::Fill { slot, evicted }) => {
                let slot = SlotId::new(slot);
                let after = evicted.and_then(|e| step.position_of(ExpertId::new(e)));
                if after.is_some() && is_mapped {
                    // On a mapped tier it computes in place and moves to its slot when the step
                    // ends: no other buffer could hold it, and the slot's expert may come later in
                    // the step.
                    step.refills.push(SlotRefill { at, slot });
                    ExpertState::InPlace
                } else {
                    ExpertState::NeedsSlot { slot, after }
                }
            }
            // On a mapped tier an expert without a slot computes in place.
            Some(Access::Staged) if is_mapped => ExpertState::InPlace,
            Some(Access::Staged) => ExpertState::NeedsStaging,
        };
        match access {
            Some(Access::Hit { .. }) => step.slot_hits += 1,
            Some(Access::Fill { .. } | Access::Staged) => step.misses += 1,
            None => {}
        }
        if matches!(access, Some(Access::Fill { .. })) || matches!(state, ExpertState::NeedsStaging)
        {
            step.read_bytes += self.expert_bytes(step.layer);
        }
        step.states.push(state);
    }

    /// Submits the step's reads in order, until buffers or the window run out.
    fn submit(&mut self, step: &mut Step) {
        if self.files.is_none() {
            return;
        }
        self.end_transfers();
        while step.next_read < step.states.len()
            && step.in_flight < MIN_READ_WINDOW.max(self.n_staging)
        {
            let at = StepPos::new(step.next_read);
            let on_gpu = self.layers[step.layer].slots_on_gpu;
            let (target, deferred) = match *step.state(at) {
                ExpertState::NeedsSlot { slot, after: None } if on_gpu && self.n_staging == 0 => {
                    let (expert, order) = (step.expert(at), TransferOrder::AtOnce);
                    self.fill_gpu_slot(step.layer, expert, slot, FillFrom::Mapped, order);
                    step.set_state(at, ExpertState::InSlot(slot));
                    step.next_read += 1;
                    continue;
                }
                ExpertState::NeedsSlot { slot, after: None } => (LoadTarget::Slot(slot), None),
                // Not on a GPU: where an expert computes must not depend on how fast reads are.
                ExpertState::NeedsSlot {
                    slot,
                    after: Some(after),
                } if !on_gpu && step.is_released(after) => (LoadTarget::Slot(slot), None),
                ExpertState::NeedsSlot { slot, after } => {
                    (LoadTarget::Staging, Some(DeferredMove { at, slot, after }))
                }
                ExpertState::NeedsStaging => (LoadTarget::Staging, None),
                _ => {
                    step.next_read += 1;
                    continue;
                }
            };
            let Some(buffer) = self.take_buffer(step.layer, target) else {
                return;
            };
            step.deferred.extend(deferred);
            self.start_step_read(step, at, target, buffer);
            step.next_read += 1;
        }
    }

    /// Takes the buffer that a read of a layer's expert goes into, if it is free.
    fn take_buffer(&mut self, layer: usize, target: LoadTarget) -> Option<ArenaSlice> {
        match target {
            LoadTarget::Slot(slot) if !self.layers[layer].slots_on_gpu => {
                self.layers[layer].slots[slot.index()].take()
            }
            LoadTarget::Slot(_) | LoadTarget::Staging => self.take_staging(layer),
        }
    }

    /// Takes a staging buffer, of the length that a layer's experts need, if one is free.
    pub(super) fn take_staging(&mut self, layer: usize) -> Option<ArenaSlice> {
        if self.staging.is_empty() {
            self.wait_for_transfer();
        }
        let mut buffer = self.staging.pop()?;
        let layer = &self.layers[layer];
        buffer.truncate(layer.buffer_bytes(layer.layout));
        Some(buffer)
    }

    /// Gives a staging buffer back.
    pub(super) fn free_staging(&mut self, buffer: ArenaSlice) {
        self.staging.push(buffer.restored());
    }

    /// Starts a read of the step's expert at a position.
    fn start_step_read(
        &self,
        step: &mut Step,
        at: StepPos,
        target: LoadTarget,
        buffer: ArenaSlice,
    ) {
        self.start_read(
            at.read_key(),
            step.layer,
            step.expert(at),
            buffer,
            Priority::Demand,
        );
        step.set_state(at, ExpertState::Loading(target));
        step.in_flight += 1;
    }

    /// Starts reading an expert into a buffer.
    pub(super) fn start_read(
        &self,
        key: u64,
        layer: usize,
        expert: ExpertId,
        buffer: ArenaSlice,
        priority: Priority,
    ) {
        let (Some(files), experts) = (&self.files, &self.layers[layer]) else {
            return;
        };
        let ExpertReads { spans, finish } =
            experts.reads(&self.gguf, files, self.checksums.as_deref(), expert);
        files.submit_finished(key, &spans, finish, buffer, priority);
    }

    /// Waits for one read of the step and returns the position that it made ready.
    ///
    /// # Errors
    /// When the read fails. The step is given up then, and the store can be used as before.
    pub(crate) fn wait(&mut self, step: &mut Step) -> Result<usize, ReadError> {
        let start = Instant::now();
        loop {
            // A read that has ended since the last call may have freed a buffer.
            self.submit(step);
            let files = self.files.as_ref().ok_or(ReadError::Stopped)?;
            if step.in_flight == 0 && !self.prefetcher.is_reading() && !self.warmup.is_reading() {
                return Err(ReadError::Stopped);
            }
            let completion = files.wait()?;
            let Some(landed) = self.land(step, completion) else {
                continue;
            };
            step.waited += start.elapsed();
            return match landed {
                Ok(at) => Ok(at.index()),
                Err(error) => {
                    self.give_up(step);
                    Err(error)
                }
            };
        }
    }

    /// Puts the buffer of a finished read where it belongs. Returns the position that it was for,
    /// or its error, and `None` if it was not for the step.
    fn land(
        &mut self,
        step: &mut Step,
        completion: Completion,
    ) -> Option<Result<StepPos, ReadError>> {
        let StepRead {
            at,
            buffer,
            result,
            time,
        } = self.take_completion(completion)?;
        step.add_read_time(time);
        step.in_flight -= 1;
        let succeeded = result.is_ok();
        let state = match *step.state(at) {
            ExpertState::Loading(LoadTarget::Slot(slot))
                if succeeded && self.layers[step.layer].slots_on_gpu =>
            {
                // No request for the slot's old expert is under way: those of earlier steps have been
                // fetched, and those of this one, where the slot is filled when it ends.
                let (expert, order) = (step.expert(at), TransferOrder::AtOnce);
                let from = FillFrom::Staging(buffer);
                self.fill_gpu_slot(step.layer, expert, slot, from, order);
                ExpertState::InSlot(slot)
            }
            ExpertState::Loading(LoadTarget::Slot(_)) if self.layers[step.layer].slots_on_gpu => {
                self.free_staging(buffer);
                ExpertState::Released
            }
            ExpertState::Loading(LoadTarget::Slot(slot)) => {
                self.layers[step.layer].slots[slot.index()] = Some(buffer);
                if succeeded {
                    ExpertState::InSlot(slot)
                } else {
                    ExpertState::Released
                }
            }
            _ if succeeded => ExpertState::Staged(buffer),
            _ => {
                self.free_staging(buffer);
                ExpertState::Released
            }
        };
        step.set_state(at, state);
        Some(result.map(|()| at))
    }

    /// Ends a step that can't go on: all buffers come back, and the cache forgets every expert that
    /// its slot does not hold.
    pub(crate) fn give_up(&mut self, step: &mut Step) {
        while step.in_flight > 0 {
            let Some(Ok(completion)) = self.files.as_ref().map(FileTier::wait) else {
                break;
            };
            // One error is reported; the others of this step have the same cause or will come
            // again.
            let _ = self.land(step, completion);
        }
        for at in (0..step.states.len()).map(StepPos::new) {
            let expert = step.expert(at).get();
            let cache = &mut self.layers[step.layer].cache;
            match std::mem::replace(&mut step.states[at.index()], ExpertState::Released) {
                // The slot holds it, unless the cache has given the slot to another expert.
                ExpertState::InSlot(slot) if cache.slot(expert) == Some(slot.get()) => {}
                ExpertState::Staged(buffer) => {
                    cache.forget(expert);
                    self.free_staging(buffer);
                }
                _ => cache.forget(expert),
            }
        }
        for held in step.held.drain(..) {
            self.free_staging(held.bytes);
        }
        self.forget_requests();
        // The cache has forgotten every expert that did not reach its slot, and one error is
        // enough.
        self.gpu_error = None;
        self.drop_predictions();
    }

    /// Returns the matrices and the tier of a ready expert.
    pub(crate) fn view<'a>(&'a self, step: &'a Step, at: usize) -> (ExpertView<'a>, TierIdx) {
        let layer = &self.layers[step.layer];
        let (expert, state) = (step.expert(StepPos::new(at)), &step.states[at]);
        let (bytes, tier, layout): (&[u8], TierIdx, Layout) = match state {
            ExpertState::InSlot(slot) => match &layer.slots[slot.index()] {
                Some(buffer) => (buffer, layer.slot_tier, layer.layout),
                None => unreachable!("a slot in use has its buffer"),
            },
            ExpertState::Staged(buffer) => (buffer, self.staging_tier, layer.layout),
            _ => match layer.backing(expert) {
                ExpertBacking::Pinned {
                    tier,
                    bytes,
                    layout,
                } => (bytes, *tier, *layout),
                _ => return (self.mapped_view(layer, expert), self.mapped_tier),
            },
        };
        (self.view_in(step.layer, expert, bytes, layout), tier)
    }

    /// Returns the matrices of an expert whose bytes are in a buffer with this layout.
    pub(super) fn view_in<'a>(
        &self,
        layer: usize,
        expert: ExpertId,
        bytes: &'a [u8],
        layout: Layout,
    ) -> ExpertView<'a> {
        let layer = &self.layers[layer];
        layer.view(Some(expert), |part| {
            let at = layer
                .slice_location(&self.gguf, part, expert.index(), layout)
                .buffer_offset;
            (&bytes[at..at + part.slice_bytes], part.order_in_buffers())
        })
    }

    /// Returns the matrices of an expert in the mapped file.
    pub(super) fn mapped_view<'a>(
        &'a self,
        layer: &LayerExperts,
        expert: ExpertId,
    ) -> ExpertView<'a> {
        layer.view(Some(expert), |part| {
            let tensor = &self.gguf.tensors()[part.tensor];
            let slice = self.gguf.slice(tensor, expert.index(), part.n_slices);
            (slice, self.gguf.row_order(part.tensor))
        })
    }

    /// Gives back the buffer of a computed expert and submits reads that waited for one.
    pub(crate) fn release(&mut self, step: &mut Step, at: usize) {
        let at = StepPos::new(at);
        if let ExpertState::Staged(buffer) =
            std::mem::replace(&mut step.states[at.index()], ExpertState::Released)
        {
            self.release_staged(step, at, buffer);
        }
        while let Some(i) = step.held.iter().position(|held| held.after == Some(at)) {
            let HeldExpert {
                expert,
                slot,
                bytes,
                ..
            } = step.held.swap_remove(i);
            self.move_to_slot(step.layer, expert, slot, bytes);
        }
        self.submit(step);
        self.start_idle_reads(step);
    }

    /// Frees the staging buffer of a computed expert, once its bytes are in its slot if it has one.
    fn release_staged(&mut self, step: &mut Step, at: StepPos, buffer: ArenaSlice) {
        let expert = step.expert(at);
        let deferred = step
            .deferred
            .iter()
            .find(|deferred| deferred.at == at)
            .copied();
        let Some(DeferredMove { slot, after, .. }) = deferred else {
            return self.free_staging(buffer);
        };
        let after = after.filter(|after| !step.is_released(*after));
        if after.is_none() && !self.is_away(step.layer, slot) {
            return self.move_to_slot(step.layer, expert, slot, buffer);
        }
        self.end_transfers();
        // One buffer stays free, or reads could not go on.
        if self.staging.len() + self.in_transit.len() > 1 {
            step.held.push(HeldExpert {
                expert,
                slot,
                bytes: buffer,
                after,
            });
        } else {
            step.refills.push(SlotRefill { at, slot });
            self.free_staging(buffer);
        }
    }

    /// Moves a computed expert from a staging buffer to its slot, and frees a staging buffer.
    fn move_to_slot(&mut self, layer: usize, expert: ExpertId, slot: SlotId, buffer: ArenaSlice) {
        if self.layers[layer].slots_on_gpu {
            let (from, order) = (FillFrom::Staging(buffer), TransferOrder::AfterCompute);
            return self.fill_gpu_slot(layer, expert, slot, from, order);
        }
        let free = self.layers[layer].exchange(slot, buffer, self.staging_tier);
        self.free_staging(free);
    }

    /// Ends a step whose experts have all computed: the slots then hold what the cache says.
    ///
    /// # Errors
    /// When a read fails, as in [`wait`](Self::wait).
    pub(crate) fn finish(&mut self, step: &mut Step) -> Result<(), ReadError> {
        while let Some(HeldExpert {
            expert,
            slot,
            bytes,
            ..
        }) = step.held.pop()
        {
            if let Err(error) = self.wait_for_slot(step.layer, slot) {
                self.free_staging(bytes);
                return Err(error);
            }
            self.move_to_slot(step.layer, expert, slot, bytes);
        }
        while let Some(SlotRefill { at, slot }) = step.refills.pop() {
            let expert = step.expert(at);
            if self.layers[step.layer].slots_on_gpu && self.n_staging == 0 {
                let order = TransferOrder::AfterCompute;
                self.fill_gpu_slot(step.layer, expert, slot, FillFrom::Mapped, order);
                continue;
            }
            let target = LoadTarget::Slot(slot);
            self.wait_for_slot(step.layer, slot)?;
            let Some(buffer) = self.take_buffer(step.layer, target) else {
                self.layers[step.layer].cache.forget(expert.get());
                continue;
            };
            self.start_step_read(step, at, target, buffer);
            self.wait(step)?;
        }
        Ok(())
    }

    /// Fails if a file that experts are read from has changed.
    ///
    /// # Errors
    /// [`ReadError::Changed`].
    pub(crate) fn check_files(&self) -> Result<(), ReadError> {
        self.files.as_ref().map_or(Ok(()), FileTier::check)
    }
}

impl Drop for ExpertStore {
    fn drop(&mut self) {
        self.end_streams();
        // A GPU that goes unlocks memory that others may still read.
        while !self.in_transit.is_empty() {
            self.wait_for_transfer();
        }
    }
}
