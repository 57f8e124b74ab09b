//! Chart: hit rate against slots, layer by layer, with the points that a plan chose.

use super::{Chart, MARGIN, Sign, WIDTH, begin, legend, ring};
use crate::report::HitCurve;
use crate::report::ink::Ink;
use crate::report::scene::{Anchor, Scene, fit};
use crate::report::table::{Table, number};
use crate::report::text::{percent, steps, tick};
use crate::report::view::Overview;
use tier_plan_runtime::formats::placement::Placement;

/// Most lines of a panel that are all labeled; beyond it only the first and the last layer are.
const NAMED: usize = 12;
const PANELS: usize = 4;

/// A point that the plan chose on a curve.
struct Chosen {
    slots: u32,
    rate: f64,
}

pub(super) fn chart(o: &Overview<'_>) -> Option<Chart> {
    let usable = |c: &&HitCurve| {
        !c.slots.is_empty()
            && c.slots.len() == c.hit_rate.len()
            && c.hit_rate.iter().all(|h| h.is_finite())
    };
    let curves: Vec<&HitCurve> = o.report.curves.iter().filter(usable).collect();
    let mut labels: Vec<&str> = Vec::new();
    for curve in &curves {
        if !labels.contains(&curve.label.as_str()) {
            labels.push(&curve.label);
        }
    }
    if labels.is_empty() {
        return None;
    }
    labels.truncate(PANELS);
    let with_plan = o
        .best()
        .into_iter()
        .chain(&o.plans)
        .find_map(|p| Some((p.name(), p.entry.placement.as_ref()?)));
    let mut layers: Vec<u32> = curves.iter().map(|c| c.layer).collect();
    layers.sort_unstable();
    layers.dedup();
    let points: Vec<f64> = curves
        .iter()
        .filter(|c| c.label == labels[0])
        .filter_map(|c| Some(chosen(c, with_plan?.1)?.rate))
        .collect();
    let title = title(with_plan.map(|(n, _)| n), &points);
    let (mut scene, y) = begin(
        &title,
        "Share of expert accesses that a cache of so many slots would serve, replayed from recorded accesses, not measured.",
    );
    let (first, last) = (layers[0], layers[layers.len() - 1]);
    let mut signs = Vec::new();
    if layers.len() > NAMED {
        for i in 0..8u8 {
            let from = layers[layers.len() * usize::from(i) / 8];
            let to = layers[(layers.len() * (usize::from(i) + 1) / 8).saturating_sub(1)];
            signs.push((Sign::Swatch(Ink::Depth(i)), format!("layers {from}–{to}")));
        }
    }
    if let (false, Some((name, _))) = (points.is_empty(), with_plan) {
        signs.push((Sign::Ring, format!("slots that {name} gives the layer")));
    }
    let y = if signs.is_empty() {
        y
    } else {
        legend(&mut scene, y, &signs)
    };
    let columns = labels.len().min(2);
    let width = (WIDTH - 2.0 * MARGIN - 30.0 * (columns as f64 - 1.0)) / columns as f64;
    let height = if columns == 1 { 330.0 } else { 260.0 };
    let mut bottom = y;
    for (i, label) in labels.iter().enumerate() {
        let mine: Vec<&HitCurve> = curves
            .iter()
            .filter(|c| c.label == *label)
            .copied()
            .collect();
        let x = MARGIN + (i % columns) as f64 * (width + 30.0);
        let top = y + (i / columns) as f64 * (height + 92.0);
        bottom = panel(
            &mut scene,
            &mine,
            label,
            &layers,
            with_plan.map(|(_, p)| p),
            (x, top, width, height),
        );
    }
    scene.height = bottom;
    let mut data = Table::new(&["label", "layer", "slots", "hit_rate", "chosen_slots"]);
    for curve in &curves {
        let chosen = with_plan
            .and_then(|(_, p)| chosen(curve, p))
            .map(|c| c.slots.to_string())
            .unwrap_or_default();
        for (slots, rate) in curve.slots.iter().zip(&curve.hit_rate) {
            let row = [
                &curve.label,
                &curve.layer.to_string(),
                &slots.to_string(),
                &number(Some(*rate)),
                &chosen,
            ];
            data.push(row.map(|s| s.to_string()));
        }
    }
    Some(Chart {
        file: "hits",
        title,
        how: format!(
            "One line a layer, from layer {first} to layer {last}. A steep line gains from every slot; past its bend, \
             bytes are better spent elsewhere. A good plan's rings lie where the lines have about the same slope."
        ),
        scene,
        data,
    })
}

/// Locates the plan's slots on a curve and interpolates the rate.
fn chosen(curve: &HitCurve, placement: &Placement) -> Option<Chosen> {
    let slots = placement
        .layers
        .iter()
        .find(|l| l.layer == curve.layer)?
        .slots;
    if slots == 0 {
        return None;
    }
    let after = curve
        .slots
        .iter()
        .position(|s| *s >= slots)
        .unwrap_or(curve.slots.len() - 1);
    let (s1, r1) = (curve.slots[after], curve.hit_rate[after]);
    let rate = match after.checked_sub(1) {
        Some(before) if curve.slots[before] < s1 && slots < s1 => {
            let (s0, r0) = (curve.slots[before], curve.hit_rate[before]);
            r0 + (r1 - r0) * f64::from(slots - s0) / f64::from(s1 - s0)
        }
        _ => r1,
    };
    Some(Chosen { slots, rate })
}

fn panel(
    scene: &mut Scene,
    curves: &[&HitCurve],
    label: &str,
    layers: &[u32],
    placement: Option<&Placement>,
    (x, top, width, height): (f64, f64, f64, f64),
) -> f64 {
    scene.bold(
        x,
        top + 12.0,
        14.0,
        Anchor::Start,
        Ink::Text,
        fit(label, 14.0, true, width),
    );
    scene.text(x, top + 32.0, 12.5, Anchor::Start, Ink::Muted, "hit rate");
    let named = layers.len() <= NAMED;
    let (x0, x1) = (x + 50.0, x + width - if named { 78.0 } else { 12.0 });
    let (y0, y1) = (top + 46.0, top + 46.0 + height - 46.0);
    for i in 0..=5 {
        let y = y1 - (y1 - y0) * f64::from(i) / 5.0;
        scene.line(
            x0,
            y,
            x1,
            y,
            1.0,
            if i == 0 { Ink::Axis } else { Ink::Grid },
        );
        scene.text(
            x0 - 6.0,
            y + 4.0,
            12.0,
            Anchor::End,
            Ink::Muted,
            format!("{} %", i * 20),
        );
    }
    let most = curves
        .iter()
        .filter_map(|c| c.slots.iter().max())
        .max()
        .copied()
        .unwrap_or(1)
        .max(1);
    let (step, _) = steps(f64::from(most), 6);
    let step = step.max(1.0).round();
    let per_slot = (x1 - x0) / f64::from(most);
    for i in 0..=(f64::from(most) / step) as usize {
        let value = i as f64 * step;
        scene.line(
            x0 + value * per_slot,
            y1,
            x0 + value * per_slot,
            y1 + 4.0,
            1.0,
            Ink::Axis,
        );
        scene.text(
            x0 + value * per_slot,
            y1 + 18.0,
            12.0,
            Anchor::Middle,
            Ink::Muted,
            tick(value, step),
        );
    }
    scene.text(
        x0,
        y1 + 36.0,
        12.5,
        Anchor::Start,
        Ink::Muted,
        "slots of the layer",
    );
    let at = |slots: u32, rate: f64| {
        (
            x0 + f64::from(slots) * per_slot,
            y1 - (y1 - y0) * rate.clamp(0.0, 1.0),
        )
    };
    let depth = |layer: u32| {
        let place = layers.iter().position(|l| *l == layer).unwrap_or(0);
        Ink::Depth((place * 8 / layers.len().max(1)) as u8)
    };
    let thin = if curves.len() > NAMED { 1.0 } else { 2.0 };
    let mut ends: Vec<(f64, u32)> = Vec::new();
    for curve in curves {
        let points: Vec<_> = curve
            .slots
            .iter()
            .zip(&curve.hit_rate)
            .map(|(s, r)| at(*s, *r))
            .collect();
        if let Some((_, y)) = points.last() {
            ends.push((*y, curve.layer));
        }
        scene.path(points, thin, depth(curve.layer));
    }
    for curve in curves {
        if let Some(c) = placement.and_then(|p| chosen(curve, p)) {
            let (px, py) = at(c.slots.min(most), c.rate);
            ring(scene, px, py, depth(curve.layer));
        }
    }
    if named {
        ends.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        for (y, (end, layer)) in spread(&ends.iter().map(|e| e.0).collect::<Vec<_>>(), 15.0, y0, y1)
            .iter()
            .zip(&ends)
        {
            scene.line(x1 + 2.0, *end, x1 + 12.0, *y, 1.0, depth(*layer));
            scene.rect(x1 + 12.0, y - 4.0, 8.0, 8.0, depth(*layer));
            scene.text(
                x1 + 24.0,
                y + 4.0,
                12.0,
                Anchor::Start,
                Ink::Text,
                format!("layer {layer}"),
            );
        }
    }
    y1 + 52.0
}

/// Moves ascending positions at least `room` apart, between `low` and `high` where that is
/// possible.
fn spread(at: &[f64], room: f64, low: f64, high: f64) -> Vec<f64> {
    let mut moved: Vec<f64> = Vec::with_capacity(at.len());
    for y in at {
        let least = moved.last().map_or(low, |last| last + room);
        moved.push(y.max(least));
    }
    let mut limit = high;
    for y in moved.iter_mut().rev() {
        *y = y.min(limit);
        limit = *y - room;
    }
    moved
}

fn title(plan: Option<&str>, points: &[f64]) -> String {
    let low = points.iter().copied().fold(f64::INFINITY, f64::min);
    let high = points.iter().copied().fold(0.0, f64::max);
    match plan {
        Some(plan) if !points.is_empty() && percent(low) == percent(high) => {
            format!(
                "A cache of {plan}'s slots would serve {} of accesses",
                percent(low)
            )
        }
        Some(plan) if !points.is_empty() => {
            format!(
                "A cache of {plan}'s slots would serve {} to {} of accesses, depending on the layer",
                percent(low),
                percent(high)
            )
        }
        _ => "How much of the accesses a cache of slots would serve".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_move_apart_and_stay_inside() {
        let moved = spread(&[10.0, 11.0, 12.0, 200.0, 200.0], 15.0, 0.0, 205.0);
        assert!(
            moved.windows(2).all(|w| w[1] - w[0] >= 15.0 - 1e-9),
            "{moved:?}"
        );
        assert!(moved[4] <= 205.0 && moved[0] >= 0.0);
    }

    #[test]
    fn the_chosen_point_lies_on_the_line() {
        let (_, placement) = crate::report::sample::small_placement(6);
        let layer = placement.layers[0].layer;
        let slots = placement.layers[0].slots;
        let curve = HitCurve {
            label: "x".into(),
            layer,
            slots: vec![0, slots * 2],
            hit_rate: vec![0.2, 0.6],
        };
        let point = chosen(&curve, &placement).expect("the layer has slots");
        assert_eq!(point.slots, slots);
        assert!((point.rate - 0.4).abs() < 1e-12);
    }
}
