//! The byte sums of a plan, which follow from the rest of it and from the model.

use super::{DensePlacement, PerTier, Placement, TierIdx};
use crate::model::shape::{DenseKind, ModelShape};
use std::collections::HashMap;

/// Bytes that a plan puts on one tier, by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TierBytes {
    /// Dense tensor groups: all weights but routed experts.
    pub dense: u64,
    /// Pinned experts, which never leave the tier.
    pub pinned: u64,
    /// Slots for pooled experts.
    pub slots: u64,
    /// KV cache of the planned context, and recurrent state, of the layers that have theirs here.
    pub kv: u64,
    /// Buffers for experts in flight: to main memory, and of a GPU that experts are streamed to.
    pub staging: u64,
    /// Backing copies of pooled experts. Only the last tier has any.
    pub home: u64,
}

impl TierBytes {
    /// Returns the sum over all purposes, `u64::MAX` if it is larger than that.
    pub fn total(&self) -> u64 {
        self.lines()
            .iter()
            .fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    /// Returns the sums with their keys in files.
    pub(super) fn lines(&self) -> [(&'static str, u64); 6] {
        [
            ("dense_bytes", self.dense),
            ("pinned_bytes", self.pinned),
            ("slot_bytes", self.slots),
            ("kv_bytes", self.kv),
            ("staging_bytes", self.staging),
            ("home_bytes", self.home),
        ]
    }
}

/// Adds to one sum of one tier. A tier out of range has no sums; [`super::validate`] reports it.
fn add(
    tally: &mut PerTier<TierBytes>,
    tier: TierIdx,
    sum: impl Fn(&mut TierBytes) -> &mut u64,
    bytes: u64,
) {
    if let Some(tier) = tally.get_mut(tier) {
        let sum = sum(tier);
        *sum = sum.saturating_add(bytes);
    }
}

impl Placement {
    /// Returns the plan with token tables as groups of their own. In plans before version 8, the
    /// embedding stands for them.
    #[must_use]
    pub fn with_tables_of(mut self, shape: &ModelShape) -> Self {
        let has = |kind| shape.dense.iter().any(|d| d.kind == kind);
        let embedding = |d: &DensePlacement| d.kind == DenseKind::Embedding;
        let is_apart = self.dense.iter().any(|d| d.kind == DenseKind::TokenTable);
        let Some(at) = self.dense.iter().position(embedding) else {
            return self;
        };
        if is_apart || !has(DenseKind::TokenTable) {
            return self;
        }
        let table = DensePlacement {
            kind: DenseKind::TokenTable,
            ..self.dense[at]
        };
        if has(DenseKind::Embedding) {
            self.dense.insert(at + 1, table);
        } else {
            self.dense[at] = table;
        }
        self
    }

    /// Returns what the plan puts on each tier, from its placements and the sizes of its model.
    ///
    /// Ignores the sums that the plan itself stores in [`PlanTier::bytes`](super::PlanTier::bytes).
    /// Whatever the model doesn't have, or stands on a tier out of range, counts nothing.
    pub fn tally(&self, shape: &ModelShape) -> PerTier<TierBytes> {
        let mut tally = PerTier::from_fn(self.tiers.len(), |_| TierBytes::default());
        let groups: HashMap<(DenseKind, Option<u32>), u64> = shape
            .dense
            .iter()
            .map(|group| ((group.kind, group.layer), group.bytes))
            .collect();
        for group in &self.dense {
            let bytes = groups.get(&(group.kind, group.layer)).copied().unwrap_or(0);
            add(&mut tally, group.tier, |t| &mut t.dense, bytes);
        }
        for (layer, experts) in self.layers.iter().zip(&shape.experts) {
            let bytes_of = |n: u64| n.saturating_mul(experts.expert_bytes);
            let mut pooled = u64::from(experts.n_expert);
            for pins in &layer.pinned {
                let n_pinned = pins.experts.len() as u64;
                pooled = pooled.saturating_sub(n_pinned);
                add(&mut tally, pins.tier, |t| &mut t.pinned, bytes_of(n_pinned));
            }
            add(
                &mut tally,
                layer.slot_tier,
                |t| &mut t.slots,
                bytes_of(layer.slots.into()),
            );
            add(
                &mut tally,
                self.home_tier(),
                |t| &mut t.home,
                bytes_of(pooled),
            );
        }
        for (tier, bytes) in self.cache_bytes(shape).enumerate() {
            add(&mut tally, tier, |t| &mut t.kv, *bytes);
        }
        let largest = shape
            .experts
            .iter()
            .map(|e| e.expert_bytes)
            .max()
            .unwrap_or(0);
        let staging = u64::from(self.staging_experts).saturating_mul(largest);
        add(&mut tally, self.staging_tier, |t| &mut t.staging, staging);
        if let Some(streaming) = &self.streaming {
            let buffers = u64::from(streaming.experts).saturating_mul(largest);
            add(&mut tally, streaming.tier, |t| &mut t.staging, buffers);
        }
        tally
    }

    /// Stores the plan's [`tally`](Self::tally) in its tiers. Budgets stay as they are.
    pub fn fill_sums(&mut self, shape: &ModelShape) {
        let tally = self.tally(shape);
        self.tiers
            .iter_mut()
            .zip(tally)
            .for_each(|(tier, bytes)| tier.bytes = bytes);
    }
}
