//! What a plan must satisfy beside the model that it is for, before anything of it is loaded.

use super::check::{check_host_kv, check_streaming};
use super::{LayerPlacement, Placement, PlanTier, TierBytes, Violation};
use crate::machine::Medium;
use crate::model::shape::{CacheShape, ExpertShape, ModelShape};
use std::collections::{HashMap, HashSet};

/// Returns everything in which a plan contradicts its model or itself; an empty list means that it
/// can be loaded.
///
/// Checks what the plan means, not whether a file can hold it: [`Placement::write`] checks that. A
/// plan for another model, or without tiers, is reported as that alone.
pub fn validate(plan: &Placement, shape: &ModelShape) -> Vec<Violation> {
    if plan.model.hash != shape.id.hash {
        return vec![Violation::OtherModel {
            made_for: plan.model.clone(),
        }];
    }
    if plan.tiers.is_empty() {
        return vec![Violation::NoTiers];
    }
    let mut violations = Vec::new();
    texts(plan, shape, &mut violations);
    tiers(plan, &mut violations);
    dense_groups(plan, shape, &mut violations);
    if plan.layers.len() == shape.experts.len() {
        for (layer, experts) in plan.layers.iter().zip(&shape.experts) {
            routed_experts(plan, layer, experts, &mut violations);
        }
    } else {
        let (found, expected) = (plan.layers.len(), shape.experts.len());
        violations.push(Violation::LayerCount { found, expected });
    }
    violations.extend(check_streaming(plan).err());
    host_kv(plan, shape, &mut violations);
    sums(plan, shape, &mut violations);
    staging(plan, shape, &mut violations);
    violations
}

/// Checks how many texts the KV cache is for.
fn texts(plan: &Placement, shape: &ModelShape, violations: &mut Vec<Violation>) {
    let positions = plan.room().positions();
    if plan.sequences == 0 || positions > u64::from(u32::MAX) {
        violations.push(Violation::Sequences {
            sequences: plan.sequences,
            context: plan.context,
        });
    }
    let too_many = |held: u64| held > u64::from(u32::MAX) && held > positions;
    let mut held = shape.caches.iter().map(|c| c.positions(plan.room()));
    if plan.window_chunk == Some(0) {
        violations.push(Violation::WindowChunk);
    } else if held.any(too_many) {
        violations.push(Violation::Checkpoints {
            checkpoints: plan.checkpoints,
        });
    }
}

/// Checks which layers have their KV cache off the GPU that has their attention.
fn host_kv(plan: &Placement, shape: &ModelShape, violations: &mut Vec<Violation>) {
    violations.extend(check_host_kv(plan).err());
    let can_be_apart = |layer: u32| {
        let cache = shape.caches.get(layer as usize);
        cache.is_some_and(CacheShape::can_be_apart)
    };
    if let Some(&layer) = plan.host_kv.iter().find(|layer| !can_be_apart(**layer)) {
        violations.push(Violation::HostKvOfOther { layer });
    }
}

/// Checks budgets, and that each tier can do what the plan wants of it.
fn tiers(plan: &Placement, violations: &mut Vec<Violation>) {
    for (index, tier) in plan.tiers.enumerate() {
        let (name, used, last) = (
            || tier.tier.name.clone(),
            tier.used_bytes(),
            index == plan.home_tier(),
        );
        if used > tier.budget_bytes {
            violations.push(Violation::OverBudget {
                tier: name(),
                used,
                budget: tier.budget_bytes,
            });
        }
        let streamed_to = plan.streaming.is_some_and(|s| s.tier == index);
        let stages = tier.bytes.staging > 0 && !streamed_to
            || plan.staging_experts > 0 && plan.staging_tier == index;
        if tier.uses_gpu() && (last || stages) {
            violations.push(Violation::PoolOnGpu { tier: name() });
        }
        if tier.tier.medium() == Medium::Drive && !last && used > 0 {
            violations.push(Violation::DriveNotLast { tier: name() });
        }
    }
}

/// Checks that each dense group of the model is placed once, where it can be computed.
fn dense_groups(plan: &Placement, shape: &ModelShape, violations: &mut Vec<Violation>) {
    let known: HashSet<_> = shape
        .dense
        .iter()
        .map(|group| (group.kind, group.layer))
        .collect();
    let mut placed = HashSet::new();
    for group in &plan.dense {
        let (kind, layer) = (group.kind, group.layer);
        if !known.contains(&(kind, layer)) {
            violations.push(Violation::UnknownGroup { kind, layer });
        } else if !placed.insert((kind, layer)) {
            violations.push(Violation::GroupTwice { kind, layer });
        }
        match plan.tiers.get(group.tier).map(|t| t.tier.medium()) {
            None => violations.push(Violation::tier_number(
                plan,
                "the tier of a dense group",
                group.tier,
            )),
            Some(Medium::Drive) if !kind.is_named_by_tokens() => {
                violations.push(Violation::GroupOnDrive { kind, layer });
            }
            Some(_) => {}
        }
    }
    for group in shape
        .dense
        .iter()
        .filter(|group| !placed.contains(&(group.kind, group.layer)))
    {
        violations.push(Violation::MissingGroup {
            kind: group.kind,
            layer: group.layer,
        });
    }
}

/// Checks one layer's pins and slots.
fn routed_experts(
    plan: &Placement,
    layer: &LayerPlacement,
    experts: &ExpertShape,
    violations: &mut Vec<Violation>,
) {
    if layer.layer != experts.layer {
        violations.push(Violation::OtherLayer {
            found: layer.layer,
            expected: experts.layer,
        });
        return;
    }
    let (slow, n_expert) = (plan.home_tier(), experts.n_expert);
    let mut report = |violation: Violation| violations.push(violation.in_layer(layer.layer));
    let mut homes = HashMap::new();
    for pins in &layer.pinned {
        if plan.tiers.get(pins.tier).is_none() {
            report(Violation::tier_number(
                plan,
                "a tier of pinned experts",
                pins.tier,
            ));
            continue;
        }
        // A plan with one tier computes all experts there, pinned or not.
        if pins.tier == slow && plan.tiers.len() > 1 {
            report(Violation::PinsOnSlowTier);
        }
        for &expert in &pins.experts {
            if expert >= n_expert {
                report(Violation::NoSuchExpert { expert, n_expert });
            } else if let Some(other) = homes.insert(expert, pins.tier) {
                let [first, second] =
                    [other, pins.tier].map(|tier| plan.tiers[tier].tier.name.clone());
                report(Violation::PinnedTwice {
                    expert,
                    first,
                    second,
                });
            }
        }
    }
    if layer.slots > n_expert {
        report(Violation::MoreSlotsThanExperts {
            slots: layer.slots,
            n_expert,
        });
    }
    if layer.slots > 0 && plan.tiers.get(layer.slot_tier).is_none() {
        report(Violation::tier_number(plan, "slot_tier", layer.slot_tier));
    } else if layer.slots > 0 && layer.slot_tier == slow {
        report(Violation::SlotsOnSlowTier);
    }
}

/// Checks the sums that the plan stores against its [`tally`](Placement::tally). Staging in main
/// memory may be given more bytes than it needs.
fn sums(plan: &Placement, shape: &ModelShape, violations: &mut Vec<Violation>) {
    for (
        PlanTier {
            tier,
            bytes: stored,
            ..
        },
        actual,
    ) in plan.tiers.iter().zip(plan.tally(shape))
    {
        let TierBytes {
            dense,
            pinned,
            slots,
            kv,
            staging,
            home,
        } = actual;
        // Of a GPU, these are the buffers that experts are streamed to.
        let stored_staging = if tier.is_gpu() {
            stored.staging
        } else {
            staging
        };
        for (line, found, expected) in [
            ("dense groups", stored.dense, dense),
            ("pinned experts", stored.pinned, pinned),
            ("slots", stored.slots, slots),
            ("streamed experts", stored_staging, staging),
            ("pooled experts", stored.home, home),
        ] {
            if found != expected {
                violations.push(Violation::Sum {
                    tier: tier.name.clone(),
                    line,
                    found,
                    expected,
                });
            }
        }
        if stored.kv != kv {
            violations.push(Violation::CacheSum {
                tier: tier.name.clone(),
                found: stored.kv,
                expected: kv,
                room: plan.room(),
                kv_type: plan.kv_type,
            });
        }
    }
}

/// Checks that staging holds all pooled experts that one token may use, where they are read from a
/// drive.
fn staging(plan: &Placement, shape: &ModelShape, violations: &mut Vec<Violation>) {
    if plan.tiers[plan.home_tier()].tier.medium() != Medium::Drive {
        return;
    }
    let needed = plan
        .layers
        .iter()
        .zip(&shape.experts)
        .map(|(layer, experts)| {
            let n_pinned: usize = layer.pinned.iter().map(|pins| pins.experts.len()).sum();
            u64::from(experts.n_expert)
                .saturating_sub(n_pinned as u64)
                .min(experts.n_used.into())
        });
    let expected = needed.max().unwrap_or(0);
    if u64::from(plan.staging_experts) < expected {
        violations.push(Violation::StagingTooSmall {
            found: plan.staging_experts,
            expected,
        });
    }
}
