//! Default plans, made without a solver: everything in main memory, in place in the mapped file;
//! everything on one GPU; and everything but the routed experts on one GPU.

use tier_plan_formats::machine::{Accelerator, NOT_MEASURED, Tier, TierKind};
use tier_plan_formats::model::kv::{CacheRoom, KvType};
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::placement::{
    DensePlacement, HomeReads, LayerPlacement, PerTier, Pins, Placement, PlanTier, Prediction,
    SlotPolicy, SolverReport, TierIdx,
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
/// assert!(plan.tiers.iter().all(|tier| tier.used_bytes() == tier.budget_bytes));
/// # Ok::<(), tier_plan_runtime::model::ModelError>(())
/// ```
pub fn all_in_memory(shape: &ModelShape, context: u32, kv_type: KvType) -> Placement {
    in_memory_with(shape, CacheRoom::of_one(context), kv_type)
}

/// Returns [`all_in_memory`]'s plan with a KV cache for any number of texts.
pub fn in_memory_with(shape: &ModelShape, room: CacheRoom, kv_type: KvType) -> Placement {
    let dram = Tier {
        name: "dram".into(),
        kind: TierKind::Dram,
        capacity_bytes: 0,
        read_gbps: 1.0,
        latency_us: 0.0,
        emulated: false,
        unit: None,
        accelerator: Accelerator::default(),
        source: NOT_MEASURED.into(),
    };
    let mut plan = Placement {
        name: "all-in-dram".into(),
        model: shape.id.clone(),
        profile: None,
        machine: SourceId {
            name: "this machine".into(),
            hash: String::new(),
        },
        layer_overhead_us: 0.0,
        token_overhead_us: 0.0,
        context: room.context,
        sequences: room.sequences,
        checkpoints: room.checkpoints,
        window_chunk: room.for_model(shape).window_chunk,
        kv_tier: TierIdx::FIRST,
        kv_type,
        host_kv: Vec::new(),
        staging_tier: TierIdx::FIRST,
        staging_experts: 0,
        reads: HomeReads::default(),
        streaming: None,
        tiers: PerTier::from([PlanTier::new(dram, 0)]),
        dense: shape
            .dense
            .iter()
            .map(|d| DensePlacement {
                kind: d.kind,
                layer: d.layer,
                tier: TierIdx::FIRST,
            })
            .collect(),
        layers: shape
            .experts
            .iter()
            .map(|e| LayerPlacement {
                layer: e.layer,
                pinned: Vec::new(),
                slots: 0,
                slot_tier: TierIdx::FIRST,
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
    };
    set_sums_and_budgets(&mut plan, shape);
    plan
}

/// Fills in the plan's sums, and makes every tier as large as they are.
fn set_sums_and_budgets(plan: &mut Placement, shape: &ModelShape) {
    plan.fill_sums(shape);
    for tier in &mut plan.tiers {
        tier.budget_bytes = tier.used_bytes();
        tier.tier.capacity_bytes = tier.budget_bytes;
    }
}

/// Returns a plan with two tiers, `vram` and `dram`, that has the whole model on the first real
/// GPU, KV cache included.
pub fn all_on_gpu(shape: &ModelShape, context: u32, kv_type: KvType) -> Placement {
    let mut plan = experts_in_memory(shape, context, kv_type);
    plan.name = "all-in-vram".into();
    for (layer, experts) in plan.layers.iter_mut().zip(&shape.experts) {
        layer.pinned = vec![Pins {
            tier: TierIdx::FIRST,
            experts: (0..experts.n_expert).collect(),
        }];
    }
    plan.fill_sums(shape);
    plan
}

/// Returns [`all_on_gpu`]'s plan with the routed experts in main memory, in place in the mapped
/// file.
pub fn experts_in_memory(shape: &ModelShape, context: u32, kv_type: KvType) -> Placement {
    let mut plan = all_in_memory(shape, context, kv_type);
    plan.name = "experts-in-dram".into();
    let dram = plan.tiers[TierIdx::FIRST].clone();
    let mut vram = dram.clone();
    (vram.tier.name, vram.tier.kind) = ("vram".into(), TierKind::Vram);
    plan.tiers = PerTier::from([vram, dram]);
    let dram = plan.home_tier();
    plan.staging_tier = dram;
    plan.layers
        .iter_mut()
        .for_each(|layer| layer.slot_tier = dram);
    plan.fill_sums(shape);
    plan
}
