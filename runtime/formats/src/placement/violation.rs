//! Everything that can be wrong with a plan.

use super::{Placement, TierIdx};
use crate::model::kv::{CacheRoom, KvType};
use crate::model::shape::DenseKind;
use crate::source_id::SourceId;
use crate::text::BadNumber;
use crate::units::show_bytes;
use thiserror::Error;

/// A rule that a plan breaks, alone or beside its model.
///
/// Its display names the tier or layer, what was found, and what was expected.
#[derive(Debug, Clone, PartialEq, Error)]
#[allow(missing_docs, reason = "each message says what its fields are")]
pub enum Violation {
    #[error(transparent)]
    Number(#[from] BadNumber),
    /// A tier by itself is wrong, or the tiers together.
    #[error("{0}")]
    Tiers(String),
    /// The plan lists more numbers than a file may.
    #[error("{0}")]
    TooLong(String),
    #[error("the lines of tier '{tier}' add up to more bytes than can be counted")]
    Uncountable { tier: String },
    #[error(
        "the lines of tier '{tier}' add up to {used} bytes ({}), but its budget_bytes is {budget} ({})",
        show_bytes(*used), show_bytes(*budget)
    )]
    OverBudget {
        tier: String,
        used: u64,
        budget: u64,
    },
    #[error("home_bytes of tier '{tier}' must be 0: pooled experts live on the last tier")]
    HomeNotLast { tier: String },
    #[error("{what} is tier number {tier}, but the plan has {n_tiers}")]
    TierNumber {
        what: String,
        tier: TierIdx,
        n_tiers: usize,
    },
    #[error("{what} is '{tier}', a block device; choose a tier of memory")]
    WorksOnDrive { what: String, tier: String },
    #[error(
        "sequences is {sequences}, but must be at least 1, and a KV cache holds at most 4294967295 positions: \
         {sequences} texts of {context} tokens"
    )]
    Sequences { sequences: u32, context: u32 },
    #[error(
        "window_chunk is 0, expected 1 or more tokens; leave it out if layers with windows hold all positions"
    )]
    WindowChunk,
    #[error(
        "checkpoints is {checkpoints}, but with them a layer with a window would hold more than the 4294967295 positions \
         of a KV cache; plan fewer"
    )]
    Checkpoints { checkpoints: u32 },
    #[error(
        "io and copies say how a drive is read, but the last tier is not a drive that is read; leave them out"
    )]
    ReadsWithoutDrive,
    #[error(transparent)]
    Copies(#[from] crate::copies::Violation),
    #[error(
        "streaming.tier is '{tier}', which is not a GPU's memory; name one, or leave streaming out"
    )]
    StreamsToNoGpu { tier: String },
    #[error(
        "streaming.from is '{from}', but experts are streamed from main memory, a tier of kind \"dram\" that is not emulated"
    )]
    StreamsFromElsewhere { from: String },
    #[error(
        "streaming.experts is {found}, but must be between 1 and {max}; leave streaming out where none is streamed"
    )]
    StreamedExperts { found: u32, max: u32 },
    #[error("streaming.cpu_share is {found}, but is a part of a rate, above 0 and at most 1")]
    CpuShare { found: f64 },
    #[error("staging holds {found} experts, but {max} is the most")]
    StagingTooLarge { found: u32, max: u32 },
    #[error("the {kind} group has no layer")]
    GroupWithoutLayer { kind: DenseKind },
    #[error("the {kind} group stands in layer {layer}, but has no layer")]
    GroupInLayer { kind: DenseKind, layer: u32 },
    #[error("the {kind} group of layer {layer} is past {max}, the highest layer")]
    GroupPastEnd {
        kind: DenseKind,
        layer: u32,
        max: u32,
    },
    #[error("the {} is placed twice; keep one", group(*kind, *layer))]
    GroupTwice { kind: DenseKind, layer: Option<u32> },
    #[error(
        "kv_tier is '{kv_tier}', a GPU's memory, but the attention of layer {layer} is on '{attention_tier}', and so its \
         KV cache can't be there; name a tier of memory"
    )]
    CacheOnGpu {
        kv_tier: String,
        layer: u32,
        attention_tier: String,
    },
    #[error(
        "kv_bytes of tier '{tier}' must be 0: a layer's KV cache is on the GPU that has its attention, or else on \
         '{kv_tier}', the kv_tier"
    )]
    CacheElsewhere { tier: String, kv_tier: String },
    #[error(
        "host_kv names layer {second} after layer {first}; list each layer once, in ascending order"
    )]
    HostKvOrder { first: u32, second: u32 },
    #[error(
        "host_kv keeps the KV cache of layer {layer} off its GPU, but kv_tier is '{kv_tier}', a GPU's memory; name a tier \
         of memory as kv_tier"
    )]
    HostKvOnGpu { layer: u32, kv_tier: String },
    #[error(
        "host_kv names layer {layer}, whose attention is not on a GPU; leave the layer out, since its KV cache is on \
         kv_tier anyway"
    )]
    HostKvWithoutGpu { layer: u32 },
    #[error(
        "host_kv names layer {layer}, but only layers with keys and values of their own, which no index chooses among, can \
         have them apart from their attention; leave the layer out"
    )]
    HostKvOfOther { layer: u32 },
    #[error("layer {second} comes after layer {first}; list each layer once, in ascending order")]
    LayerOrder { first: u32, second: u32 },
    #[error("layer {layer} is past {max}, the highest that can be named")]
    LayerPastEnd { layer: u32, max: u32 },
    /// Something within one layer.
    #[error("layer {layer}: {violation}")]
    InLayer {
        layer: u32,
        violation: Box<Violation>,
    },
    #[error("{slots} slots, but {max} is the most")]
    TooManySlots { slots: u32, max: u32 },
    #[error("tier '{tier}' is listed twice under pinned")]
    PinTierTwice { tier: String },
    #[error("on tier '{tier}', expert {second} comes after expert {first}")]
    PinOrder {
        tier: String,
        first: u32,
        second: u32,
    },
    #[error("expert {expert} is past {max}, the highest that can be named")]
    ExpertPastEnd { expert: u32, max: u32 },
    #[error("expert {expert} is pinned to both '{first}' and '{second}'; keep one")]
    PinnedTwice {
        expert: u32,
        first: String,
        second: String,
    },
    #[error("{key} is {tokens} tokens, but must be between 1 and {max}")]
    HalfLife {
        key: &'static str,
        tokens: u32,
        max: u32,
    },
    #[error("recent_weight is {found}, but {max} is the most")]
    RecentWeight { found: u32, max: u32 },
    #[error("solver.gap is {0}; leave it out when nothing is proven")]
    Gap(f64),
    #[error("{what} has {found} parts, but the plan has {n_tiers} tiers")]
    Parts {
        what: &'static str,
        found: usize,
        n_tiers: usize,
    },

    #[error("it was made for '{}' ({})", made_for.name, made_for.hash)]
    OtherModel { made_for: SourceId },
    #[error("it has no tiers")]
    NoTiers,
    #[error(
        "tier '{tier}' is a GPU's memory, which can hold neither buffers for experts in flight nor pooled experts"
    )]
    PoolOnGpu { tier: String },
    #[error(
        "tier '{tier}' is a block device that the plan puts bytes on, but only the last tier may be one"
    )]
    DriveNotLast { tier: String },
    #[error("it places the {}, but the model has no such tensor group", group(*kind, *layer))]
    UnknownGroup { kind: DenseKind, layer: Option<u32> },
    #[error("the {} must not be on a block device", group(*kind, *layer))]
    GroupOnDrive { kind: DenseKind, layer: Option<u32> },
    #[error("it does not place the {}", group(*kind, *layer))]
    MissingGroup { kind: DenseKind, layer: Option<u32> },
    #[error("it has {found} layers with routed experts, the model {expected}")]
    LayerCount { found: usize, expected: usize },
    #[error("it has routed experts in layer {found}, the model in layer {expected}")]
    OtherLayer { found: u32, expected: u32 },
    #[error("expert {expert} is pinned, but the layer has {n_expert}")]
    NoSuchExpert { expert: u32, n_expert: u32 },
    #[error("experts are pinned on the slow tier")]
    PinsOnSlowTier,
    #[error("there are slots on the slow tier")]
    SlotsOnSlowTier,
    #[error("{slots} slots for {n_expert} experts")]
    MoreSlotsThanExperts { slots: u32, n_expert: u32 },
    #[error("tier '{tier}' says {found} bytes of {line}, but they take {expected}")]
    Sum {
        tier: String,
        line: &'static str,
        found: u64,
        expected: u64,
    },
    #[error(
        "tier '{tier}' has {found} bytes for the KV cache and recurrent state, but the layers that have theirs there take \
         {expected} with {room} and a KV cache of {kv_type}"
    )]
    CacheSum {
        tier: String,
        found: u64,
        expected: u64,
        room: CacheRoom,
        kv_type: KvType,
    },
    #[error("staging holds {found} experts, but a token may need {expected}")]
    StagingTooSmall { found: u32, expected: u64 },
}

impl Violation {
    /// Returns the violation of a tier index that is out of range.
    pub(super) fn tier_number(plan: &Placement, what: &str, tier: TierIdx) -> Violation {
        Violation::TierNumber {
            what: what.into(),
            tier,
            n_tiers: plan.tiers.len(),
        }
    }

    /// Returns this violation as one of layer `layer`.
    pub(super) fn in_layer(self, layer: u32) -> Violation {
        Violation::InLayer {
            layer,
            violation: Box::new(self),
        }
    }
}

/// Names a dense group in a message.
fn group(kind: DenseKind, layer: Option<u32>) -> String {
    let layer = layer.map_or(String::new(), |layer| format!(" of layer {layer}"));
    format!("{kind} group{layer}")
}
