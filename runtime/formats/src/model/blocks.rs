//! The parts that nearly all architectures share: sizes, attention, routed experts.

use super::source::Source;
use super::spec::{
    Activation, Ffn, GateUp, GatedFfn, Gating, GqaSpec, Groups, HeadOptions, Latent, LayerSpec,
    Linear, Mixer, ModelSpec, MoeSpec, NormSpan, QkNorm, Residual, RopeKind, RopeSpec, RouterInput,
    SharedSpec, TensorId, WindowKind,
};
use super::{ModelError, Scales};

/// Sizes that every architecture states in the same keys.
pub(super) struct Common {
    /// Layers, without trailing prediction blocks.
    pub n_layer: usize,
    pub hidden: usize,
    pub context: usize,
    pub norm_eps: f32,
}

impl Common {
    /// Describes every layer, first to last.
    pub(super) fn layers(
        &self,
        describe: impl FnMut(usize) -> Result<LayerSpec, ModelError>,
    ) -> Result<Vec<LayerSpec>, ModelError> {
        (0..self.n_layer).map(describe).collect()
    }

    pub(super) fn read(s: &Source<'_>) -> Result<Self, ModelError> {
        Self::with_norm_eps(s, s.norm_eps()?)
    }

    /// Reads all sizes but the epsilon of norms.
    pub(super) fn with_norm_eps(s: &Source<'_>, norm_eps: f32) -> Result<Self, ModelError> {
        let n_block = s.dim("block_count")?;
        if n_block > 4096 {
            return Err(s.bad(
                "block_count",
                format!("{n_block} layers; expected at most 4096"),
            ));
        }
        // Blocks at the end that predict tokens further ahead are counted, but are no part of the
        // network proper.
        let ahead = s.opt_count("nextn_predict_layers")? as usize;
        let Some(n_layer) = n_block.checked_sub(ahead).filter(|n| *n > 0) else {
            return Err(s.bad(
                "nextn_predict_layers",
                format!("{ahead} of {n_block} blocks leave no layer"),
            ));
        };
        Ok(Self {
            n_layer,
            hidden: s.dim("embedding_length")?,
            context: s.dim("context_length")?,
            norm_eps,
        })
    }

    /// Wraps layers into a model with the embedding, the last norm and the head (tied where the
    /// file has none).
    pub(super) fn model(
        self,
        s: &Source<'_>,
        layers: Vec<LayerSpec>,
    ) -> Result<ModelSpec, ModelError> {
        self.model_under(s, layers, "output_norm.weight")
    }

    /// Does what [`model`](Self::model) does, with a last norm of this name.
    pub(super) fn model_under(
        self,
        s: &Source<'_>,
        layers: Vec<LayerSpec>,
        last_norm: &str,
    ) -> Result<ModelSpec, ModelError> {
        let output_norm = s.vector(last_norm, self.hidden)?;
        self.model_ending_in(s, output_norm, layers)
    }

    /// Wraps layers into a model with this last norm.
    pub(super) fn model_ending_in(
        self,
        s: &Source<'_>,
        output_norm: TensorId,
        layers: Vec<LayerSpec>,
    ) -> Result<ModelSpec, ModelError> {
        let (embedding, n_vocab) = s.embedding(self.hidden)?;
        Ok(ModelSpec {
            arch: s.arch().to_string(),
            hidden: self.hidden,
            n_vocab,
            context: self.context,
            norm_eps: self.norm_eps,
            embedding,
            embedding_scale: 1.0,
            token_inputs: None,
            ngrams: None,
            streams: None,
            output_norm,
            output: s
                .opt_tensor("output.weight", &[self.hidden, n_vocab])?
                .unwrap_or(embedding),
            head: HeadOptions::default(),
            layers,
            scales: Scales::default(),
        })
    }
}

/// Makes a layer of a mixer and a feed-forward block with the usual norms, `attn_norm` and
/// `ffn_norm`.
pub(super) fn layer_of(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    mixer: Mixer,
    ffn: Ffn,
) -> Result<LayerSpec, ModelError> {
    Ok(LayerSpec {
        mixer_norm: s.vector(&format!("blk.{layer}.attn_norm.weight"), hidden)?,
        mixer,
        ffn_norm: s.vector(&format!("blk.{layer}.ffn_norm.weight"), hidden)?,
        ffn,
        residual: Residual::default(),
    })
}

/// Describes the dense block of a layer, as wide as `feed_forward_length` says for it.
pub(super) fn dense(s: &Source<'_>, layer: usize, common: &Common) -> Result<GatedFfn, ModelError> {
    let width = s.dim_of_layer("feed_forward_length", layer, common.n_layer)?;
    s.gated_ffn(layer, common.hidden, width)
}

/// Returns the inner width of a layer's routed experts, for which the file must have a key.
pub(super) fn expert_width(
    s: &Source<'_>,
    layer: usize,
    common: &Common,
) -> Result<usize, ModelError> {
    s.dim_of_layer("expert_feed_forward_length", layer, common.n_layer)
}

/// Returns whether a layer has routed experts, as its tensors say.
pub(super) fn is_routed(s: &Source<'_>, layer: usize) -> bool {
    s.has_tensor(&format!("blk.{layer}.ffn_gate_inp.weight"))
}

/// Describes grouped-query attention; see [`gqa_spec`].
pub(super) fn gqa(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    heads: Heads,
    rope_kind: RopeKind,
    qk_norm: Option<NormSpan>,
) -> Result<Mixer, ModelError> {
    gqa_spec(s, layer, hidden, heads, rope_kind, qk_norm).map(Mixer::Gqa)
}

/// Describes grouped-query attention, with separate or fused query, key, and value tensors, and
/// their biases if any.
pub(super) fn gqa_spec(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    heads: Heads,
    rope_kind: RopeKind,
    qk_norm: Option<NormSpan>,
) -> Result<GqaSpec, ModelError> {
    let dims = HeadDims::read(s, hidden, heads)?;
    let rope = s.rope(rope_kind, dims.key)?;
    gqa_of(s, layer, hidden, (heads, dims), Some(rope), qk_norm)
}

/// Widths of one head's key and value.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadDims {
    pub key: usize,
    pub value: usize,
}

impl HeadDims {
    /// Reads the widths. Without keys for them, they are the share of the first block's heads.
    pub(super) fn read(s: &Source<'_>, hidden: usize, heads: Heads) -> Result<Self, ModelError> {
        let share = hidden / heads.first.max(1);
        let dims = Self {
            key: s.opt_dim("attention.key_length")?.unwrap_or(share),
            value: s.opt_dim("attention.value_length")?.unwrap_or(share),
        };
        if dims.key == 0 || dims.value == 0 {
            return Err(s.bad(
                "attention.head_count",
                format!("{} heads leave no width of {hidden} to each", heads.first),
            ));
        }
        Ok(dims)
    }
}

/// Describes grouped-query attention with heads of these widths; as [`gqa_spec`] otherwise.
pub(super) fn gqa_of(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    (heads, dims): (Heads, HeadDims),
    rope: Option<RopeSpec>,
    qk_norm: Option<NormSpan>,
) -> Result<GqaSpec, ModelError> {
    let Heads {
        n_head, n_head_kv, ..
    } = heads;
    if !n_head.is_multiple_of(n_head_kv) {
        let what = format!("{n_head_kv} does not divide the {n_head} query heads");
        return Err(s.bad("attention.head_count_kv", what));
    }
    let (key_dim, value_dim) = (dims.key, dims.value);
    let p = format!("blk.{layer}");
    let qk_norm = match qk_norm {
        None => None,
        Some(span) => {
            let (q_len, k_len) = match span {
                NormSpan::Head => (key_dim, key_dim),
                NormSpan::Full => (n_head * key_dim, n_head_kv * key_dim),
            };
            let q = s.vector(&format!("{p}.attn_q_norm.weight"), q_len)?;
            Some(QkNorm {
                q: Some(q),
                k: Some(s.vector(&format!("{p}.attn_k_norm.weight"), k_len)?),
                span,
                after_rope: false,
            })
        }
    };
    let [q, k, v] = qkv(
        s,
        &p,
        hidden,
        [n_head * key_dim, n_head_kv * key_dim, n_head_kv * value_dim],
    )?;
    // A scale of zero stands for the usual one.
    let scale = Some(s.f32_or("attention.scale", 0.0)?).filter(|scale| *scale != 0.0);
    Ok(GqaSpec {
        n_head,
        n_head_kv,
        key_dim,
        value_dim,
        scale: scale.unwrap_or(1.0 / (key_dim as f32).sqrt()),
        softcap: None,
        temperature: None,
        rope,
        qk_norm,
        value_norm: false,
        gate: None,
        q,
        k,
        v,
        o: s.linear(&format!("{p}.attn_output"), n_head * value_dim, hidden)?,
        shared_kv: None,
        index: None,
        sinks: None,
        window: None,
        window_kind: WindowKind::Sliding,
    })
}

/// Returns the matrices of queries, keys and values: three tensors, or one with their rows in this
/// order.
pub(super) fn qkv(
    s: &Source<'_>,
    prefix: &str,
    hidden: usize,
    rows: [usize; 3],
) -> Result<[Linear; 3], ModelError> {
    let names = ["attn_q", "attn_k", "attn_v"];
    let fused_name = format!("{prefix}.attn_qkv");
    if !s.has_tensor(&format!("{fused_name}.weight")) {
        let [q, k, v] = names.map(|name| format!("{prefix}.{name}"));
        return Ok([
            s.linear(&q, hidden, rows[0])?,
            s.linear(&k, hidden, rows[1])?,
            s.linear(&v, hidden, rows[2])?,
        ]);
    }
    let fused = s.linear(&fused_name, hidden, rows.iter().sum())?;
    // A fused weight may have its biases apart; they count only where all three are there.
    let mut apart = [None; 3];
    if fused.bias.is_none() {
        for ((bias, name), n_out) in apart.iter_mut().zip(names).zip(rows) {
            *bias = s.opt_vector(&format!("{prefix}.{name}.bias"), n_out)?;
        }
        if apart.contains(&None) {
            apart = [None; 3];
        }
    }
    let mut first_row = 0;
    Ok([0, 1, 2].map(|i| {
        let part = Linear {
            bias: fused.bias.or(apart[i]),
            n_out: rows[i],
            first_row,
            ..fused
        };
        first_row += rows[i];
        part
    }))
}

/// The heads of one layer's attention.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    /// Query heads of the first block.
    pub first: usize,
    /// Number of query heads.
    pub n_head: usize,
    /// Key and value heads.
    pub n_head_kv: usize,
}

/// Reads the heads of every layer, `[n_layer]`.
pub(super) fn heads(s: &Source<'_>, n_layer: usize) -> Result<Vec<Heads>, ModelError> {
    let q = s.dim_per_layer("attention.head_count", n_layer)?;
    let kv = if s.has("attention.head_count_kv") {
        s.dim_per_layer("attention.head_count_kv", n_layer)?
    } else {
        q.clone()
    };
    let first = q.first().copied().unwrap_or(1);
    let heads = |(n_head, n_head_kv)| Heads {
        first,
        n_head,
        n_head_kv,
    };
    Ok(q.into_iter().zip(kv).map(heads).collect())
}

/// A property of an architecture's routing: the same in every file, or a key of the file.
pub(super) enum Setting<T> {
    /// The key is not read: files carry it with other meanings or by accident.
    Always(T),
    /// The key's value, or this where the file has none.
    Default(T),
}

/// How the routed experts of an architecture differ from others'.
pub(super) struct MoeOptions {
    /// Width inside a routed expert.
    pub expert_ffn: usize,
    /// `expert_gating_func`.
    pub gating: Setting<Gating>,
    /// `expert_weights_norm`.
    pub normalize: Setting<bool>,
    /// `expert_weights_scale`; zero stands for 1.
    pub scale: Setting<f32>,
    /// Between an expert's products.
    pub activation: Activation,
    /// The shared expert, if any.
    pub shared: Option<Shared>,
}

/// A shared expert's size and kind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared {
    /// Inner width of the shared expert.
    pub ffn: usize,
    /// Whether a sigmoid gate scales its result.
    pub gated: bool,
}

impl MoeOptions {
    /// Returns the options of routers that are described by keys: gating as `gating` without one,
    /// weights not normalized and not scaled.
    pub(super) fn keyed(expert_ffn: usize, gating: Gating) -> Self {
        Self {
            expert_ffn,
            gating: Setting::Default(gating),
            normalize: Setting::Default(false),
            scale: Setting::Default(1.0),
            activation: Activation::Silu,
            shared: None,
        }
    }

    /// Adds an ungated shared expert of this inner width; none where it is 0.
    pub(super) fn with_shared(mut self, ffn: usize) -> Self {
        self.shared = (ffn > 0).then_some(Shared { ffn, gated: false });
        self
    }

    /// Returns the options of softmax over all experts, without scale or shared experts.
    pub(super) fn softmax(expert_ffn: usize, normalize: bool) -> Self {
        Self {
            expert_ffn,
            gating: Setting::Always(Gating::Softmax),
            normalize: Setting::Always(normalize),
            scale: Setting::Always(1.0),
            activation: Activation::Silu,
            shared: None,
        }
    }
}

/// Describes the routed experts of a layer. Biases, a selection bias, expert groups, and a fused
/// gate and up are taken as the file has them.
pub(super) fn moe(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    options: &MoeOptions,
) -> Result<MoeSpec, ModelError> {
    latent_moe(s, layer, hidden, None, options)
}

/// Describes the routed experts of a layer, in a space of their own where there is one; see [`moe`].
pub(super) fn latent_moe(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    latent: Option<Latent>,
    options: &MoeOptions,
) -> Result<MoeSpec, ModelError> {
    let n_expert = s.dim("expert_count")?;
    if n_expert > 65_535 {
        return Err(s.bad(
            "expert_count",
            format!("{n_expert}; expected at most 65535"),
        ));
    }
    let used = s.counts_per_layer("expert_used_count", layer + 1)?;
    let n_used = s.in_bounds("expert_used_count", used[layer] as usize, n_expert)?;
    if n_used > n_expert {
        return Err(s.bad(
            "expert_used_count",
            format!("{n_used} of {n_expert} experts"),
        ));
    }
    // Layers without routed experts may have 0.
    let differs = |n: &&u32| **n != 0 && **n as usize != n_used;
    if let Some(other) = used.iter().find(differs) {
        let what = format!(
            "{other} and {n_used} experts in different layers; supported: the same in every layer"
        );
        return Err(s.bad("expert_used_count", what));
    }
    let width = options.expert_ffn;
    let p = format!("blk.{layer}");
    let stacked =
        |name: &str, n_in, n_out| s.expert_linear(&format!("{p}.{name}"), n_in, n_out, n_expert);
    let space = latent.map_or(hidden, |latent| latent.down.n_out);
    let gate_up = if s.has_tensor(&format!("{p}.ffn_gate_up_exps.weight")) {
        GateUp::Fused(stacked("ffn_gate_up_exps", space, 2 * width)?)
    } else {
        GateUp::Split {
            gate: stacked("ffn_gate_exps", space, width)?,
            up: stacked("ffn_up_exps", space, width)?,
        }
    };
    Ok(MoeSpec {
        router: s.linear(&format!("{p}.ffn_gate_inp"), hidden, n_expert)?,
        router_input: RouterInput::Normed,
        input_norm: None,
        output_norm: None,
        weigh_input: false,
        expert_scale: None,
        sum_scale: 1.0,
        selection_bias: match s.opt_vector(&format!("{p}.exp_probs_b.bias"), n_expert)? {
            None => s.opt_vector(&format!("{p}.exp_probs_b"), n_expert)?,
            bias => bias,
        },
        by_token: None,
        latent,
        gating: gating(s, &options.gating)?,
        n_expert,
        n_used,
        groups: groups(s, n_expert, n_used)?,
        normalize: match options.normalize {
            Setting::Always(normalize) => normalize,
            Setting::Default(normalize) => s.bool_or("expert_weights_norm", normalize)?,
        },
        scale: match options.scale {
            Setting::Always(scale) => scale,
            Setting::Default(scale) => Some(s.f32_or("expert_weights_scale", scale)?)
                .filter(|s| *s != 0.0)
                .unwrap_or(1.0),
        },
        expert_ffn: width,
        activation: options.activation,
        gate_up,
        down: stacked("ffn_down_exps", width, space)?,
        shared: options
            .shared
            .as_ref()
            .map(|shared| shared_expert(s, layer, hidden, shared))
            .transpose()?,
    })
}

fn gating(s: &Source<'_>, setting: &Setting<Gating>) -> Result<Gating, ModelError> {
    let default = match setting {
        Setting::Always(gating) => return Ok(*gating),
        Setting::Default(gating) => *gating,
    };
    let name = "expert_gating_func";
    match s.opt_count(name)? {
        0 => Ok(default),
        1 => Ok(Gating::Softmax),
        2 => Ok(Gating::Sigmoid),
        3 => Ok(Gating::SoftmaxChosen),
        4 => Ok(Gating::SqrtSoftplus),
        other => Err(s.bad(name, format!("{other} is not supported; supported: 1 to 4"))),
    }
}

/// Reads the groups of experts, and how many are kept, where a file has them.
fn groups(s: &Source<'_>, n_expert: usize, n_used: usize) -> Result<Option<Groups>, ModelError> {
    let n_group = s.opt_count("expert_group_count")? as usize;
    if n_group < 2 {
        return Ok(None);
    }
    if !n_expert.is_multiple_of(n_group) || n_expert / n_group < 2 {
        let what = format!(
            "{n_group} groups of {n_expert} experts; expected a divisor that leaves at least 2 to each"
        );
        return Err(s.bad("expert_group_count", what));
    }
    let name = "expert_group_used_count";
    let n_kept = s.dim(name)?;
    if n_kept > n_group || n_kept * (n_expert / n_group) < n_used {
        let what =
            format!("{n_kept} of {n_group} groups; a token uses {n_used} of {n_expert} experts");
        return Err(s.bad(name, what));
    }
    Ok((n_kept < n_group).then_some(Groups {
        n: n_group,
        kept: n_kept,
    }))
}

fn shared_expert(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    shared: &Shared,
) -> Result<SharedSpec, ModelError> {
    let gate = if shared.gated {
        Some(s.vector(&format!("blk.{layer}.ffn_gate_inp_shexp.weight"), hidden)?)
    } else {
        None
    };
    Ok(SharedSpec {
        ffn: s.named_ffn(layer, "_shexp", hidden, shared.ffn)?,
        gate,
        norm: None,
    })
}

/// Reads the inner width of routed experts by layer: from its own key, or as `feed_forward_length`
/// divided by the experts per token.
pub(super) fn expert_widths(s: &Source<'_>, n_layer: usize) -> Result<Vec<usize>, ModelError> {
    let name = "expert_feed_forward_length";
    if s.has(name) {
        return s.dim_per_layer(name, n_layer);
    }
    let used = s.dim_per_layer("expert_used_count", n_layer)?;
    let all = s.dim_per_layer("feed_forward_length", n_layer)?;
    let widths: Vec<usize> = all.iter().zip(used).map(|(ffn, used)| ffn / used).collect();
    if widths.contains(&0) {
        return Err(s.bad(
            name,
            "is missing, and feed_forward_length leaves no width to an expert",
        ));
    }
    Ok(widths)
}

/// Width of `expert_shared_count` experts of `expert_ffn` as one, or `None` where there are none.
pub(super) fn shared_by_count(
    s: &Source<'_>,
    expert_ffn: usize,
) -> Result<Option<usize>, ModelError> {
    let name = "expert_shared_count";
    match s.opt_count(name)? {
        0 => Ok(None),
        // Far more than any model has; with it the product is in range.
        n if n <= 1024 => Ok(Some(n as usize * expert_ffn)),
        n => Err(s.bad(name, format!("{n}; expected at most 1024"))),
    }
}
