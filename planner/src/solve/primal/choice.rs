//! Integer choices, and the reduced costs that say which columns a better one may use.
//!
//! With dual prices whose Lagrangian bound is `L`, a choice that uses a column of reduced cost `r`
//! costs at least `L + r`. So a column whose reduced cost exceeds `incumbent − L` cannot be part of
//! a better choice (reduced-cost fixing).

use crate::solve::bound::lagrangian::DualSolution;
use crate::solve::problem::capacity::Capacity;
use crate::solve::problem::columns::Item;

/// A column for every member of every item.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// `[items][members]` columns.
    pub columns: Vec<Vec<usize>>,
    /// Cost of all columns together, in seconds.
    pub cost_s: f64,
}

impl Choice {
    /// Makes a choice. Returns `None` if its bytes do not fit.
    pub fn new(items: &[Item], capacity: &Capacity, columns: Vec<Vec<usize>>) -> Option<Self> {
        let used = used_bytes(items, capacity, &columns);
        let fits = used
            .iter()
            .zip(&capacity.left_bytes)
            .all(|(&used, &left)| used <= u128::from(left));
        let columns_of = items.iter().zip(&columns);
        let cost_s = columns_of
            .flat_map(|(item, c)| c.iter().map(|&c| item.cost_s[c]))
            .sum();
        fits.then_some(Choice { columns, cost_s })
    }
}

/// Returns `[rows]` bytes that columns take together.
pub(super) fn used_bytes(items: &[Item], capacity: &Capacity, columns: &[Vec<usize>]) -> Vec<u128> {
    let n = capacity.left_bytes.len();
    let mut used = vec![0u128; n];
    for (item, columns) in items.iter().zip(columns) {
        for &column in columns {
            let bytes = item.column_bytes(column, n);
            used.iter_mut()
                .zip(bytes)
                .for_each(|(used, &b)| *used += u128::from(b));
        }
    }
    used
}

/// A column of an item with its reduced cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PricedColumn {
    /// Column of the item.
    pub column: usize,
    /// Seconds, bytes priced, above the item's cheapest column.
    pub reduced_cost: f64,
}

/// The master problem with its dual solution.
#[derive(Debug, Clone, Copy)]
pub struct Master<'a> {
    /// What to choose one column per member for.
    pub items: &'a [Item],
    /// Bytes left of each tier.
    pub capacity: &'a Capacity,
    /// Prices and their bound.
    pub dual: &'a DualSolution,
}

impl Master<'_> {
    /// Returns the number of rows: tiers, and time where it is limited.
    pub fn n_rows(&self) -> usize {
        self.capacity.left_bytes.len()
    }

    /// Returns each item's columns up to a reduced cost of `limit`, the cheapest first.
    pub fn reduced_costs(&self, limit: f64) -> Vec<Vec<PricedColumn>> {
        let n = self.n_rows();
        let price = &self.dual.price;
        self.items
            .iter()
            .map(|item| {
                let least = item.cheapest(price).map_or(0.0, |(_, value)| value);
                let priced = |column: usize| {
                    let bytes = item.column_bytes(column, n);
                    let bytes_s = bytes
                        .iter()
                        .zip(price)
                        .map(|(&b, p)| b as f64 * p)
                        .sum::<f64>();
                    PricedColumn {
                        column,
                        reduced_cost: item.cost_s[column] + bytes_s - least,
                    }
                };
                let mut ranked: Vec<PricedColumn> = (0..item.len())
                    .map(priced)
                    .filter(|c| c.reduced_cost <= limit)
                    .collect();
                ranked.sort_by(|a, b| {
                    a.reduced_cost
                        .total_cmp(&b.reduced_cost)
                        .then(a.column.cmp(&b.column))
                });
                ranked
            })
            .collect()
    }
}
