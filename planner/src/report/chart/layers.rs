//! Time per token, layer by layer, one panel a plan.

use super::{Chart, MARGIN, Sign, WIDTH, begin, label_every, legend, y_axis};
use crate::report::ink::Ink;
use crate::report::scene::{Anchor, fit};
use crate::report::table::{Table, number};
use crate::report::text::{percent, sig3, steps};
use crate::report::view::{Overview, PlanView};

const PANEL: f64 = 150.0;
const AXIS: f64 = 46.0;

pub(super) fn chart(o: &Overview<'_>) -> Option<Chart> {
    let plans: Vec<&PlanView<'_>> =
        o.plans.iter().filter(|p| p.layers.iter().any(|l| l.dense_s + l.expert_s > 0.0)).collect();
    let best = *plans.first()?;
    let title = title(best);
    let subtitle =
        format!("Milliseconds per decoded token in each layer, {}. All panels have the same scale.", o.measured());
    let (mut scene, y) = begin(&title, &subtitle);
    let waits = plans.iter().flat_map(|p| &p.layers).any(|l| l.waited_s > 0.0);
    let signs = [
        (Sign::Swatch(Ink::Dense), "dense (attention, norms, router)".to_string()),
        (Sign::Swatch(Ink::Experts), "routed experts".to_string()),
        (Sign::Swatch(Ink::Waiting), "waiting for their reads".to_string()),
    ];
    let y = legend(&mut scene, y, if waits { &signs } else { &signs[..2] });
    let columns = match plans.len() {
        1 => 1,
        2 | 4 => 2,
        _ => 3,
    };
    let gap = 20.0;
    let width = (WIDTH - 2.0 * MARGIN - gap * (columns as f64 - 1.0)) / columns as f64;
    let largest = plans.iter().flat_map(|p| &p.layers).map(|l| (l.dense_s + l.expert_s) * 1e3).fold(0.0, f64::max);
    let scale = steps(largest, 5);
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
    let mut bottom = y;
    for (i, plan) in plans.iter().enumerate() {
        let x = MARGIN + (i % columns) as f64 * (width + gap);
        let top = y + (i / columns) as f64 * (PANEL + 86.0);
        let total: f64 = plan.layers.iter().map(|l| l.dense_s + l.expert_s).sum();
        let figure = format!("{} ms in all layers", sig3(total * 1e3));
        let room = width - crate::report::scene::text_width(&figure, 12.5, false) - 10.0;
        let name = fit(&o.label(plan), 14.0, true, room);
        scene.bold(x, top + 12.0, 14.0, Anchor::Start, Ink::Text, name);
        scene.text(x + width, top + 12.0, 12.5, Anchor::End, Ink::Muted, figure);
        let (plot_top, plot_bottom) = (top + 28.0, top + 28.0 + PANEL);
        let x0 = x + AXIS;
        let per_ms = y_axis(&mut scene, x0, x + width, plot_top, plot_bottom, scale, "ms");
        let slot = (x + width - x0) / plan.layers.len().max(1) as f64;
        let bar = (slot * 0.72).clamp(0.5, 46.0);
        let every = label_every(slot, 26.0);
        for (k, layer) in plan.layers.iter().enumerate() {
            let middle = x0 + (k as f64 + 0.5) * slot;
            let dense = layer.dense_s * 1e3 * per_ms;
            let experts = layer.expert_s * 1e3 * per_ms;
            let waiting = experts.min(layer.waited_s * 1e3 * per_ms);
            scene.rect(middle - bar / 2.0, plot_bottom - dense, bar, dense, Ink::Dense);
            scene.rect(
                middle - bar / 2.0,
                plot_bottom - dense - experts + waiting,
                bar,
                experts - waiting,
                Ink::Experts,
            );
            scene.rect(middle - bar / 2.0, plot_bottom - dense - experts, bar, waiting, Ink::Waiting);
            if layer.layer.is_multiple_of(every) {
                let number = layer.layer.to_string();
                scene.text(middle, plot_bottom + 15.0, 12.0, Anchor::Middle, Ink::Muted, number);
            }
            data.push([
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
            ]);
        }
        scene.text(x0, plot_bottom + 33.0, 12.5, Anchor::Start, Ink::Muted, "layer");
        bottom = plot_bottom + 46.0;
    }
    scene.height = bottom;
    Some(Chart {
        file: "layers",
        title,
        how: "One bar a layer. A layer that stands out is short of pins or slots; equal bars mean that no layer is \
              the bottleneck."
            .into(),
        scene,
        data,
    })
}

fn title(best: &PlanView<'_>) -> String {
    let time = |l: &tier_plan_runtime::formats::record::LayerRecord| l.dense_s + l.expert_s;
    let total: f64 = best.layers.iter().map(time).sum();
    match best.layers.iter().max_by(|a, b| time(a).total_cmp(&time(b))) {
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
