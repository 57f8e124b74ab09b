//! Greedy construction and single-change local search.
//!
//! [`by_price`] takes every item's cheapest column at prices raised until the bytes fit.
//! [`balanced`] takes, item by item, a cheap column whose bytes are near the item's share of what
//! is left. [`improve`] exchanges columns of one member, then of pairs, to spend the last bytes.

use super::choice::{Choice, Master, PricedColumn, used_bytes};
use crate::solve::problem::columns::Item;
use std::collections::{HashMap, HashSet};
use std::time::Instant;

/// Columns per item that pairs are tried with.
const MAX_SHORTLIST: usize = 48;

/// Least gain that counts, relative to the cost.
const MIN_RELATIVE_GAIN: f64 = 1e-13;

/// Factors on the dual prices, tried in turn until two choices fit.
const PRICE_FACTORS: [f64; 10] = [1.0, 1.001, 1.01, 1.03, 1.1, 1.3, 2.0, 5.0, 30.0, 1e3];

/// Weights of a byte beside the even share, as a part of its price, each tried.
const IMBALANCE_WEIGHTS: [f64; 4] = [0.01, 0.05, 0.2, 0.6];

/// Columns of an item that are scored for an even share, once one is found that fits.
const MAX_SCORED_COLUMNS: usize = 4000;

/// Returns choices of every item's cheapest columns, at prices raised until they fit.
pub fn by_price(master: &Master<'_>) -> Vec<Choice> {
    let mut choices = Vec::new();
    for factor in PRICE_FACTORS {
        let price: Vec<f64> = master.dual.price.iter().map(|p| p * factor).collect();
        let cheapest = |item: &Item| item.cheapest(&price).map(|(c, _)| vec![c; item.count()]);
        let columns: Option<Vec<Vec<usize>>> = master.items.iter().map(cheapest).collect();
        choices.extend(
            columns.and_then(|columns| Choice::new(master.items, master.capacity, columns)),
        );
        if choices.len() == 2 {
            break;
        }
    }
    choices
}

/// Returns choices that use up every tier, the cheapest first.
///
/// Where many columns are nearly as cheap, this finds those that go together. `ranked` holds the
/// reduced costs of all columns. `fixed` is `[items]` columns of members that are settled, or
/// empty.
pub fn balanced(
    master: &Master<'_>,
    ranked: &[Vec<PricedColumn>],
    fixed: &[Vec<usize>],
) -> Vec<Choice> {
    let Master {
        items, capacity, ..
    } = *master;
    let balance = Balance::new(master, ranked, fixed);
    let mut choices: Vec<Choice> = IMBALANCE_WEIGHTS
        .iter()
        .filter_map(|&weight| balance.columns(weight))
        .filter_map(|columns| Choice::new(items, capacity, columns))
        .collect();
    choices.sort_by(|a, b| a.cost_s.total_cmp(&b.cost_s));
    choices
}

/// What the balanced construction knows before it begins.
struct Balance<'a> {
    master: &'a Master<'a>,
    ranked: &'a [Vec<PricedColumn>],
    fixed: &'a [Vec<usize>],
    /// `[items][rows]` least bytes of any column.
    least_bytes: Vec<Vec<u64>>,
    /// `[items]` priced bytes of the cheapest column.
    cheapest_bytes_s: Vec<f64>,
    /// Items with the fewest columns first; the others make up for them.
    order: Vec<usize>,
}

impl<'a> Balance<'a> {
    fn new(
        master: &'a Master<'a>,
        ranked: &'a [Vec<PricedColumn>],
        fixed: &'a [Vec<usize>],
    ) -> Self {
        let (items, n) = (master.items, master.n_rows());
        let least_of = |item: &Item, t: usize| {
            (0..item.len())
                .map(|c| item.column_bytes(c, n)[t])
                .min()
                .unwrap_or(0)
        };
        let least_bytes = items
            .iter()
            .map(|i| (0..n).map(|t| least_of(i, t)).collect())
            .collect();
        let cheapest_bytes_s = items.iter().zip(ranked).map(|(item, ranked)| {
            ranked.first().map_or(0.0, |c| {
                let bytes = item
                    .column_bytes(c.column, n)
                    .iter()
                    .zip(&master.dual.price);
                bytes.map(|(&b, p)| b as f64 * p).sum::<f64>()
            })
        });
        let cheapest_bytes_s = cheapest_bytes_s.collect();
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.sort_by_key(|&i| (items[i].len(), i));
        Balance {
            master,
            ranked,
            fixed,
            least_bytes,
            cheapest_bytes_s,
            order,
        }
    }

    fn fixed(&self, item: usize) -> &[usize] {
        self.fixed.get(item).map_or(&[][..], Vec::as_slice)
    }

    /// Returns the members of an item that still need a column.
    fn open(&self, item: usize) -> usize {
        self.master.items[item]
            .count()
            .saturating_sub(self.fixed(item).len())
    }

    /// Builds `[items][members]` columns for one weight. Returns `None` if a member finds none.
    fn columns(&self, weight: f64) -> Option<Vec<Vec<usize>>> {
        let (items, n) = (self.master.items, self.master.n_rows());
        let mut columns: Vec<Vec<usize>> =
            (0..items.len()).map(|i| self.fixed(i).to_vec()).collect();
        let mut left: Vec<f64> = self
            .master
            .capacity
            .left_bytes
            .iter()
            .map(|&b| b as f64)
            .collect();
        for (item, columns) in items.iter().zip(&columns) {
            for &column in columns {
                left.iter_mut()
                    .zip(item.column_bytes(column, n))
                    .for_each(|(l, &b)| *l -= b as f64);
            }
        }
        // `[rows]` bytes that the open members need at least.
        let needed = |t: usize| {
            let least = self.least_bytes.iter().enumerate();
            least.map(|(i, l)| self.open(i) as f64 * l[t] as f64).sum()
        };
        let mut need: Vec<f64> = (0..n).map(needed).collect();
        let mut rest_s: f64 = (0..items.len())
            .map(|i| self.open(i) as f64 * self.cheapest_bytes_s[i])
            .sum();
        for &item in &self.order {
            let cheapest_s = self.cheapest_bytes_s[item];
            for _ in 0..self.open(item) {
                let share = if rest_s > 0.0 {
                    (cheapest_s / rest_s).min(1.0)
                } else {
                    1.0
                };
                (0..n).for_each(|t| need[t] -= self.least_bytes[item][t] as f64);
                let column = self.best_column(item, weight, share, &left, &need)?;
                let bytes = items[item].column_bytes(column, n);
                (0..n).for_each(|t| left[t] -= bytes[t] as f64);
                rest_s -= cheapest_s;
                columns[item].push(column);
            }
        }
        Some(columns)
    }

    /// Returns the column that is cheap and near the item's share of the bytes left.
    fn best_column(
        &self,
        item: usize,
        weight: f64,
        share: f64,
        left: &[f64],
        need: &[f64],
    ) -> Option<usize> {
        let n = self.master.n_rows();
        let price = &self.master.dual.price;
        let mut best: Option<(usize, f64)> = None;
        for (
            rank,
            &PricedColumn {
                column,
                reduced_cost,
            },
        ) in self.ranked[item].iter().enumerate()
        {
            if best.is_some_and(|(_, score)| reduced_cost >= score || rank >= MAX_SCORED_COLUMNS) {
                break;
            }
            let bytes = self.master.items[item].column_bytes(column, n);
            if (0..n).any(|t| bytes[t] as f64 > left[t] - need[t]) {
                continue;
            }
            let beside = |t: usize| price[t] * (bytes[t] as f64 - left[t] * share).abs();
            let score = reduced_cost + weight * (0..n).map(beside).sum::<f64>();
            if best.is_none_or(|(_, least)| score < least) {
                best = Some((column, score));
            }
        }
        best.map(|(column, _)| column)
    }
}

/// Returns the few columns of each item that the prices favor.
pub fn shortlist(ranked: &[Vec<PricedColumn>]) -> Vec<Vec<usize>> {
    ranked
        .iter()
        .map(|columns| {
            columns
                .iter()
                .take(MAX_SHORTLIST)
                .map(|c| c.column)
                .collect()
        })
        .collect()
}

/// A member of an item.
#[derive(Debug, Clone, Copy)]
struct Unit {
    item: usize,
    member: usize,
}

struct LocalSearch<'a> {
    items: &'a [Item],
    n_rows: usize,
    /// The members of all items.
    units: Vec<Unit>,
    choice: Choice,
    /// `[rows]` bytes not used.
    spare: Vec<i128>,
}

/// A pair of changes that gain together.
struct PairChange {
    to_first: usize,
    second: usize,
    to_second: usize,
    gain_s: f64,
}

impl LocalSearch<'_> {
    fn current(&self, unit: usize) -> usize {
        let Unit { item, member } = self.units[unit];
        self.choice.columns[item][member]
    }

    /// Returns the seconds gained by giving a unit another column.
    fn gain_s(&self, unit: usize, column: usize) -> f64 {
        let item = &self.items[self.units[unit].item];
        item.cost_s[self.current(unit)] - item.cost_s[column]
    }

    /// Returns the bytes of a row that another column takes more than the current one.
    fn extra_bytes(&self, unit: usize, column: usize, row: usize) -> i128 {
        let item = &self.items[self.units[unit].item];
        let bytes = |c: usize| i128::from(item.bytes[c * self.n_rows + row]);
        bytes(column) - bytes(self.current(unit))
    }

    fn fits(&self, unit: usize, column: usize) -> bool {
        (0..self.n_rows).all(|t| self.extra_bytes(unit, column, t) <= self.spare[t])
    }

    fn set(&mut self, unit: usize, column: usize) {
        self.choice.cost_s -= self.gain_s(unit, column);
        for row in 0..self.n_rows {
            self.spare[row] -= self.extra_bytes(unit, column, row);
        }
        let Unit { item, member } = self.units[unit];
        self.choice.columns[item][member] = column;
    }

    /// Returns the first unit of each item and column: what goes for one of them goes for all.
    fn distinct(&self) -> Vec<usize> {
        let mut seen = HashSet::new();
        let is_new = |&unit: &usize| seen.insert((self.units[unit].item, self.current(unit)));
        (0..self.units.len()).filter(is_new).collect()
    }

    /// Returns the first two units of each item and column.
    fn distinct_pairs(&self) -> Vec<usize> {
        let mut seen: HashMap<(usize, usize), u32> = HashMap::new();
        let is_new = |&unit: &usize| {
            let times = seen
                .entry((self.units[unit].item, self.current(unit)))
                .or_default();
            *times += 1;
            *times <= 2
        };
        (0..self.units.len()).filter(is_new).collect()
    }

    /// Returns the best change of one unit, as unit and column.
    ///
    /// `columns_of` gives the columns of an item that are tried.
    fn best_single(&self, columns_of: &dyn Fn(usize) -> Vec<usize>) -> Option<(usize, usize)> {
        let mut best: Option<(usize, usize)> = None;
        let mut best_gain_s = MIN_RELATIVE_GAIN * self.choice.cost_s;
        let mut last_item = usize::MAX;
        let mut columns = Vec::new();
        for unit in self.distinct() {
            let item = self.units[unit].item;
            if item != last_item {
                (columns, last_item) = (columns_of(item), item);
            }
            for &column in &columns {
                let gain_s = self.gain_s(unit, column);
                if gain_s > best_gain_s && self.fits(unit, column) {
                    best = Some((unit, column));
                    best_gain_s = gain_s;
                }
            }
        }
        best
    }

    /// Applies, for each unit, the best pair of changes that gains and fits together.
    ///
    /// Returns whether anything changed; `false` once the deadline passes.
    fn change_pairs(&mut self, shortlist: &[Vec<usize>], deadline: Instant) -> bool {
        let mut changed = false;
        // Units whose item and column brought nothing since the last change.
        let mut fruitless = HashSet::new();
        for first in 0..self.units.len() {
            if Instant::now() >= deadline {
                return false;
            }
            if !fruitless.insert((self.units[first].item, self.current(first))) {
                continue;
            }
            if let Some(PairChange {
                to_first,
                second,
                to_second,
                ..
            }) = self.best_pair(first, shortlist)
            {
                self.set(first, to_first);
                self.set(second, to_second);
                changed = true;
                fruitless.clear();
            }
        }
        changed
    }

    fn best_pair(&self, first: usize, shortlist: &[Vec<usize>]) -> Option<PairChange> {
        let mut best: Option<PairChange> = None;
        let seconds = self.distinct_pairs();
        for &to_first in &shortlist[self.units[first].item] {
            let first_gain_s = self.gain_s(first, to_first);
            if first_gain_s <= 0.0 {
                continue;
            }
            let left: Vec<i128> = (0..self.n_rows)
                .map(|t| self.spare[t] - self.extra_bytes(first, to_first, t))
                .collect();
            for second in seconds.iter().copied().filter(|&unit| unit != first) {
                for &to_second in &shortlist[self.units[second].item] {
                    let gain_s = first_gain_s + self.gain_s(second, to_second);
                    let least = MIN_RELATIVE_GAIN * self.choice.cost_s;
                    if gain_s > best.as_ref().map_or(least, |b| b.gain_s)
                        && (0..self.n_rows)
                            .all(|t| self.extra_bytes(second, to_second, t) <= left[t])
                    {
                        best = Some(PairChange {
                            to_first,
                            second,
                            to_second,
                            gain_s,
                        });
                    }
                }
            }
        }
        best
    }
}

/// Improves a choice by single changes and pairs of changes.
///
/// Uses the columns of a shortlist, and ends when neither helps or the deadline passes.
pub fn improve(
    master: &Master<'_>,
    shortlist: &[Vec<usize>],
    choice: Choice,
    deadline: Instant,
) -> Choice {
    let Master {
        items, capacity, ..
    } = *master;
    let used = used_bytes(items, capacity, &choice.columns);
    let members =
        |(item, of): (usize, &Item)| (0..of.count()).map(move |member| Unit { item, member });
    let units = items.iter().enumerate().flat_map(members).collect();
    let left = used.iter().zip(&capacity.left_bytes);
    let spare = left
        .map(|(&used, &left)| i128::from(left) - used as i128)
        .collect();
    let mut search = LocalSearch {
        items,
        n_rows: master.n_rows(),
        units,
        choice,
        spare,
    };
    loop {
        while let Some((unit, column)) = search.best_single(&|item| shortlist[item].clone()) {
            search.set(unit, column);
            if Instant::now() >= deadline {
                break;
            }
        }
        if let Some((unit, column)) = search.best_single(&|item| (0..items[item].len()).collect()) {
            search.set(unit, column);
        } else if !search.change_pairs(shortlist, deadline) {
            break;
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    // Summed afresh: the running sum has rounding errors of its own.
    let columns = search.choice.columns.clone();
    Choice::new(items, capacity, columns).unwrap_or(search.choice)
}
