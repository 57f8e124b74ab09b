//! From columns to a plan: prices, search, proof, and what is said of it.

use super::columns::{self, Charge, Config, Item, Meaning};
use super::dual::{self, Dual};
use super::goal::Goal;
use super::grid::{Axes, Grid};
use super::maker::Maker;
use super::room::{self, Room, TICKS};
use super::rules::{Draft, Rule};
use super::search::{self, Choice};
use super::wishes::Wishes;
use super::{Inputs, check, infeasible, labels, program};
use crate::cli::{Backend, Objective};
use crate::cost::{self, predict, token_s};
use crate::profile::{Evidence, Judged};
use anyhow::{Result, bail, ensure};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use tier_plan_runtime::formats::placement::{
    DensePlacement, LayerPlacement, Placement, PlanTier, Prediction, SolverReport,
};
use tier_plan_runtime::model::shape::ExpertShape;

/// Where a plan's integer choice came from. The prices for bytes, and with them the bound, are always good_lp's and
/// microlp's.
#[derive(Debug, Clone, Copy)]
enum Origin {
    LocalSearch,
    PartialChoices,
    IntegerProgram(Backend),
}

impl Origin {
    /// The name in plans.
    fn name(self) -> &'static str {
        match self {
            Origin::LocalSearch => "microlp prices, local search",
            Origin::PartialChoices => "microlp prices, partial choices",
            Origin::IntegerProgram(backend) => backend.name(),
        }
    }
}

/// A relative gap that is rounding.
const NO_GAP: f64 = 1e-9;

/// Columns of an item with several members that are refined: its members share it out among about as many.
const ALIKE: usize = 3;

/// A relative gain of the bound that more columns are not worth the time for.
const SETTLED: f64 = 2e-5;

/// How close (relative) the bound over all configurations of a layer is brought to its best one.
const CLOSE: f64 = 2e-4;

/// Makes plans of one model for one room.
pub(super) struct Planner<'a> {
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) evidence: &'a Evidence,
    pub(super) room: &'a Room,
    pub(super) goal: &'a Goal,
    pub(super) wishes: &'a Wishes,
    pub(super) backend: Backend,
}

/// The columns, in `[items]`, that a program takes.
struct Programmed {
    draft: Draft,
    /// No choice of the columns tried costs less.
    bound: f64,
    /// Nor of all that there are, where that was found out.
    whole: Option<f64>,
    backend: Origin,
    /// All columns there are were tried.
    full: bool,
    columns: usize,
    /// `[tiers]` worth of a byte.
    price: Vec<f64>,
}

impl Planner<'_> {
    /// A rule's plan.
    pub(super) fn baseline(&self, rule: Rule, draft: &Draft) -> Result<Placement> {
        let mut plan = self.assemble(rule.name(), draft);
        plan.solver.backend = rule.name().to_string();
        plan.solver.status = "baseline".to_string();
        self.checked(plan)
    }

    fn checked(&self, plan: Placement) -> Result<Placement> {
        let wrong = check::check(&plan, self.inputs.shape, self.evidence);
        ensure!(
            wrong.is_empty(),
            "the plan '{}' did not pass its own check, which is a mistake in this program: {}",
            plan.name,
            wrong.join("; ")
        );
        Ok(plan)
    }

    /// A whole plan from a draft, predicted; its solver lines are to be filled in.
    fn assemble(&self, name: &str, draft: &Draft) -> Placement {
        let (shape, room, machine) = (self.inputs.shape, self.room, self.inputs.machine);
        let mut tiers: Vec<PlanTier> = room
            .tiers
            .iter()
            .zip(&room.budget_bytes)
            .map(|(tier, &budget_bytes)| PlanTier {
                tier: tier.clone(),
                budget_bytes,
                dense_bytes: 0,
                pinned_bytes: 0,
                slot_bytes: 0,
                kv_bytes: 0,
                staging_bytes: 0,
                home_bytes: 0,
            })
            .collect();
        tiers[room.kv_tier].kv_bytes = room.kv_bytes;
        tiers[room.staging_tier].staging_bytes = room.staging_bytes;
        for (group, &tier) in shape.dense.iter().zip(&draft.dense) {
            tiers[tier].dense_bytes += group.bytes;
        }
        for (layer, experts) in draft.layers.iter().zip(&shape.experts) {
            let mut pooled = u64::from(experts.n_expert);
            for (tier, pinned) in &layer.pinned {
                tiers[*tier].pinned_bytes += pinned.len() as u64 * experts.expert_bytes;
                pooled -= pinned.len() as u64;
            }
            tiers[layer.slot_tier].slot_bytes += u64::from(layer.slots) * experts.expert_bytes;
            tiers[room.home()].home_bytes += pooled * experts.expert_bytes;
        }
        let dense = shape
            .dense
            .iter()
            .zip(&draft.dense)
            .map(|(group, &tier)| DensePlacement { kind: group.kind, layer: group.layer, tier })
            .collect();
        let mut plan = Placement {
            name: name.to_string(),
            model: shape.id.clone(),
            profile: self.inputs.profile.map(|p| p.id.clone()),
            machine: machine.id.clone(),
            layer_overhead_us: machine.layer_overhead_us,
            token_overhead_us: machine.token_overhead_us,
            context: self.inputs.context,
            kv_tier: room.kv_tier,
            kv_type: self.inputs.kv_type,
            staging_tier: room.staging_tier,
            staging_experts: room.staging_experts,
            tiers,
            dense,
            layers: draft.layers.clone(),
            solver: SolverReport {
                backend: String::new(),
                status: String::new(),
                objective_s: 0.0,
                bound_s: None,
                gap: None,
                solve_s: 0.0,
                goal: None,
            },
            predicted: Prediction {
                at: cost::middle(self.inputs.context),
                prompt_gflops: machine.prompt_gflops(),
                ..Prediction::default()
            },
        };
        plan.predicted = predict(&plan, shape, self.evidence);
        plan.solver.objective_s = token_s(&plan.predicted);
        plan.solver.goal = self.goal.stored(self.value(&plan), None);
        plan
    }

    /// What a plan comes to under the goal.
    fn value(&self, plan: &Placement) -> f64 {
        self.goal.value(plan, self.inputs.shape, self.evidence)
    }

    /// Whether a plan is one that was asked for, but for its value.
    fn may_be(&self, plan: &Placement) -> bool {
        self.wishes.holds(plan)
            && (!self.goal.limits_time() || self.goal.reached(plan, self.inputs.shape, self.evidence))
    }

    /// The plan of least value, and what a byte of each tier is worth.
    pub(super) fn optimum(
        &self,
        drafts: &[Draft],
        baselines: &[Placement],
        start: Instant,
        deadline: Instant,
        notes: &mut Vec<String>,
    ) -> Result<(Placement, Vec<f64>)> {
        let (mut plan, found) = if self.goal.has_weights() {
            self.weighted(drafts, start, deadline)?
        } else {
            let charge = Charge::new(self.goal, (1.0, 1.0));
            let found = self.program(&charge, self.room, drafts, start, deadline)?;
            (self.assemble("ilp", &found.draft), found)
        };
        self.report(&mut plan, &found);
        if !found.full {
            let of_all = found.whole.and_then(|w| self.gap(&plan, w)).map_or(String::new(), |gap| {
                format!("; over every count the gap is proven to be at most {:.2} %", gap * 100.0)
            });
            notes.push(format!(
                "the model has too many experts to list every count of pins and slots: the bound and the gap are over \
                 the {} that were tried{of_all}",
                found.columns
            ));
        }
        let value = self.value(&plan);
        let allowed = baselines.iter().filter(|b| self.may_be(b));
        let least = allowed.min_by(|a, b| self.value(a).total_cmp(&self.value(b)));
        if let Some(rule) = least.filter(|b| self.value(b) < value * (1.0 - NO_GAP)) {
            plan = Placement { name: plan.name, ..rule.clone() };
            plan.solver.status = format!("feasible: the rule {} was faster on held-out tokens", rule.name);
            notes.push(format!(
                "the rule '{}' happened to be faster on the held-out tokens than what the train split suggests, so \
                 its plan was taken; nothing is proven about it",
                rule.name
            ));
        }
        self.speak_of_target(&plan, notes)?;
        plan.solver.solve_s = start.elapsed().as_secs_f64();
        Ok((self.checked(plan)?, found.price))
    }

    /// Fills in what is proven of a plan.
    fn report(&self, plan: &mut Placement, found: &Programmed) {
        plan.solver.backend = found.backend.name().to_string();
        plan.solver.status = "feasible".to_string();
        let gap = self.gap(plan, found.bound);
        plan.solver.gap = gap;
        if gap.is_some_and(|gap| gap <= NO_GAP) {
            plan.solver.status = "optimal".to_string();
        }
        let value = self.value(plan);
        let bound = gap.map(|gap| value * (1.0 - gap));
        if matches!(self.goal.objective, Objective::Latency | Objective::Energy | Objective::Cost) {
            plan.solver.bound_s = gap.map(|gap| plan.solver.objective_s * (1.0 - gap));
        }
        plan.solver.goal = self.goal.stored(value, bound);
    }

    /// The relative gap between a plan's value and a bound of its columns' costs; none for a cost that is a product, of
    /// which columns only know the tangent.
    fn gap(&self, plan: &Placement, bound: f64) -> Option<f64> {
        let (value, bound) = match self.goal.objective {
            Objective::Cost if self.goal.has_weights() => return None,
            Objective::Memory => (self.value(plan), bound + self.goal.fixed_weight(self.room)),
            Objective::Throughput => {
                (self.value(plan), bound + self.fixed_s(self.goal.batch) / f64::from(self.goal.batch))
            }
            _ => (plan.solver.objective_s, bound + self.fixed_s(1)),
        };
        (value > 0.0).then(|| ((value - bound) / value).max(0.0)).or((value == 0.0).then_some(0.0))
    }

    /// Seconds of a step over so many sequences whatever the plan: overheads, and each one's keys and values.
    fn fixed_s(&self, sequences: u32) -> f64 {
        let Inputs { shape, machine, context, kv_type, .. } = *self.inputs;
        let overhead = cost::overhead_s(shape.n_layer, machine.layer_overhead_us, machine.token_overhead_us);
        let cache = kv_type.moved_bytes(shape, cost::middle(context).into(), 1) as f64;
        overhead + f64::from(sequences) * cost::read_s(&self.room.tiers[self.room.kv_tier], cache)
    }

    /// Goals in which bytes cost something themselves: the fastest plan first, then from it the least value.
    fn weighted(&self, drafts: &[Draft], start: Instant, deadline: Instant) -> Result<(Placement, Programmed)> {
        const TANGENTS: u32 = 4;
        let part = deadline.saturating_duration_since(start) / (TANGENTS + 1);
        let fastest = Goal::new(Objective::Latency, None, None, self.inputs)?;
        let plain = Planner { goal: &fastest, ..*self };
        let charge = Charge::new(&fastest, (1.0, 1.0));
        let mut found = plain.program(&charge, self.room, drafts, start, start + part)?;
        let mut plan = self.assemble("ilp", &found.draft);
        if let Some(most_s) = self.goal.most_s().filter(|_| !self.may_be(&plan)) {
            // A rule that is faster on held-out tokens may do what the train split's plan does not.
            let rules = drafts.iter().map(|draft| (draft, self.assemble("ilp", draft))).filter(|(_, p)| self.may_be(p));
            if let Some((draft, rule)) = rules.min_by(|a, b| self.value(&a.1).total_cmp(&self.value(&b.1))) {
                return Ok((rule, Programmed { draft: draft.clone(), bound: 0.0, whole: None, ..found }));
            }
            bail!(infeasible::target(&plan, found.bound + self.fixed_s(1), most_s, self.inputs));
        }
        let mut room = self.room.clone();
        if let (true, Some(most_s)) = (self.goal.limits_time(), self.goal.most_s()) {
            room.left_bytes.push(((most_s - self.fixed_s(1)).max(0.0) * TICKS).floor().min(1e18) as u64);
        }
        let mut drafts = drafts.to_vec();
        let memory = self.goal.objective == Objective::Memory;
        for round in 0..if memory { 1 } else { TANGENTS } {
            drafts.insert(0, found.draft.clone());
            let charge = Charge::new(self.goal, (self.goal.usd(&plan), token_s(&plan.predicted)));
            let end = if memory { deadline } else { start + part * (round + 2) };
            let next = match self.program(&charge, &room, &drafts, Instant::now(), end) {
                Ok(next) => next,
                // So near the fastest plan that rounded times leave no other; nothing is known of less memory then.
                Err(_) if self.may_be(&plan) => {
                    (found.bound, found.whole) = (0.0, None);
                    break;
                }
                Err(error) => return Err(error),
            };
            let better = self.assemble("ilp", &next.draft);
            let gains = self.may_be(&better) && self.value(&better) < self.value(&plan) * (1.0 - NO_GAP);
            if gains || memory {
                plan = better;
                found = next;
            }
            if !gains {
                break;
            }
        }
        Ok((plan, found))
    }

    /// Says whether a target is reached, and what of each tier's rate that takes.
    fn speak_of_target(&self, plan: &Placement, notes: &mut Vec<String>) -> Result<()> {
        let (Some(target), Some(most_s)) = (self.goal.target_tok_s, self.goal.most_s()) else { return Ok(()) };
        if !self.goal.reached(plan, self.inputs.shape, self.evidence) {
            let speed = match self.goal.objective {
                Objective::Throughput => 1.0 / self.value(plan),
                _ => plan.predicted.decode_tok_s,
            };
            notes.push(format!("the target of {target} tok/s is not reached: {speed:.3} tok/s are predicted"));
            return Ok(());
        }
        if self.goal.objective == Objective::Throughput {
            return Ok(());
        }
        let of_tier = plan.tiers.iter().zip(&plan.predicted.read_bytes).map(|(tier, &bytes)| {
            let allowed = tier.tier.read_gbps * 1e9 * most_s;
            (tier.tier.name.as_str(), bytes / allowed)
        });
        // Reads of one tier follow each other, so this follows from the time of the token; it is checked all the same.
        if let Some((name, share)) = of_tier.clone().find(|(_, share)| *share > 1.0 + 1e-9) {
            bail!(
                "'{name}' would be read at {share:.2} of its rate to reach {target} tok/s, a mistake in this program"
            );
        }
        let shares: Vec<String> = of_tier.map(|(name, share)| format!("{name} {:.0} %", share * 100.0)).collect();
        notes.push(format!("at {target} tok/s the reads of a token take of each tier's rate: {}", shares.join(", ")));
        Ok(())
    }

    /// The choice of columns that costs least.
    fn program(
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

        let mut best: Option<Choice> = None;
        let short = search::shortlist(&items, room, &dual);
        let starts = search::even(&items, room, &dual)
            .into_iter()
            .take(2)
            .chain(search::greedy(&items, room, &dual))
            .chain(known.into_iter().filter_map(|columns| Choice::new(&items, room, columns)));
        for choice in starts {
            let gap = |c: &Choice| c.cost_s - dual.bound_s <= NO_GAP * c.cost_s;
            if best.as_ref().is_some_and(gap) {
                break;
            }
            let better = search::improve(&items, room, &short, choice, deadline);
            if best.as_ref().is_none_or(|b| better.cost_s < b.cost_s) {
                best = Some(better);
            }
        }

        let mut backend = Origin::LocalSearch;
        let mut bound = dual.bound_s;
        let is_open =
            |best: &Option<Choice>, bound: f64| best.as_ref().is_none_or(|b| b.cost_s - bound > NO_GAP * b.cost_s);
        if let (true, Some(known)) = (is_open(&best, bound), &best) {
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
            let found = program::solve(&items, room, &dual, best.as_ref(), left.max(1.0), self.backend);
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
            bound: bound.min(best.cost_s),
            whole: whole.map(|sum| sum - room.priced_left(&dual.price)),
            backend,
            full: maker.grid.full,
            columns: items.iter().map(Item::len).sum(),
            price: dual.price,
        })
    }

    /// Adds what the prices favour among all configurations, and prices again, for at most half of the time that is left.
    pub(super) fn price_whole(
        &self,
        maker: &Maker<'_>,
        items: &mut [Item],
        mut dual: Dual,
        deadline: Instant,
    ) -> Result<Dual> {
        const ROUNDS: usize = 12;
        let begin = Instant::now();
        let end = begin + deadline.saturating_duration_since(begin) / 2;
        for _ in 0..ROUNDS {
            let started = Instant::now();
            let before = dual.bound_s;
            let added = maker.price_whole(items, &dual.price, end);
            // An old price's value is no bound over more columns.
            dual = dual::maximise(items, self.room, Some(&dual.price), end.max(Instant::now() + started.elapsed()))?;
            let settled = before - dual.bound_s <= SETTLED * dual.bound_s.abs();
            if added == 0 || settled || Instant::now() + started.elapsed() > end {
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
        let end = begin + deadline.saturating_duration_since(begin) / 2;
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
                            sum += placed.pinned.iter().filter(|p| p.0 == tier).map(|p| p.1.len()).sum::<usize>();
                            config.cuts[tier] = sum as u16;
                        }
                        let pins: usize = placed.pinned.iter().map(|p| p.1.len()).sum();
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
                    groups.iter().zip(columns).for_each(|(&group, &c)| dense[group] = tiers[c]);
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

/// The same layer with pins for slots where there is a slot for every pooled expert: as many bytes, and none of them has to
/// be missed once.
fn all_pinned(mut placed: LayerPlacement, shape: &ExpertShape) -> LayerPlacement {
    let pinned: BTreeSet<u32> = placed.pinned.iter().flat_map(|(_, experts)| experts.iter().copied()).collect();
    let pooled = (0..shape.n_expert).filter(|e| !pinned.contains(e));
    if placed.slots == 0 || placed.slots as usize != pooled.clone().count() {
        return placed;
    }
    match placed.pinned.iter_mut().find(|(tier, _)| *tier == placed.slot_tier) {
        Some((_, experts)) => {
            experts.extend(pooled);
            experts.sort_unstable();
        }
        None => {
            placed.pinned.push((placed.slot_tier, pooled.collect()));
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
