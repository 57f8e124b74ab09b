//! Chart: predicted speed against the size of a tier.

use super::{Chart, MARGIN, Sign, WIDTH, begin, legend, ring, y_axis};
use crate::report::Curve;
use crate::report::ink::Ink;
use crate::report::scene::Anchor;
use crate::report::table::{Table, number};
use crate::report::text::{byte_unit, sig3, steps, tick};

const HEIGHT: f64 = 360.0;

/// Lays out the chart of a sweep.
pub(in crate::report) fn chart(curve: &Curve) -> Chart {
    let fit: Vec<(usize, f64, [f64; 3])> = curve
        .points
        .iter()
        .enumerate()
        .filter_map(|(at, (bytes, s))| Some((at, *bytes as f64, (*s)?)))
        .collect();
    let largest = curve.points.iter().map(|p| p.0).max().unwrap_or(1).max(1);
    let (unit, scale) = byte_unit(largest);
    let knee = curve.knee.and_then(|knee| fit.iter().find(|p| p.0 == knee));
    let title = match (knee, fit.first(), fit.last()) {
        (Some(knee), ..) => format!(
            "{} of {} bring {} tokens per second, predicted; more brings less",
            size(knee.1, unit, scale),
            curve.tier,
            sig3(knee.2[0])
        ),
        (None, Some(first), Some(last)) if fit.len() > 1 => format!(
            "From {} to {} of {}: {} to {} tokens per second, predicted",
            size(first.1, unit, scale),
            size(last.1, unit, scale),
            curve.tier,
            sig3(first.2[0]),
            sig3(last.2[0])
        ),
        _ => format!("No size of {} that was tried holds the model", curve.tier),
    };
    let emulated = if curve.emulated {
        " Tiers are emulated: their rates are declared."
    } else {
        ""
    };
    let how = format!(
        "Predicted decoding speed of {} on {}. The line is for the middle of the kinds of routing, the bars reach from the \
         slowest to the fastest.{emulated}",
        curve.model, curve.machine
    );
    let (mut scene, y) = begin(&title, &how);
    let mut signs = vec![(Sign::Swatch(Ink::Predicted), "predicted".to_string())];
    if knee.is_some() {
        signs.push((Sign::Ring, "knee: the bend of the line".to_string()));
    }
    let y = legend(&mut scene, y, &signs) + 10.0;
    let (x0, x1) = (MARGIN + 70.0, WIDTH - MARGIN - 30.0);
    let (top, bottom) = (y + 10.0, y + HEIGHT);
    let fastest = fit.iter().map(|p| p.2[2]).fold(0.0, f64::max);
    let axis = steps(fastest, 6);
    let per_unit = y_axis(&mut scene, x0, x1, top, bottom, axis, "tok/s");
    let (step, last) = steps(largest as f64 / scale, 8);
    let at = |bytes: f64, speed: f64| {
        (
            x0 + bytes / scale / last * (x1 - x0),
            bottom - speed * per_unit,
        )
    };
    for i in 0..=(last / step).round() as usize {
        let value = i as f64 * step;
        let x = x0 + value / last * (x1 - x0);
        scene.line(x, bottom, x, bottom + 4.0, 1.0, Ink::Axis);
        scene.text(
            x,
            bottom + 18.0,
            12.0,
            Anchor::Middle,
            Ink::Muted,
            tick(value, step),
        );
    }
    scene.text(
        x0,
        bottom + 38.0,
        13.0,
        Anchor::Start,
        Ink::Muted,
        format!("{} in {unit}", curve.tier),
    );
    for (_, bytes, [_, low, high]) in &fit {
        let ((x, y0), (_, y1)) = (at(*bytes, *low), at(*bytes, *high));
        scene.rect(x - 2.0, y1, 4.0, (y0 - y1).max(1.0), Ink::Axis);
    }
    scene.path(
        fit.iter().map(|(_, bytes, s)| at(*bytes, s[0])).collect(),
        2.5,
        Ink::Predicted,
    );
    for (_, bytes, [speed, ..]) in &fit {
        let (x, y) = at(*bytes, *speed);
        scene.dot(x, y, 4.0, Ink::Predicted);
    }
    if let Some((_, bytes, [speed, ..])) = knee {
        let (x, y) = at(*bytes, *speed);
        ring(&mut scene, x, y, Ink::Predicted);
    }
    scene.height = bottom + 56.0;
    let mut data = Table::new(&[
        "tier",
        "bytes",
        "decode_tok_s",
        "decode_tok_s_low",
        "decode_tok_s_high",
        "knee",
        "predicted",
    ]);
    for (i, (bytes, speeds)) in curve.points.iter().enumerate() {
        let speed = |n: usize| number(speeds.map(|s| s[n]));
        let knee = (curve.knee == Some(i)).to_string();
        data.push([
            curve.tier.clone(),
            bytes.to_string(),
            speed(0),
            speed(1),
            speed(2),
            knee,
            "true".to_string(),
        ]);
    }
    Chart {
        file: "sweep",
        title,
        how,
        scene,
        data,
    }
}

fn size(bytes: f64, unit: &str, scale: f64) -> String {
    format!("{} {unit}", sig3(bytes / scale))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::scene::faults;

    fn curve(speeds: &[Option<f64>], knee: Option<usize>) -> Curve {
        Curve {
            model: "kimi-k2.5 at q4_k_m, a shape without weights".into(),
            machine: "optane-768".into(),
            tier: "dram".into(),
            emulated: true,
            points: speeds
                .iter()
                .enumerate()
                .map(|(i, s)| ((i as u64 + 1) << 36, s.map(|s| [s, s * 0.8, s * 1.4])))
                .collect(),
            knee,
        }
    }

    #[test]
    fn any_sweep_is_drawn_without_faults() {
        for (speeds, knee, words) in [
            (
                vec![None, Some(1.0), Some(2.0), Some(2.1)],
                Some(2),
                "192 GiB of dram bring 2.00 tokens per second, predicted",
            ),
            (
                vec![Some(1.0), Some(2.0)],
                None,
                "From 64.0 GiB to 128 GiB of dram: 1.00 to 2.00",
            ),
            (vec![None, None], None, "No size of dram"),
            (
                (0..64).map(|i| Some(f64::from(i) * 1e3)).collect(),
                None,
                "tokens per second",
            ),
            (vec![Some(0.001)], None, "No size"),
        ] {
            let chart = chart(&curve(&speeds, knee));
            assert!(chart.title.contains(words), "{}", chart.title);
            assert_eq!(faults(&chart.scene), Vec::<String>::new());
            assert_eq!(chart.data.rows.len(), speeds.len());
            assert!(chart.how.contains("Predicted") && chart.how.contains("emulated"));
            assert!(chart.scene.svg(&chart.title).is_ok());
        }
    }
}
