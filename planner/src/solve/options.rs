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

/// How far a search goes where not all columns can be listed.
///
/// The bound is over the columns tried then, so that nothing is gained by closing the gap to it
/// altogether.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Depth {
    /// As far as predictions show: for questions that take several plans.
    Quick,
    /// As far as anything is gained.
    #[default]
    Full,
}

impl Depth {
    /// Returns the seconds that a grid is made for, of those that the search has.
    pub(super) fn grid_s(self, limit_s: f64) -> f64 {
        match self {
            Depth::Quick => 0.5,
            Depth::Full => limit_s.clamp(2.0, 60.0),
        }
    }

    /// Returns the relative gap at which a search ends.
    pub(super) fn tolerance(self) -> f64 {
        match self {
            Depth::Quick => 3e-5,
            Depth::Full => 1e-5,
        }
    }

    /// Returns the triples in a row without a gain after which exchange search ends.
    pub(super) fn fruitless_triples(self) -> usize {
        match self {
            Depth::Quick => 300,
            Depth::Full => 6000,
        }
    }

    /// Returns the choices that exchange search improves side by side.
    pub(super) fn exchanged_choices(self) -> usize {
        match self {
            Depth::Quick => 1,
            Depth::Full => 2,
        }
    }

    /// Whether the time that is left goes to a bound over the columns that were not tried.
    pub(super) fn bounds_all(self) -> bool {
        self == Depth::Full
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
