//! Translates a plan into the nearest llama.cpp command line: tensors of whole layers on the GPU or
//! the CPU.
//!
//! llama.cpp keeps all experts of a layer in one tensor each for gate, up, and down, so they go to
//! the GPU together or not at all. Layers are chosen by how much the plan uses the GPU for them, up
//! to the plan's VRAM budget: equal bytes. Several GPUs share the layers in proportion to their
//! budgets, with the last layers on the last GPU.

use crate::cost::{outcomes, predict, token_s};
use crate::profile::Evidence;
use anyhow::{Result, ensure};
use std::collections::BTreeSet;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{
    DensePlacement, LayerPlacement, PerTier, Pins, Placement, Prediction, TierIdx,
};
use tier_plan_runtime::model::shape::{DenseKind, DenseShape, ExpertShape, ModelShape};

/// Expression for llama.cpp's expert tensors of a layer, after `blk.N`.
const EXPERTS: &str = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU";

/// A llama.cpp command line and its consequences.
#[derive(Debug, Clone, PartialEq)]
pub struct CommandLine {
    /// Arguments after the program's name and its model, unquoted.
    pub args: Vec<String>,
    /// Layers at the end of the model whose dense tensors are on the GPU, plus one for the head.
    pub gpu_layers: u32,
    /// Layers whose experts are on the GPU.
    pub expert_layers: BTreeSet<u32>,
    /// Bytes of weights and KV cache in VRAM.
    pub vram_bytes: u64,
    /// The plan's VRAM budget in bytes.
    pub vram_budget_bytes: u64,
    /// Prediction for this placement. `None` where weights are in neither VRAM nor main memory,
    /// since then the system's page cache decides.
    pub predicted: Option<Prediction>,
    /// Remarks for the reader, as sentences.
    pub notes: Vec<String>,
}

/// Translates a plan.
///
/// # Errors
/// When the plan does not fit the model and profile.
pub fn command_line(
    plan: &Placement,
    shape: &ModelShape,
    evidence: &Evidence,
) -> Result<CommandLine> {
    let wrong = crate::solve::verify::verify(plan, shape, evidence);
    ensure!(
        wrong.is_empty(),
        "the plan '{}' does not hold for this model and profile: {}; give those that it was made from",
        plan.name,
        wrong.join("; ")
    );
    let mut offload = Offload::new(plan, shape);
    offload.take_dense_layers();
    offload.take_experts(evidence);

    let same = offload.as_plan(evidence);
    if same.is_none() {
        offload.notes.push(
            "the weights do not fit VRAM and main memory together: llama.cpp maps the file and the system's page cache \
             decides what stays, which the cost model does not know, so no speed is predicted"
                .to_string(),
        );
    }
    if !plan.host_kv.is_empty() && !offload.keeps_kv_on_host() {
        offload.notes.push(format!(
            "the plan keeps the KV cache of {} layers off the GPUs that have their attention; llama.cpp does so for all layers \
             or none, so it is in VRAM",
            plan.host_kv.len()
        ));
    }
    if plan.streaming.is_some() {
        let note = "llama.cpp has nothing like the plan's streamed experts, which a GPU computes beside the CPU";
        offload.notes.push(note.to_string());
    }
    if plan.layers.iter().any(|l| l.slots > 0) {
        let note =
            "llama.cpp has nothing like the plan's slots, which keep experts that were used last";
        offload.notes.push(note.to_string());
    }
    let budget: u64 = offload
        .gpus
        .iter()
        .map(|&g| plan.tiers[g].budget_bytes)
        .sum();
    Ok(CommandLine {
        args: offload.args(),
        gpu_layers: offload.gpu_layers(),
        vram_bytes: budget - offload.free.iter().sum::<u64>(),
        vram_budget_bytes: budget,
        predicted: same.map(|same| predict(&same, shape, evidence)),
        expert_layers: offload.expert_layers,
        notes: offload.notes,
    })
}

/// What goes to the GPUs, layer by layer from the end of the model.
struct Offload<'a> {
    plan: &'a Placement,
    shape: &'a ModelShape,
    /// The plan's GPUs in llama.cpp's order.
    gpus: Vec<TierIdx>,
    /// Bytes left of each GPU's budget.
    free: Vec<u64>,
    /// Layers whose dense tensors each GPU has.
    layers: Vec<u32>,
    /// Whether the head is on the last GPU.
    head: bool,
    expert_layers: BTreeSet<u32>,
    notes: Vec<String>,
}

impl<'a> Offload<'a> {
    fn new(plan: &'a Placement, shape: &'a ModelShape) -> Self {
        let gpus = gpus(plan);
        Self {
            free: gpus.iter().map(|&g| plan.tiers[g].budget_bytes).collect(),
            layers: vec![0; gpus.len()],
            head: false,
            expert_layers: BTreeSet::new(),
            notes: Vec::new(),
            plan,
            shape,
            gpus,
        }
    }

    /// Layers whose dense tensors are on any GPU.
    fn dense_layers(&self) -> u32 {
        self.layers.iter().sum()
    }

    /// llama.cpp counts the head as one more layer.
    fn gpu_layers(&self) -> u32 {
        self.dense_layers() + u32::from(self.head)
    }

    /// The first layer that is on a GPU.
    fn first_layer(&self) -> u32 {
        self.shape.n_layer - self.dense_layers()
    }

    /// Returns the index of the GPU that has a layer's dense tensors.
    fn gpu_of(&self, layer: u32) -> Option<usize> {
        let mut end = self.first_layer();
        self.layers.iter().position(|count| {
            end += count;
            (self.first_layer()..end).contains(&layer)
        })
    }

    fn is_on_gpu(&self, kind: DenseKind, layer: Option<u32>) -> bool {
        self.plan
            .dense
            .iter()
            .any(|d| (d.kind, d.layer) == (kind, layer) && self.gpus.contains(&d.tier))
    }

    /// Whether the plan has attention on GPUs, but all of the KV cache in main memory.
    fn keeps_kv_on_host(&self) -> bool {
        let is_attention = |d: &&DensePlacement| d.kind == DenseKind::Attention;
        let mut on_gpus = self.plan.dense.iter().filter(is_attention);
        let on_host = |d: &DensePlacement| {
            !self.gpus.contains(&d.tier) || d.layer.is_some_and(|l| self.plan.has_host_kv(l))
        };
        !self.plan.host_kv.is_empty() && on_gpus.all(on_host)
    }

    /// Returns the bytes of a layer's dense tensors and its KV cache, which llama.cpp keeps
    /// together unless no layer has its cache on a GPU.
    fn layer_bytes(&self, layer: u32) -> u64 {
        let dense = self.shape.dense.iter().filter(|d| d.layer == Some(layer));
        let cache = self.shape.caches.get(layer as usize);
        let cache = cache.filter(|_| !self.keeps_kv_on_host());
        dense.map(|d| d.bytes).sum::<u64>()
            + cache.map_or(0, |c| c.bytes(self.plan.kv_type, self.plan.room()))
    }

    /// Takes as many layers as the plan has attention on GPUs, in proportion to the budgets, and
    /// the head if it fits.
    fn take_dense_layers(&mut self) {
        let wanted = (0..self.shape.n_layer)
            .filter(|l| self.is_on_gpu(DenseKind::Attention, Some(*l)))
            .count() as u32;
        let is_head = |d: &&DenseShape| d.layer.is_none() && d.kind == DenseKind::Head;
        let head_bytes: u64 = self
            .shape
            .dense
            .iter()
            .filter(is_head)
            .map(|d| d.bytes)
            .sum();
        // The head is on the last GPU.
        let head_fits = wanted == self.shape.n_layer
            && self.is_on_gpu(DenseKind::Head, None)
            && self
                .free
                .last_mut()
                .is_some_and(|free| take(free, head_bytes));
        for at in (0..self.gpus.len()).rev() {
            let budget = |gpu: &TierIdx| self.plan.tiers[*gpu].budget_bytes;
            let up_to: u64 = self.gpus[..=at].iter().map(budget).sum();
            let share = budget(&self.gpus[at]) as f64 / up_to.max(1) as f64;
            let part = (f64::from(wanted - self.dense_layers()) * share).round() as u32;
            while self.layers[at] < part {
                let bytes = self.layer_bytes(self.first_layer() - 1);
                if !take(&mut self.free[at], bytes) {
                    break;
                }
                self.layers[at] += 1;
            }
        }
        self.head = head_fits && self.dense_layers() == self.shape.n_layer;
        if let (true, false, Some(last)) = (head_fits, self.head, self.free.last_mut()) {
            *last += head_bytes;
        }
        if self.dense_layers() < wanted {
            let cache = if self.keeps_kv_on_host() {
                ""
            } else {
                " and the cache"
            };
            self.notes.push(format!(
                "the plan has the attention of {wanted} layers in VRAM; llama.cpp puts all dense tensors{cache} of a layer \
                 together, and {} fit",
                self.dense_layers()
            ));
        }
    }

    /// Takes the experts of the layers that the plan uses the GPU most for, as many as fit.
    fn take_experts(&mut self, evidence: &Evidence) {
        let shares = gpu_shares(self.plan, evidence, &self.gpus);
        let mut order: Vec<(&ExpertShape, f64)> = self
            .shape
            .experts
            .iter()
            .zip(shares)
            .filter(|(e, _)| self.gpu_of(e.layer).is_some())
            .collect();
        order.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.layer.cmp(&a.0.layer)));
        let mut beyond = 0;
        for (experts, share) in order {
            let bytes = experts.expert_bytes * u64::from(experts.n_expert);
            if self
                .gpu_of(experts.layer)
                .is_some_and(|at| take(&mut self.free[at], bytes))
            {
                self.expert_layers.insert(experts.layer);
                beyond += u32::from(share <= 0.5);
            }
        }
        if beyond > 0 {
            self.notes.push(format!(
                "{beyond} layers have all experts in VRAM although the plan serves less than half of their accesses \
                 there: so the same bytes are used"
            ));
        }
    }

    fn args(&self) -> Vec<String> {
        let mut args = args(
            (self.plan, self.keeps_kv_on_host()),
            self.shape,
            self.gpu_layers(),
            self.first_layer(),
            &self.expert_layers,
        );
        if self.gpus.len() > 1 && self.dense_layers() > 0 {
            // Layers per GPU; the head counts as one.
            let last = self.layers.len() - 1;
            let counts = self.layers.iter().enumerate();
            let counts = counts.map(|(at, n)| (n + u32::from(at == last && self.head)).to_string());
            args.extend([
                "--tensor-split".into(),
                counts.collect::<Vec<_>>().join(","),
            ]);
        }
        args
    }

    /// Expresses the offloaded layers as a plan over the same tiers, for a prediction.
    fn as_plan(&self, evidence: &Evidence) -> Option<Placement> {
        let tier_of = |layer: u32| self.gpu_of(layer).map(|at| self.gpus[at]);
        let head_tier = self.gpus.last().copied().filter(|_| self.head);
        let mut same = same_placement(
            self.plan,
            self.shape,
            evidence,
            tier_of,
            head_tier,
            &self.expert_layers,
        )?;
        if self.keeps_kv_on_host() {
            // These need not be the layers that the plan has on GPUs.
            let on_gpus = (0..self.shape.n_layer).filter(|l| tier_of(*l).is_some());
            same.host_kv = on_gpus.collect();
        }
        Some(same)
    }
}

/// Returns how much slower a prediction is than the plan's, as a share of the plan's speed.
pub fn loss(plan: &Placement, predicted: &Prediction) -> f64 {
    let (planned, other) = (token_s(&plan.predicted), token_s(predicted));
    if other > 0.0 {
        1.0 - planned / other
    } else {
        0.0
    }
}

/// Takes `bytes` from `left` and returns whether there was enough.
fn take(left: &mut u64, bytes: u64) -> bool {
    let after = left.checked_sub(bytes);
    *left = after.unwrap_or(*left);
    after.is_some()
}

/// Returns the plan's GPUs in llama.cpp's order.
fn gpus(plan: &Placement) -> Vec<TierIdx> {
    let all = plan
        .tiers
        .enumerate()
        .filter(|(_, t)| t.tier.kind == TierKind::Vram);
    let mut numbered: Vec<(u32, TierIdx)> = all
        .enumerate()
        .map(|(at, (tier, t))| (t.tier.device().unwrap_or(at as u32), tier))
        .collect();
    numbered.sort_unstable();
    numbered.into_iter().map(|(_, tier)| tier).collect()
}

/// Returns the share of each layer's expert accesses that compute in VRAM.
fn gpu_shares(plan: &Placement, evidence: &Evidence, gpus: &[TierIdx]) -> Vec<f64> {
    let tiers: PerTier<Tier> = plan.tiers.iter().map(|t| t.tier.clone()).collect();
    let of = |(layer, evidence): (&LayerPlacement, _)| {
        let evidence: &crate::profile::LayerEvidence = evidence;
        let found = outcomes(layer, evidence, &tiers, plan.staging_tier);
        let on_gpus = |experts: &[u16]| {
            gpus.iter()
                .map(|&gpu| f64::from(experts[gpu.get()]))
                .sum::<f64>()
        };
        let here: f64 = found
            .iter()
            .map(|(experts, share)| share * on_gpus(experts))
            .sum();
        here / f64::from(evidence.shape.n_used.max(1))
    };
    plan.layers.iter().zip(&evidence.layers).map(of).collect()
}

fn args(
    (plan, keeps_kv_on_host): (&Placement, bool),
    shape: &ModelShape,
    gpu_layers: u32,
    first_gpu: u32,
    expert_layers: &BTreeSet<u32>,
) -> Vec<String> {
    // There the context is that of all texts together.
    let texts = u64::from(plan.sequences);
    let context = texts.saturating_mul(plan.context.into());
    let mut args: Vec<String> = vec!["-c".into(), context.to_string()];
    if texts > 1 {
        args.extend(["-np".into(), texts.to_string()]);
    }
    // llama.cpp must not adjust these values by itself.
    args.extend([
        "-fit".into(),
        "off".into(),
        "-ngl".into(),
        gpu_layers.to_string(),
    ]);
    let on_cpu: Vec<u32> = shape
        .experts
        .iter()
        .map(|e| e.layer)
        .filter(|l| *l >= first_gpu && !expert_layers.contains(l))
        .collect();
    // llama.cpp counts layers from the first, including those without experts.
    let first_on_gpu = expert_layers.first().copied();
    let prefix = on_cpu
        .iter()
        .all(|l| first_on_gpu.is_none_or(|gpu| *l < gpu));
    match on_cpu.last() {
        None => {}
        Some(_) if expert_layers.is_empty() => args.push("--cpu-moe".into()),
        Some(last) if prefix => args.extend(["--n-cpu-moe".into(), (last + 1).to_string()]),
        Some(_) => {
            let layers: Vec<String> = on_cpu.iter().map(u32::to_string).collect();
            args.extend([
                "-ot".into(),
                format!(r"blk\.({}){EXPERTS}", layers.join("|")),
            ]);
        }
    }
    if keeps_kv_on_host {
        args.push("--no-kv-offload".into());
    }
    match plan.kv_type {
        KvType::F16 => {}
        // A quantized V cache requires flash attention.
        KvType::Q8_0 => {
            args.extend(["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"].map(String::from))
        }
        KvType::F32 => args.extend(["-ctk", "f32", "-ctv", "f32"].map(String::from)),
    }
    args
}

/// Expresses this placement as a plan over the same tiers. `None` where something remains for the
/// slow tier.
fn same_placement(
    plan: &Placement,
    shape: &ModelShape,
    evidence: &Evidence,
    tier_of: impl Fn(u32) -> Option<TierIdx>,
    head_tier: Option<TierIdx>,
    expert_layers: &BTreeSet<u32>,
) -> Option<Placement> {
    let dram = plan.tiers.position(|t| t.tier.kind == TierKind::Dram)?;
    let mut left = plan.tiers[dram].budget_bytes;
    let mut same = Placement {
        streaming: None,
        host_kv: Vec::new(),
        ..plan.clone()
    };
    // The KV cache is with its layer's attention; on emulated tiers it is where the plan has it.
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
            let bytes = shape
                .dense
                .iter()
                .filter(|d| (d.kind, d.layer) == (dense.kind, dense.layer))
                .map(|d| d.bytes);
            left = left.checked_sub(bytes.sum())?;
        }
    }
    for (layer, of) in same.layers.iter_mut().zip(&evidence.layers) {
        let tier = tier_of(layer.layer)
            .filter(|_| expert_layers.contains(&layer.layer))
            .unwrap_or(dram);
        layer.slots = 0;
        layer.pinned = vec![Pins {
            tier,
            experts: (0..of.shape.n_expert).collect(),
        }];
        if tier == dram {
            left = left.checked_sub(of.shape.expert_bytes * u64::from(of.shape.n_expert))?;
        }
    }
    Some(same)
}

/// Parses the layers out of an expression of [`CommandLine::args`] that keeps experts on the CPU.
/// `None` for any other expression.
pub fn layers_of(expression: &str) -> Option<Vec<u32>> {
    let list = expression
        .strip_prefix(r"blk\.(")?
        .strip_suffix(EXPERTS)?
        .strip_suffix(')')?;
    list.split('|').map(|layer| layer.parse().ok()).collect()
}

/// Quotes an argument for a shell.
pub fn quoted(arg: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) {
        arg.to_string()
    } else {
        format!("'{}'", arg.replace('\'', r"'\''"))
    }
}
