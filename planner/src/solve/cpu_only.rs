//! What GPUs refuse, in sentences: which parts of a model stay on the CPU, and why.

use super::Problem;
use std::collections::{BTreeMap, BTreeSet};
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::formats::ranges;
use tier_plan_runtime::model::gpu::{CpuOnly, CpuReason, Part};
use tier_plan_runtime::model::shape::DenseKind;

/// Returns a sentence per reason why parts of a plan stay on the CPU of a machine with a real GPU.
pub(super) fn notes(problem: &Problem<'_>, plan: &Placement) -> Vec<String> {
    if !problem.machine.tiers.iter().any(|tier| tier.is_gpu()) {
        return Vec::new();
    }
    // By reason and layers: the parts.
    let mut by_layers: BTreeMap<(String, Part), BTreeSet<u32>> = BTreeMap::new();
    let mut of_model: BTreeMap<String, BTreeSet<Part>> = BTreeMap::new();
    let on_gpu = |only: &CpuOnly| {
        let dense = plan.dense.iter();
        let mut dense = dense.filter(|d| plan.tiers.get(d.tier).is_some_and(|t| t.tier.is_gpu()));
        dense.any(|d| only.is(Part::Dense(d.kind), d.layer))
    };
    // Where a GPU has parts that it can run only together, it has all of them.
    for only in problem.shape.cpu_only.iter().filter(|only| !on_gpu(only)) {
        let why = match &only.why {
            CpuReason::Factor(_) => "factors beside its matrices".to_string(),
            why @ (CpuReason::Kernel(_) | CpuReason::Together(_)) => why.to_string(),
        };
        match only.layer {
            Some(layer) => {
                let layers = by_layers.entry((why, only.part)).or_default();
                layers.insert(layer);
            }
            None => {
                of_model.entry(why).or_default().insert(only.part);
            }
        }
    }
    let mut alike: BTreeMap<(String, Vec<u32>), Vec<&str>> = BTreeMap::new();
    for ((why, part), layers) in by_layers {
        let layers = layers.into_iter().collect();
        alike.entry((why, layers)).or_default().push(words(part));
    }
    let mut notes = Vec::new();
    for ((why, layers), parts) in alike {
        let one = if layers.len() == 1 { "layer" } else { "layers" };
        let layers = ranges::show(&layers);
        notes.push(format!(
            "{} of {one} {layers} stay on the CPU: {why}",
            list(&parts)
        ));
    }
    for (why, parts) in of_model {
        let parts: Vec<&str> = parts.into_iter().map(words).collect();
        notes.push(format!("{} stay on the CPU: {why}", list(&parts)));
    }
    notes
}

fn words(part: Part) -> &'static str {
    match part {
        Part::Dense(DenseKind::Embedding) => "the rows of the embedding",
        Part::Dense(DenseKind::TokenTable) => "the rows of the token table",
        Part::Dense(DenseKind::Attention) => "mixers",
        Part::Dense(DenseKind::Router) => "routers",
        Part::Dense(DenseKind::SharedExpert) => "shared experts",
        Part::Dense(DenseKind::DenseFfn) => "feed-forward blocks",
        Part::Dense(DenseKind::Head) => "the matrices of the head",
        Part::Experts => "experts",
    }
}

/// Joins names: `a, b, and c`.
fn list(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_string(),
        [one, other] => format!("{one} and {other}"),
        [first @ .., last] => format!("{}, and {last}", first.join(", ")),
    }
}
