//! `machine.toml`: the memory tiers of a machine with their capacities and measured or declared
//! rates.

mod check;
mod wire;
mod write;

pub(crate) use check::check_tiers;
pub(super) use wire::{WireIo, WireKind, check_unit};

use super::copies::ExpertCopy;
use super::kind::MACHINE;
use crate::source_id::SourceId;
use crate::tier_idx::PerTier;
use crate::{FormatError, safely};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// The unit of transfer rates in messages.
pub(super) const GBPS: &str = "10^9 bytes per second";

/// What kind of memory a tier is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TierKind {
    /// Memory of an accelerator; what lives here computes there.
    Vram,
    /// Main memory; what lives here computes on the CPU.
    Dram,
    /// Byte-addressable slow memory (Optane in App Direct mode), mapped and computed in place.
    Pmem,
    /// Memory behind a CXL link, mapped and computed in place.
    Cxl,
    /// A block device: bytes are read into a slot or a staging buffer before they compute.
    Nvme,
}

impl TierKind {
    /// Returns how its bytes are reached.
    pub fn medium(self) -> Medium {
        match self {
            TierKind::Vram => Medium::Gpu,
            TierKind::Dram | TierKind::Pmem | TierKind::Cxl => Medium::Addressable,
            TierKind::Nvme => Medium::Drive,
        }
    }

    /// Its name in files.
    pub fn as_str(self) -> &'static str {
        match self {
            TierKind::Vram => "vram",
            TierKind::Dram => "dram",
            TierKind::Pmem => "pmem",
            TierKind::Cxl => "cxl",
            TierKind::Nvme => "nvme",
        }
    }
}

/// How the bytes of a tier are reached, whether it is emulated or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Medium {
    /// A GPU's memory: what lives there computes on the GPU.
    Gpu,
    /// Host memory: what lives there computes on the CPU, in place.
    Addressable,
    /// A block device: bytes are read into memory before they compute.
    Drive,
}

impl fmt::Display for TierKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How the files of a drive are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DriveIo {
    /// Past the page cache (`O_DIRECT`), where the file system supports that.
    Direct,
    /// Through the page cache, then dropped from it.
    Buffered,
}

impl DriveIo {
    /// Its name in files.
    pub fn as_str(self) -> &'static str {
        match self {
            DriveIo::Direct => "direct",
            DriveIo::Buffered => "buffered",
        }
    }
}

/// The [source](Tier::source) of figures that only order tiers.
pub const NOT_MEASURED: &str = "not measured";

/// A memory tier of a machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Tier {
    /// A short unique name, `vram`, `dram`, `slow`.
    pub name: String,
    /// Its kind of memory.
    pub kind: TierKind,
    /// Bytes it can hold.
    pub capacity_bytes: u64,
    /// Rate at which expert-sized pieces are read from it, in 10⁹ bytes per second.
    pub read_gbps: f64,
    /// Fixed time before the first byte of one read (slow tiers) or of one launch (VRAM), in
    /// microseconds.
    pub latency_us: f64,
    /// Whether rate, latency, and capacity are declared, and run on top of real memory that is
    /// faster.
    pub emulated: bool,
    /// Which one of its kind: the NUMA node that host memory must be on, or the number of the GPU.
    pub unit: Option<u32>,
    /// Of VRAM, what computing there takes beside reading it.
    pub accelerator: Accelerator,
    /// Source of the figures: `measured 2026-11-22`, `spec`, a paper.
    pub source: String,
}

/// What computing on an accelerator takes beside reading its memory, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Accelerator {
    /// Rate of transfers to it over its link, in 10⁹ bytes per second. Without it, the link is
    /// taken to be no slower than the tier at its other end.
    pub link_gbps: Option<f64>,
    /// Fixed time per layer whose attention is there and whose experts are not all there, added to
    /// that of any layer, in microseconds: kernel launches and transfers of the hidden state.
    pub layer_us: Option<f64>,
    /// Fixed time per layer of a model that is fully on the GPU, in place of all other fixed times
    /// of a layer, in microseconds.
    pub resident_layer_us: Option<f64>,
}

impl Tier {
    /// Whether rate and latency say how fast a machine is, and not only which tier is faster: measured,
    /// declared, or from a specification.
    pub fn has_known_rate(&self) -> bool {
        self.source != NOT_MEASURED
    }
}

impl Accelerator {
    /// Returns the known figures with their keys in files.
    pub(super) fn keys(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let all = [
            ("link_gbps", self.link_gbps),
            ("layer_us", self.layer_us),
            ("resident_layer_us", self.resident_layer_us),
        ];
        all.into_iter()
            .filter_map(|(key, value)| Some((key, value?)))
    }

    /// Fails if a figure is known and the file's version is older than the one that introduced it,
    /// `from`.
    pub(super) fn check_version(&self, (version, from): (u64, u64)) -> Result<(), String> {
        match self.keys().next().filter(|_| version < from) {
            Some((key, _)) => Err(format!(
                "{key} is a key of version {from}; write `version = {from}`, or leave it out"
            )),
            None => Ok(()),
        }
    }
}

impl Tier {
    /// Returns the NUMA node that its pages must be on.
    pub fn node(&self) -> Option<u32> {
        self.unit.filter(|_| self.medium() != Medium::Gpu)
    }

    /// Returns the number of its GPU, as the driver counts them from 0.
    pub fn device(&self) -> Option<u32> {
        self.unit.filter(|_| self.medium() == Medium::Gpu)
    }

    /// Returns the seconds that `bytes` take from the tier `from` to slots here, at the slower of
    /// its reads and this tier's link.
    pub fn transfer_s(&self, from: &Tier, bytes: f64) -> f64 {
        let gbps = self
            .accelerator
            .link_gbps
            .map_or(from.read_gbps, |link| link.min(from.read_gbps));
        bytes / (gbps * 1e9)
    }

    /// Returns how its bytes are reached. An emulated tier has the medium that it stands for.
    pub fn medium(&self) -> Medium {
        self.kind.medium()
    }

    /// Whether it is a real GPU's memory, which no emulated tier is.
    pub fn is_gpu(&self) -> bool {
        self.medium() == Medium::Gpu && !self.emulated
    }

    /// Whether it is a real block device, whose reads take their own time.
    pub fn is_drive(&self) -> bool {
        self.medium() == Medium::Drive && !self.emulated
    }

    /// Returns the key of the unit in files, and the unit.
    pub(super) fn unit_key(&self) -> Option<(&'static str, u32)> {
        Some((
            if self.medium() == Medium::Gpu {
                "device"
            } else {
                "node"
            },
            self.unit?,
        ))
    }
}

/// A machine: its tiers from fastest to slowest, the last one large enough for any model on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// Name of the machine.
    pub name: String,
    /// What it is, in a sentence.
    pub description: String,
    /// The tiers, fastest first.
    pub tiers: Vec<Tier>,
    /// Fixed time per layer beyond its bytes (router, norms, synchronization), in microseconds.
    pub layer_overhead_us: f64,
    /// Fixed time per token beyond its layers (sampling, embedding), in microseconds.
    pub token_overhead_us: f64,
    /// Optional figures.
    pub extras: Extras,
    /// Hash of the file it was read from; the name repeated.
    pub id: SourceId,
}

/// Tokens per matmul in [`Extras::few_gflops`].
pub const FEW_ROWS: u32 = 4;

/// What a machine file may say besides the tiers.
#[derive(Debug, Clone, PartialEq)]
pub struct Extras {
    /// Share of `read_gbps` that experts compute at on addressable tiers: 1 where the rates were
    /// measured with the kernels that will run, less where they are bare memory rates.
    pub efficiency: f64,
    /// Rate at which model files are read when a model is loaded, in 10⁹ bytes per second.
    pub load_gbps: Option<f64>,
    /// Price of the whole machine, in US dollars.
    pub price_usd: Option<f64>,
    /// Power while decoding, at the wall, in watts.
    pub watts: Option<f64>,
    /// Source of `watts`.
    pub watts_source: Option<String>,
    /// By name of a drive's tier, how its files are read fastest.
    pub io: BTreeMap<String, DriveIo>,
    /// By name of a drive's tier, the copies of a model on other drives whose rates `read_gbps`
    /// has, too.
    pub copies: BTreeMap<String, Vec<ExpertCopy>>,
    /// Price of more capacity by tier name, in US dollars per 10⁹ bytes.
    pub usd_per_gb: BTreeMap<String, f64>,
    /// Matmul rate of prompts with weights on a tier, by tier name, in 10⁹ floating-point
    /// operations per second (a multiply-accumulate is two).
    pub prompt_gflops: BTreeMap<String, f64>,
    /// Rate of matmuls of [`FEW_ROWS`] tokens with weights from a tier's memory, by tier name, in the
    /// same unit.
    pub few_gflops: BTreeMap<String, f64>,
    /// Relative spread of the repetitions that `read_gbps` is the median of, by tier name: their
    /// interquartile range over the median.
    pub spread: BTreeMap<String, f64>,
    /// Rates of the link to an accelerator, by the name of its tier.
    pub links: BTreeMap<String, Link>,
    /// The runs that rates and fixed times were fitted to, if they were.
    pub calibration: Option<Calibration>,
}

/// Rates of the link between main memory and an accelerator's memory, in 10⁹ bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// To the accelerator from pinned memory.
    pub to_gbps: f64,
    /// To the accelerator from pageable memory.
    pub to_pageable_gbps: f64,
    /// From the accelerator to pinned memory.
    pub from_gbps: f64,
    /// From the accelerator to pageable memory.
    pub from_pageable_gbps: f64,
    /// As `to_gbps`, while the CPU's kernels read main memory.
    pub contended_gbps: f64,
    /// Rate of main memory, times the part of their rate that the CPU's kernels keep during such
    /// transfers.
    pub dram_contended_gbps: f64,
}

impl Link {
    /// Returns the rates with their keys in files.
    fn rates(&self) -> [(&'static str, f64); 6] {
        [
            ("to_gbps", self.to_gbps),
            ("to_pageable_gbps", self.to_pageable_gbps),
            ("from_gbps", self.from_gbps),
            ("from_pageable_gbps", self.from_pageable_gbps),
            ("contended_gbps", self.contended_gbps),
            ("dram_contended_gbps", self.dram_contended_gbps),
        ]
    }
}

/// What a machine's rates and fixed times were fitted to.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// When, in UTC: `2026-11-22T17:00:00Z`.
    pub when: String,
    /// Number of runs that were fitted to.
    pub records: u32,
    /// Mean relative error of the predicted time per token before fitting.
    pub error_before: f64,
    /// Mean relative error of the predicted time per token after fitting.
    pub error_after: f64,
}

impl Default for Extras {
    fn default() -> Self {
        Extras {
            efficiency: 1.0,
            load_gbps: None,
            price_usd: None,
            watts: None,
            watts_source: None,
            io: BTreeMap::new(),
            copies: BTreeMap::new(),
            usd_per_gb: BTreeMap::new(),
            prompt_gflops: BTreeMap::new(),
            few_gflops: BTreeMap::new(),
            spread: BTreeMap::new(),
            links: BTreeMap::new(),
            calibration: None,
        }
    }
}

/// Reads a machine from the bytes of its file. `path` is only named in errors.
pub fn decode(bytes: &[u8], path: &Path) -> Result<Machine, FormatError> {
    let text = MACHINE.open_toml(bytes, path)?;
    let machine = wire::decode(text).map_err(|what| FormatError::invalid(path, what))?;
    machine
        .check()
        .map_err(|what| FormatError::invalid(path, what))?;
    Ok(Machine {
        id: SourceId::of_bytes(&machine.name, bytes),
        ..machine
    })
}

/// Reads a machine file.
///
/// ```
/// use std::path::Path;
/// use tier_plan_formats::machine::{self, Medium};
///
/// let machine = machine::read(Path::new("../../profiles/machines/desktop-4090-ddr5-nvme.toml"))?;
/// assert_eq!(machine.tiers[0].medium(), Medium::Gpu);
/// assert!(machine.tiers.windows(2).all(|pair| pair[0].read_gbps >= pair[1].read_gbps));
/// # Ok::<(), tier_plan_formats::FormatError>(())
/// ```
///
/// # Errors
/// When the file can't be read, is another kind of file, is newer than this program, or its tiers
/// contradict each other.
pub fn read(path: &Path) -> Result<Machine, FormatError> {
    decode(&MACHINE.read(path)?, path)
}

impl Machine {
    /// Writes the file, or says why its content would not be readable again.
    pub fn write(&self, path: &Path) -> Result<(), FormatError> {
        self.check()
            .map_err(|what| FormatError::invalid(path, what))?;
        safely::write(path, self.encode().as_bytes())
    }

    /// Returns the machine with the identity that its own file would have.
    pub fn identified(mut self) -> Machine {
        self.id = SourceId::of_bytes(&self.name, self.encode().as_bytes());
        self
    }

    /// Returns the tiers with the rates that experts compute at: on addressable tiers, `read_gbps`
    /// times the efficiency.
    pub fn computing_tiers(&self) -> Vec<Tier> {
        let efficiency = self.extras.efficiency;
        let computing = |tier: &Tier| {
            let by_cpu = tier.medium() == Medium::Addressable;
            let mut tier = tier.clone();
            if by_cpu && efficiency != 1.0 {
                tier.source = format!(
                    "{} GB/s × {efficiency} efficiency; {}",
                    tier.read_gbps, tier.source
                );
                tier.read_gbps *= efficiency;
            }
            tier
        };
        self.tiers.iter().map(computing).collect()
    }

    /// Returns the matmul rate of prompts by tier: 0 where it is not known, empty where none is.
    /// Addressable tiers and drives all compute on the CPU, so one's figure holds for those that
    /// have none of their own.
    pub fn prompt_gflops(&self) -> PerTier<f64> {
        self.by_tier(&self.extras.prompt_gflops)
    }

    /// Returns the matmul rate of [`FEW_ROWS`] tokens by tier, as
    /// [`prompt_gflops`](Self::prompt_gflops) does.
    pub fn few_gflops(&self) -> PerTier<f64> {
        self.by_tier(&self.extras.few_gflops)
    }

    fn by_tier(&self, known: &BTreeMap<String, f64>) -> PerTier<f64> {
        let of_cpu = self
            .tiers
            .iter()
            .filter(|t| t.medium() != Medium::Gpu)
            .find_map(|t| known.get(&t.name));
        let of = |tier: &Tier| {
            known
                .get(&tier.name)
                .or(of_cpu.filter(|_| tier.medium() != Medium::Gpu))
        };
        if known.is_empty() {
            return PerTier::default();
        }
        self.tiers
            .iter()
            .map(|t| of(t).copied().unwrap_or(0.0))
            .collect()
    }
}

#[cfg(test)]
pub(super) mod tests;
