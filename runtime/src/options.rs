//! How a model is loaded, and how many tokens go through its layers at once.

use crate::experts::checksums::Checks;
use crate::experts::pack::Pack;
use std::sync::Arc;

/// Told how many bytes of how many are in place.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// How to load.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Threads that compute; the physical cores when `None`.
    pub threads: Option<usize>,
    /// Tokens of a prompt that go through a layer together, 2048 when `None`; never more than the context holds.
    pub batch: Option<usize>,
    /// What all bytes that are loaded, or read later, are compared with.
    pub checks: Option<Arc<Checks>>,
    /// A copy that experts are read from, where they are read from files at all.
    pub pack: Option<Arc<Pack>>,
    /// How fast experts of main memory pass through a GPU for prompts, and are multiplied without; where `None`, the first
    /// is measured and the second is the plan's.
    pub stream: Option<StreamRates>,
}

/// What decides which experts of main memory a GPU computes for a prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StreamRates {
    /// Bytes of experts that pass through a GPU, in 10⁹ a second; 0 for none.
    pub link_gbps: f64,
    /// Products of the processor with many tokens, in 10⁹ floating-point operations a second.
    pub processor_gflops: f64,
}

/// Tokens that go through a layer together, unless told otherwise: a prompt's experts are read once for so many.
pub(crate) const BATCH: usize = 2048;

/// Tokens that a layer's dense stage, and an expert, take at once.
pub(crate) const MICRO_BATCH: usize = 512;

/// Tokens of a batch, and of a micro-batch.
pub(crate) fn batches(options: &LoadOptions, context: usize) -> (usize, usize) {
    let batch = options.batch.unwrap_or(BATCH).min(context).max(1);
    (batch, batch.min(MICRO_BATCH))
}
