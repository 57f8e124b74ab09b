//! A plan within a memory budget, made without a solver: the default for a model that is larger
//! than memory.
//!
//! The budget is for all memory of the process. Dense tensors, the KV cache, staging, and
//! activations come first. What is left becomes slots, the same number in every layer, as nothing
//! is known of how the experts are used. The backing copy of every expert is in the file, which
//! counts as a block device.

use super::in_memory::in_memory_with;
use crate::experts::layer::{LayerExperts, Layout};
use crate::options::{DEFAULT_BATCH, MAX_MICRO_BATCH};
use crate::tiers::file::FileTier;
use thiserror::Error;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::machine::{Accelerator, NOT_MEASURED, Tier, TierKind};
use tier_plan_formats::model::kv::{CacheRoom, KvType};
use tier_plan_formats::model::shape::{DenseKind, ModelShape};
use tier_plan_formats::model::spec::{Ffn, LayerSpec, Mixer, ModelSpec, MoeSpec, Selection};
use tier_plan_formats::placement::{PerTier, Placement, PlanTier, TierIdx};
use tier_plan_formats::units::show_bytes;

/// Memory of the program, its threads, and its allocator: 9 MiB were measured as resident memory
/// beyond all that is counted, the rest is margin.
const PROGRAM_BYTES: u64 = 16 << 20;

/// Memory of an open file and its tokenizer, in bytes per byte of its header: 15 to 16 were
/// measured on vocabularies of 49 to 152 thousand tokens.
const MEMORY_PER_HEADER_BYTE: u64 = 17;

/// Fraction (1/n) of a budget that stays free for what can't be counted: page tables, kernel
/// buffers, fragmentation.
const SPARE_FRACTION: u64 = 64;

/// Most staging buffers beyond the experts that one token uses.
const MAX_EXTRA_STAGING: u32 = 8;

/// Fewest tokens per batch, however small the budget.
const MIN_BATCH: usize = 32;

/// One line of a budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// What the memory is for: `dense weights`.
    pub purpose: String,
    /// Bytes of memory.
    pub bytes: u64,
}

/// A plan within a budget, and what the budget is spent on.
#[derive(Debug, Clone)]
pub struct Budgeted {
    /// Plan over memory and file.
    pub plan: Placement,
    /// Most tokens per batch for which the budget has activations.
    pub batch: usize,
    /// What the budget is spent on. The lines add up to at most the budget.
    pub lines: Vec<Line>,
}

/// A memory budget that is too small for a model.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "'{model}' needs at least {} of memory, {} available: {needs}",
    show_bytes(*least_bytes), show_bytes(*budget_bytes)
)]
pub struct TooSmall {
    /// Name of the model.
    pub model: String,
    /// Bytes of the budget.
    pub budget_bytes: u64,
    /// The smallest sufficient budget.
    pub least_bytes: u64,
    /// Purposes of the memory with their bytes, formatted.
    pub needs: String,
}

/// Memory that every plan of a model takes beside the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedMemory {
    /// Program, open file, and tokenizer.
    pub program_bytes: u64,
    /// Activations of a batch.
    pub activation_bytes: u64,
    /// KV cache and recurrent state.
    pub context_bytes: u64,
    /// Most tokens per batch.
    pub batch: usize,
}

impl FixedMemory {
    /// Returns the memory of a model within `budget` bytes, with the largest batch whose
    /// activations take at most a 32nd of the budget.
    pub fn new(
        gguf: &Gguf,
        spec: &ModelSpec,
        shape: &ModelShape,
        room: CacheRoom,
        kv_type: KvType,
        budget: u64,
    ) -> Self {
        let header = gguf
            .tensors()
            .iter()
            .filter(|t| t.part == 0)
            .map(|t| t.offset)
            .min()
            .unwrap_or(0);
        let most = usize::try_from(room.positions()).unwrap_or(usize::MAX);
        let mut batch = DEFAULT_BATCH.min(most.max(1));
        while batch > MIN_BATCH && activation_bytes(gguf, spec, room, batch) > budget / 32 {
            batch = (batch / 2).max(MIN_BATCH);
        }
        Self {
            program_bytes: PROGRAM_BYTES
                + FileTier::working_bytes()
                + header.saturating_mul(MEMORY_PER_HEADER_BYTE),
            activation_bytes: activation_bytes(gguf, spec, room, batch),
            context_bytes: kv_type.cache_bytes(shape, room),
            batch,
        }
    }

    /// Returns the sum, including the part of `budget` that stays free.
    pub fn bytes(&self, budget: u64) -> u64 {
        self.outside_bytes(budget)
            .saturating_add(self.context_bytes)
    }

    /// Returns the memory that no plan counts, including the part of `budget` that stays free.
    pub fn outside_bytes(&self, budget: u64) -> u64 {
        self.program_bytes
            .saturating_add(self.activation_bytes)
            .saturating_add(budget / SPARE_FRACTION)
    }
}

/// Returns an upper bound on the activations of a pass of `batch` tokens: the hidden states between
/// layers, and for a micro-batch the widest rows of each kind of layer, with their 8-bit quantized
/// forms.
fn activation_bytes(gguf: &Gguf, spec: &ModelSpec, room: CacheRoom, batch: usize) -> u64 {
    // A value and its 8-bit form with scales take 5.25 bytes.
    const WITH_QUANTS: u64 = 6;
    let rows = |id: &usize| gguf.tensors()[*id].dims.iter().skip(1).product::<u64>();
    let (mut mixer, mut ffn, mut n_expert, mut n_used) = (0, 0, 0, 0);
    for layer in &spec.layers {
        let matrices = layer.mixer.tensors().matrices;
        // Each result exists a second time while it is transformed, and is quantized once for its
        // reader.
        mixer = mixer.max(
            matrices
                .iter()
                .map(rows)
                .sum::<u64>()
                .saturating_mul(8 + WITH_QUANTS),
        );
        match &layer.ffn {
            Ffn::Dense(f) => ffn = ffn.max(f.up.n_out),
            Ffn::Moe(m) => {
                ffn = ffn
                    .max(m.expert_ffn)
                    .max(m.shared.map_or(0, |shared| shared.ffn.up.n_out));
                n_expert = n_expert.max(m.n_expert);
                n_used = n_used.max(m.n_used);
            }
            Ffn::None => {}
        }
    }
    let choices = chosen_bytes(spec, room, batch).saturating_add(window_bytes(spec));
    let (hidden, ffn, n_expert, n_used) = (
        spec.hidden as u64,
        ffn as u64,
        n_expert as u64,
        n_used as u64,
    );
    // The router's choices are stored a second time in the lists of each expert's tokens.
    // Inputs of tokens exist for all layers, and as results of a product.
    let inputs = spec.token_inputs.map_or(0, |own| own.proj.n_out as u64);
    let apart = spec.layers.iter().any(LayerSpec::sums_experts_apart);
    let shared = if apart { 4 * hidden } else { 0 };
    let kept =
        hidden * (2 * 4 + WITH_QUANTS) + n_used * (2 + 4 + 16) + shared + inputs.saturating_mul(4);
    let row = hidden * (3 * 4 + 3 * WITH_QUANTS)
        + ffn * (2 * 4 + WITH_QUANTS)
        + n_expert * 4
        + mixer
        + inputs.saturating_mul(4 + WITH_QUANTS);
    let (kept_streams, row_streams) = stream_bytes(spec, WITH_QUANTS);
    let (kept, row) = (kept + kept_streams, row + row_streams);
    // Logits with the sampler's copies, per further text its logits and its sampler's buffer, and
    // attention scores of one query on each thread.
    let further = u64::from(room.sequences.saturating_sub(1));
    let once = (spec.n_vocab as u64)
        .saturating_mul(further.saturating_mul(12).saturating_add(24))
        .saturating_add(u64::from(room.context) * 64);
    let micro = row.saturating_mul(batch.min(MAX_MICRO_BATCH) as u64);
    kept.saturating_mul(batch as u64)
        .saturating_add(micro)
        .saturating_add(once)
        .saturating_add(choices)
}

/// Returns the bytes per token that several residual streams take between layers, and within one:
/// normed streams with their 8-bit forms of `with_quants` bytes, gates, and what n-grams add.
fn stream_bytes(spec: &ModelSpec, with_quants: u64) -> (u64, u64) {
    if spec.streams.is_none() {
        return (0, 0);
    }
    let (hidden, all) = (spec.hidden as u64, spec.residual_width() as u64);
    let ngrams = if spec.ngrams.is_some() {
        3 * 4 * all
    } else {
        0
    };
    (4 * all + 4 * hidden, all * (2 * 4 + with_quants) + ngrams)
}

/// Returns the bytes of a window's vectors before a batch, beside those of its tokens.
fn window_bytes(spec: &ModelSpec) -> u64 {
    let values = |layer: &LayerSpec| match &layer.mixer {
        Mixer::Compressed(a) => a.window_values() as u64,
        _ => 0,
    };
    4 * spec.layers.iter().map(values).max().unwrap_or(0)
}

/// Returns the bytes of ratings and choices of lightning indexers in a pass of `batch` tokens. Texts
/// that are not longer than a token's choice have none.
fn chosen_bytes(spec: &ModelSpec, room: CacheRoom, batch: usize) -> u64 {
    let selection = |layer: &LayerSpec| match &layer.mixer {
        Mixer::Mla(a) => a.reach.selection(),
        _ => None,
    };
    let chooses = |chosen: &Selection| (chosen.n_dense() as u64) < u64::from(room.context);
    let selections = spec.layers.iter().filter_map(selection).filter(chooses);
    // Positions of a token, and the blocks that they are of.
    let values = |chosen: Selection| {
        let most = |n: usize| (n as u64).min(room.context.into());
        let blocks = if chosen.block > 1 { chosen.blocks } else { 0 };
        most(chosen.most()) + most(blocks)
    };
    let Some(most) = selections.map(values).max() else {
        return 0;
    };
    // Each thread ranks the positions of one token; of several threads, most wait for memory.
    most.saturating_mul(4 * batch as u64)
        .saturating_add(crate::layers::indexer::RATING_BYTES)
        .saturating_add(u64::from(room.context).saturating_mul(64))
}

/// Returns the bytes of one expert's buffer in each layer with routed experts, `[n_moe_layers]`,
/// with room for whole pages.
pub fn buffer_bytes(gguf: &Gguf, spec: &ModelSpec) -> Vec<u64> {
    let bytes =
        |moe: &MoeSpec| LayerExperts::all_pooled(gguf, moe).buffer_bytes(Layout::WholePages) as u64;
    spec.moe_layers().map(|(_, moe)| bytes(moe)).collect()
}

/// Returns a plan under which the process takes at most `budget` bytes of memory.
///
/// # Errors
/// When the experts of one token don't fit beside what every plan needs. For a model without routed
/// experts: when its weights don't fit.
pub fn within(
    gguf: &Gguf,
    spec: &ModelSpec,
    shape: &ModelShape,
    room: CacheRoom,
    kv_type: KvType,
    budget: u64,
) -> Result<Budgeted, TooSmall> {
    let mut fixed = FixedMemory::new(gguf, spec, shape, room, kv_type, budget);
    let rooms = buffer_bytes(gguf, spec);
    let largest = rooms.iter().copied().max().unwrap_or(0);
    // A table of n-grams is too large for memory, and a token reads a few rows of it.
    let in_file = |kind: DenseKind| kind == DenseKind::TokenTable && spec.ngrams.is_some();
    let dense = shape.dense.iter().filter(|d| !in_file(d.kind));
    let dense: u64 = dense.map(|d| d.bytes).sum();
    let used = shape.experts.iter().map(|e| e.n_used).max().unwrap_or(0);
    let most = shape.experts.iter().map(|e| e.n_expert).max().unwrap_or(0);
    let experts = u64::from(used).saturating_mul(largest);
    let needed = |fixed: &FixedMemory| fixed.bytes(budget).saturating_add(dense);
    while needed(&fixed).saturating_add(experts) > budget && fixed.batch > MIN_BATCH {
        fixed.batch = (fixed.batch / 2).max(MIN_BATCH);
        fixed.activation_bytes = activation_bytes(gguf, spec, room, fixed.batch);
    }
    let needed = needed(&fixed);
    let least = needed.saturating_add(experts);
    let Some(mut left) = budget.checked_sub(least) else {
        // The part that stays free grows with the budget.
        let least_bytes = (least - budget / SPARE_FRACTION).saturating_mul(SPARE_FRACTION)
            / (SPARE_FRACTION - 1)
            + SPARE_FRACTION;
        let needs = format!(
            "the program and its buffers take {}, {} of context {}, dense weights {}, and the {used} experts of \
             a token {}",
            show_bytes(fixed.program_bytes + fixed.activation_bytes),
            tokens(room),
            show_bytes(fixed.context_bytes),
            show_bytes(dense),
            show_bytes(least - needed),
        );
        return Err(TooSmall {
            model: shape.id.name.clone(),
            budget_bytes: budget,
            least_bytes,
            needs,
        });
    };
    let mut staging = used;
    while staging < (used + MAX_EXTRA_STAGING).min(most) && largest <= left / 16 {
        staging += 1;
        left -= largest;
    }
    let limits: Vec<(u32, u32)> = shape
        .experts
        .iter()
        .map(|e| (e.n_used, e.n_expert))
        .collect();
    let slots = spread(&rooms, &limits, left);
    let mut plan = two_tiers(shape, room, kv_type, budget - fixed.outside_bytes(budget));
    let home = plan.home_tier();
    for group in plan.dense.iter_mut().filter(|d| in_file(d.kind)) {
        group.tier = home;
    }
    for (layer, slots) in plan.layers.iter_mut().zip(&slots) {
        layer.slots = *slots;
    }
    plan.staging_experts = staging;
    plan.fill_sums(shape);
    let lines = lines(&plan, &rooms, &fixed, budget);
    Ok(Budgeted {
        plan,
        batch: fixed.batch,
        lines,
    })
}

/// Returns what a budget is spent on, for a plan over memory and the file. `rooms` are
/// [`buffer_bytes`] of the layers.
pub fn lines(plan: &Placement, rooms: &[u64], fixed: &FixedMemory, budget: u64) -> Vec<Line> {
    let slots: u64 = plan.layers.iter().map(|l| u64::from(l.slots)).sum();
    let in_slots: u64 = plan
        .layers
        .iter()
        .zip(rooms)
        .map(|(l, room)| u64::from(l.slots) * room)
        .sum();
    let staged = u64::from(plan.staging_experts) * rooms.iter().copied().max().unwrap_or(0);
    let pinned: usize = plan
        .layers
        .iter()
        .flat_map(|l| &l.pinned)
        .map(|pins| pins.experts.len())
        .sum();
    let line = |purpose: String, bytes: u64| Line { purpose, bytes };
    let mut lines = vec![
        line(
            "program, open file and tokenizer".to_string(),
            fixed.program_bytes,
        ),
        line(
            format!("activations of {} tokens", fixed.batch),
            fixed.activation_bytes,
        ),
        line(
            format!("keys and values of {}", tokens(plan.room())),
            fixed.context_bytes,
        ),
        line(
            "dense weights".to_string(),
            plan.tiers[TierIdx::FIRST].bytes.dense,
        ),
        line(
            format!("{} experts in flight", plan.staging_experts),
            staged,
        ),
    ];
    if pinned > 0 {
        lines.push(line(
            format!("{pinned} pinned experts"),
            plan.tiers[TierIdx::FIRST].bytes.pinned,
        ));
    }
    lines.push(line(
        format!("{slots} slots in {} layers", plan.layers.len()),
        in_slots,
    ));
    lines.push(line("kept free".to_string(), budget / SPARE_FRACTION));
    lines
}

/// Returns what a KV cache has room for, in words: `8 × 4096 tokens`.
fn tokens(room: CacheRoom) -> String {
    match room.sequences {
        1 => format!("{} tokens", room.context),
        n => format!("{n} × {} tokens", room.context),
    }
}

/// Returns slots per layer, as evenly as `left` bytes allow. A layer gets no slots, or at least as
/// many as a token uses experts, and at most as many as it has experts; `limits` are these two
/// numbers.
fn spread(rooms: &[u64], limits: &[(u32, u32)], mut left: u64) -> Vec<u32> {
    let mut slots = vec![0; rooms.len()];
    let mut open: Vec<usize> = (0..rooms.len()).collect();
    while !open.is_empty() {
        open.retain(|&layer| {
            let (used, most) = limits[layer];
            let more = if slots[layer] == 0 { used.min(most) } else { 1 };
            let cost = u64::from(more).saturating_mul(rooms[layer]);
            let fits = more > 0 && slots[layer] + more <= most && cost <= left;
            if fits {
                slots[layer] += more;
                left -= cost;
            }
            fits
        });
    }
    slots
}

/// Returns a plan over `bytes` of memory and the file, with only the dense weights in memory yet.
fn two_tiers(shape: &ModelShape, room: CacheRoom, kv_type: KvType, bytes: u64) -> Placement {
    let mut plan = in_memory_with(shape, room, kv_type);
    let file_bytes = plan.tiers[TierIdx::FIRST].bytes.home;
    let [dram, file] = machine_tiers(bytes, file_bytes);
    plan.name = "within-budget".into();
    plan.solver.status = "made to fit".into();
    plan.tiers = PerTier::from([PlanTier::new(dram, bytes), PlanTier::new(file, file_bytes)]);
    plan.fill_sums(shape);
    plan
}

/// Returns a tier of memory and the model's file as a block device. Their rates are no
/// measurements; they only order the two tiers.
pub fn machine_tiers(dram_bytes: u64, file_bytes: u64) -> [Tier; 2] {
    let tier = |name: &str, kind, capacity_bytes, read_gbps, latency_us| Tier {
        name: name.into(),
        kind,
        capacity_bytes,
        read_gbps,
        latency_us,
        emulated: false,
        unit: None,
        accelerator: Accelerator::default(),
        source: NOT_MEASURED.into(),
    };
    [
        tier("dram", TierKind::Dram, dram_bytes, 20.0, 0.0),
        tier("file", TierKind::Nvme, file_bytes, 1.0, 100.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;
    use tier_plan_formats::model::describe;
    use tier_plan_formats::model::shape::shape_of;

    proptest! {
        #[test]
        fn slots_fill_the_rest_of_the_budget(
            layers in proptest::collection::vec((1u64..50, 0u32..6, 0u32..20), 0..6),
            left in 0u64..5000,
        ) {
            let rooms: Vec<u64> = layers.iter().map(|l| l.0).collect();
            let limits: Vec<(u32, u32)> = layers.iter().map(|l| (l.1, l.2.max(l.1))).collect();
            let slots = spread(&rooms, &limits, left);
            let bytes: u64 = slots.iter().zip(&rooms).map(|(n, room)| u64::from(*n) * room).sum();
            prop_assert!(bytes <= left);
            for (layer, n) in slots.iter().enumerate() {
                let (used, most) = limits[layer];
                prop_assert!(*n == 0 || (used..=most).contains(n));
                let next = if *n == 0 { used } else { 1 };
                prop_assert!(next == 0 || n + next > most || left - bytes < u64::from(next) * rooms[layer]);
            }
        }
    }

    #[test]
    fn the_lines_add_up_to_the_budget() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../profiles/demo/demo.gguf");
        let gguf = Gguf::open(&path).unwrap();
        let spec = describe(&gguf).unwrap();
        let shape = shape_of(&gguf, &spec);
        let at = |budget, room| within(&gguf, &spec, &shape, room, KvType::F16, budget);
        for texts in [1, 5] {
            let room = CacheRoom {
                sequences: texts,
                ..CacheRoom::of_one(64)
            };
            adds_up(&shape, room, |budget| at(budget, room));
        }
    }

    fn adds_up(
        shape: &ModelShape,
        room: CacheRoom,
        at: impl Fn(u64) -> Result<Budgeted, TooSmall>,
    ) {
        let TooSmall { least_bytes, .. } = at(1 << 20).unwrap_err();
        let least = at(least_bytes).unwrap();
        assert!(at(least_bytes - 4096).is_err());
        assert_eq!(least.plan.room(), room.for_model(shape));
        let cache = KvType::F16.cache_bytes(shape, room);
        assert_eq!(least.plan.tiers[TierIdx::FIRST].bytes.kv, cache);
        assert!(least.plan.layers.iter().all(|l| l.slots == 0));
        for more in [0, 1 << 20, 3 << 20] {
            let budget = least_bytes + more;
            let Budgeted { plan, lines, .. } = at(budget).unwrap();
            let sum: u64 = lines.iter().map(|line| line.bytes).sum();
            assert!(sum <= budget, "{sum} of {budget}: {lines:?}");
            let [dram, file] = plan.tiers.as_slice() else {
                panic!("{:?}", plan.tiers)
            };
            assert!(
                dram.used_bytes() <= dram.budget_bytes && file.used_bytes() == file.budget_bytes
            );
            assert_eq!(
                plan.layers.iter().any(|l| l.slots > 0),
                more > 0,
                "{lines:?}"
            );
        }
    }
}
