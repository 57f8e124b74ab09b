//! Where the parts of a model's dense stages run.

use tier_plan_formats::model::shape::DenseKind;
use tier_plan_formats::placement::{Placement, TierIdx};

/// Where a part runs: on the GPU of a tier, or on the CPU where `None`.
pub(crate) type Place = Option<TierIdx>;

/// Where the parts of one layer run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LayerPlaces {
    /// The mixer, or what there is in a layer without one.
    pub(crate) mixer: Place,
    /// The router, the dense block of a layer without routed experts, or what there is in a layer
    /// with a mixer only.
    pub(crate) ffn: Place,
    pub(crate) shared: Place,
    /// Whether the mixer's KV cache is in main memory though its matrices are on a GPU.
    pub(crate) host_kv: bool,
}

impl LayerPlaces {
    /// Returns where the mixer's KV cache is, and what its state is in a layer without one.
    pub(crate) fn cache(&self) -> Place {
        self.mixer.filter(|_| !self.host_kv)
    }
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
        let mut places = Self::default();
        let (mut mixers, mut ffns) = (vec![None; n_layers], vec![None; n_layers]);
        let mut shared = vec![None; n_layers];
        let mut embedding = None;
        for d in &plan.dense {
            let of_layer = match d.kind {
                DenseKind::Attention => &mut mixers,
                DenseKind::Router | DenseKind::DenseFfn => &mut ffns,
                DenseKind::SharedExpert => &mut shared,
                DenseKind::Embedding => {
                    embedding = Some(place(d.tier));
                    continue;
                }
                DenseKind::Head => {
                    places.head = place(d.tier);
                    continue;
                }
                DenseKind::TokenTable => continue,
            };
            if let Some(at) = d.layer.and_then(|l| of_layer.get_mut(l as usize)) {
                *at = Some(place(d.tier));
            }
        }
        // In a layer that has only one of both, rows stay where that is.
        let blocks = mixers.into_iter().zip(ffns).zip(shared);
        places.layers = blocks
            .zip(0..)
            .map(|(((mixer, ffn), shared), layer)| LayerPlaces {
                mixer: mixer.or(ffn).flatten(),
                ffn: ffn.or(mixer).flatten(),
                shared: shared.flatten(),
                host_kv: plan.has_host_kv(layer),
            })
            .collect();
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
