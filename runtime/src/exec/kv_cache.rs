//! Keys and values of past tokens, in 16-bit floats.

use crate::kernels::Kernels;
use half::f16;

/// One layer's cache; heads apart, so that a head's keys are one stream.
pub(super) struct LayerCache {
    /// `[n_head_kv, context, key_dim]`.
    keys: Vec<f16>,
    /// `[n_head_kv, context, value_dim]`.
    values: Vec<f16>,
    context: usize,
    key_dim: usize,
    value_dim: usize,
}

impl LayerCache {
    pub(super) fn new(n_head_kv: usize, key_dim: usize, value_dim: usize, context: usize) -> Self {
        Self {
            keys: vec![f16::ZERO; n_head_kv * context * key_dim],
            values: vec![f16::ZERO; n_head_kv * context * value_dim],
            context,
            key_dim,
            value_dim,
        }
    }

    /// Stores one token's keys `[n_head_kv, key_dim]` and values `[n_head_kv, value_dim]`.
    pub(super) fn store(&mut self, kernels: Kernels, position: usize, keys: &[f32], values: &[f32]) {
        for (head, key) in keys.chunks_exact(self.key_dim).enumerate() {
            let at = (head * self.context + position) * self.key_dim;
            kernels.to_f16(key, &mut self.keys[at..at + self.key_dim]);
        }
        for (head, value) in values.chunks_exact(self.value_dim).enumerate() {
            let at = (head * self.context + position) * self.value_dim;
            kernels.to_f16(value, &mut self.values[at..at + self.value_dim]);
        }
    }

    /// Keys of one head at positions `0..n`, `[n, key_dim]`.
    pub(super) fn keys(&self, head: usize, n: usize) -> &[f16] {
        let at = head * self.context * self.key_dim;
        &self.keys[at..at + n * self.key_dim]
    }

    /// Values of one head at positions `0..n`, `[n, value_dim]`.
    pub(super) fn values(&self, head: usize, n: usize) -> &[f16] {
        let at = head * self.context * self.value_dim;
        &self.values[at..at + n * self.value_dim]
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> u64 {
        2 * (self.keys.len() + self.values.len()) as u64
    }
}
