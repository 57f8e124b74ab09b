//! Attention and rotary position embedding as data.

use super::{BlockIndex, Compressor, IndexerSpec, Linear, Mixer, Reach, TensorId};

/// What a query or key norm spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormSpan {
    /// Each head by itself; the weight has `head_dim` values.
    Head,
    /// All heads together; the weight has a value for each of theirs.
    Full,
}

/// Norms of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QkNorm {
    /// Weights for queries, `[key_dim]` or `[n_head * key_dim]`; ones where `None`.
    pub q: Option<TensorId>,
    /// Weights for keys, `[key_dim]` or `[n_head_kv * key_dim]`; ones where `None`.
    pub k: Option<TensorId>,
    /// What each norm spans.
    pub span: NormSpan,
    /// Whether the norms follow the rotation instead of preceding it.
    pub after_rope: bool,
}

/// What a gate becomes before it multiplies the attention's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateFunction {
    /// `1 / (1 + e^-g)`.
    Sigmoid,
    /// `ln(1 + e^g)`.
    Softplus,
}

/// Where the gates on the attention's result come from.
#[derive(Debug, Clone, Copy)]
pub enum OutputGate {
    /// Each query head is followed by a gate of the same width in the rows of `q`, whose sigmoid is
    /// the factor. `value_dim` is then `key_dim`.
    WithQueries,
    /// A matrix of their own: `[n_head, hidden]` has one gate per head, `[n_head * value_dim,
    /// hidden]` one per value.
    Separate {
        /// The matrix.
        linear: Linear,
        /// What makes a factor of a gate.
        function: GateFunction,
    },
}

/// Which positions a window of `n` covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WindowKind {
    /// The last `n` up to the query's own.
    #[default]
    Sliding,
    /// Those from the last multiple of `n` on, up to the query's own.
    Chunked,
}

/// Grouped-query attention (GQA).
#[derive(Debug, Clone)]
pub struct GqaSpec {
    /// Number of query heads.
    pub n_head: usize,
    /// Key and value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Width of a query or key head.
    pub key_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Scores `s` become `cap · tanh(s / cap)`.
    pub softcap: Option<f32>,
    /// Growth of the scores with the position.
    pub temperature: Option<Temperature>,
    /// Rotary position embedding of queries and keys; layers without it know no positions.
    pub rope: Option<RopeSpec>,
    /// Norms of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Whether each value head is normalized, without weights.
    pub value_norm: bool,
    /// Gates on the result.
    pub gate: Option<OutputGate>,
    /// `[n_head * key_dim, hidden]`, twice as many rows when gated.
    pub q: Linear,
    /// `[n_head_kv * key_dim, hidden]`.
    pub k: Linear,
    /// `[n_head_kv * value_dim, hidden]`; the rows of `k` where values are the keys before their
    /// norm and rotation.
    pub v: Linear,
    /// `[hidden, n_head * value_dim]`.
    pub o: Linear,
    /// An earlier layer whose keys and values this one attends to instead of computing its own.
    pub shared_kv: Option<usize>,
    /// Chooses the blocks of keys that a token attends to; all are where `None`.
    pub index: Option<BlockIndex>,
    /// A score of each head that takes part in the softmax and has no value, `[n_head]`.
    pub sinks: Option<TensorId>,
    /// Positions that a query sees, its own included; all before it when `None`.
    pub window: Option<usize>,
    /// Where a window begins.
    pub window_kind: WindowKind,
}

impl GqaSpec {
    /// Returns whether gates come with the queries.
    pub fn gated(&self) -> bool {
        matches!(self.gate, Some(OutputGate::WithQueries))
    }

    /// Returns the gates per token that a matrix of their own makes.
    pub fn separate_gates(&self) -> usize {
        match &self.gate {
            Some(OutputGate::Separate { linear, .. }) => linear.n_out,
            Some(OutputGate::WithQueries) | None => 0,
        }
    }

    /// Returns whether values are the projected keys.
    pub fn keys_are_values(&self) -> bool {
        (self.k.weight, self.k.first_row) == (self.v.weight, self.v.first_row)
    }

    /// Returns its matrices. A layer that shares keys and values has none for them.
    pub fn linears(&self) -> Vec<&Linear> {
        let mut linears = vec![&self.q];
        if self.shared_kv.is_none() {
            linears.extend([&self.k, &self.v]);
        }
        linears.push(&self.o);
        if let Some(OutputGate::Separate { linear, .. }) = &self.gate {
            linears.push(linear);
        }
        linears
    }
}

/// Multi-head latent attention (arXiv 2405.04434): a token's keys and values of all heads are two
/// projections of one short vector, its latent, and only that and one rotated key part, shared by
/// all heads, are remembered.
#[derive(Debug, Clone)]
pub struct MlaSpec {
    /// Number of query heads.
    pub n_head: usize,
    /// Values of a query or key head before the part that all key heads share.
    pub nope_dim: usize,
    /// Values of the shared key part, and of the last part of every query head.
    pub shared_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Width of the latent.
    pub kv_rank: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Growth of the scores with the position.
    pub temperature: Option<Temperature>,
    /// Rotary position embedding of the last part of every query head and of the shared key part,
    /// of `shared_dim` values; layers without it know no positions.
    pub rope: Option<RopeSpec>,
    /// The first half of a low-rank query projection, where queries are compressed.
    pub q_down: Option<LowRank>,
    /// `[n_head * (nope_dim + shared_dim), q_rank or hidden]`.
    pub q: Linear,
    /// To the latent and the shared key part, `[kv_rank + shared_dim, hidden]`.
    pub kv_down: Linear,
    /// Norm of the latent, `[kv_rank]`.
    pub kv_norm: TensorId,
    /// Norm of the shared key part before it rotates, `[shared_dim]`.
    pub shared_norm: Option<TensorId>,
    /// From the latent to each head's keys and values.
    pub kv_up: KvUp,
    /// Which positions a token attends to.
    pub reach: Reach,
    /// A score of each head that takes part in the softmax and has no value, `[n_head]`.
    pub sinks: Option<TensorId>,
    /// Gates on the result, from a matrix of their own.
    pub gate: Option<OutputGate>,
    /// `[hidden, n_head * value_dim]`.
    pub o: Linear,
}

/// The projection of hidden states to compressed queries.
#[derive(Debug, Clone, Copy)]
pub struct LowRank {
    /// `[q_rank, hidden]`.
    pub down: Linear,
    /// Norm of the compressed queries, `[q_rank]`.
    pub norm: TensorId,
}

/// How a file holds the projections from the latent to keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvUp {
    /// Apart, the keys' turned so that it takes queries to the latent.
    Split {
        /// `[n_head, kv_rank, nope_dim]`.
        k: TensorId,
        /// `[n_head, value_dim, kv_rank]`.
        v: TensorId,
    },
    /// Together, as older files have it: `[n_head, nope_dim + value_dim, kv_rank]`, keys before
    /// values in each head.
    Fused(TensorId),
}

/// Scores at position `p` are multiplied by `1 + scale · ln(1 + floor((p + offset) / length))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    /// Growth per logarithm of the step.
    pub scale: f32,
    /// Positions per step.
    pub length: usize,
    /// Positions by which the first step is shorter.
    pub offset: usize,
}

impl Temperature {
    /// Returns the factor at a position.
    pub fn at(&self, position: usize) -> f32 {
        1.0 + self.scale * (((position + self.offset) / self.length + 1) as f32).ln()
    }
}

/// Which values rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeKind {
    /// Neighbors: (0, 1), (2, 3), …
    Adjacent,
    /// Halves: (0, n/2), (1, n/2 + 1), …
    Halves,
}

/// Rotary position embedding (RoPE).
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Which values rotate together.
    pub kind: RopeKind,
    /// Values of a head that rotate, the first ones; even.
    pub dims: usize,
    /// Base of the geometric row of frequencies.
    pub base: f32,
    /// How positions beyond the trained context are squeezed in.
    pub scaling: RopeScaling,
    /// Factor on the rotated values.
    pub magnitude: f32,
    /// Divisors of the frequencies, `[dims / 2]`.
    pub freq_factors: Option<TensorId>,
    /// Other divisors for contexts beyond the trained one.
    pub long_factors: Option<LongFactors>,
    /// Pairs of each axis where positions have time, height, width and one axis more. Text is at
    /// the same place on the first three and at 0 on the fourth, so that pairs of the fourth don't
    /// rotate.
    pub sections: Option<[u32; 4]>,
}

/// Divisors of frequencies for long contexts (LongRoPE, arXiv 2402.13753). The length of the context
/// that an engine is loaded for decides, not the tokens in it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LongFactors {
    /// `[dims / 2]`.
    pub factors: TensorId,
    /// Longest context that does without them, in tokens.
    pub original_context: usize,
}

impl RopeSpec {
    /// Returns the divisors of the frequencies in a context of this many tokens.
    pub fn factors_for(&self, context: usize) -> Option<TensorId> {
        match self.long_factors {
            Some(long) if context > long.original_context => Some(long.factors),
            _ => self.freq_factors,
        }
    }
}

/// Extension of the context by rotary scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// All positions divided by this factor.
    Linear(f32),
    /// YaRN (arXiv 2309.00071): high frequencies kept, low ones divided, a ramp between.
    Yarn {
        /// Factor by which the context is extended.
        factor: f32,
        /// Context length before extension, in tokens.
        original_context: f32,
        /// Rotations above which a frequency is kept.
        beta_fast: f32,
        /// Rotations below which a frequency is divided by the whole factor.
        beta_slow: f32,
        /// Share of the ramp that is kept: 1 keeps high frequencies wholly, 0 divides all.
        ext: f32,
    },
}

/// Rows of one width that tokens add to a layer's KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheRows {
    /// Rows per block of tokens.
    pub n: usize,
    /// Values in each row.
    pub width: usize,
    /// Tokens per block; 1 where every token has rows of its own.
    pub every: usize,
}

impl MlaSpec {
    /// Returns its matrices, apart from [`kv_up`](Self::kv_up).
    pub fn linears(&self) -> Vec<&Linear> {
        let mut linears: Vec<&Linear> = self.q_down.iter().map(|low| &low.down).collect();
        linears.extend([&self.q, &self.kv_down, &self.o]);
        if let Some(OutputGate::Separate { linear, .. }) = &self.gate {
            linears.push(linear);
        }
        if let Some(indexer) = self.reach.indexer() {
            linears.extend(indexer.linears());
        }
        linears
    }
}

impl Mixer {
    /// Returns the rotary embedding, if the mixer has one.
    pub fn rope(&self) -> Option<&RopeSpec> {
        match self {
            Mixer::Gqa(a) => a.rope.as_ref(),
            Mixer::Mla(a) => a.rope.as_ref(),
            Mixer::Compressed(a) => Some(&a.rope),
            Mixer::Delta(_) | Mixer::Kda(_) | Mixer::ShortConv(_) => None,
            Mixer::Mamba(_) | Mixer::None => None,
        }
    }

    /// Returns the rotary embedding of the layer's indexer, if it has one.
    pub fn indexer_rope(&self) -> Option<&RopeSpec> {
        match self {
            Mixer::Mla(a) => a.reach.indexer()?.rope.as_ref(),
            _ => None,
        }
    }

    /// Returns the rows that tokens add to the layer's KV cache: keys and values of each head, or one
    /// latent with its shared key part, and the key of the layer's indexer; or one compressed vector
    /// per block, and the key of the block.
    pub fn cache_rows(&self) -> Vec<CacheRows> {
        match self {
            Mixer::Gqa(a) if a.shared_kv.is_some() => Vec::new(),
            Mixer::Gqa(a) => {
                let rows = |n, width| CacheRows { n, width, every: 1 };
                let heads = [a.key_dim, a.value_dim].map(|width| rows(a.n_head_kv, width));
                let index = a.index.map(|index| rows(1, index.key_dim));
                heads.into_iter().chain(index).collect()
            }
            Mixer::Mla(a) => {
                let rows = |width, every| CacheRows { n: 1, width, every };
                let index = |indexer: &IndexerSpec| rows(indexer.key_dim, indexer.selection.block);
                std::iter::once(rows(a.kv_rank + a.shared_dim, 1))
                    .chain(a.reach.indexer().map(index))
                    .collect()
            }
            Mixer::Compressed(a) => {
                let rows = |of: &Compressor| CacheRows {
                    n: 1,
                    width: of.width(),
                    every: of.ratio,
                };
                a.compressors().map(rows).collect()
            }
            Mixer::Delta(_) | Mixer::Kda(_) | Mixer::ShortConv(_) => Vec::new(),
            Mixer::Mamba(_) | Mixer::None => Vec::new(),
        }
    }

    /// Returns the bytes of recurrent state, which don't depend on the length of the context.
    pub fn state_bytes(&self) -> u64 {
        let values = match self {
            Mixer::Gqa(_) | Mixer::None => 0,
            Mixer::Mla(a) => a.reach.indexer().map_or(0, IndexerSpec::state_values),
            Mixer::Mamba(m) => m.state_values(),
            Mixer::Compressed(a) => a.state_values(),
            Mixer::Delta(d) => d.state_values(),
            Mixer::Kda(k) => k.state_values(),
            Mixer::ShortConv(c) => c.state_values(),
        };
        values as u64 * size_of::<f32>() as u64
    }
}
