//! LP rounding: turns the fractional optimum of the master LP into integer choices.
//!
//! At the optimum of the LP no more members are split over columns than rows are scarce. So what
//! the LP gives whole is kept, and split members take a column that still fits. Exchange search
//! makes up for the rest.

use super::choice::{Choice, Master, PricedColumn};
use super::greedy;
use crate::profile::synthetic::Random;
use crate::solve::problem::columns::Item;
use good_lp::{
    Expression, Solution, SolverModel, Variable, constraint, microlp, variable, variables,
};
use std::time::Instant;

/// Cheapest columns per item that the LP takes.
const MAX_CHEAPEST_COLUMNS: usize = 16;

/// Further columns per item that the LP takes, each of other bytes than those before it.
const MAX_APART_COLUMNS: usize = 10;

/// Ways in which split members are rounded: none, the largest parts, then randomized.
const ROUNDINGS: usize = 6;

/// Part of a member that is rounding error.
const PART_TOLERANCE: f64 = 1e-6;

/// Penalty in the LP for capacity that is exceeded.
const EXCESS_PENALTY: f64 = 100.0;

/// The part of an item's members that the LP gives to a column.
#[derive(Debug, Clone, Copy)]
struct Part {
    item: usize,
    column: usize,
    members: f64,
}

/// Returns integer choices near the optimum of the master LP, the cheapest first.
///
/// `ranked` holds the reduced costs of all columns. Returns none if the LP has no optimum or there
/// is no time.
pub fn round(master: &Master<'_>, ranked: &[Vec<PricedColumn>], deadline: Instant) -> Vec<Choice> {
    if Instant::now() >= deadline {
        return Vec::new();
    }
    let Some(parts) = solve_master_lp(master, ranked) else {
        return Vec::new();
    };
    let (items, n) = (master.items, master.n_rows());
    let whole: Vec<Vec<usize>> = parts
        .iter()
        .map(|parts| {
            let times = |p: &Part| (p.members + PART_TOLERANCE) as usize;
            parts
                .iter()
                .flat_map(|p| std::iter::repeat_n(p.column, times(p)))
                .collect()
        })
        .collect();
    let mut left: Vec<i128> = master
        .capacity
        .left_bytes
        .iter()
        .map(|&b| i128::from(b))
        .collect();
    for (item, columns) in items.iter().zip(&whole) {
        for &column in columns {
            let bytes = item.column_bytes(column, n);
            left.iter_mut()
                .zip(bytes)
                .for_each(|(left, &b)| *left -= i128::from(b));
        }
    }
    let mut split: Vec<Part> = parts
        .iter()
        .flatten()
        .map(|&part| Part {
            members: (part.members + PART_TOLERANCE).fract(),
            ..part
        })
        .filter(|part| part.members > 2.0 * PART_TOLERANCE)
        .collect();
    split.sort_by(|a, b| {
        b.members
            .total_cmp(&a.members)
            .then((a.item, a.column).cmp(&(b.item, b.column)))
    });
    let mut random = Random::new(1);
    let mut choices: Vec<Choice> = Vec::new();
    let mut tried: Vec<Vec<Vec<usize>>> = Vec::new();
    for rounding in 0..ROUNDINGS {
        let (mut fixed, mut left) = (whole.clone(), left.clone());
        for part in &split {
            let bytes = items[part.item].column_bytes(part.column, n);
            let fits = bytes
                .iter()
                .zip(&left)
                .all(|(&b, &left)| i128::from(b) <= left);
            let takes = rounding == 1 || (rounding > 1 && random.unit() < part.members);
            if takes && fits && fixed[part.item].len() < items[part.item].count() {
                fixed[part.item].push(part.column);
                left.iter_mut()
                    .zip(bytes)
                    .for_each(|(left, &b)| *left -= i128::from(b));
            }
        }
        if !tried.contains(&fixed) {
            choices.extend(greedy::balanced(master, ranked, &fixed).into_iter().take(1));
            tried.push(fixed);
        }
    }
    choices.sort_by(|a, b| a.cost_s.total_cmp(&b.cost_s));
    choices
}

/// Solves the master LP. Returns `[items]` the parts that are not zero.
fn solve_master_lp(master: &Master<'_>, ranked: &[Vec<PricedColumn>]) -> Option<Vec<Vec<Part>>> {
    let Master {
        items,
        capacity,
        dual,
    } = *master;
    let n = master.n_rows();
    let unit = dual.bound_s.abs().max(1e-12);
    let mut vars = variables!();
    let mut objective = Expression::from(0.0);
    let mut used = vec![Expression::from(0.0); n];
    let mut chosen: Vec<Vec<(usize, Variable)>> = Vec::with_capacity(items.len());
    for (item, ranked) in items.iter().zip(ranked) {
        let columns = lp_columns(item, ranked, n);
        let least = columns
            .iter()
            .map(|&c| item.cost_s[c])
            .fold(f64::INFINITY, f64::min);
        let of_item = columns.into_iter().map(|column| {
            let var = vars.add(variable().min(0));
            objective += var * ((item.cost_s[column] - least) / unit);
            let rows = used.iter_mut().zip(item.column_bytes(column, n));
            for ((used, &bytes), &left) in rows.zip(&capacity.left_bytes) {
                if bytes > 0 {
                    *used += var * (bytes as f64 / left.max(1) as f64);
                }
            }
            (column, var)
        });
        chosen.push(of_item.collect());
    }
    // The columns taken may not fit together where the prices are inexact, so capacity may be
    // exceeded at a penalty.
    let excess: Vec<Variable> = (0..n).map(|_| vars.add(variable().min(0))).collect();
    excess
        .iter()
        .for_each(|&excess| objective += excess * EXCESS_PENALTY);
    let mut program = vars.minimise(objective).using(microlp);
    for (item, columns) in items.iter().zip(&chosen) {
        let sum = columns.iter().map(|&(_, var)| var).sum::<Expression>();
        program.add_constraint(constraint!(sum == item.count() as f64));
    }
    for (used, excess) in used.into_iter().zip(excess) {
        program.add_constraint(constraint!(used - excess <= 1.0));
    }
    let solution = program.solve().ok()?;
    let parts_of = |(item, columns): (usize, &Vec<(usize, Variable)>)| {
        let parts = columns.iter().map(|&(column, var)| Part {
            item,
            column,
            members: solution.value(var),
        });
        parts.filter(|part| part.members > PART_TOLERANCE).collect()
    };
    Some(chosen.iter().enumerate().map(parts_of).collect())
}

/// Returns the cheapest columns of an item, and further ones of other bytes than all before.
fn lp_columns(item: &Item, ranked: &[PricedColumn], n_rows: usize) -> Vec<usize> {
    let mut columns: Vec<usize> = ranked
        .iter()
        .take(MAX_CHEAPEST_COLUMNS)
        .map(|c| c.column)
        .collect();
    let is_apart = item.apart(n_rows);
    for candidate in ranked.iter().skip(MAX_CHEAPEST_COLUMNS) {
        if columns.len() >= MAX_CHEAPEST_COLUMNS + MAX_APART_COLUMNS {
            break;
        }
        if columns
            .iter()
            .all(|&other| is_apart(candidate.column, other))
        {
            columns.push(candidate.column);
        }
    }
    columns
}
