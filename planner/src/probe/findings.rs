//! What is measured, and what came of it.

use super::disk::DiskRate;
use super::fixed::Fixed;
use super::gpu::Gpus;
use super::nodes::NodeRate;
use super::power::Power;
use super::{MAX_TRUSTED_SPREAD, Measured};
use std::path::{Path, PathBuf};
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::tiers::numa::NumaPolicy;
use tier_plan_runtime::tiers::shards::Shards;

/// What to measure, and with what.
#[derive(Debug, Clone, Copy, Default)]
pub struct Settings<'a> {
    /// Model whose formats and experts are used.
    pub model: Option<&'a Path>,
    /// Copies of the model on other drives, which reads are to be shared with.
    pub copies: &'a [PathBuf],
    /// Without a model: a folder on the slow tier's file system.
    pub slow_dir: Option<&'a Path>,
    /// Compute threads; the physical cores when `None`.
    pub threads: Option<usize>,
    /// Whether each NUMA node becomes a tier.
    pub numa_tiers: bool,
    /// NUMA policy of this process, if any.
    pub numa: Option<NumaPolicy>,
    /// Nodes that the policy stripes memory over.
    pub shards: Option<&'a Shards>,
    /// Whether to measure fewer formats, and the drive for a shorter time.
    pub is_quick: bool,
}

/// The compute rate of one format from main memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelRate {
    /// Block format.
    pub ty: TensorType,
    /// Matvec rate in 10⁹ bytes of weights per second.
    pub gbps: Measured,
    /// Prompt matmul rate in 10⁹ floating-point operations per second.
    pub batch_gflops: Measured,
    /// Rate of four tokens with weights from memory, in the same unit; measured where it counts
    /// for plans.
    pub few_gflops: Option<Measured>,
    /// Share of this format in the bytes per token, if a model was given.
    pub share: Option<f64>,
}

impl KernelRate {
    /// Returns a warning if repetitions of an important format differ too much.
    pub(super) fn doubt(&self) -> Option<String> {
        let share = self.share.unwrap_or(f64::from(self.ty == TensorType::Q4_K));
        (self.gbps.spread > MAX_TRUSTED_SPREAD && share > 0.1).then(|| {
            format!(
                "repetitions of {} matvecs differ by {:.0} %",
                self.ty,
                self.gbps.spread * 100.0
            )
        })
    }
}

/// Rates of memory and drive while both are in use, in 10⁹ bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Together {
    /// Matvecs from main memory.
    pub compute_gbps: f64,
    /// Reads of the drive.
    pub disk_gbps: f64,
}

/// Rates of a drive that has a copy of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct CopyRate {
    /// The copy: an absolute path.
    pub path: PathBuf,
    /// Rates of its drive alone.
    pub disk: DiskRate,
    /// Rate while memory and all drives are in use, in 10⁹ bytes per second.
    pub together_gbps: f64,
}

impl CopyRate {
    /// Returns the rate that plans count on, in 10⁹ bytes per second.
    pub fn gbps(&self) -> f64 {
        self.disk.gbps.value.min(self.together_gbps)
    }
}

/// Everything that was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Findings {
    /// UTC time, ISO 8601.
    pub when: String,
    /// CPU and memory in words.
    pub host: String,
    /// Compute threads.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub isa: String,
    /// Name of the model, if one was given.
    pub model: Option<String>,
    /// Bare read rate of main memory, in 10⁹ bytes per second.
    pub bare_gbps: f64,
    /// NUMA policy that was measured with, if any.
    pub numa: Option<NumaPolicy>,
    /// Compute rates by format.
    pub kernels: Vec<KernelRate>,
    /// Compute rate of the formats that one token of the model reads (Q4_K without a model), in 10⁹
    /// bytes per second.
    pub compute_gbps: f64,
    /// Interquartile range of its repetitions, as a part of their median.
    pub compute_iqr: f64,
    /// Prompt rate of the same formats, in 10⁹ floating-point operations per second.
    pub prompt_gflops: f64,
    /// Rate of four tokens in the same formats; 0 where it was not measured.
    pub few_gflops: f64,
    /// Bytes of main memory that plans may use.
    pub dram_bytes: u64,
    /// Human-readable source of that limit.
    pub dram_bytes_from: String,
    /// Rates of the drive.
    pub disk: DiskRate,
    /// File or folder that was read.
    pub disk_path: PathBuf,
    /// Bytes of its file system.
    pub disk_bytes: u64,
    /// Copies of the model on other drives.
    pub copies: Vec<CopyRate>,
    /// Rates of memory and drive while both are in use.
    pub together: Together,
    /// Fixed times per layer and token.
    pub fixed: Fixed,
    /// GPUs and their rates.
    pub gpus: Gpus,
    /// NUMA nodes and their rates, if requested.
    pub nodes: Vec<NodeRate>,
    /// Power that the machine draws.
    pub power: Power,
    /// Reasons to doubt the figures, as sentences.
    pub doubts: Vec<String>,
}
