//! The gated short convolution as data.

use super::{Linear, TensorId};

/// Gated short convolution (LFM2, arXiv 2511.23404): with the thirds `b`, `c`, `x` of the
/// projection, each channel of `b · x` is convolved over the last tokens, and `c` times that is
/// projected back.
#[derive(Debug, Clone)]
pub struct ShortConvSpec {
    /// Channels, as many as the hidden state has values.
    pub channels: usize,
    /// Tokens that the convolution sees, its own included.
    pub taps: usize,
    /// `[3 * channels, hidden]`.
    pub input: Linear,
    /// `[channels, taps]`, oldest tap first.
    pub conv: TensorId,
    /// `[hidden, channels]`.
    pub out: Linear,
}

impl ShortConvSpec {
    /// Returns the values that the layer remembers of a context of any length: the convolution's
    /// inputs of the last tokens.
    pub fn state_values(&self) -> usize {
        (self.taps - 1) * self.channels
    }
}
