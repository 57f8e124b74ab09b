//! Refuses problems that no plan can solve, with the reason and a hint.

use super::{Capacity, MAX_FAST};
use crate::cost::home_in_place;
use crate::solve::problem::constraints::Constraints;
use crate::solve::problem::{Problem, hint};
use anyhow::{Result, bail, ensure};
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{PerTier, TierIdx};
use tier_plan_runtime::model::shape::{DenseKind, DenseShape};
use tier_plan_runtime::units::show_bytes;

impl Capacity {
    /// Checks that a GPU which the whole cache is fixed to has room for it and all attention.
    pub(super) fn check_fixed_cache(
        &self,
        problem: &Problem<'_>,
        constraints: &Constraints,
    ) -> Result<()> {
        let Problem { shape, kv_type, .. } = *problem;
        let is_attention = |d: &&DenseShape| d.kind == DenseKind::Attention;
        if let Some(gpu) = constraints
            .fixed_cache()
            .filter(|&t| self.tiers[t].is_gpu())
        {
            let attention = shape.dense.iter().filter(is_attention).map(|d| d.bytes);
            let bytes = attention.fold(0, u64::saturating_add);
            let needed = bytes.saturating_add(kv_type.cache_bytes(shape, problem.room()));
            let left = self.left_bytes[gpu.get()];
            ensure!(
                needed <= left,
                "--fix puts the key and value cache on '{}', a GPU's memory, and with it the attention of all \
                 layers: {}, but {} are left there; fix the attention of fewer layers instead (--fix \
                 {0}:attention:LAYERS), or {}",
                self.tiers[gpu].name,
                show_bytes(needed),
                show_bytes(left),
                hint(problem, gpu, needed.saturating_sub(left))
            );
        }
        Ok(())
    }

    /// Fails with the reason why no tier can have the KV cache.
    pub(super) fn refuse_cache(
        &self,
        problem: &Problem<'_>,
        constraints: &Constraints,
        none_allowed: bool,
    ) -> Result<()> {
        let staging = self.staging_tier;
        let left = self.left_bytes[staging.get()];
        let on_no_gpu = self.caches.iter().position(|c| c.gpus.is_empty());
        if let (Some(layer), true, true) = (on_no_gpu, constraints.of_cache(), none_allowed) {
            bail!(
                "--fix and --forbid leave no tier for the keys and values of layer {layer}: no GPU that may have \
                 them can have its attention too, and no other memory may have them; take one of them back"
            );
        }
        ensure!(
            !constraints.of_cache(),
            "no tier that --fix and --forbid leave for the key and value cache has room for its {}; take some of it \
             back, or shorten the context",
            show_bytes(self.kv_bytes)
        );
        ensure!(
            !self.tiers[staging].is_gpu(),
            "the GPUs have no room for the attention of every layer of '{}' with its keys and values, and there is \
             no other memory for those; add a DRAM tier to machine '{}', or {}",
            problem.shape.id.name,
            problem.machine.name,
            hint(problem, staging, self.kv_bytes)
        );
        bail!(
            "tier '{}' has {} left of its budget of {}, but the key and value cache of {} needs {} as {}; {}",
            self.tiers[staging].name,
            show_bytes(left),
            show_bytes(self.budget_bytes[staging]),
            match problem.sequences {
                1 => format!("{} tokens of context", problem.context),
                n => format!("{n} texts of {} tokens", problem.context),
            },
            show_bytes(self.kv_bytes),
            problem.kv_type,
            hint(problem, staging, self.kv_bytes.saturating_sub(left))
        );
    }

    /// Checks that every layer's attention has a tier.
    pub(super) fn check_attention(
        &self,
        problem: &Problem<'_>,
        constraints: &Constraints,
    ) -> Result<()> {
        let is_attention = |d: &&DenseShape| d.kind == DenseKind::Attention;
        for group in problem.shape.dense.iter().filter(is_attention) {
            let allowed = |&t: &TierIdx| constraints.allows(group.kind, group.layer, t);
            if self.dense_places(group).any(|place| allowed(&place.tier)) {
                continue;
            }
            let layer = group.layer.unwrap_or_default();
            let cache = problem.shape.caches.get(layer as usize);
            let Some(gpu) = self
                .computing_tiers()
                .filter(|&t| self.tiers[t].is_gpu())
                .find(allowed)
            else {
                bail!(
                    "--fix and --forbid leave no tier for the attention of layer {layer}; take one of them back"
                );
            };
            let name = &self.tiers[gpu].name;
            let may_be_apart = !self.tiers[self.kv_tier].is_gpu()
                && cache.is_some_and(|c| self.can_be_apart(c, group.layer))
                && constraints.allows_host_kv(group.layer, gpu);
            ensure!(
                may_be_apart || constraints.allows_cache(gpu),
                "the attention of layer {layer} can only be on '{name}' by --fix and --forbid, and with it the \
                 layer's keys and values, which they want elsewhere; take one of them back"
            );
            let (with, cache) = if may_be_apart {
                ("", None)
            } else {
                ("with the layer's keys and values ", cache)
            };
            let bytes = cache.map_or(0, |c| c.bytes(problem.kv_type, problem.room().whole()));
            let needed = bytes.saturating_add(group.bytes);
            let left = self.left_bytes[gpu.get()];
            bail!(
                "the attention of layer {layer} can only be on '{name}', but {with}it takes {} of the {} left \
                 there; fix or forbid less, or {}",
                show_bytes(needed),
                show_bytes(left),
                hint(problem, gpu, needed.saturating_sub(left))
            );
        }
        Ok(())
    }

    /// Checks that the tiers together hold the dense groups, and all weights.
    pub(super) fn check_sums(&self, problem: &Problem<'_>) -> Result<()> {
        let shape = problem.shape;
        let dense: u128 = shape.dense.iter().map(|d| u128::from(d.bytes)).sum();
        let of_layer = shape
            .experts
            .iter()
            .map(|e| u128::from(e.expert_bytes) * u128::from(e.n_expert));
        let experts: u128 = of_layer.sum();
        let left = |tiers: &mut dyn Iterator<Item = TierIdx>| -> u128 {
            tiers.map(|t| u128::from(self.left_bytes[t.get()])).sum()
        };
        let names: Vec<String> = self
            .computing_tiers()
            .map(|t| format!("'{}'", self.tiers[t].name))
            .collect();
        let to_u64 = |bytes: u128| u64::try_from(bytes).unwrap_or(u64::MAX);
        let show = |bytes: u128| show_bytes(to_u64(bytes));
        let may_stay_in_file = |kind: DenseKind| kind.is_named_by_tokens() && !self.in_place;
        // What a layer with a window takes least is on the host.
        let moving = self.caches.iter().filter(|c| !c.gpus.is_empty());
        let moving: u128 = moving.map(|c| u128::from(c.bytes)).sum();
        let in_memory = shape.dense.iter().filter(|d| !may_stay_in_file(d.kind));
        let computing: u128 = in_memory.map(|d| u128::from(d.bytes)).sum();
        let computing = computing + moving;
        let have = left(&mut self.computing_tiers());
        let (with, beside) = if moving > 0 {
            (", with keys and values,", "")
        } else {
            ("", "the key and value cache and ")
        };
        ensure!(
            computing <= have,
            "the dense tensors of '{}'{with} need {}, but {} have {} left for them beside {beside}the staging \
             buffers; {}",
            shape.id.name,
            show(computing),
            names.join(" and "),
            show(have),
            hint(
                problem,
                self.staging_tier,
                to_u64(computing.saturating_sub(have))
            )
        );
        let have = left(&mut self.tiers.indices());
        let needed = dense + experts + moving;
        ensure!(
            needed <= have,
            "the weights of '{}'{with} are {}, but all tiers together have {} left for them; {}",
            shape.id.name,
            show(needed),
            show(have),
            hint(problem, self.home(), to_u64(needed.saturating_sub(have)))
        );
        Ok(())
    }
}

/// Checks that plans can be made for the machine's tiers and the budgets.
pub(super) fn check_tiers(problem: &Problem<'_>, tiers: &PerTier<Tier>) -> Result<()> {
    let machine = problem.machine;
    ensure!(
        !tiers.is_empty() && tiers.len() <= MAX_FAST + 1,
        "machine '{}' has {} tiers; plans are made for 1 to {}: merge those of like speed",
        machine.name,
        tiers.len(),
        MAX_FAST + 1
    );
    ensure!(
        problem.budgets.len() == tiers.len(),
        "{} budgets for the {} tiers of machine '{}'; give one per tier",
        problem.budgets.len(),
        tiers.len(),
        machine.name
    );
    let home = tiers.len() - 1;
    for (at, (tier, &budget)) in tiers.iter().zip(&problem.budgets).enumerate() {
        ensure!(
            tier.read_gbps.is_finite() && tier.read_gbps > 0.0,
            "tier '{}' has a rate of {} GB/s; write a positive one",
            tier.name,
            tier.read_gbps
        );
        ensure!(
            tier.latency_us.is_finite() && tier.latency_us >= 0.0,
            "tier '{}' has a latency of {} µs; write 0 or more",
            tier.name,
            tier.latency_us
        );
        ensure!(
            budget <= tier.capacity_bytes,
            "the budget of tier '{}' is {}, but it holds {}; lower the budget to that",
            tier.name,
            show_bytes(budget),
            show_bytes(tier.capacity_bytes)
        );
        ensure!(
            at == home || tier.kind != TierKind::Nvme,
            "tier '{}' is a block device above the last tier; nothing computes there, so list it last",
            tier.name
        );
    }
    ensure!(
        home > 0 || home_in_place(tiers),
        "machine '{}' has only tier '{}', where nothing computes; add a DRAM tier above it",
        machine.name,
        tiers[TierIdx::FIRST].name
    );
    Ok(())
}
