//! The Lagrangian dual: prices for bytes, and with them a proven bound.
//!
//! With a price λ on every byte of each tier, the items come apart: each takes its cheapest column, and
//! `L(λ) = Σ items min (cost + λ · bytes) − λ · left` is below every feasible choice, integer or not. Its maximum is
//! the optimum of the linear relaxation over *all* columns, so pricing whole items stands in for listing them in a
//! program: this is column generation seen from the dual side. `L` is concave with few variables (one a tier) and is
//! maximised by cutting planes; the master problem is a linear program of a handful of variables.

use super::columns::Item;
use super::room::{MAX_ROWS, Room};
use anyhow::{Context, Result};
use good_lp::{Expression, Solution, SolverModel, constraint, microlp, variable, variables};
use std::time::Instant;

/// Prices and the bound they prove.
#[derive(Debug, Clone, PartialEq)]
pub struct Dual {
    /// `[tiers]` seconds a byte.
    pub price: Vec<f64>,
    /// No choice of columns costs less, in seconds.
    pub bound_s: f64,
}

/// The cheapest columns under some prices.
struct Priced {
    value_s: f64,
    /// `[tiers]` bytes that the cheapest columns take together.
    used: Vec<f64>,
}

/// The column of an item with the least cost and priced bytes, and that sum.
pub fn cheapest(item: &Item, price: &[f64]) -> Option<(usize, f64)> {
    let mut padded = [0.0; MAX_ROWS];
    padded[..price.len()].copy_from_slice(price);
    let mut best: Option<(usize, f64)> = None;
    for (at, (&cost, bytes)) in item.cost_s.iter().zip(item.bytes.chunks_exact(price.len().max(1))).enumerate() {
        let value = cost + bytes.iter().zip(&padded).map(|(&b, p)| b as f64 * p).sum::<f64>();
        if best.is_none_or(|(_, least)| value < least) {
            best = Some((at, value));
        }
    }
    best
}

fn price_all(items: &[Item], room: &Room, price: &[f64]) -> Priced {
    let n = room.left_bytes.len();
    let mut priced = Priced { value_s: 0.0, used: vec![0.0; n] };
    for item in items {
        if let Some((column, value)) = cheapest(item, price) {
            let count = item.count() as f64;
            priced.value_s += count * value;
            for (used, &bytes) in priced.used.iter_mut().zip(item.column_bytes(column, n)) {
                *used += count * bytes as f64;
            }
        }
    }
    priced.value_s -= price.iter().zip(&room.left_bytes).map(|(p, &left)| p * left as f64).sum::<f64>();
    priced
}

/// `L` at given prices, which is a bound at any prices that are not negative.
pub fn bound_at(items: &[Item], room: &Room, price: &[f64]) -> f64 {
    price_all(items, room, price).value_s
}

/// Maximises the bound until it is exact to rounding, or the deadline passes. It is no worse than at the prices to
/// start from, if there are any.
pub fn maximise(items: &[Item], room: &Room, start: Option<&[f64]>, deadline: Instant) -> Result<Dual> {
    let n = room.left_bytes.len();
    let first = price_all(items, room, &vec![0.0; n]);
    let mut best = Dual { price: vec![0.0; n], bound_s: first.value_s };
    // Prices are handled as seconds for the whole of a tier, in units of the free-of-charge time, or where that is nothing
    // of what there could be.
    let dearest = |item: &Item| item.count() as f64 * item.cost_s.iter().copied().fold(0.0, f64::max);
    let unit = first.value_s.max(1e-6 * items.iter().map(dearest).sum::<f64>()).max(1e-12);
    let rows: Vec<usize> = (0..n).filter(|&t| room.left_bytes[t] > 0).collect();
    let over = |used: &[f64]| -> Vec<f64> { rows.iter().map(|&t| used[t] / room.left_bytes[t] as f64 - 1.0).collect() };
    // Each cut: value, point, slope, in those units.
    let mut cuts = vec![(first.value_s / unit, vec![0.0; rows.len()], over(&first.used))];
    if let Some(price) = start {
        let priced = price_all(items, room, price);
        let at = rows.iter().map(|&t| price[t] * room.left_bytes[t] as f64 / unit).collect();
        cuts.push((priced.value_s / unit, at, over(&priced.used)));
        if priced.value_s > best.bound_s {
            best = Dual { price: price.to_vec(), bound_s: priced.value_s };
        }
    }
    let mut reach = 4.0;
    for _ in 0..400 {
        if Instant::now() >= deadline {
            break;
        }
        let mut vars = variables!();
        let top = vars.add(variable());
        let prices: Vec<_> = rows.iter().map(|_| vars.add(variable().min(0).max(reach))).collect();
        let mut master = vars.maximise(top).using(microlp);
        for (value, at, slope) in &cuts {
            let mut line = Expression::from(*value);
            for ((&price, at), slope) in prices.iter().zip(at).zip(slope) {
                line += (price - *at) * *slope;
            }
            master.add_constraint(constraint!(top <= line));
        }
        let Ok(solution) = master.solve() else { break };
        let model = solution.value(top);
        let at: Vec<f64> = prices.iter().map(|&p| solution.value(p).clamp(0.0, reach)).collect();
        let close = model - best.bound_s / unit <= 1e-11 * model.abs().max(1.0);
        if close {
            if reach >= 1e7 || at.iter().all(|&p| p < 0.99 * reach) {
                break;
            }
            reach *= 16.0;
            continue;
        }
        let mut price = vec![0.0; n];
        rows.iter().zip(&at).for_each(|(&t, p)| price[t] = p * unit / room.left_bytes[t] as f64);
        let priced = price_all(items, room, &price);
        cuts.push((priced.value_s / unit, at, over(&priced.used)));
        if priced.value_s > best.bound_s {
            best = Dual { price, bound_s: priced.value_s };
        }
    }
    best.bound_s.is_finite().then_some(best).context("the prices of bytes came out infinite: a rate is out of range")
}
