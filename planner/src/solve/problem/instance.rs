//! An instance: a problem with its KV tier settled, and what plans of it are worth.

use super::Problem;
use super::capacity::Capacity;
use super::columns::{self, Charge};
use super::constraints::Constraints;
use super::objective::ObjectiveFunction;
use super::pool::ColumnPool;
use crate::cost::{self, batch::Step};
use crate::profile::Evidence;
use crate::solve::options::{Backend, Depth, Objective};
use tier_plan_runtime::formats::placement::Placement;

/// Relative gap that is rounding.
pub(crate) const MAX_ROUNDING_GAP: f64 = 1e-9;

/// A problem with its KV tier settled, and everything that a search of it reads.
#[derive(Clone, Copy)]
pub(crate) struct Instance<'a> {
    pub(crate) problem: &'a Problem<'a>,
    pub(crate) evidence: &'a Evidence,
    pub(crate) capacity: &'a Capacity,
    pub(crate) objective: &'a ObjectiveFunction,
    pub(crate) constraints: &'a Constraints,
    pub(crate) backend: Backend,
    /// Columns that were priced before.
    pub(crate) pool: &'a ColumnPool,
    /// How far a search on an incomplete list of columns goes.
    pub(crate) depth: Depth,
    /// Whether the time that is left goes to a bound over the columns that were not tried.
    pub(crate) bounds_all: bool,
}

impl Instance<'_> {
    /// Returns the most bytes that one column puts anywhere.
    ///
    /// A column holds all experts of a layer, or a dense group with a layer's KV cache.
    pub(crate) fn largest_column(&self) -> u64 {
        let shape = self.problem.shape;
        let experts = shape
            .experts
            .iter()
            .map(|e| e.expert_bytes.saturating_mul(e.n_expert.into()));
        let caches = self
            .capacity
            .caches
            .iter()
            .map(|c| c.bytes.max(c.gpu_bytes))
            .max()
            .unwrap_or(0);
        experts
            .chain(shape.dense.iter().map(|d| d.bytes.saturating_add(caches)))
            .max()
            .unwrap_or(0)
    }

    /// Returns a plan's value under the objective; less is better.
    pub(crate) fn value(&self, plan: &Placement) -> f64 {
        self.objective
            .value(plan, self.problem.shape, self.evidence)
    }

    /// Whether a plan keeps the constraints and, where time is limited, the target.
    pub(crate) fn is_allowed(&self, plan: &Placement) -> bool {
        self.constraints.holds(plan)
            && (!self.objective.limits_time()
                || self
                    .objective
                    .meets_target(plan, self.problem.shape, self.evidence))
    }

    /// Returns the allowed plan of least value, the first of equals.
    pub(crate) fn least<'p>(
        &self,
        plans: impl Iterator<Item = &'p Placement>,
    ) -> Option<&'p Placement> {
        plans
            .filter(|plan| self.is_allowed(plan))
            .min_by(|a, b| self.value(a).total_cmp(&self.value(b)))
    }

    /// Returns the relative gap between a plan's value and a bound on its columns' cost.
    ///
    /// Returns `None` for a cost that is a product, of which columns only know the tangent.
    pub(crate) fn gap(&self, plan: &Placement, bound: f64) -> Option<f64> {
        let (value, bound) = match self.objective.kind {
            Objective::Cost if self.objective.has_weights() => return None,
            Objective::Memory => (
                self.value(plan),
                bound + self.objective.fixed_weight(self.capacity),
            ),
            Objective::Throughput => {
                let step = &self.objective.step;
                (
                    self.value(plan),
                    bound + self.fixed_s(step) / f64::from(step.texts),
                )
            }
            Objective::Latency | Objective::Cost | Objective::Energy => {
                (plan.solver.objective_s, bound + self.token_fixed_s())
            }
        };
        (value > 0.0)
            .then(|| ((value - bound) / value).max(0.0))
            .or((value == 0.0).then_some(0.0))
    }

    /// Returns the seconds of a step that no choice changes.
    ///
    /// They are the overheads, and each sequence's KV cache unless it moves with attention.
    fn fixed_s(&self, step: &Step) -> f64 {
        let Problem { shape, machine, .. } = *self.problem;
        let (layer_us, token_us) = (machine.layer_overhead_us, machine.token_overhead_us);
        let overhead = step.overhead_s(shape.n_layer, layer_us, token_us);
        overhead + f64::from(step.texts) * self.capacity.kv_s()
    }

    /// Returns the seconds of one token that no choice changes.
    pub(crate) fn token_fixed_s(&self) -> f64 {
        let Problem { shape, machine, .. } = *self.problem;
        let (layer_us, token_us) = (machine.layer_overhead_us, machine.token_overhead_us);
        cost::overhead_s(shape.n_layer, layer_us, token_us) + self.capacity.kv_s()
    }

    /// Returns the seconds and priced bytes of the dense groups, each on its cheapest tier.
    ///
    /// Returns `None` where a group fits no tier.
    pub(crate) fn dense_s(&self, price: &[f64]) -> Option<f64> {
        let charge = Charge::linear(self.objective);
        columns::dense_s(
            self.problem.shape,
            self.capacity,
            &charge,
            self.constraints,
            price,
        )
    }
}
