//! Translates drafts into columns, and choices of columns into drafts.

use super::primal::choice::Choice;
use super::problem::capacity::MAX_FAST;
use super::problem::columns::{Config, Item, Meaning};
use super::problem::draft::{DensePlace, Draft};
use super::problem::enumerate::ColumnEnumerator;
use super::problem::instance::Instance;
use crate::profile::Judged;
use std::collections::BTreeSet;
use tier_plan_runtime::formats::placement::{LayerPlacement, Pins, TierIdx};
use tier_plan_runtime::model::shape::ExpertShape;

/// Returns a draft as `[items][members]` columns, adding the columns that it needs.
///
/// Returns `None` if its pins do not follow the train split's order, as columns do.
pub(super) fn columns_of_draft(
    instance: &Instance<'_>,
    enumerator: &ColumnEnumerator<'_>,
    items: &mut [Item],
    draft: &Draft,
) -> Option<Vec<Vec<usize>>> {
    let mut chosen = Vec::with_capacity(items.len());
    for item in items {
        let mut columns = Vec::new();
        match &item.meaning {
            Meaning::Dense { groups, places } => {
                for &group in groups {
                    columns.push(places.iter().position(|&p| p == draft.dense[group])?);
                }
            }
            Meaning::Experts { layers, .. } => {
                for layer in layers.clone() {
                    let config = config_of(instance, enumerator, layer, &draft.layers[layer])?;
                    columns.push(enumerator.add(item, config)?);
                }
            }
        }
        chosen.push(columns);
    }
    Some(chosen)
}

/// Returns `[items]` configurations that drafts are made of.
pub(super) fn configs_of_drafts(
    instance: &Instance<'_>,
    enumerator: &ColumnEnumerator<'_>,
    items: &[Item],
    drafts: &[Draft],
) -> Vec<Vec<Config>> {
    let of_item = |item: &Item| {
        let layers = item.layers().iter();
        let of_layer = |&at: &usize| {
            let config =
                move |draft: &Draft| config_of(instance, enumerator, at, draft.layers.get(at)?);
            drafts.iter().filter_map(config)
        };
        let configs: BTreeSet<Config> = layers.flat_map(of_layer).collect();
        configs.into_iter().collect()
    };
    items.iter().map(of_item).collect()
}

/// Returns the configuration that a placement of the layer at this position stands for.
fn config_of(
    instance: &Instance<'_>,
    enumerator: &ColumnEnumerator<'_>,
    layer: usize,
    placed: &LayerPlacement,
) -> Option<Config> {
    let slot_tier = placed.slot_tier;
    let mut config = Config {
        cuts: [0; MAX_FAST],
        slots: placed.slots as u16,
        slot_tier,
    };
    let mut sum = 0;
    for tier in TierIdx::first(instance.capacity.fast()) {
        let on_tier = placed.pinned.iter().filter(|pins| pins.tier == tier);
        sum += on_tier.map(|pins| pins.experts.len()).sum::<usize>();
        config.cuts[tier.get()] = sum as u16;
    }
    let n_pinned: usize = placed.pinned.iter().map(|pins| pins.experts.len()).sum();
    let none_fixed = instance.constraints.layer(placed.layer).fixed.is_empty();
    if !none_fixed && n_pinned > 0 {
        config = enumerator.config_of(layer, placed)?;
    }
    let is_same = enumerator.placement(layer, &config) == *placed;
    let is_recorded = matches!(instance.evidence.layers[layer].judged, Judged::Recorded(_));
    (is_same || (none_fixed && !is_recorded)).then_some(config)
}

/// Returns the draft that a choice stands for.
pub(super) fn draft_of_choice(
    instance: &Instance<'_>,
    enumerator: &ColumnEnumerator<'_>,
    items: &[Item],
    choice: &Choice,
) -> Draft {
    let evidence = &instance.evidence.layers;
    let mut dense = vec![TierIdx::FIRST.into(); instance.problem.shape.dense.len()];
    let mut placements = vec![None; evidence.len()];
    for (item, columns) in items.iter().zip(&choice.columns) {
        match &item.meaning {
            Meaning::Dense { groups, places } => {
                // Alike groups cost the same wherever each of them is. The last layers go to the
                // fastest tier, beside the head, and neighbors together, so that a hidden state
                // seldom moves from one tier to another.
                let mut placed: Vec<DensePlace> = columns.iter().map(|&c| places[c]).collect();
                placed.sort_unstable_by(|a, b| b.cmp(a));
                groups
                    .iter()
                    .zip(placed)
                    .for_each(|(&group, place)| dense[group] = place);
            }
            Meaning::Experts { layers, configs } => {
                for (&layer, &column) in layers.iter().zip(columns) {
                    let placed = enumerator.placement(layer, &configs[column]);
                    let is_free = instance.constraints.layer(placed.layer).is_empty();
                    let shape = &evidence[layer].shape;
                    placements[layer] = Some(if is_free {
                        pin_full_slots(placed, shape)
                    } else {
                        placed
                    });
                }
            }
        }
    }
    Draft {
        dense,
        layers: placements.into_iter().flatten().collect(),
    }
}

/// Turns slots into pins where there is a slot for every pooled expert.
///
/// That takes as many bytes, and no expert is missed once before it is resident.
fn pin_full_slots(mut placed: LayerPlacement, shape: &ExpertShape) -> LayerPlacement {
    let pinned: BTreeSet<u32> = placed
        .pinned
        .iter()
        .flat_map(|pins| pins.experts.iter().copied())
        .collect();
    let pooled = (0..shape.n_expert).filter(|e| !pinned.contains(e));
    if placed.slots == 0 || placed.slots as usize != pooled.clone().count() {
        return placed;
    }
    match placed
        .pinned
        .iter_mut()
        .find(|pins| pins.tier == placed.slot_tier)
    {
        Some(pins) => {
            pins.experts.extend(pooled);
            pins.experts.sort_unstable();
        }
        None => {
            placed.pinned.push(Pins {
                tier: placed.slot_tier,
                experts: pooled.collect(),
            });
            placed.pinned.sort_unstable_by_key(|pins| pins.tier);
        }
    }
    placed.slots = 0;
    placed
}
