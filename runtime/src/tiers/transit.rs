//! Host memory that a GPU reads by itself: staging buffers, to fill its slots, and experts that are
//! streamed to it.

use super::arena::ArenaSlice;
use super::source::ALIGN;
use std::any::Any;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use tier_plan_cuda::CudaError;
#[cfg(test)]
use tier_plan_cuda::experts::Place;
use tier_plan_cuda::experts::{ExpertBytes, ExpertKind, PinnedExperts};
use tier_plan_cuda::stream::ExpertStream;
use tier_plan_cuda::transfers::{TransferId, TransferOrder};

/// Most buffers that are locked one by one.
const MAX_LOCKED_BUFFERS: usize = 4096;

/// What keeps memory mapped.
pub(crate) type Keep = Arc<dyn Any + Send + Sync>;

/// A GPU's experts, with the host memory that they are filled from where it lies, if the driver allows
/// that.
///
/// The experts are dropped first, which ends all transfers and unlocks the memory.
pub(crate) struct SlotFiller {
    experts: PinnedExperts,
    staging: Option<LockedMemory>,
    /// By first address: memory of experts that are streamed. Pieces are apart.
    streamed: BTreeMap<usize, LockedMemory>,
    /// By address: buffers that staging got from slots in main memory in exchange for its own.
    exchanged: BTreeMap<usize, LockedMemory>,
    /// Whether the driver has refused to lock one more.
    is_full: bool,
}

/// A part of a mapping.
#[derive(Clone)]
pub(crate) struct HostMemory {
    pub(crate) range: Range<usize>,
    /// What tells the mapping from others: pieces of one mapping may be locked together.
    pub(crate) mapping: usize,
    pub(crate) keep: Keep,
}

/// Memory that the driver has locked, which stays mapped meanwhile.
struct LockedMemory {
    range: Range<usize>,
    #[allow(dead_code, reason = "held for its memory")]
    keep: Keep,
}

impl LockedMemory {
    /// Locks memory, if the driver does that.
    fn new(experts: &mut PinnedExperts, range: Range<usize>, keep: Keep) -> Option<Self> {
        // SAFETY: `keep` keeps the memory mapped. It is in the filler that has the experts, which are
        // dropped first.
        let is_locked = unsafe { experts.lock(range.start as *const u8, range.len()) };
        is_locked.then_some(Self { range, keep })
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
    /// Lets a GPU read these staging buffers, which follow each other in one arena, and the memory of
    /// experts that are streamed to it.
    pub(crate) fn new(
        mut experts: PinnedExperts,
        staging: &[ArenaSlice],
        streamed: &[HostMemory],
    ) -> Self {
        // What shares a page with staging is locked with it.
        let staging = memory_of(staging).and_then(|memory| in_whole_pages(&[memory]).pop());
        let mut pieces = in_whole_pages(streamed);
        if let Some(staging) = &staging {
            // It may be of the same arena, and another GPU may have it. The driver locks no page twice.
            pieces = pieces
                .into_iter()
                .flat_map(|p| p.without(staging))
                .collect();
        }
        let lock = |memory: HostMemory, experts: &mut PinnedExperts| {
            LockedMemory::new(experts, memory.range, memory.keep)
        };
        let staging = staging.and_then(|staging| lock(staging, &mut experts));
        let mut streamed = BTreeMap::new();
        for piece in pieces {
            let start = piece.range.start;
            // Where one piece is refused, so are others, each after a long while.
            let Some(piece) = lock(piece, &mut experts) else {
                break;
            };
            streamed.insert(start, piece);
        }
        Self {
            experts,
            staging,
            streamed,
            exchanged: BTreeMap::new(),
            is_full: false,
        }
    }

    /// Returns whether experts in all of this memory can be [streamed](Self::stream). It may be
    /// staging's: slots in main memory and staging exchange buffers when the drive happens to have read
    /// an expert, and which experts are streamed must not depend on that.
    pub(crate) fn has_locked(&self, range: &Range<usize>) -> bool {
        let mut at = range.start;
        while at < range.end {
            // Pieces that follow each other are locked one by one.
            match self.locked_until(at) {
                Some(end) => at = end,
                None => return false,
            }
        }
        true
    }

    /// Returns the end of the locked piece that an address is in.
    fn locked_until(&self, at: usize) -> Option<usize> {
        let before = |pieces: &BTreeMap<usize, LockedMemory>| {
            let (_, piece) = pieces.range(..=at).next_back()?;
            Some(piece.range.end)
        };
        let staging = self.staging.as_ref().map(|staging| &staging.range);
        let ends = [
            staging
                .filter(|range| range.start <= at)
                .map(|range| range.end),
            before(&self.streamed),
            before(&self.exchanged),
        ];
        ends.into_iter().flatten().find(|end| *end > at)
    }

    /// Whether some of this memory is locked already.
    fn has_locked_some(&self, range: &Range<usize>) -> bool {
        let others = self.staging.iter().chain(self.streamed.values());
        let mut others = others.chain(self.exchanged.values());
        others.any(|other| other.range.start < range.end && range.start < other.range.end)
    }

    /// Returns whether any expert can be streamed.
    pub(crate) fn streams(&self) -> bool {
        !self.streamed.is_empty()
    }

    /// Returns the experts, which stay in here: they are dropped before the memory that they read.
    pub(crate) fn experts(&mut self) -> &mut PinnedExperts {
        &mut self.experts
    }

    /// Returns how many experts of a layer can be pinned where others were.
    pub(crate) fn n_free_pins(&self, layer: usize) -> usize {
        self.experts.n_free_pins(layer)
    }

    /// Returns how many results can be asked for until they are fetched.
    pub(crate) fn free_rows(&self) -> usize {
        self.experts.free_rows()
    }

    /// Returns the matrices of the expert in a place, one after the other.
    #[cfg(test)]
    pub(crate) fn bytes_in(&self, layer: usize, place: Place) -> Result<Vec<u8>, CudaError> {
        self.experts.bytes_in(layer, place)
    }

    /// Returns whether the GPU can read a buffer where it lies. One that is new to it is locked now,
    /// once for all times that it is read.
    pub(crate) fn can_read(&mut self, buffer: &ArenaSlice) -> bool {
        if self.staging.is_none() {
            return false;
        }
        let range = buffer.address()..buffer.address() + buffer.capacity();
        if self.has_locked(&range) {
            return true;
        }
        // The driver locks whole pages, and none of them twice. Buffers are apart, but may have moved since
        // others were locked.
        let has_own_pages = range.start.is_multiple_of(ALIGN) && range.len().is_multiple_of(ALIGN);
        let is_free = has_own_pages && !self.has_locked_some(&range);
        if self.is_full || !is_free || self.exchanged.len() == MAX_LOCKED_BUFFERS {
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

    /// Has the GPU copy experts to its shared buffers, beside what it computes now, from memory that
    /// [was locked](Self::has_locked). What is written there before the transfer has ended may reach
    /// the GPU or not.
    ///
    /// # Errors
    /// When the GPU fails. What the buffers hold is undefined then, and no expert is read.
    ///
    /// # Panics
    /// When an expert is not in locked memory, or there are fewer buffers.
    pub(crate) fn stream(
        &mut self,
        layer: usize,
        experts: &[ExpertBytes<'_>],
    ) -> Result<TransferId, CudaError> {
        experts.iter().for_each(|expert| self.assert_locked(expert));
        // SAFETY: the bytes are locked, as was checked, so they stay. The GPU alone looks at what it
        // reads of them, whatever that is.
        unsafe { self.experts.fill_shared(layer, experts) }
    }

    /// Has a prompt's stream to the GPU take an expert from memory that [was locked](Self::has_locked). What
    /// is written there before the stream is finished may reach the GPU or not.
    ///
    /// # Errors
    /// When the GPU fails.
    ///
    /// # Panics
    /// When the expert is not in locked memory.
    pub(crate) fn send_locked(
        &self,
        stream: &mut ExpertStream,
        kind: &ExpertKind,
        expert: &ExpertBytes<'_>,
        n: usize,
    ) -> Result<(), CudaError> {
        self.assert_locked(expert);
        // SAFETY: the bytes are locked, as was checked, so they stay: streams are dropped before this is.
        unsafe { stream.send_locked(kind, expert, n) }
    }

    fn assert_locked(&self, expert: &ExpertBytes<'_>) {
        let parts = [expert.gate, Some(expert.up), Some(expert.down)];
        let mut ranges = parts.into_iter().flatten().map(range_of);
        assert!(
            ranges.all(|range| self.has_locked(&range)),
            "a streamed expert's memory is locked"
        );
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

/// Returns where bytes are.
fn range_of(bytes: &[u8]) -> Range<usize> {
    let range = bytes.as_ptr_range();
    range.start as usize..range.end as usize
}

impl HostMemory {
    /// Returns what is left of whole pages without those that other memory touches.
    fn without(self, other: &HostMemory) -> impl Iterator<Item = HostMemory> + use<> {
        let (start, end) = (
            other.range.start / ALIGN * ALIGN,
            other.range.end.next_multiple_of(ALIGN),
        );
        let range = &self.range;
        let before = range.start..range.end.min(start);
        let after = range.start.max(end)..range.end;
        let parts = [before, after].into_iter().filter(|part| !part.is_empty());
        parts.map(move |range| HostMemory {
            range,
            ..self.clone()
        })
    }
}

/// Returns the memory of buffers that follow each other in one arena.
fn memory_of(buffers: &[ArenaSlice]) -> Option<HostMemory> {
    let start = buffers.iter().map(ArenaSlice::address).min()?;
    let end = |buffer: &ArenaSlice| buffer.address() + buffer.capacity();
    let end = buffers.iter().map(end).max()?;
    let held: usize = buffers.iter().map(ArenaSlice::capacity).sum();
    let first = buffers.first()?;
    let in_one = buffers.iter().all(|buffer| buffer.is_of_same_arena(first));
    // What lies between them would be locked, too.
    let is_dense = end - start <= held + buffers.len() * ALIGN;
    (in_one && is_dense).then(|| HostMemory {
        range: start..end,
        ..first.memory()
    })
}

/// Returns the whole pages that pieces of memory lie in, as few pieces that are apart.
fn in_whole_pages(memory: &[HostMemory]) -> Vec<HostMemory> {
    let mut pieces: Vec<HostMemory> = memory
        .iter()
        .map(|piece| HostMemory {
            range: piece.range.start / ALIGN * ALIGN..piece.range.end.next_multiple_of(ALIGN),
            ..piece.clone()
        })
        .collect();
    pieces.sort_by_key(|piece| piece.range.start);
    let mut apart: Vec<HostMemory> = Vec::new();
    for piece in pieces {
        match apart.last_mut() {
            Some(last) if last.mapping == piece.mapping && piece.range.start <= last.range.end => {
                last.range.end = last.range.end.max(piece.range.end);
            }
            _ => apart.push(piece),
        }
    }
    apart
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::arena::Arena;
    use tier_plan_cuda::shim;
    use tier_plan_formats::model::spec::Activation;
    use tier_plan_kernels::quant::TensorType;

    #[test]
    fn buffers_that_slots_and_staging_exchange_stay_locked() {
        let mut experts = PinnedExperts::new(shim::shared(), 1).unwrap();
        let kind = ExpertKind {
            n_expert: 2,
            hidden: 32,
            ffn: 32,
            gate: None,
            up: TensorType::F32,
            down: TensorType::F32,
            activation: Activation::SquaredRelu,
            weigh_input: false,
        };
        experts.add_layer(0, kind, &[], 1, false).unwrap();
        experts.open_transfers().unwrap();
        // Staging ends within a page, in which the first slot begins.
        let mut arena = Arena::new("slots", 5 * ALIGN as u64).unwrap();
        let mut take = |len: usize| arena.take(len).unwrap();
        let (staging, slots) = (take(ALIGN + 256), [take(ALIGN), take(2 * ALIGN - 256)]);
        let rest = take(ALIGN);
        let range = |buffer: &ArenaSlice| buffer.address()..buffer.address() + buffer.capacity();
        let buffers = [range(&staging), range(&slots[0]), range(&slots[1])];
        let memory = slots.each_ref().map(ArenaSlice::memory);
        let mut filler = SlotFiller::new(experts, &[staging], &memory);
        for buffer in &buffers {
            assert!(filler.has_locked(buffer), "{buffer:x?} of {buffers:x?}");
        }
        assert!(!filler.has_locked(&range(&rest)), "{buffers:x?}");
        assert!(!filler.has_locked(&(buffers[0].start..range(&rest).end)));
        // One that staging gets from elsewhere is locked when it is sent, and may then be a slot's.
        assert!(filler.can_read(&rest));
        assert!(filler.has_locked(&range(&rest)));
    }

    #[test]
    fn pieces_that_share_pages_are_one() {
        let piece = |mapping, range| HostMemory {
            range,
            mapping,
            keep: Arc::new(()),
        };
        let memory = [
            piece(1, 3 * ALIGN + 5..4 * ALIGN + 1),
            piece(1, 5 * ALIGN - 1..5 * ALIGN),
            piece(1, ALIGN..ALIGN + 1),
            piece(2, 5 * ALIGN..6 * ALIGN),
            piece(1, 3 * ALIGN..3 * ALIGN + 9),
        ];
        let pieces = in_whole_pages(&memory);
        let found: Vec<_> = pieces
            .iter()
            .map(|p| (p.mapping, p.range.clone()))
            .collect();
        let pages =
            |mapping, pages: Range<usize>| (mapping, pages.start * ALIGN..pages.end * ALIGN);
        assert_eq!(found, [pages(1, 1..2), pages(1, 3..5), pages(2, 5..6)]);
        // Staging in the middle of a piece, that ends within a page.
        let staging = piece(1, 3 * ALIGN + 9..4 * ALIGN + 7);
        let left = |piece: &HostMemory| -> Vec<(usize, usize)> {
            let parts = piece.clone().without(&staging).map(|p| p.range);
            parts.map(|p| (p.start / ALIGN, p.end / ALIGN)).collect()
        };
        assert_eq!(left(&pieces[0]), [(1, 2)]);
        assert_eq!(left(&pieces[1]), []);
        let wide = piece(1, ALIGN..9 * ALIGN);
        assert_eq!(left(&wide), [(1, 3), (5, 9)]);
    }
}
