//! Constraints fixed or forbidden by hand: `--fix vram:experts:3-5:0-15`, `--forbid
//! nvme:embedding`.
//!
//! Each is `TIER:WHAT[:LAYERS[:EXPERTS]]`. WHAT is `attention`, `router`, `shared_expert`,
//! `dense_ffn`, `embedding`, `token_table`, `head`, `cache` (the KV cache; fixed to a real GPU, with all
//! attention), or `experts`. `TIER:LAYERS[:EXPERTS]` means experts. Without LAYERS it holds for all layers,
//! without EXPERTS for all experts of the layers.
//!
//! An expert fixed to the last tier is never pinned. Forbidding experts forbids pins and slots of
//! the layers there.

use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use tier_plan_runtime::formats::machine::{Machine, TierKind};
use tier_plan_runtime::formats::placement::{DensePlacement, Placement, TierIdx};
use tier_plan_runtime::formats::ranges;
use tier_plan_runtime::model::gpu::{CpuOnly, Part};
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

/// Kinds of dense groups by the name that plans give them.
const DENSE_KINDS: [(&str, DenseKind); 7] = [
    ("attention", DenseKind::Attention),
    ("router", DenseKind::Router),
    ("shared_expert", DenseKind::SharedExpert),
    ("dense_ffn", DenseKind::DenseFfn),
    ("embedding", DenseKind::Embedding),
    ("token_table", DenseKind::TokenTable),
    ("head", DenseKind::Head),
];

/// What a flag looks like.
const EXAMPLE: &str = "write TIER:WHAT[:LAYERS[:EXPERTS]], like vram:attention, vram:experts:3-5:0-15 or nvme:embedding";

/// Constraints on one layer's experts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerConstraints {
    /// The tier that each of some experts is fixed to, by expert.
    pub fixed: BTreeMap<u32, TierIdx>,
    /// Tiers that hold neither pins nor slots.
    pub forbidden: BTreeSet<TierIdx>,
}

impl LayerConstraints {
    /// Whether nothing is fixed or forbidden.
    pub fn is_empty(&self) -> bool {
        self.fixed.is_empty() && self.forbidden.is_empty()
    }
}

/// What is fixed and forbidden by hand.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Constraints {
    dense_fixed: BTreeMap<(DenseKind, Option<u32>), TierIdx>,
    dense_forbidden: BTreeMap<(DenseKind, Option<u32>), BTreeSet<TierIdx>>,
    experts: BTreeMap<u32, LayerConstraints>,
    cache_fixed: Option<TierIdx>,
    cache_forbidden: BTreeSet<TierIdx>,
    /// The layers whose KV cache is off the GPU that has their attention, where that is settled.
    host_kv: Option<BTreeSet<u32>>,
}

impl Constraints {
    /// Parses the flags.
    ///
    /// # Errors
    /// Names the flag that is misspelled, that names what the model or the machine does not have,
    /// or that contradicts another.
    pub fn parse(
        fix: &[String],
        forbid: &[String],
        shape: &ModelShape,
        machine: &Machine,
    ) -> Result<Self> {
        let mut constraints = Constraints::default();
        for text in fix {
            constraints
                .add(text, true, shape, machine)
                .with_context(|| format!("--fix {text}"))?;
        }
        for text in forbid {
            constraints
                .add(text, false, shape, machine)
                .with_context(|| format!("--forbid {text}"))?;
        }
        constraints.check_contradictions(shape, machine)?;
        Ok(constraints)
    }

    /// Returns constraints under which a plan for a loaded model differs from its present one in pins
    /// and slots alone. Experts stay off GPUs.
    pub fn keeping(plan: &Placement) -> Self {
        let dense = plan.dense.iter();
        let dense_fixed = dense.map(|d| ((d.kind, d.layer), d.tier)).collect();
        let is_gpu = |tier: &TierIdx| plan.tiers.get(*tier).is_some_and(|t| t.tier.is_gpu());
        let gpus: BTreeSet<TierIdx> = plan.tiers.indices().filter(is_gpu).collect();
        let attention = |d: &DensePlacement| d.kind == DenseKind::Attention && is_gpu(&d.tier);
        let layer = LayerConstraints {
            forbidden: gpus.clone(),
            ..LayerConstraints::default()
        };
        let layers = plan.layers.iter().filter(|_| !gpus.is_empty());
        // Where attention is on a GPU, its keys and values are there, or where the plan has them.
        let on_gpus = plan.dense.iter().any(attention);
        let others = plan.tiers.indices();
        let others = others.filter(|t| *t != plan.kv_tier && !is_gpu(t));
        Self {
            dense_fixed,
            experts: layers.map(|l| (l.layer, layer.clone())).collect(),
            cache_fixed: (!on_gpus).then_some(plan.kv_tier),
            cache_forbidden: others.filter(|_| !is_gpu(&plan.kv_tier)).collect(),
            ..Self::default()
        }
        .settling_host_kv(plan.host_kv.iter().copied())
    }

    /// Settles which layers have their KV cache off the GPU that has their attention.
    pub(crate) fn settling_host_kv(mut self, layers: impl IntoIterator<Item = u32>) -> Self {
        self.host_kv = Some(layers.into_iter().collect());
        self
    }

    /// Whether nothing is fixed or forbidden.
    pub fn is_empty(&self) -> bool {
        *self == Constraints::default()
    }

    /// Refuses what is fixed to a GPU that can't run it.
    ///
    /// # Errors
    /// Names the part, the GPU, and the reason.
    pub fn check_gpus(&self, shape: &ModelShape, machine: &Machine) -> Result<()> {
        for only in shape.cpu_only.iter().filter(|only| !only.is_together()) {
            let fixed: BTreeSet<TierIdx> = match only.part {
                Part::Dense(kind) => {
                    let fixed = self.dense_fixed.get(&(kind, only.layer));
                    fixed.copied().into_iter().collect()
                }
                Part::Experts => {
                    let of_layer = only.layer.and_then(|layer| self.experts.get(&layer));
                    let fixed = of_layer.map(|layer| layer.fixed.values().copied());
                    fixed.into_iter().flatten().collect()
                }
            };
            let tiers = fixed.iter().filter_map(|t| machine.tiers.get(t.get()));
            if let Some(gpu) = tiers.into_iter().find(|tier| tier.is_gpu()) {
                let of = only
                    .layer
                    .map_or(String::new(), |layer| format!(" of layer {layer}"));
                bail!(
                    "--fix puts {}{of} on '{}', a GPU that can't run it: {}; leave it out",
                    only.part.name(),
                    gpu.name,
                    only.why
                );
            }
        }
        self.check_together(shape, machine)
    }

    /// Refuses what puts some parts on a GPU that it can run only together with others.
    fn check_together(&self, shape: &ModelShape, machine: &Machine) -> Result<()> {
        let together: Vec<&CpuOnly> = shape.cpu_only.iter().filter(|o| o.is_together()).collect();
        let tiers: Vec<TierIdx> = (0..machine.tiers.len()).map(TierIdx::new).collect();
        let is_gpu = |tier: &TierIdx| machine.tiers[tier.get()].is_gpu();
        let (gpus, others): (Vec<TierIdx>, Vec<TierIdx>) = tiers.into_iter().partition(is_gpu);
        let off_gpus = |only: &&&CpuOnly| !others.iter().any(|t| self.allows_part(only, *t, false));
        let Some(must) = together.iter().find(off_gpus) else {
            return Ok(());
        };
        let away = |gpu: &TierIdx| together.iter().find(|o| !self.allows_part(o, *gpu, true));
        let mut away = gpus.iter().map(away);
        let Some(Some(other)) = away
            .next()
            .filter(|first| first.is_some() && away.all(|a| a.is_some()))
        else {
            return Ok(());
        };
        let name = |only: &CpuOnly| {
            let of = only
                .layer
                .map_or(String::new(), |layer| format!(" of layer {layer}"));
            only.part.name().to_string() + &of
        };
        bail!(
            "--fix and --forbid have {} on a GPU and {} elsewhere, but the first has {}; constrain them alike",
            name(must),
            name(other),
            must.why
        )
    }

    /// Whether a part may be on a tier, which is a GPU or not.
    fn allows_part(&self, only: &CpuOnly, tier: TierIdx, is_gpu: bool) -> bool {
        match only.part {
            Part::Dense(DenseKind::Attention) if is_gpu => self.allows_attention(only.layer, tier),
            Part::Dense(kind) => self.allows(kind, only.layer, tier),
            Part::Experts => true,
        }
    }

    /// Whether the parts that a GPU can run only together may all be on this one, or, without one, on none.
    pub fn allows_together(
        &self,
        shape: &ModelShape,
        machine: &Machine,
        gpu: Option<TierIdx>,
    ) -> bool {
        let mut together = shape.cpu_only.iter().filter(|only| only.is_together());
        match gpu {
            Some(gpu) => together.all(|only| self.allows_part(only, gpu, true)),
            None => together.all(|only| {
                let mut others = machine
                    .tiers
                    .iter()
                    .enumerate()
                    .filter(|(_, t)| !t.is_gpu());
                others.any(|(at, _)| self.allows_part(only, TierIdx::new(at), false))
            }),
        }
    }

    /// Whether any expert is constrained.
    pub fn of_experts(&self) -> bool {
        !self.experts.is_empty()
    }

    /// Returns the constraints on a layer's experts.
    pub fn layer(&self, layer: u32) -> LayerConstraints {
        self.experts.get(&layer).cloned().unwrap_or_default()
    }

    /// Whether a dense group may be on a tier.
    pub fn allows(&self, kind: DenseKind, layer: Option<u32>, tier: TierIdx) -> bool {
        self.dense_fixed
            .get(&(kind, layer))
            .is_none_or(|&t| t == tier)
            && self
                .dense_forbidden
                .get(&(kind, layer))
                .is_none_or(|tiers| !tiers.contains(&tier))
    }

    /// Whether the KV cache may be on a tier.
    pub fn allows_cache(&self, tier: TierIdx) -> bool {
        self.cache_fixed.is_none_or(|t| t == tier) && !self.cache_forbidden.contains(&tier)
    }

    /// Whether a layer's attention may be on a real GPU, with its KV cache.
    pub fn allows_attention(&self, layer: Option<u32>, gpu: TierIdx) -> bool {
        self.allows(DenseKind::Attention, layer, gpu)
            && self.allows_cache(gpu)
            && self.has_host_kv(layer) != Some(true)
    }

    /// Whether a layer's attention may be on a real GPU, with its KV cache elsewhere.
    pub fn allows_host_kv(&self, layer: Option<u32>, gpu: TierIdx) -> bool {
        self.allows(DenseKind::Attention, layer, gpu) && self.has_host_kv(layer) != Some(false)
    }

    /// Whether a layer's KV cache is kept off the GPU that has its attention, where that is settled.
    fn has_host_kv(&self, layer: Option<u32>) -> Option<bool> {
        let settled = self.host_kv.as_ref()?;
        Some(layer.is_some_and(|layer| settled.contains(&layer)))
    }

    /// Returns the tier that the KV cache of all layers is fixed to.
    pub fn fixed_cache(&self) -> Option<TierIdx> {
        self.cache_fixed
    }

    /// Whether the KV cache is constrained.
    pub fn of_cache(&self) -> bool {
        self.cache_fixed.is_some() || !self.cache_forbidden.is_empty()
    }

    /// Whether a plan keeps the constraints.
    pub fn holds(&self, plan: &Placement) -> bool {
        let home = plan.home_tier();
        let attention = || plan.dense.iter().filter(|d| d.kind == DenseKind::Attention);
        let caches = attention().map(|d| plan.cache_tier(d));
        let rest = (attention().next().is_none()).then_some(plan.kv_tier);
        let settled = self.host_kv.as_ref();
        settled.is_none_or(|layers| layers.iter().eq(&plan.host_kv))
            && caches.chain(rest).all(|t| self.allows_cache(t))
            && plan
                .dense
                .iter()
                .all(|d| self.allows(d.kind, d.layer, d.tier))
            && plan.layers.iter().enumerate().all(|(at, layer)| {
                let constraints = self.layer(layer.layer);
                let fixed = constraints
                    .fixed
                    .iter()
                    .all(|(&e, &t)| plan.pinned_tier(at, e).unwrap_or(home) == t);
                let used = layer
                    .pinned
                    .iter()
                    .filter(|pins| !pins.experts.is_empty())
                    .map(|pins| pins.tier);
                let used = used.chain((layer.slots > 0).then_some(layer.slot_tier));
                fixed
                    && used
                        .into_iter()
                        .all(|t| !constraints.forbidden.contains(&t))
            })
    }

    /// Adds one flag, which fixes if `fix` and forbids otherwise.
    fn add(&mut self, text: &str, fix: bool, shape: &ModelShape, machine: &Machine) -> Result<()> {
        let mut parts = text.split(':').map(str::trim);
        let (Some(name), Some(what)) = (parts.next(), parts.next()) else {
            bail!("{EXAMPLE}")
        };
        let rest: Vec<&str> = parts.collect();
        let tier = machine
            .tiers
            .iter()
            .position(|t| t.name == name)
            .map(TierIdx::new)
            .with_context(|| {
                let names: Vec<&str> = machine.tiers.iter().map(|t| t.name.as_str()).collect();
                format!(
                    "machine '{}' has no tier '{name}'; its tiers are {}",
                    machine.name,
                    names.join(", ")
                )
            })?;
        let (what, rest) = if what.starts_with(|c: char| c.is_ascii_digit()) {
            ("experts", [&[what], &rest[..]].concat())
        } else {
            (what, rest)
        };
        let layers = rest
            .first()
            .map(|l| parse_numbers(l, "layer"))
            .transpose()?;
        match what {
            "experts" => {
                ensure!(rest.len() <= 2, "{EXAMPLE}");
                self.add_experts(tier, layers, rest.get(1).copied(), fix, shape, machine)
            }
            "cache" => {
                ensure!(
                    rest.is_empty(),
                    "a layer's cache is on the GPU that has its attention, or where all others are: name no layers; \
                     {EXAMPLE}"
                );
                self.add_cache(tier, fix, machine)
            }
            _ => self.add_dense(tier, what, &rest, fix, shape, machine),
        }
    }

    fn add_dense(
        &mut self,
        tier: TierIdx,
        what: &str,
        rest: &[&str],
        fix: bool,
        shape: &ModelShape,
        machine: &Machine,
    ) -> Result<()> {
        let Some(&(_, kind)) = DENSE_KINDS.iter().find(|(name, _)| *name == what) else {
            let known: Vec<&str> = DENSE_KINDS
                .iter()
                .map(|k| k.0)
                .chain(["cache", "experts"])
                .collect();
            bail!(
                "there is nothing called '{what}'; give one of {}",
                known.join(", ")
            );
        };
        ensure!(
            rest.len() <= 1,
            "only experts have numbers inside a layer; {EXAMPLE}"
        );
        let layers = rest
            .first()
            .map(|l| parse_numbers(l, "layer"))
            .transpose()?;
        let is_named = |layer: Option<u32>| {
            layers
                .as_ref()
                .is_none_or(|named| layer.is_some_and(|layer| named.contains(&layer)))
        };
        let groups: Vec<_> = shape
            .dense
            .iter()
            .filter(|g| g.kind == kind && is_named(g.layer))
            .collect();
        let in_layers = rest
            .first()
            .map_or(String::new(), |layers| format!(" in layers {layers}"));
        ensure!(
            !groups.is_empty(),
            "'{}' has no {what}{in_layers} to place",
            shape.id.name
        );
        let computes =
            machine.tiers[tier.get()].kind != TierKind::Nvme || kind.is_named_by_tokens();
        ensure!(
            !fix || computes,
            "nothing computes on the block device '{}'; only the embedding and token tables can stay there",
            machine.tiers[tier.get()].name
        );
        for group in groups {
            if !fix {
                self.dense_forbidden
                    .entry((kind, group.layer))
                    .or_default()
                    .insert(tier);
                continue;
            }
            let before = self.dense_fixed.insert((kind, group.layer), tier);
            ensure!(
                before.is_none_or(|b| b == tier),
                "{what} of {} was fixed to '{}' before; give one tier",
                group
                    .layer
                    .map_or("the model".to_string(), |l| format!("layer {l}")),
                before.map_or("", |b| machine.tiers[b.get()].name.as_str())
            );
        }
        Ok(())
    }

    fn add_cache(&mut self, tier: TierIdx, fix: bool, machine: &Machine) -> Result<()> {
        let name = |t: TierIdx| machine.tiers[t.get()].name.as_str();
        if !fix {
            self.cache_forbidden.insert(tier);
            return Ok(());
        }
        ensure!(
            machine.tiers[tier.get()].kind != TierKind::Nvme,
            "the cache can't be on the block device '{}'",
            name(tier)
        );
        let before = self.cache_fixed.replace(tier);
        ensure!(
            before.is_none_or(|b| b == tier),
            "the cache was fixed to '{}' before; give one tier",
            before.map_or("", name)
        );
        Ok(())
    }

    fn add_experts(
        &mut self,
        tier: TierIdx,
        layers: Option<BTreeSet<u32>>,
        experts: Option<&str>,
        fix: bool,
        shape: &ModelShape,
        machine: &Machine,
    ) -> Result<()> {
        let experts = experts.map(|e| parse_numbers(e, "expert")).transpose()?;
        ensure!(
            fix || experts.is_none(),
            "--forbid takes the experts of whole layers: pins and slots on a tier; leave the numbers of experts out"
        );
        let home = TierIdx::new(machine.tiers.len() - 1);
        if !fix {
            ensure!(
                tier != home,
                "experts that are not pinned live on the last tier; give the other tiers room for all, or --fix them"
            );
        }
        let have: BTreeSet<u32> = shape.experts.iter().map(|e| e.layer).collect();
        for layer in layers.as_ref().unwrap_or(&have) {
            let found = shape.experts.iter().find(|e| e.layer == *layer);
            let found = found.with_context(|| {
                format!(
                    "layer {layer} of '{}' has no routed experts{}",
                    shape.id.name,
                    first_last(&have)
                )
            })?;
            let constraints = self.experts.entry(*layer).or_default();
            if !fix {
                constraints.forbidden.insert(tier);
                continue;
            }
            let all: BTreeSet<u32> = (0..found.n_expert).collect();
            for &expert in experts.as_ref().unwrap_or(&all) {
                ensure!(
                    expert < found.n_expert,
                    "layer {layer} has experts 0 to {}, not {expert}",
                    found.n_expert.saturating_sub(1)
                );
                let before = constraints.fixed.insert(expert, tier);
                ensure!(
                    before.is_none_or(|b| b == tier),
                    "expert {expert} of layer {layer} was fixed to '{}' before; give one tier",
                    before.map_or("", |b| machine.tiers[b.get()].name.as_str())
                );
            }
        }
        Ok(())
    }

    /// Refuses what is fixed where it is forbidden, or forbidden everywhere.
    fn check_contradictions(&self, shape: &ModelShape, machine: &Machine) -> Result<()> {
        for group in &shape.dense {
            let can = |t: TierIdx| {
                machine.tiers[t.get()].kind != TierKind::Nvme || group.kind.is_named_by_tokens()
            };
            let any = TierIdx::first(machine.tiers.len())
                .any(|t| can(t) && self.allows(group.kind, group.layer, t));
            let name = DENSE_KINDS
                .iter()
                .find(|k| k.1 == group.kind)
                .map_or("", |k| k.0);
            let of = group
                .layer
                .map_or(String::new(), |l| format!(" of layer {l}"));
            ensure!(
                any,
                "--fix and --forbid leave no tier for {name}{of}; take one of them back"
            );
        }
        for (layer, constraints) in &self.experts {
            if let Some((expert, tier)) = constraints
                .fixed
                .iter()
                .find(|(_, t)| constraints.forbidden.contains(t))
            {
                bail!(
                    "expert {expert} of layer {layer} is fixed to '{}', where --forbid allows no experts of that layer",
                    machine.tiers[tier.get()].name
                );
            }
        }
        Ok(())
    }
}

fn first_last(have: &BTreeSet<u32>) -> String {
    match (have.first(), have.last()) {
        (Some(first), Some(last)) => format!("; layers {first} to {last} have"),
        _ => String::new(),
    }
}

/// Parses a set such as `0-3,7`.
fn parse_numbers(text: &str, what: &str) -> Result<BTreeSet<u32>> {
    let found = ranges::parse_one(text, what).map_err(|e| anyhow::anyhow!("{e}"))?;
    ensure!(!found.is_empty(), "give the numbers of {what}s, like 0-3,7");
    Ok(found.into_iter().collect())
}
