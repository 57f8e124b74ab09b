//! Feed-forward blocks of networks whose first layers are dense and whose other layers have routed
//! experts.

use super::ModelError;
use super::blocks::{MoeOptions, Setting, moe};
use super::source::Source;
use super::spec::{Activation, Ffn, Gating, MoeSpec};

/// Widths of the feed-forward blocks.
pub(super) struct FfnLayers {
    n_dense: usize,
    /// By layer; empty where none is dense.
    dense: Vec<usize>,
    /// By layer; empty where none has experts.
    expert: Vec<usize>,
    n_shared: usize,
}

/// The least limit of an activation that counts as one.
pub(super) const LEAST_LIMIT: f32 = 1e-6;

/// Bound on the width of the shared experts together, far above any real model.
const MAX_SHARED_WIDTH: usize = 1 << 24;

impl FfnLayers {
    /// Reads the widths. Shared experts are as many as the file says.
    pub(super) fn read(s: &Source<'_>, n_layer: usize) -> Result<Self, ModelError> {
        let n_dense = (s.opt_count("leading_dense_block_count")? as usize).min(n_layer);
        let widths = |name, wanted: bool| match wanted {
            true => s.dim_per_layer(name, n_layer),
            false => Ok(Vec::new()),
        };
        Ok(Self {
            n_dense,
            dense: widths("feed_forward_length", n_dense > 0)?,
            expert: widths("expert_feed_forward_length", n_dense < n_layer)?,
            n_shared: s.count("expert_shared_count")? as usize,
        })
    }

    /// Has the layers a shared expert even where the file says none.
    pub(super) fn always_shared(self) -> Self {
        Self {
            n_shared: self.n_shared.max(1),
            ..self
        }
    }

    /// Returns whether a layer is dense.
    pub(super) fn is_dense(&self, layer: usize) -> bool {
        layer < self.n_dense
    }

    /// Returns the width of a layer's shared experts together.
    fn shared(&self, s: &Source<'_>, layer: usize) -> Result<usize, ModelError> {
        let width = self.expert[layer].checked_mul(self.n_shared);
        width
            .filter(|width| *width <= MAX_SHARED_WIDTH)
            .ok_or_else(|| s.bad("expert_shared_count", format!("{}", self.n_shared)))
    }

    /// Returns the options of a layer's experts that the keys of the file decide. `gating` is for
    /// files that don't say.
    pub(super) fn options(
        &self,
        s: &Source<'_>,
        layer: usize,
        gating: Gating,
    ) -> Result<MoeOptions, ModelError> {
        let ffn = self.shared(s, layer)?;
        Ok(MoeOptions {
            expert_ffn: self.expert[layer],
            gating: Setting::Default(gating),
            normalize: Setting::Default(false),
            scale: Setting::Default(1.0),
            activation: Activation::Silu,
            shared: (ffn > 0).then_some(super::blocks::Shared { ffn, gated: false }),
        })
    }

    /// Describes the dense block of a layer.
    pub(super) fn dense(
        &self,
        s: &Source<'_>,
        layer: usize,
        hidden: usize,
        activation: Activation,
    ) -> Result<Ffn, ModelError> {
        let mut ffn = s.gated_ffn(layer, hidden, self.dense[layer])?;
        ffn.activation = activation;
        Ok(Ffn::Dense(ffn))
    }

    /// Describes a layer whose blocks have one activation everywhere.
    pub(super) fn ffn(
        &self,
        s: &Source<'_>,
        layer: usize,
        hidden: usize,
        gating: Gating,
    ) -> Result<Ffn, ModelError> {
        if self.is_dense(layer) {
            return self.dense(s, layer, hidden, Activation::Silu);
        }
        let options = self.options(s, layer, gating)?;
        Ok(Ffn::Moe(moe(s, layer, hidden, &options)?))
    }
}

/// Returns an error unless the file says how router logits become probabilities.
pub(super) fn require_gating(s: &Source<'_>) -> Result<(), ModelError> {
    let name = "expert_gating_func";
    match s.count(name)? {
        0 => Err(s.bad(name, "0; expected 1 to 4")),
        _ => Ok(()),
    }
}

/// Returns an error unless the layer's experts have a selection bias.
pub(super) fn require_selection_bias(
    s: &Source<'_>,
    layer: usize,
    moe: &MoeSpec,
) -> Result<(), ModelError> {
    match moe.selection_bias {
        Some(_) => Ok(()),
        None => s
            .vector(&format!("blk.{layer}.exp_probs_b.bias"), moe.n_expert)
            .map(|_| ()),
    }
}
