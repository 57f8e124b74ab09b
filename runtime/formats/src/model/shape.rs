//! The sizes of a model without its weights: all that a planner needs.

use super::kv::KvRows;
use super::spec::{CacheRows, Mixer, ModelSpec, Reach};
use super::{ModelError, describe};
use crate::gguf::Gguf;
use crate::source_id::SourceId;
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors that are not routed experts, in the groups that are placed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DenseKind {
    /// The token embedding, of which a token reads one row. Empty when tied to the head.
    Embedding,
    /// Attention (or another mixer) with its norms.
    Attention,
    /// The router with the norm before it.
    Router,
    /// Shared experts, which every token uses.
    SharedExpert,
    /// The feed-forward block of a layer without routed experts, with its norm.
    DenseFfn,
    /// The output projection with its norm.
    Head,
}

impl std::fmt::Display for DenseKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DenseKind::Embedding => "embedding",
            DenseKind::Attention => "attention",
            DenseKind::Router => "router",
            DenseKind::SharedExpert => "shared expert",
            DenseKind::DenseFfn => "dense FFN",
            DenseKind::Head => "head",
        })
    }
}

/// A dense group: its bytes and what a token reads of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DenseShape {
    /// Its kind of tensors.
    pub kind: DenseKind,
    /// The layer, or `None` for embedding and head.
    pub layer: Option<u32>,
    /// Bytes it takes where it lives.
    pub bytes: u64,
    /// Bytes that one decoded token reads of it.
    pub token_bytes: u64,
    /// Multiply-accumulates for one token: its weights, but none of an embedding.
    pub macs: u64,
}

/// The routed experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertShape {
    /// Number of the layer.
    pub layer: u32,
    /// Number of routed experts.
    pub n_expert: u32,
    /// Experts per token.
    pub n_used: u32,
    /// Bytes of one expert: its gate, up and down slices with their biases.
    pub expert_bytes: u64,
    /// Multiply-accumulates of one expert for one token.
    pub expert_macs: u64,
}

/// What one layer keeps of past tokens: its part of the KV cache, and its recurrent state.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct CacheShape {
    /// Rows that one token of context adds: each width once, ascending.
    pub rows: Vec<KvRows>,
    /// Bytes of recurrent state, whatever the length of the context.
    pub state_bytes: u64,
}

/// The sizes of a model: bytes and arithmetic, without the tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelShape {
    /// Name and hash of the model.
    pub id: SourceId,
    /// Architecture name, `qwen3moe`.
    pub arch: String,
    /// Number of layers.
    pub n_layer: u32,
    /// Width of the hidden state.
    pub hidden: u32,
    /// Number of tokens in the vocabulary.
    pub n_vocab: u32,
    /// Longest context the file claims to be trained for.
    pub context: u32,
    /// KV cache and recurrent state by layer, `[n_layer]`.
    pub caches: Vec<CacheShape>,
    /// Every dense group once.
    pub dense: Vec<DenseShape>,
    /// Every layer with routed experts once, ascending.
    pub experts: Vec<ExpertShape>,
}

impl ModelShape {
    /// Returns the bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        let dense: u64 = self.dense.iter().map(|d| d.bytes).sum();
        let experts: u64 = self
            .experts
            .iter()
            .map(|e| e.expert_bytes * u64::from(e.n_expert))
            .sum();
        dense + experts
    }

    /// Weight bytes that one decoded token reads.
    pub fn token_bytes(&self) -> u64 {
        let dense: u64 = self.dense.iter().map(|d| d.token_bytes).sum();
        let experts: u64 = self
            .experts
            .iter()
            .map(|e| e.expert_bytes * u64::from(e.n_used))
            .sum();
        dense + experts
    }

    /// Returns the bytes of recurrent state, over all layers.
    pub fn state_bytes(&self) -> u64 {
        self.caches
            .iter()
            .fold(0, |sum, cache| sum.saturating_add(cache.state_bytes))
    }
}

/// Returns the shape of the model in a GGUF file; reads its header only.
pub fn shape_of_file(path: &Path) -> Result<ModelShape, ModelError> {
    let gguf = Gguf::open(path)?;
    let spec = describe(&gguf)?;
    Ok(shape_of(&gguf, &spec))
}

/// Returns the shape of a described model.
pub fn shape_of(gguf: &Gguf, spec: &ModelSpec) -> ModelShape {
    let tensors = gguf.tensors();
    let bytes = |ids: &[usize]| ids.iter().map(|id| tensors[*id].n_bytes).sum::<u64>();
    let dense = spec
        .dense_groups()
        .iter()
        .map(|group| {
            let bytes = bytes(&group.tensors);
            let token_bytes = if group.kind == DenseKind::Embedding {
                // Each tensor has a row per token of the vocabulary.
                bytes / spec.n_vocab as u64
            } else {
                bytes
            };
            let values = group
                .tensors
                .iter()
                .map(|id| tensors[*id].cols().saturating_mul(tensors[*id].rows()))
                .sum::<u64>();
            let macs = if group.kind == DenseKind::Embedding {
                0
            } else {
                values
            };
            DenseShape {
                kind: group.kind,
                layer: group.layer,
                bytes,
                token_bytes,
                macs,
            }
        })
        .collect();
    let experts = spec
        .moe_layers()
        .map(|(layer, moe)| ExpertShape {
            layer: layer as u32,
            n_expert: moe.n_expert as u32,
            n_used: moe.n_used as u32,
            expert_bytes: moe
                .expert_tensors()
                .map(|id| tensors[id].n_bytes)
                .sum::<u64>()
                / moe.n_expert as u64,
            expert_macs: 3 * (spec.hidden as u64) * (moe.expert_ffn as u64),
        })
        .collect();
    ModelShape {
        id: gguf.id(),
        arch: spec.arch.clone(),
        n_layer: spec.layers.len() as u32,
        hidden: spec.hidden as u32,
        n_vocab: spec.n_vocab as u32,
        context: spec.context as u32,
        caches: cache_shapes(spec),
        dense,
        experts,
    }
}

/// Returns the KV cache rows and recurrent state of every layer. Layers that share the rows of
/// another hold none; their dot products count where the rows are.
fn cache_shapes(spec: &ModelSpec) -> Vec<CacheShape> {
    let own = spec.layers.iter().map(|layer| cache_shape(&layer.mixer));
    let mut caches: Vec<CacheShape> = own.collect();
    for layer in &spec.layers {
        if let Mixer::Gqa(attention) = &layer.mixer
            && let Some(owner) = attention.shared_kv
        {
            let queries = attention.n_head as u64 / (attention.n_head_kv as u64).max(1);
            caches[owner]
                .rows
                .iter_mut()
                .for_each(|rows| rows.queries += queries);
        }
    }
    caches
}

/// Returns the KV cache rows and recurrent state of a layer with this mixer.
pub fn cache_shape(mixer: &Mixer) -> CacheShape {
    let mut found = BTreeMap::new();
    for rows in mixer_rows(mixer) {
        *found
            .entry((rows.width, rows.window, rows.queries, rows.chosen))
            .or_insert(0) += rows.per_token;
    }
    let rows = |((width, window, queries, chosen), per_token)| KvRows {
        width,
        per_token,
        queries,
        window,
        chosen,
    };
    CacheShape {
        rows: found.into_iter().map(rows).collect(),
        state_bytes: mixer.state_bytes(),
    }
}

/// Returns the rows that one token adds to the KV cache of a layer with this mixer.
pub fn mixer_rows(mixer: &Mixer) -> Vec<KvRows> {
    let window = match mixer {
        Mixer::Gqa(attention) => attention.window.map(|window| window as u64),
        Mixer::Mla(attention) => attention.reach.window().map(|window| window as u64),
        Mixer::Delta(_) | Mixer::Kda(_) | Mixer::ShortConv(_) => None,
    };
    let queries = match mixer {
        Mixer::Gqa(attention) => attention.n_head as u64 / (attention.n_head_kv as u64).max(1),
        Mixer::Mla(attention) => 2 * attention.n_head as u64,
        Mixer::Delta(_) | Mixer::Kda(_) | Mixer::ShortConv(_) => 0,
    };
    let reach = match mixer {
        Mixer::Mla(attention) => Some(&attention.reach),
        _ => None,
    };
    let rows = |CacheRows { n, width }| KvRows {
        width: width as u64,
        per_token: n as u64,
        queries,
        window,
        chosen: reach.and_then(|reach| Some(reach.top_k()? as u64)),
    };
    let mut found: Vec<KvRows> = mixer.cache_rows().into_iter().map(rows).collect();
    if let (Some(indexer), [_, keys]) = (reach.and_then(Reach::indexer), &mut found[..]) {
        // Every token is compared with the keys of all.
        (keys.queries, keys.chosen) = (indexer.n_head as u64, None);
    }
    found
}
