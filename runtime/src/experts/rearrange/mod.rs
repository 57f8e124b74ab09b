//! Pins and slots where another plan wants them, while steps go on.
//!
//! The layers change one after the other. What the plan has no use for in a layer is given up between
//! two steps, and its memory becomes [holes](Holes). A slot that is given up while it holds an expert
//! that is to be pinned becomes its pin as it is. New slots take memory from the holes at once. Other
//! new pins are copied from slots or read behind all other reads. Until its bytes are there, an expert
//! is on the slow tier like any other, so a step never waits for any of these reads, and what it computes
//! does not depend on them.
//!
//! Where no hole is large enough, buffers slide together, a bounded number of bytes between two
//! steps.
//!
//! A layer's pins on GPUs change first, since pins that leave main memory make room there. These copies
//! are made between two steps, too. Which experts a GPU rounds changes with them.

mod on_gpus;
mod room;

use super::ids::{ExpertId, LayerExpert};
use super::layer::{LayerExperts, Layout};
use super::store::ExpertStore;
use crate::tiers::arena::ArenaSlice;
use crate::tiers::file::{Completion, FileTier, Priority};
use crate::tiers::holes::Holes;
use on_gpus::CurrentLayer;
use std::collections::{BTreeMap, VecDeque};
use tier_plan_formats::placement::{LayerPlacement, Pins, SlotPolicy, TierIdx};

/// Set in the keys of reads of new pins; the two bits above are clear.
const PIN_KEY_BIT: u64 = 1 << 61;

/// Reads of new pins in flight at once. Of these only a few keep the drive busy.
const MAX_IN_FLIGHT: usize = 8;

/// Bytes that are copied between two steps, a few milliseconds' worth.
const COPIED_BETWEEN_STEPS: usize = 32 << 20;

/// An expert that is to be pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct NewPin {
    target: LayerExpert,
    tier: TierIdx,
    bytes: usize,
    /// Whether the tier is that of a GPU.
    on_gpu: bool,
}

/// Slots that a layer is to get.
#[derive(Debug, Clone, Copy)]
struct NewSlots {
    layer: usize,
    n: u32,
}

/// A read of a new pin in flight.
struct PinRead {
    key: u64,
    pin: NewPin,
}

/// Where the experts of a layer are.
pub(crate) struct Arrangement {
    pub(crate) pins: Vec<Pins>,
    pub(crate) slots: u32,
    pub(crate) slot_tier: TierIdx,
    pub(crate) policy: SlotPolicy,
}

/// What has become of a rearrangement, or will.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rearranged {
    /// Bytes of all new pins.
    pub total_bytes: u64,
    /// Bytes of those that are in place.
    pub done_bytes: u64,
    /// Experts that stay on the slow tier because a read or a GPU failed.
    pub failed_pins: u64,
    /// Experts that stay on the slow tier because their memory was in too many pieces.
    pub left_pins: u64,
    /// Slots that were left out because their memory was in too many pieces.
    pub left_slots: u64,
}

/// The rearrangement that is under way, if one is, and free memory.
#[derive(Default)]
pub(super) struct Rearranger {
    /// By tier.
    holes: Vec<Holes>,
    is_active: bool,
    /// Layers that have not changed yet, by position.
    to: VecDeque<(usize, LayerPlacement)>,
    /// The layer whose pins on GPUs are changing.
    current: Option<CurrentLayer>,
    /// For reads of experts that come to GPUs.
    host_buffers: Vec<ArenaSlice>,
    /// Without memory.
    pins: Vec<NewPin>,
    /// Without memory.
    slots: Vec<NewSlots>,
    /// With memory, to be copied or read.
    ready: VecDeque<(NewPin, ArenaSlice)>,
    reading: Vec<PinRead>,
    /// Read, to be pinned before the next step.
    landed: Vec<(NewPin, ArenaSlice)>,
    next_key: u64,
    report: Rearranged,
}

impl Rearranger {
    /// Whether a read with this key is of a new pin.
    pub(super) fn owns(key: u64) -> bool {
        key >> 61 == PIN_KEY_BIT >> 61
    }

    /// Takes a finished read.
    pub(super) fn land(&mut self, completion: Completion) {
        let Completion {
            key,
            buffer,
            result,
            ..
        } = completion;
        let Some(at) = self.reading.iter().position(|read| read.key == key) else {
            return;
        };
        let pin = self.reading.swap_remove(at).pin;
        if result.is_ok() {
            self.landed.push((pin, buffer));
        } else {
            // A step that needs the expert reads it again, and its caller gets the error.
            self.report.failed_pins += 1;
            self.free_pin(pin, buffer);
        }
    }

    /// Takes the buffer back that was to become a pin, or the source of one.
    fn free_pin(&mut self, pin: NewPin, buffer: ArenaSlice) {
        if pin.on_gpu {
            self.host_buffers.push(buffer.restored());
        } else {
            self.free(pin.tier, buffer);
        }
    }

    /// Returns the free memory of a tier.
    fn holes(&mut self, tier: TierIdx) -> &mut Holes {
        if self.holes.len() <= tier.get() {
            self.holes.resize_with(tier.get() + 1, Holes::default);
        }
        &mut self.holes[tier.get()]
    }

    fn free(&mut self, tier: TierIdx, buffer: ArenaSlice) {
        self.holes(tier).put(buffer);
    }

    /// Returns the free bytes of all tiers.
    #[cfg(test)]
    pub(super) fn free_bytes(&self) -> usize {
        self.holes.iter().map(Holes::bytes).sum()
    }

    /// Adds memory to a tier.
    #[cfg(test)]
    pub(super) fn add_memory(&mut self, tier: TierIdx, memory: ArenaSlice) {
        self.free(tier, memory);
    }

    /// Whether a rearrangement is under way.
    pub(super) fn is_active(&self) -> bool {
        self.is_active
    }

    /// Whether no new pin is being read or waits for that.
    fn is_idle(&self) -> bool {
        let none_is_new = self.ready.is_empty() && self.reading.is_empty();
        none_is_new && self.landed.is_empty() && self.current.is_none()
    }

    /// Whether every layer has given up what it is to.
    fn all_begun(&self) -> bool {
        self.to.is_empty() && self.current.is_none()
    }

    /// Whether nothing waits for memory.
    fn all_placed(&self) -> bool {
        self.pins.is_empty() && self.slots.is_empty()
    }
}

impl ExpertStore {
    /// Begins to move pins and slots to where `layers` has them, per layer with routed experts.
    /// What they take together on a tier must not be more than pins and slots take there now. May be
    /// called only between steps, and while no rearrangement is under way.
    pub(crate) fn rearrange(&mut self, layers: &[LayerPlacement]) {
        self.reclaim_slots();
        let to: VecDeque<_> = layers.iter().cloned().enumerate().collect();
        let to_be_pinned = |(layer, wanted): &(usize, LayerPlacement)| {
            let in_layer = self.layers.get(*layer)?;
            let pins = wanted.pinned.iter();
            let new = pins
                .map(|pins| in_layer.not_on_tier(pins).count())
                .sum::<usize>();
            Some((new * in_layer.expert_bytes()) as u64)
        };
        self.rearranger.report = Rearranged {
            total_bytes: to.iter().filter_map(to_be_pinned).sum(),
            ..Rearranged::default()
        };
        self.rearranger.to = to;
        self.rearranger.is_active = true;
    }

    /// Begins with the next layer.
    fn begin_layer(&mut self) {
        let Some((layer, wanted)) = self.rearranger.to.pop_front() else {
            return;
        };
        if layer >= self.layers.len() {
            return;
        }
        self.begin_on_gpus(layer, wanted);
    }

    /// Gives up what a layer has in main memory and has no use for, and what it wants there a place.
    fn change_layer(&mut self, layer: usize, wanted: &LayerPlacement) {
        self.give_up_pins(layer, wanted);
        self.give_up_slots(layer, wanted);
        let in_layer = &self.layers[layer];
        let n = wanted.slots.saturating_sub(in_layer.cache.n_slots());
        if n > 0 {
            self.rearranger.slots.push(NewSlots { layer, n });
        }
        let bytes = in_layer.expert_bytes();
        let gpus = &self.gpus;
        let is_on_gpu = |tier| gpus.iter().any(|gpu| gpu.tier == tier);
        for pins in wanted.pinned.iter().filter(|pins| !is_on_gpu(pins.tier)) {
            let new = in_layer.not_on_tier(pins).map(|expert| NewPin {
                target: LayerExpert { layer, expert },
                tier: pins.tier,
                bytes,
                on_gpu: false,
            });
            self.rearranger.pins.extend(new);
        }
        self.place();
        self.layers[layer].set_homes(self.n_staging == 0);
    }

    /// Returns an expert, with the position of its layer, that loses its pin and that buffers have no
    /// room for, if there is one.
    pub(crate) fn too_large(&self, layers: &[LayerPlacement]) -> Option<(usize, u32)> {
        let leaving = |(layer, wanted): (usize, &LayerPlacement)| {
            let in_layer = self.layers.get(layer)?;
            // One that moves to another tier is on the slow one meanwhile.
            let stays = |tier, e: &u32| {
                let mut on_tier = wanted.pinned.iter().filter(|pins| pins.tier == tier);
                on_tier.any(|pins| pins.experts.contains(e))
            };
            let has_room = |e: &u32| in_layer.has_room_for(&self.gguf, ExpertId::new(*e));
            let too_large = |pins: Pins| {
                let mut experts = pins.experts.into_iter();
                experts.find(|e| !stays(pins.tier, e) && !has_room(e))
            };
            let expert = in_layer.pins().into_iter().find_map(too_large)?;
            Some((layer, expert))
        };
        layers.iter().enumerate().find_map(leaving)
    }

    /// Whether experts can be read to where they are wanted.
    pub(crate) fn has_files(&self) -> bool {
        self.files.is_some()
    }

    /// Gives up the pins of a layer that are not wanted where they are.
    fn give_up_pins(&mut self, layer: usize, wanted: &LayerPlacement) {
        for Pins { tier, experts } in self.layers[layer].pins() {
            let stay = wanted.pinned.iter().find(|pins| pins.tier == tier);
            let stay = stay.map_or(&[][..], |pins| &pins.experts);
            let leave = experts.into_iter().filter(|expert| !stay.contains(expert));
            for expert in leave.map(ExpertId::new) {
                if let Some(bytes) = self.layers[layer].unpin(expert) {
                    self.rearranger.free(tier, bytes);
                }
            }
        }
    }

    /// Gives up the slots of a layer that are too many or on another tier, and changes the policy of
    /// the others. Those that hold what is to be pinned on their tier become pins.
    fn give_up_slots(&mut self, layer: usize, wanted: &LayerPlacement) {
        let in_layer = &mut self.layers[layer];
        let tier = in_layer.slot_tier;
        let n = if tier == wanted.slot_tier {
            wanted.slots
        } else {
            0
        };
        let surplus = in_layer.cache.n_slots().saturating_sub(n);
        if surplus > 0 {
            let pins = wanted.pinned.iter().filter(|pins| pins.tier == tier);
            let new = pins.flat_map(|pins| in_layer.not_on_tier(pins));
            let in_slots = new.filter(|expert| in_layer.cache.contains(expert.get()));
            let in_slots: Vec<ExpertId> = in_slots.take(surplus as usize).collect();
            for expert in &in_slots {
                in_layer.pin_in_slot(*expert);
            }
            let bytes = in_slots.len() * in_layer.expert_bytes();
            self.rearranger.report.done_bytes += bytes as u64;

            let kept = in_layer.cache.keep_slots(n);
            let mut old = std::mem::take(&mut in_layer.slots);
            in_layer.slots = kept.iter().map(|slot| old[*slot as usize].take()).collect();
            for buffer in old.into_iter().flatten() {
                self.rearranger.free(tier, buffer);
            }
        }
        let in_layer = &mut self.layers[layer];
        in_layer.slot_tier = wanted.slot_tier;
        if in_layer.policy != wanted.policy {
            in_layer.policy = wanted.policy;
            in_layer.cache = in_layer.cache.with_policy(wanted.policy);
        }
    }

    /// Gives memory to what waits for it, as far as holes are large enough.
    fn place(&mut self) {
        for pin in std::mem::take(&mut self.rearranger.pins) {
            match self.rearranger.holes(pin.tier).take(pin.bytes, 1) {
                Some(buffer) => self.rearranger.ready.push_back((pin, buffer)),
                None => self.rearranger.pins.push(pin),
            }
        }
        for NewSlots { layer, n } in std::mem::take(&mut self.rearranger.slots) {
            let in_layer = &mut self.layers[layer];
            let (len, align) = (in_layer.buffer_bytes(in_layer.layout), in_layer.alignment());
            let holes = self.rearranger.holes(in_layer.slot_tier);
            let buffers = std::iter::from_fn(|| holes.take(len, align)).take(n as usize);
            in_layer.slots.extend(buffers.map(Some));
            let added = in_layer.slots.len() as u32 - in_layer.cache.n_slots();
            in_layer.cache.add_slots(added);
            if added < n {
                let n = n - added;
                self.rearranger.slots.push(NewSlots { layer, n });
            }
        }
    }

    /// Goes on with the rearrangement, for a few milliseconds at most. Returns what has become of it
    /// when it ends. May be called only between steps.
    pub(crate) fn continue_rearranging(&mut self) -> Option<Rearranged> {
        if !self.rearranger.is_active {
            return None;
        }
        // No token's transfer may read what moves. One of a prompt that was given up may: what it brings is
        // dropped.
        self.end_streams();
        while !self.in_transit.is_empty() {
            self.wait_for_transfer();
        }
        self.poll_completions();
        let mut left = COPIED_BETWEEN_STEPS;
        for (pin, buffer) in std::mem::take(&mut self.rearranger.landed) {
            if !pin.on_gpu {
                self.pin(pin, buffer);
            } else if left > 0 {
                self.copy_read_to_gpu(pin, buffer);
                left = left.saturating_sub(pin.bytes);
            } else {
                self.rearranger.landed.push((pin, buffer));
            }
        }
        if self.rearranger.is_idle() {
            self.begin_layer();
        }
        if let Some((layer, wanted)) = self.continue_on_gpus(&mut left) {
            self.change_layer(layer, &wanted);
        }
        self.fill_ready(&mut left);
        // Layers that are still to change may give up what is missing.
        if self.rearranger.all_begun() && !self.rearranger.all_placed() && left > 0 {
            let mut has_moved = self.pack_pins(&mut left);
            has_moved |= self.slide(&mut left);
            self.place();
            if !has_moved && self.rearranger.reading.is_empty() {
                self.leave_out();
            }
        }
        let rearranger = &mut self.rearranger;
        let is_done = rearranger.is_idle() && rearranger.all_placed() && rearranger.all_begun();
        rearranger.is_active = !is_done;
        if is_done {
            rearranger.host_buffers.clear();
        }
        is_done.then_some(rearranger.report)
    }

    /// Returns how far the rearrangement is, if one is under way.
    pub(crate) fn rearranging(&self) -> Option<Rearranged> {
        let rearranger = &self.rearranger;
        rearranger.is_active.then_some(rearranger.report)
    }

    /// Counts what found no memory, and forgets it.
    fn leave_out(&mut self) {
        let rearranger = &mut self.rearranger;
        rearranger.report.left_pins += rearranger.pins.len() as u64;
        let slots = rearranger.slots.iter().map(|slots| u64::from(slots.n));
        rearranger.report.left_slots += slots.sum::<u64>();
        rearranger.pins.clear();
        rearranger.slots.clear();
    }

    /// Copies new pins from slots, or begins to read them.
    fn fill_ready(&mut self, left: &mut usize) {
        while *left > 0
            && self.rearranger.reading.len() < MAX_IN_FLIGHT
            && let Some((pin, mut buffer)) = self.rearranger.ready.pop_front()
        {
            if self.copy_from_slot(pin.target, &mut buffer) {
                *left = left.saturating_sub(pin.bytes);
                self.pin(pin, buffer);
                continue;
            }
            match self.read_packed(pin.target, buffer) {
                Ok(key) => self.rearranger.reading.push(PinRead { key, pin }),
                Err(buffer) => {
                    self.rearranger.report.failed_pins += 1;
                    self.rearranger.free_pin(pin, buffer);
                }
            }
        }
    }

    /// Begins to read an expert, packed, into a buffer, and returns the key of the read. Returns the
    /// buffer where there are no files.
    fn read_packed(&mut self, target: LayerExpert, buffer: ArenaSlice) -> Result<u64, ArenaSlice> {
        let Some(files) = &self.files else {
            return Err(buffer);
        };
        let LayerExpert { layer, expert } = target;
        let (layer, sums) = (&self.layers[layer], self.checksums.as_deref());
        let spans = layer.spans(&self.gguf, expert.index(), Layout::Packed);
        let finish = layer.finish(&self.gguf, sums, expert.index(), Layout::Packed);
        let key = PIN_KEY_BIT | self.rearranger.next_key;
        self.rearranger.next_key = (self.rearranger.next_key + 1) % PIN_KEY_BIT;
        FileTier::submit_finished(files, key, &spans, finish, buffer, Priority::Background);
        Ok(key)
    }

    /// Copies an expert's bytes, packed, from the slot that has them. Returns whether one does.
    fn copy_from_slot(&self, target: LayerExpert, into: &mut ArenaSlice) -> bool {
        let LayerExpert { layer, expert } = target;
        let layer = &self.layers[layer];
        let Some(bytes) = layer.slot_with(expert) else {
            return false;
        };
        for part in &layer.parts {
            let place = layer.slice_location(&self.gguf, part, expert.index(), layer.layout);
            into[part.packed_offset..][..part.slice_bytes]
                .copy_from_slice(&bytes[place.buffer_offset..][..part.slice_bytes]);
        }
        true
    }

    /// Makes a buffer with an expert's bytes its backing copy.
    fn pin(&mut self, pin: NewPin, bytes: ArenaSlice) {
        let LayerExpert { layer, expert } = pin.target;
        let layer = &mut self.layers[layer];
        layer.cache.forget(expert.get());
        layer.pin(expert.index(), pin.tier, bytes);
        self.rearranger.report.done_bytes += pin.bytes as u64;
    }

    /// Returns where the experts of each layer are.
    pub(crate) fn arrangement(&self) -> Vec<Arrangement> {
        let of_layer = |layer: &LayerExperts| Arrangement {
            pins: layer.pins(),
            slots: layer.cache.n_slots(),
            slot_tier: layer.slot_tier,
            policy: layer.policy,
        };
        self.layers.iter().map(of_layer).collect()
    }

    /// Returns the bytes that slots and staging take beyond those of the experts in them, by tier.
    pub(crate) fn padding_bytes(&self) -> Vec<u64> {
        let largest = |layout| self.layers.iter().map(|l| l.buffer_bytes(layout)).max();
        let layout = self.layers.first().map_or(Layout::Packed, |l| l.layout);
        let pad = largest(layout).unwrap_or(0) - largest(Layout::Packed).unwrap_or(0);
        let mut padding = BTreeMap::from([(self.staging_tier, pad * self.n_staging)]);
        for layer in self.layers.iter().filter(|layer| !layer.slots_on_gpu) {
            let pad = layer.buffer_bytes(layer.layout) - layer.buffer_bytes(Layout::Packed);
            *padding.entry(layer.slot_tier).or_default() += pad * layer.slots.len();
            for (tier, pad) in layer.pin_padding() {
                *padding.entry(tier).or_default() += pad;
            }
        }
        let last = padding.keys().last().map_or(0, |tier| tier.get() + 1);
        let of_tier = |tier| {
            padding
                .get(&TierIdx::new(tier))
                .map_or(0, |bytes| *bytes as u64)
        };
        (0..last).map(of_tier).collect()
    }
}
