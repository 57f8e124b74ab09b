//! From the linear program's optimum, which gives parts of members to several columns, to whole choices.
//!
//! At the optimum no more members are divided than there are rows that can run out. So what it gives whole is taken, the
//! divided members are given a column that still fits, and [`polish`](super::polish) makes up for the rest.

use super::columns::Item;
use super::dual::Dual;
use super::room::Room;
use super::search::{self, Choice};
use crate::profile::synthetic::Random;
use good_lp::{Expression, Solution, SolverModel, Variable, constraint, microlp, variable, variables};
use std::time::Instant;

/// Columns of an item that the program takes: the cheapest, and others with other bytes.
const CHEAPEST: usize = 16;
const APART: usize = 10;

/// Ways in which divided members are made whole.
const WAYS: usize = 6;

/// A part of a member that is rounding.
const WHOLE: f64 = 1e-6;

/// Whole choices near the optimum of the linear program; none if it has none, or there is no time. `ranked` is what
/// [`search::ranked`] says of all columns.
pub fn choices(
    items: &[Item],
    room: &Room,
    dual: &Dual,
    ranked: &[Vec<(usize, f64)>],
    deadline: Instant,
) -> Vec<Choice> {
    if Instant::now() >= deadline {
        return Vec::new();
    }
    let Some(parts) = optimum(items, room, dual, ranked) else { return Vec::new() };
    let whole: Vec<Vec<usize>> = parts
        .iter()
        .map(|p| p.iter().flat_map(|&(c, x)| std::iter::repeat_n(c, (x + WHOLE) as usize)).collect())
        .collect();
    let n = room.left_bytes.len();
    let mut left: Vec<i128> = room.left_bytes.iter().map(|&b| i128::from(b)).collect();
    for (item, columns) in items.iter().zip(&whole) {
        for &column in columns {
            left.iter_mut().zip(item.column_bytes(column, n)).for_each(|(l, &b)| *l -= i128::from(b));
        }
    }
    // Columns of divided members, the largest part first.
    let mut divided: Vec<(usize, usize, f64)> = parts
        .iter()
        .enumerate()
        .flat_map(|(item, p)| p.iter().map(move |&(c, x)| (item, c, (x + WHOLE).fract())))
        .filter(|&(_, _, part)| part > 2.0 * WHOLE)
        .collect();
    divided.sort_by(|a, b| b.2.total_cmp(&a.2).then((a.0, a.1).cmp(&(b.0, b.1))));
    let mut random = Random::new(1);
    let mut found: Vec<Choice> = Vec::new();
    let mut tried: Vec<Vec<Vec<usize>>> = Vec::new();
    for way in 0..WAYS {
        // First none of them, then by the largest part, then by chance.
        let (mut fixed, mut left) = (whole.clone(), left.clone());
        for &(item, column, part) in &divided {
            let bytes = items[item].column_bytes(column, n);
            let fits = bytes.iter().zip(&left).all(|(&b, &l)| i128::from(b) <= l);
            let wanted = way == 1 || (way > 1 && random.unit() < part);
            if wanted && fits && fixed[item].len() < items[item].count() {
                fixed[item].push(column);
                left.iter_mut().zip(bytes).for_each(|(l, &b)| *l -= i128::from(b));
            }
        }
        if !tried.contains(&fixed) {
            found.extend(search::even(items, room, dual, ranked, &fixed).into_iter().take(1));
            tried.push(fixed);
        }
    }
    found.sort_by(|a, b| a.cost_s.total_cmp(&b.cost_s));
    found
}

/// `[items]` columns with how many members the linear program gives to each.
fn optimum(items: &[Item], room: &Room, dual: &Dual, ranked: &[Vec<(usize, f64)>]) -> Option<Vec<Vec<(usize, f64)>>> {
    let n = room.left_bytes.len();
    let unit = dual.bound_s.abs().max(1e-12);
    let mut vars = variables!();
    let mut objective = Expression::from(0.0);
    let mut used = vec![Expression::from(0.0); n];
    let mut chosen: Vec<Vec<(usize, Variable)>> = Vec::with_capacity(items.len());
    for (item, ranked) in items.iter().zip(ranked) {
        let columns = some(item, ranked, n);
        let least = columns.iter().map(|&c| item.cost_s[c]).fold(f64::INFINITY, f64::min);
        let of_item = columns.into_iter().map(|column| {
            let var = vars.add(variable().min(0));
            objective += var * ((item.cost_s[column] - least) / unit);
            for ((used, &bytes), &left) in used.iter_mut().zip(item.column_bytes(column, n)).zip(&room.left_bytes) {
                if bytes > 0 {
                    *used += var * (bytes as f64 / left.max(1) as f64);
                }
            }
            (column, var)
        });
        chosen.push(of_item.collect());
    }
    // The columns taken may not fit together where the prices are not exact; what is over is to be little.
    let over: Vec<Variable> = (0..n).map(|_| vars.add(variable().min(0))).collect();
    over.iter().for_each(|&over| objective += over * 100.0);
    let mut program = vars.minimise(objective).using(microlp);
    for (item, columns) in items.iter().zip(&chosen) {
        let sum = columns.iter().map(|&(_, var)| var).sum::<Expression>();
        program.add_constraint(constraint!(sum == item.count() as f64));
    }
    for (used, over) in used.into_iter().zip(over) {
        program.add_constraint(constraint!(used - over <= 1.0));
    }
    let solution = program.solve().ok()?;
    let parts = |columns: &Vec<(usize, Variable)>| {
        columns.iter().map(|&(c, var)| (c, solution.value(var))).filter(|&(_, x)| x > WHOLE).collect()
    };
    Some(chosen.iter().map(parts).collect())
}

/// The cheapest columns of an item, and further ones each of other bytes than all before.
fn some(item: &Item, ranked: &[(usize, f64)], n: usize) -> Vec<usize> {
    let mut found: Vec<usize> = ranked.iter().take(CHEAPEST).map(|&(c, _)| c).collect();
    let largest = item.bytes.iter().copied().max().unwrap_or(0);
    let far = |a: usize, b: usize| {
        let pairs = item.column_bytes(a, n).iter().zip(item.column_bytes(b, n));
        pairs.into_iter().any(|(a, b)| a.abs_diff(*b) > largest / 64)
    };
    for &(column, _) in ranked.iter().skip(CHEAPEST) {
        if found.len() >= CHEAPEST + APART {
            break;
        }
        if found.iter().all(|&other| far(column, other)) {
            found.push(column);
        }
    }
    found
}
