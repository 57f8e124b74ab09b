//! `machine.toml`: the memory tiers of a machine with their capacities and measured or declared rates.

mod wire;

pub(super) use wire::{WireKind, check_unit};

use super::kind::MACHINE;
use super::text::{check_amount, check_bytes, check_rate, float, quote};
use crate::source_id::SourceId;
use crate::units::parse_bytes;
use crate::{FormatError, safely};
use std::collections::{BTreeMap, HashMap, HashSet};
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

    fn check(&self, tier: &Tier) -> Result<(), String> {
        let name = &tier.name;
        if let Some((key, _)) = self.keys().next().filter(|_| tier.medium() != Medium::Gpu) {
            return Err(format!("tier '{name}' is of kind \"{}\": only VRAM has {key}; leave it out", tier.kind));
        }
        for (key, time) in self.keys().filter(|(key, _)| *key != "link_gbps") {
            check_amount(&format!("{key} of tier '{name}'"), time)?;
            if tier.emulated {
                return Err(format!(
                    "tier '{name}' is emulated and takes what the machine declares for a layer; leave {key} out"
                ));
            }
        }
        match self.link_gbps {
            Some(rate) => Ok(check_rate(&format!("link_gbps of tier '{name}'"), rate, GBPS)?),
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
    /// The file as text. The identity is not written: it is the hash of this text.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        out.push_str(&format!("format = {}\nversion = {}\n", quote(MACHINE.format), self.version()));
        out.push_str(&format!("name = {}\n", quote(&self.name)));
        out.push_str(&format!("description = {}\n", quote(&self.description)));
        out.push_str(&format!("layer_overhead_us = {}\n", float(self.layer_overhead_us)));
        out.push_str(&format!("token_overhead_us = {}\n", float(self.token_overhead_us)));
        let extras = &self.extras;
        let efficiency = (extras.efficiency != 1.0).then_some(extras.efficiency);
        for (key, value) in [
            ("efficiency", efficiency),
            ("load_gbps", extras.load_gbps),
            ("price_usd", extras.price_usd),
            ("watts", extras.watts),
        ] {
            if let Some(value) = value {
                out.push_str(&format!("{key} = {}\n", float(value)));
            }
        }
        if let Some(source) = &extras.watts_source {
            out.push_str(&format!("watts_source = {}\n", quote(source)));
        }
        if let Some(calibration) = &extras.calibration {
            out.push_str(&format!("\n[calibration]\nwhen = {}\n", quote(&calibration.when)));
            out.push_str(&format!("records = {}\n", calibration.records));
            out.push_str(&format!("error_before = {}\n", float(calibration.error_before)));
            out.push_str(&format!("error_after = {}\n", float(calibration.error_after)));
        }
        for tier in &self.tiers {
            out.push_str("\n[[tier]]\n");
            out.push_str(&format!("name = {}\n", quote(&tier.name)));
            out.push_str(&format!("kind = {}\n", quote(tier.kind.as_str())));
            out.push_str(&format!("capacity = {}\n", show_capacity(tier.capacity_bytes)));
            out.push_str(&format!("read_gbps = {}\n", float(tier.read_gbps)));
            out.push_str(&format!("latency_us = {}\n", float(tier.latency_us)));
            out.push_str(&format!("emulated = {}\n", tier.emulated));
            if let Some((key, number)) = tier.unit_key() {
                out.push_str(&format!("{key} = {number}\n"));
            }
            for (key, value) in tier.accelerator.keys() {
                out.push_str(&format!("{key} = {}\n", float(value)));
            }
            if let Some(price) = extras.usd_per_gb.get(&tier.name) {
                out.push_str(&format!("usd_per_gb = {}\n", float(*price)));
            }
            if let Some(rate) = extras.prompt_gflops.get(&tier.name) {
                out.push_str(&format!("prompt_gflops = {}\n", float(*rate)));
            }
            if let Some(link) = extras.links.get(&tier.name) {
                let rates = link.rates().map(|(key, rate)| format!("{key} = {}", float(rate)));
                out.push_str(&format!("link = {{ {} }}\n", rates.join(", ")));
            }
            out.push_str(&format!("source = {}\n", quote(&tier.source)));
        }
        out
    }

    /// The oldest version that has all its keys.
    fn version(&self) -> u32 {
        let extras = &self.extras;
        let units = self.tiers.iter().any(|t| t.unit.is_some());
        match () {
            () if self.tiers.iter().any(|t| t.accelerator != Accelerator::default()) => 4,
            () if units || !extras.links.is_empty() || extras.watts_source.is_some() => 3,
            () if extras.prompt_gflops.is_empty() && extras.calibration.is_none() => 1,
            () => 2,
        }
    }

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

    fn check(&self) -> Result<(), String> {
        let extras = &self.extras;
        if !(extras.efficiency > 0.0 && extras.efficiency <= 1.0) {
            return Err(format!("efficiency is {}, but must be above 0 and at most 1", extras.efficiency));
        }
        if let Some(rate) = extras.load_gbps {
            check_rate("load_gbps", rate, GBPS)?;
        }
        for (key, value) in [("price_usd", extras.price_usd), ("watts", extras.watts)] {
            check_amount(key, value.unwrap_or(0.0))?;
        }
        for (tier, price) in &extras.usd_per_gb {
            check_amount(&format!("usd_per_gb of tier '{tier}'"), *price)?;
        }
        for (tier, rate) in &extras.prompt_gflops {
            check_rate(&format!("prompt_gflops of tier '{tier}'"), *rate, "10^9 floating-point operations per second")?;
        }
        for (tier, link) in &extras.links {
            for (key, rate) in link.rates() {
                check_rate(&format!("link.{key} of tier '{tier}'"), rate, GBPS)?;
            }
        }
        if let Some(calibration) = &extras.calibration {
            check_amount("calibration.error_before", calibration.error_before)?;
            check_amount("calibration.error_after", calibration.error_after)?;
        }
        check_amount("layer_overhead_us", self.layer_overhead_us)?;
        check_amount("token_overhead_us", self.token_overhead_us)?;
        check_tiers(self.tiers.iter())?;
        for pair in self.tiers.windows(2) {
            if pair[0].read_gbps < pair[1].read_gbps {
                return Err(format!(
                    "tier '{}' ({} GB/s) stands before tier '{}' ({} GB/s); list the tiers from fastest to slowest, \
                     since experts that are not pinned live on the last one",
                    pair[0].name, pair[0].read_gbps, pair[1].name, pair[1].read_gbps
                ));
            }
        }
        Ok(())
    }
}

/// What holds for the tiers of a machine and of a plan alike, whatever their order.
pub(super) fn check_tiers<'a>(tiers: impl Iterator<Item = &'a Tier>) -> Result<(), String> {
    const MAX_TIERS: usize = 16;
    const MAX_UNIT: u32 = 1023;
    let mut names = HashSet::new();
    let mut drams = Vec::new();
    let mut units = HashMap::new();
    let mut last: Option<&Tier> = None;
    for tier in tiers {
        let name = &tier.name;
        if name.is_empty()
            || name.len() > 64
            || !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
        {
            return Err(format!("tier name {} must be 1 to 64 letters, digits, '-' or '_'", quote(name)));
        }
        if !names.insert(name.as_str()) {
            return Err(format!("two tiers are named '{name}'; give each its own name"));
        }
        if names.len() > MAX_TIERS {
            return Err(format!("more than {MAX_TIERS} tiers; merge those of like speed"));
        }
        if tier.capacity_bytes == 0 {
            return Err(format!("tier '{name}' has a capacity of 0; leave the tier out"));
        }
        check_bytes(&format!("the capacity of tier '{name}'"), tier.capacity_bytes)?;
        check_rate(&format!("read_gbps of tier '{name}'"), tier.read_gbps, GBPS)?;
        check_amount(&format!("latency_us of tier '{name}'"), tier.latency_us)?;
        tier.accelerator.check(tier)?;
        if tier.kind == TierKind::Dram {
            drams.push(tier);
        }
        if let Some((key, number)) = tier.unit_key() {
            if tier.medium() == Medium::Drive {
                return Err(format!("tier '{name}' is a block device, which has no {key}; leave the line out"));
            }
            if number > MAX_UNIT {
                return Err(format!("{key} of tier '{name}' is {number}, but {MAX_UNIT} is the most"));
            }
            if let Some(other) = units.insert((key, number), name) {
                return Err(format!("tiers '{other}' and '{name}' both have {key} {number}; merge them"));
            }
        }
        last = Some(tier);
    }
    if names.is_empty() {
        return Err("no tier; add a [[tier]] table for each kind of memory".into());
    }
    match drams.as_slice() {
        [_] => {}
        [] => return Err("no tier of kind \"dram\"; add the main memory, where the rest of the program works".into()),
        several => {
            if let Some(without) = several.iter().find(|t| t.unit.is_none()) {
                let [first, second, ..] = several else { return Ok(()) };
                return Err(format!(
                    "tiers '{}' and '{}' are both of kind \"dram\", and '{}' does not say which memory node it is; there \
                     can be only one, or one for each `node`",
                    first.name, second.name, without.name
                ));
            }
        }
    }
    match last.filter(|t| t.node().is_some()) {
        // What lives there for good is looked at in the mapped file, whose pages the system puts where it likes.
        Some(tier) => Err(format!(
            "tier '{}' is the last one, where experts stay in the mapped file, and has a `node`; leave the line out, or \
             add the drive as the last tier",
            tier.name
        )),
        None => Ok(()),
    }
}

/// A capacity for people when that is short and exact (`"24GiB"`, `"768GB"`), else the number of bytes.
fn show_capacity(bytes: u64) -> String {
    const UNITS: [(u64, &str); 7] = [
        (1 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
        (1_000_000_000_000, "TB"),
        (1_000_000_000, "GB"),
        (1_000_000, "MB"),
    ];
    for (scale, unit) in UNITS {
        let text = format!("{}{unit}", bytes as f64 / scale as f64);
        // A longer decimal says no more than the number of bytes does.
        if bytes >= scale && text.len() <= 10 && parse_bytes(&text) == Ok(bytes) {
            return quote(&text);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
#[path = "machine_tests.rs"]
pub(super) mod tests;
