//! What of the experts lies in main memory at the moment.

use super::ids::ExpertId;
use super::layer::ExpertBacking;
use super::store::ExpertStore;
use super::view::ExpertView;
use crate::tiers::file::{DriveUse, FileTier};
use tier_plan_formats::placement::TierIdx;

impl ExpertStore {
    /// Returns what the reads of experts brought so far.
    pub(crate) fn drive_usage(&self) -> DriveUse {
        self.files
            .as_ref()
            .map_or_else(DriveUse::default, FileTier::usage)
    }

    /// Returns the number of layers with routed experts.
    pub(crate) fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Returns up to `most` experts of a layer that lie in main memory, all on one tier, from the
    /// expert `first` on. Changes nothing: no slot counts as used. Those of a mapped file count only
    /// if it was copied to memory.
    pub(crate) fn resident(
        &self,
        layer: usize,
        first: usize,
        most: usize,
    ) -> (Option<TierIdx>, Vec<ExpertView<'_>>) {
        let n_expert = self.layers.get(layer).map_or(0, |l| l.backings.len());
        let (mut on, mut views) = (None, Vec::with_capacity(most.min(n_expert)));
        for at in 0..n_expert {
            if views.len() == most {
                break;
            }
            let expert = ExpertId::new(((first + at) % n_expert) as u32);
            let Some((view, tier)) = self.resident_view(layer, expert) else {
                continue;
            };
            if *on.get_or_insert(tier) == tier {
                views.push(view);
            }
        }
        (on, views)
    }

    fn resident_view(&self, layer: usize, expert: ExpertId) -> Option<(ExpertView<'_>, TierIdx)> {
        let in_layer = &self.layers[layer];
        match in_layer.backing(expert) {
            ExpertBacking::Pinned {
                tier,
                bytes,
                layout,
            } => Some((self.view_in(layer, expert, bytes, *layout), *tier)),
            ExpertBacking::Mapped if self.gguf.is_copied() => {
                Some((self.mapped_view(in_layer, expert), self.mapped_tier))
            }
            ExpertBacking::Pooled => {
                let slot = in_layer.cache.slot(expert.get())?;
                let bytes = in_layer.slots.get(slot as usize)?.as_ref()?;
                let view = self.view_in(layer, expert, bytes, in_layer.layout);
                Some((view, in_layer.slot_tier))
            }
            ExpertBacking::Mapped | ExpertBacking::Gpu(_) => None,
        }
    }
}
