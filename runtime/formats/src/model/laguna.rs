//! `laguna`: full layers with YaRN on a part of each head beside windowed ones with plain rotation,
//! head counts by layer, softplus gates per head or per value, experts chosen by sigmoid scores
//! with a selection bias, beside a shared expert.

use super::ModelError;
use super::blocks::{
    Common, HeadDims, MoeOptions, dense, expert_width, gqa_of, heads, layer_of, moe,
    shared_by_count,
};
use super::options::{YarnKeys, output_gate, rope, windowed_but_first};
use super::source::Source;
use super::spec::{
    Ffn, GateFunction, Gating, Mixer, ModelSpec, NormSpan, RopeKind, RopeScaling, RopeSpec,
};

/// Of the layers in a row this many long, all but the first have a window.
const WINDOW_PERIOD: usize = 4;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let n_dense = s.count("leading_dense_block_count")? as usize;
    let window = match s.opt_count("attention.sliding_window")? {
        0 => None,
        _ => Some(s.dim("attention.sliding_window")?),
    };
    let windowed = match window {
        Some(_) => windowed_but_first(s, common.n_layer, WINDOW_PERIOD)?,
        None => vec![false; common.n_layer],
    };
    let layers = common.layers(|i| {
        let dims = HeadDims::read(s, hidden, heads[i])?;
        let mut rope = rope(s, RopeKind::Halves, dims.key, YarnKeys::Fixed)?;
        if windowed[i] {
            rope = window_rope(s, rope, dims.key)?;
        }
        let norms = Some(NormSpan::Head);
        let mut attention = gqa_of(s, i, hidden, (heads[i], dims), Some(rope), norms)?;
        attention.window = window.filter(|_| windowed[i]);
        let gate = output_gate(s, i, &attention, GateFunction::Softplus)?;
        attention.gate = Some(gate);
        let ffn = if i < n_dense {
            Ffn::Dense(dense(s, i, &common)?)
        } else {
            let width = expert_width(s, i, &common)?;
            let shared = match s.opt_dim("expert_shared_feed_forward_length")? {
                Some(shared) => shared,
                None => shared_by_count(s, width)?.unwrap_or(width),
            };
            let options = MoeOptions::keyed(width, Gating::Sigmoid).with_shared(shared);
            Ffn::Moe(moe(s, i, hidden, &options)?)
        };
        layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)
    })?;
    common.model(s, layers)
}

/// Turns the rotary embedding of full layers into that of windowed ones, which is not scaled and has
/// its own base and dimensions where the file has keys for them.
fn window_rope(s: &Source<'_>, full: RopeSpec, head_dim: usize) -> Result<RopeSpec, ModelError> {
    Ok(RopeSpec {
        dims: s.rope_dims("rope.dimension_count_swa", full.dims, head_dim)?,
        base: s.rope_base("rope.freq_base_swa", full.base)?,
        scaling: RopeScaling::None,
        magnitude: 1.0,
        ..full
    })
}
