//! `qwen3next` and `qwen35moe`: most layers are gated delta nets, the others attention with an output gate; routed
//! experts and a gated shared one in every layer.
//!
//! The second differs in how key heads are shared among value heads, in the matrices of the delta net's rates, and in
//! positions that have sections for images.

use super::ModelError;
use super::arch::{Common, softmax_moe};
use super::source::Source;
use super::spec::{
    DeltaInput, DeltaRates, DeltaSpec, GqaSpec, KeySharing, LayerSpec, Mixer, ModelSpec, NormSpan, RopeKind,
};
use crate::kernels::MAX_CONV_TAPS;

/// Bound on heads and their width in a delta net, far above any real one: a layer's state is their product with
/// another width, and nothing in the file is of that size.
const MAX_DELTA: usize = 1024;

/// Attention layers come at the end of each row of so many, unless the file says otherwise.
const ATTENTION_INTERVAL: usize = 4;

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let mut common = Common::read(s)?;
    let n_predict = s.opt_count("nextn_predict_layers")? as usize;
    let Some(n_layer) = common.n_layer.checked_sub(n_predict).filter(|n| *n > 0) else {
        let what = format!("{n_predict} of {} blocks; at least one must be no prediction block", common.n_layer);
        return Err(s.bad("nextn_predict_layers", what));
    };
    common.n_layer = n_layer;
    let hidden = common.hidden;
    let recurrent = recurrent_layers(s, n_layer)?;
    let heads = Heads::read(s, n_layer)?;
    let ffn = s.dim_per_layer("expert_feed_forward_length", n_layer)?;
    let layers = (0..n_layer)
        .map(|i| {
            Ok(LayerSpec {
                mixer_norm: s.vector(&format!("blk.{i}.attn_norm.weight"), hidden)?,
                mixer: if recurrent[i] {
                    Mixer::Delta(delta(s, i, hidden)?)
                } else {
                    Mixer::Gqa(gated_attention(s, i, hidden, &heads)?)
                },
                ffn_norm: s.vector(&format!("blk.{i}.post_attention_norm.weight"), hidden)?,
                ffn: softmax_moe(s, i, hidden, ffn[i])?,
            })
        })
        .collect::<Result<_, ModelError>>()?;
    common.model(s, layers)
}

/// By layer: whether it is a delta net.
fn recurrent_layers(s: &Source<'_>, n_layer: usize) -> Result<Vec<bool>, ModelError> {
    if let Some(flags) = s.opt_flags("attention.recurrent_layers", n_layer)? {
        return Ok(flags);
    }
    let interval = s.opt_dim("full_attention_interval")?.unwrap_or(ATTENTION_INTERVAL);
    Ok((1..=n_layer).map(|i| !i.is_multiple_of(interval)).collect())
}

/// Heads of the attention layers. Files with a number for each layer may have 0 for the others.
struct Heads {
    query: Vec<u32>,
    key_value: Vec<u32>,
}

impl Heads {
    fn read(s: &Source<'_>, n_layer: usize) -> Result<Self, ModelError> {
        let query = s.counts_per_layer("attention.head_count", n_layer)?;
        let key = "attention.head_count_kv";
        let key_value = if s.has(key) { s.counts_per_layer(key, n_layer)? } else { query.clone() };
        Ok(Self { query, key_value })
    }

    /// Query heads, and key and value heads.
    fn of(&self, s: &Source<'_>, layer: usize) -> Result<(usize, usize), ModelError> {
        let (query, key_value) = (self.query[layer] as usize, self.key_value[layer] as usize);
        let query = s.in_bounds("attention.head_count", query, MAX_DELTA)?;
        let key_value = s.in_bounds("attention.head_count_kv", key_value, MAX_DELTA)?;
        if query.is_multiple_of(key_value) {
            return Ok((query, key_value));
        }
        let what = format!("{key_value} does not divide the {query} query heads");
        Err(s.bad("attention.head_count_kv", what))
    }
}

fn gated_attention(s: &Source<'_>, layer: usize, hidden: usize, heads: &Heads) -> Result<GqaSpec, ModelError> {
    let (n_head, n_head_kv) = heads.of(s, layer)?;
    let dim = match s.opt_dim("attention.key_length")? {
        Some(dim) => dim,
        None => s.in_bounds("attention.head_count", hidden / n_head, hidden)?,
    };
    let value_dim = s.opt_dim("attention.value_length")?.unwrap_or(dim);
    if value_dim != dim {
        let what = format!("{value_dim}, but the gates are as wide as keys ({dim}), so values must be too");
        return Err(s.bad("attention.value_length", what));
    }
    let mut rope = s.rope(RopeKind::Halves, dim)?;
    rope.sections = s.opt_sections("rope.dimension_sections")?;
    let p = format!("blk.{layer}");
    let q_norm = s.vector(&format!("{p}.attn_q_norm.weight"), dim)?;
    let k_norm = s.vector(&format!("{p}.attn_k_norm.weight"), dim)?;
    let scale = match s.f32_or("attention.scale", 0.0)? {
        0.0 => 1.0 / (dim as f32).sqrt(),
        scale => scale,
    };
    Ok(GqaSpec {
        n_head,
        n_head_kv,
        key_dim: dim,
        value_dim,
        scale,
        rope,
        qk_norm: Some((q_norm, k_norm, NormSpan::Head)),
        gated: true,
        q: s.linear(&format!("{p}.attn_q"), hidden, 2 * n_head * dim)?,
        k: s.linear(&format!("{p}.attn_k"), hidden, n_head_kv * dim)?,
        v: s.linear(&format!("{p}.attn_v"), hidden, n_head_kv * dim)?,
        o: s.linear(&format!("{p}.attn_output"), n_head * dim, hidden)?,
    })
}

fn delta(s: &Source<'_>, layer: usize, hidden: usize) -> Result<DeltaSpec, ModelError> {
    let size = |key, max| s.in_bounds(key, s.dim(key)?, max);
    let head_dim = size("ssm.state_size", MAX_DELTA)?;
    let n_key_head = size("ssm.group_count", MAX_DELTA)?;
    let n_value_head = size("ssm.time_step_rank", MAX_DELTA)?;
    let conv_taps = size("ssm.conv_kernel", MAX_CONV_TAPS)?;
    if !n_value_head.is_multiple_of(n_key_head) {
        let what = format!("{n_key_head} key heads do not divide the {n_value_head} value heads (ssm.time_step_rank)");
        return Err(s.bad("ssm.group_count", what));
    }
    let value_width = n_value_head * head_dim;
    let inner = s.dim("ssm.inner_size")?;
    if inner != value_width {
        let what = format!("{inner}; expected {value_width}, {n_value_head} value heads of ssm.state_size {head_dim}");
        return Err(s.bad("ssm.inner_size", what));
    }
    let channels = 2 * n_key_head * head_dim + value_width;
    let p = format!("blk.{layer}");
    let grouped = s.arch() == "qwen3next";
    let fused = format!("{p}.ssm_in");
    let input = if grouped && s.has_tensor(&format!("{fused}.weight")) {
        DeltaInput::ByKeyHead(s.linear(&fused, hidden, channels + value_width)?)
    } else {
        DeltaInput::Split {
            qkv: s.linear(&format!("{p}.attn_qkv"), hidden, channels)?,
            gate: s.linear(&format!("{p}.attn_gate"), hidden, value_width)?,
        }
    };
    let rates = if grouped {
        DeltaRates::ByKeyHead(s.linear(&format!("{p}.ssm_ba"), hidden, 2 * n_value_head)?)
    } else {
        DeltaRates::Split {
            beta: s.linear(&format!("{p}.ssm_beta"), hidden, n_value_head)?,
            alpha: s.linear(&format!("{p}.ssm_alpha"), hidden, n_value_head)?,
        }
    };
    Ok(DeltaSpec {
        n_key_head,
        n_value_head,
        head_dim,
        conv_taps,
        sharing: if grouped { KeySharing::Grouped } else { KeySharing::Cyclic },
        input,
        rates,
        conv: s.parameters(&format!("{p}.ssm_conv1d.weight"), &[conv_taps, channels])?,
        dt_bias: s.vector(&format!("{p}.ssm_dt.bias"), n_value_head)?,
        decay: s.vector(&format!("{p}.ssm_a"), n_value_head)?,
        norm: s.vector(&format!("{p}.ssm_norm.weight"), head_dim)?,
        out: s.linear(&format!("{p}.ssm_out"), value_width, hidden)?,
    })
}
