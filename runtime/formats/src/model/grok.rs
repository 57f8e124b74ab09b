//! `grok` (Grok 1 and 2): soft caps on scores and logits, norms before and after both blocks, GELU,
//! and in the second a dense block beside the routed experts of every layer.

use super::ModelError;
use super::blocks::{Common, HeadDims, MoeOptions, dense, gqa_of, heads, layer_of, moe};
use super::options::{YarnKeys, rope, softcap};
use super::source::Source;
use super::spec::{
    Activation, Ffn, HeadOptions, Mixer, ModelSpec, MoeSpec, RopeKind, SharedSpec, TensorId,
};

/// The numbers of the first model, whose files have no keys for them.
const EMBEDDING_SCALE: f32 = 78.383_67;
const LOGIT_SCALE: f32 = 0.577_350_26;
const SCORE_SCALE: f32 = 0.088_388_346;
const SCORE_CAP: f32 = 30.0;

/// YaRN's fast bound in files without a key for it.
const BETA_FAST: f32 = 8.0;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let scale = s.f32_or("attention.output_scale", SCORE_SCALE)?;
    let cap = softcap(s, "attn_logit_softcapping", SCORE_CAP)?;
    let keys = YarnKeys::All {
        beta_fast: BETA_FAST,
    };
    let layers = common.layers(|i| {
        let dims = HeadDims::read(s, hidden, heads[i])?;
        let rope = rope(s, RopeKind::Halves, dims.key, keys)?;
        let mut attention = gqa_of(s, i, hidden, (heads[i], dims), Some(rope), None)?;
        (attention.scale, attention.softcap) = (scale, cap);
        let ffn = Ffn::Moe(experts(s, i, &common)?);
        let mut layer = layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)?;
        let norm = format!("blk.{i}.attn_output_norm.weight");
        layer.residual.mixer_norm = Some(s.vector(&norm, hidden)?);
        layer.residual.ffn_norm = Some(last_norm(s, i, hidden)?);
        Ok(layer)
    })?;
    let mut model = common.model(s, layers)?;
    model.embedding_scale = s.f32_or("embedding_scale", EMBEDDING_SCALE)?;
    model.head = HeadOptions {
        bias: None,
        scale: s.f32_or("logit_scale", LOGIT_SCALE)?,
        softcap: softcap(s, "final_logit_softcapping", 0.0)?,
    };
    Ok(model)
}

/// Describes the experts of a layer. With a dense block beside them, the sum of both is divided by
/// the root of 2.
fn experts(s: &Source<'_>, i: usize, common: &Common) -> Result<MoeSpec, ModelError> {
    let name = if s.has("expert_feed_forward_length") {
        "expert_feed_forward_length"
    } else {
        "feed_forward_length"
    };
    let width = s.dim_of_layer(name, i, common.n_layer)?;
    let mut options = MoeOptions::softmax(width, true);
    options.activation = Activation::Gelu;
    let mut moe = moe(s, i, common.hidden, &options)?;
    if s.has_tensor(&format!("blk.{i}.ffn_up.weight")) {
        let mut ffn = dense(s, i, common)?;
        ffn.activation = Activation::Gelu;
        moe.shared = Some(SharedSpec {
            ffn,
            gate: None,
            norm: None,
        });
        moe.sum_scale = std::f32::consts::FRAC_1_SQRT_2;
    }
    Ok(moe)
}

/// Finds the norm of a layer's feed-forward block, which has either of two names.
fn last_norm(s: &Source<'_>, i: usize, hidden: usize) -> Result<TensorId, ModelError> {
    match s.opt_vector(&format!("blk.{i}.layer_output_norm.weight"), hidden)? {
        Some(norm) => Ok(norm),
        None => s.vector(&format!("blk.{i}.post_ffw_norm.weight"), hidden),
    }
}
