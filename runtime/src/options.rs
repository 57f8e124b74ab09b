//! Options of loading a model.

use crate::cancel::Cancel;
use crate::experts::checksums::Checksums;
use crate::experts::copies::ExpertFiles;
use crate::experts::pack::Pack;
use crate::tiers::shards::Shards;
use std::sync::Arc;
use tier_plan_formats::model::kv::CacheRoom;

/// A callback that is told how many bytes are in place, and how many there will be.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Options of loading a model.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Compute threads; the physical cores when `None`.
    pub threads: Option<usize>,
    /// Tokens of a step that go through a layer together; 2048 when `None`, and never more than
    /// the KV cache has room for, or a plan's `window_chunk`.
    pub batch: Option<usize>,
    /// Checksums that all bytes are compared with, those that are read later too.
    pub checks: Option<Arc<Checksums>>,
    /// A copy that experts are read from, where the plan reads them from files at all.
    pub pack: Option<Arc<Pack>>,
    /// Further copies on other drives, which these reads are shared with.
    pub copies: Vec<ExpertFiles>,
    /// Rates that decide which experts of main memory are streamed to a GPU for prompts. Where
    /// `None`, the link is measured and the CPU's rate is the plan's.
    pub stream: Option<StreamRates>,
    /// NUMA nodes that weights are striped over, each read by threads of its own.
    pub shards: Option<Arc<Shards>>,
    /// Polled by every pass, which then fails with
    /// [`RunError::Canceled`](crate::RunError::Canceled).
    pub cancel: Cancel,
}

/// Rates that decide which experts of main memory a GPU computes for a prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StreamRates {
    /// Experts that are streamed to a GPU, in 10⁹ bytes per second; 0 for none.
    pub link_gbps: f64,
    /// Matmuls of the CPU with many tokens, in 10⁹ floating-point operations per second.
    pub processor_gflops: f64,
}

/// Tokens per batch by default. A step's experts are read once per batch.
pub const DEFAULT_BATCH: usize = 2048;

/// Tokens per micro-batch at most: a dense stage, and an expert, takes these at once.
pub(crate) const MAX_MICRO_BATCH: usize = 512;

/// Returns the tokens per batch, and per micro-batch: no more than the KV cache has room for, in
/// layers with a window too.
pub(crate) fn batches(options: &LoadOptions, room: CacheRoom) -> (usize, usize) {
    let most = usize::try_from(room.positions()).unwrap_or(usize::MAX);
    let most = most.min(room.window_chunk.map_or(usize::MAX, |n| n as usize));
    let batch = options.batch.unwrap_or(DEFAULT_BATCH).min(most).max(1);
    (batch, batch.min(MAX_MICRO_BATCH))
}
