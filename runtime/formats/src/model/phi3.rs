//! `phi3` (Phi-3, Phi-3.5, Phi-4): gate and up as one tensor, rotation of perhaps a part of each
//! head, and divisors of the frequencies for contexts up to and beyond the trained one.

use super::ModelError;
use super::blocks::{Common, HeadDims, gqa_of, heads, layer_of};
use super::options::{YarnKeys, original_context, rope};
use super::source::Source;
use super::spec::{
    Activation, Ffn, GatedFfn, Linear, LongFactors, Mixer, ModelSpec, RopeKind, RopeSpec,
};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let layers = common.layers(|i| {
        let dims = HeadDims::read(s, hidden, heads[i])?;
        let rope = rope(s, RopeKind::Halves, dims.key, YarnKeys::Fixed)?;
        let rope = by_context(s, rope)?;
        // Files may name a window, which the models were not trained with.
        let attention = gqa_of(s, i, hidden, (heads[i], dims), Some(rope), None)?;
        let width = s.dim_of_layer("feed_forward_length", i, common.n_layer)?;
        let ffn = Ffn::Dense(fused_ffn(s, i, hidden, width)?);
        layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)
    })?;
    common.model(s, layers)
}

/// Adds the divisors for short and long contexts, where the file has them.
fn by_context(s: &Source<'_>, mut rope: RopeSpec) -> Result<RopeSpec, ModelError> {
    if rope.freq_factors.is_some() {
        return Ok(rope);
    }
    let pairs = rope.dims / 2;
    rope.freq_factors = s.opt_vector("rope_factors_short.weight", pairs)?;
    if let Some(factors) = s.opt_vector("rope_factors_long.weight", pairs)? {
        rope.long_factors = Some(LongFactors {
            factors,
            original_context: original_context(s)?,
        });
    }
    Ok(rope)
}

/// Finds a gated block whose first two matrices are the halves of `ffn_up`, or apart.
fn fused_ffn(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    width: usize,
) -> Result<GatedFfn, ModelError> {
    if s.has_tensor(&format!("blk.{layer}.ffn_gate.weight")) {
        return s.gated_ffn(layer, hidden, width);
    }
    let both = s.linear(&format!("blk.{layer}.ffn_up"), hidden, 2 * width)?;
    let half = |first_row| Linear {
        n_out: width,
        first_row,
        ..both
    };
    Ok(GatedFfn {
        gate: Some(half(0)),
        up: half(width),
        down: s.linear(&format!("blk.{layer}.ffn_down"), width, hidden)?,
        activation: Activation::Silu,
    })
}
