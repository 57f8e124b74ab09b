//! `machine.toml`: the memory tiers of a machine with their capacities and measured or declared rates.

use super::SourceId;

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
    /// Hash of the file it was read from; the name repeated.
    pub id: SourceId,
}
