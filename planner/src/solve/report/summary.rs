//! Summarizes what a plan is worth beside the baselines, and which tier more bytes would help most.

use crate::solve::baselines::Baseline;
use crate::solve::problem::Problem;
use tier_plan_runtime::formats::placement::{Placement, TierIdx};
use tier_plan_runtime::units::{ByteUnit, show_bytes};

/// Relative gain of speed below which two plans count as equally fast.
const MIN_RELATIVE_GAIN: f64 = 0.005;

/// Share of a token's time below which a step more counts as worth nothing.
const MIN_WORTH_SHARE: f64 = 1e-6;

/// Largest share of a token's time that a step may be worth.
const MAX_STEP_SHARE: f64 = 0.5;

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

/// Returns the unit to say in what bytes are worth: by the size of the model, and smaller where one is
/// worth most of a token's time. A marginal price says nothing about so large a step.
fn step_of(weight_bytes: u64, share_per_byte: f64) -> ByteUnit {
    let mut step = ByteUnit::of_step(weight_bytes);
    while share_per_byte * step.bytes() as f64 > MAX_STEP_SHARE && step.smaller() != step {
        step = step.smaller();
    }
    step
}

/// Formats a price in dollars: to the cent, or to three digits below one.
fn dollars(price: f64) -> String {
    if price >= 1.0 {
        return format!("${price:.2}");
    }
    let digits = (-price.log10()).ceil().clamp(0.0, 12.0) as usize + 2;
    format!("${price:.digits$}")
}

/// Says which tier more bytes would help most, per unit that fits the model and for the money.
fn worth_of_bytes(plan: &Placement, prices: &[f64], problem: &Problem<'_>) -> Vec<String> {
    let total = plan.solver.objective_s;
    let name = |tier: TierIdx| plan.tiers[tier].tier.name.as_str();
    // Seconds per byte.
    let worth = |tier: TierIdx| prices.get(tier.get()).copied().unwrap_or(0.0);
    let step = ByteUnit::of_step(problem.shape.weight_bytes());
    let is_worth = |&tier: &TierIdx| worth(tier) * step.bytes() as f64 > MIN_WORTH_SHARE * total;
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
    let step = step_of(problem.shape.weight_bytes(), worth(tier) / total);
    let percent = |tier: TierIdx| worth(tier) * step.bytes() as f64 / total * 100.0;
    let spare = plan.tiers[tier]
        .tier
        .capacity_bytes
        .saturating_sub(plan.tiers[tier].budget_bytes);
    let unbudgeted = if spare >= step.bytes() {
        format!(" ({} of it are not budgeted)", show_bytes(spare))
    } else {
        String::new()
    };
    let mut text = format!(
        "what would help most: a {} more of '{}'{unbudgeted} is worth {:.2} % of a token's time",
        step.name(),
        name(tier),
        percent(tier)
    );
    let others = plan.tiers.indices().filter(|&t| t != tier).filter(is_worth);
    let others: Vec<String> = others
        .map(|t| format!("'{}' {:.2} %", name(t), percent(t)))
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
            "for the money it is '{}': a {} more costs {} and is worth {:.2} %",
            name(tier),
            step.name(),
            dollars(price * step.bytes() as f64 * 1e-9),
            percent(tier)
        ));
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_no_larger_than_their_worth_allows() {
        let step = |bytes, share| step_of(bytes, share).name();
        // A model of 8 GiB, of which a GiB is worth a tenth or twice a token's time.
        assert_eq!(step(8 << 30, 0.1 / (1u64 << 30) as f64), "GiB");
        assert_eq!(step(8 << 30, 2.0 / (1u64 << 30) as f64), "MiB");
        assert_eq!(step(11 << 20, 0.2 / (1u64 << 20) as f64), "MiB");
        assert_eq!(step(11 << 20, 0.2), "KiB");
        assert_eq!(step(u64::MAX, f64::INFINITY), "KiB");
        assert_eq!(step(8 << 30, f64::NAN), "GiB");
    }

    #[test]
    fn prices_have_three_digits() {
        assert_eq!(dollars(3.2212), "$3.22");
        assert_eq!(dollars(0.0031457), "$0.00315");
        assert_eq!(dollars(0.25), "$0.250");
    }
}
