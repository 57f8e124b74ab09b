//! `*.record.json`: what a run did and how fast, beside what its plan predicted.

mod conditions;
mod setup;
mod wire;
mod wire_parts;

pub use conditions::{Conditions, Processors, TierRate};
pub use setup::{Setup, System, TierSetup};

#[cfg(test)]
mod tests;

use super::kind::RECORD;
use super::placement::Prediction;
use crate::source_id::SourceId;
use crate::{FormatError, safely};
use std::path::Path;

/// Time and bytes of one tier during a run's decode phase.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TierRecord {
    /// Name of the tier in the plan.
    pub name: String,
    /// Whether its rates were emulated.
    pub emulated: bool,
    /// Bytes the plan puts there.
    pub planned_bytes: u64,
    /// Bytes counted there after loading.
    pub resident_bytes: u64,
    /// Bytes read from it while decoding.
    pub read_bytes: u64,
    /// Seconds in which computation waited for its reads.
    pub busy_s: f64,
}

/// One layer's expert accesses during decode.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerRecord {
    /// Number of the layer.
    pub layer: u32,
    /// Accesses to pinned experts.
    pub pinned_hits: u64,
    /// Accesses found in a slot.
    pub slot_hits: u64,
    /// Accesses that were read from the slow tier.
    pub misses: u64,
    /// Mean seconds per token in the dense stage: attention and other dense work.
    pub dense_s: f64,
    /// Mean seconds per token in the expert stage, waiting included.
    pub expert_s: f64,
    /// Bytes that the misses brought in.
    pub missed_bytes: u64,
    /// Mean seconds per token from the first submission of the layer's reads to the end of the last
    /// one, prefetches included.
    pub reading_s: f64,
    /// Part of `reading_s` in which nothing could compute for want of a read; the rest was hidden.
    pub waited_s: f64,
    /// Of all these accesses, those to experts of main memory that a GPU computed.
    pub streamed: u64,
}

/// Steps of several texts, each of which adds one token of every text.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ParallelRecord {
    /// Texts at once.
    pub texts: u32,
    /// Prompt tokens per second, all texts together; 0 where there were none.
    pub prompt_tok_s: f64,
    /// Decoded tokens per second, all texts together.
    pub decode_tok_s: f64,
    /// Median seconds between two tokens of a text.
    pub gap_s: f64,
    /// 95th percentile of those.
    pub gap_p95_s: f64,
    /// Distinct experts per layer and step; 0 without routed experts.
    pub distinct_experts: f64,
    /// What was predicted.
    pub predicted: Option<ParallelPrediction>,
    /// What is predicted with the rates of the run, where [conditions](Conditions) were recorded.
    pub observed: Option<ParallelPrediction>,
}

/// What was predicted of steps of several texts.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ParallelPrediction {
    /// Decoded tokens per second, all texts together.
    pub decode_tok_s: f64,
    /// Seconds between two tokens of a text.
    pub gap_s: f64,
}

/// A run: what it did, and how fast.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunRecord {
    /// Name of the plan.
    pub plan: String,
    /// Solver status of the plan.
    pub plan_status: String,
    /// The plan's proven gap.
    pub plan_gap: Option<f64>,
    /// The model that was run.
    pub model: Option<SourceId>,
    /// The machine the plan was made for.
    pub machine: Option<SourceId>,
    /// When, in UTC: `2026-11-22T17:00:00Z`.
    pub when: String,
    /// Processor and threads it ran on.
    pub host: String,
    /// Number of compute threads.
    pub threads: u32,
    /// Instruction set of the kernels.
    pub isa: String,
    /// Whether any tier was emulated.
    pub emulated: bool,
    /// Tokens processed as prompt.
    pub prompt_tokens: u64,
    /// Seconds of that phase.
    pub prompt_s: f64,
    /// Tokens decoded one at a time.
    pub decode_tokens: u64,
    /// Seconds of that phase.
    pub decode_s: f64,
    /// Seconds from start to the first token, loading included.
    pub first_token_s: f64,
    /// By tier, fastest first.
    pub tiers: Vec<TierRecord>,
    /// By layer with routed experts.
    pub layers: Vec<LayerRecord>,
    /// The plan's prediction.
    pub predicted: Option<Prediction>,
    /// What a benchmark measured with several texts at once.
    pub parallel: Vec<ParallelRecord>,
    /// What the machine gave meanwhile, where that was not what the plan counted on.
    pub conditions: Option<Conditions>,
    /// What it was set up with; none in records of versions before 5.
    pub setup: Option<Setup>,
    /// Ids of the decoded tokens, so that runs can be compared.
    pub output: Vec<u32>,
}

impl RunRecord {
    /// Whether a GPU computed experts of main memory for decoded tokens.
    pub fn has_streamed(&self) -> bool {
        self.layers.iter().any(|layer| layer.streamed > 0)
    }

    /// Returns the tokens per second while decoding, 0 when nothing was decoded.
    pub fn decode_tok_s(&self) -> f64 {
        rate(self.decode_tokens, self.decode_s)
    }

    /// Returns the tokens per second that the plan predicts with the rates of the run: those that it
    /// predicted anyway where the run had the rates that the plan counts on. `None` without a
    /// prediction.
    pub fn observed_tok_s(&self) -> Option<f64> {
        let observed = self.conditions.as_ref().and_then(|c| c.predicted.as_ref());
        let predicted = observed.or(self.predicted.as_ref())?;
        Some(predicted.decode_tok_s)
    }

    /// Returns the tokens per second of prompt processing, 0 when there was no prompt.
    pub fn prompt_tok_s(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_s)
    }

    /// Encodes the file as indented JSON with a line feed at its end; the output's token ids share
    /// a line.
    pub fn encode(&self) -> String {
        wire::encode(self)
    }

    /// Writes the file, or says why its content would not be readable again.
    pub fn write(&self, path: &Path) -> Result<(), FormatError> {
        wire::check(self).map_err(|what| FormatError::invalid(path, what))?;
        safely::write(path, self.encode().as_bytes())
    }
}

/// Reads a run record from the bytes of its file. `path` is only named in errors.
pub fn decode(bytes: &[u8], path: &Path) -> Result<RunRecord, FormatError> {
    let text = RECORD.open_json(bytes, path)?;
    let record = wire::decode(text).map_err(|what| FormatError::invalid(path, what))?;
    wire::check(&record).map_err(|what| FormatError::invalid(path, what))?;
    Ok(record)
}

/// Reads a run record.
pub fn read(path: &Path) -> Result<RunRecord, FormatError> {
    decode(&RECORD.read(path)?, path)
}

fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        count as f64 / seconds
    } else {
        0.0
    }
}
