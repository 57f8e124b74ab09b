//! `glm4moe` (GLM-4.5 and its relatives): leading dense layers, then experts chosen by sigmoid
//! scores with a selection bias, beside a shared expert; rotation of a part of each head; per-head
//! norms of queries and keys in some models.

use super::ModelError;
use super::blocks::{
    Common, MoeOptions, Setting, Shared, expert_widths, gqa, heads, moe, shared_by_count,
};
use super::source::Source;
use super::spec::{Activation, Ffn, Gating, LayerSpec, ModelSpec, NormSpan, Residual, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    s.check_text_rope()?;
    let n_dense = s.opt_count("leading_dense_block_count")? as usize;
    let dense = if n_dense > 0 {
        s.dim_per_layer("feed_forward_length", common.n_layer)?
    } else {
        Vec::new()
    };
    let widths = expert_widths(s, common.n_layer)?;
    let layers = (0..common.n_layer)
        .map(|i| {
            let normed = s.has_tensor(&format!("blk.{i}.attn_q_norm.weight"));
            let ffn = if i < n_dense {
                Ffn::Dense(s.gated_ffn(i, hidden, dense[i])?)
            } else {
                let options = MoeOptions {
                    expert_ffn: widths[i],
                    gating: Setting::Default(Gating::Sigmoid),
                    normalize: Setting::Default(false),
                    scale: Setting::Default(1.0),
                    activation: Activation::Silu,
                    shared: shared_by_count(s, widths[i])?.map(|ffn| Shared { ffn, gated: false }),
                };
                Ffn::Moe(moe(s, i, hidden, &options)?)
            };
            Ok(LayerSpec {
                residual: Residual::default(),
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: gqa(
                    s,
                    i,
                    hidden,
                    heads[i],
                    RopeKind::Halves,
                    normed.then_some(NormSpan::Head),
                )?,
                ffn_norm: s.vector(&format!("blk.{i}.post_attention_norm.weight"), hidden)?,
                ffn,
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}
