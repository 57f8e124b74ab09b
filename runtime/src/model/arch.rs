//! The architectures by name, and what nearly all of them share.

use super::source::Source;
use super::spec::{Ffn, Gating, GqaSpec, LayerSpec, Mixer, ModelSpec, MoeSpec, NormSpan, RopeKind, RopeSpec};
use super::{ModelError, llama, qwen3, qwen3next};
use crate::gguf::Gguf;

type Describe = fn(&Source<'_>) -> Result<ModelSpec, ModelError>;

const ARCHITECTURES: [(&str, Describe); 5] = [
    ("llama", llama::describe),
    ("qwen3", qwen3::describe),
    ("qwen35moe", qwen3next::describe),
    ("qwen3moe", qwen3::describe),
    ("qwen3next", qwen3next::describe),
];

/// Names of the architectures that can run.
pub const SUPPORTED: [&str; ARCHITECTURES.len()] = {
    let mut names = [""; ARCHITECTURES.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = ARCHITECTURES[i].0;
        i += 1;
    }
    names
};

/// Describes the network in a file.
pub fn describe(gguf: &Gguf) -> Result<ModelSpec, ModelError> {
    let arch = gguf.str("general.architecture")?;
    match ARCHITECTURES.iter().find(|(name, _)| *name == arch) {
        Some((_, describe)) => describe(&Source::new(gguf, arch)),
        None => Err(ModelError::Architecture { found: arch.to_string() }),
    }
}

/// Sizes that every architecture states in the same keys.
pub(super) struct Common {
    pub n_layer: usize,
    pub hidden: usize,
    pub context: usize,
    pub norm_eps: f32,
}

impl Common {
    pub(super) fn read(s: &Source<'_>) -> Result<Self, ModelError> {
        let n_layer = s.dim("block_count")?;
        if n_layer > 4096 {
            return Err(s.bad("block_count", format!("{n_layer} layers; expected at most 4096")));
        }
        Ok(Self {
            n_layer,
            hidden: s.dim("embedding_length")?,
            context: s.dim("context_length")?,
            norm_eps: s.norm_eps()?,
        })
    }

    /// Wraps layers into a model with the embedding, the last norm and the head (tied where the file has none).
    pub(super) fn model(self, s: &Source<'_>, layers: Vec<LayerSpec>) -> Result<ModelSpec, ModelError> {
        let (embedding, n_vocab) = s.embedding(self.hidden)?;
        Ok(ModelSpec {
            arch: s.arch().to_string(),
            hidden: self.hidden,
            n_vocab,
            context: self.context,
            norm_eps: self.norm_eps,
            embedding,
            output_norm: s.vector("output_norm.weight", self.hidden)?,
            output: s.opt_tensor("output.weight", &[self.hidden, n_vocab])?.unwrap_or(embedding),
            layers,
        })
    }
}

/// Grouped-query attention with split query, key and value tensors.
pub(super) fn gqa(
    s: &Source<'_>,
    layer: usize,
    hidden: usize,
    heads: (usize, usize),
    rope_kind: RopeKind,
    qk_norm: Option<NormSpan>,
) -> Result<Mixer, ModelError> {
    let (n_head, n_head_kv) = heads;
    if !n_head.is_multiple_of(n_head_kv) {
        let what = format!("{n_head_kv} does not divide the {n_head} query heads");
        return Err(s.bad("attention.head_count_kv", what));
    }
    let key_dim = s.opt_dim("attention.key_length")?.unwrap_or(hidden / n_head);
    let value_dim = s.opt_dim("attention.value_length")?.unwrap_or(hidden / n_head);
    if key_dim == 0 || value_dim == 0 {
        return Err(s.bad("attention.head_count", format!("{n_head} heads leave no width of {hidden} to each")));
    }
    let rope: RopeSpec = s.rope(rope_kind, key_dim)?;
    let p = format!("blk.{layer}");
    let qk_norm = match qk_norm {
        None => None,
        Some(span) => {
            let (q_len, k_len) = match span {
                NormSpan::Head => (key_dim, key_dim),
                NormSpan::Full => (n_head * key_dim, n_head_kv * key_dim),
            };
            let q = s.vector(&format!("{p}.attn_q_norm.weight"), q_len)?;
            Some((q, s.vector(&format!("{p}.attn_k_norm.weight"), k_len)?, span))
        }
    };
    Ok(Mixer::Gqa(GqaSpec {
        n_head,
        n_head_kv,
        key_dim,
        value_dim,
        scale: s.f32_or("attention.scale", 1.0 / (key_dim as f32).sqrt())?,
        rope,
        qk_norm,
        gated: false,
        q: s.linear(&format!("{p}.attn_q"), hidden, n_head * key_dim)?,
        k: s.linear(&format!("{p}.attn_k"), hidden, n_head_kv * key_dim)?,
        v: s.linear(&format!("{p}.attn_v"), hidden, n_head_kv * value_dim)?,
        o: s.linear(&format!("{p}.attn_output"), n_head * value_dim, hidden)?,
    }))
}

/// Query heads and key/value heads of every layer.
pub(super) fn heads(s: &Source<'_>, n_layer: usize) -> Result<Vec<(usize, usize)>, ModelError> {
    let q = s.dim_per_layer("attention.head_count", n_layer)?;
    let kv =
        if s.has("attention.head_count_kv") { s.dim_per_layer("attention.head_count_kv", n_layer)? } else { q.clone() };
    Ok(q.into_iter().zip(kv).collect())
}

/// Routed experts with softmax gating and normalised weights, the plain kind.
pub(super) fn softmax_moe(s: &Source<'_>, layer: usize, hidden: usize, expert_ffn: usize) -> Result<Ffn, ModelError> {
    let n_expert = s.dim("expert_count")?;
    let n_used = s.dim("expert_used_count")?;
    if n_expert > 65_535 {
        return Err(s.bad("expert_count", format!("{n_expert}; expected at most 65535")));
    }
    if n_used > n_expert {
        return Err(s.bad("expert_used_count", format!("{n_used} of {n_expert} experts")));
    }
    let p = format!("blk.{layer}");
    Ok(Ffn::Moe(MoeSpec {
        router: s.linear(&format!("{p}.ffn_gate_inp"), hidden, n_expert)?,
        selection_bias: None,
        gating: Gating::Softmax,
        n_expert,
        n_used,
        groups: None,
        normalize: true,
        scale: s.f32_or("expert_weights_scale", 1.0)?,
        expert_ffn,
        gate: s.tensor(&format!("{p}.ffn_gate_exps.weight"), &[hidden, expert_ffn, n_expert])?,
        up: s.tensor(&format!("{p}.ffn_up_exps.weight"), &[hidden, expert_ffn, n_expert])?,
        down: s.tensor(&format!("{p}.ffn_down_exps.weight"), &[expert_ffn, hidden, n_expert])?,
    }))
}
