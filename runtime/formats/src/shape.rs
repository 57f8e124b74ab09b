//! `profiles/models/*.toml`: the shape of a network without its weights, and its sizes in the usual
//! quantizations.
//!
//! A shape says how large every matrix is. A [`Mix`] says which tensor type each of them has; the
//! two together are a [`ModelShape`], all that a planner needs. The mixes follow llama.cpp's rules
//! closely enough for planning: published files differ by what was overridden for them.

mod check;
mod mix;
#[cfg(test)]
mod tests;
mod weights;
mod wire;

pub use mix::Mix;
use mix::Place;
use weights::Weight;

use super::kind::SHAPE;
use crate::FormatError;
use crate::model::kv::KvRows;
use crate::model::shape::{CacheShape, DenseKind, DenseShape, ExpertShape, ModelShape};
use crate::source_id::SourceId;
use serde::Deserialize;
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
    /// Attention, the same in every layer.
    pub attention: Attention,
    /// Routed experts of the other layers.
    pub experts: Option<Experts>,
    /// Source of the figures.
    pub source: String,
    /// Hash of the file it was read from; the name repeated.
    pub id: SourceId,
}

/// How a layer attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// Grouped key and value heads.
    Gqa {
        /// Number of query heads.
        heads: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// Width of a head.
        head: u32,
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Experts {
    /// Number of routed experts.
    pub count: u32,
    /// Experts per token.
    pub used: u32,
    /// Inner width of an expert.
    pub ffn: u32,
    /// Experts of the same width that every token uses besides.
    pub shared: u32,
    /// The experts' matrices have biases.
    pub bias: bool,
    /// The router has a bias.
    pub router_bias: bool,
    /// A value of each expert is added to its score for the choice only.
    pub selection_bias: bool,
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
        if self.experts.is_some() {
            self.layers - self.leading_dense
        } else {
            0
        }
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
        sum
    }

    /// Returns the sizes in a quantization.
    pub fn model_shape(&self, mix: Mix) -> ModelShape {
        let (mut dense, mut experts) = (Vec::new(), Vec::new());
        for group in self.groups() {
            let place = Place {
                layer: group.layer.unwrap_or(0),
                ..self.place()
            };
            let bytes: u64 = group.weights.iter().map(|w| w.bytes(mix, &place)).sum();
            match (group.kind, self.experts) {
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
                    expert_macs: 3 * u64::from(self.hidden) * u64::from(of.ffn),
                }),
                (None, None) => {}
            }
        }
        let hash = xxh3_128(format!("{} {}", self.id.hash, mix.name()).as_bytes());
        ModelShape {
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
        }
    }

    /// Returns a layer's KV cache: key and value of each head, or its one latent with its rotated
    /// key part.
    fn cache(&self, layer: u32) -> CacheShape {
        let rows = match self.attention {
            Attention::Gqa {
                heads,
                kv_heads,
                head,
                window,
                full_every,
                ..
            } => {
                let full = full_every > 0 && (layer + 1).is_multiple_of(full_every);
                let (per_token, queries) = (2 * u64::from(kv_heads), u64::from(heads / kv_heads));
                KvRows {
                    width: head.into(),
                    per_token,
                    queries,
                    window: window.filter(|_| !full).map(u64::from),
                    chosen: None,
                }
            }
            Attention::Mla {
                heads,
                kv_rank,
                rope,
                ..
            } => {
                let width = u64::from(kv_rank) + u64::from(rope);
                KvRows {
                    width,
                    per_token: 1,
                    queries: 2 * u64::from(heads),
                    window: None,
                    chosen: None,
                }
            }
        };
        CacheShape {
            rows: vec![rows],
            state_bytes: 0,
        }
    }

    /// Returns what the mixes depend on, for no layer in particular.
    fn place(&self) -> Place {
        let gqa = match self.attention {
            Attention::Gqa {
                heads, kv_heads, ..
            } => heads / kv_heads,
            // In memory all heads share one compressed key.
            Attention::Mla { heads, .. } => heads,
        };
        Place {
            layer: 0,
            n_layer: self.layers,
            n_expert: self.experts.map_or(0, |e| e.count),
            heads_per_kv: gqa,
            tied: self.tied,
        }
    }
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
