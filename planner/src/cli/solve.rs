//! Arguments of `solve`. The enums here are the command line's spelling of [`options`].

use crate::solve::options;
use clap::{Args, ValueEnum};
use std::path::PathBuf;
use tier_plan_runtime::KvType;

/// `solve`.
#[derive(Debug, Args)]
pub struct SolveArgs {
    /// The GGUF file the plan is for, or a shape (.toml, or a name such as kimi-k2.5)
    pub model: PathBuf,
    /// Of a shape: the quantisation, q4_k_m when not given
    #[arg(long, value_name = "NAME")]
    pub quant: Option<String>,
    /// The profile of that model; uniform access is assumed without one
    #[arg(short, long)]
    pub profile: Option<PathBuf>,
    /// The machine file, or the name of one that comes with the program
    #[arg(short, long)]
    pub machine: PathBuf,
    /// Where to write the plan
    #[arg(short, long, default_value = "placement.toml")]
    pub output: PathBuf,
    /// Budget of a tier, as NAME=SIZE (`vram=11GiB`); the tier's capacity when not given
    #[arg(short, long, value_name = "TIER=SIZE")]
    pub budget: Vec<String>,
    /// Budget of the tier named vram
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<String>,
    /// Budget of the tier named dram
    #[arg(long, value_name = "SIZE")]
    pub dram: Option<String>,
    /// Context length to plan the key and value cache for
    #[arg(long, default_value_t = 1024)]
    pub context: u32,
    /// Predict for tokens that look back at this many positions; half of the context when not given
    #[arg(long, value_name = "POSITIONS")]
    pub at: Option<u32>,
    /// How keys and values are stored: f16, q8_0 (about half of it) or f32
    #[arg(long, value_name = "TYPE", default_value_t = KvType::F16)]
    pub kv_type: KvType,
    /// Make this kind of plan instead of the optimum
    #[arg(long, value_enum, default_value_t = Strategy::Optimal)]
    pub strategy: Strategy,
    /// How slots are refilled: auto takes what replays best, and only if it is faster on held-out prompts than lru
    #[arg(long, value_enum, default_value_t = Policy::Auto)]
    pub policy: Policy,
    /// What to make least
    #[arg(long, value_enum, default_value_t = Objective::Latency)]
    pub objective: Objective,
    /// For --objective throughput: sequences that are decoded together
    #[arg(long, value_name = "B")]
    pub batch: Option<u32>,
    /// What solves the integer program where the search does not meet its bound; highs needs a build with that feature
    #[arg(long, value_enum, default_value_t = Backend::Microlp)]
    pub backend: Backend,
    /// Tokens a second to reach; --objective memory finds the least memory that does
    #[arg(long, value_name = "X")]
    pub target_tok_s: Option<f64>,
    /// Fix something to a tier, as TIER:WHAT[:LAYERS[:EXPERTS]]: `vram:attention`, `vram:experts:3-5:0-15`,
    /// `nvme:embedding`; may be given several times. WHAT is attention, router, shared_expert, dense_ffn, embedding, head
    /// or experts (which may be left out before numbers: `vram:3-5:0-15`). Experts fixed to the last tier are never pinned
    #[arg(long, value_name = "TIER:WHAT")]
    pub fix: Vec<String>,
    /// Keep something off a tier, written as for --fix: `vram:shared_expert:0-9`, `nvme:embedding`, `cxl:experts:0-3` (no
    /// pins and no slots of these layers there)
    #[arg(long, value_name = "TIER:WHAT")]
    pub forbid: Vec<String>,
    /// Also write each baseline's plan into this folder
    #[arg(long)]
    pub baselines: Option<PathBuf>,
    /// Stop improving after this many seconds
    #[arg(long, default_value_t = 10.0)]
    pub time_limit: f64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Ways to make a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// The integer program
    Optimal,
    /// The same number of experts in every layer, chosen without a profile
    Uniform,
    /// The experts with the most accesses first, over all layers
    FrequencyFirst,
    /// No pins: everything a cache
    LruOnly,
    /// llama.cpp's rule: the experts of the first layers to the CPU
    FirstLayersCpu,
}

/// How slots are refilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// What replays best, layer by layer
    Auto,
    /// The expert whose last use is longest ago leaves
    Lru,
    /// The experts with the most uses of late stay
    Lfu,
    /// Uses of late and uses of very late, weighed by what the profile teaches
    Adaptive,
}

/// What solves the integer program where the search's own bound is not met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Backend {
    /// Pure Rust
    #[default]
    Microlp,
    /// HiGHS, of builds with `--features highs`
    #[cfg(feature = "highs")]
    Highs,
}

/// What a plan makes least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Objective {
    /// The time of a decoded token
    #[default]
    Latency,
    /// The time of a token where --batch sequences are decoded together
    Throughput,
    /// The price of a token a second: memory by its price a GB, and the rest of the machine
    Cost,
    /// The energy of a token: latency in another unit, as machine files have one power
    Energy,
    /// The memory above the last tier, by price if tiers have prices, that still reaches --target-tok-s
    Memory,
}

impl From<Strategy> for options::Strategy {
    fn from(value: Strategy) -> Self {
        match value {
            Strategy::Optimal => options::Strategy::Optimal,
            Strategy::Uniform => options::Strategy::Uniform,
            Strategy::FrequencyFirst => options::Strategy::FrequencyFirst,
            Strategy::LruOnly => options::Strategy::LruOnly,
            Strategy::FirstLayersCpu => options::Strategy::FirstLayersCpu,
        }
    }
}

impl From<Policy> for options::Policy {
    fn from(value: Policy) -> Self {
        match value {
            Policy::Auto => options::Policy::Auto,
            Policy::Lru => options::Policy::Lru,
            Policy::Lfu => options::Policy::Lfu,
            Policy::Adaptive => options::Policy::Adaptive,
        }
    }
}

impl From<Backend> for options::Backend {
    fn from(value: Backend) -> Self {
        match value {
            Backend::Microlp => options::Backend::Microlp,
            #[cfg(feature = "highs")]
            Backend::Highs => options::Backend::Highs,
        }
    }
}

impl From<Objective> for options::Objective {
    fn from(value: Objective) -> Self {
        match value {
            Objective::Latency => options::Objective::Latency,
            Objective::Throughput => options::Objective::Throughput,
            Objective::Cost => options::Objective::Cost,
            Objective::Energy => options::Objective::Energy,
            Objective::Memory => options::Objective::Memory,
        }
    }
}
