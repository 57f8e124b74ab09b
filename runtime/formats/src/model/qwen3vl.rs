//! `qwen3vlmoe`: the text part of Qwen3-VL, which is `qwen3moe` with positions that have sections.

use super::ModelError;
use super::blocks::{Common, MoeOptions, expert_widths, gqa_spec, heads, layer_of, moe};
use super::source::Source;
use super::spec::{Ffn, Mixer, ModelSpec, NormSpan, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let widths = expert_widths(s, common.n_layer)?;
    let sections = s.sections()?;
    let layers = common.layers(|i| {
        let norms = Some(NormSpan::Head);
        let mut attention = gqa_spec(s, i, hidden, heads[i], RopeKind::Halves, norms)?;
        if let Some(rope) = &mut attention.rope {
            rope.sections = Some(sections);
        }
        let options = MoeOptions::softmax(widths[i], true);
        let ffn = Ffn::Moe(moe(s, i, hidden, &options)?);
        layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)
    })?;
    common.model(s, layers)
}
