//! `tier-plan selftest`: the kernels of this machine against the plain ones, and what a GPU gives.

use crate::bundled;
use crate::cli::SelftestArgs;
use crate::host;
use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::sync::Arc;
use tier_plan_runtime::check::{self, Outcome};
use tier_plan_runtime::cuda::measure::{Rates, Subject, products_of, rates_of};
use tier_plan_runtime::cuda::{self, Device, Gpu};
use tier_plan_runtime::exec::whole;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::kernels::Kernels;
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::units::show_bytes;

/// One comparison.
struct Row {
    /// Instruction set, or the GPU.
    on: String,
    name: String,
    /// What was found, or why nothing was.
    found: Result<Outcome, String>,
}

impl Row {
    fn is_well(&self) -> bool {
        self.found.as_ref().is_ok_and(Outcome::is_well)
    }
}

/// What a GPU gives, measured.
struct Measured {
    rates: Rates,
    /// Products of one token, by type.
    products: Vec<(TensorType, f64)>,
}

/// Runs it.
pub fn run(args: &SelftestArgs) -> Result<()> {
    let gpu = if args.gpu { Some(Gpu::open(args.device)?) } else { None };
    let (rows, measured) = match &gpu {
        None => (processor(), None),
        Some(gpu) => {
            // Says at once, and once, where there is no compiler.
            gpu.prepare()?;
            let rows = on_gpu(gpu);
            // A GPU whose kernels are wrong is not worth timing, and may have failed for good.
            let measured = if rows.iter().all(Row::is_well) { Some(measure(gpu)?) } else { None };
            (rows, measured)
        }
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&as_json(gpu.as_deref(), &rows, measured.as_ref()))?);
    } else {
        print_text(gpu.as_deref(), &rows, measured.as_ref());
    }
    let failed = rows.iter().filter(|row| !row.is_well()).count();
    if failed > 0 {
        bail!("{failed} of {} comparisons failed; text from these kernels can't be trusted: report it", rows.len());
    }
    Ok(())
}

fn processor() -> Vec<Row> {
    let row = |c: check::Check| Row { on: c.kernels.isa().to_string(), found: Ok(c.run()), name: c.name };
    check::checks().into_iter().map(row).collect()
}

fn on_gpu(gpu: &Arc<Gpu>) -> Vec<Row> {
    let device: Arc<dyn Device> = Arc::clone(gpu) as _;
    let row = |c: cuda::check::Check| {
        let found = c.run(&device).map_err(|error| error.to_string());
        Row { on: format!("GPU {}", gpu.properties().ordinal), name: c.name, found }
    };
    let mut rows: Vec<Row> = cuda::check::all().into_iter().map(row).collect();
    // Kernels that are wrong by themselves need no more proof.
    if rows.iter().all(Row::is_well) {
        rows.extend(whole_models(gpu));
    }
    rows
}

/// The bundled model on the GPU against the same on the processor.
fn whole_models(gpu: &Arc<Gpu>) -> Vec<Row> {
    let device: Arc<dyn Device> = Arc::clone(gpu) as _;
    let give = |_: usize| Ok(Arc::clone(&device));
    let compare = |experts_too| -> Result<Outcome> {
        let gguf = Arc::new(Gguf::open(&bundled::path("demo/demo.gguf")?)?);
        Ok(whole::compare(&gguf, experts_too, Some(&give))?)
    };
    let names = [("demo, all of it", true), ("demo, experts in main memory", false)];
    let row = |(name, experts_too): (&str, bool)| {
        let found = compare(experts_too).map_err(|error| format!("{error:#}"));
        Row { on: format!("GPU {}", gpu.properties().ordinal), name: name.into(), found }
    };
    names.into_iter().map(row).collect()
}

fn measure(gpu: &Arc<Gpu>) -> Result<Measured> {
    let mut subject = Subject::of(gpu)?;
    let products = TensorType::ALL.into_iter().map(|ty| Ok((ty, products_of(&subject, ty)?)));
    Ok(Measured { products: products.collect::<Result<_>>()?, rates: rates_of(&mut subject)? })
}

fn print_text(gpu: Option<&Gpu>, rows: &[Row], measured: Option<&Measured>) {
    println!("{}", host::describe());
    match gpu.map(Gpu::properties) {
        None => {
            let names: Vec<String> = Kernels::available().iter().map(|k| k.isa().to_string()).collect();
            println!("kernels: {}; each is compared with the plain ones", names.join(", "));
        }
        Some(p) => println!(
            "GPU {}: {}, compute capability {}.{}, {} multiprocessors, {}, driver of CUDA {}.{}",
            p.ordinal,
            p.name,
            p.capability.0,
            p.capability.1,
            p.multiprocessors,
            show_bytes(p.total_bytes as u64),
            p.driver / 1000,
            p.driver % 1000 / 10
        ),
    }
    if rows.is_empty() {
        println!("this processor runs the plain kernels only: there is nothing to compare");
        return;
    }
    println!("  {:<8} {:<32} {:>8} {:>18}", "on", "kernel", "values", "share of tolerance");
    for row in rows {
        let (on, name) = (&row.on, &row.name);
        match &row.found {
            Ok(o) => {
                let verdict = if o.is_well() { "" } else { "  WRONG" };
                println!("  {on:<8} {name:<32} {:>8} {:>16.1} %{verdict}", o.compared, o.worst * 100.0);
            }
            Err(error) => println!("  {on:<8} {name:<32} failed: {error}"),
        }
    }
    let Some(Measured { rates, products }) = measured else { return };
    println!("  {:<41} {:>8}", "measured", "");
    let line = |what: &str, value: f64, unit: &str| println!("  {what:<41} {value:>8.2} {unit}");
    line("a launch", rates.launch_us, "µs");
    line("a launch and the way back", rates.round_trip_us, "µs");
    line("memory of the GPU, read", rates.read_gbps, "GB/s");
    line("to the GPU, pinned memory", rates.to_device_gbps.0, "GB/s");
    line("to the GPU, pageable memory", rates.to_device_gbps.1, "GB/s");
    line("from the GPU, pinned memory", rates.from_device_gbps.0, "GB/s");
    line("from the GPU, pageable memory", rates.from_device_gbps.1, "GB/s");
    for (ty, gbps) in products {
        line(&format!("products of one token, {ty}"), *gbps, "GB/s");
    }
}

fn as_json(gpu: Option<&Gpu>, rows: &[Row], measured: Option<&Measured>) -> Value {
    // JSON has no number for what is endlessly wrong.
    let share = |worst: f64| if worst.is_finite() { json!(worst) } else { Value::Null };
    json!({
        "host": host::describe(),
        "isas": Kernels::available().iter().map(|k| k.isa().to_string()).collect::<Vec<_>>(),
        "gpu": gpu.map(Gpu::properties).map(|p| json!({
            "ordinal": p.ordinal,
            "name": p.name,
            "capability": format!("{}.{}", p.capability.0, p.capability.1),
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
                "share_of_tolerance": share(o.worst),
                "well": o.is_well(),
            }),
            Err(error) => json!({"on": row.on, "kernel": row.name, "error": error, "well": false}),
        }).collect::<Vec<_>>(),
        "measured": measured.map(|m| json!({
            "launch_us": m.rates.launch_us,
            "round_trip_us": m.rates.round_trip_us,
            "read_gbps": m.rates.read_gbps,
            "to_device_pinned_gbps": m.rates.to_device_gbps.0,
            "to_device_pageable_gbps": m.rates.to_device_gbps.1,
            "from_device_pinned_gbps": m.rates.from_device_gbps.0,
            "from_device_pageable_gbps": m.rates.from_device_gbps.1,
            "products_gbps": m.products.iter().map(|(ty, v)| (ty.to_string(), json!(v))).collect::<serde_json::Map<_, _>>(),
        })),
    })
}
