//! `machine.toml`: the memory tiers of a machine with their capacities and measured or declared rates.

use super::kind::{MACHINE, toml_words};
use super::text::{check_amount, check_bytes, float, quote};
use super::{FormatError, SourceId, safely};
use crate::units::parse_bytes;
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;

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
    /// Where the figures come from, in words: `measured 2026-11-22`, `spec`, a paper.
    pub source: String,
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
    /// Price of more of a tier, by its name, in US dollars for 10⁹ bytes.
    pub usd_per_gb: BTreeMap<String, f64>,
    /// Rate of products of many tokens with what lies on a tier, by its name, in 10⁹ floating-point operations a second
    /// (a multiply-accumulate is two).
    pub prompt_gflops: BTreeMap<String, f64>,
    /// The runs that rates and fixed times were fitted to, if they were.
    pub calibration: Option<Calibration>,
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
            usd_per_gb: BTreeMap::new(),
            prompt_gflops: BTreeMap::new(),
            calibration: None,
        }
    }
}

/// Reads a machine from the bytes of its file. `path` is only named in errors.
pub fn decode(bytes: &[u8], path: &Path) -> Result<Machine, FormatError> {
    let text = MACHINE.open_toml(bytes, path)?;
    let wire: WireMachine = toml::from_str(text).map_err(|e| FormatError::invalid(path, toml_words(text, &e)))?;
    if wire.version < 2 && (wire.calibration.is_some() || wire.tier.iter().any(|t| t.prompt_gflops.is_some())) {
        let what = "prompt_gflops and calibration are keys of version 2; write `version = 2`, or leave them out";
        return Err(FormatError::invalid(path, what));
    }
    let prices = wire.tier.iter().filter_map(|t| Some((t.name.clone(), t.usd_per_gb?)));
    let products = wire.tier.iter().filter_map(|t| Some((t.name.clone(), t.prompt_gflops?)));
    let machine = Machine {
        id: SourceId::of_bytes(&wire.name, bytes),
        extras: Extras {
            efficiency: wire.efficiency.unwrap_or(1.0),
            load_gbps: wire.load_gbps,
            price_usd: wire.price_usd,
            watts: wire.watts,
            usd_per_gb: prices.collect(),
            prompt_gflops: products.collect(),
            calibration: wire.calibration.map(Calibration::from),
        },
        name: wire.name,
        description: wire.description,
        tiers: wire.tier.into_iter().map(WireTier::into_tier).collect(),
        layer_overhead_us: wire.layer_overhead_us,
        token_overhead_us: wire.token_overhead_us,
    };
    machine.check().map_err(|what| FormatError::invalid(path, what))?;
    Ok(machine)
}

/// Reads a machine file.
pub fn read(path: &Path) -> Result<Machine, FormatError> {
    decode(&MACHINE.read(path)?, path)
}

impl Machine {
    /// The file as text. The identity is not written: it is the hash of this text.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        let version = if self.extras.prompt_gflops.is_empty() && self.extras.calibration.is_none() { 1 } else { 2 };
        out.push_str(&format!("format = {}\nversion = {version}\n", quote(MACHINE.format)));
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
            if let Some(price) = extras.usd_per_gb.get(&tier.name) {
                out.push_str(&format!("usd_per_gb = {}\n", float(*price)));
            }
            if let Some(rate) = extras.prompt_gflops.get(&tier.name) {
                out.push_str(&format!("prompt_gflops = {}\n", float(*rate)));
            }
            out.push_str(&format!("source = {}\n", quote(&tier.source)));
        }
        out
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
            let by_cpu = matches!(tier.kind, TierKind::Dram | TierKind::Pmem | TierKind::Cxl);
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
        let of_cpu = self.tiers.iter().filter(|t| t.kind != TierKind::Vram).find_map(|t| known.get(&t.name));
        let of = |tier: &Tier| known.get(&tier.name).or(of_cpu.filter(|_| tier.kind != TierKind::Vram));
        if known.is_empty() { Vec::new() } else { self.tiers.iter().map(|t| of(t).copied().unwrap_or(0.0)).collect() }
    }

    fn check(&self) -> Result<(), String> {
        let extras = &self.extras;
        if !(extras.efficiency > 0.0 && extras.efficiency <= 1.0) {
            return Err(format!("efficiency is {}, but must be above 0 and at most 1", extras.efficiency));
        }
        if let Some(rate) = extras.load_gbps.filter(|rate| !(rate.is_finite() && *rate > 0.0)) {
            return Err(format!("load_gbps is {rate}, but must be a positive finite number of 10^9 bytes a second"));
        }
        for (key, value) in [("price_usd", extras.price_usd), ("watts", extras.watts)] {
            check_amount(key, value.unwrap_or(0.0))?;
        }
        for (tier, price) in &extras.usd_per_gb {
            check_amount(&format!("usd_per_gb of tier '{tier}'"), *price)?;
        }
        if let Some((tier, rate)) = extras.prompt_gflops.iter().find(|(_, rate)| !(rate.is_finite() && **rate > 0.0)) {
            return Err(format!("prompt_gflops of tier '{tier}' is {rate}, but must be a positive finite number"));
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
    let mut names = HashSet::new();
    let mut drams = Vec::new();
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
        if !(tier.read_gbps.is_finite() && tier.read_gbps > 0.0) {
            return Err(format!(
                "read_gbps of tier '{name}' is {}, but must be a positive finite number of 10^9 bytes a second",
                tier.read_gbps
            ));
        }
        check_amount(&format!("latency_us of tier '{name}'"), tier.latency_us)?;
        if tier.kind == TierKind::Dram {
            drams.push(name.as_str());
        }
    }
    if names.is_empty() {
        return Err("no tier; add a [[tier]] table for each kind of memory".into());
    }
    match drams.as_slice() {
        [_] => Ok(()),
        [] => Err("no tier of kind \"dram\"; add the main memory, where the rest of the program works".into()),
        [first, second, ..] => {
            Err(format!("tiers '{first}' and '{second}' are both of kind \"dram\"; there can be only one"))
        }
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireMachine {
    #[serde(rename = "format")]
    _format: String,
    version: u64,
    name: String,
    #[serde(default)]
    description: String,
    layer_overhead_us: f64,
    token_overhead_us: f64,
    efficiency: Option<f64>,
    load_gbps: Option<f64>,
    price_usd: Option<f64>,
    watts: Option<f64>,
    calibration: Option<WireCalibration>,
    tier: Vec<WireTier>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireCalibration {
    when: String,
    records: u32,
    error_before: f64,
    error_after: f64,
}

impl From<WireCalibration> for Calibration {
    fn from(wire: WireCalibration) -> Calibration {
        let WireCalibration { when, records, error_before, error_after } = wire;
        Calibration { when, records, error_before, error_after }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireTier {
    name: String,
    kind: WireKind,
    #[serde(deserialize_with = "capacity")]
    capacity: u64,
    read_gbps: f64,
    latency_us: f64,
    #[serde(default)]
    emulated: bool,
    usd_per_gb: Option<f64>,
    prompt_gflops: Option<f64>,
    source: String,
}

impl WireTier {
    fn into_tier(self) -> Tier {
        Tier {
            name: self.name,
            kind: self.kind.into(),
            capacity_bytes: self.capacity,
            read_gbps: self.read_gbps,
            latency_us: self.latency_us,
            emulated: self.emulated,
            source: self.source,
        }
    }
}

/// [`TierKind`] as files spell it.
#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub(super) enum WireKind {
    Vram,
    Dram,
    Pmem,
    Cxl,
    Nvme,
}

impl From<WireKind> for TierKind {
    fn from(kind: WireKind) -> TierKind {
        match kind {
            WireKind::Vram => TierKind::Vram,
            WireKind::Dram => TierKind::Dram,
            WireKind::Pmem => TierKind::Pmem,
            WireKind::Cxl => TierKind::Cxl,
            WireKind::Nvme => TierKind::Nvme,
        }
    }
}

/// Accepts a number of bytes or a size in words.
fn capacity<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    struct Size;
    impl Visitor<'_> for Size {
        type Value = u64;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number of bytes or a size like \"24GiB\"")
        }
        fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<u64, E> {
            Ok(bytes)
        }
        fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<u64, E> {
            u64::try_from(bytes).map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            parse_bytes(text).map_err(E::custom)
        }
    }
    from.deserialize_any(Size)
}

#[cfg(test)]
#[path = "machine_tests.rs"]
pub(super) mod tests;
