//! Whether experts of main memory are streamed to a GPU for tokens, and how many.
//!
//! The search prices columns without it. Its plan is then compared with one that leaves room for the
//! buffers, where a token's experts are divided between CPU and GPU. The rates are those that both had
//! when they were measured together. Dividing shortens no path by more than a known part
//! ([`StreamTimes::least_part`]), and so a bound holds for divided plans, too, when it is multiplied by
//! that part.

use super::kv_tier::Best;
use super::problem::Problem;
use super::problem::instance::MAX_ROUNDING_GAP;
use super::verify;
use crate::cost::{predict, token_s};
use crate::profile::Evidence;
use anyhow::{Result, ensure};
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{Placement, StreamTimes, Streaming, TierIdx};
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::ModelShape;

/// Least part of a token's time that streaming must save.
const MIN_GAIN: f64 = 0.03;

/// Makes the best plan of a problem.
pub(super) type Choose<'a> = &'a dyn Fn(&Problem<'_>) -> Result<Best>;

/// Has the plan stream experts if that saves more than [`MIN_GAIN`] of a token's time. `choose` makes a
/// plan with a smaller budget of a GPU, where the plan has no room for the buffers.
///
/// # Errors
/// Fails if the plan does not pass verification afterwards, which is a bug.
pub(super) fn improve(
    best: &mut Best,
    problem: &Problem<'_>,
    evidence: &Evidence,
    choose: Choose<'_>,
) -> Result<()> {
    let before = token_s(&best.plan.predicted);
    let saved = |plan: &Placement| 1.0 - token_s(&plan.predicted) / before;
    let by_gain = |a: &Placement, b: &Placement| saved(a).total_cmp(&saved(b));
    // Whether there is room for the buffers or not.
    let drafts = candidates(&best.plan, problem)
        .into_iter()
        .map(|streaming| streamed(&best.plan, &streaming, problem.shape, evidence));
    let Some(draft) = drafts.max_by(by_gain).filter(|draft| saved(draft) > 0.0) else {
        return Ok(());
    };
    let found = if saved(&draft) > MIN_GAIN {
        with_room(best, draft, problem, evidence, choose)
    } else {
        None
    };
    let Some(mut found) = found.filter(|found| saved(&found.plan) > MIN_GAIN) else {
        best.notes.push(format!(
            "streaming experts of main memory to a GPU would not save {:.0} % of a token's time, so none are",
            MIN_GAIN * 100.0
        ));
        return Ok(());
    };
    let wrong = verify::verify(&found.plan, problem.shape, evidence);
    ensure!(
        wrong.is_empty(),
        "the plan '{}' did not pass its own check after experts were streamed, which is a mistake in this program: {}",
        best.plan.name,
        wrong.join("; ")
    );
    found
        .notes
        .extend(sentence(&found.plan, saved(&found.plan)));
    found.baselines = std::mem::take(&mut best.baselines);
    *best = found;
    Ok(())
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
         measured together, the link has {:.3} GB/s, and the CPU keeps {:.1} % of its rate",
        name(streaming.from),
        name(streaming.tier),
        saved * 100.0,
        streaming.link_gbps,
        streaming.cpu_share * 100.0
    ))
}

/// Returns the ways of streaming that may pay: to each GPU whose link was measured beside the CPU, up to
/// as many experts as a token would have streamed if all were in main memory.
fn candidates(plan: &Placement, problem: &Problem<'_>) -> Vec<Streaming> {
    let is_memory = |t: &Tier| t.kind == TierKind::Dram && !t.emulated;
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
        let part = (Part::Experts, Some(layer));
        !shape.cpu_only.iter().any(|o| (o.part, o.layer) == part)
    };
    let layers = shape.experts.iter().filter(move |e| runs(e.layer));
    let [tier, from] = [streaming.tier, streaming.from].map(|tier| &plan.tiers[tier].tier);
    layers.map(move |e| {
        let times = StreamTimes::new(streaming, tier, from, e.expert_bytes);
        (times, e.n_used)
    })
}

/// Returns the best plan with the streaming of a draft and room for its buffers, which the draft itself
/// may lack; `None` where there is no such plan.
fn with_room(
    best: &Best,
    draft: Placement,
    problem: &Problem<'_>,
    evidence: &Evidence,
    choose: Choose<'_>,
) -> Option<Best> {
    let streaming = draft.streaming?;
    let (at, budget) = (streaming.tier, draft.tiers[streaming.tier].budget_bytes);
    let fits = |plan: &Placement| plan.tiers[at].used_bytes() <= budget;
    if fits(&draft) {
        return Some(Best {
            plan: draft,
            baselines: Vec::new(),
            prices: best.prices.clone(),
            notes: best.notes.clone(),
        });
    }
    let mut smaller = problem.clone();
    let left = &mut smaller.budgets[at.get()];
    *left = left.saturating_sub(draft.tiers[at].bytes.staging);
    let mut other = choose(&smaller).ok()?;
    other.plan.tiers[at].budget_bytes = budget;
    other.plan = streamed(&other.plan, &streaming, problem.shape, evidence);
    fits(&other.plan).then_some(other)
}

/// Returns the plan with experts streamed, predicted anew.
fn streamed(
    plan: &Placement,
    streaming: &Streaming,
    shape: &ModelShape,
    evidence: &Evidence,
) -> Placement {
    let mut plan = plan.clone();
    plan.streaming = Some(*streaming);
    plan.fill_sums(shape);
    plan.predicted = predict(&plan, shape, evidence);
    let part = times(&plan, streaming, shape)
        .map(|(times, _)| times.least_part())
        .fold(1.0, f64::min);
    let solver = &mut plan.solver;
    solver.objective_s = token_s(&plan.predicted);
    solver.bound_s = solver.bound_s.map(|bound| bound * part);
    let gap = |bound: f64| ((solver.objective_s - bound) / solver.objective_s).max(0.0);
    solver.gap = solver.bound_s.map(gap);
    if solver.status == "optimal" && solver.gap.is_none_or(|gap| gap > MAX_ROUNDING_GAP) {
        solver.status = "feasible".into();
    }
    plan
}
