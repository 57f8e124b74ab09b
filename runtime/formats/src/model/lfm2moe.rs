//! `lfm2moe` (LFM2): gated short convolutions beside attention layers, leading dense layers, and
//! normalized weights of experts chosen with a bias.

use super::ModelError;
use super::blocks::{
    Common, Heads, MoeOptions, Setting, dense, expert_width, gqa_spec, layer_of, moe,
};
use super::source::Source;
use super::spec::{Ffn, Gating, Mixer, ModelSpec, NormSpan, RopeKind, ShortConvSpec};
use tier_plan_kernels::MAX_CONV_TAPS;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let (hidden, n_layer) = (common.hidden, common.n_layer);
    let query = s.counts_per_layer("attention.head_count", n_layer)?;
    let key_value = s.counts_per_layer("attention.head_count_kv", n_layer)?;
    let n_dense = s.opt_count("leading_dense_block_count")? as usize;
    s.dim("expert_gating_func")?;
    let layers = common.layers(|i| {
        let mixer = if key_value[i] == 0 {
            Mixer::ShortConv(short_conv(s, i, hidden)?)
        } else {
            let count = |name, n: u32| s.in_bounds(name, n as usize, MAX_HEADS);
            let heads = Heads {
                first: query[0].max(1) as usize,
                n_head: count("attention.head_count", query[i])?,
                n_head_kv: count("attention.head_count_kv", key_value[i])?,
            };
            let norms = Some(NormSpan::Head);
            Mixer::Gqa(gqa_spec(s, i, hidden, heads, RopeKind::Halves, norms)?)
        };
        let ffn = if i < n_dense {
            Ffn::Dense(dense(s, i, &common)?)
        } else {
            let options = MoeOptions {
                normalize: Setting::Always(true),
                scale: Setting::Always(1.0),
                ..MoeOptions::keyed(expert_width(s, i, &common)?, Gating::Sigmoid)
            };
            Ffn::Moe(moe(s, i, hidden, &options)?)
        };
        layer_of(s, i, hidden, mixer, ffn)
    })?;
    common.model_under(s, layers, "token_embd_norm.weight")
}

/// Bound on heads of a layer, far above any real model.
const MAX_HEADS: usize = 1 << 16;

fn short_conv(s: &Source<'_>, layer: usize, hidden: usize) -> Result<ShortConvSpec, ModelError> {
    let name = "shortconv.l_cache";
    let taps = s.dim(name)?;
    if !(2..=MAX_CONV_TAPS).contains(&taps) {
        let what = format!("{taps} tokens; expected 2 to {MAX_CONV_TAPS}");
        return Err(s.bad(name, what));
    }
    let p = format!("blk.{layer}.shortconv");
    Ok(ShortConvSpec {
        channels: hidden,
        taps,
        input: s.linear(&format!("{p}.in_proj"), hidden, 3 * hidden)?,
        conv: s.parameters(&format!("{p}.conv.weight"), &[taps, hidden])?,
        out: s.linear(&format!("{p}.out_proj"), hidden, hidden)?,
    })
}
