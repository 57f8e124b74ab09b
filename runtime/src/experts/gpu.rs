//! Experts on GPUs: which of a step's are there, asking for them, and filling slots there.
//!
//! An expert that is to have a slot on a GPU is read into staging, copied to the slot as soon as it has come, and computed
//! there; its staging buffer is free at once. One whose slot is in use by the same step computes from staging, on the
//! processor, and goes to its slot when that has been asked for, as it does where slots are in main memory.

use super::layer::{Home, Layout};
use super::store::{ExpertStore, Step, Use, keep, whole};
use super::view::ExpertView;
use crate::tiers::arena::Piece;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::experts::{ExpertBytes, PinnedExperts, Place};

/// A GPU's experts, and who of a step was asked for.
pub(crate) struct OnGpu {
    tier: usize,
    experts: PinnedExperts,
    /// Positions in the step of what was asked for, in that order.
    asked: Vec<usize>,
    /// It has the activations of the step's token.
    has_token: bool,
}

/// Where an expert of a step computes if that is a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spot {
    /// Which GPU of those with experts.
    pub gpu: usize,
    /// Its tier.
    pub tier: usize,
    place: Place,
}

impl ExpertStore {
    /// The GPUs that have the experts whose home, or slot, is on their tier.
    pub(crate) fn set_gpus(&mut self, gpus: Vec<(usize, PinnedExperts)>) {
        let on_gpu = |(tier, experts)| OnGpu { tier, experts, asked: Vec::new(), has_token: false };
        self.gpus = gpus.into_iter().map(on_gpu).collect();
    }

    /// GPUs that have experts.
    pub(crate) fn n_gpus(&self) -> usize {
        self.gpus.len()
    }

    /// The experts on a tier's GPU.
    pub(crate) fn of_tier(&mut self, tier: usize) -> Option<&mut PinnedExperts> {
        self.gpus.iter_mut().find(|g| g.tier == tier).map(|g| &mut g.experts)
    }

    /// Results that a GPU has room for until they are fetched.
    pub(crate) fn gpu_room(&self, gpu: usize) -> usize {
        self.gpus.get(gpu).map_or(0, |g| g.experts.free_rows())
    }

    /// Where the expert at this position of the step computes, if that is a GPU.
    pub(crate) fn spot(&self, step: &Step, at: usize) -> Option<Spot> {
        let layer = &self.layers[step.layer];
        let (tier, place) = match (&step.uses[at], &layer.homes[step.experts[at] as usize]) {
            (Use::AtHome, Home::Gpu(tier)) => (*tier, Place::Pinned(step.experts[at] as usize)),
            (Use::Slot(slot), _) if layer.slots_on_gpu => (layer.slot_tier, Place::Slot(*slot)),
            _ => return None,
        };
        let gpu = self.gpus.iter().position(|g| g.tier == tier)?;
        Some(Spot { gpu, tier, place })
    }

    /// Has GPUs compute the experts at these positions of a token's step, which are all on GPUs, and goes on at once.
    ///
    /// # Errors
    /// When a GPU fails; the step is given up then.
    pub(crate) fn ask_token(&mut self, step: &mut Step, positions: &[usize], x: &[f32]) -> Result<(), CudaError> {
        for gpu in 0..self.gpus.len() {
            let spots = positions.iter().filter_map(|at| Some((*at, self.spot(step, *at)?)));
            let (asked, places): (Vec<usize>, Vec<Place>) =
                spots.filter(|(_, spot)| spot.gpu == gpu).map(|(at, spot)| (at, spot.place)).unzip();
            if places.is_empty() {
                continue;
            }
            let x = (!self.gpus[gpu].has_token).then_some(x);
            self.ask(step, gpu, x, &places, &asked)?;
            self.gpus[gpu].has_token = true;
        }
        Ok(())
    }

    /// Has a GPU compute experts for rows of a batch: `x` is `[rows, hidden]`, and each row goes through the expert at its
    /// position of the step, which is on this GPU.
    ///
    /// # Errors
    /// When the GPU fails; the step is given up then.
    pub(crate) fn ask_rows(
        &mut self,
        step: &mut Step,
        gpu: usize,
        positions: &[usize],
        x: &[f32],
    ) -> Result<(), CudaError> {
        let places: Vec<Place> = positions.iter().filter_map(|at| Some(self.spot(step, *at)?.place)).collect();
        debug_assert_eq!(places.len(), positions.len());
        self.ask(step, gpu, Some(x), &places, positions)
    }

    fn ask(
        &mut self,
        step: &mut Step,
        gpu: usize,
        x: Option<&[f32]>,
        places: &[Place],
        positions: &[usize],
    ) -> Result<(), CudaError> {
        let failed = self.gpu_error.take();
        let on = &mut self.gpus[gpu];
        let asked = failed.map_or_else(|| on.experts.ask(step.layer, x, places), Err);
        on.asked.extend_from_slice(positions);
        asked.inspect_err(|_| self.give_up(step))
    }

    /// Waits for what a GPU was asked for, `[asked, hidden]`, and returns the positions.
    ///
    /// # Errors
    /// As [`ask_rows`](Self::ask_rows).
    pub(crate) fn fetch_gpu(
        &mut self,
        step: &mut Step,
        gpu: usize,
        hidden: usize,
        out: &mut Vec<f32>,
    ) -> Result<Vec<usize>, CudaError> {
        let on = &mut self.gpus[gpu];
        let positions = std::mem::take(&mut on.asked);
        out.resize(positions.len() * hidden, 0.0);
        if positions.is_empty() {
            return Ok(positions);
        }
        let fetched = on.experts.fetch(out);
        fetched.inspect_err(|_| self.give_up(step))?;
        Ok(positions)
    }

    /// Fails if an expert could not be copied to its slot on a GPU since the last call.
    ///
    /// # Errors
    /// When that is so.
    pub(crate) fn check_gpus(&mut self) -> Result<(), CudaError> {
        self.gpu_error.take().map_or(Ok(()), Err)
    }

    /// Of a new step nothing was asked for, and an old one's results are nobody's.
    pub(super) fn forget_asked(&mut self) {
        for on in &mut self.gpus {
            on.experts.forget();
            on.asked.clear();
            on.has_token = false;
        }
    }

    /// Moves a computed expert from a staging buffer to its slot, wherever that is; returns the free buffer.
    pub(super) fn move_to_slot(&mut self, layer: usize, expert: u32, slot: usize, piece: Piece) -> Piece {
        if !self.layers[layer].slots_on_gpu {
            return keep(&mut self.layers[layer].slots, slot, piece);
        }
        self.fill(layer, expert, slot, Some(&piece));
        whole(piece)
    }

    /// Copies an expert to its slot on a GPU, from a staging buffer or from where it is mapped. What fails is told by the
    /// next who asks the GPU, and the expert has no slot then.
    pub(super) fn fill(&mut self, layer: usize, expert: u32, slot: usize, from: Option<&Piece>) {
        // Apart from the rest of the store, which has the bytes.
        let mut gpus = std::mem::take(&mut self.gpus);
        let store = &self.layers[layer];
        let view = match from {
            Some(piece) => self.seen(layer, expert, piece, store.layout),
            None => self.mapped(store, expert as usize),
        };
        let biases = view.biases();
        let biases = biases.as_ref().map(|[gate, up, down]| [&gate[..], &up[..], &down[..]]);
        let (gate, up, down) = (view.gate.weights.bytes(), view.up.weights.bytes(), view.down.weights.bytes());
        let on = gpus.iter_mut().find(|g| g.tier == store.slot_tier);
        let filled = on.map(|on| on.experts.fill(layer, slot, &ExpertBytes { gate, up, down, biases }));
        self.gpus = gpus;
        if let Some(Err(error)) = filled {
            self.layers[layer].cache.forget(expert);
            self.gpu_error.get_or_insert(error);
        }
    }

    /// An expert whose bytes are in a buffer, laid out so.
    pub(super) fn seen<'a>(&self, layer: usize, expert: u32, bytes: &'a [u8], layout: Layout) -> ExpertView<'a> {
        let store = &self.layers[layer];
        store.view(|part| {
            let (_, at) = store.place(&self.gguf, part, expert as usize, layout);
            &bytes[at..at + part.slice_bytes]
        })
    }

    /// The matrices in a slot on a GPU, one after the other.
    #[cfg(test)]
    pub(super) fn bytes_on_gpu(&self, layer: usize, slot: usize) -> Vec<u8> {
        let on = self.gpus.iter().find(|g| g.tier == self.layers[layer].slot_tier).unwrap();
        on.experts.slot_bytes(layer, slot).unwrap()
    }
}
