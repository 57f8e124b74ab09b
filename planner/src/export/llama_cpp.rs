//! The nearest that llama.cpp can do: whole layers' tensors on the GPU or the CPU.
//!
//! Its experts of a layer are one tensor each for gate, up and down, so they go to the GPU together or not at all. The
//! layers that the plan uses the GPU most for come first, as many as the plan's VRAM budget holds: at equal bytes. Several
//! GPUs share the layers in proportion to their budgets, the last layers on the last one.

use crate::cost::{outcomes, predict, token_s};
use crate::profile::Evidence;
use anyhow::{Result, ensure};
use std::collections::BTreeSet;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{LayerPlacement, Pins, Placement, Prediction, TierIdx};
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// What llama.cpp calls the tensors of a layer's routed experts, after `blk.N`.
const EXPERTS: &str = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU";

/// A command line, and what it means.
#[derive(Debug, Clone, PartialEq)]
pub struct CommandLine {
    /// The arguments after the program's name and its model, unquoted.
    pub args: Vec<String>,
    /// Layers at the end of the model whose dense tensors are on the GPU; one more for the head.
    pub gpu_layers: u32,
    /// Layers with their experts on the GPU.
    pub expert_layers: BTreeSet<u32>,
    /// Bytes of weights and cache that go to VRAM.
    pub vram_bytes: u64,
    /// The plan's budget there.
    pub vram_budget_bytes: u64,
    /// The cost model's word on this placement; `None` where weights are in neither VRAM nor main memory, since
    /// the system's page cache then decides.
    pub predicted: Option<Prediction>,
    /// What the reader should know, in sentences.
    pub notes: Vec<String>,
}

/// Translates a plan.
///
/// # Errors
/// When the plan does not hold for the model and profile.
pub fn command_line(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> Result<CommandLine> {
    let wrong = crate::solve::check::check(plan, shape, evidence);
    ensure!(
        wrong.is_empty(),
        "the plan '{}' does not hold for this model and profile: {}; give those that it was made from",
        plan.name,
        wrong.join("; ")
    );
    let gpus = gpus(plan);
    let mut notes = Vec::new();
    let mut left: Vec<u64> = gpus.iter().map(|&g| plan.tiers[g].budget_bytes).collect();
    let budget: u64 = left.iter().sum();
    let on_gpu = |kind, layer| plan.dense.iter().any(|d| (d.kind, d.layer) == (kind, layer) && gpus.contains(&d.tier));

    // llama.cpp takes layers from the end. The head counts as one more.
    let wanted = (0..shape.n_layer).filter(|l| on_gpu(DenseKind::Attention, Some(*l))).count() as u32;
    let bytes_of = |layer: Option<u32>, kind: Option<DenseKind>| -> u64 {
        let of =
            |d: &&tier_plan_runtime::model::shape::DenseShape| d.layer == layer && kind.is_none_or(|k| k == d.kind);
        shape.dense.iter().filter(of).map(|d| d.bytes).sum()
    };
    let head = bytes_of(None, Some(DenseKind::Head));
    // The head is on the last one.
    let head_fits = wanted == shape.n_layer
        && on_gpu(DenseKind::Head, None)
        && left.last_mut().is_some_and(|left| take(left, head));
    let (mut dense_layers, mut counts) = (0, vec![0; gpus.len()]);
    for at in (0..gpus.len()).rev() {
        let upto: u64 = gpus[..=at].iter().map(|&g| plan.tiers[g].budget_bytes).sum();
        let share = plan.tiers[gpus[at]].budget_bytes as f64 / upto.max(1) as f64;
        let part = (f64::from(wanted - dense_layers) * share).round() as u32;
        while counts[at] < part {
            let layer = shape.n_layer - 1 - dense_layers;
            // The cache of a layer goes where its attention is.
            let cache = shape.caches.get(layer as usize).map_or(0, |c| c.context_bytes(plan.kv_type, plan.context));
            if !take(&mut left[at], bytes_of(Some(layer), None) + cache) {
                break;
            }
            (counts[at], dense_layers) = (counts[at] + 1, dense_layers + 1);
        }
    }
    let with_head = head_fits && dense_layers == shape.n_layer;
    if let (true, false, Some(last)) = (head_fits, with_head, left.last_mut()) {
        *last += head;
    }
    if dense_layers < wanted {
        notes.push(format!(
            "the plan has the attention of {wanted} layers in VRAM; llama.cpp puts all dense tensors and the cache of a \
             layer together, and {dense_layers} fit"
        ));
    }
    let gpu_layers = dense_layers + u32::from(with_head);
    let first_gpu = shape.n_layer - dense_layers;
    // Layers from there on, GPU by GPU.
    let gpu_of = |layer: u32| {
        let mut from = first_gpu;
        counts.iter().position(|count| {
            from += count;
            (first_gpu..from).contains(&layer)
        })
    };

    let shares = gpu_shares(plan, evidence, &gpus);
    let mut order: Vec<(u32, f64, u64)> = shape
        .experts
        .iter()
        .zip(&shares)
        .filter(|(e, _)| gpu_of(e.layer).is_some())
        .map(|(e, share)| (e.layer, *share, e.expert_bytes * u64::from(e.n_expert)))
        .collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
    let mut expert_layers = BTreeSet::new();
    let mut beyond = 0;
    for (layer, share, bytes) in order {
        if gpu_of(layer).is_some_and(|at| take(&mut left[at], bytes)) {
            expert_layers.insert(layer);
            beyond += u32::from(share <= 0.5);
        }
    }
    if beyond > 0 {
        notes.push(format!(
            "{beyond} layers have all experts in VRAM although the plan serves less than half of their accesses there: \
             so the same bytes are used"
        ));
    }

    let mut args = args(plan, shape, gpu_layers, first_gpu, &expert_layers);
    if gpus.len() > 1 && dense_layers > 0 {
        // Layers of each GPU; the head counts as one.
        let last = counts.len() - 1;
        let of = counts.iter().enumerate().map(|(at, n)| (n + u32::from(at == last && with_head)).to_string());
        args.extend(["--tensor-split".into(), of.collect::<Vec<_>>().join(",")]);
    }
    let tier_of = |layer: u32| gpu_of(layer).map(|at| gpus[at]);
    let head_tier = gpus.last().copied().filter(|_| with_head);
    let same = same_placement(plan, shape, evidence, tier_of, head_tier, &expert_layers);
    if same.is_none() {
        notes.push(
            "the weights do not fit VRAM and main memory together: llama.cpp maps the file and the system's page cache \
             decides what stays, which the cost model does not know, so no speed is predicted"
                .to_string(),
        );
    }
    let predicted = same.map(|same| predict(&same, shape, evidence));
    if plan.layers.iter().any(|l| l.slots > 0) {
        notes.push("llama.cpp has nothing like the plan's slots, which keep experts that were used last".to_string());
    }
    Ok(CommandLine {
        args,
        gpu_layers,
        expert_layers,
        vram_bytes: budget - left.iter().sum::<u64>(),
        vram_budget_bytes: budget,
        predicted,
        notes,
    })
}

/// How much slower a prediction is than the plan's, as a share of the plan's speed.
pub fn loss(plan: &Placement, predicted: &Prediction) -> f64 {
    let (planned, other) = (token_s(&plan.predicted), token_s(predicted));
    if other > 0.0 { 1.0 - planned / other } else { 0.0 }
}

/// Takes bytes of what is left, if it is so much.
fn take(left: &mut u64, bytes: u64) -> bool {
    let after = left.checked_sub(bytes);
    *left = after.unwrap_or(*left);
    after.is_some()
}

/// The plan's GPUs in the order in which llama.cpp counts them.
fn gpus(plan: &Placement) -> Vec<TierIdx> {
    let all = plan.tiers.iter().enumerate().filter(|(_, t)| t.tier.kind == TierKind::Vram);
    let mut numbered: Vec<(u32, TierIdx)> =
        all.enumerate().map(|(at, (tier, t))| (t.tier.device().unwrap_or(at as u32), tier)).collect();
    numbered.sort_unstable();
    numbered.into_iter().map(|(_, tier)| tier).collect()
}

/// The share of each layer's accesses that compute in VRAM.
fn gpu_shares(plan: &Placement, evidence: &Evidence, gpus: &[TierIdx]) -> Vec<f64> {
    let tiers: Vec<Tier> = plan.tiers.iter().map(|t| t.tier.clone()).collect();
    let of = |(layer, evidence): (&LayerPlacement, _)| {
        let evidence: &crate::profile::LayerEvidence = evidence;
        let found = outcomes(layer, evidence, &tiers, plan.staging_tier);
        let on_gpus = |experts: &[u16]| gpus.iter().map(|&gpu| f64::from(experts[gpu])).sum::<f64>();
        let here: f64 = found.iter().map(|(experts, share)| share * on_gpus(experts)).sum();
        here / f64::from(evidence.shape.n_used.max(1))
    };
    plan.layers.iter().zip(&evidence.layers).map(of).collect()
}

fn args(
    plan: &Placement,
    shape: &ModelShape,
    gpu_layers: u32,
    first_gpu: u32,
    expert_layers: &BTreeSet<u32>,
) -> Vec<String> {
    let mut args: Vec<String> = vec!["-c".into(), plan.context.to_string()];
    // What is given here is to stay as it is.
    args.extend(["-fit".into(), "off".into(), "-ngl".into(), gpu_layers.to_string()]);
    let on_cpu: Vec<u32> =
        shape.experts.iter().map(|e| e.layer).filter(|l| *l >= first_gpu && !expert_layers.contains(l)).collect();
    // The engine's own argument counts layers from the first, those without experts too.
    let first_on_gpu = expert_layers.first().copied();
    let prefix = on_cpu.iter().all(|l| first_on_gpu.is_none_or(|gpu| *l < gpu));
    match on_cpu.last() {
        None => {}
        Some(_) if expert_layers.is_empty() => args.push("--cpu-moe".into()),
        Some(last) if prefix => args.extend(["--n-cpu-moe".into(), (last + 1).to_string()]),
        Some(_) => {
            let layers: Vec<String> = on_cpu.iter().map(u32::to_string).collect();
            args.extend(["-ot".into(), format!(r"blk\.({}){EXPERTS}", layers.join("|"))]);
        }
    }
    match plan.kv_type {
        KvType::F16 => {}
        // A quantised cache of values needs flash attention.
        KvType::Q8_0 => args.extend(["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"].map(String::from)),
        KvType::F32 => args.extend(["-ctk", "f32", "-ctv", "f32"].map(String::from)),
    }
    args
}

/// This placement as a plan over the same tiers; `None` where something is left for the slow one.
fn same_placement(
    plan: &Placement,
    shape: &ModelShape,
    evidence: &Evidence,
    tier_of: impl Fn(u32) -> Option<TierIdx>,
    head_tier: Option<TierIdx>,
    expert_layers: &BTreeSet<u32>,
) -> Option<Placement> {
    let dram = plan.tiers.iter().position(|t| t.tier.kind == TierKind::Dram)?;
    let mut left = plan.tiers[dram].budget_bytes;
    let mut same = plan.clone();
    // Keys and values are with their layer's attention; on emulated tiers where the plan has them.
    if same.tiers[same.kv_tier].tier.is_gpu() {
        same.kv_tier = dram;
    }
    for dense in &mut same.dense {
        let gpu = match dense.layer {
            Some(layer) => tier_of(layer),
            None => head_tier.filter(|_| dense.kind == DenseKind::Head),
        };
        dense.tier = gpu.unwrap_or(dram);
        if dense.tier == dram {
            let bytes = shape.dense.iter().filter(|d| (d.kind, d.layer) == (dense.kind, dense.layer)).map(|d| d.bytes);
            left = left.checked_sub(bytes.sum())?;
        }
    }
    for (layer, of) in same.layers.iter_mut().zip(&evidence.layers) {
        let tier = tier_of(layer.layer).filter(|_| expert_layers.contains(&layer.layer)).unwrap_or(dram);
        layer.slots = 0;
        layer.pinned = vec![Pins { tier, experts: (0..of.shape.n_expert).collect() }];
        if tier == dram {
            left = left.checked_sub(of.shape.expert_bytes * u64::from(of.shape.n_expert))?;
        }
    }
    Some(same)
}

/// The layers in an expression of [`CommandLine::args`] that keeps experts on the CPU, or `None` where it is none.
pub fn layers_of(expression: &str) -> Option<Vec<u32>> {
    let list = expression.strip_prefix(r"blk\.(")?.strip_suffix(EXPERTS)?.strip_suffix(')')?;
    list.split('|').map(|layer| layer.parse().ok()).collect()
}

/// An argument as a shell takes it.
pub fn quoted(arg: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) {
        arg.to_string()
    } else {
        format!("'{}'", arg.replace('\'', r"'\''"))
    }
}
