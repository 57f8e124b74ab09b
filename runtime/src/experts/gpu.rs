//! Experts on GPUs: which of a step's are there, requesting their results, and filling slots there.
//!
//! An expert whose slot is on a GPU is read into staging, sent to the slot as soon as it has landed,
//! and computed there. The CPU and the GPU go on computing meanwhile: the copy is a transfer from the
//! staging buffer, which is free once the transfer is done. If another expert of the step still uses
//! the slot, the CPU computes the new one from staging. It moves to the slot once the other one has
//! been requested, as it does with slots in main memory.

use super::ids::{ExpertId, SlotId, StepPos};
use super::layer::ExpertBacking;
use super::step::{ExpertState, Step};
use super::store::ExpertStore;
use crate::gpu::rows::GpuRows;
use crate::tiers::arena::ArenaSlice;
use crate::tiers::transit::{ExpertRanges, SlotFiller};
use tier_plan_cuda::CudaError;
use tier_plan_cuda::experts::{PinnedExperts, Place, RequestedExperts};
use tier_plan_cuda::transfers::TransferOrder;
use tier_plan_formats::placement::TierIdx;

/// A GPU's experts, and the requests of the current step.
pub(super) struct GpuExperts {
    pub(super) tier: TierIdx,
    pub(super) filler: SlotFiller,
    /// Positions in the step of the requested experts, in the order of the requests.
    requested: Vec<usize>,
    /// Whether the GPU has the activations of the step's token.
    has_token: bool,
}

/// Where the bytes of an expert are that goes to a slot on a GPU.
pub(super) enum FillFrom<'a> {
    /// In a staging buffer, which is free once the GPU has the bytes.
    Staging(ArenaSlice),
    /// In a buffer that its owner uses again at once.
    Lent(&'a ArenaSlice),
    /// In the mapped file.
    Mapped,
}

/// Where on a GPU an expert of a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GpuSlot {
    /// Index of the GPU among those with experts.
    pub gpu: usize,
    /// Tier of the GPU's memory.
    pub tier: TierIdx,
    place: Place,
}

impl ExpertStore {
    /// Sets the GPUs, with their tiers, whose experts are backed or have slots there.
    pub(crate) fn set_gpus(&mut self, gpus: Vec<(TierIdx, PinnedExperts)>) {
        let with_tier = |(tier, experts)| GpuExperts {
            tier,
            filler: SlotFiller::new(experts, &self.staging, &self.streamed_memory(tier)),
            requested: Vec::new(),
            has_token: false,
        };
        self.gpus = gpus.into_iter().map(with_tier).collect();
    }

    /// Returns the number of GPUs that have experts, or buffers for some.
    pub(crate) fn n_gpus(&self) -> usize {
        self.gpus.len()
    }

    /// Whether a GPU has experts, pinned or in slots.
    pub(crate) fn has_experts_on_gpus(&self) -> bool {
        let on_gpu = |backing: &ExpertBacking| matches!(backing, ExpertBacking::Gpu(_));
        let mut layers = self.layers.iter();
        !self.gpus.is_empty() && layers.any(|l| l.slots_on_gpu || l.backings.iter().any(on_gpu))
    }

    /// Returns the index of a tier's GPU among those with experts.
    pub(super) fn gpu_of(&self, tier: TierIdx) -> Option<usize> {
        self.gpus.iter().position(|g| g.tier == tier)
    }

    /// Returns the experts on a tier's GPU.
    pub(crate) fn of_tier(&mut self, tier: TierIdx) -> Option<&mut PinnedExperts> {
        self.gpus
            .iter_mut()
            .find(|g| g.tier == tier)
            .map(|g| g.filler.experts())
    }

    /// Returns how many results a GPU can hold until they are fetched.
    pub(crate) fn gpu_capacity(&self, gpu: usize) -> usize {
        self.gpus.get(gpu).map_or(0, |g| g.filler.free_rows())
    }

    /// Returns where the expert at this position of the step computes, if that is a GPU.
    pub(crate) fn gpu_slot(&self, step: &Step, at: usize) -> Option<GpuSlot> {
        let layer = &self.layers[step.layer];
        let expert = step.expert(StepPos::new(at));
        let (tier, place) = match (&step.states[at], layer.backing(expert)) {
            (ExpertState::InPlace, ExpertBacking::Gpu(tier)) => {
                (*tier, Place::Pinned(expert.index()))
            }
            (ExpertState::InSlot(slot), _) if layer.slots_on_gpu => {
                (layer.slot_tier, Place::Slot(slot.index()))
            }
            _ => return None,
        };
        let gpu = self.gpu_of(tier)?;
        Some(GpuSlot { gpu, tier, place })
    }

    /// Requests the experts at these positions of a token's step, which are all on GPUs, without
    /// waiting. `x` is the token's row, and `weights` are those of all of its experts.
    ///
    /// # Errors
    /// When a GPU fails; the step is given up then.
    pub(crate) fn ask_token(
        &mut self,
        step: &mut Step,
        positions: &[usize],
        x: &[f32],
        weights: &[f32],
    ) -> Result<(), CudaError> {
        for gpu in 0..self.gpus.len() {
            let slots = positions
                .iter()
                .filter_map(|at| Some((*at, self.gpu_slot(step, *at)?)));
            let (positions, places): (Vec<usize>, Vec<Place>) = slots
                .filter(|(_, slot)| slot.gpu == gpu)
                .map(|(at, slot)| (at, slot.place))
                .unzip();
            if places.is_empty() {
                continue;
            }
            let weights: Vec<f32> = positions.iter().map(|at| weights[*at]).collect();
            let experts = RequestedExperts {
                places: &places,
                weights: &weights,
            };
            self.request_for_token(step, gpu, x, experts, &positions)?;
        }
        Ok(())
    }

    /// Requests results for a token, whose row a GPU gets once.
    pub(super) fn request_for_token(
        &mut self,
        step: &mut Step,
        gpu: usize,
        x: &[f32],
        experts: RequestedExperts<'_>,
        positions: &[usize],
    ) -> Result<(), CudaError> {
        let x = (!self.gpus[gpu].has_token).then_some(x);
        self.request(step, gpu, x, experts, positions)?;
        self.gpus[gpu].has_token = true;
        Ok(())
    }

    /// Requests experts for rows of a batch without waiting. Row `i` goes through the expert at
    /// `positions[i]` of the step, which is on this GPU.
    ///
    /// # Errors
    /// When the GPU fails; the step is given up then.
    pub(crate) fn ask_rows(
        &mut self,
        step: &mut Step,
        gpu: usize,
        positions: &[usize],
        rows: &GpuRows,
    ) -> Result<(), CudaError> {
        let places: Vec<Place> = positions
            .iter()
            .filter_map(|at| Some(self.gpu_slot(step, *at)?.place))
            .collect();
        debug_assert_eq!(places.len(), positions.len());
        let experts = RequestedExperts {
            places: &places,
            weights: &rows.weights,
        };
        self.request(step, gpu, Some(&rows.sent), experts, positions)
    }

    /// Requests results from a GPU; `x` is `None` where it has the token's activations already. An
    /// expert that could not be copied to its slot since the last request fails this one.
    fn request(
        &mut self,
        step: &mut Step,
        gpu: usize,
        x: Option<&[f32]>,
        experts: RequestedExperts<'_>,
        positions: &[usize],
    ) -> Result<(), CudaError> {
        let failed_copy = self.gpu_error.take();
        let gpu = &mut self.gpus[gpu];
        let requested =
            failed_copy.map_or_else(|| gpu.filler.experts().ask(step.layer, x, experts), Err);
        gpu.requested.extend_from_slice(positions);
        requested.inspect_err(|_| self.give_up(step))
    }

    /// Waits for the requested results of a GPU, `[requested, hidden]`, and returns their
    /// positions.
    ///
    /// # Errors
    /// When the GPU fails; the step is given up then.
    pub(crate) fn fetch_gpu(
        &mut self,
        step: &mut Step,
        gpu: usize,
        hidden: usize,
        out: &mut Vec<f32>,
    ) -> Result<Vec<usize>, CudaError> {
        let experts = &mut self.gpus[gpu];
        let positions = std::mem::take(&mut experts.requested);
        out.resize(positions.len() * hidden, 0.0);
        if positions.is_empty() {
            return Ok(positions);
        }
        let fetched = experts.filler.experts().fetch(out);
        fetched.inspect_err(|_| self.give_up(step))?;
        self.streams_have_ended(gpu);
        Ok(positions)
    }

    /// Fails if an expert could not be copied to its slot on a GPU since the last call.
    ///
    /// # Errors
    /// The first such error.
    pub(crate) fn check_gpus(&mut self) -> Result<(), CudaError> {
        self.gpu_error.take().map_or(Ok(()), Err)
    }

    /// Drops the requests and results of the previous step.
    pub(super) fn forget_requests(&mut self) {
        self.end_streams();
        for gpu in &mut self.gpus {
            gpu.filler.experts().forget();
            gpu.requested.clear();
            gpu.has_token = false;
        }
    }

    /// Fills an expert's slot on a GPU. An error is kept for the next request, and the cache forgets
    /// the expert.
    pub(super) fn fill_gpu_slot(
        &mut self,
        layer: usize,
        expert: ExpertId,
        slot: SlotId,
        from: FillFrom<'_>,
        order: TransferOrder,
    ) {
        let in_layer = &self.layers[layer];
        let Some(at) = self.gpu_of(in_layer.slot_tier) else {
            unreachable!("a layer's slots are on a GPU that the store has")
        };
        // Taken out of the store, whose other parts the view borrows.
        let mut gpus = std::mem::take(&mut self.gpus);
        let (filler, to) = (&mut gpus[at].filler, (layer, slot.index()));
        let view = match &from {
            FillFrom::Staging(buffer) => self.view_in(layer, expert, buffer, in_layer.layout),
            FillFrom::Lent(buffer) => self.view_in(layer, expert, buffer, in_layer.layout),
            FillFrom::Mapped => self.mapped_view(in_layer, expert),
        };
        let biases = view.biases();
        let bytes = view.bytes(biases.as_ref());
        // Where the GPU reads the matrices itself; otherwise they have been sent.
        let ranges = match &from {
            FillFrom::Staging(buffer) if filler.can_read(buffer) => Ok(ExpertRanges {
                gate: bytes.gate.map(|gate| buffer.range_of(gate)),
                up: buffer.range_of(bytes.up),
                down: buffer.range_of(bytes.down),
            }),
            _ => Err(filler.experts().fill(to.0, to.1, &bytes, order)),
        };
        let biases = biases
            .as_ref()
            .map(|biases| biases.each_ref().map(Vec::as_slice));
        let (filled, free) = match (from, ranges) {
            (FillFrom::Staging(buffer), Ok(ranges)) => {
                match filler.fill_from(to, buffer, &ranges, biases, order) {
                    Ok(transit) => {
                        self.in_transit.push_back((at, transit));
                        (Ok(()), None)
                    }
                    Err((buffer, error)) => (Err(error), Some(buffer)),
                }
            }
            (FillFrom::Staging(buffer), Err(sent)) => (sent, Some(buffer)),
            (FillFrom::Lent(_) | FillFrom::Mapped, sent) => (sent.err().unwrap_or(Ok(())), None),
        };
        self.gpus = gpus;
        if let Some(buffer) = free {
            self.free_staging(buffer);
        }
        if let Err(error) = filled {
            self.layers[layer].cache.forget(expert.get());
            self.gpu_error.get_or_insert(error);
        }
    }

    /// Gives back the staging buffers that GPUs have read.
    pub(super) fn end_transfers(&mut self) {
        while let Some((gpu, transit)) = self.in_transit.front() {
            if !self.gpus[*gpu].filler.has_read(transit) {
                break;
            }
            self.wait_for_transfer();
        }
    }

    /// Waits for the oldest transfer, and gives its staging buffer back, if there is one.
    pub(super) fn wait_for_transfer(&mut self) {
        let Some((gpu, transit)) = self.in_transit.pop_front() else {
            return;
        };
        // None is missing but while a panic unwinds.
        let Some(gpu) = self.gpus.get_mut(gpu) else {
            return;
        };
        let (buffer, waited) = gpu.filler.take_back(transit);
        if let Err(error) = waited {
            self.gpu_error.get_or_insert(error);
        }
        self.free_staging(buffer);
    }

    /// Returns the matrices in a slot on a GPU, one after the other.
    #[cfg(test)]
    pub(super) fn bytes_on_gpu(&self, layer: usize, slot: SlotId) -> Vec<u8> {
        let gpu = self.gpu_of(self.layers[layer].slot_tier).unwrap();
        let place = Place::Slot(slot.index());
        self.gpus[gpu].filler.bytes_in(layer, place).unwrap()
    }

    /// Returns the matrices of an expert that is pinned on a GPU, one after the other.
    #[cfg(test)]
    pub(super) fn bytes_of_pin(&self, layer: usize, expert: ExpertId, tier: TierIdx) -> Vec<u8> {
        let place = Place::Pinned(expert.index());
        let gpu = self.gpu_of(tier).unwrap();
        self.gpus[gpu].filler.bytes_in(layer, place).unwrap()
    }
}
