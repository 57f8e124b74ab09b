//! `mistral3` (Ministral 3, Mistral Small): Llama with YaRN and scores that grow with the position.

use super::ModelError;
use super::blocks::{Common, HeadDims, MoeOptions, dense, gqa_of, heads, layer_of, moe};
use super::options::{YarnKeys, original_context, rope, temperature, yarn_magnitude};
use super::source::Source;
use super::spec::{Ffn, Mixer, ModelSpec, RopeKind, RopeScaling, RopeSpec};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let routed = s.opt_count("expert_count")? > 0;
    let temperature = temperature(s, || original_context(s))?;
    let layers = common.layers(|i| {
        let dims = HeadDims::read(s, hidden, heads[i])?;
        let rope = sharpened(s, rope(s, RopeKind::Adjacent, dims.key, YarnKeys::Betas)?)?;
        let mut attention = gqa_of(s, i, hidden, (heads[i], dims), Some(rope), None)?;
        attention.temperature = temperature;
        let ffn = if routed {
            let width = s.dim_of_layer("feed_forward_length", i, common.n_layer)?;
            Ffn::Moe(moe(s, i, hidden, &MoeOptions::softmax(width, true))?)
        } else {
            Ffn::Dense(dense(s, i, &common)?)
        };
        layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)
    })?;
    common.model(s, layers)
}

/// Divides YaRN's magnitude by that of `rope.scaling.yarn_log_multiplier`, where it is not 0.
fn sharpened(s: &Source<'_>, mut rope: RopeSpec) -> Result<RopeSpec, ModelError> {
    let name = "rope.scaling.yarn_log_multiplier";
    let multiplier = s.f32_or(name, 0.0)?;
    if let RopeScaling::Yarn { factor, .. } = rope.scaling
        && multiplier != 0.0
    {
        rope.magnitude /= yarn_magnitude(factor, multiplier);
        if !rope.magnitude.is_finite() {
            let what = format!(
                "{multiplier} makes the rotation's magnitude {}",
                rope.magnitude
            );
            return Err(s.bad(name, what));
        }
    }
    Ok(rope)
}
