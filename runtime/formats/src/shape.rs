//! `profiles/models/*.toml`: the shape of a network without its weights, and its sizes in the usual
//! quantizations.
//!
//! A shape says how large every matrix is. A [`Mix`] says which tensor type each of them has; the
//! two together are a [`ModelShape`], all that a planner needs. The mixes follow llama.cpp's rules
//! closely enough for planning: published files differ by what was overridden for them.

mod check;
mod mix;
#[cfg(test)]
mod mixers_tests;
#[cfg(test)]
mod tests;
mod weights;
mod wire;

pub use mix::Mix;
use mix::Place;
use weights::Weight;

use super::kind::SHAPE;
use crate::FormatError;
use crate::model::gpu::{chooses_keys, cpu_only_of};
use crate::model::kv::KvRows;
use crate::model::shape::{CacheShape, DenseKind, DenseShape, ExpertShape, ModelShape};
use crate::source_id::SourceId;
use serde::Deserialize;
use std::cmp::Ordering;
use std::path::Path;
use xxhash_rust::xxh3::xxh3_128;

/// A network by its dimensions, without weights or quantization.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Architecture {
    /// Its name, `kimi-k2`.
    pub name: String,
    /// What it is, in a sentence.
    pub description: String,
    /// Architecture name as in GGUF files, `deepseek2`.
    pub arch: String,
    /// Layers, without trailing multi-token-prediction blocks.
    pub layers: u32,
    /// Width of the hidden state.
    pub hidden: u32,
    /// Vocabulary: rows of the embedding.
    pub vocab: u32,
    /// Longest context the model was trained for, in tokens.
    pub context: u32,
    /// The head is the embedding.
    pub tied: bool,
    /// The first layers, which have one feed-forward block of [`Architecture::dense_ffn`] and no
    /// routed experts.
    pub leading_dense: u32,
    /// Width inside those blocks; 0 where there are none.
    pub dense_ffn: u32,
    /// Every kind of attention, or of another mixer, with the layers that have it. Each layer has
    /// one.
    pub mixers: Vec<Mixers>,
    /// Routed experts of the other layers.
    pub experts: Option<Experts>,
    /// A table beside the embedding, of which a token reads a few rows.
    pub table: Option<Table>,
    /// Source of the figures.
    pub source: String,
    /// Hash of the file it was read from; the name repeated.
    pub id: SourceId,
}

/// Layers whose mixers are alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mixers {
    /// The layers, ascending.
    pub layers: Vec<u32>,
    /// What they have.
    pub attention: Attention,
}

/// A table of rows that are chosen by tokens alone, such as embeddings of n-grams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// Number of rows.
    pub rows: u64,
    /// Values of a row.
    pub width: u32,
    /// Rows that a token reads.
    pub read: u32,
}

/// Rows of the KV cache that a mixer of [`Attention::Given`] keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GivenRows {
    /// Values of a row.
    pub width: u32,
    /// Rows that so many tokens add.
    pub per_token: u32,
    /// Tokens that share them: more than 1 where rows are compressed.
    pub every: u32,
    /// Dot products per row for each later token.
    pub queries: u32,
    /// Positions that a token looks back at, its own included; all of them when `None`.
    pub window: Option<u32>,
    /// Positions that a token reads at most, wherever they are, as an indexer chooses them; all that
    /// it looks back at when `None`.
    pub chosen: Option<u32>,
}

/// How a layer attends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attention {
    /// A mixer that is known by what it costs: for recurrences, compressed and sparse attention.
    Given {
        /// Values of its matrices, all of which a token is multiplied with.
        parameters: u64,
        /// What it keeps of every token.
        rows: Vec<GivenRows>,
        /// Bytes of recurrent state.
        state_bytes: u64,
    },
    /// Grouped key and value heads.
    Gqa {
        /// Number of query heads.
        heads: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// Width of a head of queries and keys.
        head: u32,
        /// Width of a head of values.
        value: u32,
        /// Whether values are the keys, so that they have no matrix of their own.
        keys_are_values: bool,
        /// Queries, keys and values have biases.
        bias: bool,
        /// The output has a bias.
        output_bias: bool,
        /// Norms of queries and keys.
        norms: Norms,
        /// Each head has a score that takes part in the softmax and has no value.
        sinks: bool,
        /// Positions that a token looks back at, its own included; all of them when `None`.
        window: Option<u32>,
        /// With a window: one layer in `full_every` attends to all positions all the same; none
        /// does when 0.
        full_every: u32,
    },
    /// Multi-head latent attention: the KV cache holds compressed latents.
    Mla {
        /// Number of query heads.
        heads: u32,
        /// Width of the compressed queries; 0 where they are not compressed.
        q_rank: u32,
        /// Width of the compressed keys and values.
        kv_rank: u32,
        /// Values of a query or key head that do not rotate.
        nope: u32,
        /// Values of a query or key head that rotate.
        rope: u32,
        /// Width of a value head.
        value: u32,
    },
}

/// What norms of queries and keys span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norms {
    /// No norms.
    #[default]
    None,
    /// Each head by itself.
    Head,
    /// All heads together, with one weight.
    Full,
}

/// Routed experts of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Experts {
    /// The layers that have them, ascending.
    pub layers: Vec<u32>,
    /// Number of routed experts.
    pub count: u32,
    /// Experts per token.
    pub used: u32,
    /// Inner width of an expert.
    pub ffn: u32,
    /// Outer width of an expert: that of the hidden state, unless experts work in a narrower space
    /// with a projection to it and one back.
    pub hidden: u32,
    /// Whether an expert has a gate: three matrices instead of two.
    pub gated: bool,
    /// Experts of the same width that every token uses besides.
    pub shared: u32,
    /// Inner width of all that every token uses besides; 0 where there is none.
    pub shared_ffn: u32,
    /// The experts' matrices have biases.
    pub bias: bool,
    /// The router has a bias.
    pub router_bias: bool,
    /// A value of each expert is added to its score for the choice only.
    pub selection_bias: bool,
    /// The layers of them whose experts the token alone chooses, ascending.
    pub by_token: Vec<u32>,
}

/// Parameters of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// All parameters of the model.
    pub total: u64,
    /// Parameters that one token uses: all but the routed experts that it does not use. The whole
    /// embedding counts.
    pub active: u64,
}

impl Architecture {
    /// Returns the number of layers with routed experts.
    pub fn moe_layers(&self) -> u32 {
        let experts = self.experts.as_ref();
        experts.map_or(0, |experts| experts.layers.len() as u32)
    }

    /// Returns the routed experts of a layer, if it has some.
    fn experts_of(&self, layer: u32) -> Option<&Experts> {
        let experts = self.experts.as_ref();
        experts.filter(|experts| experts.layers.binary_search(&layer).is_ok())
    }

    /// Returns the mixer of a layer.
    fn attention_of(&self, layer: u32) -> &Attention {
        let has = |mixers: &&Mixers| mixers.layers.binary_search(&layer).is_ok();
        let mixers = self.mixers.iter().find(has);
        &mixers
            .unwrap_or_else(|| unreachable!("every layer has a mixer: that is checked"))
            .attention
    }

    /// Counts the parameters of the whole model, and of a token.
    pub fn parameters(&self) -> Parameters {
        let mut sum = Parameters {
            total: 0,
            active: 0,
        };
        for group in self.groups() {
            let total: u64 = group.weights.iter().map(Weight::parameters).sum();
            sum.total += total;
            sum.active += match (group.kind, &self.experts) {
                (None, Some(experts)) => total / u64::from(experts.count) * u64::from(experts.used),
                _ => total,
            };
        }
        if let Some(table) = self.table {
            sum.total += table.rows * u64::from(table.width);
            sum.active += u64::from(table.read) * u64::from(table.width);
        }
        sum
    }

    /// Returns the sizes in a quantization.
    pub fn model_shape(&self, mix: Mix) -> ModelShape {
        let (mut dense, mut experts) = (Vec::new(), Vec::new());
        for group in self.groups() {
            let place = self.place(group.layer.unwrap_or(0));
            let bytes: u64 = group.weights.iter().map(|w| w.bytes(mix, &place)).sum();
            match (group.kind, &self.experts) {
                (Some(kind), _) => {
                    let rows = if kind == DenseKind::Embedding {
                        u64::from(self.vocab)
                    } else {
                        1
                    };
                    let values: u64 = group.weights.iter().map(Weight::parameters).sum();
                    let macs = if kind == DenseKind::Embedding {
                        0
                    } else {
                        values
                    };
                    dense.push(DenseShape {
                        kind,
                        layer: group.layer,
                        bytes,
                        token_bytes: bytes / rows,
                        macs,
                    });
                }
                (None, Some(of)) => experts.push(ExpertShape {
                    layer: group.layer.unwrap_or(0),
                    n_expert: of.count,
                    n_used: of.used,
                    expert_bytes: bytes / u64::from(of.count),
                    expert_macs: of.matrices() * u64::from(of.hidden) * u64::from(of.ffn),
                    by_token: of.is_by_token(group.layer.unwrap_or(0)),
                }),
                (None, None) => {}
            }
        }
        if let Some(table) = self.table {
            let row_bytes = weights::table_row(&table).bytes(mix, &self.place(0));
            add_table(&mut dense, table, row_bytes);
        }
        let hash = xxh3_128(format!("{} {}", self.id.hash, mix.name()).as_bytes());
        let mut shape = ModelShape {
            id: SourceId {
                name: format!("{} at {}, a shape without weights", self.name, mix.name()),
                hash: format!("{hash:032x}"),
            },
            arch: self.arch.clone(),
            n_layer: self.layers,
            hidden: self.hidden,
            n_vocab: self.vocab,
            context: self.context,
            caches: (0..self.layers).map(|layer| self.cache(layer)).collect(),
            dense,
            experts,
            cpu_only: Vec::new(),
        };
        shape.cpu_only = cpu_only_of(&shape);
        shape
    }

    /// Returns a layer's KV cache: key and value of each head, or its one latent with its rotated
    /// key part.
    fn cache(&self, layer: u32) -> CacheShape {
        let (rows, state_bytes) = match *self.attention_of(layer) {
            Attention::Given {
                ref rows,
                state_bytes,
                ..
            } => (rows.iter().map(given_rows).collect(), state_bytes),
            Attention::Gqa {
                heads,
                kv_heads,
                head,
                value,
                window,
                full_every,
                ..
            } => {
                let full = full_every > 0 && (layer + 1).is_multiple_of(full_every);
                let rows = |width: u32, per_head: u64| KvRows {
                    width: width.into(),
                    per_token: per_head * u64::from(kv_heads),
                    every: 1,
                    queries: u64::from(heads / kv_heads),
                    window: window.filter(|_| !full).map(u64::from),
                    chosen: None,
                };
                let rows = match head.cmp(&value) {
                    Ordering::Equal => vec![rows(head, 2)],
                    Ordering::Less => vec![rows(head, 1), rows(value, 1)],
                    Ordering::Greater => vec![rows(value, 1), rows(head, 1)],
                };
                (rows, 0)
            }
            Attention::Mla {
                heads,
                kv_rank,
                rope,
                ..
            } => {
                let width = u64::from(kv_rank) + u64::from(rope);
                let rows = KvRows {
                    width,
                    per_token: 1,
                    every: 1,
                    queries: 2 * u64::from(heads),
                    window: None,
                    chosen: None,
                };
                (vec![rows], 0)
            }
        };
        let mut cache = CacheShape {
            rows,
            state_bytes,
            more_readers: 0,
        };
        if chooses_keys(&self.arch) {
            // The shape need not say how many: then it is all of them.
            let rows = cache.rows.iter_mut();
            rows.for_each(|rows| rows.chosen = rows.chosen.or(Some(u64::MAX)));
        }
        cache
    }

    /// Returns what the mixes depend on in a layer.
    fn place(&self, layer: u32) -> Place {
        let gqa = match *self.attention_of(layer) {
            Attention::Given { .. } => 1,
            Attention::Gqa {
                heads, kv_heads, ..
            } => heads / kv_heads,
            // In memory all heads share one compressed key.
            Attention::Mla { heads, .. } => heads,
        };
        Place {
            layer,
            n_layer: self.layers,
            n_expert: self.experts.as_ref().map_or(0, |e| e.count),
            heads_per_kv: gqa,
            tied: self.tied,
        }
    }
}

impl Experts {
    /// Whether the token alone chooses a layer's experts.
    fn is_by_token(&self, layer: u32) -> bool {
        self.by_token.binary_search(&layer).is_ok()
    }

    /// Returns the matrices of an expert.
    fn matrices(&self) -> u64 {
        if self.gated { 3 } else { 2 }
    }
}

fn given_rows(rows: &GivenRows) -> KvRows {
    KvRows {
        width: rows.width.into(),
        per_token: rows.per_token.into(),
        every: rows.every.into(),
        queries: rows.queries.into(),
        window: rows.window.map(u64::from),
        chosen: rows.chosen.map(u64::from),
    }
}

/// Adds a table after the embedding, if there is one.
fn add_table(dense: &mut Vec<DenseShape>, table: Table, row_bytes: u64) {
    let embedding = |d: &DenseShape| d.kind == DenseKind::Embedding;
    let at = dense.iter().position(embedding).map_or(0, |at| at + 1);
    dense.insert(
        at,
        DenseShape {
            kind: DenseKind::TokenTable,
            layer: None,
            bytes: table.rows * row_bytes,
            token_bytes: u64::from(table.read) * row_bytes,
            macs: 0,
        },
    );
}

/// Reads a shape from the bytes of its file. `path` is only named in errors.
pub fn decode(bytes: &[u8], path: &Path) -> Result<Architecture, FormatError> {
    let text = SHAPE.open_toml(bytes, path)?;
    let shape = wire::decode(text, bytes).map_err(|what| FormatError::invalid(path, what))?;
    check::check(&shape).map_err(|what| FormatError::invalid(path, what))?;
    Ok(shape)
}

/// Reads a shape from its file.
pub fn read(path: &Path) -> Result<Architecture, FormatError> {
    decode(&SHAPE.read(path)?, path)
}
