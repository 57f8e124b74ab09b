//! The Mamba-2 mixer as data.

use super::{Linear, TensorId};

/// Mamba-2 (arXiv 2405.21060): each head keeps a matrix `S` `[head_dim, state_dim]`. A token with
/// input `x`, step `dt`, and the vectors `B` and `C` of the head's group makes it
/// `S' = e^(dt · a) S + dt · x Bᵀ` and reads `y = S' C + d · x`.
///
/// `x`, `B` and `C` pass a causal convolution of each channel over the last tokens first, so a layer
/// also remembers the inputs of that.
#[derive(Debug, Clone)]
pub struct MambaSpec {
    /// Heads.
    pub n_head: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Groups of neighboring heads that share `B` and `C`; divides `n_head`.
    pub n_group: usize,
    /// Width of `B` and `C`.
    pub state_dim: usize,
    /// Taps of the convolution, the current token's included.
    pub conv_taps: usize,
    /// `[2 * inner + 2 * n_group * state_dim + n_head, hidden]`: output gates, `x`, `B`, `C` and
    /// steps.
    pub input: Linear,
    /// `[channels, conv_taps]`, oldest tap first; channels are `x`, `B`, `C`.
    pub conv: TensorId,
    /// `[channels]`.
    pub conv_bias: Option<TensorId>,
    /// Added to the steps before their softplus, `[n_head]`.
    pub dt_bias: TensorId,
    /// Factor `a` in the exponent of the decay, `[n_head]`; negative.
    pub decay: TensorId,
    /// Factor `d` of what passes the state by, `[n_head]`.
    pub skip: TensorId,
    /// Norm of each group's gated result, `[n_group, inner / n_group]`.
    pub norm: TensorId,
    /// `[hidden, inner]`.
    pub out: Linear,
}

impl MambaSpec {
    /// Returns the width of all heads together.
    pub fn inner(&self) -> usize {
        self.n_head * self.head_dim
    }

    /// Channels that are convolved.
    pub fn channels(&self) -> usize {
        self.inner() + 2 * self.n_group * self.state_dim
    }

    /// Returns the values that the layer remembers of a context of any length: the inputs of the
    /// convolution and the matrices.
    pub fn state_values(&self) -> usize {
        (self.conv_taps - 1) * self.channels() + self.inner() * self.state_dim
    }
}
