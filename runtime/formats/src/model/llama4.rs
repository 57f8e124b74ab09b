//! `llama4`: chunked attention with rotation beside full attention without it, whose scores grow
//! with the position; experts chosen by logits, whose weights multiply what they read, beside a
//! shared expert; dense layers between.

use super::ModelError;
use super::blocks::{
    Common, HeadDims, Heads, MoeOptions, Setting, dense, expert_width, gqa_of, heads, layer_of, moe,
};
use super::options::{YarnKeys, rope, unweighted_after_rope};
use super::source::Source;
use super::spec::{Ffn, Gating, GqaSpec, Mixer, ModelSpec, RopeKind, Temperature, WindowKind};

/// Positions per chunk, the same in every file.
const CHUNK: usize = 8192;

/// Of the layers in a row this many long, the last does not rotate.
const ROPE_PERIOD: usize = 4;

/// Of the layers in a row this many long, all but the last are chunked.
const CHUNK_PERIOD: u32 = 4;

/// Growth of scores in layers without rotation, the same in every file.
const TEMPERATURE: Temperature = Temperature {
    scale: 0.1,
    length: CHUNK,
    offset: 1,
};

/// Experts of the one model without norms of queries and keys.
const WITHOUT_NORMS: usize = 128;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let step = s.dim("interleave_moe_layer_step")?;
    let chunked = s.windowed_layers(common.n_layer, CHUNK_PERIOD)?;
    let layers = common.layers(|i| {
        let mut attention = attention(s, i, hidden, heads[i])?;
        if chunked[i] {
            attention.window = Some(CHUNK);
            attention.window_kind = WindowKind::Chunked;
        }
        let ffn = if (i + 1).is_multiple_of(step) {
            let width = expert_width(s, i, &common)?;
            let options = MoeOptions {
                gating: Setting::Always(Gating::SigmoidChosen),
                ..MoeOptions::softmax(width, false)
            };
            let mut moe = moe(s, i, hidden, &options.with_shared(width))?;
            moe.weigh_input = true;
            moe.selection_bias = None;
            moe.groups = None;
            Ffn::Moe(moe)
        } else {
            Ffn::Dense(dense(s, i, &common)?)
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
) -> Result<GqaSpec, ModelError> {
    let dims = HeadDims::read(s, hidden, heads)?;
    let rotates = !(layer + 1).is_multiple_of(ROPE_PERIOD);
    let rope = rope(s, RopeKind::Adjacent, dims.key, YarnKeys::Fixed)?;
    let rope = rotates.then_some(rope);
    let mut attention = gqa_of(s, layer, hidden, (heads, dims), rope, None)?;
    if !rotates {
        attention.temperature = Some(TEMPERATURE);
    } else if s.dim("expert_count")? != WITHOUT_NORMS {
        attention.qk_norm = Some(unweighted_after_rope());
    }
    Ok(attention)
}
