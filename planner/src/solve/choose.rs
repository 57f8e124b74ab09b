//! The choice of columns: prices, more columns where prices favour them, a whole choice, and its proof.

use super::columns::{self, Charge, Config, Item, Meaning};
use super::dual::{self, Dual};
use super::grid::{Axes, Grid};
use super::maker::Maker;
use super::planner::{NO_GAP, Planner};
use super::room::{self, Room};
use super::rules::Draft;
use super::search::{self, Choice};
use super::{infeasible, labels, polish, program, round};
use crate::cli::Backend;
use crate::profile::Judged;
use anyhow::{Result, bail};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use tier_plan_runtime::formats::placement::{LayerPlacement, Pins, TierIdx};
use tier_plan_runtime::model::shape::ExpertShape;

/// Where a plan's integer choice came from. The prices for bytes, and with them the bound, are always good_lp's and
/// microlp's.
#[derive(Debug, Clone, Copy)]
pub(super) enum Origin {
    LocalSearch,
    PartialChoices,
    IntegerProgram(Backend),
}

impl Origin {
    /// The name in plans.
    pub(super) fn name(self) -> &'static str {
        match self {
            Origin::LocalSearch => "microlp prices, local search",
            Origin::PartialChoices => "microlp prices, partial choices",
            Origin::IntegerProgram(backend) => backend.name(),
        }
    }
}

/// Columns of an item with several members that are refined: its members share it out among about as many.
const ALIKE: usize = 3;

/// A relative gain of the bound that more columns are not worth the time for.
const SETTLED: f64 = 2e-5;

/// Part of the time that is left for finding columns, where not all are listed.
const PRICING: f64 = 0.6;

/// Rounds of that which look everywhere.
const THOROUGH: usize = 2;

/// Times that columns around those of a choice are added.
const WIDER: usize = 2;

/// A relative gap that needs no more of them.
const SMALL: f64 = 2e-4;

/// Columns in question up to which the integer program is stated where not all were tried: more would take the time that
/// is better spent on a bound over all.
const FEW: usize = 400;

/// A choice to begin with whose gap is so many times the best one's is not worth improving.
const FAR: f64 = 100.0;

/// How close (relative) the bound over all configurations of a layer is brought to its best one.
const CLOSE: f64 = 2e-4;

/// The columns, in `[items]`, that a program takes.
pub(super) struct Programmed {
    pub(super) draft: Draft,
    /// No choice of the columns tried costs less; nothing if none is known for what is made least.
    pub(super) bound: Option<f64>,
    /// What the prices alone say of that: with other bytes left it moves by their worth.
    pub(super) priced: f64,
    /// Nor of all that there are, where that was found out.
    pub(super) whole: Option<f64>,
    pub(super) backend: Origin,
    /// All columns there are were tried.
    pub(super) full: bool,
    pub(super) columns: usize,
    /// `[tiers]` worth of a byte.
    pub(super) price: Vec<f64>,
}

impl Planner<'_> {
    /// The choice of columns that costs least.
    pub(super) fn program(
        &self,
        charge: &Charge,
        room: &Room,
        drafts: &[Draft],
        start: Instant,
        deadline: Instant,
    ) -> Result<Programmed> {
        let seconds = deadline.saturating_duration_since(start).as_secs_f64();
        let maker = Maker::new(self.inputs.shape, self.evidence, room, charge, self.wishes, seconds);
        let mut items = columns::dense_items(self.inputs.shape, room, charge, self.wishes);
        items.extend(maker.items());
        let known: Vec<Vec<Vec<usize>>> =
            drafts.iter().filter_map(|d| self.as_columns(&maker, &mut items, d)).collect();
        // A bound is owed however slow the machine is: without prices nothing else is any good.
        let soon = Instant::now() + Duration::from_secs(2);
        let mut dual = dual::maximise(&items, room, None, deadline.max(soon))?;
        if maker.whole {
            dual = self.price_whole(&maker, &mut items, dual, deadline)?;
        } else if !maker.grid.full {
            dual = self.refine(&maker, &mut items, room, dual, deadline)?;
        }

        let ranked = search::ranked(&items, room, &dual, f64::INFINITY);
        let known = known.into_iter().filter_map(|columns| Choice::new(&items, room, columns)).collect();
        let mut best = whole_choice(&items, room, &dual, &ranked, known, deadline);

        for _ in 0..if maker.whole { WIDER } else { 0 } {
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            let Some(choice) = best.take_if(|b| b.cost_s - dual.bound_s > SMALL * b.cost_s && !left.is_zero()) else {
                break;
            };
            maker.widen(&mut items, &choice.columns, &dual.price, now + left / 3);
            dual = dual::maximise(&items, room, Some(&dual.price), now + left / 2)?;
            let ranked = search::ranked(&items, room, &dual, f64::INFINITY);
            best = polished(&items, room, &dual, &ranked, vec![choice], deadline);
        }

        let mut backend = Origin::LocalSearch;
        let mut bound = dual.bound_s;
        let is_open =
            |best: &Option<Choice>, bound: f64| best.as_ref().is_none_or(|b| b.cost_s - bound > NO_GAP * b.cost_s);
        // Where not all columns were tried, those in question are far too many to prove more.
        if let (true, true, Some(known)) = (maker.grid.full, is_open(&best, bound), &best) {
            let found = labels::solve(&items, room, &dual, known, deadline);
            if found.bound_s > bound || found.choice.is_some() {
                backend = Origin::PartialChoices;
            }
            bound = bound.max(found.bound_s);
            best = found.choice.or(best);
        }
        let open = is_open(&best, bound);
        let left = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        if open && (left > 0.0 || best.is_none()) {
            let most = if maker.grid.full { program::MAX_COLUMNS } else { FEW };
            let found = program::solve(&items, room, &dual, best.as_ref(), most, left.max(1.0), self.backend);
            if let Some(choice) = found.choice
                && best.as_ref().is_none_or(|b| choice.cost_s < b.cost_s)
            {
                best = Some(choice);
                backend = Origin::IntegerProgram(self.backend);
            }
            if let (true, Some(best)) = (found.proven, &best) {
                bound = best.cost_s;
                backend = Origin::IntegerProgram(self.backend);
            }
        }
        let Some(best) = best else { bail!(infeasible::no_division(self.inputs, room, self.wishes)) };
        let whole = maker.whole.then(|| maker.bound_whole(&mut items, &dual.price, CLOSE, deadline)).flatten();
        Ok(Programmed {
            draft: self.as_draft(&maker, &items, &best),
            bound: Some(bound.min(best.cost_s)),
            priced: dual.bound_s,
            whole: whole.map(|sum| sum - room.priced_left(&dual.price)),
            backend,
            full: maker.grid.full,
            columns: items.iter().map(Item::len).sum(),
            price: dual.price,
        })
    }

    /// Adds what the prices favour among all configurations, and prices again, for most of the time that is left.
    pub(super) fn price_whole(
        &self,
        maker: &Maker<'_>,
        items: &mut [Item],
        mut dual: Dual,
        deadline: Instant,
    ) -> Result<Dual> {
        const ROUNDS: usize = 40;
        let begin = Instant::now();
        let end = begin + deadline.saturating_duration_since(begin).mul_f64(PRICING);
        let mut quiet = 0;
        for round in 0..ROUNDS {
            let started = Instant::now();
            let before = dual.bound_s;
            // At first, prices are far off and so are the columns; and when steps bring nothing more.
            let thorough = round < THOROUGH || quiet > 0;
            let added = maker.price_whole(items, &dual.price, thorough, end);
            // An old price's value is no bound over more columns.
            dual = dual::maximise(items, self.room, Some(&dual.price), end.max(Instant::now() + started.elapsed()))?;
            let settled = before - dual.bound_s <= SETTLED * dual.bound_s.abs();
            quiet = if settled { quiet + 1 } else { 0 };
            if (added == 0 && thorough) || quiet > 1 || Instant::now() + started.elapsed() > end {
                break;
            }
        }
        Ok(dual)
    }

    /// Adds the counts between the grid's points around what the prices favour, and prices again, for at most half of
    /// the time that is left.
    pub(super) fn refine(
        &self,
        maker: &Maker<'_>,
        items: &mut [Item],
        room: &Room,
        mut dual: Dual,
        deadline: Instant,
    ) -> Result<Dual> {
        let begin = Instant::now();
        let end = begin + deadline.saturating_duration_since(begin).mul_f64(PRICING);
        for round in 0..3 {
            let started = Instant::now();
            for item in items.iter_mut() {
                if Instant::now() >= end {
                    break;
                }
                let Meaning::Experts(members, configs) = &item.meaning else { continue };
                let (at, few) = (members[0], if members.len() > 1 { ALIKE } else { 1 });
                let around_these: Vec<Config> =
                    search::apart(item, &dual.price, few).into_iter().map(|c| configs[c]).collect();
                let shape = &self.evidence.layers[at].shape;
                for best in around_these {
                    let axes = around(&maker.grid, &best, shape, maker.most(at), self.room.home(), round);
                    maker.extend(item, &axes);
                }
            }
            // An old price's value is no bound over more columns.
            dual = dual::maximise(items, room, Some(&dual.price), end)?;
            if Instant::now() + started.elapsed() > end {
                break;
            }
        }
        Ok(dual)
    }

    /// A rule's draft as columns, if pins follow the train order as columns do. Adds the columns it needs.
    fn as_columns(&self, maker: &Maker<'_>, items: &mut [Item], draft: &Draft) -> Option<Vec<Vec<usize>>> {
        let fast = self.room.home();
        let mut all = Vec::with_capacity(items.len());
        for item in items {
            let mut columns = Vec::new();
            match &item.meaning {
                Meaning::Dense(groups, tiers) => {
                    for &group in groups {
                        columns.push(tiers.iter().position(|&t| t == draft.dense[group])?);
                    }
                }
                Meaning::Experts(layers, _) => {
                    for layer in layers.clone() {
                        let (placed, evidence) = (&draft.layers[layer], &self.evidence.layers[layer]);
                        let mut config = Config {
                            cuts: [0; room::MAX_FAST],
                            slots: placed.slots as u16,
                            slot_tier: placed.slot_tier as u8,
                        };
                        let mut sum = 0;
                        for tier in 0..fast {
                            sum +=
                                placed.pinned.iter().filter(|p| p.tier == tier).map(|p| p.experts.len()).sum::<usize>();
                            config.cuts[tier] = sum as u16;
                        }
                        let pins: usize = placed.pinned.iter().map(|p| p.experts.len()).sum();
                        let none_fixed = self.wishes.layer(placed.layer).fixed.is_empty();
                        if !none_fixed && pins > 0 {
                            config = maker.config_of(layer, placed)?;
                        }
                        let same = maker.placement(layer, &config) == *placed;
                        if !same && (!none_fixed || matches!(evidence.judged, Judged::Recorded(_))) {
                            return None;
                        }
                        columns.push(maker.add(item, config)?);
                    }
                }
            }
            all.push(columns);
        }
        Some(all)
    }

    fn as_draft(&self, maker: &Maker<'_>, items: &[Item], choice: &Choice) -> Draft {
        let mut dense = vec![0; self.inputs.shape.dense.len()];
        let mut layers = vec![None; self.evidence.layers.len()];
        for (item, columns) in items.iter().zip(&choice.columns) {
            match &item.meaning {
                Meaning::Dense(groups, tiers) => {
                    // Which of alike groups is where costs nothing: the last layers are on the fastest tier, beside the head,
                    // and neighbours together, so that a hidden state seldom goes from one to another.
                    let mut placed: Vec<TierIdx> = columns.iter().map(|&c| tiers[c]).collect();
                    placed.sort_unstable_by(|a, b| b.cmp(a));
                    groups.iter().zip(placed).for_each(|(&group, tier)| dense[group] = tier);
                }
                Meaning::Experts(members, configs) => {
                    for (&at, &c) in members.iter().zip(columns) {
                        let placed = maker.placement(at, &configs[c]);
                        let by_hand = !self.wishes.layer(placed.layer).is_empty();
                        layers[at] =
                            Some(if by_hand { placed } else { all_pinned(placed, &self.evidence.layers[at].shape) });
                    }
                }
            }
        }
        Draft { dense, layers: layers.into_iter().flatten().collect() }
    }
}

/// A choice near the bound: several to begin with are improved, and the best of those polished, one on each core.
fn whole_choice(
    items: &[Item],
    room: &Room,
    dual: &Dual,
    ranked: &[Vec<(usize, f64)>],
    known: Vec<Choice>,
    deadline: Instant,
) -> Option<Choice> {
    let begin = Instant::now();
    let part = begin + deadline.saturating_duration_since(begin) / 4;
    let starts = round::choices(items, room, dual, ranked, deadline)
        .into_iter()
        .chain(search::even(items, room, dual, ranked, &[]).into_iter().take(2))
        .chain(search::greedy(items, room, dual))
        .chain(known);
    let short = search::shortlist(ranked);
    let mut found: Vec<Choice> = Vec::new();
    for choice in starts {
        let least = found.iter().map(|c| c.cost_s).fold(f64::INFINITY, f64::min);
        if !found.is_empty() && (least - dual.bound_s <= NO_GAP * least || Instant::now() >= part) {
            break;
        }
        // Single changes don't make up for so much.
        if choice.cost_s - dual.bound_s > FAR * (least - dual.bound_s) {
            continue;
        }
        found.push(search::improve(items, room, &short, choice, deadline));
    }
    found.sort_by(|a, b| a.cost_s.total_cmp(&b.cost_s));
    found.dedup();
    polished(items, room, dual, ranked, found, deadline)
}

/// The best of some choices, the cheapest first, after as many of them as there are cores have been polished, for half of
/// the time that is left.
fn polished(
    items: &[Item],
    room: &Room,
    dual: &Dual,
    ranked: &[Vec<(usize, f64)>],
    choices: Vec<Choice>,
    deadline: Instant,
) -> Option<Choice> {
    let first = choices.first()?;
    let most = first.cost_s - dual.bound_s;
    if most <= NO_GAP * first.cost_s {
        return choices.into_iter().next();
    }
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let lists = polish::Lists::new(items, room, dual, ranked, most);
    let now = Instant::now();
    let end = now + deadline.saturating_duration_since(now) / 2;
    std::thread::scope(|scope| {
        let running: Vec<_> = choices
            .into_iter()
            .take(threads)
            .map(|choice| scope.spawn(|| polish::polish(&lists, choice, 1, end)))
            .collect();
        let done = running.into_iter().filter_map(|thread| thread.join().ok());
        done.min_by(|a, b| a.cost_s.total_cmp(&b.cost_s))
    })
}

/// The same layer with pins for slots where there is a slot for every pooled expert: as many bytes, and none of them has to
/// be missed once.
fn all_pinned(mut placed: LayerPlacement, shape: &ExpertShape) -> LayerPlacement {
    let pinned: BTreeSet<u32> = placed.pinned.iter().flat_map(|pins| pins.experts.iter().copied()).collect();
    let pooled = (0..shape.n_expert).filter(|e| !pinned.contains(e));
    if placed.slots == 0 || placed.slots as usize != pooled.clone().count() {
        return placed;
    }
    match placed.pinned.iter_mut().find(|pins| pins.tier == placed.slot_tier) {
        Some(Pins { experts, .. }) => {
            experts.extend(pooled);
            experts.sort_unstable();
        }
        None => {
            placed.pinned.push(Pins { tier: placed.slot_tier, experts: pooled.collect() });
            placed.pinned.sort_unstable();
        }
    }
    placed.slots = 0;
    placed
}

/// Axes around a configuration: as far as the grid's next points, then ever closer.
fn around(grid: &Grid, best: &Config, shape: &ExpertShape, most: u16, fast: usize, round: u32) -> Axes {
    // Steps to each side: enough that a few rounds come down to steps of one, few enough that a round stays cheap.
    const SIDE: u16 = 3;
    let n_expert = shape.n_expert as u16;
    let span = |from: u16, to: u16, at: u16| -> Vec<u16> {
        let points = grid.axis(from, to);
        let below = at - points.iter().rev().find(|&&p| p < at).copied().unwrap_or(at);
        let above = points.iter().find(|&&p| p > at).copied().unwrap_or(at).saturating_sub(at);
        let reach = (below.max(above) / SIDE.pow(round)).max(1);
        let step = reach.div_ceil(SIDE).max(1);
        let steps = (0..=reach).step_by(step.into());
        let mut axis: Vec<u16> = steps
            .flat_map(|d| [at.checked_sub(d), at.checked_add(d)])
            .flatten()
            .filter(|p| (from..=to).contains(p))
            .collect();
        axis.sort_unstable();
        axis.dedup();
        axis
    };
    let last = best.cuts[fast.saturating_sub(1)];
    let mut cuts: Vec<u16> = best.cuts[..fast.saturating_sub(1)].iter().flat_map(|&c| span(0, most, c)).collect();
    cuts.sort_unstable();
    cuts.dedup();
    let pooled = n_expert - last;
    let least = (shape.n_used as u16).min(pooled);
    let slots = if best.slots == 0 { vec![least] } else { span(least, pooled, best.slots) };
    Axes { cuts, last_cuts: if fast == 0 { vec![0] } else { span(0, most, last) }, slots: Some(slots) }
}
