//! The integer program itself: one column for each item's member, bytes within every tier, least time.
//!
//! It is stated through good_lp and solved by microlp, or by HiGHS, over the columns that matter. Which those are is proven, not
//! guessed: with prices whose bound is `L`, a choice that uses a column `above` its item's cheapest costs at least
//! `L + above`. Columns for which that is more than a known choice costs cannot be part of a better one.

use super::columns::Item;
use super::dual::Dual;
use super::room::Room;
use super::search::{Choice, ranked};
use crate::solve::options::Backend;
use good_lp::solvers::WithInitialSolution;
use good_lp::{
    Constraint, Expression, Solution, SolutionStatus, SolverModel, Variable, WithTimeLimit, constraint, microlp,
    variable, variables,
};

/// Columns that the program takes at most.
pub const MAX_COLUMNS: usize = 3000;

/// What the program found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The best choice it found, if any fits.
    pub choice: Option<Choice>,
    /// No choice of any columns is better than `choice` (or than the known one, if there is none).
    pub proven: bool,
}

/// Solves the program, starting from a known choice if there is one. Of more than `most` columns in question nothing would be
/// proven, so a known choice is left as it is; without one the cheapest columns are taken.
pub fn solve(
    items: &[Item],
    room: &Room,
    dual: &Dual,
    known: Option<&Choice>,
    most: usize,
    seconds: f64,
    backend: Backend,
) -> Found {
    let unit = known.map_or(dual.bound_s, |k| k.cost_s).abs().max(1e-12);
    let above = known.map_or(f64::INFINITY, |k| (k.cost_s - dual.bound_s).max(0.0) + 1e-9 * unit);
    let mut kept = ranked(items, room, dual, above);
    let total: usize = kept.iter().map(Vec::len).sum();
    let most = if known.is_some() { most } else { MAX_COLUMNS };
    let complete = total <= most;
    if !complete && known.is_some() {
        return Found { choice: None, proven: false };
    }
    if !complete {
        let mut above: Vec<f64> = kept.iter().flatten().map(|&(_, above)| above).collect();
        above.sort_by(f64::total_cmp);
        let limit = above[most];
        kept.iter_mut().for_each(|columns| columns.retain(|&(_, a)| a < limit));
    }
    for (item, columns) in kept.iter_mut().enumerate() {
        for &column in known.map_or(&[][..], |k| &k.columns[item]) {
            if !columns.iter().any(|&(c, _)| c == column) {
                columns.push((column, 0.0));
            }
        }
        if columns.is_empty() {
            return Found { choice: None, proven: false };
        }
    }

    let mut vars = variables!();
    let n = room.left_bytes.len();
    let mut objective = Expression::from(0.0);
    let mut used = vec![Expression::from(0.0); n];
    let mut chosen = Vec::with_capacity(items.len());
    let mut start = Vec::new();
    for (at, (item, columns)) in items.iter().zip(&kept).enumerate() {
        // Costs are stated above the item's least one: the differences are what the solver's tolerances should see.
        let least = columns.iter().map(|&(c, _)| item.cost_s[c]).fold(f64::INFINITY, f64::min);
        let of_item: Vec<_> = columns
            .iter()
            .map(|&(column, _)| {
                let var = vars.add(variable().integer().min(0).max(item.count() as f64));
                objective += var * ((item.cost_s[column] - least) / unit);
                for (tier, used) in used.iter_mut().enumerate() {
                    let bytes = item.column_bytes(column, n)[tier];
                    if bytes > 0 {
                        *used += var * (bytes as f64 / room.left_bytes[tier] as f64);
                    }
                }
                if let Some(known) = known {
                    start.push((var, known.columns[at].iter().filter(|&&c| c == column).count() as f64));
                }
                var
            })
            .collect();
        chosen.push(of_item);
    }
    let whole = chosen.iter().zip(items).map(|(vars, item)| {
        let sum = vars.iter().sum::<Expression>();
        constraint!(sum == item.count() as f64)
    });
    let rows: Vec<Constraint> = whole.chain(used.into_iter().map(|used| constraint!(used <= 1.0))).collect();
    let problem = vars.minimise(objective);
    let start = known.is_some().then_some(start);
    let found = match backend {
        Backend::Microlp => run(problem.using(microlp), rows, start, seconds, &chosen),
        #[cfg(feature = "highs")]
        Backend::Highs => {
            // What it calls optimal is to be that, and its bytes are to fit.
            let exact = ["mip_rel_gap", "mip_abs_gap"].map(|key| (key, 0.0));
            let close = ["primal_feasibility_tolerance", "mip_feasibility_tolerance"].map(|key| (key, 1e-9));
            let program = exact
                .into_iter()
                .chain(close)
                .fold(problem.using(good_lp::highs), |program, (key, value)| program.set_option(key, value));
            run(program, rows, start, seconds, &chosen)
        }
    };
    let Some((values, optimal)) = found else { return Found { choice: None, proven: false } };
    let columns: Vec<Vec<usize>> = values
        .iter()
        .zip(&kept)
        .map(|(values, columns)| {
            let times = |value: f64| value.round().max(0.0) as usize;
            values.iter().zip(columns).flat_map(|(&v, &(c, _))| std::iter::repeat_n(c, times(v))).collect()
        })
        .collect();
    let whole = columns.iter().zip(items).all(|(columns, item)| columns.len() == item.count());
    // The solver's arithmetic is inexact; whether the bytes fit is not.
    let choice = whole.then(|| Choice::new(items, room, columns)).flatten();
    let proven = complete && choice.is_some() && optimal;
    Found { choice, proven }
}

/// Runs a solver: the values of the variables, and whether it calls them optimal.
fn run<M: SolverModel + WithTimeLimit + WithInitialSolution>(
    program: M,
    rows: Vec<Constraint>,
    start: Option<Vec<(Variable, f64)>>,
    seconds: f64,
    chosen: &[Vec<Variable>],
) -> Option<(Vec<Vec<f64>>, bool)> {
    let mut program = program.with_time_limit(seconds.max(0.01));
    for row in rows {
        program.add_constraint(row);
    }
    if let Some(start) = start {
        program = program.with_initial_solution(start);
    }
    let solution = program.solve().ok()?;
    let values = chosen.iter().map(|vars| vars.iter().map(|&var| solution.value(var)).collect()).collect();
    Some((values, matches!(solution.status(), SolutionStatus::Optimal)))
}
