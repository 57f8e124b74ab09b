//! What becomes of a block's result before it is added to the hidden state, and what follows a
//! layer's blocks, as data.

use super::{Connections, Linear, NgramBlock, TensorId};

/// What a layer does beside `x += mixer(norm(x)); x += ffn(norm(x))`.
#[derive(Debug, Clone, Copy)]
pub struct Residual {
    /// Norm of the mixer's result, `[hidden]`.
    pub mixer_norm: Option<TensorId>,
    /// Factor on the mixer's result.
    pub mixer_scale: f32,
    /// Norm of the feed-forward block's result, of all its experts together, `[hidden]`.
    pub ffn_norm: Option<TensorId>,
    /// Factor on the feed-forward block's result.
    pub ffn_scale: f32,
    /// What the token itself adds after both blocks.
    pub layer_input: Option<LayerInput>,
    /// Factor on the hidden state after the layer, `[1]`.
    pub output_scale: Option<TensorId>,
    /// How the blocks read and write several streams.
    pub connections: Option<Connections>,
    /// What the token and those before it add before the mixer.
    pub ngram: Option<NgramBlock>,
}

impl Default for Residual {
    fn default() -> Self {
        Self {
            mixer_norm: None,
            mixer_scale: 1.0,
            ffn_norm: None,
            ffn_scale: 1.0,
            layer_input: None,
            output_scale: None,
            connections: None,
            ngram: None,
        }
    }
}

impl Residual {
    /// Returns whether the mixer's result is added as it is.
    pub fn mixer_is_plain(&self) -> bool {
        self.mixer_norm.is_none() && self.mixer_scale == 1.0
    }

    /// Returns whether the feed-forward block's result is added as it is.
    pub fn ffn_is_plain(&self) -> bool {
        self.ffn_norm.is_none() && self.ffn_scale == 1.0
    }

    /// Returns whether nothing follows the blocks.
    pub fn ends_plain(&self) -> bool {
        self.layer_input.is_none() && self.output_scale.is_none()
    }

    /// Returns whether the layer has none of all this.
    pub fn is_plain(&self) -> bool {
        self.mixer_is_plain()
            && self.ffn_is_plain()
            && self.ends_plain()
            && self.connections.is_none()
            && self.ngram.is_none()
    }
}

/// What a token adds to a layer: `x += norm(proj (gelu(gate x) · u))`, where `u` is the layer's part
/// of the token's [own inputs](TokenInputs).
#[derive(Debug, Clone, Copy)]
pub struct LayerInput {
    /// `[dim, hidden]`.
    pub gate: Linear,
    /// `[hidden, dim]`.
    pub proj: Linear,
    /// `[hidden]`.
    pub norm: TensorId,
}

/// Inputs that a token has for every layer (Gemma 3n): with the embedding `x` of a token,
/// `u = (norm(proj x / sqrt(hidden)) + sqrt(dim) · table[token]) / sqrt(2)`.
#[derive(Debug, Clone, Copy)]
pub struct TokenInputs {
    /// Values per layer.
    pub dim: usize,
    /// `[n_vocab, layers * dim]`, of which a token reads one row.
    pub table: TensorId,
    /// `[layers * dim, hidden]`.
    pub proj: Linear,
    /// Norm of each layer's part, `[dim]`.
    pub norm: TensorId,
}

/// What the head does beside the product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadOptions {
    /// Added to the logits, `[n_vocab]`.
    pub bias: Option<TensorId>,
    /// Factor on the logits.
    pub scale: f32,
    /// Logits `z` become `cap · tanh(z / cap)`.
    pub softcap: Option<f32>,
}

impl Default for HeadOptions {
    fn default() -> Self {
        Self {
            bias: None,
            scale: 1.0,
            softcap: None,
        }
    }
}
