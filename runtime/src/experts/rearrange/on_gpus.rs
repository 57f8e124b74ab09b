//! Experts that take the places of others on GPUs.
//!
//! A GPU's memory is allocated when a model is loaded, so in every layer it keeps as many pins as it has.
//! One that comes is copied over one that leaves, between two steps: from its pin or slot in main memory,
//! or where it is mapped. Otherwise it is read into a buffer of its own first, one at a time.

use super::{ExpertStore, Rearranger};
use crate::experts::ids::{ExpertId, LayerExpert};
use crate::experts::layer::{ExpertBacking, Layout};
use crate::experts::view::ExpertView;
use crate::tiers::arena::{Arena, ArenaSlice};
use tier_plan_formats::placement::{LayerPlacement, Pins, TierIdx};

/// An expert that takes the place of another of its layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exchange {
    comes: LayerExpert,
    leaves: ExpertId,
    /// Tier of the GPU.
    tier: TierIdx,
}

/// The read of the first exchange's expert.
#[derive(Default)]
pub(super) enum GpuRead {
    #[default]
    None,
    /// By its key.
    InFlight(u64),
    /// The expert, packed.
    Done(ArenaSlice),
}

impl Rearranger {
    /// Takes the finished read of an expert that comes to a GPU.
    pub(super) fn land_for_gpu(&mut self, buffer: ArenaSlice, has_succeeded: bool) {
        self.gpu_read = GpuRead::None;
        if has_succeeded {
            self.gpu_read = GpuRead::Done(buffer);
        } else {
            self.host_buffer = Some(buffer.restored());
            self.fail_exchange();
        }
    }

    /// Leaves out the first exchange: its experts stay where they are.
    fn fail_exchange(&mut self) {
        self.report.failed_pins += 1;
        self.exchanges.pop_front();
    }
}

impl ExpertStore {
    /// Returns what changes places on GPUs where a layer is to be as `wanted`.
    pub(super) fn exchanges(&self, layer: usize, wanted: &LayerPlacement) -> Vec<Exchange> {
        let of_gpu = |Pins { tier, experts }: Pins| {
            let on_tier = wanted.pinned.iter().filter(|pins| pins.tier == tier);
            let stay: Vec<u32> = on_tier.flat_map(|pins| &pins.experts).copied().collect();
            let come = stay.iter().copied().filter(|e| !experts.contains(e));
            let leave = experts.iter().copied().filter(|e| !stay.contains(e));
            let exchange = |(comes, leaves)| Exchange {
                comes: LayerExpert {
                    layer,
                    expert: ExpertId::new(comes),
                },
                leaves: ExpertId::new(leaves),
                tier,
            };
            come.zip(leave).map(exchange).collect::<Vec<_>>()
        };
        let pins = self.layers[layer].pins().into_iter();
        let on_gpus = pins.filter(|pins| self.gpu_of(pins.tier).is_some());
        on_gpus.flat_map(of_gpu).collect()
    }

    /// Goes on with what changes places on GPUs, for as many bytes as are `left`.
    pub(super) fn exchange_on_gpus(&mut self, left: &mut usize) {
        while *left > 0
            && let Some(exchange) = self.rearranger.exchanges.front().copied()
        {
            let read = match std::mem::take(&mut self.rearranger.gpu_read) {
                GpuRead::None => None,
                GpuRead::Done(buffer) => Some(buffer),
                in_flight @ GpuRead::InFlight(_) => {
                    self.rearranger.gpu_read = in_flight;
                    return;
                }
            };
            if !self.exchange(exchange, read.as_ref()) {
                return self.read_for_gpu(exchange);
            }
            if let Some(buffer) = read {
                self.rearranger.host_buffer = Some(buffer.restored());
            }
            self.rearranger.exchanges.pop_front();
            *left = left.saturating_sub(self.layers[exchange.comes.layer].expert_bytes());
        }
    }

    /// Has an expert take another's place on a GPU. Returns whether its bytes are in main memory: where
    /// they were `read` to, or elsewhere.
    fn exchange(&mut self, exchange: Exchange, read: Option<&ArenaSlice>) -> bool {
        let Exchange {
            comes: LayerExpert { layer, expert },
            leaves,
            tier,
        } = exchange;
        let Some(gpu) = self.gpu_of(tier) else {
            unreachable!("only pins on GPUs that the store has are exchanged")
        };
        // Taken out of the store, whose other parts the view borrows.
        let mut gpus = std::mem::take(&mut self.gpus);
        let view = self.in_main_memory(layer, expert, read);
        let exchanged = view.map(|view| {
            let biases = view.biases();
            let bytes = view.bytes(biases.as_ref());
            let experts = gpus[gpu].filler.experts();
            experts.exchange_pins(layer, leaves.index(), expert.index(), &bytes)
        });
        self.gpus = gpus;
        let Some(exchanged) = exchanged else {
            return false;
        };
        let in_layer = &mut self.layers[layer];
        in_layer.leave_gpu(leaves, tier);
        if exchanged.is_ok() {
            let bytes = in_layer.expert_bytes() as u64;
            if let Some((tier, memory)) = in_layer.move_to_gpu(expert, tier) {
                self.rearranger.free(tier, memory);
            }
            self.rearranger.report.done_bytes += bytes;
        } else {
            // A step that needs the GPU fails, too, and its caller gets the error.
            self.rearranger.report.failed_pins += 1;
        }
        self.layers[layer].set_homes(self.n_staging == 0);
        true
    }

    /// Returns the matrices of an expert, if they are in main memory.
    fn in_main_memory<'a>(
        &'a self,
        layer: usize,
        expert: ExpertId,
        read: Option<&'a ArenaSlice>,
    ) -> Option<ExpertView<'a>> {
        if let Some(bytes) = read {
            return Some(self.view_in(layer, expert, bytes, Layout::Packed));
        }
        let in_layer = &self.layers[layer];
        if let ExpertBacking::Pinned { bytes, layout, .. } = in_layer.backing(expert) {
            return Some(self.view_in(layer, expert, bytes, *layout));
        }
        match in_layer.slot_with(expert) {
            Some(bytes) => Some(self.view_in(layer, expert, bytes, in_layer.layout)),
            None => (self.n_staging == 0).then(|| self.mapped_view(in_layer, expert)),
        }
    }

    /// Begins to read the expert of the first exchange.
    fn read_for_gpu(&mut self, exchange: Exchange) {
        let bytes = self.layers[exchange.comes.layer].expert_bytes();
        let Some(buffer) = self.host_buffer(bytes) else {
            return self.rearranger.fail_exchange();
        };
        match self.read_packed(exchange.comes, buffer) {
            Ok(key) => self.rearranger.gpu_read = GpuRead::InFlight(key),
            Err(buffer) => {
                self.rearranger.host_buffer = Some(buffer.restored());
                self.rearranger.fail_exchange();
            }
        }
    }

    /// Returns a buffer for one expert, which no plan counts: there is one while a rearrangement needs it.
    fn host_buffer(&mut self, bytes: usize) -> Option<ArenaSlice> {
        let buffer = self.rearranger.host_buffer.take();
        let mut buffer = buffer.or_else(|| {
            let largest = self.layers.iter().map(|l| l.expert_bytes()).max()?;
            Arena::new("", largest as u64).ok()?.take(largest).ok()
        })?;
        buffer.truncate(bytes);
        Some(buffer)
    }
}
