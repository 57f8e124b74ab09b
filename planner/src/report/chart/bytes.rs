//! Chart: what fills each tier, plan by plan, against its budget.

use super::{Chart, MARGIN, NAMES, Sign, WIDTH, begin, legend, plan_name, x_axis};
use crate::report::ink::Ink;
use crate::report::scene::{Anchor, Scene, fit};
use crate::report::table::Table;
use crate::report::text::{byte_unit, percent, sig3};
use crate::report::view::{Budgets, Overview, PARTS, PlanView, TierView};
use tier_plan_runtime::units::show_bytes;

const ROW: f64 = 40.0;
const GAP: f64 = 30.0;
const PANELS: usize = 4;

pub(super) fn chart(o: &Overview<'_>) -> Option<Chart> {
    let tiers: Vec<&(String, Ink)> = o
        .tiers
        .iter()
        .filter(|(name, _)| o.plans.iter().any(|p| tier(p, name).is_some_and(filled)))
        .collect();
    if tiers.is_empty() {
        return None;
    }
    let title = title(o);
    let (mut scene, y) = begin(
        &title,
        "Bytes that each plan puts in each tier. Each tier has a scale of its own.",
    );
    let shown = |part: usize| {
        o.plans
            .iter()
            .flat_map(|p| &p.tiers)
            .any(|t| t.part_bytes[part] > 0)
    };
    let mut signs: Vec<(Sign, String)> = Vec::new();
    for (i, (_, words, ink)) in PARTS.iter().enumerate() {
        if shown(i) {
            signs.push((Sign::Swatch(*ink), (*words).to_string()));
        }
    }
    if o.plans
        .iter()
        .flat_map(|p| &p.tiers)
        .any(|t| t.budget_bytes.is_some())
    {
        signs.push((Sign::Mark, "budget".to_string()));
    }
    let how = if signs.len() > 1 {
        "Each bar is what a plan puts in a tier, split by what it is; the upright mark is the most it may use. \
         A short bar is memory left unused. Experts are pinned (they stay) or pooled (their home is the last tier, and \
         slots cache them in a faster one)."
    } else {
        "Each bar is what a plan puts in a tier, by the records of its runs. The plans themselves would say what it is."
    };
    let mut y = legend(&mut scene, y, &signs);
    for band in tiers.chunks(PANELS) {
        y = panels(&mut scene, o, band, y);
    }
    scene.height = y + 4.0;
    Some(Chart {
        file: "bytes",
        title,
        how: how.into(),
        scene,
        data: data(o),
    })
}

fn tier<'p>(plan: &'p PlanView<'_>, name: &str) -> Option<&'p TierView> {
    plan.tiers.iter().find(|t| t.name == name)
}

fn filled(t: &TierView) -> bool {
    t.used_bytes() > 0 || t.budget_bytes.is_some_and(|b| b > 0)
}

/// Draws one row of panels, one per tier; returns the y below.
fn panels(scene: &mut Scene, o: &Overview<'_>, band: &[&(String, Ink)], y: f64) -> f64 {
    let n = band.len() as f64;
    let width = (WIDTH - MARGIN - 14.0 - NAMES - GAP * (n - 1.0)) / n;
    let top = y + 28.0;
    let bottom = top + ROW * o.plans.len() as f64 + 4.0;
    for (i, plan) in o.plans.iter().enumerate() {
        plan_name(scene, top + ROW * i as f64 + 29.0, &o.label(plan), i == 0);
    }
    for (column, (name, ink)) in band.iter().enumerate() {
        let x0 = NAMES + column as f64 * (width + GAP);
        let views: Vec<Option<&TierView>> = o.plans.iter().map(|p| tier(p, name)).collect();
        let emulated = views.iter().flatten().any(|t| t.emulated);
        let heading = if emulated {
            format!("{name} (emulated)")
        } else {
            name.clone()
        };
        scene.rect(x0, y, 14.0, 14.0, *ink);
        scene.bold(
            x0 + 20.0,
            y + 12.0,
            14.0,
            Anchor::Start,
            Ink::Text,
            fit(&heading, 14.0, true, width - 24.0),
        );
        // A slow tier's budget can be many times what is used. Then the scale fits the bars, and
        // the budget is given in words.
        let used = views
            .iter()
            .flatten()
            .map(|t| t.used_bytes())
            .max()
            .unwrap_or(0);
        let budget = views
            .iter()
            .flatten()
            .filter_map(|t| t.budget_bytes)
            .max()
            .unwrap_or(0);
        let largest = if budget as f64 > 3.0 * used as f64 && used > 0 {
            used
        } else {
            used.max(budget)
        };
        let (unit, unit_bytes) = byte_unit(largest);
        let about = ((width / 60.0) as usize).clamp(2, 5);
        let per_unit = x_axis(
            scene,
            x0,
            x0 + width,
            top,
            bottom,
            largest as f64 / unit_bytes,
            about,
        );
        scene.text(x0, bottom + 34.0, 13.0, Anchor::Start, Ink::Muted, unit);
        for (i, view) in views.iter().enumerate() {
            let row = top + ROW * i as f64;
            let Some(view) = view else {
                scene.text(
                    x0 + 5.0,
                    row + 29.0,
                    12.0,
                    Anchor::Start,
                    Ink::Muted,
                    "not in this plan",
                );
                continue;
            };
            let px = |bytes: u64| bytes as f64 / unit_bytes * per_unit;
            let mut x = x0;
            for (part, (_, _, ink)) in view.part_bytes.iter().zip(PARTS) {
                let w = px(*part);
                // A hair of paper between parts keeps neighbors apart for every eye.
                let hair = if w > 3.0 { 1.0 } else { 0.0 };
                scene.rect(x, row + 18.0, w - hair, 16.0, ink);
                x += w;
            }
            let words = match view.budget_bytes {
                // Against a budget far beyond the scale, the use alone says enough.
                Some(b) if b > 0 && px(b) <= width + 0.5 => {
                    let share = view.used_bytes() as f64 / b as f64;
                    let over = if share > 1.0 { ", over budget" } else { "" };
                    format!(
                        "{} of {} · {}{over}",
                        show_bytes(view.used_bytes()),
                        show_bytes(b),
                        percent(share)
                    )
                }
                _ => show_bytes(view.used_bytes()),
            };
            scene.text_on_paper(
                x0 + 5.0,
                row + 14.0,
                11.5,
                false,
                Ink::Muted,
                fit(&words, 11.5, false, width - 5.0),
            );
            if let Some(budget) = view.budget_bytes
                && px(budget) <= width + 0.5
            {
                scene.rect(x0 + px(budget) - 1.25, row + 16.0, 2.5, 20.0, Ink::Text);
            }
        }
    }
    bottom + 50.0
}

fn title(o: &Overview<'_>) -> String {
    let faster = |p: &PlanView<'_>| -> Option<(u64, u64)> {
        let (_, faster) = p.tiers.split_last()?;
        let mut budgets = faster.iter().map(|t| t.budget_bytes);
        let budget = budgets.try_fold(0u64, |sum, bytes| Some(sum.saturating_add(bytes?)))?;
        Some((p.faster_bytes()?, budget))
    };
    let best = o
        .best()
        .and_then(|b| Some((b, faster(b)?)))
        .filter(|(_, (_, budget))| *budget > 0);
    match (best, &o.budgets) {
        (Some((best, (used, budget))), Budgets::Equal) if o.plans.len() > 1 => format!(
            "All plans have the same budgets; {} uses {} of its {} of faster memory",
            best.name(),
            percent(used as f64 / budget as f64),
            show_bytes(budget)
        ),
        (Some((best, (used, budget))), _) => format!(
            "{} uses {} of its {} of faster memory",
            best.name(),
            percent(used as f64 / budget as f64),
            show_bytes(budget)
        ),
        _ => {
            let total = o.best().or(o.plans.first()).map_or(0, |p| {
                p.tiers
                    .iter()
                    .map(TierView::used_bytes)
                    .fold(0, u64::saturating_add)
            });
            let (unit, bytes) = byte_unit(total);
            format!("Where the plans put {} {unit}", sig3(total as f64 / bytes))
        }
    }
}

fn data(o: &Overview<'_>) -> Table {
    let mut data = Table::new(&[
        "plan",
        "tier",
        "emulated",
        "budget_bytes",
        "used_bytes",
        "dense_bytes",
        "pinned_bytes",
        "slots_bytes",
        "kv_bytes",
        "staging_bytes",
        "home_bytes",
        "unsplit_bytes",
    ]);
    for plan in &o.plans {
        for t in &plan.tiers {
            let mut row = vec![
                plan.name().to_string(),
                t.name.clone(),
                t.emulated.to_string(),
                t.budget_bytes.map(|b| b.to_string()).unwrap_or_default(),
                t.used_bytes().to_string(),
            ];
            row.extend(t.part_bytes.iter().map(u64::to_string));
            data.push(row);
        }
    }
    data
}
