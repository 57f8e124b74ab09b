//! Chart: time per token, layer by layer, one panel per plan.

use super::{Chart, MARGIN, Sign, WIDTH, begin, label_every, legend, y_axis};
use crate::report::ink::Ink;
use crate::report::scene::{Anchor, Scene, fit, text_width};
use crate::report::table::{Table, number};
use crate::report::text::{percent, sig3, steps};
use crate::report::view::{Overview, PlanView};

/// Height of a panel, in pixels.
const PANEL: f64 = 150.0;
/// Width of a panel's axis, in pixels.
const AXIS: f64 = 46.0;
/// Space between panels, in pixels.
const GAP: f64 = 20.0;

pub(super) fn chart(o: &Overview<'_>) -> Option<Chart> {
    let plans: Vec<&PlanView<'_>> = o
        .plans
        .iter()
        .filter(|p| p.layers.iter().any(|l| l.dense_s + l.expert_s > 0.0))
        .collect();
    let best = *plans.first()?;
    let title = title(best);
    let subtitle = format!(
        "Milliseconds per decoded token in each layer, {}. All panels have the same scale.",
        o.measured()
    );
    let (mut scene, y) = begin(&title, &subtitle);
    let waits = plans
        .iter()
        .flat_map(|p| &p.layers)
        .any(|l| l.waited_s > 0.0);
    let signs = [
        (
            Sign::Swatch(Ink::Dense),
            "dense (attention, norms, router)".to_string(),
        ),
        (Sign::Swatch(Ink::Experts), "routed experts".to_string()),
        (
            Sign::Swatch(Ink::Waiting),
            "waiting for their reads".to_string(),
        ),
    ];
    let y = legend(&mut scene, y, if waits { &signs } else { &signs[..2] });
    let columns = match plans.len() {
        1 => 1,
        2 | 4 => 2,
        _ => 3,
    };
    let width = (WIDTH - 2.0 * MARGIN - GAP * (columns as f64 - 1.0)) / columns as f64;
    let largest = plans
        .iter()
        .flat_map(|p| &p.layers)
        .map(|l| (l.dense_s + l.expert_s) * 1e3)
        .fold(0.0, f64::max);
    let scale = steps(largest, 5);
    let mut bottom = y;
    for (i, plan) in plans.iter().enumerate() {
        let x = MARGIN + (i % columns) as f64 * (width + GAP);
        let top = y + (i / columns) as f64 * (PANEL + 86.0);
        bottom = panel(
            &mut scene,
            plan,
            &o.label(plan),
            Frame { x, top, width },
            scale,
        );
    }
    scene.height = bottom;
    let data = table(&plans);
    let how = "One bar per layer. A layer that stands out is short of pins or slots; equal bars mean that no layer is \
               the bottleneck.";
    Some(Chart {
        file: "layers",
        title,
        how: how.into(),
        scene,
        data,
    })
}

/// Where a panel is.
struct Frame {
    x: f64,
    top: f64,
    width: f64,
}

/// Draws one plan's panel with the axis `scale` in milliseconds; returns the y below.
fn panel(
    scene: &mut Scene,
    plan: &PlanView<'_>,
    label: &str,
    frame: Frame,
    scale: (f64, f64),
) -> f64 {
    let Frame { x, top, width } = frame;
    let total: f64 = plan.layers.iter().map(|l| l.dense_s + l.expert_s).sum();
    let figure = format!("{} ms in all layers", sig3(total * 1e3));
    let room = width - text_width(&figure, 12.5, false) - 10.0;
    scene.bold(
        x,
        top + 12.0,
        14.0,
        Anchor::Start,
        Ink::Text,
        fit(label, 14.0, true, room),
    );
    scene.text(x + width, top + 12.0, 12.5, Anchor::End, Ink::Muted, figure);
    let (plot_top, plot_bottom) = (top + 28.0, top + 28.0 + PANEL);
    let x0 = x + AXIS;
    let per_ms = y_axis(scene, x0, x + width, plot_top, plot_bottom, scale, "ms");
    let slot = (x + width - x0) / plan.layers.len().max(1) as f64;
    let bar = (slot * 0.72).clamp(0.5, 46.0);
    let every = label_every(slot, 26.0);
    for (k, layer) in plan.layers.iter().enumerate() {
        let middle = x0 + (k as f64 + 0.5) * slot;
        let left = middle - bar / 2.0;
        let dense = layer.dense_s * 1e3 * per_ms;
        let experts = layer.expert_s * 1e3 * per_ms;
        let waiting = experts.min(layer.waited_s * 1e3 * per_ms);
        scene.rect(left, plot_bottom - dense, bar, dense, Ink::Dense);
        scene.rect(
            left,
            plot_bottom - dense - experts + waiting,
            bar,
            experts - waiting,
            Ink::Experts,
        );
        scene.rect(
            left,
            plot_bottom - dense - experts,
            bar,
            waiting,
            Ink::Waiting,
        );
        if layer.layer.is_multiple_of(every) {
            let number = layer.layer.to_string();
            scene.text(
                middle,
                plot_bottom + 15.0,
                12.0,
                Anchor::Middle,
                Ink::Muted,
                number,
            );
        }
    }
    scene.text(
        x0,
        plot_bottom + 33.0,
        12.5,
        Anchor::Start,
        Ink::Muted,
        "layer",
    );
    plot_bottom + 46.0
}

/// Returns the chart's numbers: one row per plan and layer. Streamed experts have a column where a
/// run had any.
fn table(plans: &[&PlanView<'_>]) -> Table {
    let mut data = Table::new(&[
        "plan",
        "layer",
        "dense_s",
        "expert_s",
        "pinned_hits",
        "slot_hits",
        "misses",
        "missed_bytes",
        "reading_s",
        "waited_s",
    ]);
    let layers = || plans.iter().flat_map(|plan| &plan.layers);
    let streams = layers().any(|layer| layer.streamed > 0);
    data.head.extend(streams.then_some("streamed"));
    for (plan, layer) in plans
        .iter()
        .flat_map(|plan| plan.layers.iter().map(move |layer| (plan, layer)))
    {
        let mut row = vec![
            plan.name().to_string(),
            layer.layer.to_string(),
            number(Some(layer.dense_s)),
            number(Some(layer.expert_s)),
            layer.pinned_hits.to_string(),
            layer.slot_hits.to_string(),
            layer.misses.to_string(),
            layer.missed_bytes.to_string(),
            number(Some(layer.reading_s)),
            number(Some(layer.waited_s)),
        ];
        row.extend(streams.then(|| layer.streamed.to_string()));
        data.push(row);
    }
    data
}

fn title(best: &PlanView<'_>) -> String {
    let time = |l: &tier_plan_runtime::formats::record::LayerRecord| l.dense_s + l.expert_s;
    let total: f64 = best.layers.iter().map(time).sum();
    match best
        .layers
        .iter()
        .max_by(|a, b| time(a).total_cmp(&time(b)))
    {
        Some(slowest) if best.layers.len() > 1 && total > 0.0 => {
            let even = 1.0 / best.layers.len() as f64;
            format!(
                "{}'s slowest layer, {}, takes {} of the layers' time (an even share is {})",
                best.name(),
                slowest.layer,
                percent(time(slowest) / total),
                percent(even)
            )
        }
        _ => format!("Time per token and layer with {}", best.name()),
    }
}
