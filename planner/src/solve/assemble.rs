//! Makes plans of drafts: adds up bytes, predicts times, and verifies the outcome.

use super::baselines::{self, Baseline};
use super::problem::draft::{DensePlace, Draft};
use super::problem::instance::Instance;
use super::verify;
use crate::cost::{predict, token_s};
use anyhow::{Result, ensure};
use std::collections::BTreeSet;
use tier_plan_runtime::formats::machine::Extras;
use tier_plan_runtime::formats::placement::{
    DensePlacement, HomeReads, PerTier, Placement, PlanTier, Prediction, SolverReport, TierIdx,
};
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// The baselines that fit an instance: `[baselines]` drafts, and the plans made of them.
pub(super) struct BaselinePlans {
    pub(super) drafts: Vec<Draft>,
    pub(super) plans: Vec<Placement>,
}

/// Makes the baselines of an instance.
pub(super) fn baseline_plans(instance: &Instance<'_>) -> Result<BaselinePlans> {
    let Instance {
        problem,
        evidence,
        capacity,
        ..
    } = *instance;
    let mut made = BaselinePlans {
        drafts: Vec::new(),
        plans: Vec::new(),
    };
    for baseline in Baseline::ALL {
        if let Some(draft) = baselines::draft(baseline, problem.shape, evidence, capacity) {
            let mut plan = assemble(instance, baseline.name(), &draft);
            plan.solver.backend = baseline.name().to_string();
            plan.solver.status = "baseline".to_string();
            made.plans.push(verified(instance, plan)?);
            made.drafts.push(draft);
        }
    }
    Ok(made)
}

/// Returns the plan if it passes verification.
pub(super) fn verified(instance: &Instance<'_>, plan: Placement) -> Result<Placement> {
    let wrong = verify::verify(&plan, instance.problem.shape, instance.evidence);
    ensure!(
        wrong.is_empty(),
        "the plan '{}' did not pass its own check, which is a mistake in this program: {}",
        plan.name,
        wrong.join("; ")
    );
    Ok(plan)
}

/// Returns how the machine's last tier is read fastest, as far as it is known, and the copies that share its reads.
fn reads(instance: &Instance<'_>) -> HomeReads {
    let last = instance.capacity.tiers.last();
    let Extras { io, copies, .. } = &instance.problem.machine.extras;
    let copies = last.and_then(|tier| copies.get(&tier.name));
    HomeReads {
        io: last.and_then(|tier| io.get(&tier.name).copied()),
        copies: copies.cloned().unwrap_or_default(),
    }
}

/// Makes a predicted plan of a draft. Its solver report is left to fill in.
pub(super) fn assemble(instance: &Instance<'_>, name: &str, draft: &Draft) -> Placement {
    let Instance {
        problem, capacity, ..
    } = *instance;
    let (shape, machine) = (problem.shape, problem.machine);
    let dense = shape
        .dense
        .iter()
        .zip(&draft.dense)
        .map(|(group, place)| DensePlacement {
            kind: group.kind,
            layer: group.layer,
            tier: place.tier,
        })
        .collect();
    let mut plan = Placement {
        name: name.to_string(),
        model: shape.id.clone(),
        profile: problem.profile.map(|p| p.id.clone()),
        machine: machine.id.clone(),
        layer_overhead_us: machine.layer_overhead_us,
        token_overhead_us: machine.token_overhead_us,
        context: problem.context,
        sequences: problem.sequences,
        checkpoints: problem.room().checkpoints,
        window_chunk: problem.room().window_chunk,
        kv_tier: common_kv_tier(instance, draft),
        kv_type: problem.kv_type,
        host_kv: host_kv(shape, draft),
        staging_tier: capacity.staging_tier,
        staging_experts: capacity.staging_experts,
        reads: reads(instance),
        streaming: None,
        tiers: empty_tiers(instance.capacity),
        dense,
        layers: draft.layers.clone(),
        solver: SolverReport {
            backend: String::new(),
            status: String::new(),
            objective_s: 0.0,
            bound_s: None,
            gap: None,
            solve_s: 0.0,
            goal: None,
        },
        predicted: Prediction {
            at: problem.position(),
            prompt_gflops: machine.prompt_gflops(),
            few_gflops: machine.few_gflops(),
            ..Prediction::default()
        },
    };
    plan.fill_sums(shape);
    plan.predicted = predict(&plan, shape, instance.evidence);
    plan.solver.objective_s = token_s(&plan.predicted);
    plan.solver.goal = instance.objective.report(instance.value(&plan), None);
    plan
}

/// Returns the plan's tiers with their budgets, and nothing in them yet.
fn empty_tiers(capacity: &crate::solve::problem::capacity::Capacity) -> PerTier<PlanTier> {
    let tiers = capacity.tiers.iter().zip(&capacity.budget_bytes);
    tiers
        .map(|(tier, &budget_bytes)| PlanTier::new(tier.clone(), budget_bytes))
        .collect()
}

/// Returns the layers whose KV cache is kept off the GPU that has their attention, ascending.
fn host_kv(shape: &ModelShape, draft: &Draft) -> Vec<u32> {
    let groups = shape.dense.iter().zip(&draft.dense);
    let apart = groups.filter(|(_, place)| place.host_kv);
    let layers: BTreeSet<u32> = apart.filter_map(|(group, _)| group.layer).collect();
    layers.into_iter().collect()
}

/// Returns the tier that the plan names for the KV cache: a real GPU if it has all attention with its
/// cache.
fn common_kv_tier(instance: &Instance<'_>, draft: &Draft) -> TierIdx {
    let capacity = instance.capacity;
    let groups = instance.problem.shape.dense.iter().zip(&draft.dense);
    let mut places = groups
        .filter(|(group, _)| group.kind == DenseKind::Attention)
        .map(|(_, &place)| place);
    let has_caches = |place: &DensePlace| {
        capacity.tiers[place.tier].is_gpu() && !place.host_kv && capacity.kv_bytes == 0
    };
    let first = places.next().filter(has_caches);
    first
        .filter(|&first| places.all(|place| place == first))
        .map(|first| first.tier)
        .unwrap_or(capacity.kv_tier)
}
