//! `minimax-m2`: norms of queries and keys over all heads together, rotation of a part of each
//! head, experts chosen by sigmoid scores with a selection bias.

use super::ModelError;
use super::blocks::{Common, MoeOptions, Setting, expert_widths, gqa, heads, moe};
use super::source::Source;
use super::spec::{Activation, Ffn, Gating, LayerSpec, ModelSpec, NormSpan, Residual, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    // Files have both keys; where they differ, this is the one that the tensors follow.
    let widths = if s.has("feed_forward_length") {
        s.dim_per_layer("feed_forward_length", common.n_layer)?
    } else {
        expert_widths(s, common.n_layer)?
    };
    let layers = (0..common.n_layer)
        .map(|i| {
            let options = MoeOptions {
                expert_ffn: widths[i],
                gating: Setting::Default(Gating::Sigmoid),
                normalize: Setting::Always(true),
                scale: Setting::Always(1.0),
                activation: Activation::Silu,
                shared: None,
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
                    Some(NormSpan::Full),
                )?,
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn: Ffn::Moe(moe(s, i, hidden, &options)?),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}
