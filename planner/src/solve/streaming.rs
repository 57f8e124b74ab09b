//! Whether experts of main memory are streamed to a GPU for tokens, and how many.
//!
//! The search prices columns without it. Its plan is then compared with plans that have room for the
//! buffers and divide a token's experts between CPU and GPU. Divided paths have the rates that both had
//! when they were measured together. Dividing shortens no expert stage by more than a known part
//! ([`StreamTimes::least_part`]), and nothing else. So the search's bound, with its expert stages
//! shortened by that part, holds for all plans.

use super::kv_tier::Best;
use super::options::Objective;
use super::problem::Problem;
use super::problem::capacity::Capacity;
use super::problem::columns::{Charge, dense_s};
use super::problem::constraints::Constraints;
use super::problem::instance::MAX_ROUNDING_GAP;
use super::problem::objective::ObjectiveFunction;
use super::verify;
use crate::cost::{overhead_s, predict, token_s};
use crate::profile::Evidence;
use anyhow::{Result, ensure};
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{Placement, StreamTimes, Streaming, TierIdx};
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::ModelShape;

/// Least part of a token's time that streaming must save.
const MIN_GAIN: f64 = 0.03;

/// Numbers of buffers for which a search makes room.
const MAX_SEARCHES: usize = 2;

/// Part of a token's time that one buffer more must save.
const MIN_GAIN_OF_MORE: f64 = 1e-3;

/// Makes the best plan of a problem.
pub(super) type Choose<'a> = &'a dyn Fn(&Problem<'_>) -> Result<Best>;

/// Whether a machine may have experts streamed: the rates of a GPU's link and of the CPU were measured
/// together, and are higher than that of the CPU alone.
pub(super) fn may_pay(problem: &Problem<'_>) -> bool {
    let machine = problem.machine;
    let Some(memory) = machine.tiers.iter().find(|t| is_memory(t)) else {
        return false;
    };
    let mut gpus = machine.tiers.iter().filter(|t| t.is_gpu());
    gpus.any(|gpu| {
        let link = machine.extras.links.get(&gpu.name);
        link.is_some_and(|link| {
            let lost_gbps = memory.read_gbps - link.dram_contended_gbps;
            link.contended_gbps > lost_gbps * machine.extras.efficiency
        })
    })
}

/// Has the plan stream experts if that saves more than [`MIN_GAIN`] of a token's time. `choose` makes a
/// plan with a smaller budget of a GPU, where the plan has no room for the buffers.
///
/// # Errors
/// Fails if the plan does not pass verification afterwards, which is a bug.
pub(super) fn improve(
    best: &mut Best,
    problem: &Problem<'_>,
    evidence: &Evidence,
    constraints: &Constraints,
    choose: Choose<'_>,
) -> Result<()> {
    let shape = problem.shape;
    let before = token_s(&best.plan.predicted);
    let saved = |plan: &Placement| 1.0 - token_s(&plan.predicted) / before;
    // Where experts are kept off a GPU by hand, none is streamed there.
    let is_kept_off = |tier| {
        let mut layers = shape.experts.iter().map(|e| constraints.layer(e.layer));
        layers.any(|layer| layer.forbidden.contains(&tier))
    };
    let drafts: Vec<Draft> = candidates(&best.plan, problem)
        .into_iter()
        .filter(|streaming| !is_kept_off(streaming.tier))
        .map(|streaming| Draft::new(best, streaming, shape, evidence))
        .filter(|draft| saved(&draft.plan) > 0.0)
        .collect();
    if drafts.is_empty() {
        return Ok(());
    }
    let (mut found, mut crowded): (Vec<Draft>, Vec<Draft>) =
        drafts.into_iter().partition(Draft::fits);
    // What room costs is estimated first, and then searched for.
    crowded.retain(|draft| draft.estimate_s < before * (1.0 - MIN_GAIN));
    crowded.sort_by(|a, b| a.estimate_s.total_cmp(&b.estimate_s));
    let room = crowded.iter().take(MAX_SEARCHES);
    found.extend(room.filter_map(|draft| draft.with_room(problem, evidence, choose)));
    // Buffers that bring nothing are left out.
    found.sort_by_key(|draft| draft.plan.streaming.map_or(0, |s| s.experts));
    let least = found.into_iter().reduce(|least, other| {
        let gain = saved(&other.plan) - saved(&least.plan);
        if gain > MIN_GAIN_OF_MORE {
            other
        } else {
            least
        }
    });
    let Some(Draft {
        mut plan, prices, ..
    }) = least.filter(|d| saved(&d.plan) > MIN_GAIN)
    else {
        best.notes.push(format!(
            "no experts are streamed to a GPU: with room for the buffers, that would not save {:.0} % of a token's predicted time",
            MIN_GAIN * 100.0
        ));
        return Ok(());
    };
    let beside_s = beside_experts_s(problem, constraints)?;
    report(&mut plan, &best.plan, (shape, beside_s));
    let wrong = verify::verify(&plan, shape, evidence);
    ensure!(
        wrong.is_empty(),
        "the plan '{}' did not pass its own check after experts were streamed, which is a mistake in this program: {}",
        best.plan.name,
        wrong.join("; ")
    );
    // What was said of the search is about plans that stream nothing.
    best.notes = sentence(&plan, saved(&plan)).into_iter().collect();
    (best.plan, best.prices) = (plan, prices);
    Ok(())
}

/// A plan with experts streamed, which may lack room for the buffers.
struct Draft {
    plan: Placement,
    prices: Vec<f64>,
    /// Predicted seconds per token, and what room for the buffers is worth.
    estimate_s: f64,
}

impl Draft {
    fn new(best: &Best, streaming: Streaming, shape: &ModelShape, evidence: &Evidence) -> Self {
        let plan = streamed(&best.plan, streaming, shape, evidence);
        let price = best
            .prices
            .get(streaming.tier.get())
            .copied()
            .unwrap_or(0.0);
        let bytes = plan.tiers[streaming.tier].bytes.staging;
        Self {
            estimate_s: token_s(&plan.predicted) + price * bytes as f64,
            prices: best.prices.clone(),
            plan,
        }
    }

    /// Whether there is room for the buffers.
    fn fits(&self) -> bool {
        let mut tiers = self.plan.tiers.iter();
        tiers.all(|t| t.used_bytes() <= t.budget_bytes)
    }

    /// Returns the best plan with room for as many buffers, if there is one.
    fn with_room(
        &self,
        problem: &Problem<'_>,
        evidence: &Evidence,
        choose: Choose<'_>,
    ) -> Option<Self> {
        let streaming = self.plan.streaming?;
        let at = streaming.tier;
        let mut smaller = problem.clone();
        let left = &mut smaller.budgets[at.get()];
        *left = left.saturating_sub(self.plan.tiers[at].bytes.staging);
        let mut other = choose(&smaller).ok()?;
        other.plan.tiers[at].budget_bytes = self.plan.tiers[at].budget_bytes;
        let made = Self::new(&other, streaming, problem.shape, evidence);
        made.fits().then_some(made)
    }
}

/// Returns a sentence on what a plan streams.
fn sentence(plan: &Placement, saved: f64) -> Option<String> {
    let streaming = plan.streaming.as_ref()?;
    let name = |tier: TierIdx| &plan.tiers[tier].tier.name;
    let experts = match streaming.experts {
        1 => "one expert".to_string(),
        n => format!("up to {n} experts"),
    };
    Some(format!(
        "{experts} of a layer are streamed from '{}' to '{}' for a token, which saves {:.1} % of its predicted time; \
         measured together, the link has {:.1} GB/s, and the CPU keeps {:.0} % of its rate. \
         The proven gap is wide, since its bound allows each layer the most that streaming can save of one",
        name(streaming.from),
        name(streaming.tier),
        saved * 100.0,
        streaming.link_gbps,
        streaming.cpu_share * 100.0
    ))
}

/// Whether experts can be streamed from a tier.
fn is_memory(tier: &Tier) -> bool {
    tier.kind == TierKind::Dram && !tier.emulated
}

/// Returns the ways of streaming that may pay: to each GPU whose link was measured beside the CPU, up to
/// as many experts as a token would have streamed if all were in main memory.
fn candidates(plan: &Placement, problem: &Problem<'_>) -> Vec<Streaming> {
    let tiers = plan.tiers.enumerate();
    let memory: Vec<TierIdx> = tiers
        .filter(|(_, t)| is_memory(&t.tier))
        .map(|(tier, _)| tier)
        .collect();
    // What was measured is a machine with one memory.
    let [from] = memory[..] else {
        return Vec::new();
    };
    let extras = &problem.machine.extras;
    let mut found = Vec::new();
    for (tier, t) in plan.tiers.enumerate().filter(|(_, t)| t.tier.is_gpu()) {
        let Some(link) = extras.links.get(&t.tier.name) else {
            continue;
        };
        // The efficiency of a plan's rates leaves the share as it is.
        let read_gbps = problem.machine.tiers[from.get()].read_gbps;
        let cpu_share = (link.dram_contended_gbps / read_gbps).min(1.0);
        let mut streaming = Streaming {
            tier,
            from,
            experts: u32::MAX,
            link_gbps: link.contended_gbps,
            cpu_share,
        };
        let most = times(plan, &streaming, problem.shape)
            .map(|(times, n_used)| times.divide(n_used, n_used, 0).streamed);
        streaming.experts = most.max().unwrap_or(0);
        let all = 1..=streaming.experts;
        found.extend(all.map(|experts| Streaming {
            experts,
            ..streaming
        }));
    }
    found
}

/// Returns the times of the layers whose experts a GPU can compute, with the experts of a token.
fn times<'a>(
    plan: &'a Placement,
    streaming: &'a Streaming,
    shape: &'a ModelShape,
) -> impl Iterator<Item = (StreamTimes, u32)> + 'a {
    let runs = |layer: u32| {
        let mut cpu_only = shape.cpu_only.iter();
        !cpu_only.any(|o| o.is(Part::Experts, Some(layer)))
    };
    let layers = shape.experts.iter().filter(move |e| runs(e.layer));
    let [tier, from] = [streaming.tier, streaming.from].map(|tier| &plan.tiers[tier].tier);
    layers.map(move |e| {
        let times = StreamTimes::new(streaming, tier, from, e.expert_bytes);
        (times, e.n_used)
    })
}

/// Returns the plan with experts streamed, predicted anew. Its solver report is left to fill in.
fn streamed(
    plan: &Placement,
    streaming: Streaming,
    shape: &ModelShape,
    evidence: &Evidence,
) -> Placement {
    let mut plan = plan.clone();
    plan.streaming = Some(streaming);
    plan.fill_sums(shape);
    plan.predicted = predict(&plan, shape, evidence);
    plan
}

/// Returns the least seconds of a token that any plan takes beside its expert stages: with each dense
/// group where it is fastest.
fn beside_experts_s(problem: &Problem<'_>, constraints: &Constraints) -> Result<f64> {
    let objective = ObjectiveFunction::new(Objective::Latency, None, None, problem)?;
    let (shape, machine) = (problem.shape, problem.machine);
    let fixed_s = overhead_s(
        shape.n_layer,
        machine.layer_overhead_us,
        machine.token_overhead_us,
    );
    let charge = Charge::linear(&objective);
    let free = vec![0.0; problem.budgets.len()];
    let capacities = Capacity::per_kv_tier(problem, constraints)?;
    let of = |capacity: &Capacity| {
        let groups_s = dense_s(shape, capacity, &charge, constraints, &free)?;
        Some(groups_s + capacity.kv_s())
    };
    let least = capacities.iter().filter_map(of);
    Ok(fixed_s + least.fold(f64::INFINITY, f64::min))
}

/// Reports what is proven of a plan that streams experts. `searched` is the best plan without that, under
/// the same budgets, and `beside_s` the least time that any plan takes beside its expert stages.
fn report(plan: &mut Placement, searched: &Placement, (shape, beside_s): (&ModelShape, f64)) {
    // However many buffers there are.
    let streaming = plan.streaming.map(|streaming| Streaming {
        experts: u32::MAX,
        ..streaming
    });
    let parts = streaming.iter();
    let parts = parts.flat_map(|s| times(plan, s, shape));
    let part = parts
        .map(|(times, n_used)| times.least_part(n_used))
        .fold(1.0, f64::min);
    let solver = &mut plan.solver;
    solver.objective_s = token_s(&plan.predicted);
    let shortened = |bound: f64| part * bound + (1.0 - part) * beside_s.min(bound);
    solver.bound_s = searched.solver.bound_s.map(shortened);
    let gap = |bound: f64| ((solver.objective_s - bound) / solver.objective_s).max(0.0);
    solver.gap = solver.bound_s.map(gap);
    if solver.status == "optimal" && solver.gap.is_none_or(|gap| gap > MAX_ROUNDING_GAP) {
        solver.status = "feasible".into();
    }
}
