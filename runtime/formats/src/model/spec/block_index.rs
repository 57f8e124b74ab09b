//! The choice of blocks of keys that a token attends to, as data.

use super::{Linear, TensorId, Tensors};

/// A block-sparse indexer beside grouped-query attention: queries and keys of its own choose the
/// blocks of neighboring tokens that a token attends to. Both are normalized per head and rotated
/// like the attention's.
#[derive(Debug, Clone, Copy)]
pub struct BlockIndex {
    /// Query heads; they share one key per token.
    pub n_head: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// `[n_head * key_dim, hidden]`.
    pub q: Linear,
    /// `[key_dim, hidden]`.
    pub k: Linear,
    /// Norm of each query, `[key_dim]`.
    pub q_norm: TensorId,
    /// Norm of a key, `[key_dim]`.
    pub k_norm: TensorId,
    /// Tokens per block, counted from the beginning of the text.
    pub block: usize,
    /// Blocks that a token attends to at most.
    pub kept: usize,
    /// How blocks are scored.
    pub score: BlockScore,
}

/// How blocks are scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockScore {
    /// A block has one key, the mean of its tokens' keys before norm and rotation, at the position
    /// of its first token. The score is `1/sqrt(key_dim) Σ_heads max(0, q · k)`. Blocks count once
    /// they are complete; the tokens after the last complete block are attended to as well.
    Mean,
    /// The largest `q · k` of a block's tokens up to the query's own; the last block may be
    /// incomplete. Head `j` chooses for KV head `j`. The own block and those before it, `local` in
    /// all, come first.
    Best {
        /// Blocks that are always chosen.
        local: usize,
    },
}

impl BlockIndex {
    pub(super) fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::default();
        tensors.linears([&self.q, &self.k]);
        tensors.vectors.extend([self.q_norm, self.k_norm]);
        tensors
    }

    /// Returns how many choices a token makes: one for all heads, or one per KV head.
    pub fn lists(&self) -> usize {
        match self.score {
            BlockScore::Mean => 1,
            BlockScore::Best { .. } => self.n_head,
        }
    }

    /// Returns the keys and values that a token attends to at most, per KV head.
    pub fn most_rows(&self) -> usize {
        let tail = match self.score {
            BlockScore::Mean => self.block - 1,
            BlockScore::Best { .. } => 0,
        };
        self.kept.saturating_mul(self.block).saturating_add(tail)
    }
}
