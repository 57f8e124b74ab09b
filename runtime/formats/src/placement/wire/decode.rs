//! Decodes a plan from its wire structs: names become tiers, and what a version does not have is
//! refused.

use super::{BY_LAYER, Names, Wire, WireDense, WireLayer, WirePrediction, WireSolver, WireTier};
use crate::kind::toml_words;
use crate::machine::check_unit;
use crate::model::kv::KvType;
use crate::model::shape::DenseKind;
use crate::placement::{
    DensePlacement, ExpertCopy, Goal, HomeReads, LayerPlacement, Pins, Placement, Prediction,
    SolverReport,
};
use crate::ranges::{self, Allowance, MAX_EXPERT, MAX_LAYER};
use crate::source_id::SourceId;

/// Reads the plan that a text says; its consistency is still to be checked.
pub(in crate::placement) fn decode(text: &str) -> Result<Placement, String> {
    let wire: Wire = toml::from_str(text).map_err(|e| toml_words(text, &e))?;
    let kv_type = match &wire.kv_type {
        Some(_) if wire.version < 2 => {
            return Err(
                "kv_type is a key of version 2; write `version = 2`, or leave it out".into(),
            );
        }
        Some(name) => name.parse().map_err(|e| format!("kv_type: {e}"))?,
        None => KvType::default(),
    };
    for tier in &wire.tier {
        check_unit(
            &tier.name,
            tier.kind.into(),
            tier.node,
            tier.device,
            (wire.version, 4),
        )?;
        tier.accelerator().check_version((wire.version, 5))?;
    }
    if (wire.sequences.is_some() || wire.checkpoints.is_some()) && wire.version < 6 {
        return Err(
            "sequences and checkpoints are keys of version 6; write `version = 6`, or leave them out".into(),
        );
    }
    if wire.window_chunk.is_some() && wire.version < 7 {
        return Err(
            "window_chunk is a key of version 7; write `version = 7`, or leave it out".into(),
        );
    }
    if wire.dense.token_table.is_some() && wire.version < 8 {
        return Err(
            "dense.token_table is a key of version 8; write `version = 8`, or leave it out".into(),
        );
    }
    if (wire.io.is_some() || !wire.copies.is_empty()) && wire.version < 9 {
        return Err(
            "io and copies are keys of version 9; write `version = 9`, or leave them out".into(),
        );
    }
    if wire.streaming.is_some() && wire.version < 11 {
        return Err(
            "streaming is a key of version 11; write `version = 11`, or leave it out".into(),
        );
    }
    if wire.host_kv.is_some() && wire.version < 12 {
        return Err("host_kv is a key of version 12; write `version = 12`, or leave it out".into());
    }
    let mut allowance = Allowance::for_a_file();
    let names = Names::new(&wire.tier);
    let predicted = decode_prediction(wire.predicted, wire.version, &names)?;
    let solver = decode_solver(wire.solver, wire.version)?;
    let dense = decode_dense(wire.dense, &names, &mut allowance)?;
    let streaming = wire.streaming.map(|s| s.named(&names)).transpose()?;
    let host_kv = wire.host_kv.as_deref().unwrap_or_default();
    let host_kv = ranges::parse(host_kv, "layer", MAX_LAYER, &mut allowance)
        .map_err(|e| format!("host_kv: {e}"))?;
    let mut layers = Vec::new();
    for layer in wire.layer {
        decode_layer(layer, wire.version, &names, &mut allowance, &mut layers)?;
    }
    Ok(Placement {
        name: wire.name,
        model: wire.made_from.model.into(),
        profile: wire.made_from.profile.map(SourceId::from),
        machine: wire.made_from.machine.into(),
        layer_overhead_us: wire.layer_overhead_us,
        token_overhead_us: wire.token_overhead_us,
        context: wire.context,
        sequences: wire.sequences.unwrap_or(1),
        checkpoints: wire.checkpoints.unwrap_or(0),
        window_chunk: wire.window_chunk,
        kv_tier: names.find(&wire.kv_tier, "kv_tier")?,
        kv_type,
        host_kv,
        staging_tier: names.find(&wire.staging.tier, "staging.tier")?,
        staging_experts: wire.staging.experts,
        reads: HomeReads {
            io: wire.io.map(Into::into),
            copies: wire.copies.into_iter().map(ExpertCopy::from).collect(),
        },
        streaming,
        dense,
        layers,
        solver,
        predicted,
        tiers: wire.tier.into_iter().map(WireTier::into_tier).collect(),
    })
}

fn decode_prediction(
    wire: WirePrediction,
    version: u64,
    names: &Names,
) -> Result<Prediction, String> {
    if version < 3 && (wire.at.is_some() || wire.kv_s.is_some() || !wire.prompt_gflops.is_empty()) {
        return Err(
            "predicted.at, kv_s and prompt_gflops are keys of version 3; write `version = 3`, or leave them out".into(),
        );
    }
    if version < 10 && !wire.few_gflops.is_empty() {
        return Err(
            "predicted.few_gflops is a key of version 10; write `version = 10`, or leave it out"
                .into(),
        );
    }
    Ok(Prediction {
        decode_tok_s: wire.decode_tok_s,
        prompt_tok_s: wire.prompt_tok_s,
        overhead_s: wire.overhead_s,
        dense_s: names.by_tier(wire.dense_s, "predicted.dense_s")?,
        expert_s: names.by_tier(wire.expert_s, "predicted.expert_s")?,
        expert_critical_s: wire.expert_critical_s,
        hit_rate: wire.hit_rate,
        read_bytes: names.by_tier(wire.read_bytes, "predicted.read_bytes")?,
        emulated: wire.emulated,
        at: wire.at.unwrap_or(0),
        kv_s: wire.kv_s.unwrap_or(0.0),
        prompt_gflops: names.by_tier(wire.prompt_gflops, "predicted.prompt_gflops")?,
        few_gflops: names.by_tier(wire.few_gflops, "predicted.few_gflops")?,
    })
}

fn decode_solver(wire: WireSolver, version: u64) -> Result<SolverReport, String> {
    let goal = decode_goal(&wire, version)?;
    let WireSolver {
        backend,
        status,
        objective_s,
        bound_s,
        gap,
        solve_s,
        ..
    } = wire;
    Ok(SolverReport {
        backend,
        status,
        objective_s,
        bound_s,
        gap,
        solve_s,
        goal,
    })
}

fn decode_goal(wire: &WireSolver, version: u64) -> Result<Option<Goal>, String> {
    let numbers = [
        wire.objective_value,
        wire.objective_bound,
        wire.target_tok_s,
    ];
    let any = numbers.iter().any(Option::is_some)
        || wire.objective.is_some()
        || wire.objective_unit.is_some()
        || wire.batch.is_some();
    match (&wire.objective, wire.objective_value, &wire.objective_unit) {
        _ if any && version < 3 => {
            Err("solver.objective and the keys beside it are of version 3; write `version = 3`, or leave them out"
                .into())
        }
        (Some(objective), Some(value), Some(unit)) => Ok(Some(Goal {
            objective: objective.clone(),
            value,
            unit: unit.clone(),
            bound: wire.objective_bound,
            batch: wire.batch,
            target_tok_s: wire.target_tok_s,
        })),
        _ if any => Err("solver.objective, objective_value and objective_unit go together; write all or none".into()),
        _ => Ok(None),
    }
}

fn decode_dense(
    wire: WireDense,
    names: &Names,
    allowance: &mut Allowance,
) -> Result<Vec<DensePlacement>, String> {
    let mut dense = Vec::new();
    let mut whole = |kind, key: &str, tier: Option<String>, names: &Names| {
        if let Some(tier) = tier {
            dense.push(DensePlacement {
                kind,
                layer: None,
                tier: names.find(&tier, &format!("dense.{key}"))?,
            });
        }
        Ok::<(), String>(())
    };
    whole(DenseKind::Embedding, "embedding", wire.embedding, names)?;
    whole(
        DenseKind::TokenTable,
        "token_table",
        wire.token_table,
        names,
    )?;
    whole(DenseKind::Head, "head", wire.head, names)?;
    let groups = [
        wire.attention,
        wire.router,
        wire.shared_expert,
        wire.dense_ffn,
    ];
    for ((kind, key), groups) in BY_LAYER.into_iter().zip(groups) {
        for group in groups {
            let what = format!("dense.{key}");
            let tier = names.find(&group.tier, &what)?;
            let layers = ranges::parse(&group.layers, "layer", MAX_LAYER, allowance)
                .map_err(|e| format!("{what}: {e}"))?;
            dense.extend(layers.into_iter().map(|layer| DensePlacement {
                kind,
                layer: Some(layer),
                tier,
            }));
        }
    }
    dense.sort_by_key(|d| (d.kind, d.layer));
    Ok(dense)
}

fn decode_layer(
    wire: WireLayer,
    version: u64,
    names: &Names,
    allowance: &mut Allowance,
    out: &mut Vec<LayerPlacement>,
) -> Result<(), String> {
    let (place, numbers) = match (wire.layer, &wire.layers) {
        (Some(layer), None) => (format!("layer {layer}"), vec![layer]),
        (None, Some(text)) => {
            let numbers = ranges::parse(text, "layer", MAX_LAYER, allowance)?;
            (format!("layers {text}"), numbers)
        }
        _ => return Err("each [[layer]] needs either layer = 3 or layers = \"3-7\"".into()),
    };
    if numbers.is_empty() {
        return Err("a [[layer]] table names no layer; write layer = 3 or layers = \"3-7\"".into());
    }
    let explain = |what: String| format!("{place}: {what}");
    let policy = wire.policy(version).map_err(explain)?;
    let mut pinned = Vec::new();
    let mut count = 0u64;
    for (tier, experts) in wire.pinned {
        let tier = names.find(&tier, "pinned").map_err(explain)?;
        let experts = ranges::parse(&experts, "expert", MAX_EXPERT, allowance).map_err(explain)?;
        count += experts.len() as u64;
        if !experts.is_empty() {
            pinned.push(Pins { tier, experts });
        }
    }
    pinned.sort_by_key(|pins| pins.tier);
    // The table is copied for every layer it stands for, so the copies count too.
    allowance
        .take(count * (numbers.len() as u64 - 1))
        .map_err(explain)?;
    let slot_tier = names.find(&wire.slot_tier, "slot_tier").map_err(explain)?;
    out.extend(numbers.into_iter().map(|layer| LayerPlacement {
        layer,
        pinned: pinned.clone(),
        slots: wire.slots,
        slot_tier,
        policy,
    }));
    Ok(())
}
