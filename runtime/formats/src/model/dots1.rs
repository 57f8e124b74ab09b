//! `dots1` (dots.llm1) and `deepseek` (the first DeepSeek MoE): leading dense layers, then routed
//! experts beside shared ones. The first has norms of queries and keys and a router as its keys say,
//! the second softmax weights that are not normalized.

use super::ModelError;
use super::blocks::{Common, MoeOptions, Setting, dense, expert_width, gqa, heads, layer_of, moe};
use super::source::Source;
use super::spec::{Ffn, Gating, ModelSpec, NormSpan, RopeKind};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let hidden = common.hidden;
    let heads = heads(s, common.n_layer)?;
    let is_deepseek = s.arch() == "deepseek";
    let (kind, norms) = if is_deepseek {
        (RopeKind::Adjacent, None)
    } else {
        (RopeKind::Halves, Some(NormSpan::Head))
    };
    let n_dense = s.opt_count("leading_dense_block_count")? as usize;
    let layers = common.layers(|i| {
        let mixer = gqa(s, i, hidden, heads[i], kind, norms)?;
        let ffn = if i < n_dense {
            Ffn::Dense(dense(s, i, &common)?)
        } else {
            let width = expert_width(s, i, &common)?;
            let options = if is_deepseek {
                MoeOptions {
                    scale: Setting::Default(1.0),
                    ..MoeOptions::softmax(width, false)
                }
            } else {
                MoeOptions::keyed(width, Gating::Sigmoid)
            };
            let options = options.with_shared(s.shared_width(width)?);
            Ffn::Moe(moe(s, i, hidden, &options)?)
        };
        layer_of(s, i, hidden, mixer, ffn)
    })?;
    common.model(s, layers)
}
