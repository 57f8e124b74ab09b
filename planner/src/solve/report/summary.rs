//! Summarizes what a plan is worth beside the baselines, and which tier more bytes would help most.

use crate::solve::baselines::Baseline;
use crate::solve::problem::Problem;
use tier_plan_runtime::formats::placement::{Placement, TierIdx};
use tier_plan_runtime::units::show_bytes;

/// Relative gain of speed below which two plans count as equally fast.
const MIN_RELATIVE_GAIN: f64 = 0.005;

/// Share of a token's time below which a GiB more counts as worth nothing.
const MIN_WORTH_SHARE: f64 = 1e-6;

const GIB: f64 = (1u32 << 30) as f64;

/// Returns sentences about a plan; `prices` are `[tiers]` seconds per byte.
pub fn summarize(
    plan: &Placement,
    baselines: &[Placement],
    prices: &[f64],
    problem: &Problem<'_>,
) -> Vec<String> {
    let comparison = compare(plan, baselines);
    comparison
        .into_iter()
        .chain(worth_of_bytes(plan, prices, problem))
        .collect()
}

/// Compares a plan with slots alone, and with the same number of experts in every layer.
fn compare(plan: &Placement, baselines: &[Placement]) -> Option<String> {
    let speed = |baseline: Baseline| {
        let of_name = baselines.iter().find(|b| b.name == baseline.name());
        of_name.map(|b| b.predicted.decode_tok_s)
    };
    let speed_of_plan = plan.predicted.decode_tok_s;
    let slots = speed(Baseline::LruOnly).filter(|s| *s > 0.0)?;
    let uniform = speed(Baseline::Uniform).filter(|u| *u > 0.0)?;
    let pins = speed(Baseline::FrequencyFirst);
    let percent = |of: f64| (speed_of_plan / of - 1.0) * 100.0;
    let is_no_faster = |than: f64| speed_of_plan / than - 1.0 < MIN_RELATIVE_GAIN;
    let gain = if is_no_faster(slots) {
        "pins bring nothing over slots alone".to_string()
    } else if pins.is_some_and(is_no_faster) {
        format!(
            "pins alone do it: predicted {:.1} % faster than slots alone",
            percent(slots)
        )
    } else {
        format!(
            "pins and slots together are predicted to be {:.1} % faster than slots alone",
            percent(slots)
        )
    };
    let pinned_bytes: u64 = plan.tiers.iter().map(|t| t.bytes.pinned).sum();
    let slot_bytes: u64 = plan.tiers.iter().map(|t| t.bytes.slots).sum();
    Some(format!(
        "at equal bytes {gain}, and {:.1} % faster than the same number of experts in every layer; {} are pinned, \
         {} are slots",
        percent(uniform),
        show_bytes(pinned_bytes),
        show_bytes(slot_bytes)
    ))
}

/// Says which tier more bytes would help most, per GiB and per dollar.
fn worth_of_bytes(plan: &Placement, prices: &[f64], problem: &Problem<'_>) -> Vec<String> {
    let total = plan.solver.objective_s;
    let name = |tier: TierIdx| plan.tiers[tier].tier.name.as_str();
    // Seconds per GiB.
    let worth = |tier: TierIdx| prices.get(tier.get()).map_or(0.0, |price| price * GIB);
    let is_worth = |&tier: &TierIdx| worth(tier) > MIN_WORTH_SHARE * total;
    let best = plan
        .tiers
        .indices()
        .max_by(|&a, &b| worth(a).total_cmp(&worth(b)));
    let Some(tier) = best.filter(is_worth) else {
        let none = "more capacity would not help; faster tiers or lower per-layer overhead would";
        return if total > 0.0 {
            vec![none.to_string()]
        } else {
            Vec::new()
        };
    };
    let percent = |tier: TierIdx| worth(tier) / total * 100.0;
    let spare = plan.tiers[tier]
        .tier
        .capacity_bytes
        .saturating_sub(plan.tiers[tier].budget_bytes);
    let unbudgeted = if spare >= 1 << 30 {
        format!(" ({} of it are not budgeted)", show_bytes(spare))
    } else {
        String::new()
    };
    // A marginal price says nothing about a step that would save most of the time: small models
    // are told in MiB.
    let (unit, units_per_gib) = if percent(tier) <= 50.0 {
        ("GiB", 1.0)
    } else {
        ("MiB", 1024.0)
    };
    let percent_per_unit = |tier: TierIdx| percent(tier) / units_per_gib;
    let mut text = format!(
        "what would help most: a {unit} more of '{}'{unbudgeted} is worth {:.2} % of a token's time",
        name(tier),
        percent_per_unit(tier)
    );
    let others = plan.tiers.indices().filter(|&t| t != tier).filter(is_worth);
    let others: Vec<String> = others
        .map(|t| format!("'{}' {:.2} %", name(t), percent_per_unit(t)))
        .collect();
    if !others.is_empty() {
        text += &format!("; of {}", others.join(", "));
    }
    let mut sentences = vec![text];
    let usd_per_gb = |t: TierIdx| {
        problem
            .machine
            .extras
            .usd_per_gb
            .get(name(t))
            .copied()
            .filter(|price| *price > 0.0)
    };
    let per_usd = |t: TierIdx| usd_per_gb(t).map_or(0.0, |price| worth(t) / price);
    let cheapest = plan
        .tiers
        .indices()
        .max_by(|&a, &b| per_usd(a).total_cmp(&per_usd(b)));
    let cheapest = cheapest.filter(|&t| per_usd(t) > 0.0);
    if let Some((tier, price)) = cheapest.and_then(|t| Some((t, usd_per_gb(t)?))) {
        sentences.push(format!(
            "for the money it is '{}': {:.3} % of a token's time per dollar",
            name(tier),
            percent(tier) / (price * GIB * 1e-9)
        ));
    }
    sentences
}
