//! A draft: the places of everything, before bytes are added up and times predicted.

use tier_plan_runtime::formats::placement::{LayerPlacement, TierIdx};

/// Where a dense group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DensePlace {
    /// The tier of its weights.
    pub tier: TierIdx,
    /// Whether it is attention on a real GPU whose KV cache stays on the tier of all other caches.
    pub host_kv: bool,
}

impl From<TierIdx> for DensePlace {
    /// Returns the place on a tier, with the KV cache where it goes by itself.
    fn from(tier: TierIdx) -> Self {
        let host_kv = false;
        DensePlace { tier, host_kv }
    }
}

/// The place of every dense group, and the placement of every layer's experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// `[dense groups]` places, in the order of the model's shape.
    pub dense: Vec<DensePlace>,
    /// `[layers with experts]` placements.
    pub layers: Vec<LayerPlacement>,
}
