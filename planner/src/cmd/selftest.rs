//! `tier-plan selftest`: compares optimized kernels with reference ones, and a GPU with its
//! targets.

use crate::cmd::args::JsonArgs;
use crate::interrupt::{Interrupted, catch_interrupts, interrupted};
use crate::json::path_json;
use crate::selftest::table::number;
use crate::selftest::{self, Findings, Options};
use crate::{host, report};
use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use tier_plan_runtime::cuda::Gpu;
use tier_plan_runtime::kernels::Kernels;
use tier_plan_selftest::cpu_kernels;
use tier_plan_selftest::outcome::Outcome;
use tier_plan_selftest::suite::{DeviceRates, Results};
use tier_plan_selftest::whole_model::GpuShare;

/// Options of `tier-plan selftest`.
#[derive(Debug, Args)]
#[command(
    about = "Compare the kernels that this machine runs with the reference kernels",
    after_long_help = "Example:\n  tier-plan selftest\n  tier-plan selftest --gpu --quick"
)]
pub struct SelftestArgs {
    /// Check a GPU: kernels, golden values and whole models; measure its memory, link and speed
    /// against targets
    #[arg(long, help_heading = "GPU")]
    pub gpu: bool,
    /// Ordinal of the GPU, as the driver counts
    #[arg(
        long,
        value_name = "NUMBER",
        default_value_t = 0,
        requires = "gpu",
        help_heading = "GPU"
    )]
    pub device: usize,
    /// Check results only and time nothing
    #[arg(long, requires = "gpu", conflicts_with_all = ["model", "peer"], help_heading = "GPU")]
    pub quick: bool,
    /// Model to time [default: a synthetic one of real shapes, as deep as fits]
    #[arg(
        short,
        long,
        value_name = "FILE",
        requires = "gpu",
        help_heading = "GPU"
    )]
    pub model: Option<PathBuf>,
    /// Folder with golden values in arch and quant [default: tests/data of the source]
    #[arg(long, value_name = "FOLDER", requires = "gpu", help_heading = "GPU")]
    pub golden: Option<PathBuf>,
    /// Path of llama.cpp's llama-bench, built with CUDA, to run on the same model
    #[arg(long, value_name = "PATH", requires = "gpu", help_heading = "GPU")]
    pub peer: Option<PathBuf>,
    /// Folder for the table, as text and JSON [default: reports/DATE-selftest]
    #[arg(
        short,
        long,
        value_name = "FOLDER",
        requires = "gpu",
        help_heading = "Output"
    )]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// One comparison.
struct Compared {
    /// Instruction set, or the GPU.
    on: String,
    name: String,
    /// What was found, or why nothing was.
    found: Result<Outcome, String>,
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &SelftestArgs) -> Result<()> {
    if args.gpu {
        on_gpu(args)
    } else {
        on_processor(args.format.json)
    }
}

fn on_processor(as_json: bool) -> Result<()> {
    let compare = |c: cpu_kernels::Check| Compared {
        on: c.kernels.isa().to_string(),
        found: Ok(c.run()),
        name: c.name,
    };
    let rows: Vec<Compared> = cpu_kernels::checks().into_iter().map(compare).collect();
    if as_json {
        println!(
            "{}",
            serde_json::to_string_pretty(&json_of(None, &rows, None))?
        );
    } else {
        print_text(&rows);
    }
    let failed = rows
        .iter()
        .filter(|row| !row.found.as_ref().is_ok_and(Outcome::passed))
        .count();
    distrust(failed, rows.len())
}

fn distrust(failed: usize, of: usize) -> Result<()> {
    if failed > 0 {
        bail!(
            "{failed} of {of} comparisons failed; text from these kernels cannot be trusted: please report it"
        );
    }
    Ok(())
}

fn on_gpu(args: &SelftestArgs) -> Result<()> {
    if let Some(folder) = &args.output {
        report::check(folder)?;
    }
    let gpu = Gpu::open(args.device)?;
    // Says at once, and once, where there is no compiler.
    gpu.prepare()?;
    let options = Options {
        quick: args.quick,
        golden: args.golden.clone(),
        model: args.model.clone(),
        peer: args.peer.clone(),
    };
    let catching = catch_interrupts();
    let found = selftest::run(&gpu, &options)?;
    drop(catching);
    let (text, mut value) = (found.table.text(), gpu_json(&gpu, &found));
    let pretty = serde_json::to_string_pretty(&value)?;
    let written = write(args.output.clone(), &found, &text, &pretty);
    // Printed even if the folder failed, since it took minutes.
    if args.format.json {
        value["report"] = written.as_ref().ok().map(path_json).into();
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        print!("{text}");
        if let Ok(folder) = &written {
            println!("report: {}", folder.display());
        }
    }
    match written {
        Err(error) if args.output.is_some() => return Err(error),
        // The default folder may not be writable, which is no reason to fail.
        Err(error) => eprintln!("warning: no report was written: {error:#}"),
        Ok(_) => {}
    }
    if interrupted() {
        return Err(Interrupted.into());
    }
    let rows = &found.table.rows;
    distrust(
        rows.iter().filter(|row| row.is_wrong()).count(),
        rows.iter().filter(|row| row.results).count(),
    )
}

/// Writes the table into a folder that is new, and says where.
fn write(folder: Option<PathBuf>, found: &Findings, text: &str, json: &str) -> Result<PathBuf> {
    let day = found.table.when.replace(':', "").replace('T', "-");
    let folder = folder.unwrap_or_else(|| {
        PathBuf::from(format!("reports/{}-selftest", day.trim_end_matches('Z')))
    });
    report::write_folder(&folder, |folder| {
        for (name, content) in [("selftest.txt", text), ("selftest.json", json)] {
            report::save(folder, name, content)?;
        }
        Ok(())
    })
}

fn print_text(rows: &[Compared]) {
    println!("{}", host::describe());
    let names: Vec<String> = Kernels::available()
        .iter()
        .map(|k| k.isa().to_string())
        .collect();
    println!(
        "kernels: {}; each is compared with the plain ones",
        names.join(", ")
    );
    if rows.is_empty() {
        println!("this processor runs the plain kernels only: there is nothing to compare");
        return;
    }
    println!(
        "  {:<8} {:<32} {:>8} {:>18}",
        "on", "kernel", "values", "share of tolerance"
    );
    for row in rows {
        let (on, name) = (&row.on, &row.name);
        match &row.found {
            Ok(o) => {
                let verdict = if o.passed() { "" } else { "  WRONG" };
                println!(
                    "  {on:<8} {name:<32} {:>8} {:>16.1} %{verdict}",
                    o.compared,
                    o.worst * 100.0
                );
            }
            Err(error) => println!("  {on:<8} {name:<32} failed: {error}"),
        }
    }
}

/// Everything of a GPU: comparisons and rates by themselves, and all rows of the table.
fn gpu_json(gpu: &Gpu, found: &Findings) -> Value {
    let on = format!("GPU {}", gpu.properties().ordinal);
    let mut value = json_of(
        Some(gpu),
        &compared(&on, &found.results),
        found.gives.as_ref(),
    );
    let table = &found.table;
    for (key, part) in [
        ("when", json!(table.when)),
        ("version", json!(table.version)),
        ("rows", table.rows_json()),
        ("summary", table.summary_json()),
    ] {
        value[key] = part;
    }
    value
}

fn compared(on: &str, found: &Results) -> Vec<Compared> {
    let row = |name: &str, outcome: &Result<Outcome, _>| Compared {
        on: on.to_string(),
        name: name.to_string(),
        found: outcome.as_ref().map(|o| *o).map_err(ToString::to_string),
    };
    let kernels = found
        .kernels
        .iter()
        .map(|(name, outcome)| row(name, outcome));
    let models = found.logits.iter().map(|(place, outcome)| match place {
        GpuShare::All => row("demo, all of it", outcome),
        GpuShare::AllButExperts => row("demo, experts in main memory", outcome),
    });
    kernels.chain(models).collect()
}

fn json_of(gpu: Option<&Gpu>, rows: &[Compared], measured: Option<&DeviceRates>) -> Value {
    json!({
        "host": host::describe(),
        "isas": Kernels::available().iter().map(|k| k.isa().to_string()).collect::<Vec<_>>(),
        "gpu": gpu.map(Gpu::properties).map(|p| json!({
            "ordinal": p.ordinal,
            "name": p.name,
            "capability": p.capability.to_string(),
            "multiprocessors": p.multiprocessors,
            "total_bytes": p.total_bytes,
            "l2_bytes": p.l2_bytes,
            "driver": p.driver,
        })),
        "checks": rows.iter().map(|row| match &row.found {
            Ok(o) => json!({
                "on": row.on,
                "kernel": row.name,
                "values": o.compared,
                "share_of_tolerance": number(o.worst),
                "well": o.passed(),
            }),
            Err(error) => json!({"on": row.on, "kernel": row.name, "error": error, "well": false}),
        }).collect::<Vec<_>>(),
        "measured": measured.map(|m| json!({
            "launch_us": m.rates.launch_us,
            "round_trip_us": m.rates.round_trip_us,
            "read_gbps": m.rates.read_gbps,
            "copy_gbps": m.copy_gbps,
            "to_device_pinned_gbps": m.rates.to_device.pinned_gbps,
            "to_device_pageable_gbps": m.rates.to_device.pageable_gbps,
            "from_device_pinned_gbps": m.rates.from_device.pinned_gbps,
            "from_device_pageable_gbps": m.rates.from_device.pageable_gbps,
            "products_gbps": m.products.iter().map(|(ty, v)| (ty.to_string(), json!(v))).collect::<serde_json::Map<_, _>>(),
        })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selftest::table::{Row, Table, Target};

    #[test]
    fn the_table_is_written_whole_and_nothing_is_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let table = Table {
            rows: vec![
                Row::figure("kernels", "products", 3.0, "%")
                    .with(Target::AtMost(100.0))
                    .compared(),
            ],
            ..Table::default()
        };
        let found = Findings {
            table,
            results: Results::default(),
            gives: None,
        };
        let target = folder.path().join("here");
        for name in ["here", "here-2"] {
            let written = write(Some(target.clone()), &found, &found.table.text(), "{}").unwrap();
            assert_eq!(written, folder.path().join(name));
            let text = std::fs::read_to_string(written.join("selftest.txt")).unwrap();
            assert!(text.contains("1 of 1 targets met"), "{text}");
            assert_eq!(
                std::fs::read_to_string(written.join("selftest.json")).unwrap(),
                "{}"
            );
        }
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            2,
            "no temporary folder is left"
        );
    }

    #[test]
    fn failed_comparisons_are_an_error() {
        assert!(distrust(0, 5).is_ok());
        let why = distrust(2, 5).unwrap_err().to_string();
        assert!(
            why.contains("2 of 5") && why.contains("cannot be trusted"),
            "{why}"
        );
    }
}
