//! `tier-plan probe`: measures this machine and writes a machine file.

use crate::cmd::args::{JsonArgs, ThreadArgs};
use crate::json::path_json;
use crate::prepared::applied;
use crate::print::digits;
use crate::printable::printable;
use crate::probe::disk::Disk;
use crate::probe::gpu::GpuRate;
use crate::probe::{Findings, MACHINE_FILE, Settings, measure};
use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::tiers::numa::NumaPolicy;
use tier_plan_runtime::units::show_bytes;

/// Options of `tier-plan probe`.
#[derive(Debug, Args)]
#[command(
    about = "Measure this machine and write machine.toml",
    after_long_help = "Example:\n  tier-plan probe --model MODEL.gguf -o machine.toml"
)]
pub struct ProbeArgs {
    /// Machine file to write
    #[arg(
        short,
        long,
        value_name = "FILE",
        default_value = MACHINE_FILE,
        help_heading = "Output"
    )]
    pub output: PathBuf,
    /// Measure with this model's tensor types, and read its experts from its file
    #[arg(short, long, value_name = "FILE", conflicts_with = "slow_dir")]
    pub model: Option<PathBuf>,
    /// Share reads with this copy of the model (or packed experts of it) on another drive, and measure that drive,
    /// too; repeat it for more
    #[arg(long = "copy", value_name = "FILE", requires = "model")]
    pub copies: Vec<PathBuf>,
    /// Measure the file system of this folder with a temporary file of 1 GiB [default: the current
    /// folder]
    #[arg(long, value_name = "FOLDER")]
    pub slow_dir: Option<PathBuf>,
    /// Measure for about 10 seconds instead of 30, as `auto` does: the model's two largest formats (or Q4_K alone), and
    /// drives for a shorter time
    #[arg(long)]
    pub quick: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub threads: ThreadArgs,
    /// Make each NUMA node a tier, measured by itself
    #[arg(long, conflicts_with = "numa")]
    pub numa_tiers: bool,
    /// Measure as runs with this NUMA policy compute: `interleave`, `shard`, or the number of a node
    #[arg(long, value_name = "POLICY")]
    pub numa: Option<NumaPolicy>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, a file cannot be read or written, or the model cannot be loaded.
pub fn run(args: &ProbeArgs) -> Result<()> {
    let threads = args.threads.checked()?;
    safely::check(&args.output)?;
    if args.model.is_none() {
        Disk::check_folder(args.slow_dir.as_deref().unwrap_or(Path::new(".")))?;
    }
    let shards = applied(args.numa)?;
    let found = measure(&Settings {
        model: args.model.as_deref(),
        copies: &args.copies,
        slow_dir: args.slow_dir.as_deref(),
        threads,
        numa_tiers: args.numa_tiers,
        numa: args.numa,
        shards: shards.as_ref(),
        is_quick: args.quick,
    })?;
    let machine = found.machine();
    machine.write(&args.output)?;
    for doubt in &found.doubts {
        eprintln!("warning: {doubt}; measure again on a quiet machine");
    }
    if args.format.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&as_json(args, &found, &machine))?
        );
    } else {
        print_text(args, &found, &machine);
    }
    Ok(())
}

fn print_text(args: &ProbeArgs, found: &Findings, machine: &Machine) {
    println!(
        "{} · {} threads used · {}",
        found.host, found.threads, found.isa
    );
    println!(
        "main memory: {:.1} GB/s when only read; {}",
        found.bare_gbps,
        show_bytes(found.dram_bytes)
    );
    let heading = if found.model.is_some() {
        "of the bytes of a token"
    } else {
        ""
    };
    println!(
        "  {:<10} {:>8} {:>8} {:>16} {:>12}  {heading}",
        "products", "GB/s", "spread", "prompts, GFLOP/s", "of 4 tokens"
    );
    for rate in &found.kernels {
        let share = rate
            .share
            .map_or(String::new(), |share| format!("{:>5.1} %", share * 100.0));
        let spread = rate.gbps.spread * 100.0;
        let (gbps, gflops) = (rate.gbps.value, rate.batch_gflops.value);
        let few = rate
            .few_gflops
            .map_or(String::new(), |few| format!("{:.0}", few.value));
        println!(
            "  {:<10} {gbps:>8.1} {spread:>6.0} % {gflops:>16.0} {few:>12}  {share}",
            rate.ty.to_string()
        );
    }
    let disk = &found.disk;
    println!(
        "drive of {}: {:.2} GB/s (spread {:.0} %) in pieces of {}, {:.0} µs for one small read{}",
        found.disk_path.display(),
        disk.gbps.value,
        disk.gbps.spread * 100.0,
        show_bytes(disk.piece_bytes),
        disk.latency_us.value,
        if disk.direct {
            ""
        } else {
            "; through the page cache"
        }
    );
    if let Some(io) = disk.io {
        println!(
            "  {} at once with direct I/O {:.2} GB/s, through the page cache {:.2} GB/s: plans will use {} I/O",
            disk.bursts.last().map_or(0, |burst| burst.experts),
            io.direct_gbps,
            io.buffered_gbps,
            io.best().as_str()
        );
    }
    for burst in disk.bursts {
        println!("  {} at once: {:.2} GB/s", burst.experts, burst.gbps);
    }
    for copy in &found.copies {
        println!(
            "copy {}: {:.2} GB/s alone, {:.2} while memory and all drives are in use",
            printable(&copy.path.display().to_string()),
            copy.disk.gbps.value,
            copy.together_gbps
        );
    }
    let (compute, read) = (found.together.compute_gbps, found.together.disk_gbps);
    println!("both at once: products {compute:.1} GB/s, drive {read:.2} GB/s");
    println!(
        "fixed: {:.1} µs per layer, {:.1} µs per token: {}",
        found.fixed.layer_us, found.fixed.token_us, found.fixed.how
    );
    for node in &found.nodes {
        let own = node.own_gbps.map_or(String::new(), |own| {
            format!(", {own:.1} from its own processors")
        });
        let (number, gbps, alone) = (node.node.number, node.gbps, node.alone_gbps);
        println!("NUMA node {number}: {gbps:.1} GB/s with all nodes in use, {alone:.1} alone{own}");
    }
    for gpu in &found.gpus.found {
        print_gpu(gpu);
    }
    for missing in &found.gpus.missing {
        println!(
            "{}{missing}",
            if found.gpus.found.is_empty() {
                "no GPU: "
            } else {
                ""
            }
        );
    }
    match found.power.watts {
        Some(watts) => println!("power: {watts} W: {}", found.power.how),
        None => {
            println!(
                "power: left out ({}); write `watts` into the machine file to have it counted",
                found.power.how
            )
        }
    }
    println!();
    for tier in &machine.tiers {
        println!(
            "{}: {} GB/s{}, {}",
            tier.name,
            digits(tier.read_gbps),
            machine
                .extras
                .spread
                .get(&tier.name)
                .map_or(String::new(), |iqr| format!(
                    " (the middle half of repetitions spans {:.1} %)",
                    iqr * 100.0
                )),
            show_bytes(tier.capacity_bytes)
        );
    }
    println!("wrote {}", args.output.display());
}

fn print_gpu(gpu: &GpuRate) {
    let r = &gpu.rates;
    let emulated = if gpu.emulated { " (emulated)" } else { "" };
    println!(
        "GPU {}: {}{emulated}, {} free of {}",
        gpu.device,
        printable(&gpu.name),
        show_bytes(gpu.free_bytes),
        show_bytes(gpu.total_bytes)
    );
    println!(
        "  a launch {:.1} µs, there and back {:.1} µs; bare reads {:.1} GB/s",
        r.launch_us, r.round_trip_us, r.read_gbps
    );
    for (ty, gbps) in &gpu.products {
        println!("  products of {ty}: {gbps:.1} GB/s");
    }
    if let Some(experts) = &gpu.experts {
        let (used, us, gflops) = (experts.used, experts.token_us, experts.batch_gflops);
        println!("  {used} experts of a token {us:.1} µs; prompts {gflops:.0} GFLOP/s");
    }
    match &gpu.layers {
        Ok(layers) => println!(
            "  a layer takes {:.1} µs more than on the processor; a token of {} layers all of which are there {:.1} µs",
            layers.layer_us, layers.n_layer, layers.resident_token_us
        ),
        Err(why) => println!("  fixed times of layers there were not measured: {why}"),
    }
    let (to, to_pageable) = (r.to_device.pinned_gbps, r.to_device.pageable_gbps);
    let (from, from_pageable) = (r.from_device.pinned_gbps, r.from_device.pageable_gbps);
    println!(
        "  to it {to:.1} GB/s ({to_pageable:.1} pageable), from it {from:.1} ({from_pageable:.1} pageable)"
    );
    let both = &gpu.contended;
    println!(
        "  to it {:.1} GB/s while main memory gives {:.1} GB/s to products, which have {:.1} without that",
        both.to_device_gbps, both.beside, both.alone
    );
}

fn as_json(args: &ProbeArgs, found: &Findings, machine: &Machine) -> Value {
    json!({
        "machine": path_json(&args.output),
        "when": found.when,
        "host": found.host,
        "threads": found.threads,
        "isa": found.isa,
        "model": found.model,
        "dram_read_gbps": found.bare_gbps,
        "compute_gbps": found.compute_gbps,
        "prompt_gflops": found.prompt_gflops,
        "few_gflops": found.few_gflops,
        "dram_bytes": found.dram_bytes,
        "kernels": found.kernels.iter().map(|k| json!({
            "type": k.ty.to_string(),
            "gbps": k.gbps.value,
            "spread": k.gbps.spread,
            "iqr": k.gbps.iqr,
            "batch_gflops": k.batch_gflops.value,
            "few_gflops": k.few_gflops.map(|few| few.value),
            "share": k.share,
        })).collect::<Vec<_>>(),
        "disk": {
            "path": found.disk_path,
            "gbps": found.disk.gbps.value,
            "spread": found.disk.gbps.spread,
            "iqr": found.disk.gbps.iqr,
            "latency_us": found.disk.latency_us.value,
            "direct": found.disk.direct,
            "io": found.disk.io.map(|io| json!({
                "best": io.best().as_str(),
                "direct_gbps": io.direct_gbps,
                "buffered_gbps": io.buffered_gbps,
            })),
            "piece_bytes": found.disk.piece_bytes,
            "bytes": found.disk_bytes,
            "bursts": found.disk.bursts.iter().map(|b| json!({"experts": b.experts, "gbps": b.gbps})).collect::<Vec<_>>(),
        },
        "copies": found.copies.iter().map(|copy| json!({
            "path": copy.path,
            "gbps": copy.disk.gbps.value,
            "spread": copy.disk.gbps.spread,
            "together_gbps": copy.together_gbps,
        })).collect::<Vec<_>>(),
        "together": {"compute_gbps": found.together.compute_gbps, "disk_gbps": found.together.disk_gbps},
        "layer_overhead_us": found.fixed.layer_us,
        "token_overhead_us": found.fixed.token_us,
        "gpus": found.gpus.found.iter().map(|g| json!({
            "name": g.name,
            "device": g.device,
            "emulated": g.emulated,
            "total_bytes": g.total_bytes,
            "free_bytes": g.free_bytes,
            "launch_us": g.rates.launch_us,
            "round_trip_us": g.rates.round_trip_us,
            "read_gbps": g.rates.read_gbps,
            "compute_gbps": g.compute_gbps,
            "products": g.products.iter().map(|(ty, gbps)| json!({"type": ty.to_string(), "gbps": gbps})).collect::<Vec<_>>(),
            "experts_us": g.experts.map(|e| e.token_us),
            "batch_gflops": g.experts.map(|e| e.batch_gflops),
            "layer_us": g.layers.as_ref().ok().map(|l| l.layer_us),
            "resident_token_us": g.layers.as_ref().ok().map(|l| l.resident_token_us),
            "to_gbps": g.rates.to_device.pinned_gbps,
            "to_pageable_gbps": g.rates.to_device.pageable_gbps,
            "from_gbps": g.rates.from_device.pinned_gbps,
            "from_pageable_gbps": g.rates.from_device.pageable_gbps,
            "contended_gbps": g.contended.to_device_gbps,
            "products_contended_gbps": g.contended.beside,
            "products_alone_gbps": g.contended.alone,
            "watts": g.power.watts,
        })).collect::<Vec<_>>(),
        "gpus_missing": found.gpus.missing,
        "nodes": found.nodes.iter().map(|n| json!({
            "node": n.node.number,
            "gbps": n.gbps,
            "alone_gbps": n.alone_gbps,
            "own_gbps": n.own_gbps,
            "capacity_bytes": n.capacity_bytes,
        })).collect::<Vec<_>>(),
        "watts": found.power.watts,
        "watts_from": found.power.how,
        "loop_us": found.fixed.entry_us,
        "overheads_from": found.fixed.how,
        "tiers": machine.tiers.iter().map(|t| json!({
            "name": t.name,
            "read_gbps": t.read_gbps,
            "latency_us": t.latency_us,
            "capacity_bytes": t.capacity_bytes,
            "spread": machine.extras.spread.get(&t.name),
        })).collect::<Vec<_>>(),
        "doubts": found.doubts,
    })
}
