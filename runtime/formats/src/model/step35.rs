//! `step35` (Step 3.5): windowed layers with head counts of their own, gates per head, rotation of
//! half of each head in full layers, limits on activations by layer, experts chosen by sigmoid
//! scores with a selection bias, beside a shared expert.

use super::ModelError;
use super::blocks::{
    Common, HeadDims, Heads, MoeOptions, dense, expert_width, gqa_of, heads, is_routed, layer_of,
    moe,
};
use super::options::{output_gate, windowed_rope};
use super::source::Source;
use super::spec::{
    Activation, Ffn, GateFunction, Gating, GqaSpec, Mixer, ModelSpec, NormSpan, RopeKind, RopeSpec,
};

/// Base of windowed layers in files without a key for it.
const WINDOW_BASE: f32 = 10_000.0;

/// Limits up to this stand for none.
const NO_LIMIT: f32 = 1e-6;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (hidden, n_layer) = (common.hidden, common.n_layer);
    let heads = heads(s, n_layer)?;
    let window = s.dim("attention.sliding_window")?;
    let windowed = s.flags("attention.sliding_window_pattern", n_layer)?;
    let expert_limits = s.numbers_per_layer("swiglu_clamp_exp", n_layer, 0.0)?;
    let other_limits = s.numbers_per_layer("swiglu_clamp_shexp", n_layer, 0.0)?;
    let layers = common.layers(|i| {
        let window = windowed[i].then_some(window);
        let attention = attention(s, i, hidden, heads[i], window)?;
        let limited = activation(other_limits[i]);
        let ffn = if is_routed(s, i) {
            let width = expert_width(s, i, &common)?;
            let shared = s.opt_count("expert_shared_feed_forward_length")? as usize;
            let mut options = MoeOptions::keyed(width, Gating::Sigmoid).with_shared(shared);
            options.activation = activation(expert_limits[i]);
            let mut moe = moe(s, i, hidden, &options)?;
            if let Some(shared) = &mut moe.shared {
                shared.ffn.activation = limited;
            }
            Ffn::Moe(moe)
        } else {
            let mut ffn = dense(s, i, &common)?;
            ffn.activation = limited;
            Ffn::Dense(ffn)
        };
        layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)
    })?;
    common.model(s, layers)
}

fn attention(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    heads: Heads,
    window: Option<usize>,
) -> Result<GqaSpec, ModelError> {
    let dims = HeadDims::read(s, hidden, heads)?;
    let rope = if window.is_some() {
        let rope = s.rope_without_factors(RopeKind::Halves, dims.key)?;
        windowed_rope(s, &rope, WINDOW_BASE)?
    } else {
        half_rope(s, dims.key)?
    };
    let normed = s.has_tensor(&format!("blk.{layer}.attn_q_norm.weight"));
    let norms = normed.then_some(NormSpan::Head);
    let mut attention = gqa_of(s, layer, hidden, (heads, dims), Some(rope), norms)?;
    attention.window = window;
    if s.has_tensor(&format!("blk.{layer}.attn_gate.weight")) {
        let gate = output_gate(s, layer, &attention, GateFunction::Sigmoid)?;
        attention.gate = Some(gate);
    }
    Ok(attention)
}

/// Reads the rotary embedding of full layers, which is of half as many values as the file says. The
/// divisors are those of a whole head; its first ones count.
fn half_rope(s: &Source<'_>, key_dim: usize) -> Result<RopeSpec, ModelError> {
    let mut rope = s.rope_without_factors(RopeKind::Halves, key_dim)?;
    if !rope.dims.is_multiple_of(4) {
        let what = format!("{}; expected a multiple of 4", rope.dims);
        return Err(s.bad("rope.dimension_count", what));
    }
    rope.freq_factors = s.opt_vector("rope_freqs.weight", rope.dims / 2)?;
    rope.dims /= 2;
    Ok(rope)
}

fn activation(limit: f32) -> Activation {
    if limit > NO_LIMIT {
        Activation::LimitedSilu { limit }
    } else {
        Activation::Silu
    }
}
