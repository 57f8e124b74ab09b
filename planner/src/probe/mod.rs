//! Measures the rates and times that the cost model charges.
//!
//! Every rate is that of the program's own work. Experts are multiplied by the kernels that will
//! run, on all threads, from huge pages. They are read from the drive by the engine's readers, in
//! expert-sized pieces, with direct I/O.

pub(crate) mod busy;
mod copies;
pub mod disk;
mod findings;
pub mod fixed;
pub mod gpu;
mod machine;
mod measured;
pub mod memory;
pub mod nodes;
pub mod power;

use crate::conditions::processors;
use crate::{host, progress};
use anyhow::{Context, Result, ensure};
use disk::{Disk, DiskRate};
pub use findings::{CopyRate, Findings, KernelRate, Settings, Together};
use fixed::Fixed;
use gpu::Work;
use machine::rounded;
pub use measured::Measured;
use memory::{Memory, STAGE};
use power::{Meter, Part, Power};
use std::path::Path;
use std::time::{Duration, SystemTime};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::kernels::Kernels;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::os::processors::{Reading, Usage};
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::threads::ThreadPool;
use tier_plan_runtime::tiers::bandwidth::dram_read_gbps;
use tier_plan_runtime::tiers::limits::{Limit, file_system_space, memory_limit};
use tier_plan_runtime::tiers::nodes::Pages;
use tier_plan_runtime::tiers::shards::Shards;
use tier_plan_runtime::units::{show_bytes, show_utc};

/// Machine file that `tier-plan probe` writes unless told otherwise, and that others look for in the
/// current folder.
pub const MACHINE_FILE: &str = "machine.toml";

/// Most bytes of memory to stream through: more than any last-level cache.
const MAX_MEMORY_BYTES: u64 = 1 << 30;

/// Fewest bytes that give a meaningful rate.
const MIN_MEMORY_BYTES: u64 = 64 << 20;

/// Time spent on the drive per figure.
const DRIVE_TIME: Duration = Duration::from_secs(6);

/// Time spent on the two ways of reading the drive.
const IO_TIME: Duration = Duration::from_secs(2);

/// Time that layers of the model are computed.
const MODEL_TIME: Duration = Duration::from_secs(5);

/// Time that memory and drive are used at once.
const CONTENTION_TIME: Duration = Duration::from_secs(3);

/// One part in this many of memory is left to the program, activations, and the system.
const RESERVE_DIVISOR: u64 = 16;

/// Share of the bare matmul rate that a prompt's layers reach, since norms, RoPE, and activations
/// run in between. Measured with AMX: 473 of 591 GFLOP/s.
const LAYER_EFFICIENCY: f64 = 0.8;

/// Assumed DRAM size where the system reports no limit.
const DEFAULT_DRAM_BYTES: u64 = 16 << 30;

/// Relative spread of repetitions above which a figure gets a warning.
const MAX_TRUSTED_SPREAD: f64 = 0.15;

/// Formats that most files use.
const COMMON_FORMATS: [TensorType; 14] = [
    TensorType::Q2_K,
    TensorType::Q3_K,
    TensorType::Q4_0,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
    TensorType::Q8_0,
    TensorType::IQ3_XXS,
    TensorType::IQ4_XS,
    TensorType::MXFP4,
    TensorType::NVFP4,
    TensorType::Q2_0,
    TensorType::BF16,
    TensorType::F32,
];

/// Formats of a quick measurement without a model, and the part of the time that it takes for the drive and for
/// layers.
const QUICK_FORMATS: [TensorType; 1] = [TensorType::Q4_K];
const QUICK_DIVISOR: u32 = 4;

/// Measures this machine, with progress on a terminal.
///
/// # Errors
/// When the model cannot be opened or has no routed experts, when too little memory is free, or
/// when the drive cannot be read or written.
pub fn measure(settings: &Settings<'_>) -> Result<Findings> {
    let mut doubts = Vec::new();
    let (load, before) = (busy::load(), Reading::now());
    let kernels = Kernels::from_env()?;
    // An impossible request fails before anything is measured.
    let numa_nodes = if settings.numa_tiers {
        tier_plan_runtime::tiers::nodes::nodes().context("--numa-tiers")?
    } else {
        Vec::new()
    };
    let threads = settings
        .threads
        .unwrap_or_else(tier_plan_runtime::threads::physical_cores);
    let pool = settings.shards.map_or_else(
        || ThreadPool::new(threads),
        |shards| shards.pool(Some(threads)),
    );
    let pages = settings.shards.map_or(Pages::Anywhere, Shards::pages);
    let opened = settings.model.map(open).transpose()?;
    let mut copies = match &opened {
        Some((gguf, spec)) => copies::open(gguf, spec, settings.copies)?,
        None => Vec::new(),
    };
    let shares = opened
        .as_ref()
        .map(|(gguf, spec)| shares(gguf, spec))
        .unwrap_or_default();
    let types = match settings.is_quick {
        true if shares.is_empty() => QUICK_FORMATS.to_vec(),
        true => largest(&shares),
        false => types_to_measure(&shares),
    };
    let divisor = if settings.is_quick { QUICK_DIVISOR } else { 1 };

    let bar = progress::count("measuring", types.len() as u64 + 7);
    // This process is small, so its present limit is about that of a plan's engine.
    let limit = memory_limit();
    let bytes = bytes_to_measure(limit.as_ref().map(|l| l.bytes))?;
    let bare_gbps = dram_read_gbps(&pool, kernels, bytes, &pages)?;
    bar.inc(1);

    let mut memory = Memory::on(kernels, bytes, &pages)?;
    let meter = Meter::start();
    let mut rates = Vec::new();
    for &ty in &types {
        let share = opened.is_some().then(|| {
            shares
                .iter()
                .find(|(t, _)| *t == ty)
                .map_or(0.0, |(_, s)| *s)
        });
        let rate = kernel_rate(&mut memory, &pool, ty, share);
        doubts.extend(rate.doubt());
        rates.push(rate);
        bar.inc(1);
    }
    let drawn = meter.parts();
    // The format with the largest share of a token's bytes.
    let main = rates
        .iter()
        .max_by(|a, b| a.share.unwrap_or(0.0).total_cmp(&b.share.unwrap_or(0.0)));
    let main = if opened.is_some() {
        main.map_or(TensorType::Q4_K, |r| r.ty)
    } else {
        TensorType::Q4_K
    };

    let mut compute_gbps = mean_rate(&rates);
    let of_main = rates.iter().find(|r| r.ty == main).map(|r| r.gbps);
    let mut compute = of_main.unwrap_or_default();
    let mut fixed = fixed::measure(&pool, &mut memory)?;
    if let Some(path) = settings.model {
        let own = fixed::own_layers(path, pool.n_threads(), MODEL_TIME / divisor);
        if let Ok(own) = &own
            && own.expert_gbps.value < compute_gbps
        {
            compute = own.expert_gbps;
        }
        adopt_own_layers(own, &mut compute_gbps, &mut fixed, &mut doubts);
    }
    bar.inc(1);

    let (mut disk, disk_path) = match (&opened, settings.model) {
        (Some((gguf, spec)), Some(path)) => (Disk::of_model(gguf, spec)?, path.to_path_buf()),
        _ => {
            let folder = settings.slow_dir.unwrap_or(Path::new("."));
            (Disk::of_folder(folder)?, folder.to_path_buf())
        }
    };
    bar.inc(1);
    disk.choose_io(IO_TIME / divisor)?;
    let disk_rate = disk.measure(DRIVE_TIME / divisor)?;
    doubts.extend(disk_rate.doubts(&disk_path));
    let alone = copies::measure(&mut copies, DRIVE_TIME / divisor, &mut doubts)?;
    bar.inc(2);
    let mut disks = vec![&mut disk];
    disks.extend(copies.iter_mut().map(|copy| &mut copy.disk));
    let (contended_gbps, disk_gbps) =
        measure_together(disks, &mut memory, &pool, main, CONTENTION_TIME / divisor)?;
    let together = Together {
        compute_gbps: contended_gbps,
        disk_gbps: disk_gbps.first().copied().unwrap_or_default(),
    };
    let of_copies = disk_gbps.get(1..).unwrap_or_default();
    let copies = copies::rates(copies, alone, of_copies);
    bar.inc(1);

    let work = opened.as_ref().map_or_else(Work::common, |(gguf, spec)| {
        Work::of_model(gguf, spec, &shares)
    });
    let gpus = gpu::measure_all(&work, &mut || memory.pass_gbps(&pool, main));
    drop(memory);
    bar.inc(1);
    let limit_bytes = limit
        .as_ref()
        .map_or(DEFAULT_DRAM_BYTES, |limit| limit.bytes);
    let nodes = nodes::measure(numa_nodes, kernels, &pool, &work.formats, limit_bytes)?;
    let gpu_power: Vec<Part> = gpus.found.iter().map(|gpu| gpu.power.clone()).collect();
    bar.finish_and_clear();
    let usage = Usage::between(&before, &Reading::now(), pool.n_threads());
    let signs = busy::Signs {
        processors: processors(&usage),
        load,
        memory_drift: compute.spread,
        drive_drift: disk_rate.gbps.spread,
    };
    doubts.splice(0..0, signs.doubt());

    let (dram_bytes, dram_bytes_from) = dram_capacity(limit.as_ref());
    let disk_bytes =
        file_system_space(&disk_path).map_or(1 << 40, |space| space.total_bytes.max(1));
    Ok(Findings {
        when: show_utc(SystemTime::now()),
        host: host::describe(),
        threads: pool.n_threads(),
        isa: kernels.isa().to_string(),
        model: opened.map(|(gguf, _)| gguf.id().name),
        bare_gbps,
        numa: settings.numa,
        prompt_gflops: LAYER_EFFICIENCY * mean_gflops(&rates, |rate| rate.batch_gflops),
        few_gflops: mean_gflops(&rates, |rate| rate.few_gflops.unwrap_or_default()),
        kernels: rates,
        compute_gbps,
        compute_iqr: compute.iqr,
        dram_bytes,
        dram_bytes_from,
        disk: disk_rate,
        disk_path,
        disk_bytes,
        copies,
        together,
        fixed,
        power: Power::of(&drawn, &gpu_power),
        gpus,
        nodes,
        doubts,
    })
}

/// Returns the common formats and those of the model, each once, in file-number order.
fn types_to_measure(shares: &[(TensorType, f64)]) -> Vec<TensorType> {
    let mut types: Vec<TensorType> = COMMON_FORMATS.to_vec();
    types.extend(shares.iter().map(|(ty, _)| ty));
    types.sort();
    types.dedup();
    types
}

/// Returns the bytes to stream through: at most a quarter of the process's limit, in whole stages.
///
/// # Errors
/// When that is too little for a meaningful rate.
pub(crate) fn bytes_to_measure(limit_bytes: Option<u64>) -> Result<u64> {
    let bytes = limit_bytes.map_or(MAX_MEMORY_BYTES, |limit| MAX_MEMORY_BYTES.min(limit / 4))
        / STAGE
        * STAGE;
    ensure!(
        bytes >= MIN_MEMORY_BYTES,
        "too little memory to measure with: {} available, expected {}; free {} or more",
        show_bytes(bytes),
        show_bytes(MIN_MEMORY_BYTES),
        show_bytes(4 * MIN_MEMORY_BYTES)
    );
    Ok(bytes)
}

fn kernel_rate(
    memory: &mut Memory,
    pool: &ThreadPool,
    ty: TensorType,
    share: Option<f64>,
) -> KernelRate {
    let counts = share.map_or(ty == TensorType::Q4_K, |share| share > 0.0);
    KernelRate {
        ty,
        gbps: memory.matvec_gbps(pool, ty),
        batch_gflops: memory.batch_gflops(pool, ty),
        few_gflops: counts.then(|| memory.few_gflops(pool, ty)),
        share,
    }
}

/// Replaces the fixed time per layer and the compute rate by those of the model's own layers.
fn adopt_own_layers(
    own: Result<fixed::OwnLayers>,
    compute_gbps: &mut f64,
    fixed: &mut Fixed,
    doubts: &mut Vec<String>,
) {
    let own = match own {
        Ok(own) => own,
        Err(error) => {
            doubts.push(format!(
                "the model's own layers could not be timed ({error:#}), so the fixed time per layer is the bundled model's"
            ));
            return;
        }
    };
    // The bare kernels skip a stage's synchronization and walk through memory in order.
    *compute_gbps = own.expert_gbps.value.min(*compute_gbps);
    fixed.layer_us = own.layer_us.max(fixed.entry_us);
    if own.expert_gbps.spread > MAX_TRUSTED_SPREAD {
        doubts.push(format!(
            "the model's own expert stages differ by {:.0} %",
            own.expert_gbps.spread * 100.0
        ));
    }
    fixed.how = format!(
        "layers: the model's dense stages, less their bytes; tokens: {}",
        fixed.how
    );
}

/// Most formats of a model that a quick measurement takes: those of the most bytes.
const MAX_QUICK_FORMATS: usize = 2;

/// Returns the formats with the largest shares of a token's bytes.
fn largest(shares: &[(TensorType, f64)]) -> Vec<TensorType> {
    let mut by_share = shares.to_vec();
    by_share.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    let largest = by_share.into_iter().take(MAX_QUICK_FORMATS);
    largest.map(|(ty, _)| ty).collect()
}

/// Measures memory and drives while all are in use, in 10⁹ bytes per second.
fn measure_together(
    disks: Vec<&mut Disk>,
    memory: &mut Memory,
    pool: &ThreadPool,
    main: TensorType,
    time: Duration,
) -> Result<(f64, Vec<f64>)> {
    let measured = std::thread::scope(|scope| {
        let mut reading = Vec::new();
        for disk in disks {
            let read = move || disk.measure(time);
            reading.push(std::thread::Builder::new().spawn_scoped(scope, read)?);
        }
        let mut passes = Vec::new();
        while reading.iter().all(|drive| !drive.is_finished()) {
            passes.push(memory.pass_gbps(pool, main));
        }
        // The last pass had the memory to itself for a while.
        if passes.len() > 1 {
            passes.pop();
        }
        let reads = reading.into_iter().map(|drive| drive.join());
        std::io::Result::Ok((Measured::of(passes).value, reads.collect::<Vec<_>>()))
    });
    let (compute_gbps, reads) =
        measured.context("starting a thread to measure memory and drive together")?;
    let rate = |read: std::thread::Result<Result<DiskRate>>| {
        let rate = read.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        anyhow::Ok(rate.gbps.value)
    };
    let rates: Result<Vec<f64>> = reads.into_iter().map(rate).collect();
    Ok((compute_gbps, rates?))
}

/// Returns the bytes of main memory that plans may use, and where that figure comes from.
fn dram_capacity(limit: Option<&Limit>) -> (u64, String) {
    match limit {
        Some(limit) => {
            let bytes = (limit.bytes - limit.bytes / RESERVE_DIVISOR) >> 20 << 20;
            (
                bytes,
                format!(
                    "{}, {}, less 1/{RESERVE_DIVISOR}",
                    limit.source,
                    show_bytes(limit.bytes)
                ),
            )
        }
        None => (
            DEFAULT_DRAM_BYTES,
            "assumed, since the system reports no limit".to_string(),
        ),
    }
}

/// Returns the mean matvec rate, weighted by each format's share of the bytes; that of Q4_K without
/// shares.
fn mean_rate(rates: &[KernelRate]) -> f64 {
    let seconds: f64 = rates
        .iter()
        .map(|r| r.share.unwrap_or(0.0) / r.gbps.value.max(1e-9))
        .sum();
    let shares: f64 = rates.iter().filter_map(|r| r.share).sum();
    let q4_k = rates
        .iter()
        .find(|r| r.ty == TensorType::Q4_K)
        .map_or(0.0, |r| r.gbps.value);
    if shares > 0.0 { shares / seconds } else { q4_k }
}

/// Returns the mean of a matmul rate, weighted by each format's share of the arithmetic; that of
/// Q4_K without shares.
fn mean_gflops(rates: &[KernelRate], of: impl Fn(&KernelRate) -> Measured) -> f64 {
    // Arithmetic is proportional to values, not to bytes.
    let values =
        |r: &KernelRate| r.share.unwrap_or(0.0) / r.ty.row_bytes(1 << 20).unwrap_or(4 << 20) as f64;
    let seconds = |r: &KernelRate| match values(r) {
        0.0 => 0.0,
        values => values / of(r).value.max(1e-9),
    };
    let seconds: f64 = rates.iter().map(seconds).sum();
    let all: f64 = rates.iter().map(values).sum();
    let q4_k = rates
        .iter()
        .find(|r| r.ty == TensorType::Q4_K)
        .map_or(0.0, |r| of(r).value);
    if all > 0.0 { all / seconds } else { q4_k }
}

fn open(path: &Path) -> Result<(Gguf, ModelSpec)> {
    let gguf = Gguf::open(path)?;
    let spec = describe(&gguf).map_err(|e| crate::opening::naming(path, e))?;
    ensure!(
        spec.moe_layers().next().is_some(),
        "{}: the model has no routed experts to read from a drive; measure without --model",
        path.display()
    );
    Ok((gguf, spec))
}

/// Returns the formats of the bytes that a decoded token reads, with their shares.
pub(crate) fn shares(gguf: &Gguf, spec: &ModelSpec) -> Vec<(TensorType, f64)> {
    let mut bytes = std::collections::BTreeMap::<TensorType, f64>::new();
    let dense = spec
        .dense_groups()
        .into_iter()
        .filter(|g| !g.kind.is_named_by_tokens());
    let dense = dense.flat_map(|g| g.tensors).map(|id| (id, 1.0));
    let experts = spec.moe_layers().flat_map(|(_, moe)| {
        moe.expert_tensors()
            .map(|id| (id, moe.n_used as f64 / moe.n_expert.max(1) as f64))
            .collect::<Vec<_>>()
    });
    for (id, part) in dense.chain(experts) {
        let tensor = &gguf.tensors()[id];
        *bytes.entry(tensor.ty).or_default() += part * tensor.n_bytes as f64;
    }
    let all: f64 = bytes.values().sum();
    bytes
        .into_iter()
        .map(|(ty, part)| (ty, part / all.max(1.0)))
        .collect()
}

#[cfg(test)]
mod tests;
