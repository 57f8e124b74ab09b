//! The flags `--fix` and `--forbid` as constraints.

use super::Constraints;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use tier_plan_runtime::formats::machine::{Machine, TierKind};
use tier_plan_runtime::formats::placement::TierIdx;
use tier_plan_runtime::formats::ranges;
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
