//! Compares two plans for one model: where tensors and experts moved, bytes by tier, predicted
//! speed.
//!
//! Tiers are matched by name, whatever their order.

use anyhow::{Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use tier_plan_runtime::formats::placement::{
    LayerPlacement, Pins, Placement, PlanTier, SlotPolicy, Streaming, TierIdx,
};
use tier_plan_runtime::formats::ranges;
use tier_plan_runtime::model::shape::DenseKind;

/// Place of a pooled expert: none of its own, it passes through slots.
pub const POOLED: &str = "pooled";

/// A tier in both plans, or in one.
#[derive(Debug, Clone, PartialEq)]
pub struct TierChange {
    /// Name of the tier.
    pub name: String,
    /// Bytes in the first plan.
    pub before: Option<Bytes>,
    /// Bytes in the second plan.
    pub after: Option<Bytes>,
}

/// Bytes of a tier, by kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bytes {
    /// Budget in bytes.
    pub budget: u64,
    /// Bytes of dense groups.
    pub dense: u64,
    /// Bytes of pinned experts.
    pub pinned: u64,
    /// Bytes of slots.
    pub slots: u64,
    /// Bytes of all kinds, KV cache, staging and backing copies included.
    pub used: u64,
    /// Rate that was planned with, in 10⁹ bytes per second.
    pub read_gbps: f64,
}

impl Bytes {
    fn of(tier: &PlanTier) -> Self {
        Self {
            budget: tier.budget_bytes,
            dense: tier.bytes.dense,
            pinned: tier.bytes.pinned,
            slots: tier.bytes.slots,
            used: tier.used_bytes(),
            read_gbps: tier.tier.read_gbps,
        }
    }
}

/// Dense groups of one kind that moved between two tiers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DenseMove {
    /// Kind of the groups.
    pub kind: DenseKind,
    /// Layers of the groups; none for embedding and head.
    pub layers: Vec<u32>,
    /// Name of the tier in the first plan.
    pub from: String,
    /// Name of the tier in the second plan.
    pub to: String,
}

/// Changes of one layer's experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerChange {
    /// Number of the layer.
    pub layer: u32,
    /// Experts that moved, by tiers from and to, or [`POOLED`].
    pub moved: BTreeMap<(String, String), Vec<u32>>,
    /// Slots and their tier, before and after.
    pub slots: [(u32, String); 2],
    /// Policies before and after; LRU where there are no slots.
    pub policies: [SlotPolicy; 2],
}

impl LayerChange {
    /// Whether the slots changed in number, place or policy.
    pub fn slots_changed(&self) -> bool {
        let [before, after] = &self.slots;
        before.0 != after.0 || (before.0 > 0 && before.1 != after.1) || self.policy_changed()
    }

    /// Whether slots that both plans have are refilled by another policy.
    pub fn policy_changed(&self) -> bool {
        self.slots[0].0 > 0 && self.slots[1].0 > 0 && self.policies[0] != self.policies[1]
    }
}

/// A setting that differs between two plans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingChange {
    /// Name for display.
    pub name: &'static str,
    /// Value in the first plan.
    pub before: String,
    /// Value in the second plan.
    pub after: String,
}

/// Differences between two plans.
#[derive(Debug, Clone, PartialEq)]
pub struct Diff {
    /// Tiers of either plan.
    pub tiers: Vec<TierChange>,
    /// Dense groups that moved.
    pub dense: Vec<DenseMove>,
    /// Layers whose experts or slots changed.
    pub layers: Vec<LayerChange>,
    /// Settings that changed.
    pub settings: Vec<SettingChange>,
}

impl Diff {
    /// Whether both plans place everything alike.
    pub fn is_empty(&self) -> bool {
        let same = |t: &TierChange| t.before == t.after;
        self.dense.is_empty()
            && self.layers.is_empty()
            && self.settings.is_empty()
            && self.tiers.iter().all(same)
    }

    /// Returns the number of experts that moved, over all layers.
    pub fn experts_moved(&self) -> usize {
        self.layers
            .iter()
            .flat_map(|l| l.moved.values())
            .map(Vec::len)
            .sum()
    }
}

/// Compares two plans.
///
/// # Errors
/// Fails if they are for different models.
pub fn diff(a: &Placement, b: &Placement) -> Result<Diff> {
    ensure!(
        a.model.hash == b.model.hash,
        "the plans are for different models, {} and {}, so nothing of one is in the other; compare plans of one model",
        a.model,
        b.model
    );
    Ok(Diff {
        tiers: tiers(a, b),
        dense: dense(a, b),
        layers: layers(a, b),
        settings: settings(a, b),
    })
}

fn name(plan: &Placement, tier: TierIdx) -> String {
    plan.tiers
        .get(tier)
        .map_or_else(|| format!("tier {tier}"), |t| t.tier.name.clone())
}

fn tiers(a: &Placement, b: &Placement) -> Vec<TierChange> {
    let mut names: Vec<&str> = Vec::new();
    for tier in a.tiers.iter().chain(&b.tiers) {
        if !names.contains(&tier.tier.name.as_str()) {
            names.push(&tier.tier.name);
        }
    }
    let bytes = |plan: &Placement, name: &str| {
        plan.tiers
            .iter()
            .find(|t| t.tier.name == name)
            .map(Bytes::of)
    };
    names
        .iter()
        .map(|n| TierChange {
            name: n.to_string(),
            before: bytes(a, n),
            after: bytes(b, n),
        })
        .collect()
}

fn dense(a: &Placement, b: &Placement) -> Vec<DenseMove> {
    let tier_names = |plan: &Placement| -> BTreeMap<(DenseKind, Option<u32>), String> {
        plan.dense
            .iter()
            .map(|d| ((d.kind, d.layer), name(plan, d.tier)))
            .collect()
    };
    let (before, after) = (tier_names(a), tier_names(b));
    let mut moves: BTreeMap<(DenseKind, String, String), Vec<u32>> = BTreeMap::new();
    for (key, from) in &before {
        let to = after.get(key).cloned().unwrap_or_else(|| "nowhere".into());
        if *from != to {
            moves
                .entry((key.0, from.clone(), to))
                .or_default()
                .extend(key.1);
        }
    }
    moves
        .into_iter()
        .map(|((kind, from, to), layers)| DenseMove {
            kind,
            layers,
            from,
            to,
        })
        .collect()
}

fn layers(a: &Placement, b: &Placement) -> Vec<LayerChange> {
    let pins = |plan: &Placement, layer: Option<&LayerPlacement>| -> BTreeMap<u32, String> {
        let pinned = layer.map(|l| l.pinned.as_slice()).unwrap_or_default();
        pinned
            .iter()
            .flat_map(|Pins { tier, experts }| experts.iter().map(|e| (*e, name(plan, *tier))))
            .collect()
    };
    let slots = |plan: &Placement, layer: Option<&LayerPlacement>| {
        layer.map_or((0, String::new()), |l| (l.slots, name(plan, l.slot_tier)))
    };
    let numbers: BTreeSet<u32> = a.layers.iter().chain(&b.layers).map(|l| l.layer).collect();
    let find = |plan: &'_ Placement, n: u32| plan.layers.iter().position(|l| l.layer == n);
    let mut changes = Vec::new();
    for layer in numbers {
        let (in_a, in_b) = (
            find(a, layer).map(|at| &a.layers[at]),
            find(b, layer).map(|at| &b.layers[at]),
        );
        let (before, after) = (pins(a, in_a), pins(b, in_b));
        let experts: BTreeSet<u32> = before.keys().chain(after.keys()).copied().collect();
        let mut moved: BTreeMap<(String, String), Vec<u32>> = BTreeMap::new();
        for expert in experts {
            let place = |pins: &BTreeMap<u32, String>| {
                pins.get(&expert)
                    .cloned()
                    .unwrap_or_else(|| POOLED.to_string())
            };
            let (from, to) = (place(&before), place(&after));
            if from != to {
                moved.entry((from, to)).or_default().push(expert);
            }
        }
        let policy = |layer: Option<&LayerPlacement>| layer.map_or(SlotPolicy::Lru, |l| l.policy);
        let policies = [policy(in_a), policy(in_b)];
        let change = LayerChange {
            layer,
            moved,
            slots: [slots(a, in_a), slots(b, in_b)],
            policies,
        };
        if !change.moved.is_empty() || change.slots_changed() {
            changes.push(change);
        }
    }
    changes
}

/// Returns the tiers that have a KV cache.
fn caches(plan: &Placement) -> String {
    let has: Vec<String> = plan
        .tiers
        .iter()
        .filter(|t| t.bytes.kv > 0)
        .map(|t| t.tier.name.clone())
        .collect();
    if has.is_empty() {
        name(plan, plan.kv_tier)
    } else {
        has.join(" and ")
    }
}

/// Names the layers whose KV cache is kept off the GPU that has their attention.
fn host_kv(plan: &Placement) -> String {
    match plan.host_kv.as_slice() {
        [] => "of no layer".into(),
        [layer] => format!("of layer {layer}"),
        layers => format!("of layers {}", ranges::show(layers)),
    }
}

/// Says how many experts a plan has streamed for a token, and where to.
fn streamed(plan: &Placement) -> String {
    let streamed = |s: &Streaming| {
        let (from, to) = (name(plan, s.from), name(plan, s.tier));
        format!("up to {} from {from} to {to}", s.experts)
    };
    plan.streaming
        .as_ref()
        .map_or_else(|| "none".into(), streamed)
}

fn settings(a: &Placement, b: &Placement) -> Vec<SettingChange> {
    let values = |plan: &Placement| {
        [
            ("context", plan.context.to_string()),
            ("texts at once", plan.sequences.to_string()),
            (
                "keys and values",
                format!("{} on {}", plan.kv_type, caches(plan)),
            ),
            (
                "staging",
                format!(
                    "{} experts on {}",
                    plan.staging_experts,
                    name(plan, plan.staging_tier)
                ),
            ),
            ("KV cache kept off a GPU", host_kv(plan)),
            ("streamed experts", streamed(plan)),
            (
                "profile",
                plan.profile
                    .as_ref()
                    .map_or("none".to_string(), |p| p.to_string()),
            ),
            ("machine", plan.machine.to_string()),
        ]
    };
    let pairs = values(a).into_iter().zip(values(b));
    let changed = pairs.filter(|((_, before), (_, after))| before != after);
    changed
        .map(|((name, before), (_, after))| SettingChange {
            name,
            before,
            after,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn plan() -> Placement {
        let text = include_str!("../../tests/data/formats/placement.v2.toml");
        tier_plan_runtime::formats::placement::decode(
            text.as_bytes(),
            Path::new("placement.v2.toml"),
        )
        .unwrap()
    }

    #[test]
    fn a_plan_is_like_itself() {
        let found = diff(&plan(), &plan()).unwrap();
        assert!(found.is_empty(), "{found:?}");
        assert_eq!(found.tiers.len(), 3);
    }

    #[test]
    fn a_change_of_policy_is_a_change() {
        let (a, mut b) = (plan(), plan());
        b.layers
            .iter_mut()
            .for_each(|layer| layer.policy = SlotPolicy::Lfu { half_life: 16 });
        let found = diff(&a, &b).unwrap();
        // Layers 2 to 4 have no slots.
        assert_eq!(
            found.layers.iter().map(|l| l.layer).collect::<Vec<_>>(),
            [1, 5]
        );
        assert!(
            found
                .layers
                .iter()
                .all(|l| l.policy_changed() && l.slots_changed() && l.moved.is_empty())
        );
    }

    #[test]
    fn what_moved_is_found_both_ways() {
        let (a, mut b) = (plan(), plan());
        b.dense
            .iter_mut()
            .filter(|d| d.kind == DenseKind::Head)
            .for_each(|d| d.tier = TierIdx::new(1));
        b.dense
            .iter_mut()
            .filter(|d| d.kind == DenseKind::Router)
            .for_each(|d| d.tier = TierIdx::new(1));
        let layer = &mut b.layers[0];
        // From VRAM to DRAM, from pooled to VRAM, and off DRAM.
        let vram = layer
            .pinned
            .iter_mut()
            .find(|pins| pins.tier == TierIdx::new(0))
            .unwrap();
        vram.experts.retain(|e| *e != 7);
        vram.experts.push(20);
        let dram = layer
            .pinned
            .iter_mut()
            .find(|pins| pins.tier == TierIdx::new(1))
            .unwrap();
        dram.experts.retain(|e| *e != 9);
        dram.experts.push(7);
        layer.slots += 3;
        b.context += 1;
        b.sequences += 1;
        b.tiers[TierIdx::new(1)].budget_bytes += 5;
        let found = diff(&a, &b).unwrap();
        let routers: Vec<u32> = a
            .dense
            .iter()
            .filter(|d| d.kind == DenseKind::Router)
            .filter_map(|d| d.layer)
            .collect();
        let moved = |kind, layers: Vec<u32>| DenseMove {
            kind,
            layers,
            from: "vram".into(),
            to: "dram".into(),
        };
        assert_eq!(
            found.dense,
            [
                moved(DenseKind::Router, routers),
                moved(DenseKind::Head, vec![])
            ]
        );
        assert_eq!(found.layers.len(), 1);
        let change = &found.layers[0];
        let at = |from: &str, to: &str| {
            change
                .moved
                .get(&(from.to_string(), to.to_string()))
                .cloned()
        };
        assert_eq!(at("vram", "dram"), Some(vec![7]));
        assert_eq!(at(POOLED, "vram"), Some(vec![20]));
        assert_eq!(at("dram", POOLED), Some(vec![9]));
        assert_eq!((found.experts_moved(), change.slots_changed()), (3, true));
        assert_eq!(change.slots[1].0, change.slots[0].0 + 3);
        assert_eq!(found.settings.len(), 2);
        let dram = found.tiers.iter().find(|t| t.name == "dram").unwrap();
        assert_eq!(dram.after.unwrap().budget - dram.before.unwrap().budget, 5);
        // Compared the other way round, the differences are reversed.
        let back = diff(&b, &a).unwrap();
        for ((from, to), experts) in &change.moved {
            assert_eq!(
                back.layers[0].moved.get(&(to.clone(), from.clone())),
                Some(experts)
            );
        }
    }

    #[test]
    fn plans_of_other_models_are_refused() {
        let mut b = plan();
        b.model.hash = "f".repeat(32);
        let error = diff(&plan(), &b).unwrap_err().to_string();
        assert!(error.contains("different models"), "{error}");
    }

    #[test]
    fn tiers_of_one_plan_alone_are_named() {
        let mut b = plan();
        b.tiers[TierIdx::new(0)].tier.name = "hbm".into();
        let found = diff(&plan(), &b).unwrap();
        let alone = |name: &str| {
            found
                .tiers
                .iter()
                .find(|t| t.name == name)
                .map(|t| (t.before.is_some(), t.after.is_some()))
        };
        assert_eq!(
            (alone("vram"), alone("hbm")),
            (Some((true, false)), Some((false, true)))
        );
        assert!(
            found
                .layers
                .iter()
                .any(|l| l.moved.contains_key(&("vram".into(), "hbm".into())))
        );
    }
}
