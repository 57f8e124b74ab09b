//! Chart: where a token's time goes, by stage and by tier, predicted and measured.

use super::{Chart, MARGIN, NAMES, Sign, WIDTH, begin, legend, plan_name, x_axis};
use crate::report::ink::Ink;
use crate::report::scene::{Anchor, Scene};
use crate::report::table::{Table, number};
use crate::report::text::{percent, sig3};
use crate::report::view::{Overview, PlanView};
use tier_plan_runtime::formats::placement::{PerTier, TierIdx};

const ROW: f64 = 44.0;
const BAR: f64 = 15.0;

/// One stacked bar: seconds and ink by part, and the seconds in all.
struct Bar {
    parts: Vec<(f64, Ink)>,
    total: Option<f64>,
}

impl Bar {
    fn end(&self) -> f64 {
        self.parts
            .iter()
            .map(|(s, _)| s)
            .sum::<f64>()
            .max(self.total.unwrap_or(0.0))
    }
}

pub(super) fn chart(o: &Overview<'_>) -> Option<Chart> {
    let stages: Vec<[Option<Bar>; 2]> = o
        .plans
        .iter()
        .map(|p| [measured_stages(p), predicted_stages(p)])
        .collect();
    let tiers: Vec<[Option<Bar>; 2]> = o
        .plans
        .iter()
        .map(|p| [measured_tiers(o, p), predicted_tiers(o, p)])
        .collect();
    if stages.iter().flatten().all(Option::is_none) {
        return None;
    }
    let title = title(o);
    let subtitle = format!(
        "Milliseconds per decoded token. In each row the upper bar is {}, the lower one {}.",
        o.measured(),
        o.predicted()
    );
    let (mut scene, y) = begin(&title, &subtitle);
    let stage_signs = [
        (Sign::Words, "Left:".to_string()),
        (
            Sign::Swatch(Ink::Experts),
            "routed experts, waiting included".to_string(),
        ),
        (
            Sign::Swatch(Ink::Dense),
            "everything else (dense weights, keys and values, head, fixed times)".to_string(),
        ),
    ];
    let with_tiers = tiers.iter().flatten().any(Option::is_some);
    let mut y = legend(
        &mut scene,
        y,
        if with_tiers {
            &stage_signs
        } else {
            &stage_signs[1..]
        },
    );
    if with_tiers {
        let mut signs = vec![(Sign::Words, "Right:".to_string())];
        signs.extend(
            o.tiers
                .iter()
                .map(|(n, ink)| (Sign::Swatch(*ink), format!("waiting for {n}"))),
        );
        y = legend(&mut scene, y - 4.0, &signs) + 2.0;
    }
    let room = WIDTH - MARGIN - NAMES;
    let width = if with_tiers {
        (room - 50.0) / 2.0
    } else {
        room
    };
    for (i, plan) in o.plans.iter().enumerate() {
        plan_name(
            &mut scene,
            y + 24.0 + ROW * i as f64 + 28.0,
            &o.label(plan),
            i == 0,
        );
    }
    let bottom = panel(&mut scene, NAMES, width, y, "by stage", &stages);
    if with_tiers {
        panel(
            &mut scene,
            NAMES + width + 50.0,
            width,
            y,
            "by tier, all of the time shared out",
            &tiers,
        );
    }
    scene.height = bottom;
    Some(Chart {
        file: "parts",
        title,
        how: "Shorter is faster, and the longest part is what to work on. Reads of different tiers can go on at the \
              same time, so the parts on the right may add up to more than the token takes."
            .into(),
        scene,
        data: data(o),
    })
}

fn panel(
    scene: &mut Scene,
    x0: f64,
    width: f64,
    y: f64,
    heading: &str,
    rows: &[[Option<Bar>; 2]],
) -> f64 {
    scene.bold(x0, y + 12.0, 14.0, Anchor::Start, Ink::Text, heading);
    let top = y + 24.0;
    let bottom = top + ROW * rows.len() as f64 + 6.0;
    let largest = rows
        .iter()
        .flatten()
        .flatten()
        .map(Bar::end)
        .fold(0.0, f64::max)
        * 1e3;
    // Room at the right for the figure at the end of the longest bar.
    let per_ms = x_axis(scene, x0, x0 + width - 52.0, top, bottom, largest, 4);
    for (i, bars) in rows.iter().enumerate() {
        let y = top + ROW * i as f64 + 7.0;
        for (bar, y) in bars.iter().zip([y, y + BAR + 2.0]) {
            let Some(bar) = bar else { continue };
            let mut x = x0;
            for (seconds, ink) in &bar.parts {
                let w = seconds * 1e3 * per_ms;
                scene.rect(x, y, if w > 3.0 { w - 1.0 } else { w }, BAR, *ink);
                x += w;
            }
            let end = x0 + bar.end() * 1e3 * per_ms;
            let words = sig3(bar.total.unwrap_or_else(|| bar.end()) * 1e3);
            scene.text_on_paper(
                end + 5.0,
                y + BAR / 2.0 + 4.0,
                12.0,
                false,
                Ink::Text,
                words,
            );
        }
    }
    scene.text(
        x0,
        bottom + 34.0,
        13.0,
        Anchor::Start,
        Ink::Muted,
        "ms per token",
    );
    bottom + 48.0
}

fn token_s(rate: Option<f64>) -> Option<f64> {
    rate.filter(|r| *r > 0.0).map(|r| 1.0 / r)
}

fn measured_stages(p: &PlanView<'_>) -> Option<Bar> {
    let total = token_s(p.decode.map(|d| d.tok_s))?;
    Some(stages(total, p.layers.iter().map(|l| l.expert_s).sum()))
}

fn predicted_stages(p: &PlanView<'_>) -> Option<Bar> {
    let total = token_s(p.predicted_tok_s())?;
    Some(stages(total, finite(p.predicted?.expert_critical_s)))
}

/// Returns the stages that mean the same in a run and a prediction: experts, and all of the rest. A
/// run's dense stages exclude the head; predicted dense weights include it.
fn stages(total: f64, experts: f64) -> Bar {
    let rest = (total - experts).max(0.0);
    Bar {
        parts: vec![(experts, Ink::Experts), (rest, Ink::Dense)],
        total: Some(total),
    }
}

fn measured_tiers(o: &Overview<'_>, p: &PlanView<'_>) -> Option<Bar> {
    let parts: Vec<_> = p
        .tiers
        .iter()
        .filter_map(|t| Some((finite(t.busy_s?), o.ink_of(&t.name))))
        .collect();
    (parts.iter().map(|(s, _)| s).sum::<f64>() > 0.0).then_some(Bar { parts, total: None })
}

fn predicted_tiers(o: &Overview<'_>, p: &PlanView<'_>) -> Option<Bar> {
    let predicted = p.predicted?;
    let at = |of: &PerTier<f64>, i: TierIdx| finite(of.get(i).copied().unwrap_or(0.0));
    // At another position in the text, the prediction's own KV time counts.
    let of_plan = p
        .entry
        .placement
        .as_ref()
        .map(|plan| (plan.kv_s_by_tier(), plan.predicted.kv_s));
    let cache = |i: TierIdx| match &of_plan {
        Some((by_tier, all)) if *all > 0.0 => {
            finite(predicted.kv_s * by_tier.get(i).copied().unwrap_or(0.0) / all)
        }
        _ => 0.0,
    };
    // The time of an expert stage is shared out by the times of its paths, as a run's is.
    let paths: f64 = predicted.expert_s.iter().copied().map(finite).sum();
    let share = if paths > 0.0 {
        finite(predicted.expert_critical_s) / paths
    } else {
        0.0
    };
    let of = |i: TierIdx| at(&predicted.dense_s, i) + cache(i) + share * at(&predicted.expert_s, i);
    let sum: f64 = TierIdx::first(p.tiers.len()).map(of).sum();
    // Fixed times are shared out too.
    let longer = token_s(p.predicted_tok_s())? / sum;
    let parts = TierIdx::first(p.tiers.len())
        .zip(&p.tiers)
        .map(|(i, t)| (longer * of(i), o.ink_of(&t.name)))
        .collect();
    (sum > 0.0).then_some(Bar { parts, total: None })
}

fn finite(v: f64) -> f64 {
    if v.is_finite() { v.max(0.0) } else { 0.0 }
}

fn title(o: &Overview<'_>) -> String {
    let Some(best) = o.best() else {
        return "Where a token's time goes".into();
    };
    let (bar, how) = match measured_stages(best) {
        Some(bar) => (
            bar,
            if best.emulated {
                "measured on emulated tiers"
            } else {
                "measured"
            },
        ),
        None => match predicted_stages(best) {
            Some(bar) => (
                bar,
                if best.emulated {
                    "predicted from emulated rates"
                } else {
                    "predicted"
                },
            ),
            None => return "Where a token's time goes".into(),
        },
    };
    let total = bar.end().max(f64::MIN_POSITIVE);
    let experts = bar
        .parts
        .iter()
        .filter(|(_, ink)| *ink == Ink::Experts)
        .map(|(s, _)| s)
        .sum::<f64>();
    format!(
        "With {} a token takes {} ms ({how}), {} of it in routed experts",
        best.name(),
        sig3(total * 1e3),
        percent(experts / total)
    )
}

fn data(o: &Overview<'_>) -> Table {
    let mut data = Table::new(&["plan", "kind", "part", "name", "seconds_per_token"]);
    for p in &o.plans {
        let mut push = |kind: &str, part: &str, name: &str, seconds: Option<f64>| {
            if seconds.is_some() {
                data.push([p.name(), kind, part, name, &number(seconds)].map(str::to_string));
            }
        };
        for (kind, bar) in [
            ("measured", measured_stages(p)),
            ("predicted", predicted_stages(p)),
        ] {
            let Some(bar) = bar else { continue };
            for ((seconds, _), name) in bar.parts.iter().zip(["experts", "else"]) {
                push(kind, "stage", name, Some(*seconds));
            }
        }
        for (i, t) in TierIdx::first(p.tiers.len()).zip(&p.tiers) {
            push("measured", "tier_busy", &t.name, t.busy_s);
            if let Some(predicted) = p.predicted {
                push(
                    "predicted",
                    "tier_dense",
                    &t.name,
                    predicted.dense_s.get(i).copied(),
                );
                push(
                    "predicted",
                    "tier_experts",
                    &t.name,
                    predicted.expert_s.get(i).copied(),
                );
            }
        }
    }
    data
}
