//! Keys and values of past tokens.

use crate::kernels::Kernels;
use crate::model::shape::ModelShape;
use half::f16;
use std::ops::Range;

/// How the cache stores a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvType {
    /// 16-bit floats: half the memory, and differences of about 10⁻⁷ (NMSE of the logits).
    #[default]
    F16,
    /// 32-bit floats, for checking one engine against another.
    F32,
}

impl KvType {
    /// Bytes of what takes `f16_bytes` in 16-bit floats.
    pub fn bytes(self, f16_bytes: u64) -> u64 {
        match self {
            KvType::F16 => f16_bytes,
            KvType::F32 => f16_bytes.saturating_mul(2),
        }
    }

    /// Bytes that a context of this many tokens takes: keys and values stored so, and recurrent state, which is always
    /// of 32-bit floats.
    pub fn context_bytes(self, shape: &ModelShape, tokens: u32) -> u64 {
        let cache = shape.kv_bytes_per_token.saturating_mul(u64::from(tokens));
        self.bytes(cache).saturating_add(shape.state_bytes)
    }
}

/// `[n_head_kv, context, dim]`: heads apart, so that a head's rows are one stream.
struct Rows {
    data: Data,
    context: usize,
    dim: usize,
}

enum Data {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Rows {
    fn new(kv_type: KvType, n_head: usize, context: usize, dim: usize) -> Self {
        let len = n_head * context * dim;
        let data = match kv_type {
            KvType::F16 => Data::F16(vec![f16::ZERO; len]),
            KvType::F32 => Data::F32(vec![0.0; len]),
        };
        Self { data, context, dim }
    }

    fn store(&mut self, kernels: Kernels, position: usize, rows: &[f32]) {
        for (head, row) in rows.chunks_exact(self.dim).enumerate() {
            let at = (head * self.context + position) * self.dim;
            match &mut self.data {
                Data::F16(data) => kernels.to_f16(row, &mut data[at..at + self.dim]),
                Data::F32(data) => data[at..at + self.dim].copy_from_slice(row),
            }
        }
    }

    fn bytes(&self) -> u64 {
        match &self.data {
            Data::F16(data) => 2 * data.len() as u64,
            Data::F32(data) => 4 * data.len() as u64,
        }
    }

    /// Where some positions of a head are.
    fn range(&self, head: usize, positions: Range<usize>) -> Range<usize> {
        let at = head * self.context;
        (at + positions.start) * self.dim..(at + positions.end) * self.dim
    }

    /// `dots[i] = scale · query · row i` for the asked rows of a head.
    fn dots(&self, kernels: Kernels, head: usize, asked: &Attention, query: &[f32], dots: &mut Vec<f32>) {
        let range = self.range(head, asked.positions.clone());
        let scale = asked.scale;
        dots.clear();
        match &self.data {
            Data::F16(data) => {
                dots.extend(data[range].chunks_exact(self.dim).map(|row| scale * kernels.dot_f16(query, row)));
            }
            Data::F32(data) => {
                dots.extend(data[range].chunks_exact(self.dim).map(|row| scale * kernels.dot(query, row)));
            }
        }
    }

    /// `out = Σ weights[i] · row i` over the asked rows of a head.
    fn mix(&self, kernels: Kernels, head: usize, positions: Range<usize>, weights: &[f32], out: &mut [f32]) {
        let range = self.range(head, positions);
        out.fill(0.0);
        match &self.data {
            Data::F16(data) => {
                for (weight, row) in weights.iter().zip(data[range].chunks_exact(self.dim)) {
                    kernels.axpy_f16(*weight, row, out);
                }
            }
            Data::F32(data) => {
                for (weight, row) in weights.iter().zip(data[range].chunks_exact(self.dim)) {
                    kernels.axpy(*weight, row, out);
                }
            }
        }
    }
}

/// What one query attends to.
pub(super) struct Attention {
    /// Past positions, its own included.
    pub positions: Range<usize>,
    /// Factor on the scores.
    pub scale: f32,
    /// A score beside those of the positions, which has no value: it takes its share of the weights away.
    pub sink: Option<f32>,
}

/// One layer's cache.
pub(in crate::exec) struct LayerCache {
    keys: Rows,
    values: Rows,
}

impl LayerCache {
    pub(super) fn new(kv_type: KvType, n_head_kv: usize, key_dim: usize, value_dim: usize, context: usize) -> Self {
        Self {
            keys: Rows::new(kv_type, n_head_kv, context, key_dim),
            values: Rows::new(kv_type, n_head_kv, context, value_dim),
        }
    }

    /// Stores one token's keys `[n_head_kv, key_dim]` and values `[n_head_kv, value_dim]`.
    pub(super) fn store(&mut self, kernels: Kernels, position: usize, keys: &[f32], values: &[f32]) {
        self.keys.store(kernels, position, keys);
        self.values.store(kernels, position, values);
    }

    /// Attention of one query to a key and value head; `scores` is scratch, `out` is `[value_dim]`.
    pub(super) fn attend(
        &self,
        kernels: Kernels,
        head: usize,
        asked: &Attention,
        query: &[f32],
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        self.keys.dots(kernels, head, asked, query, scores);
        scores.extend(asked.sink);
        kernels.softmax(scores);
        scores.truncate(asked.positions.len());
        self.values.mix(kernels, head, asked.positions.clone(), scores, out);
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> u64 {
        self.keys.bytes() + self.values.bytes()
    }
}
