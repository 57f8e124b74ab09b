//! `qwen3` and `qwen3moe`: per-head norms of queries and keys; the second with routed experts in
//! every layer.

use super::ModelError;
use super::blocks::{Common, MoeOptions, gqa, heads, moe};
use super::source::Source;
use super::spec::{Ffn, LayerSpec, ModelSpec, NormSpan, Residual, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let routed = s.opt_count("expert_count")? > 0;
    let ffn_key = if routed && s.has("expert_feed_forward_length") {
        "expert_feed_forward_length"
    } else {
        "feed_forward_length"
    };
    let ffn = s.dim_per_layer(ffn_key, common.n_layer)?;
    let layers = (0..common.n_layer)
        .map(|i| {
            Ok(LayerSpec {
                residual: Residual::default(),
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: gqa(
                    s,
                    i,
                    hidden,
                    heads[i],
                    RopeKind::Halves,
                    Some(NormSpan::Head),
                )?,
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn: if routed {
                    Ffn::Moe(moe(s, i, hidden, &MoeOptions::softmax(ffn[i], true))?)
                } else {
                    Ffn::Dense(s.gated_ffn(i, hidden, ffn[i])?)
                },
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}
