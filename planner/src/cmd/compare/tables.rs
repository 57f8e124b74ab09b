//! Tables and sentences of a comparison on a terminal.

use crate::conditions::describe;
use crate::printable::printable;
use crate::report::PlanEntry;
use tier_plan_runtime::formats::record::ParallelPrediction;

/// Part by which a prediction may differ and still counts as right.
const WITHIN: f64 = 0.1;

/// Returns decoded tokens per second over all records of a plan.
fn measured_tok_s(entry: &PlanEntry) -> Option<f64> {
    let tokens: u64 = entry.records.iter().map(|r| r.decode_tokens).sum();
    let seconds: f64 = entry.records.iter().map(|r| r.decode_s).sum();
    (seconds > 0.0).then(|| tokens as f64 / seconds)
}

fn predicted_tok_s(entry: &PlanEntry) -> Option<f64> {
    let predicted = entry
        .records
        .iter()
        .find_map(|r| r.predicted.as_ref())
        .map(|p| p.decode_tok_s);
    predicted
        .or_else(|| entry.placement.as_ref().map(|p| p.predicted.decode_tok_s))
        .filter(|t| *t > 0.0)
}

/// Prints the steps of several texts that benchmarks recorded, if there are any.
fn parallel_table(plans: &[PlanEntry]) {
    let records = plans
        .iter()
        .flat_map(|p| p.records.iter().map(move |r| (p, r)));
    let steps: Vec<_> = records
        .flat_map(|(p, r)| r.parallel.iter().map(move |steps| (p, steps)))
        .collect();
    if steps.is_empty() {
        return;
    }
    println!(
        "{:<20} {:>6} {:>16} {:>16} {:>8} {:>16} {:>8}",
        "several texts at once",
        "texts",
        "measured tok/s",
        "predicted tok/s",
        "differs",
        "with its rates",
        "differs"
    );
    for (entry, steps) in steps {
        let measured = steps.decode_tok_s;
        let cells = |predicted: Option<ParallelPrediction>| {
            let tok_s = predicted
                .map(|p| p.decode_tok_s)
                .filter(|tok_s| *tok_s > 0.0);
            let off = |tok_s: f64| format!("{:+.1}%", (measured / tok_s - 1.0) * 100.0);
            let shown = tok_s.map_or("-".to_string(), |tok_s| format!("{tok_s:.1}"));
            (shown, tok_s.map_or("-".to_string(), off))
        };
        let (planned, now) = (
            cells(steps.predicted),
            cells(steps.observed.or(steps.predicted)),
        );
        println!(
            "{:<20} {:>6} {measured:>16.1} {:>16} {:>8} {:>16} {:>8}",
            printable(&entry.name),
            steps.texts,
            planned.0,
            planned.1,
            now.0,
            now.1
        );
    }
}

/// A predicted speed beside the measured one.
struct Pair {
    measured: f64,
    planned: f64,
    /// Predicted with the rates of the runs.
    observed: f64,
}

/// Says how many predictions of plans were right, those of several texts at once included; `None`
/// for fewer than two.
pub(super) fn within_line(plans: &[PlanEntry]) -> Option<String> {
    let alone = plans.iter().filter_map(|entry| {
        let planned = predicted_tok_s(entry)?;
        Some(Pair {
            measured: measured_tok_s(entry)?,
            planned,
            observed: entry.observed_tok_s().unwrap_or(planned),
        })
    });
    let steps = plans
        .iter()
        .flat_map(|entry| &entry.records)
        .flat_map(|record| &record.parallel);
    let together = steps.filter_map(|steps| {
        let planned = steps.predicted?;
        Some(Pair {
            measured: steps.decode_tok_s,
            planned: planned.decode_tok_s,
            observed: steps.observed.unwrap_or(planned).decode_tok_s,
        })
    });
    let is_sound = |p: &Pair| [p.measured, p.planned, p.observed].iter().all(|v| *v > 0.0);
    let pairs: Vec<Pair> = alone.chain(together).filter(is_sound).collect();
    let within = |of: &dyn Fn(&Pair) -> f64| {
        let near = |pair: &&Pair| (pair.measured / of(pair) - 1.0).abs() <= WITHIN;
        pairs.iter().filter(near).count()
    };
    let differ = pairs.iter().any(|pair| pair.planned != pair.observed);
    let observed = differ.then(|| {
        format!(
            ", and {} with the rates that their runs had",
            within(&|pair| pair.observed)
        )
    });
    (pairs.len() > 1).then(|| {
        format!(
            "{} of {} predictions were right to 10 %{}",
            within(&|pair| pair.planned),
            pairs.len(),
            observed.unwrap_or_default()
        )
    })
}

/// Prints the predictions with the rates that the runs had, where those were not as planned.
fn observed_table(plans: &[PlanEntry]) {
    println!("runs whose machine gave other rates than their plans count on:");
    println!(
        "{:<20} {:>16} {:>16} {:>8}  what differed in the first of them",
        "plan", "measured tok/s", "with its rates", "differs"
    );
    for entry in plans {
        let (Some(now), Some(measured)) = (entry.observed_tok_s(), measured_tok_s(entry)) else {
            continue;
        };
        let first = entry.records.iter().find_map(|r| r.conditions.as_ref());
        println!(
            "{:<20} {measured:>16.1} {now:>16.1} {:>8}  {}",
            printable(&entry.name),
            format!("{:+.1}%", (measured / now - 1.0) * 100.0),
            first.map_or(String::new(), describe)
        );
    }
}

fn hit_rate(entry: &PlanEntry) -> Option<f64> {
    let layers = || entry.records.iter().flat_map(|r| &r.layers);
    let misses: u64 = layers().map(|l| l.misses).sum();
    let all: u64 = layers()
        .map(|l| l.pinned_hits + l.slot_hits + l.misses)
        .sum();
    (all > 0).then(|| 1.0 - misses as f64 / all as f64)
}

/// Prints the plans, fastest first.
pub(super) fn table(plans: &[PlanEntry]) {
    let emulated = plans.iter().any(|p| p.records.iter().any(|r| r.emulated));
    let mut sorted: Vec<&PlanEntry> = plans.iter().collect();
    sorted.sort_by(|a, b| {
        measured_tok_s(b)
            .unwrap_or(0.0)
            .total_cmp(&measured_tok_s(a).unwrap_or(0.0))
    });
    println!(
        "{:<20} {:>16} {:>16} {:>8} {:>10}",
        "plan", "measured tok/s", "predicted tok/s", "differs", "hit rate"
    );
    let show = |value: Option<f64>| value.map_or("-".to_string(), |v| format!("{v:.1}"));
    for entry in sorted {
        let (measured, predicted) = (measured_tok_s(entry), predicted_tok_s(entry));
        let differs = measured
            .zip(predicted)
            .map(|(m, p)| format!("{:+.1}%", (m / p - 1.0) * 100.0));
        println!(
            "{:<20} {:>16} {:>16} {:>8} {:>10}",
            printable(&entry.name),
            show(measured),
            show(predicted),
            differs.unwrap_or_else(|| "-".into()),
            hit_rate(entry).map_or("-".into(), |h| format!("{:.1}%", h * 100.0))
        );
    }
    parallel_table(plans);
    if plans.iter().any(|p| p.observed_tok_s().is_some()) {
        observed_table(plans);
    }
    if emulated {
        println!("(measured on emulated tiers: their rates are declared, not this machine's)");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_runtime::formats::placement::Prediction;
    use tier_plan_runtime::formats::record::{Conditions, ParallelRecord, RunRecord};

    fn predicted(decode_tok_s: f64) -> Prediction {
        Prediction {
            decode_tok_s,
            ..Prediction::default()
        }
    }

    /// A plan whose run decoded 10 tok/s.
    fn entry(planned: f64, observed: Option<f64>) -> PlanEntry {
        let record = RunRecord {
            decode_tokens: 20,
            decode_s: 2.0,
            predicted: Some(predicted(planned)),
            conditions: observed.map(|tok_s| Conditions {
                predicted: Some(predicted(tok_s)),
                ..Conditions::default()
            }),
            ..RunRecord::default()
        };
        PlanEntry {
            records: vec![record],
            ..PlanEntry::default()
        }
    }

    #[test]
    fn predictions_within_a_tenth_are_counted() {
        let line = |plans: &[PlanEntry]| within_line(plans);
        assert_eq!(line(&[entry(10.0, None)]), None);
        let quiet = [entry(10.5, None), entry(20.0, None)];
        assert_eq!(
            line(&quiet).unwrap(),
            "1 of 2 predictions were right to 10 %"
        );
        let mut plans = vec![
            entry(10.5, None),
            entry(20.0, Some(9.5)),
            entry(30.0, Some(20.0)),
        ];
        let of = |decode_tok_s| {
            Some(ParallelPrediction {
                decode_tok_s,
                gap_s: 0.1,
            })
        };
        let steps = |texts, predicted, observed| ParallelRecord {
            texts,
            decode_tok_s: 40.0,
            predicted,
            observed,
            ..ParallelRecord::default()
        };
        plans.push(PlanEntry {
            records: vec![RunRecord {
                parallel: vec![
                    steps(2, of(41.0), None),
                    steps(4, of(50.0), of(41.0)),
                    steps(8, None, None),
                ],
                ..RunRecord::default()
            }],
            ..PlanEntry::default()
        });
        assert_eq!(
            line(&plans).unwrap(),
            "2 of 5 predictions were right to 10 %, and 4 with the rates that their runs had"
        );
        assert_eq!(plans[1].observed_tok_s(), Some(9.5));
        assert_eq!(plans[0].observed_tok_s(), None);
    }
}
