//! `granitemoe`: factors on embeddings, scores, what is added to the hidden state, and logits.

use super::ModelError;
use super::blocks::{Common, MoeOptions, dense, gqa, heads, is_routed, layer_of, moe};
use super::source::Source;
use super::spec::{Ffn, ModelSpec, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let shared = s.opt_count("expert_shared_feed_forward_length")? as usize;
    // 0 stands for a file without the factor.
    let factor = |name: &str| {
        let value = s.f32_or(name, 1.0)?;
        Ok::<_, ModelError>(if value == 0.0 { 1.0 } else { value })
    };
    let residual = factor("residual_scale")?;
    let layers = common.layers(|i| {
        let mixer = gqa(s, i, hidden, heads[i], RopeKind::Adjacent, None)?;
        let ffn = if is_routed(s, i) {
            let width = s.dim_of_layer("feed_forward_length", i, common.n_layer)?;
            let options = MoeOptions::softmax(width, true).with_shared(shared);
            Ffn::Moe(moe(s, i, hidden, &options)?)
        } else {
            Ffn::Dense(dense(s, i, &common)?)
        };
        let mut layer = layer_of(s, i, hidden, mixer, ffn)?;
        layer.residual.mixer_scale = residual;
        layer.residual.ffn_scale = residual;
        Ok(layer)
    })?;
    let divisor = s.required_f32("logit_scale")?;
    if divisor == 0.0 || !(1.0 / divisor).is_finite() {
        let what = format!("{divisor}; logits are divided by it");
        return Err(s.bad("logit_scale", what));
    }
    let embedding = factor("embedding_scale")?;
    let mut model = common.model(s, layers)?;
    model.embedding_scale = embedding;
    model.head.scale = 1.0 / divisor;
    Ok(model)
}
