//! Column generation: prices, more columns where prices favor them, an integer choice, and a proof.
//!
//! The grid of [`enumerate`](super::problem::enumerate) lists the first columns.
//! [`generate_columns`] alternates between the dual prices of all columns and the pricing of new
//! ones. [`optimize`] then finds an integer choice, tries columns around it, and closes what gap it
//! can by label setting and by the integer program.

use super::bound::lagrangian::{self, DualSolution};
use super::bound::pricing;
use super::options::Backend;
use super::primal::choice::{Choice, Master, PricedColumn};
use super::primal::mip::Limits;
use super::primal::{exchange, greedy, label_setting, mip, rounding};
use super::problem::capacity::Capacity;
use super::problem::columns::{self, Charge, Config, Item, Meaning};
use super::problem::draft::Draft;
use super::problem::enumerate::ColumnEnumerator;
use super::problem::instance::{Instance, MAX_ROUNDING_GAP};
use super::report::infeasible;
use super::translate;
use anyhow::{Result, bail};
use std::time::{Duration, Instant};
use tier_plan_runtime::kernels::scoped::spawn_or_run;

/// Where a plan's integer choice came from. The dual prices, and with them the bound, are always
/// those of good_lp and microlp.
#[derive(Debug, Clone, Copy)]
pub(super) enum Origin {
    LocalSearch,
    LabelSetting,
    Mip(Backend),
}

impl Origin {
    /// Returns the name written into plans.
    pub(super) fn name(self) -> &'static str {
        match self {
            Origin::LocalSearch => "microlp prices, local search",
            Origin::LabelSetting => "microlp prices, partial choices",
            Origin::Mip(backend) => backend.name(),
        }
    }
}

/// Seconds that the first prices may take past the deadline. A bound is owed however slow the
/// machine is: without prices nothing else works.
const MIN_PRICING_TIME: Duration = Duration::from_secs(2);

/// Columns per shared item that the grid is refined around, since its members take several.
const MAX_REFINED_PER_SHARED_ITEM: usize = 3;

/// Rounds in which the grid is refined.
const MAX_REFINEMENT_ROUNDS: u32 = 3;

/// Relative gain of the bound below which a pricing round counts as settled.
const SETTLED_BOUND_GAIN: f64 = 2e-5;

/// Share of the time left that goes to generating columns.
const PRICING_TIME_SHARE: f64 = 0.6;

/// Pricing rounds at most.
const MAX_PRICING_ROUNDS: usize = 40;

/// First pricing rounds that start descents in every region, since prices are far off then.
const THOROUGH_ROUNDS: usize = 2;

/// Times that columns around the incumbent's are added.
const MAX_WIDENING_ROUNDS: usize = 2;

/// Relative gap at which no columns around the incumbent are added.
const MIN_GAP_TO_WIDEN: f64 = 2e-4;

/// Columns that survive reduced-cost fixing up to which the integer program is solved on an
/// incomplete list. The time for more is better spent on a bound over all columns.
const MAX_MIP_COLUMNS_INCOMPLETE: usize = 400;

/// Starting points with a gap above this multiple of the best are skipped: single exchanges cannot
/// make up for so much.
const MAX_START_GAP_RATIO: f64 = 100.0;

/// Relative distance from a layer's best column to which the bound over all columns is brought.
const BOUND_TOLERANCE: f64 = 2e-4;

/// The best choice of columns, and what is proven of it.
pub(super) struct Optimized {
    pub(super) draft: Draft,
    /// Least cost of any choice of the columns tried. `None` if the objective has no known bound.
    pub(super) bound: Option<f64>,
    /// The Lagrangian bound alone. With other bytes left it moves by their worth.
    pub(super) lagrangian_bound: f64,
    /// Least cost of any choice of all columns there are, where it was found out.
    pub(super) bound_over_all: Option<f64>,
    pub(super) origin: Origin,
    /// Whether all columns there are were listed.
    pub(super) is_complete: bool,
    pub(super) n_columns: usize,
    /// `[tiers]` dual price of a byte.
    pub(super) price: Vec<f64>,
}

/// Finds the choice of columns that costs least.
///
/// `drafts` are starting points. `capacity` is the instance's, with a limit on time beside bytes
/// where the objective has one.
pub(super) fn optimize(
    instance: &Instance<'_>,
    charge: &Charge,
    capacity: &Capacity,
    drafts: &[Draft],
    start: Instant,
    deadline: Instant,
) -> Result<Optimized> {
    let Instance {
        problem,
        evidence,
        constraints,
        ..
    } = *instance;
    let shape = problem.shape;
    let seconds = deadline.saturating_duration_since(start).as_secs_f64();
    let enumerator = ColumnEnumerator::new(shape, evidence, capacity, charge, constraints, seconds);
    let mut items = columns::dense_items(shape, capacity, charge, constraints);
    items.extend(enumerator.items());
    let known: Vec<Vec<Vec<usize>>> = drafts
        .iter()
        .filter_map(|draft| translate::columns_of_draft(instance, &enumerator, &mut items, draft))
        .collect();
    let mut dual = generate_columns(instance, &enumerator, &mut items, capacity, deadline)?;

    let known = known
        .into_iter()
        .filter_map(|columns| Choice::new(&items, capacity, columns))
        .collect();
    let incumbent = find_incumbent(
        &Master {
            items: &items,
            capacity,
            dual: &dual,
        },
        known,
        deadline,
    );
    let incumbent = if enumerator.prices_off_grid {
        widen(
            &enumerator,
            &mut items,
            capacity,
            &mut dual,
            incumbent,
            deadline,
        )?
    } else {
        incumbent
    };

    let is_complete = enumerator.grid.is_full;
    let master = Master {
        items: &items,
        capacity,
        dual: &dual,
    };
    let Proof {
        choice,
        bound,
        origin,
    } = prove(&master, is_complete, incumbent, instance.backend, deadline);
    let Some(choice) = choice else {
        bail!(infeasible::no_division(problem, capacity, constraints))
    };
    let bound_over_all = if enumerator.prices_off_grid {
        pricing::bound_over_all(
            &enumerator,
            &mut items,
            &dual.price,
            BOUND_TOLERANCE,
            deadline,
        )
    } else {
        None
    };
    Ok(Optimized {
        draft: translate::draft_of_choice(instance, &enumerator, &items, &choice),
        bound: Some(bound.min(choice.cost_s)),
        lagrangian_bound: dual.bound_s,
        bound_over_all: bound_over_all.map(|sum| sum - capacity.priced_left(&dual.price)),
        origin,
        is_complete,
        n_columns: items.iter().map(Item::len).sum(),
        price: dual.price,
    })
}

/// Finds dual prices, adding columns that they favor until the bound settles or time runs out.
pub(super) fn generate_columns(
    instance: &Instance<'_>,
    enumerator: &ColumnEnumerator<'_>,
    items: &mut [Item],
    capacity: &Capacity,
    deadline: Instant,
) -> Result<DualSolution> {
    let soon = Instant::now() + MIN_PRICING_TIME;
    let dual = lagrangian::maximize(items, capacity, None, deadline.max(soon))?;
    if enumerator.prices_off_grid {
        price_off_grid(enumerator, items, capacity, dual, deadline)
    } else if !enumerator.grid.is_full {
        refine_grid(instance, enumerator, items, capacity, dual, deadline)
    } else {
        Ok(dual)
    }
}

/// Prices columns off the grid, for most of the time that is left.
fn price_off_grid(
    enumerator: &ColumnEnumerator<'_>,
    items: &mut [Item],
    capacity: &Capacity,
    mut dual: DualSolution,
    deadline: Instant,
) -> Result<DualSolution> {
    let begin = Instant::now();
    let end = begin
        + deadline
            .saturating_duration_since(begin)
            .mul_f64(PRICING_TIME_SHARE);
    let mut settled_rounds = 0;
    for round in 0..MAX_PRICING_ROUNDS {
        let started = Instant::now();
        let before = dual.bound_s;
        // Descents start everywhere at first, and again when the known columns bring nothing more.
        let thorough = round < THOROUGH_ROUNDS || settled_rounds > 0;
        let added = pricing::add_cheapest(enumerator, items, &dual.price, thorough, end);
        // The old prices' value is no bound over more columns.
        let until = end.max(Instant::now() + started.elapsed());
        dual = lagrangian::maximize(items, capacity, Some(&dual.price), until)?;
        let settled = before - dual.bound_s <= SETTLED_BOUND_GAIN * dual.bound_s.abs();
        settled_rounds = if settled { settled_rounds + 1 } else { 0 };
        let out_of_time = Instant::now() + started.elapsed() > end;
        if (added == 0 && thorough) || settled_rounds > 1 || out_of_time {
            break;
        }
    }
    Ok(dual)
}

/// Adds the counts between the grid's points around the cheapest columns, and prices again.
fn refine_grid(
    instance: &Instance<'_>,
    enumerator: &ColumnEnumerator<'_>,
    items: &mut [Item],
    capacity: &Capacity,
    mut dual: DualSolution,
    deadline: Instant,
) -> Result<DualSolution> {
    let begin = Instant::now();
    let end = begin
        + deadline
            .saturating_duration_since(begin)
            .mul_f64(PRICING_TIME_SHARE);
    let fast = instance.capacity.fast();
    for round in 0..MAX_REFINEMENT_ROUNDS {
        let started = Instant::now();
        for item in items.iter_mut() {
            if Instant::now() >= end {
                break;
            }
            let Meaning::Experts { layers, configs } = &item.meaning else {
                continue;
            };
            let (layer, is_shared) = (layers[0], layers.len() > 1);
            let count = if is_shared {
                MAX_REFINED_PER_SHARED_ITEM
            } else {
                1
            };
            let centers: Vec<Config> = item
                .cheapest_apart(&dual.price, count)
                .into_iter()
                .map(|c| configs[c])
                .collect();
            let shape = &instance.evidence.layers[layer].shape;
            for center in centers {
                let max_cut = enumerator.max_cut(layer);
                let axes = enumerator
                    .grid
                    .axes_around(&center, shape, max_cut, fast, round);
                enumerator.extend(item, &axes);
            }
        }
        // The old prices' value is no bound over more columns.
        dual = lagrangian::maximize(items, capacity, Some(&dual.price), end)?;
        if Instant::now() + started.elapsed() > end {
            break;
        }
    }
    Ok(dual)
}

/// Finds a choice near the bound: improves several starting points, then the best of those further.
fn find_incumbent(master: &Master<'_>, known: Vec<Choice>, deadline: Instant) -> Option<Choice> {
    let ranked = master.reduced_costs(f64::INFINITY);
    let bound_s = master.dual.bound_s;
    let begin = Instant::now();
    let part = begin + deadline.saturating_duration_since(begin) / 4;
    let starts = rounding::round(master, &ranked, deadline)
        .into_iter()
        .chain(greedy::balanced(master, &ranked, &[]).into_iter().take(2))
        .chain(greedy::by_price(master))
        .chain(known);
    let shortlist = greedy::shortlist(&ranked);
    let mut improved: Vec<Choice> = Vec::new();
    for choice in starts {
        let least = improved
            .iter()
            .map(|c| c.cost_s)
            .fold(f64::INFINITY, f64::min);
        let is_good = least - bound_s <= MAX_ROUNDING_GAP * least;
        if !improved.is_empty() && (is_good || Instant::now() >= part) {
            break;
        }
        if choice.cost_s - bound_s > MAX_START_GAP_RATIO * (least - bound_s) {
            continue;
        }
        improved.push(greedy::improve(master, &shortlist, choice, deadline));
    }
    improved.sort_by(|a, b| a.cost_s.total_cmp(&b.cost_s));
    improved.dedup();
    exchange_search(master, &ranked, improved, deadline)
}

/// Improves as many choices as there are cores by exchange search, and returns the best.
///
/// `choices` come cheapest first. Takes half of the time that is left.
fn exchange_search(
    master: &Master<'_>,
    ranked: &[Vec<PricedColumn>],
    choices: Vec<Choice>,
    deadline: Instant,
) -> Option<Choice> {
    let first = choices.first()?;
    let gap_s = first.cost_s - master.dual.bound_s;
    if gap_s <= MAX_ROUNDING_GAP * first.cost_s {
        return choices.into_iter().next();
    }
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let lists = exchange::CandidateLists::new(master, ranked, gap_s);
    let now = Instant::now();
    let end = now + deadline.saturating_duration_since(now) / 2;
    std::thread::scope(|scope| {
        let running: Vec<_> = choices
            .into_iter()
            .take(threads)
            .map(|choice| spawn_or_run(scope, || exchange::exchange(&lists, choice, 1, end)))
            .collect();
        let done = running.into_iter().filter_map(|thread| thread.join().ok());
        done.min_by(|a, b| a.cost_s.total_cmp(&b.cost_s))
    })
}

/// Adds columns around the incumbent's, and improves it with them while its gap is wide.
fn widen(
    enumerator: &ColumnEnumerator<'_>,
    items: &mut [Item],
    capacity: &Capacity,
    dual: &mut DualSolution,
    mut incumbent: Option<Choice>,
    deadline: Instant,
) -> Result<Option<Choice>> {
    for _ in 0..MAX_WIDENING_ROUNDS {
        let now = Instant::now();
        let left = deadline.saturating_duration_since(now);
        let is_wide = |c: &mut Choice| {
            c.cost_s - dual.bound_s > MIN_GAP_TO_WIDEN * c.cost_s && !left.is_zero()
        };
        let Some(choice) = incumbent.take_if(is_wide) else {
            break;
        };
        pricing::add_around(
            enumerator,
            items,
            &choice.columns,
            &dual.price,
            now + left / 3,
        );
        *dual = lagrangian::maximize(items, capacity, Some(&dual.price), now + left / 2)?;
        let master = Master {
            items,
            capacity,
            dual,
        };
        let ranked = master.reduced_costs(f64::INFINITY);
        incumbent = exchange_search(&master, &ranked, vec![choice], deadline);
    }
    Ok(incumbent)
}

/// The best choice known, the least cost of any, and where they came from.
struct Proof {
    choice: Option<Choice>,
    bound: f64,
    origin: Origin,
}

/// Closes what gap it can between a choice and the bound: by label setting, then by the MIP.
fn prove(
    master: &Master<'_>,
    is_complete: bool,
    incumbent: Option<Choice>,
    backend: Backend,
    deadline: Instant,
) -> Proof {
    let mut proof = Proof {
        choice: incumbent,
        bound: master.dual.bound_s,
        origin: Origin::LocalSearch,
    };
    let is_open = |proof: &Proof| {
        proof
            .choice
            .as_ref()
            .is_none_or(|c| c.cost_s - proof.bound > MAX_ROUNDING_GAP * c.cost_s)
    };
    // On an incomplete list, far too many columns survive to prove more.
    if let (true, true, Some(known)) = (is_complete, is_open(&proof), &proof.choice) {
        let found = label_setting::solve(master, known, deadline);
        if found.bound_s > proof.bound || found.choice.is_some() {
            proof.origin = Origin::LabelSetting;
        }
        proof.bound = proof.bound.max(found.bound_s);
        proof.choice = found.choice.or(proof.choice);
    }
    let left_s = deadline
        .saturating_duration_since(Instant::now())
        .as_secs_f64();
    if is_open(&proof) && (left_s > 0.0 || proof.choice.is_none()) {
        let max_columns = if is_complete {
            mip::MAX_COLUMNS
        } else {
            MAX_MIP_COLUMNS_INCOMPLETE
        };
        let limits = Limits {
            max_columns,
            seconds: left_s.max(1.0),
        };
        let found = mip::solve(master, proof.choice.as_ref(), limits, backend);
        if let Some(choice) = found.choice
            && proof
                .choice
                .as_ref()
                .is_none_or(|best| choice.cost_s < best.cost_s)
        {
            proof.choice = Some(choice);
            proof.origin = Origin::Mip(backend);
        }
        if let (true, Some(best)) = (found.is_proven, &proof.choice) {
            proof.bound = best.cost_s;
            proof.origin = Origin::Mip(backend);
        }
    }
    proof
}
