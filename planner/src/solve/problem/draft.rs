//! A draft: the tiers of everything, before bytes are added up and times predicted.

use tier_plan_runtime::formats::placement::{LayerPlacement, TierIdx};

/// The tier of every dense group, and the placement of every layer's experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// `[dense groups]` tiers, in the order of the model's shape.
    pub dense: Vec<TierIdx>,
    /// `[layers with experts]` placements.
    pub layers: Vec<LayerPlacement>,
}
