//! Configurations beyond the grid: what steps from columns lead to, and a bound over all there are.

use super::columns::{Config, Item, Meaning};
use super::maker::Maker;
use super::steps::{Drawn, Steps};
use super::table::Table;
use super::whole::Layer;
use super::{dual, search};
use crate::profile::{Judged, LayerEvidence};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tier_plan_runtime::model::shape::ExpertShape;

/// Configurations near the best that each round adds to a layer's columns.
const NEAR: usize = 160;

/// The same of columns that several layers share.
const NEAR_SHARED: usize = 2000;

/// Columns of layers that share them which steps begin from.
const UNLIKE: usize = 16;

impl<'a> Maker<'a> {
    /// Calls `each` with every item, on all cores, until the deadline; what it gave, nothing where time ran out.
    fn on_all<T: Send>(
        &self,
        items: &mut [Item],
        each: impl Fn(&mut Item, usize) -> Option<T> + Sync,
    ) -> Vec<Option<T>> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let next = AtomicUsize::new(0);
        let count = items.len();
        let slots: Vec<Mutex<(&mut Item, Option<T>)>> = items.iter_mut().map(|item| Mutex::new((item, None))).collect();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some((at, slot)) =
                        Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, slots.get(at)?)))
                    {
                        let Ok(mut slot) = slot.lock() else { return };
                        let (item, found) = &mut *slot;
                        *found = each(item, count - at);
                    }
                });
            }
        });
        slots.into_iter().map(|slot| slot.into_inner().ok().and_then(|s| s.1)).collect()
    }

    /// Adds to each item what steps from its cheapest columns, and if it is to be `thorough` from others, lead to among all
    /// configurations; how many that were.
    pub fn price_whole(&self, items: &mut [Item], price: &[f64], thorough: bool, deadline: Instant) -> usize {
        let added = self.on_all(items, |item, _| {
            let (layer, mut start) = self.begin(item, price, deadline)?;
            if let (Meaning::Experts(_, configs), true) = (&item.meaning, item.count() > 1) {
                // Members of one item share it out among unlike columns.
                let unlike = search::apart(item, price, UNLIKE).into_iter().chain(by_slots(item, price));
                let unlike: BTreeSet<Config> = unlike.map(|c| configs[c]).filter(|c| !start.contains(c)).collect();
                start.extend(unlike);
            }
            let found = match &layer.judged {
                Judged::Recorded(trace) => {
                    let table = Table::new(layer, trace)?;
                    let mut search = Layer::new(&table, self.room, layer, price);
                    search.cheapest(&start, thorough, deadline)
                }
                Judged::Uniform => {
                    let descents = start.len();
                    self.drawn(layer, price).cheapest(start, descents, deadline)
                }
            };
            let most = if item.count() > 1 { NEAR_SHARED } else { NEAR };
            self.push_new(item, layer, found.into_iter().take(most))
        });
        added.into_iter().flatten().sum()
    }

    /// Adds to each item the configurations around those of a choice (`[items][members]` columns); how many that were.
    pub fn widen(&self, items: &mut [Item], columns: &[Vec<usize>], price: &[f64], deadline: Instant) -> usize {
        let added = self.on_all(items, |item, left| {
            let (layer, _) = self.begin(item, price, deadline)?;
            let Meaning::Experts(_, configs) = &item.meaning else { return None };
            let chosen = columns.get(columns.len() - left)?;
            let chosen: BTreeSet<Config> = chosen.iter().filter_map(|&c| configs.get(c).copied()).collect();
            let found = match &layer.judged {
                Judged::Recorded(trace) => {
                    let table = Table::new(layer, trace)?;
                    Layer::new(&table, self.room, layer, price).around(&chosen, deadline)
                }
                Judged::Uniform => self.drawn(layer, price).around(&chosen, deadline),
            };
            self.push_new(item, layer, found.into_iter())
        });
        added.into_iter().flatten().sum()
    }

    /// Steps of a layer whose experts are all equally likely.
    fn drawn(&self, layer: &LayerEvidence, price: &[f64]) -> Steps<'a, Drawn<'a>> {
        let ExpertShape { n_expert, n_used, expert_bytes, .. } = layer.shape;
        let timed = Drawn::new(self.room, n_expert, n_used, self.stage(layer));
        Steps::new(timed, self.room, [n_expert as u16, n_used as u16], expert_bytes, price)
    }

    /// Adds the configurations, each with its seconds, that an item does not have; how many that were.
    fn push_new(
        &self,
        item: &mut Item,
        layer: &LayerEvidence,
        found: impl Iterator<Item = (Config, f64)>,
    ) -> Option<usize> {
        let Meaning::Experts(members, configs) = &item.meaning else { return None };
        let fixed = &self.wishes[*members.first()?];
        let have: BTreeSet<Config> = configs.iter().copied().collect();
        let new = found.filter(|(config, _)| !have.contains(config));
        Some(new.filter(|&(config, cost_s)| self.push(item, layer, fixed, config, cost_s)).count())
    }

    /// A bound over all configurations of all items at some prices, if there is time: what their members cost at least,
    /// bytes priced.
    pub fn bound_whole(&self, items: &mut [Item], price: &[f64], close: f64, deadline: Instant) -> Option<f64> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let bounds = self.on_all(items, |item, left| {
            if matches!(item.meaning, Meaning::Dense(..)) {
                return dual::cheapest(item, price).map(|(_, value)| value);
            }
            let (layer, start) = self.begin(item, price, deadline)?;
            let Judged::Recorded(trace) = &layer.judged else { return None };
            let table = Table::new(layer, trace)?;
            let now = Instant::now();
            let part = deadline.saturating_duration_since(now).mul_f64((threads as f64 / left as f64).min(1.0));
            let mut search = Layer::new(&table, self.room, layer, price);
            Some(search.bound(&start, close, now + part)).filter(|b| b.is_finite())
        });
        items.iter().zip(bounds).map(|(item, bound)| Some(bound? * item.count() as f64)).sum()
    }

    /// An item's layer, and its cheapest configuration for each tier of slots and without.
    fn begin(&self, item: &Item, price: &[f64], deadline: Instant) -> Option<(&'a LayerEvidence, Vec<Config>)> {
        let Meaning::Experts(members, configs) = &item.meaning else { return None };
        if Instant::now() >= deadline {
            return None;
        }
        let layer = &self.evidence.layers[*members.first()?];
        let n = self.room.left_bytes.len();
        let mut start: BTreeMap<Option<u8>, (Config, f64)> = BTreeMap::new();
        for (at, config) in configs.iter().enumerate() {
            let bytes = item.column_bytes(at, n).iter().zip(price).map(|(&b, p)| b as f64 * p).sum::<f64>();
            let value = item.cost_s[at] + bytes;
            let best = start.entry((config.slots > 0).then_some(config.slot_tier)).or_insert((*config, value));
            if value < best.1 {
                *best = (*config, value);
            }
        }
        let mut start: Vec<(Config, f64)> = start.into_values().collect();
        start.sort_by(|a, b| a.1.total_cmp(&b.1));
        Some((layer, start.into_iter().map(|(config, _)| config).collect()))
    }
}

/// The cheapest columns of an item by tier of slots and their number, in powers of two to the half.
fn by_slots(item: &Item, price: &[f64]) -> Vec<usize> {
    let Meaning::Experts(_, configs) = &item.meaning else { return Vec::new() };
    let mut best: BTreeMap<(u8, u32), (usize, f64)> = BTreeMap::new();
    for (at, config) in configs.iter().enumerate() {
        let bytes = item.column_bytes(at, price.len()).iter().zip(price).map(|(&b, p)| b as f64 * p).sum::<f64>();
        let value = item.cost_s[at] + bytes;
        let class = u32::from(config.slots).pow(2).checked_ilog2().unwrap_or(0);
        let found = best.entry((config.slot_tier, class)).or_insert((at, value));
        if value < found.1 {
            *found = (at, value);
        }
    }
    best.into_values().map(|(at, _)| at).collect()
}
