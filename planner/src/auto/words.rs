//! What a start decided, in three lines.

use super::Report;
use crate::cost::predict;
use crate::explain::explain;
use crate::print::digits;
use crate::printable::printable;
use crate::profile::Evidence;
use tier_plan_runtime::formats::machine::Medium;
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_runtime::units::{ByteUnit, show_bytes};

/// Time limit of the search for what memory is worth, in seconds.
const PRICE_S: f64 = 2.0;

/// Gain below which nothing is said to help.
const MIN_GAIN: f64 = 0.02;

/// Returns what lies where under a plan, and the predicted speed.
pub(super) fn decision(plan: &Placement, shape: &ModelShape) -> String {
    let upper = plan.tiers.iter().take(plan.tiers.len().saturating_sub(1));
    let parts = upper.map(|tier| {
        let name = match tier.tier.medium() {
            Medium::Addressable => "main memory".to_string(),
            _ => printable(&tier.tier.name).into_owned(),
        };
        format!("{} in {name}", show_bytes(tier.used_bytes()))
    });
    let parts: Vec<String> = parts.collect();
    let layers = plan.layers.iter();
    let slots: u64 = layers.clone().map(|layer| u64::from(layer.slots)).sum();
    let pins: usize = layers
        .flat_map(|layer| &layer.pinned)
        .map(|pins| pins.experts.len())
        .sum();
    let all: u64 = shape.experts.iter().map(|e| u64::from(e.n_expert)).sum();
    format!(
        "{} for {} of weights: {pins} of {all} experts pinned and {slots} slots, the others read from the file; \
         predicted {} tok/s",
        parts.join(" and "),
        show_bytes(shape.weight_bytes()),
        digits(plan.predicted.decode_tok_s)
    )
}

/// Part (1/n) of the memory up to which the bytes that are missing for all of a model are the advice.
const NEAR: u64 = 2;

/// Returns what would make a plan fastest: more memory, a faster drive, or huge pages. `missing` is
/// the memory in bytes with which all would fit.
pub(super) fn advice(
    plan: &Placement,
    shape: &ModelShape,
    evidence: &Evidence,
    missing: u64,
) -> String {
    let pages = crate::doctor::small_pages_mend();
    let pages = pages.map_or(String::new(), |mend| {
        format!("; huge pages are off: {mend}")
    });
    let memory = plan
        .tiers
        .iter()
        .filter(|t| t.tier.medium() == Medium::Addressable);
    let memory = memory.map(|t| t.budget_bytes).fold(0, u64::saturating_add);
    if missing <= memory / NEAR {
        return format!(
            "{} more memory, with which all would fit{pages}",
            show_bytes(missing)
        );
    }
    let now = plan.predicted.decode_tok_s;
    let gains = [
        more_memory(plan, shape, evidence),
        faster_drive(plan, shape, evidence),
    ];
    let best = gains
        .into_iter()
        .flatten()
        .filter(|gain| gain.tok_s > MIN_GAIN * now)
        .max_by(|a, b| a.tok_s.total_cmp(&b.tok_s));
    let best = match best {
        Some(Gain { words, tok_s }) => {
            format!(
                "{words}, for about {} tok/s more (predicted)",
                digits(tok_s)
            )
        }
        None => format!(
            "nothing small: a step of more memory or a drive twice as fast brings less than {:.0} % (predicted)",
            MIN_GAIN * 100.0
        ),
    };
    format!(
        "{best}; with {} more memory, all would fit{pages}",
        show_bytes(missing)
    )
}

/// What a change would bring.
struct Gain {
    words: String,
    tok_s: f64,
}

fn more_memory(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> Option<Gain> {
    let why = explain(plan, shape, evidence, PRICE_S).ok()?;
    let mut tiers = plan.tiers.iter().zip(why.tiers.iter());
    let (tier, reason) = tiers.find(|(t, _)| t.tier.medium() == Medium::Addressable)?;
    let step = ByteUnit::of_step(shape.weight_bytes().min(tier.budget_bytes));
    Some(Gain {
        words: format!("{} more memory", show_bytes(step.bytes())),
        tok_s: reason.tok_s_per_gib * step.per_gib(),
    })
}

fn faster_drive(plan: &Placement, shape: &ModelShape, evidence: &Evidence) -> Option<Gain> {
    let mut faster = plan.clone();
    let drive = faster.tiers.iter_mut().last()?;
    drive.tier.read_gbps *= 2.0;
    let then = predict(&faster, shape, evidence).decode_tok_s;
    Some(Gain {
        words: "a drive twice as fast".to_string(),
        tok_s: then - plan.predicted.decode_tok_s,
    })
}

impl Report {
    /// Returns the lines for standard error.
    pub fn lines(&self) -> [String; 3] {
        [
            format!("auto: {}", self.decision),
            format!("auto: rests on {}", self.basis),
            format!("auto: what would help most: {}", self.advice),
        ]
    }
}
