//! What this machine can do, measured: the rates and times that the cost model charges.
//!
//! Every rate is that of the program's own work: experts are multiplied by the kernels that will run, on all threads,
//! from memory on huge pages; and they are read from the drive by the readers that will read them, in pieces as large as
//! an expert's, past the page cache.

pub mod disk;
pub mod fixed;
pub mod gpu;
pub mod memory;
pub mod nodes;
pub mod power;

use crate::{host, progress};
use anyhow::{Context, Result, ensure};
use disk::{Disk, DiskRate};
use fixed::Fixed;
use gpu::{Gpus, Work};
use memory::{Memory, STAGE};
use nodes::NodeRate;
use power::{Meter, Part, Power};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::{Accelerator, Extras, Machine, Tier, TierKind};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::kernels::Kernels;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::shape::DenseKind;
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::threads::ThreadPool;
use tier_plan_runtime::tiers::bandwidth::dram_read_gbps;
use tier_plan_runtime::tiers::limits::{file_system_space, memory_limit};
use tier_plan_runtime::units::{show_bytes, show_utc};

/// Memory that is streamed through, at most: more than any last-level cache.
const MEMORY: u64 = 1 << 30;

/// The least that is worth measuring.
const LEAST_MEMORY: u64 = 64 << 20;

/// How long the drive is read for each figure.
const DISK_TIME: Duration = Duration::from_secs(6);

/// How long memory and drive are used at once.
const BOTH_TIME: Duration = Duration::from_secs(3);

/// The part of the memory that a plan is not given: the program, activations, the system.
const KEPT_FREE: u64 = 16;

/// What the layers of a prompt reach of the rate of products alone: norms, rotations and activations come between them.
/// Measured with AMX: 473 of 591 GFLOP/s.
const IN_LAYERS: f64 = 0.8;

/// Memory of a machine that does not tell.
const UNTOLD: u64 = 16 << 30;

/// Spread of repetitions from which on a figure is doubted.
const DOUBTFUL: f64 = 0.15;

/// The formats that most files have.
const COMMON: [TensorType; 12] = [
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
    TensorType::BF16,
    TensorType::F32,
];

/// A figure that was measured several times.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// The median.
    pub value: f64,
    /// Difference between the largest and the smallest, as a share of the median.
    pub spread: f64,
}

impl Measured {
    /// Of repetitions; of none, 0.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (Some(first), Some(last)) = (values.first(), values.last()) else {
            return Measured { value: 0.0, spread: 0.0 };
        };
        let middle = values.len() / 2;
        let value = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Measured { value, spread: if value > 0.0 { (last - first) / value } else { 0.0 } }
    }

    /// Of many short repetitions, in the order of time: the median of all, and the spread of the means of fifths, since
    /// single ones say more of the moment than of the machine.
    pub fn of_many(values: &[f64]) -> Self {
        let fifths: Vec<f64> = values
            .chunks(values.len().div_ceil(5).max(1))
            .map(|part| part.iter().sum::<f64>() / part.len() as f64)
            .collect();
        Measured { value: Measured::of(values.to_vec()).value, spread: Measured::of(fifths).spread }
    }
}

/// What to measure, and with what.
#[derive(Debug, Clone, Copy, Default)]
pub struct Settings<'a> {
    /// The model whose types and bytes are used.
    pub model: Option<&'a Path>,
    /// Without a model: the folder whose file system is the slow tier.
    pub slow_dir: Option<&'a Path>,
    /// Threads; the physical cores when `None`.
    pub threads: Option<usize>,
    /// Each memory node is a tier.
    pub numa_tiers: bool,
}

/// The rate at which products of one format are computed from main memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelRate {
    /// The format.
    pub ty: TensorType,
    /// Weights in 10⁹ bytes a second.
    pub gbps: Measured,
    /// Products of a batch of a prompt, in 10⁹ floating-point operations a second.
    pub batch_gflops: Measured,
    /// Share of a token's bytes that are of this format, where a model was given.
    pub share: Option<f64>,
}

/// All that was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Findings {
    /// UTC moment.
    pub when: String,
    /// Processor and memory, in words.
    pub host: String,
    /// Threads.
    pub threads: usize,
    /// Instruction set.
    pub isa: String,
    /// The model, if one was given.
    pub model: Option<String>,
    /// Rate of bare reads of main memory, in 10⁹ bytes a second.
    pub bare_gbps: f64,
    /// By format.
    pub kernels: Vec<KernelRate>,
    /// What experts compute at: of the formats that a token of the model reads, or of Q4_K.
    pub compute_gbps: f64,
    /// What batches of prompts compute at, of the same formats, in 10⁹ floating-point operations a second.
    pub prompt_gflops: f64,
    /// Bytes of main memory that plans may have.
    pub dram_bytes: u64,
    /// Where that figure comes from.
    pub dram_bytes_from: String,
    /// The drive.
    pub disk: DiskRate,
    /// The file or folder that was read.
    pub disk_path: PathBuf,
    /// Bytes of its file system.
    pub disk_bytes: u64,
    /// The same two rates while both are in use: products from memory, and reads.
    pub together_gbps: (f64, f64),
    /// Fixed times.
    pub fixed: Fixed,
    /// GPUs.
    pub gpus: Gpus,
    /// Memory nodes, where they were asked for.
    pub nodes: Vec<NodeRate>,
    /// What the machine draws.
    pub power: Power,
    /// What makes the figures doubtful, in sentences.
    pub doubts: Vec<String>,
}

/// Measures this machine. Shows progress on a terminal.
///
/// # Errors
/// When the model can't be opened or has no routed experts, there is no memory to measure with, or the drive can't be
/// read or written to.
pub fn measure(settings: &Settings<'_>) -> Result<Findings> {
    let mut doubts: Vec<String> = busy().into_iter().collect();
    let kernels = Kernels::from_env()?;
    // Told before anything is measured that can't be had.
    let memory_nodes = if settings.numa_tiers {
        tier_plan_runtime::tiers::nodes::nodes().context("--numa-tiers")?
    } else {
        Vec::new()
    };
    let pool = ThreadPool::new(settings.threads.unwrap_or_else(tier_plan_runtime::threads::physical_cores));
    let threads = pool.n_threads();
    let opened = settings.model.map(open).transpose()?;
    let shares = opened.as_ref().map(|(gguf, spec)| shares(gguf, spec)).unwrap_or_default();
    let mut types: Vec<TensorType> = COMMON.to_vec();
    types.extend(shares.iter().map(|(ty, _)| ty));
    types.sort();
    types.dedup();

    let bar = progress::count("measuring", types.len() as u64 + 7);
    // The program is small, so what it may have now is what a plan's engine may have.
    let limit = memory_limit();
    let bytes = limit.as_ref().map_or(MEMORY, |l| MEMORY.min(l.bytes / 4)) / STAGE * STAGE;
    ensure!(
        bytes >= LEAST_MEMORY,
        "there are only {} of memory to measure with; free {} or more",
        show_bytes(bytes),
        show_bytes(4 * LEAST_MEMORY)
    );
    let bare_gbps = dram_read_gbps(&pool, kernels, bytes)?;
    bar.inc(1);

    let mut memory = Memory::new(kernels, bytes)?;
    let mut rates = Vec::new();
    let meter = Meter::start();
    for &ty in &types {
        let gbps = memory.products(&pool, ty);
        let of = |shares: &[(TensorType, f64)]| shares.iter().find(|(t, _)| *t == ty).map_or(0.0, |(_, s)| *s);
        let share = opened.is_some().then(|| of(&shares));
        if gbps.spread > DOUBTFUL && share.unwrap_or(f64::from(ty == TensorType::Q4_K)) > 0.1 {
            doubts.push(format!("repetitions of {ty} products differ by {:.0} %", gbps.spread * 100.0));
        }
        rates.push(KernelRate { ty, gbps, batch_gflops: memory.batch_gflops(&pool, ty), share });
        bar.inc(1);
    }
    let drawn = meter.parts();
    let mut compute_gbps = mean_rate(&rates);
    let prompt_gflops = IN_LAYERS * mean_gflops(&rates);
    // The format that a token reads most of.
    let main = rates.iter().max_by(|a, b| a.share.unwrap_or(0.0).total_cmp(&b.share.unwrap_or(0.0)));
    let main = if opened.is_some() { main.map_or(TensorType::Q4_K, |r| r.ty) } else { TensorType::Q4_K };

    let mut fixed = fixed::measure(&pool, &mut memory)?;
    if let Some(path) = settings.model {
        match fixed::own_layers(path, threads) {
            Ok(own) => {
                // The kernels alone don't pay for a stage's beginning and end, and walk through memory in order.
                compute_gbps = own.expert_gbps.value.min(compute_gbps);
                fixed.layer_us = own.layer_us.max(fixed.entry_us);
                if own.expert_gbps.spread > DOUBTFUL {
                    doubts.push(format!(
                        "the model's own expert stages differ by {:.0} %",
                        own.expert_gbps.spread * 100.0
                    ));
                }
                fixed.how = format!("layers: the model's dense stages, less their bytes; tokens: {}", fixed.how);
            }
            Err(error) => doubts.push(format!(
                "the model's own layers could not be timed ({error:#}), so their fixed time is the bundled model's"
            )),
        }
    }
    bar.inc(1);

    let here = PathBuf::from(".");
    let (mut disk, disk_path) = match (&opened, settings.model) {
        (Some((gguf, spec)), Some(path)) => (Disk::of_model(gguf, spec)?, path.to_path_buf()),
        _ => {
            let folder = settings.slow_dir.unwrap_or(&here);
            (Disk::of_folder(folder)?, folder.to_path_buf())
        }
    };
    bar.inc(1);
    let rate = disk.measure(DISK_TIME)?;
    bar.inc(2);
    if rate.gbps.spread > DOUBTFUL {
        doubts.push(format!("reads of the drive differ by {:.0} %", rate.gbps.spread * 100.0));
    }
    if !rate.direct {
        doubts.push(format!(
            "the file system of {} has no reads past the page cache, so what was measured may be memory",
            disk_path.display()
        ));
    }
    let (both, reads) = std::thread::scope(|scope| {
        let reading = scope.spawn(|| disk.measure(BOTH_TIME));
        let mut passes = Vec::new();
        while !reading.is_finished() {
            passes.push(memory.pass_gbps(&pool, main));
        }
        // The last pass had the memory to itself for a part.
        if passes.len() > 1 {
            passes.pop();
        }
        (Measured::of(passes).value, reading.join())
    });
    let reads = reads.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    bar.inc(1);
    let work = opened.as_ref().map_or_else(Work::common, |(gguf, spec)| Work::of_model(gguf, spec, &shares));
    let gpus = gpu::measure_all(&work, &mut || memory.pass_gbps(&pool, main));
    drop(memory);
    bar.inc(1);
    let limit_bytes = limit.as_ref().map_or(UNTOLD, |limit| limit.bytes);
    let nodes = nodes::measure(memory_nodes, kernels, &pool, &work.formats, limit_bytes)?;
    let gpu_power: Vec<Part> = gpus.found.iter().map(|gpu| gpu.power.clone()).collect();
    bar.finish_and_clear();

    let (dram_bytes, dram_bytes_from) = match &limit {
        Some(limit) => {
            let bytes = (limit.bytes - limit.bytes / KEPT_FREE) >> 20 << 20;
            (bytes, format!("{}, {}, less a {KEPT_FREE}th", limit.source, show_bytes(limit.bytes)))
        }
        None => (UNTOLD, "the system tells of no limit: assumed".to_string()),
    };
    let disk_bytes = file_system_space(&disk_path).map_or(1 << 40, |space| space.total_bytes.max(1));
    Ok(Findings {
        when: show_utc(SystemTime::now()),
        host: host::describe(),
        threads,
        isa: kernels.isa().to_string(),
        model: opened.map(|(gguf, _)| gguf.id().name),
        bare_gbps,
        kernels: rates,
        compute_gbps,
        prompt_gflops,
        dram_bytes,
        dram_bytes_from,
        disk: rate,
        disk_path,
        disk_bytes,
        together_gbps: (both, reads.gbps.value),
        fixed,
        power: Power::of(&drawn, &gpu_power),
        gpus,
        nodes,
        doubts,
    })
}

impl Findings {
    /// The machine that they describe.
    pub fn machine(&self) -> Machine {
        let day = self.when.split('T').next().unwrap_or_default();
        let of = match &self.model {
            Some(model) => format!("the formats that a token of {model} reads"),
            None => "Q4_K".to_string(),
        };
        let compute = rounded(self.compute_gbps);
        // Experts are read while others compute. A plan's tiers go from fast to slow.
        let read = rounded(self.disk.gbps.value.min(self.together_gbps.1)).min(compute);
        let dram = Tier {
            name: "dram".into(),
            kind: TierKind::Dram,
            capacity_bytes: self.dram_bytes,
            read_gbps: compute,
            latency_us: 0.0,
            emulated: false,
            unit: None,
            accelerator: Accelerator::default(),
            source: format!(
                "measured {day}: products of {of} with {} threads and {} kernels; bare reads {:.1} GB/s; while the drive \
                 is read {:.1} GB/s; capacity: {}",
                self.threads, self.isa, self.bare_gbps, self.together_gbps.0, self.dram_bytes_from
            ),
        };
        let how = if self.disk.direct { "past the page cache" } else { "through the page cache" };
        let slow = Tier {
            name: "nvme".into(),
            kind: TierKind::Nvme,
            capacity_bytes: self.disk_bytes,
            read_gbps: read,
            latency_us: rounded(self.disk.latency_us.value),
            emulated: false,
            unit: None,
            accelerator: Accelerator::default(),
            source: format!(
                "measured {day}: reads of {} {how}, 1 to 8 at once, while the cores compute; alone {:.2} GB/s",
                show_bytes(self.disk.piece_bytes),
                self.disk.gbps.value
            ),
        };
        let how = format!("products of {of} with {} threads and {} kernels", self.threads, self.isa);
        let main_memory = self.nodes.iter().map(|node| node.tier(day, &how));
        let mut tiers: Vec<Tier> = main_memory.collect();
        let computing = if tiers.is_empty() { "dram".to_string() } else { tiers[0].name.clone() };
        if tiers.is_empty() {
            tiers.push(dram);
        }
        let mut prompt_gflops = BTreeMap::from([(computing, rounded(self.prompt_gflops).max(1e-5))]);
        let mut links = BTreeMap::new();
        for gpu in self.gpus.found.iter().filter(|gpu| gpu.capacity_bytes() > 0) {
            let name = if self.gpus.found.len() > 1 { format!("vram{}", gpu.device) } else { "vram".to_string() };
            links.insert(name.clone(), gpu.link());
            if let Some(experts) = &gpu.experts {
                prompt_gflops.insert(name.clone(), rounded(experts.batch_gflops).max(1e-5));
            }
            tiers.push(gpu.tier(name, self.fixed.token_us, day));
        }
        tiers.sort_by(|a, b| b.read_gbps.total_cmp(&a.read_gbps));
        let slowest = tiers.last().map_or(compute, |t| t.read_gbps);
        tiers.push(Tier { read_gbps: slow.read_gbps.min(slowest), ..slow });
        Machine {
            name: "probed".into(),
            description: format!("measured on {day}: {}", self.host),
            tiers,
            layer_overhead_us: rounded(self.fixed.layer_us),
            token_overhead_us: rounded(self.fixed.token_us),
            extras: Extras {
                prompt_gflops,
                links,
                watts: self.power.watts,
                watts_source: self.power.watts.map(|_| self.power.how.clone()),
                ..Extras::default()
            },
            id: SourceId { name: "probed".into(), hash: String::new() },
        }
        .identified()
    }
}

/// Three or four digits, never nothing of something.
fn rounded(value: f64) -> f64 {
    let digits = if value < 0.1 {
        1e5
    } else if value < 10.0 {
        1e3
    } else {
        1e1
    };
    let short = (value * digits).round() / digits;
    if short > 0.0 { short } else { value.max(0.0) }
}

/// The rate of all formats together, each by its share of the bytes; that of Q4_K where there are no shares.
fn mean_rate(rates: &[KernelRate]) -> f64 {
    let seconds: f64 = rates.iter().map(|r| r.share.unwrap_or(0.0) / r.gbps.value.max(1e-9)).sum();
    let shares: f64 = rates.iter().filter_map(|r| r.share).sum();
    let q4_k = rates.iter().find(|r| r.ty == TensorType::Q4_K).map_or(0.0, |r| r.gbps.value);
    if shares > 0.0 { shares / seconds } else { q4_k }
}

/// The rate of batches of all formats together, each by its share of the products; that of Q4_K where there are no
/// shares.
fn mean_gflops(rates: &[KernelRate]) -> f64 {
    // Bytes of a format stand for as many values as fit them.
    let values = |r: &KernelRate| r.share.unwrap_or(0.0) / r.ty.row_bytes(1 << 20).unwrap_or(4 << 20) as f64;
    let seconds: f64 = rates.iter().map(|r| values(r) / r.batch_gflops.value.max(1e-9)).sum();
    let all: f64 = rates.iter().map(values).sum();
    let q4_k = rates.iter().find(|r| r.ty == TensorType::Q4_K).map_or(0.0, |r| r.batch_gflops.value);
    if all > 0.0 { all / seconds } else { q4_k }
}

/// A sentence if other programs keep the machine busy.
fn busy() -> Option<String> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    let load: f64 = text.split_whitespace().next()?.parse().ok()?;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let is_busy = load > 0.5 * cores as f64;
    is_busy.then(|| format!("the machine is busy: a load of {load} on {cores} cores"))
}

fn open(path: &Path) -> Result<(Gguf, ModelSpec)> {
    let gguf = Gguf::open(path)?;
    let spec = describe(&gguf).map_err(|e| crate::session::naming(path, e))?;
    ensure!(
        spec.moe_layers().next().is_some(),
        "{}: the model has no routed experts to read from a drive; measure without --model",
        path.display()
    );
    Ok((gguf, spec))
}

/// The formats of the bytes that a decoded token reads, with their shares.
fn shares(gguf: &Gguf, spec: &ModelSpec) -> Vec<(TensorType, f64)> {
    let mut bytes = std::collections::BTreeMap::<TensorType, f64>::new();
    let dense = spec.dense_groups().into_iter().filter(|g| g.kind != DenseKind::Embedding);
    let dense = dense.flat_map(|g| g.tensors).map(|id| (id, 1.0));
    let experts = spec.moe_layers().flat_map(|(_, moe)| {
        moe.expert_tensors().map(|id| (id, moe.n_used as f64 / moe.n_expert.max(1) as f64)).collect::<Vec<_>>()
    });
    for (id, part) in dense.chain(experts) {
        let tensor = &gguf.tensors()[id];
        *bytes.entry(tensor.ty).or_default() += part * tensor.n_bytes as f64;
    }
    let all: f64 = bytes.values().sum();
    bytes.into_iter().map(|(ty, part)| (ty, part / all.max(1.0))).collect()
}

#[cfg(test)]
mod tests;
