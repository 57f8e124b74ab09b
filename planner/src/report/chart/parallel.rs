//! Chart: speed of all texts, and the gap between two tokens of a text, against the texts at once.

use super::{Chart, MARGIN, Sign, WIDTH, begin, legend, y_axis};
use crate::report::ink::Ink;
use crate::report::scene::{Anchor, Scene, fit};
use crate::report::table::{Table, number};
use crate::report::text::{sig3, steps};
use crate::report::view::{Overview, PlanView};
use tier_plan_runtime::formats::record::ParallelRecord;

/// Height of a panel's axis, in pixels.
const HEIGHT: f64 = 220.0;

/// Height of a plan's row: name, unit, panel, numbers of texts.
const ROW: f64 = HEIGHT + 110.0;

/// Plans drawn at most; the table has all.
const MAX_PLANS: usize = 4;

/// A plan with the steps of its newest benchmark.
struct Series<'a> {
    plan: &'a PlanView<'a>,
    steps: &'a [ParallelRecord],
}

/// Draws the chart; `None` if no record has steps of several texts.
pub(super) fn chart(o: &Overview<'_>) -> Option<Chart> {
    let all: Vec<Series<'_>> = o.plans.iter().filter_map(series).collect();
    if all.is_empty() {
        return None;
    }
    let title = title(&all);
    let (mut scene, y) = begin(
        &title,
        "Decoding speed of all texts together, and the time between two tokens of one text, by the number of texts.",
    );
    let mut signs = vec![(Sign::Dot(Ink::Measured, false), o.measured().to_string())];
    if all
        .iter()
        .flat_map(|s| s.steps)
        .any(|s| s.predicted.is_some())
    {
        signs.push((Sign::Swatch(Ink::Predicted), o.predicted().to_string()));
    }
    signs.push((
        Sign::Swatch(Ink::Axis),
        "up to the 95th percentile".to_string(),
    ));
    let mut y = legend(&mut scene, y, &signs) + 8.0;
    for series in all.iter().take(MAX_PLANS) {
        row(&mut scene, &o.label(series.plan), series.steps, y);
        y += ROW;
    }
    scene.height = y;
    let left_out = match all.len().saturating_sub(MAX_PLANS) {
        0 => String::new(),
        n => format!(" {n} more plans are in the table."),
    };
    Some(Chart {
        file: "parallel",
        title,
        how: format!(
            "One row per plan. To the left, higher is better; to the right, lower. Each text adds one token per step, so \
             the gap is the time of a step.{left_out}"
        ),
        scene,
        data: table(&all),
    })
}

fn series<'a>(plan: &'a PlanView<'a>) -> Option<Series<'a>> {
    let with_steps = plan.entry.records.iter().filter(|r| !r.parallel.is_empty());
    let newest = with_steps.max_by(|a, b| a.when.cmp(&b.when))?;
    Some(Series {
        plan,
        steps: &newest.parallel,
    })
}

/// One of a row's two panels.
struct Panel<'a> {
    x0: f64,
    x1: f64,
    top: f64,
    unit: &'a str,
    /// Measured values, by number of texts.
    measured: Vec<f64>,
    predicted: Vec<Option<f64>>,
    /// Ends of the bars above measured values.
    up_to: Option<Vec<f64>>,
}

/// Draws the two panels of a plan below `y`.
fn row(scene: &mut Scene, name: &str, steps: &[ParallelRecord], y: f64) {
    let name = fit(name, 14.0, true, WIDTH - 2.0 * MARGIN);
    scene.bold(MARGIN, y + 14.0, 14.0, Anchor::Start, Ink::Text, name);
    let middle = WIDTH / 2.0;
    let speed = Panel {
        x0: MARGIN + 90.0,
        x1: middle - 40.0,
        top: y + 40.0,
        unit: "tok/s",
        measured: steps.iter().map(|s| s.decode_tok_s).collect(),
        predicted: steps
            .iter()
            .map(|s| s.predicted.map(|p| p.decode_tok_s))
            .collect(),
        up_to: None,
    };
    let gap = Panel {
        x0: middle + 70.0,
        x1: WIDTH - MARGIN - 20.0,
        top: y + 40.0,
        unit: "ms",
        measured: steps.iter().map(|s| s.gap_s * 1e3).collect(),
        predicted: steps
            .iter()
            .map(|s| s.predicted.map(|p| p.gap_s * 1e3))
            .collect(),
        up_to: Some(steps.iter().map(|s| s.gap_p95_s * 1e3).collect()),
    };
    let texts: Vec<u32> = steps.iter().map(|s| s.texts).collect();
    draw(scene, &speed, &texts);
    draw(scene, &gap, &texts);
}

fn draw(scene: &mut Scene, panel: &Panel<'_>, texts: &[u32]) {
    let (top, bottom) = (panel.top, panel.top + HEIGHT);
    let values = panel.measured.iter().chain(panel.up_to.iter().flatten());
    let values = values.chain(panel.predicted.iter().flatten());
    let largest = values.copied().fold(0.0, f64::max);
    let axis = steps(largest, 5);
    let per_unit = y_axis(scene, panel.x0, panel.x1, top, bottom, axis, panel.unit);
    // Equal distances for equal factors; a lone number stands in the middle.
    let log = |n: u32| f64::from(n.max(1)).log2();
    let (first, last) = (
        log(texts.first().copied().unwrap_or(1)),
        log(texts.last().copied().unwrap_or(1)),
    );
    let inset = 16.0;
    let width = panel.x1 - panel.x0 - 2.0 * inset;
    let x_of = |n: u32| match last - first {
        span if span > 0.0 => panel.x0 + inset + (log(n) - first) / span * width,
        _ => (panel.x0 + panel.x1) / 2.0,
    };
    let at = |n: u32, value: f64| (x_of(n), bottom - value * per_unit);
    let mut free_from = f64::NEG_INFINITY;
    for &n in texts {
        let x = x_of(n);
        scene.line(x, bottom, x, bottom + 4.0, 1.0, Ink::Axis);
        let words = n.to_string();
        let half = crate::report::scene::text_width(&words, 12.0, false) / 2.0;
        if x - half >= free_from {
            free_from = x + half + 6.0;
            scene.text(x, bottom + 18.0, 12.0, Anchor::Middle, Ink::Muted, words);
        }
    }
    scene.text(
        panel.x0,
        bottom + 38.0,
        13.0,
        Anchor::Start,
        Ink::Muted,
        "texts at once",
    );
    let predicted: Vec<(f64, f64)> = texts
        .iter()
        .zip(&panel.predicted)
        .filter_map(|(&n, value)| Some(at(n, (*value)?)))
        .collect();
    for (&(x, y), _) in predicted.iter().zip(texts) {
        scene.rect(x - 4.0, y - 4.0, 8.0, 8.0, Ink::Predicted);
    }
    scene.path(predicted, 2.0, Ink::Predicted);
    for ((&n, &value), &end) in texts
        .iter()
        .zip(&panel.measured)
        .zip(panel.up_to.iter().flatten())
    {
        let ((x, from), (_, to)) = (at(n, value), at(n, end.max(value)));
        scene.rect(x - 1.5, to, 3.0, (from - to).max(1.0), Ink::Axis);
    }
    let measured: Vec<(f64, f64)> = texts
        .iter()
        .zip(&panel.measured)
        .map(|(&n, &value)| at(n, value))
        .collect();
    for &(x, y) in &measured {
        scene.dot(x, y, 4.0, Ink::Measured);
    }
    scene.path(measured, 2.5, Ink::Measured);
}

/// Returns the chart's numbers: one row per plan and number of texts.
fn table(all: &[Series<'_>]) -> Table {
    let mut data = Table::new(&[
        "plan",
        "texts",
        "decode_tok_s",
        "predicted_decode_tok_s",
        "gap_s",
        "gap_p95_s",
        "predicted_gap_s",
        "prompt_tok_s",
        "distinct_experts",
        "emulated",
    ]);
    for series in all {
        for s in series.steps {
            data.push([
                series.plan.name().to_string(),
                s.texts.to_string(),
                number(Some(s.decode_tok_s)),
                number(s.predicted.map(|p| p.decode_tok_s)),
                number(Some(s.gap_s)),
                number(Some(s.gap_p95_s)),
                number(s.predicted.map(|p| p.gap_s)),
                number(Some(s.prompt_tok_s)),
                number(Some(s.distinct_experts)),
                series.plan.emulated.to_string(),
            ]);
        }
    }
    data
}

fn title(all: &[Series<'_>]) -> String {
    let points = all
        .iter()
        .flat_map(|series| series.steps.iter().map(move |s| (series, s)));
    let best = points.max_by(|a, b| a.1.decode_tok_s.total_cmp(&b.1.decode_tok_s));
    let Some((series, best)) = best.filter(|(_, s)| s.decode_tok_s > 0.0) else {
        return "No text was decoded beside others".into();
    };
    let how = if series.plan.emulated {
        ", measured on emulated tiers"
    } else {
        ", measured"
    };
    let one = series.steps.iter().find(|s| s.texts == 1 && best.texts > 1);
    let times = match one.filter(|one| one.decode_tok_s > 0.0) {
        Some(one) => format!(
            ", {} × one text",
            sig3(best.decode_tok_s / one.decode_tok_s)
        ),
        None => String::new(),
    };
    format!(
        "{} decodes {} tokens/s with {} texts at once{how}{times}",
        series.plan.name(),
        sig3(best.decode_tok_s),
        best.texts
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::scene::faults;
    use crate::report::{PlanEntry, Report};
    use tier_plan_runtime::formats::record::{ParallelPrediction, RunRecord};

    /// Texts at once, their speed, and the predicted one.
    type Point = (u32, f64, Option<f64>);
    /// A plan's name and its points.
    type Points<'a> = (&'a str, &'a [Point]);

    fn report(plans: &[Points<'_>]) -> Report {
        let entry = |(name, points): &Points<'_>| {
            let step = |&(texts, tok_s, predicted): &Point| ParallelRecord {
                texts,
                prompt_tok_s: 100.0,
                decode_tok_s: tok_s,
                gap_s: f64::from(texts) / tok_s,
                gap_p95_s: 1.2 * f64::from(texts) / tok_s,
                distinct_experts: 9.5,
                predicted: predicted.map(|tok_s| ParallelPrediction {
                    decode_tok_s: tok_s,
                    gap_s: f64::from(texts) / tok_s,
                }),
                observed: None,
            };
            let record = RunRecord {
                plan: name.to_string(),
                parallel: points.iter().map(step).collect(),
                ..RunRecord::default()
            };
            PlanEntry {
                name: name.to_string(),
                placement: None,
                records: vec![record],
            }
        };
        Report {
            plans: plans.iter().map(entry).collect(),
            ..Report::default()
        }
    }

    #[test]
    fn any_numbers_of_texts_are_drawn_without_faults() {
        let dense: Vec<Point> = (1..=64)
            .map(|n| (n, f64::from(n), Some(f64::from(n) * 1.1)))
            .collect();
        let cases: [&[Points<'_>]; 4] = [
            &[("one", &[(4, 10.0, None)])],
            &[
                (
                    "a",
                    &[
                        (1, 10.0, Some(9.0)),
                        (2, 17.0, Some(18.0)),
                        (32, 80.0, Some(70.0)),
                    ],
                ),
                (
                    "a plan with a name that is long enough for any chart",
                    &[(1, 0.01, None)],
                ),
                ("c", &[(1, 1e6, None), (1000, 1e8, Some(1e8))]),
                ("d", &[(1, 3.0, None)]),
                ("e", &[(7, 3.0, None)]),
            ],
            &[("dense", &dense)],
            &[("slow", &[(1, 1e-6, Some(1e-6)), (2, 2e-6, None)])],
        ];
        for plans in cases {
            let report = report(plans);
            let chart = chart(&Overview::new(&report)).expect("a chart");
            assert_eq!(
                faults(&chart.scene),
                Vec::<String>::new(),
                "{}",
                chart.title
            );
            let rows: usize = plans.iter().map(|(_, points)| points.len()).sum();
            assert_eq!(chart.data.rows.len(), rows);
            assert!(chart.scene.svg(&chart.title).is_ok());
        }
        let report = report(cases[1]);
        let title = chart(&Overview::new(&report)).expect("a chart").title;
        assert_eq!(
            title,
            "c decodes 100000000 tokens/s with 1000 texts at once, measured, 100 × one text"
        );
    }

    #[test]
    fn records_of_one_text_have_no_chart() {
        let report = report(&[("a", &[])]);
        assert!(chart(&Overview::new(&report)).is_none());
    }
}
