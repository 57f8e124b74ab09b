//! Default plans that need no solver: everything in main memory, in place in the mapped file;
//! everything on one GPU; or the dense parts on a GPU and the routed experts in main memory.

use tier_plan_formats::machine::{Accelerator, Tier, TierKind};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::placement::{
    DensePlacement, LayerPlacement, Placement, PlanTier, Prediction, SlotPolicy, SolverReport,
};
use tier_plan_formats::source_id::SourceId;

/// Returns a plan with one tier, `dram`, that holds the whole model where the system maps the file.
///
/// ```
/// use tier_plan_runtime::KvType;
/// use tier_plan_runtime::model::Model;
/// use tier_plan_runtime::plans::in_memory::all_in_memory;
///
/// let model = Model::open("../profiles/demo/demo.gguf".as_ref())?;
/// let plan = all_in_memory(model.shape(), 4096, KvType::F16);
/// assert_eq!(plan.tiers.len(), 1);
/// assert_eq!(plan.tiers[0].used_bytes(), plan.tiers[0].budget_bytes);
/// # Ok::<(), tier_plan_runtime::model::ModelError>(())
/// ```
pub fn all_in_memory(shape: &ModelShape, context: u32, kv_type: KvType) -> Placement {
    let home_bytes = shape.experts.iter().map(|e| e.expert_bytes * u64::from(e.n_expert)).sum();
    let mut tier = PlanTier {
        tier: Tier {
            name: "dram".into(),
            kind: TierKind::Dram,
            capacity_bytes: u64::MAX,
            read_gbps: 1.0,
            latency_us: 0.0,
            emulated: false,
            unit: None,
            accelerator: Accelerator::default(),
            source: "not measured".into(),
        },
        budget_bytes: u64::MAX,
        dense_bytes: shape.dense.iter().map(|d| d.bytes).sum(),
        pinned_bytes: 0,
        slot_bytes: 0,
        kv_bytes: kv_type.context_bytes(shape, context),
        staging_bytes: 0,
        home_bytes,
    };
    tier.budget_bytes = tier.used_bytes();
    tier.tier.capacity_bytes = tier.budget_bytes;
    Placement {
        name: "all-in-dram".into(),
        model: shape.id.clone(),
        profile: None,
        machine: SourceId { name: "this machine".into(), hash: String::new() },
        layer_overhead_us: 0.0,
        token_overhead_us: 0.0,
        context,
        kv_tier: 0,
        kv_type,
        staging_tier: 0,
        staging_experts: 0,
        tiers: vec![tier],
        dense: shape.dense.iter().map(|d| DensePlacement { kind: d.kind, layer: d.layer, tier: 0 }).collect(),
        layers: shape
            .experts
            .iter()
            .map(|e| LayerPlacement {
                layer: e.layer,
                pinned: Vec::new(),
                slots: 0,
                slot_tier: 0,
                policy: SlotPolicy::Lru,
            })
            .collect(),
        solver: SolverReport {
            backend: "none".into(),
            status: "obvious".into(),
            objective_s: 0.0,
            bound_s: None,
            gap: None,
            solve_s: 0.0,
            goal: None,
        },
        predicted: Prediction::default(),
    }
}

/// Returns a plan with two tiers, `vram` and `dram`, that has the whole model on the first real
/// GPU, the KV cache too.
pub fn all_on_gpu(shape: &ModelShape, context: u32, kv_type: KvType) -> Placement {
    let mut plan = all_in_memory(shape, context, kv_type);
    plan.name = "all-in-vram".into();
    let mut vram = plan.tiers[0].clone();
    (vram.tier.name, vram.tier.kind) = ("vram".into(), TierKind::Vram);
    (vram.pinned_bytes, vram.home_bytes) = (vram.home_bytes, 0);
    let dram = &mut plan.tiers[0];
    (dram.dense_bytes, dram.kv_bytes, dram.home_bytes) = (0, 0, 0);
    plan.tiers.insert(0, vram);
    plan.staging_tier = 1;
    for (layer, experts) in plan.layers.iter_mut().zip(&shape.experts) {
        layer.pinned.push((0, (0..experts.n_expert).collect()));
        layer.slot_tier = 1;
    }
    plan
}

/// Returns [`all_on_gpu`] with the routed experts in main memory, in place in the mapped file.
pub fn experts_in_memory(shape: &ModelShape, context: u32, kv_type: KvType) -> Placement {
    let mut plan = all_on_gpu(shape, context, kv_type);
    plan.name = "experts-in-dram".into();
    plan.layers.iter_mut().for_each(|layer| layer.pinned.clear());
    let bytes = std::mem::take(&mut plan.tiers[0].pinned_bytes);
    plan.tiers[1].home_bytes = bytes;
    plan
}
