//! Chart: predicted against measured speed, for every run that the reports beside this one have
//! kept.

use super::{Chart, MARGIN, Sign, WIDTH, begin, legend};
use crate::report::PastRun;
use crate::report::ink::Ink;
use crate::report::scene::{Anchor, Scene};
use crate::report::table::{Table, number};
use crate::report::text::{signed_percent, steps, tick};
use crate::report::view::Overview;

/// Accepted relative deviation of a prediction.
const BAND: f64 = 0.10;

/// Side of the panel of speeds, in pixels.
const SIDE: f64 = 440.0;

/// Largest relative error that is drawn to scale; larger ones are drawn at the edge.
const WORST: f64 = 1.0;

pub(super) fn chart(o: &Overview<'_>) -> Option<Chart> {
    let runs: Vec<&PastRun> = o.report.history.iter().filter(|r| r.is_sound()).collect();
    if runs.len() < 2 {
        return None;
    }
    let title = title(&runs);
    let subtitle = "Each dot is a run: its predicted and its measured decoding speed in tokens per second. On the dark \
                    line both are the same; between the two thin ones they are 10 % apart or less.";
    let (mut scene, y) = begin(&title, subtitle);
    let mut signs = Vec::new();
    let has = |of: &dyn Fn(&PastRun) -> bool| runs.iter().any(|r| of(r));
    for (now, real, words) in [
        (true, true, "measured for this report"),
        (true, false, "for this report, on emulated tiers"),
        (false, true, "measured before"),
        (false, false, "before, on emulated tiers"),
    ] {
        if has(&|r| (r.is_new, !r.emulated) == (now, real)) {
            signs.push((Sign::Dot(ink(now), !real), words.to_string()));
        }
    }
    let top = legend(&mut scene, y, &signs) + 26.0;
    let bottom = top + SIDE;
    speeds(&mut scene, &runs, MARGIN + 60.0, top, bottom);
    errors(
        &mut scene,
        &runs,
        MARGIN + 60.0 + SIDE + 90.0,
        WIDTH - MARGIN,
        top,
        bottom,
    );
    scene.height = bottom + 56.0;
    Some(Chart {
        file: "history",
        title,
        how:
            "A dot above the line is a run that was faster than predicted. The dots on the right are the same runs in \
              the order of time; how far one lies above 0 is how much faster it was."
                .into(),
        scene,
        data: data(&runs),
    })
}

fn ink(is_new: bool) -> Ink {
    if is_new {
        Ink::Measured
    } else {
        Ink::Predicted
    }
}

/// Draws a full dot, or a ring where tiers were emulated.
fn dot(scene: &mut Scene, x: f64, y: f64, run: &PastRun) {
    scene.dot(x, y, 5.0, Ink::Paper);
    scene.dot(x, y, 4.0, ink(run.is_new));
    if run.emulated {
        scene.dot(x, y, 2.2, Ink::Paper);
    }
}

/// Sorts runs by time, so that later ones are drawn on top.
fn in_order<'a>(runs: &[&'a PastRun]) -> Vec<&'a PastRun> {
    let mut sorted = runs.to_vec();
    sorted.sort_by(|a, b| (a.is_new, &a.when).cmp(&(b.is_new, &b.when)));
    sorted
}

/// Draws both speeds on logarithmic axes of one range.
fn speeds(scene: &mut Scene, runs: &[&PastRun], x0: f64, top: f64, bottom: f64) {
    let all = || {
        runs.iter()
            .flat_map(|r| [r.predicted_tok_s, r.measured_tok_s])
    };
    let (low, high) = (
        all().fold(f64::INFINITY, f64::min) / 1.25,
        all().fold(0.0, f64::max) * 1.25,
    );
    // The range covers a little more than a factor of two, so that a number stands on the axis.
    let (low, high) = if high / low < 3.0 {
        (low / 1.3, high * 1.3)
    } else {
        (low, high)
    };
    let at = |tok_s: f64| (tok_s / low).ln() / (high / low).ln() * SIDE;
    let x1 = x0 + SIDE;
    scene.bold(
        x0,
        top - 10.0,
        14.0,
        Anchor::Start,
        Ink::Text,
        "measured tok/s against predicted tok/s",
    );
    for value in round_numbers(low, high) {
        let d = at(value);
        scene.line(x0 + d, top, x0 + d, bottom, 1.0, Ink::Grid);
        scene.line(x0, bottom - d, x1, bottom - d, 1.0, Ink::Grid);
        scene.text(
            x0 + d,
            bottom + 16.0,
            12.0,
            Anchor::Middle,
            Ink::Muted,
            short(value),
        );
        scene.text(
            x0 - 6.0,
            bottom - d + 4.0,
            12.0,
            Anchor::End,
            Ink::Muted,
            short(value),
        );
    }
    scene.line(x0, bottom, x1, bottom, 1.0, Ink::Axis);
    scene.line(x0, top, x0, bottom, 1.0, Ink::Axis);
    scene.line(x0, bottom, x1, top, 1.5, Ink::Text);
    let apart = (1.0 + BAND).ln() / (high / low).ln() * SIDE;
    scene.line(x0, bottom - apart, x1 - apart, top, 1.0, Ink::Axis);
    let below = -(1.0 - BAND).ln() / (high / low).ln() * SIDE;
    scene.line(x0 + below, bottom, x1, top + below, 1.0, Ink::Axis);
    for run in in_order(runs) {
        dot(
            scene,
            x0 + at(run.predicted_tok_s),
            bottom - at(run.measured_tok_s),
            run,
        );
    }
    scene.text(
        x0,
        bottom + 38.0,
        13.0,
        Anchor::Start,
        Ink::Muted,
        "predicted tok/s (logarithmic, both axes)",
    );
}

/// Draws how far each run was from its prediction, in the order of time.
fn errors(scene: &mut Scene, runs: &[&PastRun], x0: f64, x1: f64, top: f64, bottom: f64) {
    let worst = runs
        .iter()
        .map(|r| r.error().abs().min(WORST))
        .fold(1.5 * BAND, f64::max);
    let (step, last) = steps(worst * 100.0, 3);
    let middle = (top + bottom) / 2.0;
    let per_percent = (bottom - top) / 2.0 / last;
    scene.bold(
        x0 - 34.0,
        top - 10.0,
        14.0,
        Anchor::Start,
        Ink::Text,
        "measured vs predicted, run by run",
    );
    let band = BAND * 100.0 * per_percent;
    scene.rect(x0, middle - band, x1 - x0, 2.0 * band, Ink::Grid);
    let count = (last / step).round() as i32;
    for i in -count..=count {
        let value = f64::from(i) * step;
        let y = middle - value * per_percent;
        scene.line(
            x0,
            y,
            x1,
            y,
            1.0,
            if i == 0 { Ink::Text } else { Ink::Grid },
        );
        let sign = if value > 0.0 { "+" } else { "" };
        let number = format!("{sign}{} %", tick(value, step));
        scene.text(x0 - 6.0, y + 4.0, 12.0, Anchor::End, Ink::Muted, number);
    }
    let sorted = in_order(runs);
    let spacing = (x1 - x0 - 16.0) / sorted.len().max(2) as f64;
    for (i, run) in sorted.iter().enumerate() {
        let error = run.error().clamp(-last / 100.0, last / 100.0);
        dot(
            scene,
            x0 + 8.0 + (i as f64 + 0.5) * spacing,
            middle - error * 100.0 * per_percent,
            run,
        );
    }
    let days =
        |run: Option<&&PastRun>| run.map_or(String::new(), |r| r.when.chars().take(10).collect());
    let (first, newest) = (days(sorted.first()), days(sorted.last()));
    let span = if first == newest {
        first
    } else {
        format!("{first} to {newest}")
    };
    scene.text(
        x0,
        bottom + 38.0,
        13.0,
        Anchor::Start,
        Ink::Muted,
        format!("{} runs, {span}", runs.len()),
    );
}

/// Returns round numbers in a range for a logarithmic axis: as few per power of ten as make four.
fn round_numbers(low: f64, high: f64) -> Vec<f64> {
    const OF_A_POWER: [&[f64]; 4] = [
        &[1.0],
        &[1.0, 3.0],
        &[1.0, 2.0, 5.0],
        &[1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
    ];
    let (from, to) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let every = ((to - from) / 12 + 1) as usize;
    let numbers = |of: &[f64]| -> Vec<f64> {
        let powers = (from..=to)
            .step_by(every)
            .flat_map(|power| of.iter().map(move |m| m * 10f64.powi(power)));
        powers.filter(|v| (low..=high).contains(v)).collect()
    };
    let all = OF_A_POWER.map(numbers);
    let found = all.iter().find(|found| found.len() >= 4).or(all.last());
    found.cloned().unwrap_or_default()
}

/// Formats a round number without trailing zeros.
fn short(value: f64) -> String {
    if (0.001..1e6).contains(&value) {
        format!("{}", (value * 1e6).round() / 1e6)
    } else {
        format!("{value:.0e}")
    }
}

fn title(runs: &[&PastRun]) -> String {
    let within = runs.iter().filter(|r| r.error().abs() <= BAND).count();
    let worst = runs
        .iter()
        .map(|r| r.error())
        .max_by(|a, b| a.abs().total_cmp(&b.abs()))
        .unwrap_or(0.0);
    let how = match (
        runs.iter().all(|r| r.emulated),
        runs.iter().any(|r| r.emulated),
    ) {
        (true, _) => ", all on emulated tiers,",
        (false, true) => ", some on emulated tiers,",
        (false, false) => "",
    };
    format!(
        "{within} of {} runs{how} were predicted to 10 % or better; the worst is {}",
        runs.len(),
        signed_percent(worst)
    )
}

fn data(runs: &[&PastRun]) -> Table {
    let mut head = vec![
        "when",
        "report",
        "plan",
        "model",
        "machine",
        "emulated",
        "predicted_decode_tok_s",
        "decode_tok_s",
        "prediction_error",
    ];
    let is_observed = runs.iter().any(|run| run.observed_tok_s.is_some());
    if is_observed {
        head.extend(["observed_decode_tok_s", "observed_error"]);
    }
    let mut data = Table::new(&head);
    for run in in_order(runs) {
        let mut row = vec![
            run.when.clone(),
            run.report.clone(),
            run.plan.clone(),
            run.model.clone(),
            run.machine.clone(),
            run.emulated.to_string(),
            number(Some(run.predicted_tok_s)),
            number(Some(run.measured_tok_s)),
            number(Some(run.error())),
        ];
        if is_observed {
            row.push(number(run.observed_tok_s));
            row.push(number(Some(run.observed_error())));
        }
        data.push(row);
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Report;
    use crate::report::scene::faults;

    fn runs(pairs: &[(f64, f64)]) -> Vec<PastRun> {
        let run = |(i, &(predicted_tok_s, measured_tok_s)): (usize, &(f64, f64))| PastRun {
            report: "2026-11-22".into(),
            plan: "ilp".into(),
            model: "m".into(),
            machine: "here".into(),
            when: format!("2026-11-{:02}T10:00:00Z", 1 + i % 28),
            emulated: i % 3 == 0,
            is_new: i % 2 == 0,
            predicted_tok_s,
            measured_tok_s,
            observed_tok_s: (i % 5 == 0).then_some(measured_tok_s),
        };
        pairs.iter().enumerate().map(run).collect()
    }

    #[test]
    fn any_history_is_drawn_without_faults() {
        let many: Vec<(f64, f64)> = (1..400)
            .map(|i| {
                (
                    f64::from(i) * 0.7,
                    f64::from(i) * 0.7 * (0.7 + f64::from(i * 37 % 60) / 100.0),
                )
            })
            .collect();
        for pairs in [
            vec![(10.0, 9.5), (20.0, 25.0)],
            vec![(10.0, 10.0), (10.0, 10.0)],
            vec![(0.001, 0.002), (5000.0, 4900.0), (1e-3, 1.0)],
            vec![(0.0011, 0.0012), (0.0013, 0.0014)],
            vec![(11000.0, 12500.0), (180.0, 200.0)],
            vec![(176.0, 177.0), (309.0, 309.0)],
            vec![(1e-9, 1e9), (1e9, 1e-9)],
            many,
        ] {
            let report = Report {
                history: runs(&pairs),
                ..Report::default()
            };
            let overview = Overview::new(&report);
            let chart = chart(&overview).unwrap();
            assert_eq!(faults(&chart.scene), Vec::<String>::new(), "{pairs:?}");
            assert_eq!(chart.data.rows.len(), pairs.len());
            assert!(chart.scene.svg(&chart.title).is_ok());
        }
    }

    #[test]
    fn the_title_counts_what_is_within_the_band() {
        let report = Report {
            history: runs(&[
                (10.0, 9.5),
                (10.0, 10.9),
                (10.0, 15.0),
                (10.0, 0.0),
                (f64::NAN, 1.0),
            ]),
            ..Report::default()
        };
        let chart = chart(&Overview::new(&report)).unwrap();
        let words = "2 of 3 runs, some on emulated tiers, were predicted to 10 % or better; the worst is +50\u{a0}%";
        assert_eq!(chart.title, words);
        let alone = Report {
            history: runs(&[(10.0, 9.5)]),
            ..Report::default()
        };
        assert!(super::chart(&Overview::new(&alone)).is_none());
    }
}
