//! The run record: what an engine counted, beside what its plan promised.

use super::Engine;
use super::generate::Generated;
use tier_plan_formats::record::{LayerRecord, RunRecord, Setup, System, TierRecord};

/// The facts of a record that the engine does not know.
#[derive(Debug, Clone, Default)]
pub struct Circumstances {
    /// UTC moment, see [`tier_plan_formats::units::show_utc`].
    pub when: String,
    /// CPU and memory, human-readable.
    pub host: String,
    /// The machine, in numbers.
    pub system: System,
    /// Seconds from the start of loading to the first token.
    pub first_token_s: f64,
}

/// Returns the record of what the engine counted since its counters were reset.
pub fn record(engine: &Engine, generated: &Generated, circumstances: &Circumstances) -> RunRecord {
    let plan = engine.plan();
    let counters = engine.counters();
    let tiers = plan.tiers.enumerate().map(|(i, t)| TierRecord {
        name: t.tier.name.clone(),
        emulated: t.tier.emulated,
        planned_bytes: t.used_bytes(),
        resident_bytes: engine.resident_bytes()[i],
        read_bytes: counters.read_bytes[i],
        busy_s: counters.busy[i].as_secs_f64(),
    });
    let per_token = |d: std::time::Duration| d.as_secs_f64() / counters.decode_tokens.max(1) as f64;
    let layers = counters
        .layers
        .iter()
        .zip(&plan.layers)
        .map(|(c, l)| LayerRecord {
            layer: l.layer,
            pinned_hits: c.pinned_hits,
            slot_hits: c.slot_hits,
            misses: c.misses,
            dense_s: per_token(c.dense),
            expert_s: per_token(c.experts),
            missed_bytes: c.missed_bytes,
            reading_s: per_token(c.reading),
            waited_s: per_token(c.waited),
            streamed: c.streamed,
        });
    RunRecord {
        plan: plan.name.clone(),
        plan_status: plan.solver.status.clone(),
        plan_gap: plan.solver.gap,
        model: Some(plan.model.clone()),
        machine: Some(plan.machine.clone()),
        when: circumstances.when.clone(),
        host: circumstances.host.clone(),
        threads: engine.n_threads() as u32,
        isa: engine.kernels().isa().to_string(),
        emulated: plan.tiers.iter().any(|t| t.tier.emulated),
        prompt_tokens: counters.prompt_tokens,
        prompt_s: counters.prompt.as_secs_f64(),
        decode_tokens: counters.decode_tokens,
        decode_s: counters.decode.as_secs_f64(),
        first_token_s: circumstances.first_token_s,
        tiers: tiers.collect(),
        layers: layers.collect(),
        // For the place in the text where the run's tokens were: halfway through those that were
        // decoded.
        predicted: (plan.predicted.decode_tok_s > 0.0).then(|| {
            let middle = (engine.n_past() as u64)
                .saturating_sub(counters.decode_tokens.saturating_sub(1) / 2);
            plan.predicted_at(engine.shape(), u32::try_from(middle).unwrap_or(u32::MAX))
        }),
        parallel: Vec::new(),
        conditions: None,
        setup: Some(Setup::new(
            env!("CARGO_PKG_VERSION"),
            circumstances.system.clone(),
            engine.shape().weight_bytes(),
            plan,
        )),
        output: generated.tokens.clone(),
    }
}
