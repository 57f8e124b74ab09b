//! Fits a machine's rates and fixed times to measured runs, by regularized least squares.
//!
//! A run's record says how long its dense stages and its expert stages took, and how many bytes of
//! each tier it read. Its plan said what they should take. That gives two equations per run, in
//! units of the run's own time per token, so that fast and slow runs count alike:
//!
//! - all but the expert stages: `layers · l + t + Σ f(tier) · dense(tier) + f(cache) · kv`;
//! - the expert stages: `overlap · Σ f(tier) · experts(tier)`. Here `experts` is the prediction,
//!   corrected for the bytes that the run really read, so that a text with other experts is no
//!   error of a rate. `overlap` is the predicted ratio of the longest paths to the sum of all.
//!
//! A run that streamed experts gives only the first equation. What its expert stages took follows
//! from the rate of a link and from what the CPU keeps beside transfers, which are not fitted. So
//! their time is taken as measured.
//!
//! The unknowns are the two fixed times and a factor on the time of each tier. The fit is
//! regularized towards the machine file (ridge regression), which decides what the runs leave
//! undetermined. A tier that no run read stays as it was, and with one model the fixed times of
//! layers and tokens move together. Leave-one-out cross-validation chooses the strength from
//! [`PULLS`], up to one that leaves the file as it is. So a few noisy runs cannot make the file
//! worse where they say nothing.

use anyhow::{Result, bail, ensure};
use tier_plan_runtime::formats::machine::{Calibration, Machine, TierKind};
use tier_plan_runtime::formats::placement::Prediction;
use tier_plan_runtime::formats::record::RunRecord;

/// Strengths of the regularization. A change of a parameter by one unit costs as much as an error
/// of this share of one run's token. The unit of a factor is 1, that of a fixed time is the file's
/// value, or [`FIXED_S`] if that is more. The last strength changes nothing.
const PULLS: [f64; 6] = [0.01, 0.03, 0.1, 0.3, 1.0, f64::INFINITY];

/// Strength where there are too few runs for cross-validation.
const DEFAULT_PULL: f64 = 0.1;

/// Runs from which on each is predicted from the others.
const MIN_RUNS_TO_CROSS_VALIDATE: usize = 3;

/// Least and greatest factor on a tier's time. Beyond, the cause is not a misjudged rate.
const FACTOR_RANGE: [f64; 2] = [0.1, 10.0];

/// Plausible errors of the fixed times of a layer and of a token, in seconds.
const FIXED_S: [f64; 2] = [100e-6, 500e-6];

/// One run beside the model's times for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Measured seconds per token.
    pub measured_s: f64,
    /// Seconds per token that the plan predicted.
    pub predicted_s: f64,
    /// Seconds by the file's parameters, with the bytes that were read.
    pub before_s: f64,
    /// Seconds by the fitted parameters.
    pub after_s: f64,
    /// Seconds by parameters fitted to all other runs, where there are three or more.
    pub left_out_s: Option<f64>,
}

/// Parameters fitted to some runs, with what they make of each.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// `[tiers]` factors on each tier's time.
    pub factors: Vec<f64>,
    /// Fixed time of a layer, in seconds.
    pub layer_s: f64,
    /// Fixed time of a token, in seconds.
    pub token_s: f64,
    /// Strength of the regularization; infinite where nothing was changed.
    pub pull: f64,
    /// One row per record.
    pub rows: Vec<Row>,
}

/// The two equations of one run.
struct Run {
    measured_s: f64,
    predicted_s: f64,
    /// `[2][tiers + 2]` coefficients of the two equations, in seconds: layer, token, tiers.
    of: [Vec<f64>; 2],
    /// `[2]` measured seconds of the two equations.
    took: [f64; 2],
    /// Seconds of the expert stages where they are taken as measured and have no equation, else 0.
    given_s: f64,
}

impl Run {
    fn seconds(&self, parameters: &[f64]) -> f64 {
        let of_equations: f64 = self.of.iter().map(|row| dot(row, parameters)).sum();
        of_equations + self.given_s
    }
}

impl Fit {
    /// Fits a machine to runs of plans that were made for it.
    ///
    /// # Errors
    /// Fails if a record is of another machine or of emulated tiers, has no prediction, or measured
    /// nothing.
    pub fn new(machine: &Machine, records: &[(String, RunRecord)]) -> Result<Fit> {
        ensure!(
            !records.is_empty(),
            "no run records; `tier-plan run --plan PLAN --record FILE` writes one"
        );
        let runs = records
            .iter()
            .map(|(name, r)| run(machine, name, r))
            .collect::<Result<Vec<_>>>()?;
        let start = start(machine);
        let all: Vec<&Run> = runs.iter().collect();
        let without = |out: usize, pull: f64| {
            let rest: Vec<&Run> = runs
                .iter()
                .enumerate()
                .filter(|(at, _)| *at != out)
                .map(|(_, run)| run)
                .collect();
            runs[out].seconds(&least_squares(&rest, &start, pull))
        };
        let missed = |pull: f64| -> f64 {
            let off = |(at, run): (usize, &Run)| (without(at, pull) / run.measured_s - 1.0).abs();
            runs.iter().enumerate().map(off).sum()
        };
        let pull = match runs.len() {
            ..MIN_RUNS_TO_CROSS_VALIDATE => DEFAULT_PULL,
            _ => PULLS
                .into_iter()
                .min_by(|&a, &b| missed(a).total_cmp(&missed(b)))
                .unwrap_or(DEFAULT_PULL),
        };
        let found = least_squares(&all, &start, pull);
        let row = |(at, run): (usize, &Run)| Row {
            measured_s: run.measured_s,
            predicted_s: run.predicted_s,
            before_s: run.seconds(&start),
            after_s: run.seconds(&found),
            left_out_s: (runs.len() >= MIN_RUNS_TO_CROSS_VALIDATE).then(|| without(at, pull)),
        };
        let rows = runs.iter().enumerate().map(row).collect();
        Ok(Fit {
            layer_s: found[0],
            token_s: found[1],
            factors: found[2..].to_vec(),
            pull,
            rows,
        })
    }

    /// Returns the mean relative error of one of a row's times.
    pub fn error(&self, of: impl Fn(&Row) -> Option<f64>) -> Option<f64> {
        let errors: Option<Vec<f64>> = self
            .rows
            .iter()
            .map(|row| Some((of(row)? - row.measured_s).abs() / row.measured_s))
            .collect();
        let errors = errors.filter(|e| !e.is_empty())?;
        Some(errors.iter().sum::<f64>() / errors.len() as f64)
    }

    /// Returns the fitted machine; `when` is the moment, in UTC.
    pub fn machine(&self, machine: &Machine, when: &str) -> Machine {
        let mut fitted = machine.clone();
        fitted.layer_overhead_us = rounded(self.layer_s * 1e6);
        fitted.token_overhead_us = rounded(self.token_s * 1e6);
        for (tier, factor) in fitted.tiers.iter_mut().zip(&self.factors) {
            // A tier that no run read stays as it was.
            if (factor - 1.0).abs() > 1e-6 {
                let was = tier.read_gbps;
                tier.read_gbps = rounded(was / factor);
                tier.source = format!(
                    "fitted to {} runs from {was} GB/s; {}",
                    self.rows.len(),
                    tier.source
                );
            }
        }
        // What the CPU has beside transfers stays the same part of its rate.
        let memory = fitted.tiers.iter().zip(&self.factors);
        let mut memory = memory.filter(|(tier, _)| tier.kind == TierKind::Dram);
        if let Some((_, factor)) = memory.next() {
            for link in fitted.extras.links.values_mut() {
                link.dram_contended_gbps = rounded(link.dram_contended_gbps / factor);
            }
        }
        fitted.extras.calibration = Some(Calibration {
            when: when.to_string(),
            records: u32::try_from(self.rows.len()).unwrap_or(u32::MAX),
            error_before: rounded(self.error(|row| Some(row.before_s)).unwrap_or(0.0)),
            error_after: rounded(self.error(|row| Some(row.after_s)).unwrap_or(0.0)),
        });
        fitted.identified()
    }
}

/// Rounds to four significant digits.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let digits = 10f64.powi(3 - value.abs().log10().floor() as i32);
    let short = (value * digits).round() / digits;
    if short.is_finite() { short } else { value }
}

/// Returns the machine file's parameters: layer, token, and factors of one.
fn start(machine: &Machine) -> Vec<f64> {
    let fixed = [
        machine.layer_overhead_us * 1e-6,
        machine.token_overhead_us * 1e-6,
    ];
    fixed
        .into_iter()
        .chain(machine.tiers.iter().map(|_| 1.0))
        .collect()
}

fn run(machine: &Machine, name: &str, record: &RunRecord) -> Result<Run> {
    let of = record.machine.as_ref();
    ensure!(
        of.is_some_and(|m| m.hash == machine.id.hash),
        "{name}: its plan was made for the machine {}, not for {}; solve again for this file and run that plan",
        of.map_or("of no name".to_string(), |m| m.to_string()),
        machine.id
    );
    let emulated = record.emulated || record.tiers.iter().any(|t| t.emulated);
    ensure!(
        !emulated && machine.tiers.iter().all(|t| !t.emulated),
        "{name}: it ran on emulated tiers, which take the time that is declared for them, so it says nothing about a \
         machine; give runs on real tiers"
    );
    let Some(predicted) = &record.predicted else {
        bail!("{name}: its plan predicted nothing; run a plan that `tier-plan solve` made");
    };
    let n = machine.tiers.len();
    let fits = record
        .tiers
        .iter()
        .map(|t| t.name.as_str())
        .eq(machine.tiers.iter().map(|t| t.name.as_str()));
    let lists = [
        &predicted.dense_s,
        &predicted.expert_s,
        &predicted.read_bytes,
    ];
    ensure!(
        fits && lists.iter().all(|list| list.len() == n),
        "{name}: its tiers or the parts of its prediction are not those of '{}'",
        machine.name
    );
    ensure!(
        record.decode_tokens > 0 && record.decode_s > 0.0,
        "{name}: it decoded nothing; give runs of 64 tokens or more"
    );
    let tokens = record.decode_tokens as f64;
    let measured_s = record.decode_s / tokens;
    let experts_took: f64 = record.layers.iter().map(|l| l.expert_s).sum();
    ensure!(
        experts_took <= measured_s * 1.01,
        "{name}: its layers took longer than its tokens; the record contradicts itself"
    );

    let mut dense = vec![layers(machine, record, predicted), 1.0];
    dense.extend(&predicted.dense_s);
    let dram = machine
        .tiers
        .iter()
        .position(|t| t.kind == TierKind::Dram)
        .unwrap_or(0);
    // KV caches are kept in main memory wherever they fit it.
    dense[2 + dram] += predicted.kv_s;

    let (experts, given_s) = if record.has_streamed() {
        (vec![0.0; 2 + n], experts_took)
    } else {
        (expert_equation(machine, record, predicted), 0.0)
    };
    Ok(Run {
        measured_s,
        predicted_s: predicted.token_s(),
        of: [dense, experts],
        took: [measured_s - experts_took, experts_took - given_s],
        given_s,
    })
}

/// Returns the coefficients of the equation of the expert stages.
fn expert_equation(machine: &Machine, record: &RunRecord, predicted: &Prediction) -> Vec<f64> {
    let rates = machine.computing_tiers();
    let sum: f64 = predicted.expert_s.iter().sum();
    let overlap = if sum > 0.0 {
        predicted.expert_critical_s / sum
    } else {
        0.0
    };
    let mut experts = vec![0.0, 0.0];
    let said = predicted.expert_s.iter().zip(&predicted.read_bytes);
    for ((tier, rate), (seconds, bytes)) in record.tiers.iter().zip(&rates).zip(said) {
        let more = tier.read_bytes as f64 / record.decode_tokens as f64 - bytes;
        experts.push(overlap * (seconds + more / (rate.read_gbps * 1e9)).max(0.0));
    }
    experts
}

/// Returns the number of layers: from the predicted overhead, or else those that the record lists.
fn layers(machine: &Machine, record: &RunRecord, predicted: &Prediction) -> f64 {
    let of_layers = predicted.overhead_s * 1e6 - machine.token_overhead_us;
    let counted = of_layers / machine.layer_overhead_us;
    if counted.is_finite() && counted >= 0.5 {
        counted.round()
    } else {
        record.layers.len().max(1) as f64
    }
}

/// Returns the parameters with the least regularized sum of squared relative errors.
fn least_squares(runs: &[&Run], start: &[f64], pull: f64) -> Vec<f64> {
    if pull.is_infinite() {
        return start.to_vec();
    }
    let n = start.len();
    let least = FIXED_S.into_iter().chain(std::iter::repeat(1.0));
    let unit: Vec<f64> = start
        .iter()
        .zip(least)
        .map(|(&start, least)| start.max(least))
        .collect();
    // Bounds are few and seldom met: a parameter that meets one is held there, and the rest is
    // solved again (active set).
    let mut held: Vec<Option<f64>> = vec![None; n];
    loop {
        // The normal equations of the rows and of the regularization, in multiples of the units.
        let mut matrix = vec![vec![0.0; n]; n];
        let mut right = vec![0.0; n];
        for run in runs {
            for (row, took) in run.of.iter().zip(run.took) {
                let row: Vec<f64> = row
                    .iter()
                    .zip(&unit)
                    .map(|(a, u)| a * u / run.measured_s)
                    .collect();
                for i in 0..n {
                    right[i] += row[i] * took / run.measured_s;
                    (0..n).for_each(|j| matrix[i][j] += row[i] * row[j]);
                }
            }
        }
        for i in 0..n {
            matrix[i][i] += pull * pull;
            right[i] += pull * pull * start[i] / unit[i];
        }
        for (at, value) in held.iter().enumerate() {
            let Some(value) = value else { continue };
            for i in 0..n {
                right[i] -= matrix[i][at] * value / unit[at];
                (matrix[i][at], matrix[at][i]) = (0.0, 0.0);
            }
            (matrix[at][at], right[at]) = (1.0, value / unit[at]);
        }
        let found: Vec<f64> = solve(matrix, right)
            .iter()
            .zip(&unit)
            .map(|(x, u)| x * u)
            .collect();
        let bounds = |at: usize| {
            if at < 2 {
                [0.0, f64::MAX]
            } else {
                FACTOR_RANGE
            }
        };
        let is_out = |at: &usize| {
            let [least, most] = bounds(*at);
            held[*at].is_none() && !(least..=most).contains(&found[*at])
        };
        match (0..n).find(is_out) {
            Some(at) => {
                let [least, most] = bounds(at);
                held[at] = Some(if found[at] < least { least } else { most });
            }
            None => return found,
        }
    }
}

/// Solves a positive definite system by elimination.
fn solve(mut matrix: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let n = right.len();
    for at in 0..n {
        let (pivot, below) = (matrix[at].clone(), at + 1..n);
        for row in below {
            let factor = matrix[row][at] / pivot[at];
            if factor != 0.0 {
                matrix[row]
                    .iter_mut()
                    .zip(&pivot)
                    .skip(at)
                    .for_each(|(value, above)| *value -= factor * above);
                right[row] -= factor * right[at];
            }
        }
    }
    for at in (0..n).rev() {
        let known: f64 = (at + 1..n)
            .map(|column| matrix[at][column] * right[column])
            .sum();
        right[at] = (right[at] - known) / matrix[at][at];
    }
    right
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
#[path = "fit_tests.rs"]
mod tests;
