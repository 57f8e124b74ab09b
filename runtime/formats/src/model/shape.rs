//! The sizes of a model without its weights: all that a planner needs.

use super::gpu::{CpuOnly, cpu_only};
use super::kv::KvRows;
use super::spec::{
    CacheRows, CompressedSpec, GqaSpec, LayerSpec, Mixer, MlaSpec, ModelSpec, TensorId,
};
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
    /// Tables beside the embedding whose rows the tokens alone name: of n-grams, or of inputs for
    /// every layer.
    TokenTable,
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

impl DenseKind {
    /// Whether the group is of the whole model, not of one layer.
    pub fn is_of_model(self) -> bool {
        matches!(
            self,
            DenseKind::Embedding | DenseKind::TokenTable | DenseKind::Head
        )
    }

    /// Whether a token reads only rows that are known as soon as the token is, so that the group may
    /// stay on a block device.
    pub fn is_named_by_tokens(self) -> bool {
        matches!(self, DenseKind::Embedding | DenseKind::TokenTable)
    }
}

impl std::fmt::Display for DenseKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DenseKind::Embedding => "embedding",
            DenseKind::TokenTable => "token table",
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
    /// The layer, or `None` for embedding, tables, and head.
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
    /// Whether the token alone chooses the experts, so that they are known before the layer runs.
    pub by_token: bool,
}

/// What one layer keeps of past tokens: its part of the KV cache, and its recurrent state.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct CacheShape {
    /// Rows that one token of context adds: each width once, ascending.
    pub rows: Vec<KvRows>,
    /// Bytes of recurrent state, whatever the length of the context.
    pub state_bytes: u64,
    /// Layers that read the rows beside the one that holds them.
    pub more_readers: u64,
}

impl CacheShape {
    /// Returns whether the CPU can attend to the cache while a GPU multiplies the layer's matrices:
    /// keys and values are rows of their own, of every position, which no index chooses among and no
    /// other layer reads, and there is no recurrent state.
    pub fn can_be_apart(&self) -> bool {
        let per_token: u64 = self.rows.iter().map(|rows| rows.per_token).sum();
        let is_plain = |rows: &KvRows| rows.every == 1 && rows.chosen.is_none();
        // A latent is one row for keys and values.
        per_token >= 2
            && self.rows.iter().all(is_plain)
            && self.state_bytes == 0
            && self.more_readers == 0
    }
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
    /// The parts that no GPU can run.
    pub cpu_only: Vec<CpuOnly>,
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

    /// Returns the bytes that one decoded token reads of a layer's dense groups.
    pub fn dense_bytes_of(&self, layer: u32) -> u64 {
        let of_layer = self.dense.iter().filter(|d| d.layer == Some(layer));
        of_layer.map(|d| d.token_bytes).sum()
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
            let read = |id: &usize| match rows_read(spec, *id) {
                Some(rows) => tensors[*id].n_bytes / tensors[*id].rows() * rows,
                None => tensors[*id].n_bytes,
            };
            let token_bytes = group.tensors.iter().map(read).sum();
            let multiplied = |id: &&usize| rows_read(spec, **id).is_none();
            let macs = group
                .tensors
                .iter()
                .filter(multiplied)
                .map(|id| tensors[*id].cols().saturating_mul(tensors[*id].rows()))
                .sum::<u64>();
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
            expert_macs: moe
                .expert_linears()
                .map(|l| l.n_in as u64 * l.n_out as u64)
                .sum(),
            by_token: moe.by_token.is_some(),
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
        cpu_only: cpu_only(gguf, spec),
    }
}

/// Returns the rows that a token reads of a table, or `None` for a tensor that it reads whole.
fn rows_read(spec: &ModelSpec, id: TensorId) -> Option<u64> {
    let is_embedding = id == spec.embedding && !spec.tied();
    let has_inputs = spec.token_inputs.is_some_and(|own| own.table == id);
    let chooses = spec.moe_layers().any(|(_, moe)| moe.by_token == Some(id));
    if is_embedding || has_inputs || chooses {
        return Some(1);
    }
    let ngrams = spec.ngrams.as_ref().filter(|ngrams| ngrams.table == id);
    ngrams.map(|ngrams| ngrams.n_heads() as u64)
}

/// Returns the KV cache rows and recurrent state of every layer. Layers that share the rows of
/// another hold none; their reads and dot products count where the rows are.
fn cache_shapes(spec: &ModelSpec) -> Vec<CacheShape> {
    let own = spec.layers.iter().map(cache_shape);
    let mut caches: Vec<CacheShape> = own.collect();
    for layer in &spec.layers {
        if let Mixer::Gqa(attention) = &layer.mixer
            && let Some(owner) = attention.shared_kv
        {
            let queries = attention.n_head as u64 / (attention.n_head_kv as u64).max(1);
            caches[owner].more_readers += 1;
            caches[owner]
                .rows
                .iter_mut()
                .for_each(|rows| rows.queries += queries);
        }
    }
    caches
}

/// Returns the KV cache rows and recurrent state of a layer.
pub fn cache_shape(layer: &LayerSpec) -> CacheShape {
    let mut found = BTreeMap::new();
    for rows in mixer_rows(&layer.mixer) {
        *found
            .entry((
                rows.width,
                rows.window,
                rows.queries,
                rows.chosen,
                rows.every,
            ))
            .or_insert(0) += rows.per_token;
    }
    let rows = |((width, window, queries, chosen, every), per_token)| KvRows {
        width,
        per_token,
        every,
        queries,
        window,
        chosen,
    };
    CacheShape {
        rows: found.into_iter().map(rows).collect(),
        state_bytes: layer.state_bytes(),
        more_readers: 0,
    }
}

/// Returns the rows that one token adds to the KV cache of a layer with this mixer.
pub fn mixer_rows(mixer: &Mixer) -> Vec<KvRows> {
    let found = mixer.cache_rows().into_iter().enumerate();
    let rows = |(kind, CacheRows { n, width, every }): (usize, CacheRows)| {
        let reads = match mixer {
            Mixer::Gqa(a) => gqa_reads(a, kind),
            Mixer::Mla(a) => mla_reads(a, kind),
            Mixer::Compressed(a) => compressed_reads(a, kind),
            Mixer::Delta(_)
            | Mixer::Kda(_)
            | Mixer::ShortConv(_)
            | Mixer::Mamba(_)
            | Mixer::None => Reads::default(),
        };
        KvRows {
            width: width as u64,
            per_token: n as u64,
            every: every as u64,
            queries: reads.queries as u64,
            window: reads.window.map(|window| window as u64),
            chosen: reads.chosen.map(|chosen| chosen as u64),
        }
    };
    found.map(rows).collect()
}

/// How a token reads rows of one kind.
#[derive(Default)]
struct Reads {
    /// Dot products per row.
    queries: usize,
    /// Positions that it looks back at.
    window: Option<usize>,
    /// Positions that an indexer chooses for it.
    chosen: Option<usize>,
}

/// Returns how keys and values are read, and as the third kind the keys of an index: a token is
/// compared with those of all.
fn gqa_reads(a: &GqaSpec, kind: usize) -> Reads {
    match &a.index {
        Some(index) if kind == 2 => Reads {
            queries: index.n_head,
            ..Reads::default()
        },
        index => Reads {
            queries: a.n_head / a.n_head_kv.max(1),
            window: a.window,
            chosen: index.map(|index| index.most_rows()),
        },
    }
}

/// Returns how latents are read, and as the second kind the keys of an indexer: a token is compared
/// with those of all.
fn mla_reads(a: &MlaSpec, kind: usize) -> Reads {
    match a.reach.indexer() {
        Some(indexer) if kind == 1 => Reads {
            queries: indexer.n_head,
            ..Reads::default()
        },
        _ => Reads {
            queries: 2 * a.n_head,
            window: a.reach.window(),
            chosen: a.reach.selection().map(|chosen| chosen.most()),
        },
    }
}

/// Returns how compressed vectors are read, and as the second kind the keys of their index. The
/// vectors of the window are recurrent state.
fn compressed_reads(a: &CompressedSpec, kind: usize) -> Reads {
    let ratio = a.far.map_or(1, |far| far.compressor.ratio);
    let (queries, chosen) = match (kind, a.far.and_then(|far| far.index)) {
        (1, Some(index)) => (index.n_head, None),
        (_, index) => (
            2 * a.n_head,
            index.map(|index| index.kept.saturating_mul(ratio)),
        ),
    };
    Reads {
        queries,
        window: None,
        chosen,
    }
}
