//! Lists columns and finds their dual prices: the master problem of a search.
//!
//! - Where all columns can be listed, they are.
//! - Where columns off the grid can be priced, few are listed at first. Local descent at the dual
//!   prices finds better ones, the prices follow, and so on until both settle (column generation).
//!   Many layers begin in groups: each is priced as its middle layer is, which soon finds the
//!   prices, and the columns that they favor are where the layers' own descents begin. A search
//!   after another one begins at the prices and columns of that.
//! - Else a grid is listed as fine as there is time for, and refined around its cheapest columns.

use super::bound::lagrangian::{self, DualSolution};
use super::bound::pricing::{Effort, Pricer};
use super::problem::capacity::Capacity;
use super::problem::columns::{Config, Item, Meaning};
use super::problem::draft::Draft;
use super::problem::enumerate::ColumnEnumerator;
use super::problem::instance::Instance;
use super::translate;
use anyhow::Result;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Seconds that the first prices may take past the deadline. A bound is owed however slow the
/// machine is: without prices nothing else works.
const MIN_PRICING_TIME: Duration = Duration::from_secs(2);

/// Columns per shared item that the grid is refined around, since its members take several.
const MAX_REFINED_PER_SHARED_ITEM: usize = 3;

/// Rounds in which the grid is refined.
const MAX_REFINEMENT_ROUNDS: u32 = 3;

/// Relative gain of the bound below which a pricing round counts as settled.
const SETTLED_BOUND_GAIN: f64 = 2e-6;

/// Share of the time left that goes to generating columns.
const PRICING_TIME_SHARE: f64 = 0.6;

/// Pricing rounds at most.
const MAX_PRICING_ROUNDS: usize = 40;

/// Columns of a group that the descents of its layers begin with.
const MAX_GROUP_COLUMNS: usize = 24;

/// Items with layers up to which a settled round is repeated thoroughly.
const MAX_THOROUGH_ITEMS: usize = 8;

/// A round of pricing while the prices still move.
const MOVING: Effort = Effort {
    thorough: false,
    descents: 2,
    shared_descents: 12,
    columns: 40,
    shared_columns: 400,
};

/// A round of pricing once they have settled, for few items.
const SETTLED: Effort = Effort {
    thorough: true,
    descents: 4,
    shared_descents: usize::MAX,
    columns: 160,
    shared_columns: 1000,
};

/// What a search begins with after another one.
const KNOWN: Effort = Effort {
    thorough: false,
    descents: 0,
    shared_descents: 0,
    columns: 40,
    shared_columns: usize::MAX,
};

/// What the search for an integer choice may choose from.
const FINAL: Effort = Effort {
    thorough: false,
    descents: 0,
    shared_descents: 0,
    columns: 160,
    shared_columns: 2000,
};

/// The master problem: columns with their dual prices.
pub(super) struct Generated {
    pub(super) items: Vec<Item>,
    pub(super) dual: DualSolution,
    /// `[drafts][items][members]` columns of the starting points that are made of columns.
    pub(super) known: Vec<Vec<Vec<usize>>>,
}

/// Lists the columns of a problem, and finds their prices.
///
/// `dense` are the items of dense groups. `drafts` are plans whose columns are listed, too.
pub(super) fn generate(
    instance: &Instance<'_>,
    enumerator: &ColumnEnumerator<'_>,
    dense: Vec<Item>,
    drafts: &[Draft],
    deadline: Instant,
) -> Result<Generated> {
    let generator = Generator {
        instance,
        pricer: Pricer {
            enumerator,
            pool: instance.pool,
        },
        deadline,
    };
    if enumerator.prices_off_grid {
        return generator.off_grid(dense, drafts);
    }
    let mut items = dense;
    items.extend(enumerator.items());
    let known = generator.known(&mut items, drafts);
    let soon = Instant::now() + MIN_PRICING_TIME;
    let dual = lagrangian::maximize(&items, enumerator.capacity, None, deadline.max(soon))?;
    let dual = if enumerator.grid.is_full {
        dual
    } else {
        generator.refine_grid(&mut items, dual)?
    };
    Ok(Generated { items, dual, known })
}

struct Generator<'a> {
    instance: &'a Instance<'a>,
    pricer: Pricer<'a>,
    deadline: Instant,
}

impl Generator<'_> {
    fn capacity(&self) -> &Capacity {
        self.pricer.enumerator.capacity
    }

    /// Returns when generating columns must end that begins now.
    fn end(&self) -> Instant {
        let begin = Instant::now();
        let left = self.deadline.saturating_duration_since(begin);
        begin + left.mul_f64(PRICING_TIME_SHARE)
    }

    fn known(&self, items: &mut [Item], drafts: &[Draft]) -> Vec<Vec<Vec<usize>>> {
        let enumerator = self.pricer.enumerator;
        drafts
            .iter()
            .filter_map(|draft| {
                translate::columns_of_draft(self.instance, enumerator, items, draft)
            })
            .collect()
    }

    /// Generates columns from few, or from those of the search before.
    fn off_grid(&self, dense: Vec<Item>, drafts: &[Draft]) -> Result<Generated> {
        let enumerator = self.pricer.enumerator;
        let end = self.end();
        let mut items = dense.clone();
        items.extend(enumerator.empty_items());
        let prices = self.instance.pool.prices();
        let prices = prices.filter(|p| p.len() == self.capacity().left_bytes.len());
        let prices = match prices {
            Some(prices) => {
                self.pricer.add_cheapest(&mut items, &prices, KNOWN, end);
                Some(prices)
            }
            None => self.first_columns(&dense, &mut items, end)?,
        };
        let drafts = [self.instance.pool.drafts(), drafts.to_vec()].concat();
        // The columns of drafts are priced together, which is faster than one by one.
        let configs = translate::configs_of_drafts(self.instance, enumerator, &items, &drafts);
        self.pricer
            .add_configs(&mut items, |at| configs[at].clone());
        let known = self.known(&mut items, &drafts);
        let dual = self.price(&mut items, prices.as_deref(), end)?;
        self.pricer
            .add_cheapest(&mut items, &dual.price, FINAL, self.deadline);
        let dual = self.maximize(&items, Some(&dual.price), self.deadline)?;
        Ok(Generated { items, dual, known })
    }

    /// Lists the first columns of items that have none. Returns prices near the best, if known.
    fn first_columns(
        &self,
        dense: &[Item],
        items: &mut [Item],
        end: Instant,
    ) -> Result<Option<Vec<f64>>> {
        let enumerator = self.pricer.enumerator;
        let (groups, group_of) = enumerator.groups();
        if groups.len() == group_of.len() {
            enumerator.list(items);
            self.pricer.keep(items);
            return Ok(None);
        }
        let mut grouped = dense.to_vec();
        grouped.extend(groups);
        enumerator.list(&mut grouped);
        let dual = self.price(&mut grouped, None, end)?;
        let seeds: Vec<Vec<Config>> = grouped[dense.len()..]
            .iter()
            .map(|group| match &group.meaning {
                Meaning::Dense { .. } => Vec::new(),
                Meaning::Experts { configs, .. } => group
                    .cheapest_apart(&dual.price, MAX_GROUP_COLUMNS)
                    .into_iter()
                    .map(|c| configs[c])
                    .collect(),
            })
            .collect();
        let first = dense.len();
        let seeds_of = |at: usize| match at.checked_sub(first) {
            None => Vec::new(),
            Some(at) => seeds[group_of[at]].clone(),
        };
        self.pricer.add_configs(items, seeds_of);
        Ok(Some(dual.price))
    }

    fn maximize(
        &self,
        items: &[Item],
        start: Option<&[f64]>,
        end: Instant,
    ) -> Result<DualSolution> {
        let soon = Instant::now() + MIN_PRICING_TIME;
        lagrangian::maximize(items, self.capacity(), start, end.max(soon))
    }

    /// Prices columns off the grid until the bound settles.
    fn price(
        &self,
        items: &mut [Item],
        start: Option<&[f64]>,
        end: Instant,
    ) -> Result<DualSolution> {
        let mut dual = self.maximize(items, start, end)?;
        let with_layers = items.iter().filter(|item| !item.layers().is_empty());
        let few = with_layers.count() <= MAX_THOROUGH_ITEMS;
        let mut settled_rounds = 0;
        for _ in 0..MAX_PRICING_ROUNDS {
            let before = dual.bound_s;
            let effort = if few && settled_rounds > 0 {
                SETTLED
            } else {
                MOVING
            };
            let effort = Effort {
                thorough: effort.thorough,
                ..effort
            };
            let added = self.pricer.add_cheapest(items, &dual.price, effort, end);
            // The old prices' value is no bound over more columns.
            dual = self.maximize(items, Some(&dual.price), end)?;
            let settled = before - dual.bound_s <= SETTLED_BOUND_GAIN * dual.bound_s.abs();
            settled_rounds = if settled { settled_rounds + 1 } else { 0 };
            let is_done = settled_rounds > usize::from(few) || added == 0 && settled_rounds > 0;
            if is_done || Instant::now() >= end {
                break;
            }
        }
        Ok(dual)
    }

    /// Adds the counts between the grid's points around the cheapest columns, and prices again.
    fn refine_grid(&self, items: &mut [Item], mut dual: DualSolution) -> Result<DualSolution> {
        let (enumerator, end) = (self.pricer.enumerator, self.end());
        let fast = self.capacity().fast();
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
                let centers: BTreeSet<Config> = item
                    .cheapest_apart(&dual.price, count)
                    .into_iter()
                    .map(|c| configs[c])
                    .collect();
                let shape = &self.instance.evidence.layers[layer].shape;
                for center in centers {
                    let max_cut = enumerator.max_cut(layer);
                    let grid = &enumerator.grid;
                    let axes = grid.axes_around(&center, shape, max_cut, fast, round);
                    enumerator.extend(item, &axes);
                }
            }
            // The old prices' value is no bound over more columns.
            dual = lagrangian::maximize(items, self.capacity(), Some(&dual.price), end)?;
            if Instant::now() + started.elapsed() > end {
                break;
            }
        }
        Ok(dual)
    }
}
