//! `gemma4`: windowed layers with head sizes of their own, values under a norm and in full layers
//! perhaps the keys, layers that share an earlier layer's keys and values, routed experts beside a
//! dense block behind a router with its own input, and inputs of tokens for every layer.

use super::ModelError;
use super::blocks::{
    Common, HeadDims, Heads, MoeOptions, dense, expert_width, gqa_of, heads, is_routed, layer_of,
    moe,
};
use super::options::{YarnKeys, capped_head, rope};
use super::source::Source;
use super::spec::{
    Activation, Ffn, GqaSpec, LayerInput, Linear, Mixer, ModelSpec, NormSpan, QkNorm, RopeKind,
    RopeScaling, RopeSpec, RouterInput, SharedSpec, TokenInputs, WindowKind,
};

/// Base of windowed layers in files without a key for it.
const WINDOW_BASE: f32 = 10_000.0;

/// Cap on logits in files without a key for it.
const LOGIT_CAP: f32 = 30.0;

/// What all layers have in common.
struct Shared<'a> {
    s: &'a Source<'a>,
    common: Common,
    heads: Vec<Heads>,
    windowed: Vec<bool>,
    window: usize,
    /// The first layer without keys and values of its own.
    first_sharing: usize,
    /// Values that a token has for each layer; 0 for none.
    input_dim: usize,
}

pub(super) fn describe(s: &Source<'_>) -> Result<ModelSpec, ModelError> {
    let common = Common::read(s)?;
    let n_layer = common.n_layer;
    let windowed = s.flags("attention.sliding_window_pattern", n_layer)?;
    let of = Shared {
        s,
        heads: heads(s, n_layer)?,
        window: s.dim("attention.sliding_window")?,
        first_sharing: first_sharing(s, &windowed)?,
        input_dim: s.count_up_to("embedding_length_per_layer_input", MAX_INPUT)?,
        windowed,
        common,
    };
    let layers = of.common.layers(|i| of.layer(i))?;
    let token_inputs = of.token_inputs(n_layer)?;
    let hidden = of.common.hidden;
    let mut model = of.common.model(s, layers)?;
    model.embedding_scale = (hidden as f32).sqrt();
    model.head = capped_head(s, LOGIT_CAP)?;
    model.token_inputs = token_inputs;
    Ok(model)
}

/// Bound on the values that a token has for each layer, far above any real model.
const MAX_INPUT: usize = 1 << 16;

/// Returns the first layer that shares keys and values. The last two before it are those of a
/// windowed and of a full layer, which the others share.
fn first_sharing(s: &Source<'_>, windowed: &[bool]) -> Result<usize, ModelError> {
    let name = "attention.shared_kv_layers";
    let n = s.opt_count(name)? as usize;
    let n_layer = windowed.len();
    if n == 0 {
        return Ok(n_layer);
    }
    let first = n_layer.checked_sub(n).filter(|first| *first > 0);
    let owner = |first: usize, window: bool| first.checked_sub(if window { 2 } else { 1 });
    let fits = |first: usize| {
        windowed[first..]
            .iter()
            .all(|window| owner(first, *window).is_some_and(|owner| windowed[owner] == *window))
    };
    first.filter(|first| fits(*first)).ok_or_else(|| {
        let what = format!(
            "{n} of {n_layer} layers; expected a windowed layer, then a full one before the first of them"
        );
        s.bad(name, what)
    })
}

impl Shared<'_> {
    fn layer(&self, i: usize) -> Result<super::spec::LayerSpec, ModelError> {
        let (s, hidden) = (self.s, self.common.hidden);
        let attention = self.attention(i)?;
        let mut block = dense(s, i, &self.common)?;
        block.activation = Activation::Gelu;
        let norm = |name: &str| s.vector(&format!("blk.{i}.{name}.weight"), hidden);
        let ffn = if is_routed(s, i) {
            let mut options = MoeOptions::softmax(expert_width(s, i, &self.common)?, true);
            options.activation = Activation::Gelu;
            let mut moe = moe(s, i, hidden, &options)?;
            moe.router_input =
                RouterInput::Own(s.vector(&format!("blk.{i}.ffn_gate_inp.scale"), hidden)?);
            moe.input_norm = Some(norm("pre_ffw_norm_2")?);
            moe.output_norm = Some(norm("post_ffw_norm_2")?);
            moe.expert_scale =
                s.opt_vector(&format!("blk.{i}.ffn_down_exps.scale"), moe.n_expert)?;
            moe.shared = Some(SharedSpec {
                ffn: block,
                gate: None,
                norm: Some(norm("post_ffw_norm_1")?),
            });
            Ffn::Moe(moe)
        } else {
            Ffn::Dense(block)
        };
        let mut layer = layer_of(s, i, hidden, Mixer::Gqa(attention), ffn)?;
        layer.residual.mixer_norm = Some(norm("post_attention_norm")?);
        layer.residual.ffn_norm = Some(norm("post_ffw_norm")?);
        layer.residual.layer_input = self.layer_input(i)?;
        layer.residual.output_scale =
            s.opt_vector(&format!("blk.{i}.layer_output_scale.weight"), 1)?;
        Ok(layer)
    }

    fn head_dims(&self, windowed: bool) -> Result<HeadDims, ModelError> {
        let s = self.s;
        let (key, value) = if windowed {
            ("attention.key_length_swa", "attention.value_length_swa")
        } else {
            ("attention.key_length", "attention.value_length")
        };
        let dims = if windowed {
            HeadDims {
                key: s.dim(key)?,
                value: s.dim(value)?,
            }
        } else {
            HeadDims::read(s, self.common.hidden, self.heads[0])?
        };
        if dims.key != dims.value {
            let what = format!("{}; expected {}, as wide as keys", dims.value, dims.key);
            return Err(s.bad(value, what));
        }
        Ok(dims)
    }

    fn rope(&self, windowed: bool, head_dim: usize) -> Result<RopeSpec, ModelError> {
        let s = self.s;
        if !windowed {
            return rope(s, RopeKind::Halves, head_dim, YarnKeys::Fixed);
        }
        let name = "rope.dimension_count_swa";
        let default = s.opt_dim("rope.dimension_count")?.unwrap_or(head_dim);
        Ok(RopeSpec {
            kind: RopeKind::Halves,
            dims: s.rope_dims(name, default, head_dim)?,
            base: s.rope_base("rope.freq_base_swa", WINDOW_BASE)?,
            scaling: RopeScaling::None,
            magnitude: s.f32_or("rope.scaling.attn_factor", 1.0)?,
            freq_factors: None,
            long_factors: None,
            sections: None,
        })
    }

    fn attention(&self, i: usize) -> Result<GqaSpec, ModelError> {
        let (s, hidden, windowed) = (self.s, self.common.hidden, self.windowed[i]);
        let (heads, dims) = (self.heads[i], self.head_dims(windowed)?);
        let rope = self.rope(windowed, dims.key)?;
        let p = format!("blk.{i}");
        let mut attention = if i >= self.first_sharing {
            self.sharing(i, heads, dims, rope)?
        } else if s.has_tensor(&format!("{p}.attn_qkv.weight"))
            || s.has_tensor(&format!("{p}.attn_v.weight"))
        {
            let sizes = (heads, dims);
            gqa_of(s, i, hidden, sizes, Some(rope), Some(NormSpan::Head))?
        } else {
            self.keys_as_values(i, heads, dims, rope)?
        };
        attention.scale = 1.0;
        attention.value_norm = true;
        attention.window = windowed.then_some(self.window);
        Ok(attention)
    }

    /// Describes a layer that has no keys and values, or doesn't use those that it has.
    fn sharing(
        &self,
        i: usize,
        heads: Heads,
        dims: HeadDims,
        rope: RopeSpec,
    ) -> Result<GqaSpec, ModelError> {
        let owner = self.first_sharing - if self.windowed[i] { 2 } else { 1 };
        let owned = self.heads[owner].n_head_kv;
        if !heads.n_head.is_multiple_of(owned) {
            let what = format!(
                "{owned} of layer {owner} does not divide the {} query heads of layer {i}, which shares them",
                heads.n_head
            );
            return Err(self.s.bad("attention.head_count_kv", what));
        }
        let none = |q: Linear| Linear { n_out: 0, ..q };
        let mut attention = self.queries_only(i, heads, dims, rope)?;
        attention.n_head_kv = owned;
        (attention.k, attention.v) = (none(attention.q), none(attention.q));
        attention.shared_kv = Some(owner);
        Ok(attention)
    }

    /// Describes a layer whose values are its keys as projected.
    fn keys_as_values(
        &self,
        i: usize,
        heads: Heads,
        dims: HeadDims,
        rope: RopeSpec,
    ) -> Result<GqaSpec, ModelError> {
        let (s, hidden) = (self.s, self.common.hidden);
        let k = s.linear(
            &format!("blk.{i}.attn_k"),
            hidden,
            heads.n_head_kv * dims.key,
        )?;
        let k_norm = s.vector(&format!("blk.{i}.attn_k_norm.weight"), dims.key)?;
        let mut attention = self.queries_only(i, heads, dims, rope)?;
        (attention.k, attention.v) = (k, k);
        attention.qk_norm = attention.qk_norm.map(|norm| QkNorm {
            k: Some(k_norm),
            ..norm
        });
        Ok(attention)
    }

    /// Describes a layer's attention with the matrix of queries in the place of those of keys and
    /// values.
    fn queries_only(
        &self,
        i: usize,
        heads: Heads,
        dims: HeadDims,
        rope: RopeSpec,
    ) -> Result<GqaSpec, ModelError> {
        let (s, hidden, p) = (self.s, self.common.hidden, format!("blk.{i}"));
        let Heads {
            n_head, n_head_kv, ..
        } = heads;
        if !n_head.is_multiple_of(n_head_kv) {
            let what = format!("{n_head_kv} does not divide the {n_head} query heads");
            return Err(s.bad("attention.head_count_kv", what));
        }
        let fused = format!("{p}.attn_qkv");
        let q = if s.has_tensor(&format!("{fused}.weight")) {
            let rows = n_head * dims.key + n_head_kv * (dims.key + dims.value);
            Linear {
                n_out: n_head * dims.key,
                ..s.linear(&fused, hidden, rows)?
            }
        } else {
            s.linear(&format!("{p}.attn_q"), hidden, n_head * dims.key)?
        };
        Ok(GqaSpec {
            n_head,
            n_head_kv,
            key_dim: dims.key,
            value_dim: dims.value,
            scale: 1.0,
            softcap: None,
            temperature: None,
            rope: Some(rope),
            qk_norm: Some(QkNorm {
                q: Some(s.vector(&format!("{p}.attn_q_norm.weight"), dims.key)?),
                k: None,
                span: NormSpan::Head,
                after_rope: false,
            }),
            value_norm: true,
            gate: None,
            q,
            k: q,
            v: q,
            o: s.linear(&format!("{p}.attn_output"), n_head * dims.value, hidden)?,
            shared_kv: None,
            index: None,
            sinks: None,
            window: None,
            window_kind: WindowKind::Sliding,
        })
    }

    fn layer_input(&self, i: usize) -> Result<Option<LayerInput>, ModelError> {
        let (s, hidden, dim) = (self.s, self.common.hidden, self.input_dim);
        if dim == 0 {
            return Ok(None);
        }
        Ok(Some(LayerInput {
            gate: s.linear(&format!("blk.{i}.inp_gate"), hidden, dim)?,
            proj: s.linear(&format!("blk.{i}.proj"), dim, hidden)?,
            norm: s.vector(&format!("blk.{i}.post_norm.weight"), hidden)?,
        }))
    }

    fn token_inputs(&self, n_layer: usize) -> Result<Option<TokenInputs>, ModelError> {
        let (s, hidden, dim) = (self.s, self.common.hidden, self.input_dim);
        if dim == 0 {
            return Ok(None);
        }
        let width = dim * n_layer;
        let (_, n_vocab) = s.embedding(hidden)?;
        Ok(Some(TokenInputs {
            dim,
            table: s.tensor("per_layer_token_embd.weight", &[width, n_vocab])?,
            proj: s.linear("per_layer_model_proj", hidden, width)?,
            norm: s.vector("per_layer_proj_norm.weight", dim)?,
        }))
    }
}
