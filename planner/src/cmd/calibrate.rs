//! `tier-plan calibrate`: fits a machine file to measured runs.

use crate::catalogue;
use crate::cmd::args::JsonArgs;
use crate::cost::fit::{Fit, Row};
use crate::hint::HintExt;
use crate::json::path_json;
use crate::print::digits;
use crate::printable::printable;
use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;
use std::path::PathBuf;
use std::time::SystemTime;
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::formats::record::RunRecord;
use tier_plan_runtime::formats::{record, safely};
use tier_plan_runtime::units::show_utc;

/// Options of `tier-plan calibrate`.
#[derive(Debug, Args)]
#[command(
    about = "Fit a machine file to the times of runs on that machine",
    after_long_help = "Example:\n  tier-plan calibrate reports/*/records/*.json -M machine.toml"
)]
pub struct CalibrateArgs {
    /// Run records (.json) of plans made for this machine file, with different budgets
    #[arg(required = true, value_name = "RECORD")]
    pub records: Vec<PathBuf>,
    /// Machine file, or the name of a bundled machine
    #[arg(short = 'M', short_alias = 'm', long, value_name = "FILE")]
    pub machine: PathBuf,
    /// Fitted machine file to write [default: the machine file itself]
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Runs below which a fit may follow noise.
const MIN_RELIABLE_RUNS: usize = 4;

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &CalibrateArgs) -> Result<()> {
    let machine = catalogue::machine(&args.machine)?;
    let output = match &args.output {
        Some(output) => output.clone(),
        None => {
            if !args.machine.is_file() {
                let bundled = || {
                    bail!(
                        "'{}' comes with the program and is not overwritten",
                        machine.name
                    )
                };
                return bundled().hint("pass --output FILE");
            }
            args.machine.clone()
        }
    };
    safely::check(&output)?;
    let read = |path: &PathBuf| Ok((path.display().to_string(), record::read(path)?));
    let records = args.records.iter().map(read).collect::<Result<Vec<_>>>()?;
    let fit = Fit::new(&machine, &records)?;
    let fitted = fit.machine(&machine, &show_utc(SystemTime::now()));
    fitted
        .write(&output)
        .context("the runs fit the machine so badly that its tiers would change places")?;
    if args.format.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&as_json(&fit, &records, &machine, &fitted, &output))?
        );
    } else {
        print_text(&fit, &records, &machine, &fitted);
        println!("wrote {}", output.display());
    }
    Ok(())
}

fn difference(seconds: f64, row: &Row) -> f64 {
    // Of speeds, as everywhere: measured by predicted, less one.
    seconds / row.measured_s - 1.0
}

fn print_text(fit: &Fit, records: &[(String, RunRecord)], machine: &Machine, fitted: &Machine) {
    println!(
        "tokens per second while decoding; in brackets how far the measured speed is from the predicted one"
    );
    println!(
        "{:>9} {:>18} {:>22} {:>18}  record",
        "measured", "predicted", "with the bytes read*", "fitted, predicted"
    );
    for ((name, _), row) in records.iter().zip(&fit.rows) {
        let cell = |seconds: f64| {
            format!(
                "{:.2} ({:+.1} %)",
                1.0 / seconds,
                difference(seconds, row) * 100.0
            )
        };
        println!(
            "{:>9.2} {:>18} {:>22} {:>18}  {name}",
            1.0 / row.measured_s,
            cell(row.predicted_s),
            cell(row.before_s),
            cell(row.after_s)
        );
    }
    println!("* predicted, but for the bytes that the run's own text made it read");
    let percent =
        |error: Option<f64>| error.map_or("-".to_string(), |e| format!("{:.1} %", e * 100.0));
    println!(
        "mean error: {} before, {} after; {} where each run is predicted from the others",
        percent(fit.error(|row| Some(row.before_s))),
        percent(fit.error(|row| Some(row.after_s))),
        percent(fit.error(|row| row.left_out_s))
    );
    println!(
        "fixed: {} µs per layer (was {}), {} µs per token (was {})",
        fitted.layer_overhead_us,
        machine.layer_overhead_us,
        fitted.token_overhead_us,
        machine.token_overhead_us
    );
    for (before, after) in machine.tiers.iter().zip(&fitted.tiers) {
        let change = if before.read_gbps == after.read_gbps {
            "as it was"
        } else {
            "fitted"
        };
        println!(
            "{}: {} GB/s, {change} (was {})",
            printable(&after.name),
            digits(after.read_gbps),
            digits(before.read_gbps)
        );
    }
    for note in notes(fit, records) {
        println!("note: {note}");
    }
}

fn notes(fit: &Fit, records: &[(String, RunRecord)]) -> Vec<String> {
    let mut notes = Vec::new();
    if fit.pull.is_infinite() {
        notes.push(
            "every fit predicted the runs it had not seen worse than the file does, so the file stays as it is".into(),
        );
    }
    if records.len() < MIN_RELIABLE_RUNS {
        notes.push(format!(
            "{} runs say little: pass {MIN_RELIABLE_RUNS} or more, under different budgets, so that rates and fixed times can be told apart",
            records.len()
        ));
    }
    let disturbed = records.iter().filter(|(_, r)| r.conditions.is_some());
    match disturbed.count() {
        0 => {}
        n => notes.push(format!(
            "{n} of the {} runs had other rates than their plans count on, as their records say: a fit to them is for \
             such times; leave them out for quiet ones",
            records.len()
        )),
    }
    match records.iter().filter(|(_, r)| r.has_streamed()).count() {
        0 => {}
        n => notes.push(format!(
            "{n} of the {} runs streamed experts to a GPU: the time of their expert stages is taken as measured, and \
             only the rest is fitted",
            records.len()
        )),
    }
    let models: std::collections::BTreeSet<&str> = records
        .iter()
        .filter_map(|(_, r)| r.model.as_ref().map(|m| m.hash.as_str()))
        .collect();
    if models.len() < 2 {
        notes.push(
            "all runs are of one model, so the fixed times of layers and tokens are known together only".to_string(),
        );
    }
    if let Some(factor) = fit.factors.iter().find(|f| !(0.5..=2.0).contains(*f)) {
        notes.push(format!(
            "a tier takes {factor:.2} times what the file said: measure it again with `tier-plan probe`"
        ));
    }
    notes
}

fn as_json(
    fit: &Fit,
    records: &[(String, RunRecord)],
    machine: &Machine,
    fitted: &Machine,
    output: &std::path::Path,
) -> serde_json::Value {
    let rows = records.iter().zip(&fit.rows).map(|((name, record), row)| {
        json!({
            "record": name,
            "plan": record.plan,
            "measured_tok_s": 1.0 / row.measured_s,
            "predicted_tok_s": 1.0 / row.predicted_s,
            "predicted_with_bytes_read_tok_s": 1.0 / row.before_s,
            "fitted_tok_s": 1.0 / row.after_s,
            "left_out_tok_s": row.left_out_s.map(|s| 1.0 / s),
            "error_before": difference(row.before_s, row),
            "error_after": difference(row.after_s, row),
        })
    });
    json!({
        "machine": path_json(output),
        "hash": fitted.id.hash,
        "changed": fit.pull.is_finite(),
        "records": rows.collect::<Vec<_>>(),
        "error_before": fit.error(|row| Some(row.before_s)),
        "error_after": fit.error(|row| Some(row.after_s)),
        "error_left_out": fit.error(|row| row.left_out_s),
        "layer_overhead_us": {"before": machine.layer_overhead_us, "after": fitted.layer_overhead_us},
        "token_overhead_us": {"before": machine.token_overhead_us, "after": fitted.token_overhead_us},
        "tiers": machine.tiers.iter().zip(&fitted.tiers).zip(&fit.factors).map(|((before, after), factor)| json!({
            "name": before.name,
            "read_gbps_before": before.read_gbps,
            "read_gbps_after": after.read_gbps,
            "factor": factor,
        })).collect::<Vec<_>>(),
        "notes": notes(fit, records),
    })
}
