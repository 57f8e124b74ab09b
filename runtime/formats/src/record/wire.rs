//! The JSON of versions 1 to 6 of a run record.
//!
//! Rates that follow from counts and times are written for readers of the file, and computed again
//! when it is read.

use super::wire_parts::{WireConditions, WireParallel, WirePrediction};
use super::{Conditions, LayerRecord, ParallelRecord, RECORD, RunRecord, Setup, TierRecord};
use crate::placement::Prediction;
use crate::source_id::SourceId;
use crate::text::check_amount;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    format: String,
    version: u64,
    plan: String,
    status: String,
    gap: Option<f64>,
    model: Option<WireSource>,
    machine: Option<WireSource>,
    when: String,
    host: String,
    threads: u32,
    isa: String,
    emulated: bool,
    prompt_tokens: u64,
    prompt_s: f64,
    #[serde(default)]
    prompt_tok_s: f64,
    decode_tokens: u64,
    decode_s: f64,
    #[serde(default)]
    decode_tok_s: f64,
    #[serde(default)]
    predicted_decode_tok_s: Option<f64>,
    first_token_s: f64,
    predicted: Option<WirePrediction>,
    tiers: Vec<WireTier>,
    layers: Vec<WireLayer>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    parallel: Vec<WireParallel>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    conditions: Option<WireConditions>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    setup: Option<Setup>,
    /// Last, because [`encode`] writes its items on one line.
    output: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireSource {
    name: String,
    hash: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireTier {
    name: String,
    emulated: bool,
    planned_bytes: u64,
    resident_bytes: u64,
    read_bytes: u64,
    busy_s: f64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireLayer {
    layer: u32,
    pinned_hits: u64,
    slot_hits: u64,
    misses: u64,
    dense_s: f64,
    expert_s: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    missed_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reading_s: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    waited_s: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    streamed: Option<u64>,
}

impl From<&SourceId> for WireSource {
    fn from(id: &SourceId) -> WireSource {
        WireSource {
            name: id.name.clone(),
            hash: id.hash.clone(),
        }
    }
}

impl From<WireSource> for SourceId {
    fn from(wire: WireSource) -> SourceId {
        SourceId {
            name: wire.name,
            hash: wire.hash,
        }
    }
}

/// Encodes the record as JSON.
pub(super) fn encode(record: &RunRecord) -> String {
    let is_of_2 = |p: &Prediction| p.at > 0 || p.kv_s > 0.0 || !p.prompt_gflops.is_empty();
    let reads = |l: &LayerRecord| l.missed_bytes > 0 || l.reading_s > 0.0 || l.waited_s > 0.0;
    let of_6 = record.has_streamed();
    let of_5 = of_6 || record.setup.is_some();
    let of_4 =
        of_5 || record.conditions.is_some() || record.parallel.iter().any(|p| p.observed.is_some());
    let of_3 = of_4 || !record.parallel.is_empty();
    let of_2 =
        of_3 || record.predicted.as_ref().is_some_and(is_of_2) || record.layers.iter().any(reads);
    let wire = Wire {
        format: RECORD.format.into(),
        version: 1 + [of_2, of_3, of_4, of_5, of_6]
            .map(u64::from)
            .iter()
            .sum::<u64>(),
        plan: record.plan.clone(),
        status: record.plan_status.clone(),
        gap: record.plan_gap,
        model: record.model.as_ref().map(WireSource::from),
        machine: record.machine.as_ref().map(WireSource::from),
        when: record.when.clone(),
        host: record.host.clone(),
        threads: record.threads,
        isa: record.isa.clone(),
        emulated: record.emulated,
        prompt_tokens: record.prompt_tokens,
        prompt_s: record.prompt_s,
        prompt_tok_s: record.prompt_tok_s(),
        decode_tokens: record.decode_tokens,
        decode_s: record.decode_s,
        decode_tok_s: record.decode_tok_s(),
        predicted_decode_tok_s: record.predicted.as_ref().map(|p| p.decode_tok_s),
        first_token_s: record.first_token_s,
        predicted: record
            .predicted
            .as_ref()
            .map(|p| WirePrediction::new(p, of_2)),
        tiers: record
            .tiers
            .iter()
            .map(|t| WireTier {
                name: t.name.clone(),
                emulated: t.emulated,
                planned_bytes: t.planned_bytes,
                resident_bytes: t.resident_bytes,
                read_bytes: t.read_bytes,
                busy_s: t.busy_s,
            })
            .collect(),
        layers: record
            .layers
            .iter()
            .map(|l| WireLayer {
                layer: l.layer,
                pinned_hits: l.pinned_hits,
                slot_hits: l.slot_hits,
                misses: l.misses,
                dense_s: l.dense_s,
                expert_s: l.expert_s,
                missed_bytes: of_2.then_some(l.missed_bytes),
                reading_s: of_2.then_some(l.reading_s),
                waited_s: of_2.then_some(l.waited_s),
                streamed: (l.streamed > 0).then_some(l.streamed),
            })
            .collect(),
        parallel: record.parallel.iter().map(WireParallel::from).collect(),
        conditions: record.conditions.as_ref().map(WireConditions::from),
        setup: record.setup.clone(),
        output: Vec::new(),
    };
    // A struct of strings and numbers has no way to fail; if it did, the empty text would be
    // refused on reading.
    let pretty = serde_json::to_string_pretty(&wire).unwrap_or_default();
    let tokens: Vec<String> = record.output.iter().map(u32::to_string).collect();
    match pretty.strip_suffix("[]\n}") {
        Some(start) => format!("{start}[{}]\n}}\n", tokens.join(", ")),
        None => pretty,
    }
}

/// Reads the record that a text says; its numbers are still to be checked.
pub(super) fn decode(text: &str) -> Result<RunRecord, String> {
    let wire: Wire = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let is_of_2 =
        |p: &WirePrediction| p.at.is_some() || p.kv_s.is_some() || !p.prompt_gflops.is_empty();
    if wire.version < 2 && wire.predicted.as_ref().is_some_and(is_of_2) {
        return Err(
            "predicted.at, kv_s and prompt_gflops are keys of version 2; write `\"version\": 2`, or leave them out"
                .into(),
        );
    }
    let reads =
        |l: &WireLayer| l.missed_bytes.is_some() || l.reading_s.is_some() || l.waited_s.is_some();
    if wire.version < 2 && wire.layers.iter().any(reads) {
        return Err(
            "missed_bytes, reading_s and waited_s of a layer are keys of version 2; write `\"version\": 2`, or leave them out"
                .into(),
        );
    }
    if wire.version < 3 && !wire.parallel.is_empty() {
        return Err(
            "parallel is a key of version 3; write `\"version\": 3`, or leave it out".into(),
        );
    }
    let observed = wire.parallel.iter().any(|p| p.observed.is_some());
    if wire.version < 4 && (wire.conditions.is_some() || observed) {
        return Err(
            "conditions and observed are keys of version 4; write `\"version\": 4`, or leave them out"
                .into(),
        );
    }
    if wire.version < 5 && wire.setup.is_some() {
        return Err("setup is a key of version 5; write `\"version\": 5`, or leave it out".into());
    }
    if wire.version < 6 && wire.layers.iter().any(|l| l.streamed.is_some()) {
        return Err(
            "streamed of a layer is a key of version 6; write `\"version\": 6`, or leave it out"
                .into(),
        );
    }
    Ok(RunRecord {
        plan: wire.plan,
        plan_status: wire.status,
        plan_gap: wire.gap,
        model: wire.model.map(SourceId::from),
        machine: wire.machine.map(SourceId::from),
        when: wire.when,
        host: wire.host,
        threads: wire.threads,
        isa: wire.isa,
        emulated: wire.emulated,
        prompt_tokens: wire.prompt_tokens,
        prompt_s: wire.prompt_s,
        decode_tokens: wire.decode_tokens,
        decode_s: wire.decode_s,
        first_token_s: wire.first_token_s,
        tiers: wire
            .tiers
            .into_iter()
            .map(|t| TierRecord {
                name: t.name,
                emulated: t.emulated,
                planned_bytes: t.planned_bytes,
                resident_bytes: t.resident_bytes,
                read_bytes: t.read_bytes,
                busy_s: t.busy_s,
            })
            .collect(),
        layers: wire
            .layers
            .into_iter()
            .map(|l| LayerRecord {
                layer: l.layer,
                pinned_hits: l.pinned_hits,
                slot_hits: l.slot_hits,
                misses: l.misses,
                dense_s: l.dense_s,
                expert_s: l.expert_s,
                missed_bytes: l.missed_bytes.unwrap_or(0),
                reading_s: l.reading_s.unwrap_or(0.0),
                waited_s: l.waited_s.unwrap_or(0.0),
                streamed: l.streamed.unwrap_or(0),
            })
            .collect(),
        predicted: wire.predicted.map(Prediction::from),
        parallel: wire.parallel.into_iter().map(Into::into).collect(),
        conditions: wire.conditions.map(Conditions::from),
        setup: wire.setup,
        output: wire.output,
    })
}

/// Says what is wrong with a record: JSON has no way to write a number that is not finite.
pub(super) fn check(record: &RunRecord) -> Result<(), String> {
    check_amount("prompt_s", record.prompt_s)?;
    check_amount("decode_s", record.decode_s)?;
    check_amount("first_token_s", record.first_token_s)?;
    if let Some(gap) = record.plan_gap.filter(|gap| !gap.is_finite()) {
        return Err(format!(
            "gap is {gap}; it must be a number, or null when nothing is proven"
        ));
    }
    for tier in &record.tiers {
        check_amount(&format!("busy_s of tier '{}'", tier.name), tier.busy_s)?;
    }
    for layer in &record.layers {
        check_amount(&format!("dense_s of layer {}", layer.layer), layer.dense_s)?;
        check_amount(
            &format!("expert_s of layer {}", layer.layer),
            layer.expert_s,
        )?;
        check_amount(
            &format!("reading_s of layer {}", layer.layer),
            layer.reading_s,
        )?;
        check_amount(
            &format!("waited_s of layer {}", layer.layer),
            layer.waited_s,
        )?;
    }
    check_parallel(&record.parallel)?;
    record.setup.as_ref().map_or(Ok(()), Setup::check)?;
    if let Some(predicted) = &record.predicted {
        check_prediction("predicted", predicted)?;
    }
    if let Some(conditions) = &record.conditions {
        conditions.check()?;
        if let Some(predicted) = &conditions.predicted {
            check_prediction("conditions.predicted", predicted)?;
        }
    }
    Ok(())
}

/// Says what is wrong with the numbers of a prediction under this key.
fn check_prediction(key: &str, predicted: &Prediction) -> Result<(), String> {
    let scalars = [
        ("decode_tok_s", predicted.decode_tok_s),
        ("prompt_tok_s", predicted.prompt_tok_s),
        ("overhead_s", predicted.overhead_s),
        ("expert_critical_s", predicted.expert_critical_s),
        ("hit_rate", predicted.hit_rate),
        ("kv_s", predicted.kv_s),
    ];
    let parts = [
        ("dense_s", &predicted.dense_s),
        ("expert_s", &predicted.expert_s),
        ("read_bytes", &predicted.read_bytes),
        ("prompt_gflops", &predicted.prompt_gflops),
    ];
    let parts = parts
        .into_iter()
        .flat_map(|(what, parts)| parts.iter().map(move |&x| (what, x)));
    for (what, x) in scalars.into_iter().chain(parts) {
        check_amount(&format!("{key}.{what}"), x)?;
    }
    Ok(())
}

/// Says what is wrong with the steps of several texts: their numbers of texts ascend.
fn check_parallel(parallel: &[ParallelRecord]) -> Result<(), String> {
    let mut before = 0;
    for steps in parallel {
        let texts = steps.texts;
        if texts <= before {
            return Err(format!(
                "parallel has {texts} texts after {before}; their numbers must ascend from 1"
            ));
        }
        before = texts;
        let predicted = steps.predicted.unwrap_or_default();
        let observed = steps.observed.unwrap_or_default();
        for (what, x) in [
            ("prompt_tok_s", steps.prompt_tok_s),
            ("decode_tok_s", steps.decode_tok_s),
            ("gap_s", steps.gap_s),
            ("gap_p95_s", steps.gap_p95_s),
            ("distinct_experts", steps.distinct_experts),
            ("predicted.decode_tok_s", predicted.decode_tok_s),
            ("predicted.gap_s", predicted.gap_s),
            ("observed.decode_tok_s", observed.decode_tok_s),
            ("observed.gap_s", observed.gap_s),
        ] {
            check_amount(&format!("{what} of {texts} texts"), x)?;
        }
    }
    Ok(())
}
