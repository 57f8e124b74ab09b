//! The integer program itself: one column for each item's member, bytes within every tier, least time.
//!
//! It is stated through good_lp and solved by microlp over the columns that matter. Which those are is proven, not
//! guessed: with prices whose bound is `L`, a choice that uses a column `above` its item's cheapest costs at least
//! `L + above`. Columns for which that is more than a known choice costs cannot be part of a better one.

use super::columns::Item;
use super::dual::Dual;
use super::room::Room;
use super::search::{Choice, ranked};
use good_lp::solvers::WithInitialSolution;
use good_lp::{
    Expression, Solution, SolutionStatus, SolverModel, WithTimeLimit, constraint, microlp, variable, variables,
};

/// Columns that the program takes at most. Beyond, nothing would be proven, so a known choice is left as it is; without
/// one the cheapest columns are taken.
const MAX_COLUMNS: usize = 3000;

/// What the program found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The best choice it found, if any fits.
    pub choice: Option<Choice>,
    /// No choice of any columns is better than `choice` (or than the known one, if there is none).
    pub proven: bool,
}

/// Solves the program, starting from a known choice if there is one.
pub fn solve(items: &[Item], room: &Room, dual: &Dual, known: Option<&Choice>, seconds: f64) -> Found {
    let unit = known.map_or(dual.bound_s, |k| k.cost_s).abs().max(1e-12);
    let most = known.map_or(f64::INFINITY, |k| (k.cost_s - dual.bound_s).max(0.0) + 1e-9 * unit);
    let mut kept = ranked(items, room, dual, most);
    let total: usize = kept.iter().map(Vec::len).sum();
    let complete = total <= MAX_COLUMNS;
    if !complete && known.is_some() {
        return Found { choice: None, proven: false };
    }
    if !complete {
        let mut above: Vec<f64> = kept.iter().flatten().map(|&(_, above)| above).collect();
        above.sort_by(f64::total_cmp);
        let limit = above[MAX_COLUMNS];
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
    let mut program = vars.minimise(objective).using(microlp).with_time_limit(seconds.max(0.01));
    for (vars, item) in chosen.iter().zip(items) {
        program.add_constraint(constraint!(vars.iter().sum::<Expression>() == item.count() as f64));
    }
    for used in used {
        program.add_constraint(constraint!(used <= 1.0));
    }
    if known.is_some() {
        program = program.with_initial_solution(start);
    }
    let Ok(solution) = program.solve() else { return Found { choice: None, proven: false } };
    let columns: Vec<Vec<usize>> = chosen
        .iter()
        .zip(&kept)
        .map(|(vars, columns)| {
            let times = |&var| solution.value(var).round().max(0.0) as usize;
            vars.iter().zip(columns).flat_map(|(var, &(c, _))| std::iter::repeat_n(c, times(var))).collect()
        })
        .collect();
    let whole = columns.iter().zip(items).all(|(columns, item)| columns.len() == item.count());
    // The solver's arithmetic is inexact; whether the bytes fit is not.
    let choice = whole.then(|| Choice::new(items, room, columns)).flatten();
    let proven = complete && choice.is_some() && matches!(solution.status(), SolutionStatus::Optimal);
    Found { choice, proven }
}
