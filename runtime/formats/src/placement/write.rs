//! The text of a plan, laid out by hand to be readable: what [`super::wire`] reads.

use super::wire::BY_LAYER;
use super::{
    HomeReads, LayerPlacement, PLACEMENT, Pins, Placement, PlanTier, Prediction, SlotPolicy,
    TierIdx,
};
use crate::copies;
use crate::machine::Accelerator;
use crate::model::shape::DenseKind;
use crate::ranges;
use crate::source_id::SourceId;
use crate::text::{float, quote};
use crate::units::show_bytes;
use std::collections::BTreeMap;

/// Encodes the plan as text. A tier index out of range, which [`super::check`] refuses, is written
/// as a name that no tier has.
pub(super) fn encode(plan: &Placement) -> String {
    let mut out = Text(String::new());
    let name = |tier: TierIdx| plan.tiers.get(tier).map_or("?", |t| t.tier.name.as_str());
    out.line("# Where every tensor lives; docs/FORMAT.md explains each line.");
    out.field("format", quote(PLACEMENT.format));
    out.field("version", version(plan));
    out.field("name", quote(&plan.name));
    out.field("context", plan.context);
    if plan.sequences != 1 {
        out.field("sequences", plan.sequences);
    }
    if plan.checkpoints != 0 {
        out.field("checkpoints", plan.checkpoints);
    }
    if let Some(tokens) = plan.window_chunk {
        out.field("window_chunk", tokens);
    }
    out.field("kv_tier", quote(name(plan.kv_tier)));
    out.field("kv_type", quote(plan.kv_type.name()));
    if !plan.host_kv.is_empty() {
        out.field("host_kv", quote(&ranges::show(&plan.host_kv)));
    }
    let staging = quote(name(plan.staging_tier));
    out.field(
        "staging",
        format!("{{ tier = {staging}, experts = {} }}", plan.staging_experts),
    );
    if let Some(io) = plan.reads.io {
        out.field("io", quote(io.as_str()));
    }
    if !plan.reads.copies.is_empty() {
        out.field("copies", copies::encode(&plan.reads.copies));
    }
    if let Some(s) = &plan.streaming {
        let (tier, from) = (quote(name(s.tier)), quote(name(s.from)));
        let rates = [("link_gbps", s.link_gbps), ("cpu_share", s.cpu_share)];
        let rates = rates.map(|(key, rate)| format!("{key} = {}", float(rate)));
        out.field(
            "streaming",
            format!(
                "{{ tier = {tier}, from = {from}, experts = {}, {} }}",
                s.experts,
                rates.join(", ")
            ),
        );
    }
    out.field("layer_overhead_us", float(plan.layer_overhead_us));
    out.field("token_overhead_us", float(plan.token_overhead_us));

    out.line("\n[made_from]");
    out.field("model", source(&plan.model));
    if let Some(profile) = &plan.profile {
        out.field("profile", source(profile));
    }
    out.field("machine", source(&plan.machine));

    out.line("\n[solver]");
    out.field("backend", quote(&plan.solver.backend));
    out.field("status", quote(&plan.solver.status));
    out.field("objective_s", float(plan.solver.objective_s));
    for (key, x) in [("bound_s", plan.solver.bound_s), ("gap", plan.solver.gap)] {
        if let Some(x) = x {
            out.field(key, float(x));
        }
    }
    out.field("solve_s", float(plan.solver.solve_s));
    if let Some(goal) = &plan.solver.goal {
        out.field("objective", quote(&goal.objective));
        out.field("objective_value", float(goal.value));
        out.field("objective_unit", quote(&goal.unit));
        for (key, x) in [
            ("objective_bound", goal.bound),
            ("target_tok_s", goal.target_tok_s),
        ] {
            if let Some(x) = x {
                out.field(key, float(x));
            }
        }
        if let Some(batch) = goal.batch {
            out.field("batch", batch);
        }
    }

    let predicted = &plan.predicted;
    out.line("\n[predicted]");
    out.field("decode_tok_s", float(predicted.decode_tok_s));
    out.field("prompt_tok_s", float(predicted.prompt_tok_s));
    out.field("hit_rate", float(predicted.hit_rate));
    out.field("emulated", predicted.emulated);
    out.field("overhead_s", float(predicted.overhead_s));
    out.field("expert_critical_s", float(predicted.expert_critical_s));
    if charges_kv(predicted) {
        out.field("at", predicted.at);
        out.field("kv_s", float(predicted.kv_s));
    }
    for (key, parts) in [
        ("dense_s", &predicted.dense_s),
        ("expert_s", &predicted.expert_s),
        ("read_bytes", &predicted.read_bytes),
        ("prompt_gflops", &predicted.prompt_gflops),
        ("few_gflops", &predicted.few_gflops),
    ] {
        if !parts.is_empty() {
            let parts = parts
                .enumerate()
                .map(|(tier, &x)| format!("{} = {}", name(tier), float(x)));
            out.field(key, table(parts));
        }
    }

    encode_dense(plan, &mut out, name);
    for tier in &plan.tiers {
        encode_tier(tier, &mut out);
    }
    encode_layers(plan, &mut out, name);
    out.0
}

fn encode_dense<'a>(plan: &Placement, out: &mut Text, name: impl Fn(TierIdx) -> &'a str) {
    out.line("\n[dense]");
    let whole = |kind| {
        plan.dense
            .iter()
            .find(|d| d.kind == kind && d.layer.is_none())
    };
    if let Some(group) = whole(DenseKind::Embedding) {
        out.field("embedding", quote(name(group.tier)));
    }
    if let Some(group) = whole(DenseKind::TokenTable) {
        out.field("token_table", quote(name(group.tier)));
    }
    for (kind, key) in BY_LAYER {
        let mut by_tier: BTreeMap<TierIdx, Vec<u32>> = BTreeMap::new();
        for group in plan.dense.iter().filter(|d| d.kind == kind) {
            if let Some(layer) = group.layer {
                by_tier.entry(group.tier).or_default().push(layer);
            }
        }
        if by_tier.is_empty() {
            continue;
        }
        let groups = by_tier.into_iter().map(|(tier, mut layers)| {
            layers.sort_unstable();
            format!(
                "{{ layers = {}, tier = {} }}",
                quote(&ranges::show(&layers)),
                quote(name(tier))
            )
        });
        out.field(key, format!("[{}]", groups.collect::<Vec<_>>().join(", ")));
    }
    if let Some(group) = whole(DenseKind::Head) {
        out.field("head", quote(name(group.tier)));
    }
}

fn encode_tier(tier: &PlanTier, out: &mut Text) {
    out.line("\n[[tier]]");
    out.line(&format!(
        "# uses {} of {}",
        show_bytes(tier.used_bytes()),
        show_bytes(tier.budget_bytes)
    ));
    out.field("name", quote(&tier.tier.name));
    out.field("kind", quote(tier.tier.kind.as_str()));
    out.field("capacity_bytes", tier.tier.capacity_bytes);
    out.field("read_gbps", float(tier.tier.read_gbps));
    out.field("latency_us", float(tier.tier.latency_us));
    out.field("emulated", tier.tier.emulated);
    if let Some((key, number)) = tier.tier.unit_key() {
        out.field(key, number);
    }
    for (key, value) in tier.tier.accelerator.keys() {
        out.field(key, float(value));
    }
    out.field("source", quote(&tier.tier.source));
    out.field("budget_bytes", tier.budget_bytes);
    for (key, bytes) in tier.bytes.lines() {
        out.field(key, bytes);
    }
}

fn encode_layers<'a>(plan: &Placement, out: &mut Text, name: impl Fn(TierIdx) -> &'a str) {
    let alike = |a: &LayerPlacement, b: &LayerPlacement| {
        a.layer.checked_add(1) == Some(b.layer)
            && (a.slots, a.slot_tier, a.policy) == (b.slots, b.slot_tier, b.policy)
            && a.pinned == b.pinned
    };
    for run in plan.layers.chunk_by(alike) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            continue;
        };
        out.line("\n[[layer]]");
        if first.layer == last.layer {
            out.field("layer", first.layer);
        } else {
            out.field("layers", quote(&format!("{}-{}", first.layer, last.layer)));
        }
        let mut pinned: Vec<&Pins> = first
            .pinned
            .iter()
            .filter(|pins| !pins.experts.is_empty())
            .collect();
        pinned.sort_by_key(|pins| pins.tier);
        let pinned = pinned.iter().map(|pins| {
            format!(
                "{} = {}",
                name(pins.tier),
                quote(&ranges::show(&pins.experts))
            )
        });
        out.field("pinned", table(pinned));
        out.field("slots", first.slots);
        out.field("slot_tier", quote(name(first.slot_tier)));
        out.field("policy", quote(first.policy.name()));
        match first.policy {
            SlotPolicy::Lru => {}
            SlotPolicy::Lfu { half_life } => out.field("half_life", half_life),
            SlotPolicy::Adaptive {
                half_life,
                recent_half_life,
                recent_weight,
            } => {
                out.field("half_life", half_life);
                out.field("recent_half_life", recent_half_life);
                out.field("recent_weight", recent_weight);
            }
        }
    }
}

/// Returns the oldest version that can say all of the plan and is still written.
fn version(plan: &Placement) -> u64 {
    let policies = plan.layers.iter().map(|l| l.policy.since_version());
    let goal = if plan.solver.goal.is_some() || charges_kv(&plan.predicted) {
        3
    } else {
        2
    };
    let units = if plan.tiers.iter().any(|t| t.tier.unit.is_some()) {
        4
    } else {
        2
    };
    let has_table = plan.dense.iter().any(|d| d.kind == DenseKind::TokenTable);
    let accelerated = plan
        .tiers
        .iter()
        .any(|t| t.tier.accelerator != Accelerator::default());
    policies
        .chain([goal, units, if accelerated { 5 } else { 2 }])
        .chain([if (plan.sequences, plan.checkpoints) == (1, 0) {
            2
        } else {
            6
        }])
        .chain(plan.window_chunk.map(|_| 7))
        .chain(has_table.then_some(8))
        .chain((plan.reads != HomeReads::default()).then_some(9))
        .chain((!plan.predicted.few_gflops.is_empty()).then_some(10))
        .chain(plan.streaming.map(|_| 11))
        .chain((!plan.host_kv.is_empty()).then_some(12))
        .fold(2, u64::max)
}

/// Whether a prediction has keys of version 3.
fn charges_kv(predicted: &Prediction) -> bool {
    predicted.at > 0 || predicted.kv_s > 0.0 || !predicted.prompt_gflops.is_empty()
}

fn source(id: &SourceId) -> String {
    format!(
        "{{ name = {}, hash = {} }}",
        quote(&id.name),
        quote(&id.hash)
    )
}

fn table(items: impl Iterator<Item = String>) -> String {
    let items: Vec<String> = items.collect();
    if items.is_empty() {
        "{}".into()
    } else {
        format!("{{ {} }}", items.join(", "))
    }
}

struct Text(String);

impl Text {
    fn line(&mut self, line: &str) {
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn field(&mut self, key: &str, value: impl std::fmt::Display) {
        self.line(&format!("{key} = {value}"));
    }
}
