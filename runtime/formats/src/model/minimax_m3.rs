//! `minimax-m3`: grouped-query attention that chooses blocks of keys per KV head, after leading
//! dense layers that attend to everything; clamped SwiGLU everywhere.

use super::ModelError;
use super::blocks::{
    Common, MoeOptions, Setting, Shared, expert_widths, gqa_spec, heads, moe, shared_by_count,
};
use super::qwen4exp::{Choice, block_index};
use super::source::Source;
use super::spec::{
    Activation, BlockScore, Ffn, Gating, GqaSpec, LayerSpec, Mixer, ModelSpec, NormSpan, Residual,
    RopeKind,
};

/// `g' σ(1.702 g') (u' + 1)`, as the model's code has it.
const SWIGLU: Activation = Activation::ClampedSwiglu {
    alpha: 1.702,
    limit: 7.0,
};

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (hidden, n_layer) = (common.hidden, common.n_layer);
    s.require(&["expert_gating_func"])?;
    let n_dense = s.opt_count("leading_dense_block_count")? as usize;
    let heads = heads(s, n_layer)?;
    let widths = expert_widths(s, n_layer)?;
    let layers = (0..n_layer)
        .map(|i| {
            let norm = Some(NormSpan::Head);
            let mut attention = gqa_spec(s, i, hidden, heads[i], RopeKind::Halves, norm)?;
            let ffn = if i < n_dense {
                let width = s.dim_per_layer("feed_forward_length", n_layer)?[i];
                let mut ffn = s.gated_ffn(i, hidden, width)?;
                ffn.activation = SWIGLU;
                Ffn::Dense(ffn)
            } else {
                index(s, i, hidden, &mut attention)?;
                Ffn::Moe(experts(s, i, hidden, widths[i])?)
            };
            Ok(LayerSpec {
                residual: Residual::default(),
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: Mixer::Gqa(attention),
                ffn_norm: s.vector(&format!("blk.{i}.ffn_norm.weight"), hidden)?,
                ffn,
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}

/// Adds the index of a sparse layer to its attention.
fn index(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    attention: &mut GqaSpec,
) -> Result<(), ModelError> {
    let key = "attention.indexer.head_count";
    let n_head = s.dim(key)?;
    if n_head != attention.n_head_kv {
        let what = format!("{n_head}; expected the {} KV heads", attention.n_head_kv);
        return Err(s.bad(key, what));
    }
    let kept = s.dim("attention.indexer.top_k")?;
    let key = "attention.indexer.local_blocks";
    let local = s.number(key)? as usize;
    if local > kept {
        let what = format!("{local}; expected at most attention.indexer.top_k {kept}");
        return Err(s.bad(key, what));
    }
    let choice = Choice {
        n_head,
        block: s.dim("attention.indexer.block_size")?,
        kept,
        score: BlockScore::Best { local },
    };
    attention.index = Some(block_index(s, layer, hidden, choice, attention)?);
    Ok(())
}

fn experts(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    width: usize,
) -> Result<super::spec::MoeSpec, ModelError> {
    let shared = shared_by_count(s, width)?;
    let options = MoeOptions {
        expert_ffn: width,
        gating: Setting::Default(Gating::Sigmoid),
        normalize: Setting::Default(false),
        scale: Setting::Default(0.0),
        activation: SWIGLU,
        shared: shared.map(|ffn| Shared { ffn, gated: false }),
    };
    let mut moe = moe(s, layer, hidden, &options)?;
    if let Some(shared) = &mut moe.shared {
        shared.ffn.activation = SWIGLU;
    }
    Ok(moe)
}
