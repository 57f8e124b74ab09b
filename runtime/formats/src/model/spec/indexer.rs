//! Sparse attention of latent layers as data: which earlier positions a token attends to.

use super::{Linear, RopeSpec, TensorId};

/// Which positions, up to its own, a token of a latent layer attends to.
#[derive(Debug, Clone)]
pub enum Reach {
    /// All.
    All,
    /// The last ones, this many.
    Window(usize),
    /// Those that the layer's own indexer rates highest.
    Indexed(Box<IndexerSpec>),
    /// Those that the last layer before it with an indexer chose.
    Reused(Selection),
}

/// How many positions a token attends to: the best blocks of neighboring positions, counted from
/// the beginning of the text, among those that are complete at its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    /// Blocks at most, at least 1.
    pub blocks: usize,
    /// Positions per block; with 1, positions are chosen by themselves.
    pub block: usize,
    /// Whether the positions after the last complete block are attended to as well.
    pub tail: bool,
}

/// Lightning indexer (DeepSeek-V3.2, arXiv 2512.02556): a small attention that rates every earlier
/// position for a token, so that the attention proper reads the best ones only.
///
/// The rating of position `m` for token `t` is `scale · Σ w_i(t) · max(0, q_i(t) · k_m)` over heads
/// `i`. Keys `k_m` are layer-normalized and kept in the KV cache. Published code rotates queries and
/// keys by a Hadamard matrix too, for the sake of 8-bit floats; it is orthonormal and cancels.
#[derive(Debug, Clone)]
pub struct IndexerSpec {
    /// Number of query heads.
    pub n_head: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// Positions that a token chooses.
    pub selection: Selection,
    /// Factor on the ratings.
    pub scale: f32,
    /// Rotary position embedding of queries and keys.
    pub rope: Option<RopeSpec>,
    /// First value of a query or key that rotates.
    pub rope_first: usize,
    /// Epsilon of the layer norm of keys.
    pub norm_eps: f32,
    /// From the compressed queries of the attention, `[n_head * key_dim, q_rank]`.
    pub q: Linear,
    /// `[key_dim, hidden]`.
    pub k: Linear,
    /// Weights of the layer norm of keys, `[key_dim]`.
    pub k_norm: TensorId,
    /// Added after that norm, `[key_dim]`.
    pub k_norm_bias: TensorId,
    /// Weights of the heads, `[n_head, hidden]`.
    pub head_weights: Linear,
    /// What makes one key of the keys of a block; without it every position is rated.
    pub pool: Option<KeyPool>,
}

/// Makes one key of the `P` keys of a block (GLM-5.3-Flash): with `g_t = gate x_t + ape[t mod P]`,
/// the key is `Σ_t softmax_t(g_t) · k_t`, where the softmax is over the block's tokens for each value
/// by itself. Keys and gates of a block that is not complete are recurrent state.
#[derive(Debug, Clone, Copy)]
pub struct KeyPool {
    /// `[key_dim, hidden]`.
    pub gate: Linear,
    /// `[P, key_dim]`.
    pub ape: TensorId,
}

impl Reach {
    /// Returns the layer's own indexer, if it has one.
    pub fn indexer(&self) -> Option<&IndexerSpec> {
        match self {
            Reach::Indexed(indexer) => Some(indexer),
            Reach::All | Reach::Window(_) | Reach::Reused(_) => None,
        }
    }

    /// Returns what a token chooses, where it doesn't attend to all or to neighbors.
    pub fn selection(&self) -> Option<Selection> {
        match self {
            Reach::Indexed(indexer) => Some(indexer.selection),
            Reach::Reused(selection) => Some(*selection),
            Reach::All | Reach::Window(_) => None,
        }
    }

    /// Returns the width of a sliding window, if it is one.
    pub fn window(&self) -> Option<usize> {
        match self {
            Reach::Window(window) => Some(*window),
            Reach::All | Reach::Indexed(_) | Reach::Reused(_) => None,
        }
    }
}

impl Selection {
    /// Returns the choice of so many positions by themselves.
    pub fn of_positions(top_k: usize) -> Self {
        Self {
            blocks: top_k,
            block: 1,
            tail: true,
        }
    }

    /// Returns the positions that a token attends to at most.
    pub fn most(&self) -> usize {
        let tail = if self.tail { self.block - 1 } else { 0 };
        self.blocks.saturating_mul(self.block).saturating_add(tail)
    }

    /// Returns how many blocks a token chooses among that sees so many positions.
    pub fn visible(&self, seen: usize) -> usize {
        seen / self.block
    }

    /// Returns how many of a text's first tokens attend to all positions up to their own.
    pub fn n_dense(&self) -> usize {
        if self.tail || self.block == 1 {
            self.most()
        } else {
            0
        }
    }
}

impl IndexerSpec {
    /// Returns its matrices.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let pool = self.pool.iter().map(|pool| &pool.gate);
        [&self.q, &self.k, &self.head_weights]
            .into_iter()
            .chain(pool)
    }

    /// Returns its vectors of parameters.
    pub(super) fn vectors(&self) -> impl Iterator<Item = TensorId> {
        let pool = self.pool.map(|pool| pool.ape);
        [self.k_norm, self.k_norm_bias].into_iter().chain(pool)
    }

    /// Returns the values of recurrent state: keys and gates of a block that is not complete.
    pub fn state_values(&self) -> usize {
        match self.pool {
            Some(_) => self.selection.block * 2 * self.key_dim,
            None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_bounds_what_is_seen() {
        let positions = Selection::of_positions(12);
        assert_eq!((positions.most(), positions.n_dense()), (12, 12));
        let mut blocks = Selection {
            blocks: 3,
            block: 4,
            tail: true,
        };
        // The token with the fourth complete block is the first that leaves one out.
        assert_eq!((blocks.most(), blocks.n_dense()), (15, 15));
        assert_eq!([15, 16].map(|seen| blocks.visible(seen)), [3, 4]);
        blocks.tail = false;
        assert_eq!((blocks.most(), blocks.n_dense()), (12, 0));
        blocks.blocks = usize::MAX;
        assert_eq!(blocks.most(), usize::MAX);
    }
}
