//! What a plan is worth beside the rules at equal bytes, and what would help most, in sentences.

use super::Inputs;
use super::rules::Rule;
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::units::show_bytes;

/// Differences that are none.
const ALIKE: f64 = 0.005;

/// The sentences; `prices` are seconds a byte of each tier.
pub fn verdict(plan: &Placement, baselines: &[Placement], prices: &[f64], inputs: &Inputs<'_>) -> Vec<String> {
    let mut said = Vec::new();
    let speed = |rule: Rule| baselines.iter().find(|b| b.name == rule.name()).map(|b| b.predicted.decode_tok_s);
    let own = plan.predicted.decode_tok_s;
    let (slots, uniform) = (speed(Rule::LruOnly), speed(Rule::Uniform));
    let pins = speed(Rule::FrequencyFirst);
    let percent = |of: f64| (own / of - 1.0) * 100.0;
    if let (Some(slots), Some(uniform)) = (slots.filter(|s| *s > 0.0), uniform.filter(|u| *u > 0.0)) {
        let counts = |pinned: bool| -> u64 {
            plan.tiers.iter().map(|t| if pinned { t.bytes.pinned } else { t.bytes.slots }).sum()
        };
        let how = if own / slots - 1.0 < ALIKE {
            "pins bring nothing over slots alone".to_string()
        } else if pins.is_some_and(|p| own / p - 1.0 < ALIKE) {
            format!("pins alone do it: predicted {:.1} % faster than slots alone", percent(slots))
        } else {
            format!("pins and slots together are predicted to be {:.1} % faster than slots alone", percent(slots))
        };
        said.push(format!(
            "at equal bytes {how}, and {:.1} % faster than the same number of experts in every layer; {} are pinned, {} \
             are slots",
            percent(uniform),
            show_bytes(counts(true)),
            show_bytes(counts(false))
        ));
    }
    let gib = f64::from(1u32 << 30);
    let worth = |tier: usize| prices.get(tier).map_or(0.0, |p| p * gib);
    let best = (0..plan.tiers.len()).max_by(|&a, &b| worth(a).total_cmp(&worth(b)));
    let total = plan.solver.objective_s;
    if let Some(tier) = best.filter(|&t| worth(t) > 1e-6 * total) {
        let of = &plan.tiers[tier];
        let spare = of.tier.capacity_bytes.saturating_sub(of.budget_bytes);
        let where_from =
            if spare >= 1 << 30 { format!(" ({} of it are not budgeted)", show_bytes(spare)) } else { String::new() };
        let mut text = format!(
            "what would help most: a GiB more of '{}'{where_from} is worth {:.2} % of a token's time",
            of.tier.name,
            worth(tier) / total * 100.0
        );
        let rest: Vec<String> = (0..plan.tiers.len())
            .filter(|&t| t != tier && worth(t) > 1e-6 * total)
            .map(|t| format!("'{}' {:.2} %", plan.tiers[t].tier.name, worth(t) / total * 100.0))
            .collect();
        if !rest.is_empty() {
            text += &format!("; of {}", rest.join(", "));
        }
        said.push(text);
        let usd =
            |t: usize| inputs.machine.extras.usd_per_gb.get(&plan.tiers[t].tier.name).copied().filter(|p| *p > 0.0);
        let by_price = |t: usize| usd(t).map_or(0.0, |p| worth(t) / p);
        let cheapest = (0..plan.tiers.len()).max_by(|&a, &b| by_price(a).total_cmp(&by_price(b)));
        if let Some((tier, price)) = cheapest.filter(|&t| by_price(t) > 0.0).and_then(|t| Some((t, usd(t)?))) {
            said.push(format!(
                "for the money it is '{}': {:.3} % of a token's time a dollar",
                plan.tiers[tier].tier.name,
                worth(tier) / total * 100.0 / (price * gib * 1e-9)
            ));
        }
    } else if total > 0.0 {
        said.push("more bytes of any tier bring next to nothing: faster tiers or fewer fixed times would".to_string());
    }
    said
}
