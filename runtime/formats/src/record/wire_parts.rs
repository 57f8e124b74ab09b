//! Parts of a run record's JSON: predictions, steps of several texts, and the conditions of a run.

use super::{Conditions, ParallelPrediction, ParallelRecord, Processors, TierRate};
use crate::placement::{PerTier, Prediction};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WirePrediction {
    decode_tok_s: f64,
    prompt_tok_s: f64,
    overhead_s: f64,
    dense_s: Vec<f64>,
    expert_s: Vec<f64>,
    expert_critical_s: f64,
    hit_rate: f64,
    read_bytes: Vec<f64>,
    emulated: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) at: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) kv_s: Option<f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) prompt_gflops: Vec<f64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WireParallel {
    texts: u32,
    prompt_tok_s: f64,
    decode_tok_s: f64,
    gap_s: f64,
    gap_p95_s: f64,
    distinct_experts: f64,
    predicted: Option<WireParallelPrediction>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) observed: Option<WireParallelPrediction>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WireParallelPrediction {
    decode_tok_s: f64,
    gap_s: f64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WireConditions {
    processors: Processors,
    tiers: Vec<TierRate>,
    predicted: Option<WirePrediction>,
}

impl From<&ParallelRecord> for WireParallel {
    fn from(record: &ParallelRecord) -> Self {
        Self {
            texts: record.texts,
            prompt_tok_s: record.prompt_tok_s,
            decode_tok_s: record.decode_tok_s,
            gap_s: record.gap_s,
            gap_p95_s: record.gap_p95_s,
            distinct_experts: record.distinct_experts,
            predicted: record.predicted.map(Into::into),
            observed: record.observed.map(Into::into),
        }
    }
}

impl From<WireParallel> for ParallelRecord {
    fn from(wire: WireParallel) -> Self {
        Self {
            texts: wire.texts,
            prompt_tok_s: wire.prompt_tok_s,
            decode_tok_s: wire.decode_tok_s,
            gap_s: wire.gap_s,
            gap_p95_s: wire.gap_p95_s,
            distinct_experts: wire.distinct_experts,
            predicted: wire.predicted.map(Into::into),
            observed: wire.observed.map(Into::into),
        }
    }
}

impl From<ParallelPrediction> for WireParallelPrediction {
    fn from(predicted: ParallelPrediction) -> Self {
        let ParallelPrediction {
            decode_tok_s,
            gap_s,
        } = predicted;
        Self {
            decode_tok_s,
            gap_s,
        }
    }
}

impl From<WireParallelPrediction> for ParallelPrediction {
    fn from(wire: WireParallelPrediction) -> Self {
        let WireParallelPrediction {
            decode_tok_s,
            gap_s,
        } = wire;
        Self {
            decode_tok_s,
            gap_s,
        }
    }
}

impl WirePrediction {
    /// Takes a prediction over, with the keys of version 2 if `of_2`.
    pub(super) fn new(p: &Prediction, of_2: bool) -> Self {
        Self {
            decode_tok_s: p.decode_tok_s,
            prompt_tok_s: p.prompt_tok_s,
            overhead_s: p.overhead_s,
            dense_s: p.dense_s.clone().into(),
            expert_s: p.expert_s.clone().into(),
            expert_critical_s: p.expert_critical_s,
            hit_rate: p.hit_rate,
            read_bytes: p.read_bytes.clone().into(),
            emulated: p.emulated,
            at: of_2.then_some(p.at),
            kv_s: of_2.then_some(p.kv_s),
            prompt_gflops: p.prompt_gflops.clone().into(),
        }
    }
}

impl From<WirePrediction> for Prediction {
    fn from(p: WirePrediction) -> Self {
        Self {
            decode_tok_s: p.decode_tok_s,
            prompt_tok_s: p.prompt_tok_s,
            overhead_s: p.overhead_s,
            dense_s: p.dense_s.into(),
            expert_s: p.expert_s.into(),
            expert_critical_s: p.expert_critical_s,
            hit_rate: p.hit_rate,
            read_bytes: p.read_bytes.into(),
            emulated: p.emulated,
            at: p.at.unwrap_or(0),
            kv_s: p.kv_s.unwrap_or(0.0),
            prompt_gflops: p.prompt_gflops.into(),
            few_gflops: PerTier::default(),
        }
    }
}

impl From<&Conditions> for WireConditions {
    fn from(conditions: &Conditions) -> Self {
        let predicted = conditions.predicted.as_ref();
        Self {
            processors: conditions.processors,
            tiers: conditions.rates.clone(),
            predicted: predicted.map(|p| WirePrediction::new(p, true)),
        }
    }
}

impl From<WireConditions> for Conditions {
    fn from(wire: WireConditions) -> Self {
        Self {
            processors: wire.processors,
            rates: wire.tiers,
            predicted: wire.predicted.map(Prediction::from),
        }
    }
}
