//! What a plan must satisfy beside the model it is for, and on this machine, before anything is loaded.

use crate::error::LoadError;
use crate::tiers::arena::{Arena, ArenaError};
use crate::tiers::nodes;
use std::collections::HashSet;
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::shape::{DenseKind, ModelShape};
use tier_plan_formats::placement::Placement;

/// Asks the system for the cache's memory and gives it back: a vector that is too large ends the program.
pub(super) fn context_fits(shape: &ModelShape, plan: &Placement) -> Result<(), LoadError> {
    let context = plan.context;
    // What GPUs have is counted with everything else there.
    let here = plan.cache_bytes(shape).into_iter().zip(&plan.tiers).filter(|(_, t)| !t.tier.is_gpu());
    let bytes = here.fold(0, |sum: u64, (bytes, _)| sum.saturating_add(bytes));
    if bytes == 0 {
        return Ok(());
    }
    match Arena::new("", bytes) {
        Err(ArenaError::Map { source, .. }) => Err(LoadError::Context { context, bytes, r#source }),
        other => Ok(other.map(|_| ())?),
    }
}

/// Refuses a plan whose tiers are memory nodes that are not here, or too full.
pub(super) fn memory_nodes(plan: &Placement) -> Result<(), LoadError> {
    let in_use = plan.tiers.iter().filter(|t| t.used_bytes() > 0);
    nodes::check(in_use.map(|t| (&t.tier, t.used_bytes())))
        .map_err(|r#source| LoadError::Node { plan: plan.name.clone(), r#source })
}

/// Everything about a plan that could contradict the model or itself.
pub(super) fn plan(shape: &ModelShape, plan: &Placement) -> Result<(), LoadError> {
    let bad = |what: String| LoadError::Plan { plan: plan.name.clone(), model: shape.id.name.clone(), what };
    if plan.model.hash != shape.id.hash {
        return Err(bad(format!("it was made for '{}' ({})", plan.model.name, plan.model.hash)));
    }
    let Some(slow) = plan.tiers.len().checked_sub(1) else { return Err(bad("it has no tiers".into())) };
    for (i, t) in plan.tiers.iter().enumerate() {
        if t.used_bytes() > t.budget_bytes {
            let name = &t.tier.name;
            return Err(bad(format!("tier '{name}' holds {} of {} bytes", t.used_bytes(), t.budget_bytes)));
        }
        let tier_error =
            |kind, rule| LoadError::Tier { plan: plan.name.clone(), tier: t.tier.name.clone(), kind, rule };
        if t.uses_gpu() && (i == slow || t.staging_bytes > 0) {
            return Err(tier_error("a GPU's memory", "staging buffers and pooled experts can't be there"));
        }
        if t.tier.kind == TierKind::Nvme && i != slow && t.used_bytes() > 0 {
            return Err(tier_error("a block device", "only the last tier may be one"));
        }
    }
    let mut dense = vec![0u64; plan.tiers.len()];
    let mut seen = HashSet::new();
    for d in &plan.dense {
        let group = shape.dense.iter().find(|g| g.kind == d.kind && g.layer == d.layer);
        let Some(group) = group else {
            return Err(bad(format!("it places {:?} of layer {:?}, which the model has not got", d.kind, d.layer)));
        };
        if !seen.insert((d.kind, d.layer)) {
            return Err(bad(format!("it places {:?} of layer {:?} twice", d.kind, d.layer)));
        }
        let in_file = plan.tiers.get(d.tier).is_none_or(|t| t.tier.kind == TierKind::Nvme);
        if in_file && d.kind != DenseKind::Embedding {
            return Err(bad(format!("{:?} of layer {:?} must not be on a block device", d.kind, d.layer)));
        }
        dense[d.tier.min(slow)] += group.bytes;
    }
    if let Some(missing) = shape.dense.iter().find(|g| !seen.contains(&(g.kind, g.layer))) {
        return Err(bad(format!("it does not place {:?} of layer {:?}", missing.kind, missing.layer)));
    }
    if plan.layers.len() != shape.experts.len() {
        let (found, expected) = (plan.layers.len(), shape.experts.len());
        return Err(bad(format!("it has {found} layers with routed experts, the model {expected}")));
    }
    let mut pinned = vec![0u64; plan.tiers.len()];
    let mut slots = vec![0u64; plan.tiers.len()];
    let mut home = 0;
    let mut pooled_anywhere = 0;
    for (l, e) in plan.layers.iter().zip(&shape.experts) {
        if l.layer != e.layer {
            return Err(bad(format!("it has routed experts in layer {}, the model in layer {}", l.layer, e.layer)));
        }
        let mut taken = HashSet::new();
        for (tier, experts) in &l.pinned {
            for expert in experts {
                if *expert >= e.n_expert || !taken.insert(*expert) {
                    let layer = l.layer;
                    return Err(bad(format!("expert {expert} of layer {layer} is pinned twice or does not exist")));
                }
            }
            match pinned.get_mut(*tier) {
                Some(bytes) if *tier != slow || plan.tiers.len() == 1 => {
                    *bytes += experts.len() as u64 * e.expert_bytes
                }
                _ => return Err(bad(format!("layer {} pins experts on the slow tier", l.layer))),
            }
        }
        if l.slots > e.n_expert {
            return Err(bad(format!("layer {} has {} slots for {} experts", l.layer, l.slots, e.n_expert)));
        }
        if l.slots > 0 {
            match slots.get_mut(l.slot_tier) {
                Some(bytes) if l.slot_tier != slow => *bytes += u64::from(l.slots) * e.expert_bytes,
                _ => return Err(bad(format!("layer {} has slots on the slow tier", l.layer))),
            }
        }
        let pooled = u64::from(e.n_expert) - taken.len() as u64;
        pooled_anywhere = pooled_anywhere.max(pooled.min(u64::from(e.n_used)));
        home += pooled * e.expert_bytes;
    }
    for (i, t) in plan.tiers.iter().enumerate() {
        let name = &t.tier.name;
        let home = if i == slow { home } else { 0 };
        let lines = [
            ("dense groups", t.dense_bytes, dense[i]),
            ("pinned experts", t.pinned_bytes, pinned[i]),
            ("slots", t.slot_bytes, slots[i]),
            ("pooled experts", t.home_bytes, home),
        ];
        if let Some((line, said, is)) = lines.iter().find(|(_, said, is)| said != is) {
            return Err(bad(format!("tier '{name}' says {said} bytes of {line}, but they take {is}")));
        }
    }
    let caches = plan.cache_bytes(shape);
    if let Some((t, takes)) = plan.tiers.iter().zip(caches).find(|(t, takes)| t.kv_bytes != *takes) {
        return Err(bad(format!(
            "tier '{}' has {} bytes for the key and value cache and recurrent state, but the layers that have theirs there \
             take {takes} with {} tokens of context and keys and values as {}",
            t.tier.name, t.kv_bytes, plan.context, plan.kv_type
        )));
    }
    if plan.tiers[slow].tier.kind == TierKind::Nvme && u64::from(plan.staging_experts) < pooled_anywhere {
        let staged = plan.staging_experts;
        return Err(bad(format!("staging holds {staged} experts, a token may need {pooled_anywhere}")));
    }
    Ok(())
}
