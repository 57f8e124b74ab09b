//! Column pricing off the grid: new columns by local descent, and a lower bound over all of them.
//!
//! Every function runs its items on all cores and stops at a deadline. A layer with recorded
//! routing is priced through its [`ReuseTable`], one with uniform routing by the hypergeometric
//! distribution.

use super::branch_and_bound::LayerSearch;
use super::local_descent::{LocalDescent, TimedConfig, UniformStage};
use crate::profile::{Judged, LayerEvidence};
use crate::solve::problem::columns::{Config, Item, Meaning};
use crate::solve::problem::enumerate::ColumnEnumerator;
use crate::solve::problem::reuse_table::ReuseTable;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tier_plan_runtime::formats::placement::TierIdx;
use tier_plan_runtime::kernels::scoped::spawn_or_run;

/// Columns that a round adds to an item of one layer.
const MAX_NEW_COLUMNS: usize = 160;

/// Columns that a round adds to an item that several layers share.
const MAX_NEW_SHARED_COLUMNS: usize = 2000;

/// Columns of other bytes that descents of a shared item start from.
const MAX_APART_STARTS: usize = 16;

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

/// Adds to each item the columns that local descent from its cheapest ones leads to.
///
/// A `thorough` round also starts where weighted means of path times are least. Returns how many
/// columns were added.
pub fn add_cheapest(
    enumerator: &ColumnEnumerator<'_>,
    items: &mut [Item],
    price: &[f64],
    thorough: bool,
    deadline: Instant,
) -> usize {
    let added = for_each_item(items, |item, _| {
        let Start {
            layer,
            configs: mut start,
        } = start_of(enumerator, item, price, deadline)?;
        let is_shared = item.count() > 1;
        if let (Meaning::Experts { configs, .. }, true) = (&item.meaning, is_shared) {
            // Layers of one item share out its bytes among columns of unlike bytes.
            let columns = item.cheapest_apart(price, MAX_APART_STARTS).into_iter();
            let columns = columns.chain(cheapest_by_slots(item, price));
            let apart: BTreeSet<Config> = columns
                .map(|c| configs[c])
                .filter(|c| !start.contains(c))
                .collect();
            start.extend(apart);
        }
        let found = match &layer.judged {
            Judged::Recorded(trace) => {
                let table = ReuseTable::new(layer, trace)?;
                let mut search = LayerSearch::new(&table, enumerator.capacity, layer, price);
                search.cheapest(&start, thorough, deadline)
            }
            Judged::Uniform => {
                let descents = start.len();
                uniform_descent(enumerator, layer, price).cheapest(start, descents, deadline)
            }
        };
        let most = if is_shared {
            MAX_NEW_SHARED_COLUMNS
        } else {
            MAX_NEW_COLUMNS
        };
        push_new(enumerator, item, layer, found.into_iter().take(most))
    });
    added.into_iter().flatten().sum()
}

/// Adds to each item the columns around those of a choice.
///
/// `chosen` is `[items][members]` columns. Returns how many columns were added.
pub fn add_around(
    enumerator: &ColumnEnumerator<'_>,
    items: &mut [Item],
    chosen: &[Vec<usize>],
    price: &[f64],
    deadline: Instant,
) -> usize {
    let added = for_each_item(items, |item, n_left| {
        let Start { layer, .. } = start_of(enumerator, item, price, deadline)?;
        let Meaning::Experts { configs, .. } = &item.meaning else {
            return None;
        };
        let columns = chosen.get(chosen.len() - n_left)?;
        let centers: BTreeSet<Config> = columns
            .iter()
            .filter_map(|&c| configs.get(c).copied())
            .collect();
        let found = match &layer.judged {
            Judged::Recorded(trace) => {
                let table = ReuseTable::new(layer, trace)?;
                LayerSearch::new(&table, enumerator.capacity, layer, price)
                    .around(&centers, deadline)
            }
            Judged::Uniform => uniform_descent(enumerator, layer, price).around(&centers, deadline),
        };
        push_new(enumerator, item, layer, found.into_iter())
    });
    added.into_iter().flatten().sum()
}

/// Returns the least sum of cost and priced bytes over all configurations of all items.
///
/// Each layer is searched until its bound is within `tolerance` (relative) of its best. Returns
/// `None` if time runs out first.
pub fn bound_over_all(
    enumerator: &ColumnEnumerator<'_>,
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
        let Start { layer, configs } = start_of(enumerator, item, price, deadline)?;
        let Judged::Recorded(trace) = &layer.judged else {
            return None;
        };
        let table = ReuseTable::new(layer, trace)?;
        let now = Instant::now();
        let share = (threads as f64 / n_left as f64).min(1.0);
        let end = now + deadline.saturating_duration_since(now).mul_f64(share);
        let mut search = LayerSearch::new(&table, enumerator.capacity, layer, price);
        Some(search.bound(&configs, tolerance, end)).filter(|b| b.is_finite())
    });
    items
        .iter()
        .zip(bounds)
        .map(|(item, bound)| Some(bound? * item.count() as f64))
        .sum()
}

fn uniform_descent<'a>(
    enumerator: &ColumnEnumerator<'a>,
    layer: &LayerEvidence,
    price: &[f64],
) -> LocalDescent<'a, UniformStage<'a>> {
    let capacity = enumerator.capacity;
    let timed = UniformStage::new(capacity, layer.shape, enumerator.stage(layer));
    LocalDescent::new(timed, capacity, layer.shape, price)
}

/// Adds the configurations that an item does not have. Returns how many that were.
fn push_new(
    enumerator: &ColumnEnumerator<'_>,
    item: &mut Item,
    layer: &LayerEvidence,
    found: impl Iterator<Item = TimedConfig>,
) -> Option<usize> {
    let Meaning::Experts { layers, configs } = &item.meaning else {
        return None;
    };
    let fixed = &enumerator.fixed[*layers.first()?];
    let known: BTreeSet<Config> = configs.iter().copied().collect();
    let new = found.filter(|timed| !known.contains(&timed.config));
    Some(
        new.filter(|timed| enumerator.push(item, layer, fixed, timed.config, timed.seconds))
            .count(),
    )
}

/// A layer with the configurations that its search starts from, the cheapest first.
struct Start<'a> {
    layer: &'a LayerEvidence,
    configs: Vec<Config>,
}

/// Returns an item's layer, and its cheapest configuration per tier of slots and without slots.
fn start_of<'a>(
    enumerator: &ColumnEnumerator<'a>,
    item: &Item,
    price: &[f64],
    deadline: Instant,
) -> Option<Start<'a>> {
    let Meaning::Experts { layers, configs } = &item.meaning else {
        return None;
    };
    if Instant::now() >= deadline {
        return None;
    }
    let layer = &enumerator.evidence.layers[*layers.first()?];
    let n = enumerator.capacity.left_bytes.len();
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
        layer,
        configs: cheapest.into_iter().map(|(config, _)| config).collect(),
    })
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
