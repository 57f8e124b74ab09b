//! Column generation: prices, more columns where prices favor them, an integer choice, and a proof.
//!
//! [`generate`](super::generate) lists columns and finds their dual prices. [`optimize`] then finds
//! an integer choice, tries columns around it, and closes what gap it can by label setting and by
//! the integer program. On an incomplete list, the bound is over the columns tried, so that the
//! search ends at the instance's tolerance.

use super::bound::lagrangian::{self, DualSolution};
use super::bound::pricing::Pricer;
use super::branch;
use super::generate::{Generated, generate};
use super::options::Backend;
use super::primal::choice::{Choice, Master, PricedColumn};
use super::primal::exchange::Ending;
use super::primal::mip::Limits;
use super::primal::{exchange, greedy, label_setting, mip, rounding};
use super::problem::capacity::Capacity;
use super::problem::columns::{self, Charge, Item};
use super::problem::draft::Draft;
use super::problem::enumerate::ColumnEnumerator;
use super::problem::instance::{Instance, MAX_ROUNDING_GAP};
use super::report::infeasible;
use super::translate;
use anyhow::{Result, bail};
use std::time::Instant;
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

/// Times that columns around the incumbent's are added.
const MAX_WIDENING_ROUNDS: usize = 2;

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
    /// Whether the deadline ended the search for a choice.
    pub(super) is_cut_short: bool,
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
    let seconds = instance.depth.grid_s(seconds);
    let enumerator = ColumnEnumerator::new(shape, evidence, capacity, charge, constraints, seconds);
    let dense = columns::dense_items(shape, capacity, charge, constraints);
    let Generated {
        mut items,
        mut dual,
        known,
    } = generate(instance, &enumerator, dense, drafts, deadline)?;
    let pricer = Pricer {
        enumerator: &enumerator,
        pool: instance.pool,
    };

    let is_complete = enumerator.grid.is_full;
    let ending = Ending {
        tolerance: if is_complete {
            MAX_ROUNDING_GAP
        } else {
            instance.depth.tolerance()
        },
        fruitless_triples: instance.depth.fruitless_triples(),
        choices: instance.depth.exchanged_choices(),
        deadline,
    };
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
        ending,
    );
    let incumbent = if enumerator.prices_off_grid {
        let widening = Widening {
            pricer,
            capacity,
            ending,
        };
        widening.widen(&mut items, &mut dual, incumbent)?
    } else {
        incumbent
    };
    let master = Master {
        items: &items,
        capacity,
        dual: &dual,
    };
    let mut proof = Proof {
        choice: incumbent,
        bound: dual.bound_s,
        origin: Origin::LocalSearch,
    };
    if let (false, true, Some(choice)) = (is_complete, proof.is_open(ending), &proof.choice) {
        let branched = branch::branch(&master, choice.clone(), ending)?;
        (proof.choice, proof.bound) = (Some(branched.choice), branched.bound_s);
    }
    let Proof {
        choice,
        bound,
        origin,
    } = prove(&master, is_complete, ending, proof, instance.backend);
    let is_cut_short = Instant::now() >= deadline;
    let Some(choice) = choice else {
        bail!(infeasible::no_division(problem, capacity, constraints))
    };
    let bound_over_all = if enumerator.prices_off_grid && instance.bounds_all {
        pricer.bound_over_all(&mut items, &dual.price, BOUND_TOLERANCE, deadline)
    } else {
        None
    };
    let draft = translate::draft_of_choice(instance, &enumerator, &items, &choice);
    if enumerator.prices_off_grid {
        instance.pool.keep(&dual.price, &draft);
    }
    Ok(Optimized {
        draft,
        bound: Some(bound.min(choice.cost_s)),
        lagrangian_bound: dual.bound_s,
        bound_over_all: bound_over_all.map(|sum| sum - capacity.priced_left(&dual.price)),
        origin,
        is_complete,
        is_cut_short,
        n_columns: items.iter().map(Item::len).sum(),
        price: dual.price,
    })
}

/// Returns the least cost of any choice of all columns there are, as far as the deadline allows.
///
/// Begins with the columns of the searches before. Returns `None` where nothing was found out.
pub(super) fn bound_over_all(instance: &Instance<'_>, deadline: Instant) -> Result<Option<f64>> {
    let Instance {
        problem,
        evidence,
        capacity,
        constraints,
        ..
    } = *instance;
    let shape = problem.shape;
    let charge = Charge::linear(instance.objective);
    let seconds = instance.depth.grid_s(0.0);
    let enumerator =
        ColumnEnumerator::new(shape, evidence, capacity, &charge, constraints, seconds);
    if !enumerator.prices_off_grid {
        return Ok(None);
    }
    let dense = columns::dense_items(shape, capacity, &charge, constraints);
    let Generated {
        mut items, dual, ..
    } = generate(instance, &enumerator, dense, &[], deadline)?;
    let pricer = Pricer {
        enumerator: &enumerator,
        pool: instance.pool,
    };
    let sum = pricer.bound_over_all(&mut items, &dual.price, BOUND_TOLERANCE, deadline);
    Ok(sum.map(|sum| sum - capacity.priced_left(&dual.price)))
}

/// Finds a choice near the bound: improves several starting points, then the best of those further.
pub(super) fn find_incumbent(
    master: &Master<'_>,
    known: Vec<Choice>,
    ending: Ending,
) -> Option<Choice> {
    let Ending {
        tolerance,
        deadline,
        ..
    } = ending;
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
        let is_good = least - bound_s <= tolerance * least;
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
    exchange_search(master, &ranked, improved, ending)
}

/// Improves the first choices by exchange search, side by side, and returns the best.
///
/// `choices` come cheapest first. Takes half of the time that is left.
fn exchange_search(
    master: &Master<'_>,
    ranked: &[Vec<PricedColumn>],
    choices: Vec<Choice>,
    ending: Ending,
) -> Option<Choice> {
    let first = choices.first()?;
    let gap_s = first.cost_s - master.dual.bound_s;
    if gap_s <= ending.tolerance * first.cost_s {
        return choices.into_iter().next();
    }
    let lists = exchange::CandidateLists::new(master, ranked, gap_s);
    let now = Instant::now();
    let deadline = now + ending.deadline.saturating_duration_since(now) / 2;
    let ending = Ending { deadline, ..ending };
    std::thread::scope(|scope| {
        let running: Vec<_> = choices
            .into_iter()
            .take(ending.choices)
            .map(|choice| spawn_or_run(scope, || exchange::exchange(&lists, choice, 1, ending)))
            .collect();
        let done = running.into_iter().filter_map(|thread| thread.join().ok());
        done.min_by(|a, b| a.cost_s.total_cmp(&b.cost_s))
    })
}

/// Adds columns around a choice's, which may go together where those at hand do not.
struct Widening<'a> {
    pricer: Pricer<'a>,
    capacity: &'a Capacity,
    ending: Ending,
}

impl Widening<'_> {
    /// Adds columns around the incumbent's, and improves it with them while its gap is wide.
    fn widen(
        &self,
        items: &mut [Item],
        dual: &mut DualSolution,
        mut incumbent: Option<Choice>,
    ) -> Result<Option<Choice>> {
        let Widening {
            capacity, ending, ..
        } = *self;
        for _ in 0..MAX_WIDENING_ROUNDS {
            let now = Instant::now();
            let left = ending.deadline.saturating_duration_since(now);
            let is_wide = |c: &mut Choice| {
                c.cost_s - dual.bound_s > ending.tolerance * c.cost_s && !left.is_zero()
            };
            let Some(choice) = incumbent.take_if(is_wide) else {
                break;
            };
            let (price, soon) = (&dual.price, now + left / 3);
            self.pricer.add_around(items, &choice.columns, price, soon);
            *dual = lagrangian::maximize(items, capacity, Some(&dual.price), now + left / 2)?;
            let master = Master {
                items,
                capacity,
                dual,
            };
            let ranked = master.reduced_costs(f64::INFINITY);
            incumbent = exchange_search(&master, &ranked, vec![choice], ending);
        }
        Ok(incumbent)
    }
}

/// The best choice known, the least cost of any, and where they came from.
struct Proof {
    choice: Option<Choice>,
    bound: f64,
    origin: Origin,
}

impl Proof {
    /// Whether the choice is not good enough yet.
    fn is_open(&self, ending: Ending) -> bool {
        self.choice
            .as_ref()
            .is_none_or(|c| c.cost_s - self.bound > ending.tolerance * c.cost_s)
    }
}

/// Closes what gap it can between a choice and the bound: by label setting, then by the MIP.
fn prove(
    master: &Master<'_>,
    is_complete: bool,
    ending: Ending,
    mut proof: Proof,
    backend: Backend,
) -> Proof {
    let deadline = ending.deadline;
    // On an incomplete list, far too many columns survive to prove more.
    if let (true, true, Some(known)) = (is_complete, proof.is_open(ending), &proof.choice) {
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
    // On an incomplete list, the integer program seldom finds more than exchange search has.
    let is_worth = is_complete && left_s > 0.0 || proof.choice.is_none();
    if proof.is_open(ending) && is_worth {
        let limits = Limits {
            max_columns: mip::MAX_COLUMNS,
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
