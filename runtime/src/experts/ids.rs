//! Index types of the expert store, so that a position, an expert, and a slot can't be confused.
//!
//! The store's callers index arrays of their own and pass plain integers; the store converts them
//! at its border. [`cache`](super::cache) works on plain `u32`, since the planner replays it as it
//! is.

/// Number of an expert within its layer, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub(super) struct ExpertId(u32);

/// Number of a slot within its layer, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct SlotId(u32);

/// Position of an expert in a [`Step`](super::store::Step): its rank in the order in which the
/// step's experts are read and compute, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct StepPos(u32);

/// An expert of a layer with routed experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LayerExpert {
    /// Position of the layer among those with routed experts.
    pub(super) layer: usize,
    pub(super) expert: ExpertId,
}

impl ExpertId {
    pub(super) fn new(expert: u32) -> Self {
        Self(expert)
    }

    pub(super) fn get(self) -> u32 {
        self.0
    }

    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

impl SlotId {
    pub(super) fn new(slot: u32) -> Self {
        Self(slot)
    }

    pub(super) fn get(self) -> u32 {
        self.0
    }

    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

impl StepPos {
    /// Makes a position from an index. It fits, since a step has at most as many positions as its
    /// layer has experts.
    pub(super) fn new(at: usize) -> Self {
        Self(at as u32)
    }

    pub(super) fn index(self) -> usize {
        self.0 as usize
    }

    /// Returns the key of the step's own read for this position. The upper bits stay clear: they
    /// mark [prefetches](super::prefetch) and [warm-up reads](super::warmup).
    pub(super) fn read_key(self) -> u64 {
        u64::from(self.0)
    }
}
