//! Column pricing off the grid: new columns by local descent, and a lower bound over all of them.
//!
//! Every function runs its items on all cores and stops at a deadline. A layer with recorded
//! routing is priced through its [`ReuseTable`](crate::solve::problem::reuse_table::ReuseTable), one
//! with uniform routing by the hypergeometric distribution. What was priced goes to the
//! [`ColumnPool`], and what is there is not priced again.

use super::branch_and_bound::LayerSearch;
use super::local_descent::{LocalDescent, SMOOTH_STEPS, TimedConfig, UniformStage};
use crate::profile::{Judged, LayerEvidence};
use crate::solve::problem::columns::{Config, Item, Meaning};
use crate::solve::problem::enumerate::ColumnEnumerator;
use crate::solve::problem::pool::{ColumnPool, Priced};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tier_plan_runtime::formats::placement::TierIdx;
use tier_plan_runtime::kernels::scoped::spawn_or_run;

/// Columns of other bytes that descents of a shared item start from.
const MAX_APART_STARTS: usize = 16;

/// What a round of pricing does.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Whether descents also start where weighted means of path times are least.
    pub thorough: bool,
    /// Configurations that descents of an item of one layer start from.
    pub descents: usize,
    /// Configurations that descents of a shared item start from.
    pub shared_descents: usize,
    /// Columns that are added to an item of one layer.
    pub columns: usize,
    /// Columns that are added to an item that several layers share.
    pub shared_columns: usize,
}

/// Prices columns that are not listed.
#[derive(Clone, Copy)]
pub struct Pricer<'a> {
    /// Enumerator of the layers' columns.
    pub enumerator: &'a ColumnEnumerator<'a>,
    /// Columns that were priced before.
    pub pool: &'a ColumnPool,
}

/// Calls `each` on all cores with every item and the number of items from it to the end.
///
/// Returns `[items]` results, `None` where `each` gave none.
fn for_each_item<T: Send>(
    items: &mut [Item],
    each: impl Fn(&mut Item, usize) -> Option<T> + Sync,
) -> Vec<Option<T>> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let next = AtomicUsize::new(0);
    let count = items.len();
    let jobs: Vec<Mutex<(&mut Item, Option<T>)>> = items
        .iter_mut()
        .map(|item| Mutex::new((item, None)))
        .collect();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            spawn_or_run(scope, || {
                let take = || {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    jobs.get(at).map(|job| (at, job))
                };
                while let Some((at, job)) = take() {
                    let Ok(mut job) = job.lock() else { return };
                    let (item, result) = &mut *job;
                    *result = each(item, count - at);
                }
            });
        }
    });
    jobs.into_iter()
        .map(|job| job.into_inner().ok().and_then(|(_, result)| result))
        .collect()
}

/// The search of a layer's columns at some prices, by what is known of its routing.
enum Search<'a> {
    Recorded(Box<LayerSearch<'a>>),
    Uniform(Box<LocalDescent<'a, UniformStage<'a>>>),
}

impl Search<'_> {
    fn cheapest(
        &mut self,
        start: Vec<Config>,
        effort: Effort,
        deadline: Instant,
    ) -> Vec<TimedConfig> {
        match self {
            Search::Recorded(search) => {
                search.cheapest(&start, effort.thorough, effort.descents, deadline)
            }
            Search::Uniform(descent) => {
                let found = descent.cheapest(start, effort.descents, deadline);
                if !effort.thorough {
                    return found;
                }
                descent.scan(&SMOOTH_STEPS, deadline);
                descent.by_value()
            }
        }
    }

    fn around(&mut self, centers: &BTreeSet<Config>, deadline: Instant) -> Vec<TimedConfig> {
        match self {
            Search::Recorded(search) => search.around(centers, deadline),
            Search::Uniform(descent) => descent.around(centers, deadline),
        }
    }

    /// Returns the given configurations, priced.
    fn timed(&mut self, configs: &[Config]) -> Vec<TimedConfig> {
        let mut seconds = |config: &Config| match self {
            Search::Recorded(search) => search.seconds(config),
            Search::Uniform(descent) => descent.seconds(config),
        };
        let timed = |config: &Config| TimedConfig {
            config: *config,
            seconds: seconds(config),
        };
        configs.iter().map(timed).collect()
    }

    fn into_known(self) -> Priced {
        match self {
            Search::Recorded(search) => search.into_known(),
            Search::Uniform(descent) => descent.into_known(),
        }
    }
}

impl<'a> Pricer<'a> {
    /// Runs a search of the layer at position `at` that begins with what was priced before, and
    /// keeps what it prices. Returns `None` where the layer has no reuse table.
    fn search<T>(
        &self,
        at: usize,
        price: &[f64],
        run: impl FnOnce(&mut Search<'_>) -> T,
    ) -> Option<T> {
        let ColumnEnumerator {
            evidence, capacity, ..
        } = *self.enumerator;
        let layer = &evidence.layers[at];
        let forbidden = &self.enumerator.fixed[at].constraints.forbidden;
        self.pool.with(&self.enumerator.pool_key(at), |known| {
            let table = self.pool.table(known, layer);
            let priced = std::mem::take(&mut known.priced);
            let mut search = match (&layer.judged, &table) {
                (Judged::Recorded(_), Some(table)) => {
                    let search = LayerSearch::new(table, capacity, layer, price);
                    let search = search.forbidding(forbidden).knowing(priced);
                    Search::Recorded(Box::new(search))
                }
                (Judged::Recorded(_), None) => {
                    known.priced = priced;
                    return None;
                }
                (Judged::Uniform, _) => {
                    let stage = self.enumerator.stage(layer);
                    let timed = UniformStage::new(capacity, layer.shape, stage);
                    let descent = LocalDescent::new(timed, capacity, layer.shape, price);
                    Search::Uniform(Box::new(descent.forbidding(forbidden).knowing(priced)))
                }
            };
            let result = run(&mut search);
            known.priced = search.into_known();
            Some(result)
        })
    }

    /// Adds to each item the columns that local descent from its cheapest ones leads to.
    ///
    /// Returns how many columns were added.
    pub fn add_cheapest(
        &self,
        items: &mut [Item],
        price: &[f64],
        effort: Effort,
        deadline: Instant,
    ) -> usize {
        let added = for_each_item(items, |item, _| {
            let Start {
                at,
                layer,
                configs: mut start,
            } = self.start_of(item, price, deadline)?;
            let (mut effort, mut most) = (effort, effort.columns);
            if let (Meaning::Experts { configs, .. }, true) = (&item.meaning, item.count() > 1) {
                // Layers of one item share out its bytes among columns of unlike bytes.
                let columns = item.cheapest_apart(price, MAX_APART_STARTS).into_iter();
                let columns = columns.chain(cheapest_by_slots(item, price));
                let apart: BTreeSet<Config> = columns
                    .map(|c| configs[c])
                    .filter(|c| !start.contains(c))
                    .collect();
                start.extend(apart);
                (effort.descents, most) = (effort.shared_descents, effort.shared_columns);
            }
            let found = self.search(at, price, |s| s.cheapest(start, effort, deadline))?;
            self.push_new(item, layer, found.into_iter().take(most))
        });
        added.into_iter().flatten().sum()
    }

    /// Keeps the columns of items for the searches after this one.
    pub fn keep(&self, items: &[Item]) {
        for item in items {
            let (Meaning::Experts { configs, .. }, Some(&at)) =
                (&item.meaning, item.layers().first())
            else {
                continue;
            };
            let timed = configs.iter().copied().zip(item.cost_s.iter().copied());
            let key = self.enumerator.pool_key(at);
            self.pool.with(&key, |known| known.priced.extend(timed));
        }
    }

    /// Adds to each item the columns around those of a choice.
    ///
    /// `chosen` is `[items][members]` columns. Returns how many columns were added.
    pub fn add_around(
        &self,
        items: &mut [Item],
        chosen: &[Vec<usize>],
        price: &[f64],
        deadline: Instant,
    ) -> usize {
        let added = for_each_item(items, |item, n_left| {
            let Start { at, layer, .. } = self.start_of(item, price, deadline)?;
            let Meaning::Experts { configs, .. } = &item.meaning else {
                return None;
            };
            let columns = chosen.get(chosen.len() - n_left)?;
            let centers: BTreeSet<Config> = columns
                .iter()
                .filter_map(|&c| configs.get(c).copied())
                .collect();
            let found = self.search(at, price, |s| s.around(&centers, deadline))?;
            self.push_new(item, layer, found.into_iter())
        });
        added.into_iter().flatten().sum()
    }

    /// Adds to each item the given configurations, priced for its layers.
    pub fn add_configs(&self, items: &mut [Item], configs: impl Fn(usize) -> Vec<Config> + Sync) {
        let n = self.enumerator.capacity.left_bytes.len();
        let count = items.len();
        for_each_item(items, |item, n_left| {
            let &at = item.layers().first()?;
            let layer = &self.enumerator.evidence.layers[at];
            let configs = configs(count - n_left);
            let found = self.search(at, &vec![0.0; n], |s| s.timed(&configs))?;
            self.push_new(item, layer, found.into_iter())
        });
    }

    /// Returns the least sum of cost and priced bytes over all configurations of all items.
    ///
    /// Each layer is searched until its bound is within `tolerance` (relative) of its best. Returns
    /// `None` if time runs out first.
    pub fn bound_over_all(
        &self,
        items: &mut [Item],
        price: &[f64],
        tolerance: f64,
        deadline: Instant,
    ) -> Option<f64> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let bounds = for_each_item(items, |item, n_left| {
            if matches!(item.meaning, Meaning::Dense { .. }) {
                return item.cheapest(price).map(|(_, value)| value);
            }
            let Start { at, configs, .. } = self.start_of(item, price, deadline)?;
            let now = Instant::now();
            let share = (threads as f64 / n_left as f64).min(1.0);
            let end = now + deadline.saturating_duration_since(now).mul_f64(share);
            let bound = self.search(at, price, |search| match search {
                Search::Recorded(search) => Some(search.bound(&configs, tolerance, end)),
                Search::Uniform(_) => None,
            });
            bound.flatten().filter(|b| b.is_finite())
        });
        items
            .iter()
            .zip(bounds)
            .map(|(item, bound)| Some(bound? * item.count() as f64))
            .sum()
    }

    /// Adds the configurations that an item does not have. Returns how many that were.
    fn push_new(
        &self,
        item: &mut Item,
        layer: &LayerEvidence,
        found: impl Iterator<Item = TimedConfig>,
    ) -> Option<usize> {
        let Meaning::Experts { layers, configs } = &item.meaning else {
            return None;
        };
        let fixed = &self.enumerator.fixed[*layers.first()?];
        let mut known: BTreeSet<Config> = configs.iter().copied().collect();
        let new = found.filter(|timed| known.insert(timed.config));
        Some(
            new.filter(|timed| {
                self.enumerator
                    .push(item, layer, fixed, timed.config, timed.seconds)
            })
            .count(),
        )
    }

    /// Returns an item's layer, and its cheapest configuration per tier of slots and without slots.
    fn start_of(&self, item: &Item, price: &[f64], deadline: Instant) -> Option<Start<'a>> {
        let Meaning::Experts { layers, configs } = &item.meaning else {
            return None;
        };
        if Instant::now() >= deadline {
            return None;
        }
        let at = *layers.first()?;
        let layer = &self.enumerator.evidence.layers[at];
        let n = self.enumerator.capacity.left_bytes.len();
        let mut cheapest: BTreeMap<Option<TierIdx>, (Config, f64)> = BTreeMap::new();
        for (column, config) in configs.iter().enumerate() {
            let value = item.value(column, n, price);
            let slot_tier = (config.slots > 0).then_some(config.slot_tier);
            let best = cheapest.entry(slot_tier).or_insert((*config, value));
            if value < best.1 {
                *best = (*config, value);
            }
        }
        let mut cheapest: Vec<(Config, f64)> = cheapest.into_values().collect();
        cheapest.sort_by(|a, b| a.1.total_cmp(&b.1));
        Some(Start {
            at,
            layer,
            configs: cheapest.into_iter().map(|(config, _)| config).collect(),
        })
    }
}

/// A layer with the configurations that its search starts from, the cheapest first.
struct Start<'a> {
    /// Position of the layer.
    at: usize,
    layer: &'a LayerEvidence,
    configs: Vec<Config>,
}

/// Returns the cheapest columns of an item by tier of slots and their number, in powers of √2.
fn cheapest_by_slots(item: &Item, price: &[f64]) -> Vec<usize> {
    let Meaning::Experts { configs, .. } = &item.meaning else {
        return Vec::new();
    };
    let mut cheapest: BTreeMap<(TierIdx, u32), (usize, f64)> = BTreeMap::new();
    for (column, config) in configs.iter().enumerate() {
        let value = item.value(column, price.len(), price);
        let class = u32::from(config.slots).pow(2).checked_ilog2().unwrap_or(0);
        let best = cheapest
            .entry((config.slot_tier, class))
            .or_insert((column, value));
        if value < best.1 {
            *best = (column, value);
        }
    }
    cheapest.into_values().map(|(column, _)| column).collect()
}
