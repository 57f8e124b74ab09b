//! Kimi delta attention as data.

use super::{Linear, TensorId};

/// Kimi delta attention (KDA, arXiv 2510.26692): a gated delta net whose state decays per key
/// channel. Each head keeps a matrix `S` `[head_dim, head_dim]`. A token with query `q`, key `k`,
/// value `v` and decays `a` makes it `S' = diag(a) S + beta · k (v - kᵀ diag(a) S)ᵀ` and reads
/// `qᵀ S'`.
///
/// Queries, keys and values each pass a causal convolution of every channel first.
#[derive(Debug, Clone)]
pub struct KdaSpec {
    /// Heads, of queries, keys and values alike.
    pub n_head: usize,
    /// Width of every head.
    pub head_dim: usize,
    /// Tokens that the convolutions see, their own included.
    pub conv_taps: usize,
    /// Queries, keys and values, `[n_head * head_dim, hidden]` each.
    pub qkv: [Linear; 3],
    /// Convolutions of queries, keys and values, `[n_head * head_dim, conv_taps]` each, oldest tap
    /// first.
    pub conv: [TensorId; 3],
    /// Epsilon in the length that queries and keys are divided by.
    pub length_eps: f32,
    /// Inputs of the decays, `[n_head * head_dim]`.
    pub decay: Projection,
    /// Added to the decays' inputs, `[n_head * head_dim]`.
    pub decay_bias: TensorId,
    /// What makes decays of their inputs.
    pub decay_gate: DecayGate,
    /// Steepness of each head's decay gate, `[n_head]`.
    pub steepness: TensorId,
    /// Whether the file has the steepness with the other sign, as a negative number.
    pub steepness_negated: bool,
    /// Write strength of each head, `[n_head, hidden]`.
    pub beta: Linear,
    /// Output gates, `[n_head * head_dim]`; their sigmoid is the factor.
    pub gate: Projection,
    /// Norm of every head's result, `[head_dim]`.
    pub norm: TensorId,
    /// `[hidden, n_head * head_dim]`.
    pub out: Linear,
}

/// How an input `f` becomes the logarithm of a decay, with a steepness `a > 0`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DecayGate {
    /// `-a · ln(1 + e^f)`.
    Softplus,
    /// `bound / (1 + e^(-a f))`.
    Bounded {
        /// The least logarithm, negative.
        bound: f32,
    },
}

/// One matrix, or two of a low rank between.
#[derive(Debug, Clone, Copy)]
pub struct Projection {
    /// Reads the hidden state.
    pub first: Linear,
    /// Reads what the first returns.
    pub second: Option<Linear>,
}

impl Projection {
    /// Returns its matrices.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        std::iter::once(&self.first).chain(&self.second)
    }

    /// Returns the values of its result.
    pub fn n_out(&self) -> usize {
        self.second.map_or(self.first.n_out, |second| second.n_out)
    }
}

impl KdaSpec {
    /// Returns the channels of queries, or of keys, or of values.
    pub fn width(&self) -> usize {
        self.n_head * self.head_dim
    }

    /// Returns the values that the layer remembers of a context of any length: the inputs of the
    /// convolutions and the matrices.
    pub fn state_values(&self) -> usize {
        (self.conv_taps - 1) * 3 * self.width() + self.width() * self.head_dim
    }

    /// Returns its projection matrices.
    pub fn linears(&self) -> Vec<&Linear> {
        let mut linears: Vec<&Linear> = self.qkv.iter().collect();
        linears.extend(self.decay.linears());
        linears.push(&self.beta);
        linears.extend(self.gate.linears());
        linears.push(&self.out);
        linears
    }

    /// Returns its vectors of parameters.
    pub fn vectors(&self) -> Vec<TensorId> {
        let mut vectors = self.conv.to_vec();
        vectors.extend([self.decay_bias, self.steepness, self.norm]);
        vectors
    }
}
