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
    Reused {
        /// Positions that the other layer chooses at most.
        top_k: usize,
    },
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
    /// Positions that a token attends to at most.
    pub top_k: usize,
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
}

impl Reach {
    /// Returns the layer's own indexer, if it has one.
    pub fn indexer(&self) -> Option<&IndexerSpec> {
        match self {
            Reach::Indexed(indexer) => Some(indexer),
            Reach::All | Reach::Window(_) | Reach::Reused { .. } => None,
        }
    }

    /// Returns the positions that a token chooses at most, where it doesn't attend to all or to
    /// neighbors.
    pub fn top_k(&self) -> Option<usize> {
        match self {
            Reach::Indexed(indexer) => Some(indexer.top_k),
            Reach::Reused { top_k } => Some(*top_k),
            Reach::All | Reach::Window(_) => None,
        }
    }

    /// Returns the width of a sliding window, if it is one.
    pub fn window(&self) -> Option<usize> {
        match self {
            Reach::Window(window) => Some(*window),
            Reach::All | Reach::Indexed(_) | Reach::Reused { .. } => None,
        }
    }
}

impl IndexerSpec {
    /// Returns its matrices.
    pub fn linears(&self) -> [&Linear; 3] {
        [&self.q, &self.k, &self.head_weights]
    }
}
