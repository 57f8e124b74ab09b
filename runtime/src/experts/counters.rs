//! Counters of a run: time and bytes per tier, hits and misses per layer.

use crate::tiers::file::DriveUse;
use crate::tiers::pace::StageBytes;
use std::time::Duration;
use tier_plan_formats::placement::PerTier;

/// Outcomes of prefetched experts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefetchCount {
    /// Experts that their layer used.
    pub useful: u64,
    /// Useful experts that had landed when their layer began.
    pub in_time: u64,
    /// Experts that their layer did not use; their bytes may have been read or not.
    pub wasted: u64,
}

impl std::ops::AddAssign for PrefetchCount {
    fn add_assign(&mut self, more: Self) {
        self.useful += more.useful;
        self.in_time += more.in_time;
        self.wasted += more.wasted;
    }
}

/// Accesses and times of one layer with routed experts, summed over the decoded tokens.
#[derive(Debug, Clone, Default)]
pub struct LayerCounters {
    /// Accesses to experts that computed from their backing copy: pinned, on a GPU, or mapped.
    pub pinned_hits: u64,
    /// Accesses to experts that were in a slot.
    pub slot_hits: u64,
    /// Accesses to experts that had to be read from the slow tier.
    pub misses: u64,
    /// Of all these accesses, those to experts of main memory that a GPU computed.
    pub streamed: u64,
    /// Time in attention, norms, and router.
    pub dense: Duration,
    /// Time in routed experts, including waits for reads.
    pub experts: Duration,
    /// Bytes that misses read from the slow tier.
    pub missed_bytes: u64,
    /// Time from the first submission of a token's reads to the end of its last one, prefetches
    /// included.
    pub reading: Duration,
    /// The part of `reading` in which nothing could compute for want of a read.
    pub waited: Duration,
    /// Experts that were predicted before the layer's router selected.
    pub predicted: u64,
    /// Predicted experts that the router selected.
    pub predicted_right: u64,
}

/// Counters of a run, most of them for decoding only.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Tokens that were processed as prompts.
    pub prompt_tokens: u64,
    /// Time spent on prompts.
    pub prompt: Duration,
    /// The parts of `prompt` in dense stages and in routed experts.
    pub prompt_stages: [Duration; 2],
    /// Bytes that misses of prompts read from the slow tier.
    pub prompt_missed_bytes: u64,
    /// Tokens decoded: forward passes of one token after the prompt.
    pub decode_tokens: u64,
    /// Time spent on decoding.
    pub decode: Duration,
    /// The part of `decode` that emulated tiers declare; zero where none is emulated.
    pub declared: Duration,
    /// Weight bytes read while decoding.
    pub read_bytes: PerTier<u64>,
    /// Time spent on each tier's bytes while decoding: computing on them, or waiting for them. The
    /// time of a stage that mixes tiers is shared out by bytes. On emulated tiers it is shared out
    /// by the declared times of the stage's paths.
    pub busy: PerTier<Duration>,
    /// What the reads of experts brought while decoding, prefetches and other idle reads included.
    pub drive: DriveUse,
    /// Prefetched experts, for prompts and while decoding.
    pub prefetch: PrefetchCount,
    /// `[n_moe_layers]`.
    pub layers: Vec<LayerCounters>,
}

impl Counters {
    /// Starts all counters at zero.
    pub fn new(n_tiers: usize, n_moe_layers: usize) -> Self {
        Self {
            read_bytes: PerTier::from_fn(n_tiers, |_| 0),
            busy: PerTier::from_fn(n_tiers, |_| Duration::ZERO),
            layers: vec![LayerCounters::default(); n_moe_layers],
            ..Self::default()
        }
    }

    /// Counts the bytes that a decode stage read.
    pub(crate) fn count(&mut self, bytes: &StageBytes) {
        for (total, bytes) in self.read_bytes.iter_mut().zip(bytes.by_tier()) {
            *total += bytes;
        }
    }

    /// Counts a decode stage that took `time` and read `bytes`; the time is shared out by bytes.
    pub(crate) fn charge(&mut self, bytes: &StageBytes, time: Duration) {
        let total: u64 = bytes.by_tier().iter().sum();
        self.count(bytes);
        for (tier, bytes) in bytes.by_tier().enumerate() {
            if total > 0 {
                self.busy[tier] += time.mul_f64(*bytes as f64 / total as f64);
            }
        }
    }

    /// Counts the time of a decode stage, shared out by the declared times of its paths.
    pub(crate) fn charge_paths(&mut self, paths: &PerTier<Duration>, time: Duration) {
        let total: f64 = paths.iter().map(Duration::as_secs_f64).sum();
        if total > 0.0 {
            for (busy, path) in self.busy.iter_mut().zip(paths) {
                *busy += time.mul_f64(path.as_secs_f64() / total);
            }
        }
    }
}
