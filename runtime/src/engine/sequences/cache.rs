//! What layers keep of all texts.

use crate::error::RunError;
use crate::layers::mixer::LayerCache;
use crate::layers::pages::{PageIdx, StateIdx};
use crate::layers::rope::Rotations;

/// What layers keep of past tokens, and the rotations of the rows at hand.
pub(crate) struct Cache {
    /// By layer.
    pub(crate) layers: Vec<LayerCache>,
    /// By layer: which of a text's lists of pages is the layer's.
    pub(crate) kinds: Vec<usize>,
    pub(crate) rotations: Rotations,
}

impl Cache {
    /// Returns the layers of a kind.
    pub(super) fn of_kind(&self, kind: usize) -> impl Iterator<Item = &LayerCache> {
        let layers = self.layers.iter().zip(&self.kinds);
        layers.filter_map(move |(layer, of)| (*of == kind).then_some(layer))
    }

    /// Returns the layers of a kind, to change them.
    pub(super) fn of_kind_mut(&mut self, kind: usize) -> impl Iterator<Item = &mut LayerCache> {
        let layers = self.layers.iter_mut().zip(&self.kinds);
        layers.filter_map(move |(layer, of)| (*of == kind).then_some(layer))
    }

    /// Copies the first `len` positions of a page to another, in the layers of a kind.
    pub(super) fn copy_page(
        &mut self,
        kind: usize,
        from: PageIdx,
        to: PageIdx,
        len: usize,
    ) -> Result<(), RunError> {
        let mut layers = self.of_kind_mut(kind);
        Ok(layers.try_for_each(|layer| layer.copy_page(from, to, len))?)
    }

    /// Copies a recurrent state to another, in all layers.
    pub(crate) fn copy_state(&mut self, from: StateIdx, to: StateIdx) -> Result<(), RunError> {
        let mut layers = self.layers.iter_mut();
        Ok(layers.try_for_each(|layer| layer.copy_state(from, to))?)
    }
}
