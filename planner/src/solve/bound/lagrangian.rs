//! The Lagrangian bound: dual prices of bytes, and the lower bound that they prove.
//!
//! With a price `λ` on every byte of each tier, the items separate. Each takes its cheapest column,
//! and `L(λ) = Σ items min (cost + λ · bytes) − λ · left` is below every feasible choice, integer
//! or not. Its maximum is the optimum of the LP relaxation over all columns, so pricing whole items
//! replaces listing them in a program. This is column generation from the dual side (Dantzig–Wolfe
//! decomposition).
//!
//! `L` is concave with few variables, one per tier. Kelley's cutting-plane method maximizes it; its
//! master problem is an LP of a handful of variables.

use crate::solve::problem::capacity::Capacity;
use crate::solve::problem::columns::Item;
use anyhow::{Context, Result};
use good_lp::{Expression, Solution, SolverModel, constraint, microlp, variable, variables};
use std::time::Instant;

/// Cutting planes at most.
const MAX_CUTS: usize = 400;

/// Relative difference between model and bound at which the maximum is exact to rounding.
const TOLERANCE: f64 = 1e-11;

/// Largest price at first, in units of the whole bound per tier.
const FIRST_MAX_PRICE: f64 = 4.0;

/// Factor by which the largest price grows where a price reaches it.
const MAX_PRICE_GROWTH: f64 = 16.0;

/// Largest price ever tried, in those units.
const LAST_MAX_PRICE: f64 = 1e7;

/// Dual prices and the bound that they prove.
#[derive(Debug, Clone, PartialEq)]
pub struct DualSolution {
    /// `[tiers]` seconds per byte.
    pub price: Vec<f64>,
    /// Least cost of any choice of columns, in seconds.
    pub bound_s: f64,
}

/// The bound at some prices, with its slope.
struct Relaxation {
    value_s: f64,
    /// `[tiers]` bytes that the cheapest columns take together.
    used: Vec<f64>,
}

/// A cutting plane, in scaled prices.
struct Cut {
    value: f64,
    point: Vec<f64>,
    slope: Vec<f64>,
}

fn relax(items: &[Item], capacity: &Capacity, price: &[f64]) -> Relaxation {
    let n = capacity.left_bytes.len();
    let mut relaxed = Relaxation {
        value_s: 0.0,
        used: vec![0.0; n],
    };
    for item in items {
        if let Some((column, value)) = item.cheapest(price) {
            let count = item.count() as f64;
            relaxed.value_s += count * value;
            for (used, &bytes) in relaxed.used.iter_mut().zip(item.column_bytes(column, n)) {
                *used += count * bytes as f64;
            }
        }
    }
    let left = price.iter().zip(&capacity.left_bytes);
    relaxed.value_s -= left.map(|(p, &left)| p * left as f64).sum::<f64>();
    relaxed
}

/// Returns the bound at given prices, which holds at any prices that are not negative.
pub fn bound_at(items: &[Item], capacity: &Capacity, price: &[f64]) -> f64 {
    relax(items, capacity, price).value_s
}

/// Maximizes the bound until it is exact to rounding, or the deadline passes.
///
/// The result is no worse than at the prices in `start`, if there are any.
///
/// # Errors
/// Fails if the prices are not finite.
pub fn maximize(
    items: &[Item],
    capacity: &Capacity,
    start: Option<&[f64]>,
    deadline: Instant,
) -> Result<DualSolution> {
    let n = capacity.left_bytes.len();
    let first = relax(items, capacity, &vec![0.0; n]);
    let mut best = DualSolution {
        price: vec![0.0; n],
        bound_s: first.value_s,
    };
    // Prices are scaled to seconds for the whole of a tier, in units of the time at free bytes.
    // Where that is zero, the unit is a part of the largest cost there can be.
    let dearest =
        |item: &Item| item.count() as f64 * item.cost_s.iter().copied().fold(0.0, f64::max);
    let unit = first
        .value_s
        .max(1e-6 * items.iter().map(dearest).sum::<f64>())
        .max(1e-12);
    let rows: Vec<usize> = (0..n).filter(|&t| capacity.left_bytes[t] > 0).collect();
    let left = |t: usize| capacity.left_bytes[t] as f64;
    let cut = |relaxed: &Relaxation, point: Vec<f64>| Cut {
        value: relaxed.value_s / unit,
        point,
        slope: rows
            .iter()
            .map(|&t| relaxed.used[t] / left(t) - 1.0)
            .collect(),
    };
    let mut cuts = vec![cut(&first, vec![0.0; rows.len()])];
    if let Some(price) = start {
        let relaxed = relax(items, capacity, price);
        let point = rows.iter().map(|&t| price[t] * left(t) / unit).collect();
        cuts.push(cut(&relaxed, point));
        if relaxed.value_s > best.bound_s {
            best = DualSolution {
                price: price.to_vec(),
                bound_s: relaxed.value_s,
            };
        }
    }
    let mut max_price = FIRST_MAX_PRICE;
    for _ in 0..MAX_CUTS {
        if Instant::now() >= deadline {
            break;
        }
        let Some(model) = maximize_model(&cuts, rows.len(), max_price) else {
            break;
        };
        let is_exact = model.value - best.bound_s / unit <= TOLERANCE * model.value.abs().max(1.0);
        if is_exact {
            if max_price >= LAST_MAX_PRICE || model.point.iter().all(|&p| p < 0.99 * max_price) {
                break;
            }
            max_price *= MAX_PRICE_GROWTH;
            continue;
        }
        let mut price = vec![0.0; n];
        rows.iter()
            .zip(&model.point)
            .for_each(|(&t, p)| price[t] = p * unit / left(t));
        let relaxed = relax(items, capacity, &price);
        cuts.push(cut(&relaxed, model.point));
        if relaxed.value_s > best.bound_s {
            best = DualSolution {
                price,
                bound_s: relaxed.value_s,
            };
        }
    }
    let finite = best.bound_s.is_finite().then_some(best);
    finite.context("the prices of bytes came out infinite: a rate is out of range")
}

/// The maximum of the cutting-plane model.
struct ModelOptimum {
    value: f64,
    point: Vec<f64>,
}

fn maximize_model(cuts: &[Cut], n_rows: usize, max_price: f64) -> Option<ModelOptimum> {
    let mut vars = variables!();
    let top = vars.add(variable());
    let prices: Vec<_> = (0..n_rows)
        .map(|_| vars.add(variable().min(0).max(max_price)))
        .collect();
    let mut master = vars.maximise(top).using(microlp);
    for Cut {
        value,
        point,
        slope,
    } in cuts
    {
        let mut line = Expression::from(*value);
        for ((&price, at), slope) in prices.iter().zip(point).zip(slope) {
            line += (price - *at) * *slope;
        }
        master.add_constraint(constraint!(top <= line));
    }
    let solution = master.solve().ok()?;
    let point = prices
        .iter()
        .map(|&p| solution.value(p).clamp(0.0, max_price))
        .collect();
    Some(ModelOptimum {
        value: solution.value(top),
        point,
    })
}
