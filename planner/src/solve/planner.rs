//! From columns to a plan: prices, search, proof, and what is said of it.

use super::choose::Programmed;
use super::columns::Charge;
use super::goal::Goal;
use super::room::{Room, TICKS};
use super::rules::{self, Draft, Rule};
use super::wishes::Wishes;
use super::{Inputs, check, columns, dual, infeasible};
use crate::cli::{Backend, Objective};
use crate::cost::{self, predict, token_s};
use crate::profile::Evidence;
use anyhow::{Result, bail, ensure};
use std::time::Instant;
use tier_plan_runtime::formats::placement::{DensePlacement, Placement, PlanTier, Prediction, SolverReport, TierIdx};
use tier_plan_runtime::gpu::fully_on_gpu;
use tier_plan_runtime::model::shape::DenseKind;

/// A relative gap that is rounding.
pub(super) const NO_GAP: f64 = 1e-9;

/// Makes plans of one model for one room.
pub(super) struct Planner<'a> {
    pub(super) inputs: &'a Inputs<'a>,
    pub(super) evidence: &'a Evidence,
    pub(super) room: &'a Room,
    pub(super) goal: &'a Goal,
    pub(super) wishes: &'a Wishes,
    pub(super) backend: Backend,
}

impl Planner<'_> {
    /// A rule's plan.
    fn baseline(&self, rule: Rule, draft: &Draft) -> Result<Placement> {
        let mut plan = self.assemble(rule.name(), draft);
        plan.solver.backend = rule.name().to_string();
        plan.solver.status = "baseline".to_string();
        self.checked(plan)
    }

    /// The rules' drafts and plans, those that fit.
    pub(super) fn baselines(&self) -> Result<(Vec<Draft>, Vec<Placement>)> {
        let (mut drafts, mut plans) = (Vec::new(), Vec::new());
        for rule in Rule::ALL {
            if let Some(draft) = rules::draft(rule, self.inputs.shape, self.evidence, self.room) {
                plans.push(self.baseline(rule, &draft)?);
                drafts.push(draft);
            }
        }
        Ok((drafts, plans))
    }

    /// The most bytes that one choice puts anywhere: all experts of a layer, or a dense group with a layer's cache.
    pub(super) fn largest_column(&self) -> u64 {
        let Inputs { shape, .. } = self.inputs;
        let experts = shape.experts.iter().map(|e| e.expert_bytes.saturating_mul(e.n_expert.into()));
        let caches = self.room.caches.iter().map(|c| c.bytes).max().unwrap_or(0);
        experts.chain(shape.dense.iter().map(|d| d.bytes.saturating_add(caches))).max().unwrap_or(0)
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
            if let Some((cache, at)) = room.brings(group, tier) {
                tiers[at].kv_bytes += cache.bytes;
            }
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
            kv_tier: self.common_cache(draft),
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

    /// The tier that the plan says has the cache: a real GPU, if it has all attention.
    fn common_cache(&self, draft: &Draft) -> TierIdx {
        let groups = self.inputs.shape.dense.iter().zip(&draft.dense);
        let mut tiers = groups.filter(|(group, _)| group.kind == DenseKind::Attention).map(|(_, &tier)| tier);
        let first = tiers.next().filter(|&t| self.room.tiers[t].is_gpu() && self.room.kv_bytes == 0);
        first.filter(|&first| tiers.all(|t| t == first)).unwrap_or(self.room.kv_tier)
    }

    /// What a plan comes to under the goal.
    pub(super) fn value(&self, plan: &Placement) -> f64 {
        self.goal.value(plan, self.inputs.shape, self.evidence)
    }

    /// Whether a plan is one that was asked for, but for its value.
    fn may_be(&self, plan: &Placement) -> bool {
        self.wishes.holds(plan)
            && (!self.goal.limits_time() || self.goal.reached(plan, self.inputs.shape, self.evidence))
    }

    /// The plan of least value, and what was found with it.
    pub(super) fn optimum(
        &self,
        drafts: &[Draft],
        baselines: &[Placement],
        start: Instant,
        deadline: Instant,
        notes: &mut Vec<String>,
    ) -> Result<(Placement, Programmed)> {
        let (mut plan, found) = if self.goal.has_weights() {
            self.weighted(drafts, start, deadline)?
        } else {
            let charge = Charge::new(self.goal, (1.0, 1.0));
            let found = self.program(&charge, self.room, drafts, start, deadline)?;
            (self.assemble("ilp", &found.draft), found)
        };
        // Layers of a model that stays on one accelerator have a fixed time of their own, which no column knows.
        let resident = baselines.iter().filter(|b| self.may_be(b) && fully_on_gpu(b, self.inputs.shape).is_some());
        let least = resident.min_by(|a, b| self.value(a).total_cmp(&self.value(b)));
        if let Some(all) = least.filter(|b| self.value(b) < self.value(&plan)) {
            plan = Placement { name: plan.name, ..all.clone() };
        }
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
        Ok((self.checked(plan)?, found))
    }

    /// Fills in what is proven of a plan.
    fn report(&self, plan: &mut Placement, found: &Programmed) {
        plan.solver.backend = found.backend.name().to_string();
        plan.solver.status = "feasible".to_string();
        let gap = found.bound.and_then(|bound| self.gap(plan, bound));
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
    pub(super) fn gap(&self, plan: &Placement, bound: f64) -> Option<f64> {
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

    /// Seconds of a step over so many sequences whatever the plan: overheads, and each one's keys and values, but for those
    /// that go where attention goes.
    pub(super) fn fixed_s(&self, sequences: u32) -> f64 {
        let Inputs { shape, machine, .. } = *self.inputs;
        let overhead = cost::overhead_s(shape.n_layer, machine.layer_overhead_us, machine.token_overhead_us);
        overhead + f64::from(sequences) * self.room.kv_s()
    }

    /// Seconds of the dense groups, each on the tier that is cheapest at some prices of bytes, which are added; nothing where
    /// one has no tier.
    pub(super) fn dense_s(&self, price: &[f64]) -> Option<f64> {
        let charge = Charge::new(self.goal, (1.0, 1.0));
        let items = columns::dense_items(self.inputs.shape, self.room, &charge, self.wishes);
        items.iter().map(|item| Some(item.count() as f64 * dual::cheapest(item, price)?.1)).sum()
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
                return Ok((rule, Programmed { draft: draft.clone(), bound: None, whole: None, ..found }));
            }
            bail!(infeasible::target(
                &plan,
                found.bound.map_or(0.0, |bound| bound + self.fixed_s(1)),
                most_s,
                self.inputs
            ));
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
                    (found.bound, found.whole) = (None, None);
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
}
