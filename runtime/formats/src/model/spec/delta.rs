//! The gated delta net as data.

use super::{Linear, TensorId};

/// Gated delta net (arXiv 2412.06464): each value head keeps a matrix `S` `[head_dim, head_dim]`,
/// and a token with query `q`, key `k` and value `v` makes it `S' = decay · S + beta · k (v - decay
/// · kᵀ S)ᵀ` and reads `qᵀ S'`.
///
/// Queries, keys and values pass a causal convolution of each channel over the last tokens first,
/// so a layer also remembers the inputs of that.
#[derive(Debug, Clone)]
pub struct DeltaSpec {
    /// Query heads, and as many key heads.
    pub n_key_head: usize,
    /// Value heads; a multiple of `n_key_head`.
    pub n_value_head: usize,
    /// Width of every head.
    pub head_dim: usize,
    /// Tokens that the convolution sees, its own included.
    pub conv_taps: usize,
    /// Which value heads a key head serves.
    pub sharing: KeySharing,
    /// Queries, keys, values and output gates.
    pub input: DeltaInput,
    /// Decay and strength of the update.
    pub rates: DeltaRates,
    /// `[channels, conv_taps]`, oldest tap first; channels are query heads, key heads, value heads.
    pub conv: TensorId,
    /// Added to the decay's input, `[n_value_head]`.
    pub dt_bias: TensorId,
    /// Factor in the exponent of the decay, `[n_value_head]`; negative.
    pub decay: TensorId,
    /// What the output gates become.
    pub gate: DeltaGate,
    /// Norm of every head's result, `[head_dim]`.
    pub norm: TensorId,
    /// `[hidden, n_value_head * head_dim]`.
    pub out: Linear,
}

/// Which value heads a key head serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeySharing {
    /// Neighbors: with two value heads per key head, key head 0 serves 0 and 1.
    Grouped,
    /// In turn: with two key heads, key head 0 serves 0, 2, 4, …
    Cyclic,
}

/// What makes a factor on a head's normed result of an output gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeltaGate {
    /// `g / (1 + e^-g)`.
    Silu,
    /// `1 / (1 + e^-g)`.
    Sigmoid,
}

/// Where a delta net's heads come from.
#[derive(Debug, Clone, Copy)]
pub enum DeltaInput {
    /// Two matrices, one per projection.
    Split {
        /// Query heads, key heads, value heads.
        qkv: Linear,
        /// Output gates, in the order of the value heads.
        gate: Linear,
    },
    /// One matrix; for each key head its query, its key, the values and the gates of the value
    /// heads it serves. Goes with [`KeySharing::Grouped`] only.
    ByKeyHead(Linear),
}

/// Where a delta net's decay and update strength come from.
#[derive(Debug, Clone, Copy)]
pub enum DeltaRates {
    /// `[n_value_head, hidden]` each.
    Split {
        /// Write strength of each value head.
        beta: Linear,
        /// Decay of each value head.
        alpha: Linear,
    },
    /// One matrix; for each key head the strengths, then the decays of the value heads it serves.
    /// Goes with [`KeySharing::Grouped`] only.
    ByKeyHead(Linear),
}

impl DeltaSpec {
    /// Channels that are convolved.
    pub fn channels(&self) -> usize {
        (2 * self.n_key_head + self.n_value_head) * self.head_dim
    }

    /// Returns the values that the layer remembers of a context of any length: the inputs of the
    /// convolution and the matrices.
    pub fn state_values(&self) -> usize {
        (self.conv_taps - 1) * self.channels() + self.n_value_head * self.head_dim * self.head_dim
    }

    /// Returns its projection matrices.
    pub fn linears(&self) -> Vec<&Linear> {
        let mut linears = match &self.input {
            DeltaInput::Split { qkv, gate } => vec![qkv, gate],
            DeltaInput::ByKeyHead(all) => vec![all],
        };
        match &self.rates {
            DeltaRates::Split { beta, alpha } => linears.extend([beta, alpha]),
            DeltaRates::ByKeyHead(all) => linears.push(all),
        }
        linears.push(&self.out);
        linears
    }

    /// Returns the key head that serves a value head.
    pub fn key_head(&self, value_head: usize) -> usize {
        match self.sharing {
            KeySharing::Grouped => value_head / (self.n_value_head / self.n_key_head),
            KeySharing::Cyclic => value_head % self.n_key_head,
        }
    }
}
