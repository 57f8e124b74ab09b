//! One layer's expert accesses for one token or one batch, and the state of each of them.

use super::ids::{ExpertId, SlotId, StepPos};
use crate::tiers::arena::ArenaSlice;
use crate::tiers::file::ReadTime;
use std::time::Duration;

/// The state of one expert of a step; [`store`](super::store) shows the transitions.
pub(super) enum ExpertState {
    /// It computes from its backing copy: pinned, on a GPU, or in the mapped file.
    InPlace,
    /// Its bytes are in this slot.
    InSlot(SlotId),
    /// It is to be read into this slot, which the expert at `after` still uses.
    NeedsSlot {
        slot: SlotId,
        after: Option<StepPos>,
    },
    /// It is to be read into a staging buffer.
    NeedsStaging,
    /// Its read is in flight.
    Loading(LoadTarget),
    /// Its bytes are in a staging buffer.
    Staged(ArenaSlice),
    /// It has computed and given its buffer back, or its read has failed.
    Released,
}

/// Where a read goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LoadTarget {
    /// Into this slot. To a GPU's slot the bytes go by way of a staging buffer.
    Slot(SlotId),
    /// Into a staging buffer.
    Staging,
}

/// An expert that computes from staging before its bytes move to its slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeferredMove {
    pub(super) at: StepPos,
    pub(super) slot: SlotId,
    /// The expert that uses the slot until it has computed.
    pub(super) after: Option<StepPos>,
}

/// A computed expert whose bytes stay in staging until its slot is free.
pub(super) struct HeldExpert {
    pub(super) expert: ExpertId,
    pub(super) slot: SlotId,
    pub(super) bytes: ArenaSlice,
    /// The expert that uses the slot until it has computed; `None` where the slot's buffer is with a
    /// read that nothing needs any more.
    pub(super) after: Option<StepPos>,
}

/// A slot that is read, perhaps again, when the step ends: there was no staging buffer to keep the
/// bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlotRefill {
    pub(super) at: StepPos,
    pub(super) slot: SlotId,
}

/// One layer's accesses for one token or one batch.
pub(crate) struct Step {
    pub(super) layer: usize,
    /// In the order in which they are read and compute.
    experts: Vec<u32>,
    /// `[experts]`.
    pub(super) states: Vec<ExpertState>,
    /// The first position whose read may not have been submitted.
    pub(super) next_read: usize,
    pub(super) in_flight: usize,
    pub(super) deferred: Vec<DeferredMove>,
    pub(super) held: Vec<HeldExpert>,
    pub(super) refills: Vec<SlotRefill>,
    /// `[experts]` whether each was resident when the step began, prefetched or not.
    pub(super) residency: Vec<bool>,
    /// Experts that compute from their backing copy, without a slot.
    pub(crate) pinned_hits: u64,
    pub(crate) slot_hits: u64,
    pub(crate) misses: u64,
    /// Experts of main memory that a GPU computes for a token.
    pub(crate) streamed: u64,
    /// Bytes that misses bring in from the slow tier.
    pub(crate) read_bytes: u64,
    /// Time in which nothing could compute for want of a read.
    pub(crate) waited: Duration,
    /// From the first submission of a read to the end of the last one, prefetches included.
    read_time: Option<ReadTime>,
}

impl Step {
    /// Makes a step whose accesses are still to be looked up.
    pub(super) fn new(layer: usize, experts: Vec<u32>) -> Self {
        Self {
            layer,
            states: Vec::with_capacity(experts.len()),
            next_read: 0,
            in_flight: 0,
            deferred: Vec::new(),
            held: Vec::new(),
            refills: Vec::new(),
            residency: Vec::new(),
            pinned_hits: 0,
            slot_hits: 0,
            misses: 0,
            streamed: 0,
            read_bytes: 0,
            waited: Duration::ZERO,
            read_time: None,
            experts,
        }
    }

    /// Returns the position of the step's layer among those with routed experts.
    pub(crate) fn layer(&self) -> usize {
        self.layer
    }

    /// Returns the step's experts in the order in which they compute.
    pub(crate) fn experts(&self) -> &[u32] {
        &self.experts
    }

    /// Returns the expert at a position.
    pub(super) fn expert(&self, at: StepPos) -> ExpertId {
        ExpertId::new(self.experts[at.index()])
    }

    /// Returns the position of an expert, if the step uses it.
    pub(super) fn position_of(&self, expert: ExpertId) -> Option<StepPos> {
        self.experts
            .iter()
            .position(|used| *used == expert.get())
            .map(StepPos::new)
    }

    pub(super) fn state(&self, at: StepPos) -> &ExpertState {
        &self.states[at.index()]
    }

    pub(super) fn set_state(&mut self, at: StepPos, state: ExpertState) {
        self.states[at.index()] = state;
    }

    /// Whether the expert at this position has computed.
    pub(super) fn is_released(&self, at: StepPos) -> bool {
        matches!(self.state(at), ExpertState::Released)
    }

    /// Counts a read into the step's read time.
    pub(super) fn add_read_time(&mut self, time: ReadTime) {
        self.read_time = Some(self.read_time.map_or(time, |all| all.union(time)));
    }

    /// Returns the time from the first submission of a read, which may precede the step, to the end
    /// of the last one.
    pub(crate) fn reading(&self) -> Duration {
        self.read_time.map_or(Duration::ZERO, ReadTime::duration)
    }

    /// Whether the expert at this position of the step was resident when the step began: in a slot
    /// or in its backing copy. A prefetched expert does not count.
    pub(crate) fn was_resident(&self, at: usize) -> bool {
        self.residency[at]
    }

    /// Whether the expert at this position of the step computes from its backing copy.
    pub(crate) fn is_in_place(&self, at: usize) -> bool {
        matches!(self.states[at], ExpertState::InPlace)
    }

    /// Whether the expert at this position of the step is in a staging buffer.
    pub(crate) fn is_staged(&self, at: usize) -> bool {
        matches!(self.states[at], ExpertState::Staged(_))
    }

    /// Whether the expert at this position of the step can compute.
    pub(crate) fn is_ready(&self, at: usize) -> bool {
        matches!(
            self.states[at],
            ExpertState::InPlace | ExpertState::InSlot(_) | ExpertState::Staged(_)
        )
    }
}
