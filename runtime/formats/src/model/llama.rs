//! `llama`: Llama 1 to 3 and their many relatives, and Mixtral, which is the same network with
//! routed experts.

use super::ModelError;
use super::blocks::{Common, MoeOptions, gqa, heads, moe};
use super::source::Source;
use super::spec::{Ffn, LayerSpec, ModelSpec, Residual, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let ffn = s.dim_per_layer("feed_forward_length", common.n_layer)?;
    let routed = s.opt_count("expert_count")? > 0;
    let layers = (0..common.n_layer)
        .map(|i| {
            Ok(LayerSpec {
                residual: Residual::default(),
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: gqa(s, i, hidden, heads[i], RopeKind::Adjacent, None)?,
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
