//! `olmoe`: norms of queries and keys over all heads together; routing weights that are not
//! normalized; experts as wide as `feed_forward_length` says.

use super::ModelError;
use super::blocks::{Common, MoeOptions, gqa, heads, moe};
use super::source::Source;
use super::spec::{Ffn, LayerSpec, ModelSpec, NormSpan, Residual, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let widths = s.dim_per_layer("feed_forward_length", common.n_layer)?;
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
                    Some(NormSpan::Full),
                )?,
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn: Ffn::Moe(moe(s, i, hidden, &MoeOptions::softmax(widths[i], false))?),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}
