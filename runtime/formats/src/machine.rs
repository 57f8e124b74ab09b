//! `machine.toml`: the memory tiers of a machine with their capacities and measured or declared rates.

mod check;
mod wire;
mod write;

pub(crate) use check::check_tiers;
pub(super) use wire::{WireKind, check_unit};

use super::kind::MACHINE;
use crate::source_id::SourceId;
use crate::{FormatError, safely};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// The unit of transfer rates in messages.
const GBPS: &str = "10^9 bytes per second";

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

/// One tier.
#[derive(Debug, Clone, PartialEq)]
pub struct Tier {
    /// A short unique name, `vram`, `dram`, `slow`.
    pub name: String,
    /// What it is.
    pub kind: TierKind,
    /// Bytes it can hold.
    pub capacity_bytes: u64,
    /// Rate at which expert-sized pieces are read from it, in 10⁹ bytes a second.
    pub read_gbps: f64,
    /// Fixed time before the first byte of one read (slow tiers) or of one launch (VRAM), in microseconds.
    pub latency_us: f64,
    /// The rate, latency and capacity are declared, and run on top of real memory that is faster.
    pub emulated: bool,
    /// Which one of its kind: the memory node of host memory whose pages must be there, or the number of the GPU.
    pub unit: Option<u32>,
    /// Of VRAM, what computing there takes beside reading it.
    pub accelerator: Accelerator,
    /// Where the figures come from, in words: `measured 2026-11-22`, `spec`, a paper.
    pub source: String,
}

/// What computing on an accelerator takes beside reading its memory, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Accelerator {
    /// Rate at which what is brought there crosses its link, in 10⁹ bytes a second. Without it the link is taken to be no
    /// slower than what lies at its other end.
    pub link_gbps: Option<f64>,
    /// Fixed time of a layer whose attention is there and whose experts are not all there, beside that of any layer: its
    /// launches, and the way there and back; in microseconds.
    pub layer_us: Option<f64>,
    /// Fixed time of a layer of a model all of which is there, in place of all other fixed times of a layer, in
    /// microseconds.
    pub resident_layer_us: Option<f64>,
}

impl Accelerator {
    /// The keys of files, with what is known.
    pub(super) fn keys(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let all =
            [("link_gbps", self.link_gbps), ("layer_us", self.layer_us), ("resident_layer_us", self.resident_layer_us)];
        all.into_iter().filter_map(|(key, value)| Some((key, value?)))
    }

    /// Whether a file of this version may say so, as it may from the second number on.
    pub(super) fn check_version(&self, (version, from): (u64, u64)) -> Result<(), String> {
        match self.keys().next().filter(|_| version < from) {
            Some((key, _)) => {
                Err(format!("{key} is a key of version {from}; write `version = {from}`, or leave it out"))
            }
            None => Ok(()),
        }
    }
}

impl Tier {
    /// The memory node that its pages must be on.
    pub fn node(&self) -> Option<u32> {
        self.unit.filter(|_| self.medium() != Medium::Gpu)
    }

    /// The number of the GPU that it is the memory of, as the driver counts them from 0.
    pub fn device(&self) -> Option<u32> {
        self.unit.filter(|_| self.medium() == Medium::Gpu)
    }

    /// Seconds that so many bytes take from the tier `from` to slots here: the slower of its reads and this tier's link.
    pub fn transfer_s(&self, from: &Tier, bytes: f64) -> f64 {
        let gbps = self.accelerator.link_gbps.map_or(from.read_gbps, |link| link.min(from.read_gbps));
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

    /// The key of the unit in files, and the unit.
    pub(super) fn unit_key(&self) -> Option<(&'static str, u32)> {
        Some((if self.medium() == Medium::Gpu { "device" } else { "node" }, self.unit?))
    }
}

/// A machine: its tiers from fastest to slowest, the last one large enough for any model on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// What it is, in a sentence.
    pub description: String,
    /// Fastest first.
    pub tiers: Vec<Tier>,
    /// Fixed time a layer costs beyond its bytes (router, norms, synchronisation), in microseconds.
    pub layer_overhead_us: f64,
    /// Fixed time a token costs beyond its layers (sampling, embedding), in microseconds.
    pub token_overhead_us: f64,
    /// What the file may say besides.
    pub extras: Extras,
    /// Hash of the file it was read from; the name repeated.
    pub id: SourceId,
}

/// What a machine file may say besides the tiers.
#[derive(Debug, Clone, PartialEq)]
pub struct Extras {
    /// Share of `read_gbps` that experts compute at on the tiers that the CPU computes on; 1 where the rates were
    /// measured with the kernels that will run, less where they are bare memory rates.
    pub efficiency: f64,
    /// Rate at which model files are read when a model is loaded, in 10⁹ bytes a second.
    pub load_gbps: Option<f64>,
    /// Price of the whole machine, in US dollars.
    pub price_usd: Option<f64>,
    /// Power while decoding, at the wall, in watts.
    pub watts: Option<f64>,
    /// Where that figure comes from, in words.
    pub watts_source: Option<String>,
    /// Price of more of a tier, by its name, in US dollars for 10⁹ bytes.
    pub usd_per_gb: BTreeMap<String, f64>,
    /// Rate of products of many tokens with what lies on a tier, by its name, in 10⁹ floating-point operations a second
    /// (a multiply-accumulate is two).
    pub prompt_gflops: BTreeMap<String, f64>,
    /// Rates of the link to an accelerator, by the name of its tier.
    pub links: BTreeMap<String, Link>,
    /// The runs that rates and fixed times were fitted to, if they were.
    pub calibration: Option<Calibration>,
}

/// Rates of the link between main memory and an accelerator's memory, in 10⁹ bytes a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// To the accelerator from memory that it reads by itself.
    pub to_gbps: f64,
    /// To the accelerator from any other memory.
    pub to_pageable_gbps: f64,
    /// From the accelerator to memory that it writes by itself.
    pub from_gbps: f64,
    /// From the accelerator to any other memory.
    pub from_pageable_gbps: f64,
    /// As `to_gbps`, while the CPU's kernels read main memory.
    pub contended_gbps: f64,
    /// What these compute at meanwhile.
    pub dram_contended_gbps: f64,
}

impl Link {
    /// The rates with their keys in files.
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
    /// Runs.
    pub records: u32,
    /// Mean difference between predicted and measured time of a token, as a share of the measured one, before and after.
    pub error_before: f64,
    /// See above.
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
            usd_per_gb: BTreeMap::new(),
            prompt_gflops: BTreeMap::new(),
            links: BTreeMap::new(),
            calibration: None,
        }
    }
}

/// Reads a machine from the bytes of its file. `path` is only named in errors.
pub fn decode(bytes: &[u8], path: &Path) -> Result<Machine, FormatError> {
    let text = MACHINE.open_toml(bytes, path)?;
    let machine = wire::decode(text).map_err(|what| FormatError::invalid(path, what))?;
    machine.check().map_err(|what| FormatError::invalid(path, what))?;
    Ok(Machine { id: SourceId::of_bytes(&machine.name, bytes), ..machine })
}

/// Reads a machine file.
pub fn read(path: &Path) -> Result<Machine, FormatError> {
    decode(&MACHINE.read(path)?, path)
}

impl Machine {
    /// Writes the file, or says why its content would not be readable again.
    pub fn write(&self, path: &Path) -> Result<(), FormatError> {
        self.check().map_err(|what| FormatError::invalid(path, what))?;
        safely::write(path, self.encode().as_bytes())
    }

    /// The same machine with the identity that its own file would have.
    pub fn identified(mut self) -> Machine {
        self.id = SourceId::of_bytes(&self.name, self.encode().as_bytes());
        self
    }

    /// The tiers with the rates that experts compute at: those of the CPU's tiers times the efficiency.
    pub fn computing_tiers(&self) -> Vec<Tier> {
        let efficiency = self.extras.efficiency;
        let computing = |tier: &Tier| {
            let by_cpu = tier.medium() == Medium::Addressable;
            let mut tier = tier.clone();
            if by_cpu && efficiency != 1.0 {
                tier.source = format!("{} GB/s × {efficiency} efficiency; {}", tier.read_gbps, tier.source);
                tier.read_gbps *= efficiency;
            }
            tier
        };
        self.tiers.iter().map(computing).collect()
    }

    /// `[tiers]` rates of products of many tokens, 0 where they are not known; empty where none is. The CPU computes on
    /// several tiers, and reads what lies on a block device before it does, so the figure of one of these holds for all
    /// that have none of their own.
    pub fn prompt_gflops(&self) -> Vec<f64> {
        let known = &self.extras.prompt_gflops;
        let of_cpu = self.tiers.iter().filter(|t| t.medium() != Medium::Gpu).find_map(|t| known.get(&t.name));
        let of = |tier: &Tier| known.get(&tier.name).or(of_cpu.filter(|_| tier.medium() != Medium::Gpu));
        if known.is_empty() { Vec::new() } else { self.tiers.iter().map(|t| of(t).copied().unwrap_or(0.0)).collect() }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
pub(super) mod tests;
