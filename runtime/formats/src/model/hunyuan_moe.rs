//! `hunyuan-moe` (Hunyuan A13B): norms of queries and keys after rotation, routed experts beside a
//! shared one in every layer.

use super::ModelError;
use super::blocks::{Common, MoeOptions, gqa_spec, heads, layer_of, moe};
use super::source::Source;
use super::spec::{Ffn, Mixer, ModelSpec, NormSpan, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let layers = common.layers(|i| {
        let norms = Some(NormSpan::Head);
        let mut attention = gqa_spec(s, i, hidden, heads[i], RopeKind::Halves, norms)?;
        if let Some(norm) = &mut attention.qk_norm {
            norm.after_rope = true;
        }
        // The key of experts' widths means nothing in these files.
        let width = s.dim_of_layer("feed_forward_length", i, common.n_layer)?;
        let shared = s
            .opt_dim("expert_shared_feed_forward_length")?
            .unwrap_or(width);
        let options = MoeOptions::softmax(width, true).with_shared(shared);
        let ffn = Ffn::Moe(moe(s, i, hidden, &options)?);
        layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)
    })?;
    common.model(s, layers)
}
