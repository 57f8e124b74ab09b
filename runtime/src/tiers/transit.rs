//! Staging buffers that a GPU reads by itself, to fill its slots.

use super::arena::ArenaSlice;
use super::source::ALIGN;
use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::experts::{ExpertBytes, PinnedExperts};
use tier_plan_cuda::transfers::{TransferId, TransferOrder};

/// Most buffers that are locked one by one.
const MAX_LOCKED_BUFFERS: usize = 4096;

/// A GPU's experts, whose slots are filled from staging buffers where they lie, if the driver allows
/// that.
///
/// The experts are dropped first, which ends all transfers and unlocks the memory.
pub(crate) struct SlotFiller {
    experts: PinnedExperts,
    staging: Option<LockedMemory>,
    /// By address: buffers that staging got from slots in main memory in exchange for its own.
    exchanged: BTreeMap<usize, LockedMemory>,
    /// Whether the driver has refused to lock one more.
    is_full: bool,
}

/// Memory that the driver has locked, which stays mapped meanwhile.
struct LockedMemory {
    range: Range<usize>,
    #[allow(dead_code, reason = "held for its memory")]
    kept: Arc<dyn Any + Send + Sync>,
}

impl LockedMemory {
    /// Locks memory, if the driver does that.
    fn new(
        experts: &mut PinnedExperts,
        range: Range<usize>,
        kept: Arc<dyn Any + Send + Sync>,
    ) -> Option<Self> {
        // SAFETY: `kept` keeps the memory mapped. It is in the filler that has the experts, which are
        // dropped first.
        let is_locked = unsafe { experts.lock(range.start as *const u8, range.len()) };
        is_locked.then_some(Self { range, kept })
    }
}

/// Where the matrices of an expert are in a buffer.
#[derive(Debug, Clone)]
pub(crate) struct ExpertRanges {
    /// `None` without a gate.
    pub(crate) gate: Option<Range<usize>>,
    pub(crate) up: Range<usize>,
    pub(crate) down: Range<usize>,
}

/// A staging buffer that a GPU reads. Nothing else has it meanwhile.
pub(crate) struct InTransit {
    transfer: TransferId,
    buffer: ArenaSlice,
}

impl SlotFiller {
    /// Lets a GPU read these staging buffers, which follow each other in one arena.
    pub(crate) fn new(mut experts: PinnedExperts, staging: &[ArenaSlice]) -> Self {
        let memory = memory_of(staging);
        Self {
            staging: memory.and_then(|(range, kept)| LockedMemory::new(&mut experts, range, kept)),
            exchanged: BTreeMap::new(),
            is_full: false,
            experts,
        }
    }

    /// Returns the experts, which stay in here: they are dropped before the memory that they read.
    pub(crate) fn experts(&mut self) -> &mut PinnedExperts {
        &mut self.experts
    }

    /// Returns how many results can be asked for until they are fetched.
    pub(crate) fn free_rows(&self) -> usize {
        self.experts.free_rows()
    }

    /// Returns the matrices in a slot, one after the other.
    #[cfg(test)]
    pub(crate) fn slot_bytes(&self, layer: usize, slot: usize) -> Result<Vec<u8>, CudaError> {
        self.experts.slot_bytes(layer, slot)
    }

    /// Returns whether the GPU can read a buffer where it lies. One that is new to it is locked now,
    /// once for all times that it is read.
    pub(crate) fn can_read(&mut self, buffer: &ArenaSlice) -> bool {
        let Some(staging) = &self.staging else {
            return false;
        };
        let range = buffer.address()..buffer.address() + buffer.capacity();
        if staging.range.start <= range.start && range.end <= staging.range.end {
            return true;
        }
        if let Some(locked) = self.exchanged.get(&range.start) {
            return range.end <= locked.range.end;
        }
        // The driver locks whole pages, and none of them twice. Buffers are apart, and keep their
        // places: nothing moves in an arena where a GPU has experts.
        let has_own_pages = range.start.is_multiple_of(ALIGN) && range.len().is_multiple_of(ALIGN);
        if self.is_full || !has_own_pages || self.exchanged.len() == MAX_LOCKED_BUFFERS {
            return false;
        }
        let start = range.start;
        let locked = LockedMemory::new(&mut self.experts, range, buffer.keep_alive());
        let is_locked = locked.is_some();
        self.is_full = !is_locked;
        self.exchanged.extend(locked.map(|locked| (start, locked)));
        is_locked
    }

    /// Has the GPU fill a slot from a buffer that it [can read](Self::can_read).
    ///
    /// # Errors
    /// When the GPU fails. What the slot holds is undefined then, and the buffer is not read.
    ///
    /// # Panics
    /// When the GPU can't read the buffer.
    pub(crate) fn fill_from(
        &mut self,
        (layer, slot): (usize, usize),
        buffer: ArenaSlice,
        ranges: &ExpertRanges,
        biases: Option<[&[f32]; 3]>,
        order: TransferOrder,
    ) -> Result<InTransit, (ArenaSlice, CudaError)> {
        assert!(self.can_read(&buffer), "a buffer that is not locked");
        let part = |range: &Range<usize>| &buffer[range.clone()];
        let bytes = ExpertBytes {
            gate: ranges.gate.as_ref().map(part),
            up: part(&ranges.up),
            down: part(&ranges.down),
            biases,
        };
        // SAFETY: the buffer is locked, as was checked. It stays as it is until the transfer has ended: it
        // is given back only then.
        match unsafe { self.experts.fill_in_place(layer, slot, &bytes, order) } {
            Ok(transfer) => Ok(InTransit { transfer, buffer }),
            Err(error) => Err((buffer, error)),
        }
    }

    /// Returns whether the GPU has read a buffer. One that has failed reads no more.
    pub(crate) fn has_read(&mut self, transit: &InTransit) -> bool {
        self.experts.is_filled(transit.transfer).unwrap_or(true)
    }

    /// Waits until the GPU has read a buffer, and gives it back.
    pub(crate) fn take_back(&mut self, transit: InTransit) -> (ArenaSlice, Result<(), CudaError>) {
        let waited = self.experts.wait_filled(transit.transfer);
        (transit.buffer, waited)
    }
}

/// Returns the memory of buffers that follow each other in one arena, and what keeps it mapped.
fn memory_of(buffers: &[ArenaSlice]) -> Option<(Range<usize>, Arc<dyn Any + Send + Sync>)> {
    let start = buffers.iter().map(ArenaSlice::address).min()?;
    let end = |buffer: &ArenaSlice| buffer.address() + buffer.capacity();
    let end = buffers.iter().map(end).max()?;
    let held: usize = buffers.iter().map(ArenaSlice::capacity).sum();
    let first = buffers.first()?;
    let in_one = buffers.iter().all(|buffer| buffer.is_of_same_arena(first));
    // What lies between them would be locked, too.
    let is_dense = end - start <= held + buffers.len() * ALIGN;
    (in_one && is_dense).then(|| (start..end, first.keep_alive()))
}
