//! The solver's own vocabulary: what to minimize, which kind of plan to make, and with what.

/// Kind of plan to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// The optimum of the integer program.
    Optimal,
    /// The same number of experts in every layer, chosen without a profile.
    Uniform,
    /// The most used experts first, over all layers.
    FrequencyFirst,
    /// No pins, slots only.
    LruOnly,
    /// llama.cpp's rule: the experts of the first layers stay on the CPU.
    FirstLayersCpu,
}

/// How slots are refilled on a miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The policy with the most replayed hits, layer by layer.
    Auto,
    /// Evict the least recently used expert.
    Lru,
    /// Evict the least frequently used expert, with uses that decay.
    Lfu,
    /// Evict by a learned mix of long-term and recent uses.
    Adaptive,
}

/// Solver of the integer program where the heuristics do not meet the bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// microlp, in pure Rust.
    #[default]
    Microlp,
    /// HiGHS, in builds with the feature `highs`.
    #[cfg(feature = "highs")]
    Highs,
}

impl Backend {
    /// Returns the name used on the command line and in plans.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Microlp => "microlp",
            #[cfg(feature = "highs")]
            Backend::Highs => "highs",
        }
    }
}

/// Quantity that a plan minimizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Objective {
    /// Time of a decoded token.
    #[default]
    Latency,
    /// Time per token when a batch of sequences is decoded together.
    Throughput,
    /// Price of one token per second: the memory used and the rest of the machine.
    Cost,
    /// Energy per token. Machine files have one power, so this is latency in another unit.
    Energy,
    /// Memory above the last tier that still reaches a target speed.
    Memory,
}

impl Objective {
    /// Returns the name used on the command line and in plans.
    pub fn name(self) -> &'static str {
        match self {
            Objective::Latency => "latency",
            Objective::Throughput => "throughput",
            Objective::Cost => "cost",
            Objective::Energy => "energy",
            Objective::Memory => "memory",
        }
    }
}
