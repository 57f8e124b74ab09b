//! Experts that a plan pins on GPUs anew.
//!
//! A GPU's memory is allocated when a model is loaded, so a layer has room for as many pins there as it
//! began with. An expert that comes is copied where one that leaves was, between two steps: from its pin or
//! slot in main memory, or from the mapped file. Otherwise it is read into a buffer of its own first.

use super::{ExpertStore, NewPin, PinRead};
use crate::experts::ids::{ExpertId, LayerExpert};
use crate::experts::layer::{ExpertBacking, Layout};
use crate::experts::view::ExpertView;
use crate::tiers::arena::{Arena, ArenaSlice};
use std::collections::VecDeque;
use tier_plan_formats::placement::{LayerPlacement, Pins, TierIdx};

/// Reads of experts for GPUs at once, each with a buffer that no plan counts.
const MAX_READS: usize = 2;

/// The layer whose pins on GPUs are changing.
pub(super) struct CurrentLayer {
    layer: usize,
    wanted: LayerPlacement,
    /// Experts that are to be pinned, without those that are being read.
    come: VecDeque<NewPin>,
    /// Pinned experts that are not wanted where they are, with the tiers of their GPUs.
    leave: Vec<(TierIdx, ExpertId)>,
}

/// Why an expert was not copied to a GPU.
enum NotCopied {
    /// It is not in main memory.
    Elsewhere,
    /// The GPU, or what is read of the file, has failed.
    Failed,
}

impl ExpertStore {
    /// Returns how many experts of a layer the GPU of a tier can have pinned.
    pub(crate) fn places_on_gpu(&self, layer: usize, tier: TierIdx) -> usize {
        let pins = self.layers[layer].pins().into_iter();
        let pinned: usize = pins
            .filter(|pins| pins.tier == tier)
            .map(|pins| pins.experts.len())
            .sum();
        let gpu = self.gpu_of(tier).map(|gpu| &self.gpus[gpu].filler);
        pinned + gpu.map_or(0, |filler| filler.n_free_pins(layer))
    }

    /// Makes a layer the one whose pins on GPUs change.
    pub(super) fn begin_on_gpus(&mut self, layer: usize, wanted: LayerPlacement) {
        let in_layer = &self.layers[layer];
        let bytes = in_layer.expert_bytes();
        let on_gpu = |pins: &&Pins| self.gpu_of(pins.tier).is_some();
        let new = |pins: &Pins| {
            let tier = pins.tier;
            let pin = move |expert| NewPin {
                target: LayerExpert { layer, expert },
                tier,
                bytes,
                on_gpu: true,
            };
            in_layer.not_on_tier(pins).map(pin).collect::<Vec<_>>()
        };
        let come = wanted.pinned.iter().filter(on_gpu).flat_map(new).collect();
        let is_wanted = |tier, expert: &u32| {
            let mut pins = wanted.pinned.iter().filter(|pins| pins.tier == tier);
            pins.any(|pins| pins.experts.contains(expert))
        };
        let pins = in_layer.pins();
        let leave = pins.iter().filter(on_gpu).flat_map(|pins| {
            let leave = pins.experts.iter().filter(|e| !is_wanted(pins.tier, e));
            leave.map(|e| (pins.tier, ExpertId::new(*e)))
        });
        self.rearranger.current = Some(CurrentLayer {
            layer,
            leave: leave.collect(),
            come,
            wanted,
        });
    }

    /// Goes on with the pins on GPUs of the current layer, for as many bytes as are `left`. Returns what is
    /// wanted of the layer once they are in place.
    pub(super) fn continue_on_gpus(&mut self, left: &mut usize) -> Option<(usize, LayerPlacement)> {
        while *left > 0
            && let Some(pin) = self.rearranger.current.as_mut()?.come.pop_front()
        {
            match self.copy_to_gpu(pin, None) {
                Err(NotCopied::Elsewhere) if self.n_reads_for_gpus() < MAX_READS => {
                    self.read_for_gpu(pin);
                }
                Err(NotCopied::Elsewhere) => {
                    self.rearranger.current.as_mut()?.come.push_front(pin);
                    return None;
                }
                Err(NotCopied::Failed) => self.rearranger.report.failed_pins += 1,
                Ok(()) => *left = left.saturating_sub(pin.bytes),
            }
        }
        let is_done = self.rearranger.current.as_ref()?.come.is_empty();
        if !is_done || self.n_reads_for_gpus() > 0 {
            return None;
        }
        let CurrentLayer {
            layer,
            wanted,
            leave,
            ..
        } = self.rearranger.current.take()?;
        for (tier, expert) in leave {
            self.leave_gpu(layer, expert, tier);
        }
        Some((layer, wanted))
    }

    /// Returns how many experts are read for GPUs, or have been and are not copied there yet.
    fn n_reads_for_gpus(&self) -> usize {
        let reads = self.rearranger.reading.iter().map(|read| read.pin);
        let landed = self.rearranger.landed.iter().map(|(pin, _)| *pin);
        reads.chain(landed).filter(|pin| pin.on_gpu).count()
    }

    /// Copies an expert that was read to its GPU, and keeps the buffer for the next one.
    pub(super) fn copy_read_to_gpu(&mut self, pin: NewPin, buffer: ArenaSlice) {
        if self.copy_to_gpu(pin, Some(&buffer)).is_err() {
            self.rearranger.report.failed_pins += 1;
        }
        self.rearranger.free_pin(pin, buffer);
    }

    /// Pins an expert on a GPU, where one that leaves was: from where it was `read` to, or from elsewhere
    /// in main memory.
    fn copy_to_gpu(&mut self, pin: NewPin, read: Option<&ArenaSlice>) -> Result<(), NotCopied> {
        let NewPin {
            target: LayerExpert { layer, expert },
            tier,
            ..
        } = pin;
        if read.is_none() && self.view_in_main_memory(layer, expert).is_none() {
            return Err(NotCopied::Elsewhere);
        }
        // A file that was cut short must not be looked at where it is mapped. One that has changed is of no
        // use either way.
        self.check_files().map_err(|_| NotCopied::Failed)?;
        let gpu = self.gpu_of(tier).ok_or(NotCopied::Failed)?;
        while self.gpus[gpu].filler.n_free_pins(layer) == 0 {
            let current = self.rearranger.current.as_mut();
            let leave = current.map(|current| &mut current.leave);
            let leaves = leave.and_then(|leave| {
                let at = leave.iter().position(|(of, _)| *of == tier)?;
                Some(leave.swap_remove(at).1)
            });
            self.leave_gpu(layer, leaves.ok_or(NotCopied::Failed)?, tier);
        }
        // Taken out of the store, whose other parts the view borrows.
        let mut gpus = std::mem::take(&mut self.gpus);
        let view = match read {
            Some(bytes) => Some(self.view_in(layer, expert, bytes, Layout::Packed)),
            None => self.view_in_main_memory(layer, expert),
        };
        let pinned = view.map(|view| {
            let biases = view.biases();
            let bytes = view.bytes(biases.as_ref());
            let experts = gpus[gpu].filler.experts();
            experts.pin(layer, expert.index(), &bytes)
        });
        self.gpus = gpus;
        // A step that needs the GPU fails, too, and its caller gets the error.
        pinned
            .ok_or(NotCopied::Elsewhere)?
            .map_err(|_| NotCopied::Failed)?;
        if let ExpertBacking::Gpu(other) = *self.layers[layer].backing(expert) {
            self.leave_gpu(layer, expert, other);
        }
        if let Some((tier, memory)) = self.layers[layer].move_to_gpu(expert, tier) {
            self.rearranger.free(tier, memory);
        }
        self.rearranger.report.done_bytes += pin.bytes as u64;
        Ok(())
    }

    /// Gives up the pin of an expert on a GPU, if it still has it.
    fn leave_gpu(&mut self, layer: usize, expert: ExpertId, tier: TierIdx) {
        let Some(gpu) = self.gpu_of(tier) else {
            return;
        };
        if self.layers[layer].leave_gpu(expert, tier) {
            // What its entry in the tables says then matters to no one.
            let _ = self.gpus[gpu].filler.experts().unpin(layer, expert.index());
            self.layers[layer].set_homes(self.n_staging == 0);
        }
    }

    /// Returns the matrices of an expert, if they are in main memory or mapped.
    fn view_in_main_memory(&self, layer: usize, expert: ExpertId) -> Option<ExpertView<'_>> {
        let in_layer = &self.layers[layer];
        let in_slot = || {
            let bytes = in_layer.slot_with(expert)?;
            Some(self.view_in(layer, expert, bytes, in_layer.layout))
        };
        let mapped = || (self.n_staging == 0).then(|| self.mapped_view(in_layer, expert));
        let in_place = self.view_in_place(layer, expert);
        in_place.or_else(in_slot).or_else(mapped)
    }

    /// Begins to read an expert for a GPU.
    fn read_for_gpu(&mut self, pin: NewPin) {
        let Some(buffer) = self.host_buffer(pin.bytes) else {
            self.rearranger.report.failed_pins += 1;
            return;
        };
        match self.read_packed(pin.target, buffer) {
            Ok(key) => self.rearranger.reading.push(PinRead { key, pin }),
            Err(buffer) => {
                self.rearranger.report.failed_pins += 1;
                self.rearranger.free_pin(pin, buffer);
            }
        }
    }

    /// Returns a buffer for one expert, of which there are [`MAX_READS`] while a rearrangement needs them.
    fn host_buffer(&mut self, bytes: usize) -> Option<ArenaSlice> {
        let buffer = self.rearranger.host_buffers.pop();
        let mut buffer = buffer.or_else(|| {
            let largest = self.layers.iter().map(|l| l.expert_bytes()).max()?;
            Arena::new("", largest as u64).ok()?.take(largest).ok()
        })?;
        buffer.truncate(bytes);
        Some(buffer)
    }
}
