//! What a run counts: time and bytes by tier, hits and misses by layer.

use crate::tiers::pace::StageBytes;
use std::time::Duration;

/// Experts that were read on a guess, and what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AheadCount {
    /// Experts that their layer did use.
    pub right: u64,
    /// Of those, the ones whose bytes were all there when the layer began.
    pub in_time: u64,
    /// Experts that it did not use, although all their bytes may have been read.
    pub wrong: u64,
}

impl std::ops::AddAssign for AheadCount {
    fn add_assign(&mut self, more: Self) {
        self.right += more.right;
        self.in_time += more.in_time;
        self.wrong += more.wrong;
    }
}

/// Accesses and times of one layer with routed experts, over the decoded tokens.
#[derive(Debug, Clone, Default)]
pub struct LayerCounters {
    /// Accesses to pinned experts, and to experts computed where they lie on a mapped tier.
    pub pinned_hits: u64,
    /// Accesses found in a slot.
    pub slot_hits: u64,
    /// Accesses brought in from the slow tier.
    pub misses: u64,
    /// Time in attention, norms and router.
    pub dense: Duration,
    /// Time in routed experts, waiting included.
    pub experts: Duration,
    /// Bytes that misses brought in.
    pub missed_bytes: u64,
    /// Time from the first submission of a token's reads to the end of its last one: reads ahead of the layer included.
    pub reading: Duration,
    /// Of that, the time in which nothing could compute for want of a read.
    pub waited: Duration,
    /// Experts that were guessed before the layer chose.
    pub guessed: u64,
    /// Of those, the ones that it chose.
    pub guessed_right: u64,
}

/// What is counted, most of it while decoding.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Tokens processed as prompt.
    pub prompt_tokens: u64,
    /// Time they took.
    pub prompt: Duration,
    /// Of that, the dense stages and the routed experts.
    pub prompt_stages: [Duration; 2],
    /// Bytes brought in from the slow tier for them.
    pub prompt_missed_bytes: u64,
    /// Tokens decoded: forward passes of one token after the prompt.
    pub decode_tokens: u64,
    /// Time they took.
    pub decode: Duration,
    /// Weight bytes read while decoding, by tier.
    pub read_bytes: Vec<u64>,
    /// Time spent on a tier's bytes while decoding, by tier: computing on them, or waiting for them to arrive. A stage
    /// that mixes tiers is shared out by bytes, or on emulated tiers by the declared times of its paths.
    pub busy: Vec<Duration>,
    /// Experts that were read before their layer chose, for the prompt and while decoding.
    pub ahead: AheadCount,
    /// By layer with routed experts.
    pub layers: Vec<LayerCounters>,
}

impl Counters {
    /// Nothing counted yet.
    pub fn new(n_tiers: usize, n_moe_layers: usize) -> Self {
        Self {
            read_bytes: vec![0; n_tiers],
            busy: vec![Duration::ZERO; n_tiers],
            layers: vec![LayerCounters::default(); n_moe_layers],
            ..Self::default()
        }
    }

    /// Counts bytes read while decoding.
    pub(crate) fn count(&mut self, bytes: &StageBytes) {
        for (total, bytes) in self.read_bytes.iter_mut().zip(bytes.by_tier()) {
            *total += bytes;
        }
    }

    /// Counts a decode stage that took `time` and read `bytes`.
    pub(crate) fn charge(&mut self, bytes: &StageBytes, time: Duration) {
        let all: u64 = bytes.by_tier().iter().sum();
        self.count(bytes);
        for (tier, bytes) in bytes.by_tier().iter().enumerate() {
            if all > 0 {
                self.busy[tier] += time.mul_f64(*bytes as f64 / all as f64);
            }
        }
    }

    /// Shares out the time of a stage by the declared times of its paths.
    pub(crate) fn charge_paths(&mut self, paths: &[Duration], time: Duration) {
        let all: f64 = paths.iter().map(Duration::as_secs_f64).sum();
        if all > 0.0 {
            for (busy, path) in self.busy.iter_mut().zip(paths) {
                *busy += time.mul_f64(path.as_secs_f64() / all);
            }
        }
    }
}
