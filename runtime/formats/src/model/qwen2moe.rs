//! `qwen2moe`: biased queries, keys and values; routing weights that are not normalized; a shared
//! expert behind a sigmoid gate.

use super::ModelError;
use super::blocks::{Common, MoeOptions, Shared, expert_widths, gqa, heads, moe};
use super::source::Source;
use super::spec::{Ffn, LayerSpec, ModelSpec, Residual, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let widths = expert_widths(s, common.n_layer)?;
    let shared = shared_widths(s, common.n_layer)?;
    let layers = (0..common.n_layer)
        .map(|i| {
            let shared = Some(Shared {
                ffn: shared[i],
                gated: true,
            });
            let options = MoeOptions {
                shared,
                ..MoeOptions::softmax(widths[i], false)
            };
            Ok(LayerSpec {
                residual: Residual::default(),
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: gqa(s, i, hidden, heads[i], RopeKind::Halves, None)?,
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn: Ffn::Moe(moe(s, i, hidden, &options)?),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}

/// Reads the inner width of the shared expert by layer: that of a dense block unless the file has a
/// key for it.
pub(super) fn shared_widths(s: &Source<'_>, n_layer: usize) -> Result<Vec<usize>, ModelError> {
    match s.opt_count("expert_shared_feed_forward_length")? {
        0 => s.dim_per_layer("feed_forward_length", n_layer),
        _ => Ok(vec![s.dim("expert_shared_feed_forward_length")?; n_layer]),
    }
}
