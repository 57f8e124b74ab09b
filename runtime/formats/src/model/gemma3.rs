//! `gemma3`: norms before and after both blocks, GELU, five windowed layers to a full one, and
//! embeddings multiplied by the root of their width.

use super::ModelError;
use super::blocks::{Common, HeadDims, dense, gqa_of, heads, layer_of};
use super::options::{YarnKeys, capped_head, rope, windowed_rope};
use super::source::Source;
use super::spec::{Activation, Ffn, Mixer, ModelSpec, NormSpan, RopeKind};

/// Of the layers in a row this many long, all but the last have a window.
const WINDOW_PERIOD: u32 = 6;

/// Base of windowed layers in files without a key for it.
const WINDOW_BASE: f32 = 10_000.0;

/// Layers of the one model whose scores are scaled by the share of a head in the width, not by the
/// width of its keys.
const SCALED_BY_SHARE: usize = 62;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let window = match s.opt_count("attention.sliding_window")? {
        0 => None,
        _ => Some(s.dim("attention.sliding_window")?),
    };
    let windowed = match window {
        Some(_) => s.windowed_layers(common.n_layer, WINDOW_PERIOD)?,
        None => vec![false; common.n_layer],
    };
    let layers = common.layers(|i| {
        let dims = HeadDims::read(s, hidden, heads[i])?;
        let mut rope = rope(s, RopeKind::Halves, dims.key, YarnKeys::Fixed)?;
        if windowed[i] {
            rope = windowed_rope(s, &rope, WINDOW_BASE)?;
        }
        let norms = Some(NormSpan::Head);
        let mut attention = gqa_of(s, i, hidden, (heads[i], dims), Some(rope), norms)?;
        attention.window = window.filter(|_| windowed[i]);
        let width = if common.n_layer == SCALED_BY_SHARE {
            hidden / heads[0].n_head
        } else {
            dims.key
        };
        attention.scale = 1.0 / (width.max(1) as f32).sqrt();
        let mut ffn = dense(s, i, &common)?;
        ffn.activation = Activation::Gelu;
        let mut layer = layer_of(s, i, hidden, Mixer::Gqa(attention), Ffn::Dense(ffn))?;
        let norm = |name: &str| {
            s.vector(&format!("blk.{i}.{name}.weight"), hidden)
                .map(Some)
        };
        layer.residual.mixer_norm = norm("post_attention_norm")?;
        layer.residual.ffn_norm = norm("post_ffw_norm")?;
        Ok(layer)
    })?;
    let mut model = common.model(s, layers)?;
    model.embedding_scale = (hidden as f32).sqrt();
    model.head = capped_head(s, 0.0)?;
    Ok(model)
}
