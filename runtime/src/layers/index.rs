//! The two numberings of layers: all layers of a network, and those with routed experts.

use tier_plan_formats::model::spec::{Ffn, LayerSpec, ModelSpec, MoeSpec};

/// Index of a layer in the network, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LayerIdx(usize);

/// Index of a layer among those with routed experts, from 0: the expert store and plans count
/// layers like this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MoeIdx(usize);

impl LayerIdx {
    pub(crate) fn get(self) -> usize {
        self.0
    }
}

impl MoeIdx {
    #[cfg(test)]
    pub(crate) fn new(index: usize) -> Self {
        Self(index)
    }

    pub(crate) fn get(self) -> usize {
        self.0
    }
}

/// A layer of a network.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) index: LayerIdx,
    pub(crate) spec: &'a LayerSpec,
    /// Its routed experts, where it has some.
    pub(crate) moe: Option<MoeLayer<'a>>,
}

impl Layer<'_> {
    /// Returns whether tokens alone choose the layer's experts, which are then known before any
    /// layer is computed.
    pub(crate) fn chooses_by_token(&self) -> bool {
        self.moe.is_some_and(|moe| moe.spec.by_token.is_some())
    }
}

/// The routed experts of a layer.
#[derive(Clone, Copy)]
pub(crate) struct MoeLayer<'a> {
    pub(crate) index: MoeIdx,
    pub(crate) spec: &'a MoeSpec,
}

/// Returns the layers of a network in order, with both indices.
pub(crate) fn layers(spec: &ModelSpec) -> impl Iterator<Item = Layer<'_>> + Clone {
    let mut n_moe = 0;
    spec.layers.iter().enumerate().map(move |(index, spec)| {
        let moe = match &spec.ffn {
            Ffn::Dense(_) | Ffn::None => None,
            Ffn::Moe(spec) => {
                n_moe += 1;
                Some(MoeLayer {
                    index: MoeIdx(n_moe - 1),
                    spec,
                })
            }
        };
        Layer {
            index: LayerIdx(index),
            spec,
            moe,
        }
    })
}
