//! `kimi-linear`: most layers are Kimi delta attention, the others latent attention that knows no
//! positions; leading dense layers, then routed and shared experts.

use super::ModelError;
use super::blocks::{Common, Setting, moe};
use super::ffn_layers::{FfnLayers, require_gating, require_selection_bias};
use super::kda::{HybridHeads, KdaForm, kda_spec};
use super::mla::{MlaSizes, Queries, mla_spec};
use super::source::Source;
use super::spec::{Activation, Ffn, Gating, LayerSpec, Mixer, ModelSpec, Residual};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (n_layer, hidden) = (common.n_layer, common.hidden);
    let heads = HybridHeads::read(s, n_layer)?;
    let blocks = FfnLayers::read(s, n_layer)?.always_shared();
    require_gating(s)?;
    let layers = (0..n_layer)
        .map(|i| {
            let mixer = if heads.is_kda[i] {
                let (n_head, eps) = (heads.heads[0], common.norm_eps);
                Mixer::Kda(kda_spec(s, i, hidden, n_head, KdaForm::LowRank, eps)?)
            } else {
                let sizes = MlaSizes::read(s, heads.heads[i], "")?;
                Mixer::Mla(mla_spec(s, i, hidden, sizes, None, Queries::Plain)?)
            };
            let ffn = if blocks.is_dense(i) {
                blocks.dense(s, i, hidden, Activation::Silu)?
            } else {
                let mut options = blocks.options(s, i, Gating::Sigmoid)?;
                // Whatever the file says: those that it was made from don't.
                options.normalize = Setting::Always(true);
                let moe = moe(s, i, hidden, &options)?;
                require_selection_bias(s, i, &moe)?;
                Ffn::Moe(moe)
            };
            Ok(LayerSpec {
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer,
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn,
                residual: Residual::default(),
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}
