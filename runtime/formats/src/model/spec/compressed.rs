//! Attention to near tokens and to compressed far ones, as data.

use super::{Linear, LowRank, MatrixPart, RopeSpec, TensorId, Tensors};

/// Attention of DeepSeek-V4: one vector per token is the key and the value of all heads. A token
/// attends to the vectors of the last `window` tokens and, in layers with a compressor, to one
/// vector per block of tokens before.
#[derive(Debug, Clone)]
pub struct CompressedSpec {
    /// Query heads.
    pub n_head: usize,
    /// Width of a query, and of the vectors that are keys and values.
    pub key_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Rotary position embedding of the *last* values of queries and keys; results are turned back
    /// by the query's own angles.
    pub rope: RopeSpec,
    /// The first half of the query projection.
    pub q_down: LowRank,
    /// `[n_head * key_dim, q_rank]`; each head is normalized after it, without weights.
    pub q: Linear,
    /// `[key_dim, hidden]`.
    pub kv: Linear,
    /// Norm of a token's vector, `[key_dim]`.
    pub kv_norm: TensorId,
    /// A score of each head that takes part in the softmax and has no value, `[n_head]`.
    pub sinks: TensorId,
    /// Latest tokens whose own vectors a token sees, itself included.
    pub window: usize,
    /// What compresses blocks of tokens; without it a token sees its window only.
    pub far: Option<FarKeys>,
    /// Groups of neighboring heads that the output is taken from apart; divides `n_head`.
    pub n_group: usize,
    /// `[n_group * rank, n_head / n_group * key_dim]`: the rows of each group read its heads only.
    pub o_down: Linear,
    /// `[hidden, n_group * rank]`.
    pub o: Linear,
}

/// The compressed vectors of a layer, and which of them a token sees.
#[derive(Debug, Clone, Copy)]
pub struct FarKeys {
    /// Makes the vectors.
    pub compressor: Compressor,
    /// Chooses among complete blocks; all of them are seen where `None`.
    pub index: Option<CompressedIndex>,
}

/// Makes one vector of a block of `ratio` tokens. With `K_t = kv x_t` and
/// `G_t = gate x_t + ape[t mod ratio]`, the vector is `Σ_t softmax_t(G_t) · K_t`, where the softmax
/// is over the block's tokens for each value by itself; then come its norm, and the rotation of the
/// block's first position.
///
/// With `overlap`, `K` and `G` are twice as wide: a block takes the second halves of its own tokens
/// and the first halves of the block before, if there is one.
#[derive(Debug, Clone, Copy)]
pub struct Compressor {
    /// Tokens per block.
    pub ratio: usize,
    /// Whether blocks reach back into the block before.
    pub overlap: bool,
    /// `[width or 2 * width, hidden]`.
    pub kv: Linear,
    /// As `kv`.
    pub gate: Linear,
    /// `[ratio, width or 2 * width]`.
    pub ape: TensorId,
    /// Norm of a compressed vector, `[width]`.
    pub norm: TensorId,
}

/// Chooses the compressed vectors that a token attends to: the `kept` with the largest
/// `Σ_i w_i max(0, q_i · k)`, where the keys `k` are made by a compressor of the index's own,
/// `q = q x_low` of the compressed query, and `w = weights x / sqrt(n_head · key_dim)`.
#[derive(Debug, Clone, Copy)]
pub struct CompressedIndex {
    /// Query heads.
    pub n_head: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// Vectors that a token attends to at most.
    pub kept: usize,
    /// Makes the keys, with the blocks of the vectors.
    pub compressor: Compressor,
    /// `[n_head * key_dim, q_rank]`.
    pub q: Linear,
    /// `[n_head, hidden]`.
    pub weights: Linear,
}

impl Compressor {
    /// Returns the width of a compressed vector.
    pub fn width(&self) -> usize {
        if self.overlap {
            self.kv.n_out / 2
        } else {
            self.kv.n_out
        }
    }

    /// Returns the tokens whose rows are remembered: those of the open block, and of the block
    /// before where blocks overlap.
    pub fn past(&self) -> usize {
        if self.overlap {
            2 * self.ratio
        } else {
            self.ratio
        }
    }

    /// Returns the values that are remembered of the tokens of open blocks.
    pub fn state_values(&self) -> usize {
        self.past() * 2 * self.kv.n_out
    }

    fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.linears([&self.kv, &self.gate]);
        tensors.vectors.extend([self.ape, self.norm]);
        tensors
    }
}

impl CompressedSpec {
    /// Returns the compressors: that of the vectors, and that of the index.
    pub fn compressors(&self) -> impl Iterator<Item = &Compressor> {
        self.far.iter().flat_map(|far| {
            let index = far.index.iter().map(|index| &index.compressor);
            std::iter::once(&far.compressor).chain(index)
        })
    }

    /// Returns the values of recurrent state: the vectors of the window, and the rows of open blocks.
    pub fn state_values(&self) -> usize {
        let open: usize = self.compressors().map(Compressor::state_values).sum();
        self.window_values() + open
    }

    /// Returns the values of the window's vectors.
    pub fn window_values(&self) -> usize {
        self.window * self.key_dim
    }

    pub(super) fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        let own = [&self.q_down.down, &self.q, &self.kv, &self.o_down, &self.o];
        tensors.linears(own);
        // Each group's rows are multiplied with its own heads.
        let rank = self.o_down.n_out / self.n_group.max(1);
        tensors.parts.push(MatrixPart {
            tensor: self.o_down.weight,
            rows: 0..rank,
        });
        tensors
            .vectors
            .extend([self.q_down.norm, self.kv_norm, self.sinks]);
        for compressor in self.compressors() {
            tensors = tensors.and(compressor.tensors());
        }
        if let Some(index) = self.far.and_then(|far| far.index) {
            tensors.linears([&index.q, &index.weights]);
        }
        tensors
    }
}
