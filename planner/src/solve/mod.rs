//! Finds where every tensor should live.
//!
//! [`goal`] says what is made least and [`wishes`] what is fixed by hand; [`room`] sets aside what every plan needs;
//! [`columns`], [`grid`] and [`maker`] list what can be chosen and what it costs, [`steps`], [`table`] and [`whole`] look at
//! what can't be listed; [`dual`] finds prices for bytes and a proven bound; [`round`], [`search`], [`polish`], [`labels`]
//! and [`program`] find the integer choice; [`rules`] makes the plans to compare with; [`check`] re-checks every plan before anybody sees it;
//! [`policy`] then says how slots are refilled; [`infeasible`] and [`verdict`] put into words what came of it.

pub mod batch;
mod beyond;
mod cache;
pub mod check;
mod choose;
pub mod columns;
pub mod dual;
pub mod goal;
pub mod grid;
pub mod infeasible;
pub mod labels;
pub mod maker;
mod planner;
pub mod policy;
pub mod polish;
pub mod program;
pub mod room;
pub mod round;
pub mod rules;
pub mod search;
pub mod steps;
pub mod table;
pub mod verdict;
pub mod whole;
pub mod wishes;

use crate::cli::{Backend, Objective, Strategy};
use crate::profile::{Evidence, Judged};
use crate::replay::ceiling;
use anyhow::{Context, Result, ensure};
use columns::Charge;
use goal::Goal;
use maker::Maker;
use planner::Planner;
use room::Room;
use rules::Rule;
use std::time::{Duration, Instant};
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::formats::placement::TierIdx;
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::model::shape::ModelShape;
use wishes::Wishes;

/// What a plan is made from.
#[derive(Debug, Clone)]
pub struct Inputs<'a> {
    /// The model's sizes.
    pub shape: &'a ModelShape,
    /// Its routing; uniform access is assumed without.
    pub profile: Option<&'a Profile>,
    /// The machine.
    pub machine: &'a Machine,
    /// `[tiers]` bytes the plan may use.
    pub budgets: Vec<u64>,
    /// Context length that the key and value cache is planned for.
    pub context: u32,
    /// How keys and values are stored.
    pub kv_type: KvType,
}

/// How to make a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// The integer program or a rule.
    pub strategy: Strategy,
    /// Stop improving after so many seconds.
    pub time_limit_s: f64,
    /// What to make least.
    pub objective: Objective,
    /// Sequences that are decoded together, for the objective that needs them.
    pub batch: Option<u32>,
    /// What solves the integer program.
    pub backend: Backend,
    /// Tokens a second to reach.
    pub target_tok_s: Option<f64>,
    /// What is fixed or forbidden by hand.
    pub wishes: Wishes,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            strategy: Strategy::Optimal,
            time_limit_s: 10.0,
            objective: Objective::Latency,
            batch: None,
            backend: Backend::default(),
            target_tok_s: None,
            wishes: Wishes::default(),
        }
    }
}

/// A `--time-limit` that makes sense.
///
/// # Errors
/// When it is negative, or more than a million seconds.
pub fn time_limit(seconds: f64) -> Result<f64> {
    ensure!(
        seconds.is_finite() && (0.0..=1e6).contains(&seconds),
        "--time-limit {seconds}: give seconds between 0 and a million"
    );
    Ok(seconds)
}

/// A plan and what to compare it with.
#[derive(Debug, Clone, PartialEq)]
pub struct Solved {
    /// The plan that was asked for.
    pub plan: Placement,
    /// The plans of the rules that fit, at the same budgets.
    pub baselines: Vec<Placement>,
    /// What the reader should know, in sentences.
    pub notes: Vec<String>,
    /// Share of expert accesses that no policy could serve better from as many resident experts as the plan has; not
    /// without recorded tokens.
    pub ceiling_hit_rate: Option<f64>,
    /// What pins and slots are worth, and what more of which tier would bring, in sentences.
    pub verdict: Vec<String>,
}

/// Makes a plan.
///
/// # Errors
/// As [`solve_all`].
pub fn solve(inputs: &Inputs<'_>, options: &Options) -> Result<Placement> {
    Ok(solve_all(inputs, options)?.plan)
}

/// Makes a plan and those of the rules, each re-checked.
///
/// # Errors
/// When the budgets cannot hold what every plan needs, the profile is of another model, a number of the machine file
/// makes no sense, or the rule that was asked for does not fit.
pub fn solve_all(inputs: &Inputs<'_>, options: &Options) -> Result<Solved> {
    solve_judged(inputs, &Evidence::new(inputs.shape, inputs.profile)?, options)
}

/// The same for evidence that is at hand; the profile of the inputs is only named.
///
/// # Errors
/// As [`solve_all`].
pub fn solve_judged(inputs: &Inputs<'_>, evidence: &Evidence, options: &Options) -> Result<Solved> {
    let start = Instant::now();
    let goal = Goal::new(options.objective, options.batch, options.target_tok_s, inputs)?;
    let rooms = Room::all(inputs, &options.wishes)?;
    let planner =
        |room| Planner { inputs, evidence, room, goal: &goal, wishes: &options.wishes, backend: options.backend };
    let mut notes = evidence.notes.clone();
    let efficiency = inputs.machine.extras.efficiency;
    if efficiency != 1.0 {
        notes.push(format!(
            "rates of the tiers that the CPU computes on are those of machine '{}' times its efficiency of {efficiency}",
            inputs.machine.name
        ));
    }
    let planners: Vec<Planner<'_>> = rooms.iter().map(planner).collect();
    let mut verdict = Vec::new();
    let wanted = match options.strategy {
        Strategy::Optimal => None,
        Strategy::Uniform => Some(Rule::Uniform),
        Strategy::FrequencyFirst => Some(Rule::FrequencyFirst),
        Strategy::LruOnly => Some(Rule::LruOnly),
        Strategy::FirstLayersCpu => Some(Rule::FirstLayersCpu),
    };
    let (plan, baselines) = match wanted {
        Some(rule) => {
            let rules = planners.iter().map(Planner::baselines).collect::<Result<Vec<_>>>()?;
            let baselines = cache::baselines(&planners, rules);
            let plan = baselines.iter().find(|b| b.name == rule.name()).cloned().with_context(|| {
                format!("the rule '{}' makes no plan on these tiers and budgets; try --strategy optimal", rule.name())
            })?;
            (plan, baselines)
        }
        None => {
            let limit = Duration::try_from_secs_f64(options.time_limit_s)
                .ok()
                .with_context(|| format!("a time limit of {} s; give a positive one", options.time_limit_s))?;
            let deadline = start.checked_add(limit).context("the time limit is too long; give less than a year")?;
            let found = cache::best(&planners, start, deadline)?;
            if goal.is_latency() {
                verdict = verdict::verdict(&found.plan, &found.baselines, &found.prices, inputs);
            }
            notes.extend(found.notes);
            (found.plan, found.baselines)
        }
    };
    if goal.target_tok_s.is_some() || goal.objective != Objective::Latency {
        notes.push(format!("objective: {}", goal.words()));
    }
    Ok(Solved { ceiling_hit_rate: ceiling_hit_rate(&plan, evidence), plan, baselines, notes, verdict })
}

/// What a byte more of each tier is worth: `[tiers]` seconds of a decoded token, from the linear program's prices, with
/// keys and values on the tier `cache`.
///
/// # Errors
/// As [`solve_all`].
pub fn shadow_prices(inputs: &Inputs<'_>, evidence: &Evidence, cache: TierIdx, time_limit_s: f64) -> Result<Vec<f64>> {
    let mut rooms = Room::all(inputs, &Wishes::default())?;
    let at = rooms.iter().position(|room| room.kv_tier == cache).unwrap_or(0);
    let room = rooms.swap_remove(at);
    let goal = Goal::new(Objective::Latency, None, None, inputs)?;
    let wishes = Wishes::default();
    let planner = Planner { inputs, evidence, room: &room, goal: &goal, wishes: &wishes, backend: Backend::default() };
    let charge = Charge::new(&goal, (1.0, 1.0));
    let limit = Duration::try_from_secs_f64(time_limit_s).ok().context("a time limit below 0; give a positive one")?;
    let deadline = Instant::now().checked_add(limit).context("the time limit is too long; give less than a year")?;
    let maker = Maker::new(inputs.shape, evidence, &room, &charge, &wishes, time_limit_s);
    let mut items = columns::dense_items(inputs.shape, &room, &charge, &wishes);
    items.extend(maker.items());
    let soon = Instant::now() + Duration::from_secs(2);
    let mut dual = dual::maximise(&items, &room, None, deadline.max(soon))?;
    if maker.whole {
        dual = planner.price_whole(&maker, &mut items, dual, deadline)?;
    } else if !maker.grid.full {
        dual = planner.refine(&maker, &mut items, &room, dual, deadline)?;
    }
    Ok(dual.price)
}

/// See [`Solved::ceiling_hit_rate`].
fn ceiling_hit_rate(plan: &Placement, evidence: &Evidence) -> Option<f64> {
    if evidence.drawn {
        return None;
    }
    let (mut hits, mut accesses) = (0, 0);
    for (layer, evidence) in plan.layers.iter().zip(&evidence.layers) {
        let Judged::Recorded(trace) = &evidence.judged else { return None };
        let resident = layer.pinned.iter().map(|pins| pins.experts.len()).sum::<usize>() + layer.slots as usize;
        hits += ceiling(trace, resident);
        accesses += (trace.tokens() * trace.n_used()) as u64;
    }
    (accesses > 0).then(|| hits as f64 / accesses as f64)
}

#[cfg(test)]
mod tests;
