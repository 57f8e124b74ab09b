//! Where the parts of a model's dense stages run.

use tier_plan_formats::model::shape::DenseKind;
use tier_plan_formats::placement::{Placement, TierIdx};

/// Where a part runs: on the GPU of a tier, or on the CPU where `None`.
pub(crate) type Place = Option<TierIdx>;

/// Where the parts of one layer run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LayerPlaces {
    pub(crate) mixer: Place,
    /// The router, or the dense block of a layer without routed experts.
    pub(crate) ffn: Place,
    pub(crate) shared: Place,
}

/// Where the parts of a model run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places {
    pub(crate) layers: Vec<LayerPlaces>,
    pub(crate) head: Place,
    pub(crate) embedding: Place,
}

impl Places {
    /// Returns where a plan has each part run: where its weights are.
    pub(crate) fn new(plan: &Placement, n_layers: usize) -> Self {
        let place = |tier: TierIdx| plan.tiers.get(tier).filter(|t| t.uses_gpu()).map(|_| tier);
        let mut places = Self {
            layers: vec![LayerPlaces::default(); n_layers],
            ..Self::default()
        };
        let mut embedding = None;
        for d in &plan.dense {
            let at = place(d.tier);
            match (
                d.kind,
                d.layer.and_then(|l| places.layers.get_mut(l as usize)),
            ) {
                (DenseKind::Attention, Some(layer)) => layer.mixer = at,
                (DenseKind::Router | DenseKind::DenseFfn, Some(layer)) => layer.ffn = at,
                (DenseKind::SharedExpert, Some(layer)) => layer.shared = at,
                (DenseKind::Embedding, _) => embedding = Some(at),
                (DenseKind::Head, _) => places.head = at,
                _ => {}
            }
        }
        // The head of a tied model is the embedding.
        places.embedding = embedding.unwrap_or(places.head);
        places
    }

    /// Returns whether any part runs on a GPU.
    pub(crate) fn any(&self) -> bool {
        let layers = self.layers.iter();
        self.head.is_some()
            || self.embedding.is_some()
            || layers
                .flat_map(|l| [l.mixer, l.ffn, l.shared])
                .any(|place| place.is_some())
    }

    /// Returns whether any part runs on the GPU of a tier.
    pub(crate) fn uses(&self, tier: TierIdx) -> bool {
        let here = |place: Place| place == Some(tier);
        here(self.head)
            || here(self.embedding)
            || self
                .layers
                .iter()
                .any(|l| here(l.mixer) || here(l.ffn) || here(l.shared))
    }
}
