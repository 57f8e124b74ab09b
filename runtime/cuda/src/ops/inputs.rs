//! Inputs that tokens have for every layer, after the product with their embeddings.

use super::{THREADS, blocks, few, int};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};

/// What inputs of tokens are made of: of each part of `dim` values,
/// `(norm(projected / sqrt(hidden)) + sqrt(dim) · row) / sqrt(2)`.
#[derive(Clone, Copy)]
pub struct TokenInputs<'a> {
    /// Tokens.
    pub tokens: usize,
    /// Layers.
    pub layers: usize,
    /// Values per layer.
    pub dim: usize,
    /// Width of an embedding.
    pub hidden: usize,
    /// `[tokens, layers, dim]`: products with the embeddings.
    pub projected: View<'a>,
    /// `[tokens, layers, dim]`: the tokens' rows of the table.
    pub rows: View<'a>,
    /// Weights of the norm, `[dim]`.
    pub norm: View<'a>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// Row of the result that the first token has.
    pub first: usize,
    /// Rows of the result per layer.
    pub capacity: usize,
}

impl Ops {
    /// Makes inputs of tokens, `[layers, capacity, dim]`.
    ///
    /// # Panics
    /// When a buffer is too small, or the result has no room for the tokens.
    pub fn token_inputs(&self, t: &TokenInputs<'_>, out: View<'_>) -> Result<(), CudaError> {
        let values = t.tokens * t.layers * t.dim;
        assert!(
            t.projected.words() >= values && t.rows.words() >= values && t.norm.words() >= t.dim,
            "{} tokens of {} layers of {}",
            t.tokens,
            t.layers,
            t.dim
        );
        assert!(
            t.first + t.tokens <= t.capacity && out.words() >= t.layers * t.capacity * t.dim,
            "tokens from {} on of {}",
            t.first,
            t.capacity
        );
        let args = [
            t.projected.arg(),
            t.rows.arg(),
            t.norm.arg(),
            int(t.dim),
            Arg::Float(t.eps),
            Arg::Float(1.0 / (t.hidden as f32).sqrt()),
            Arg::Float((t.dim as f32).sqrt()),
            int(t.first),
            int(t.capacity),
            out.arg(),
        ];
        let grid = [blocks(t.layers, 1), few(t.tokens), 1];
        self.launch("token_inputs", grid, THREADS, &args)
    }
}
