//! Latents of past tokens: what latent attention remembers instead of keys and values.

use super::KvType;
use crate::kernels::Kernels;
use half::f16;

/// Rows that stay in the first-level cache while every query of a group passes over them.
const BLOCK_ROWS: usize = 16;

/// One layer's cache: a row a token, its latent and then its rotated key part. All heads read the same rows.
pub(in crate::exec) struct LatentCache {
    data: Data,
    /// Values of a latent.
    rank: usize,
    /// Values of a row.
    width: usize,
}

enum Data {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

/// Queries that pass over the cache together.
pub(super) struct Queries<'a> {
    /// `[queries, width]`: in the space of the latents, and then the rotated part.
    pub rows: &'a [f32],
    /// For each, how many positions it sees, from the first on; at least one.
    pub seen: &'a [usize],
    /// For each, the factor on its scores.
    pub scales: &'a [f32],
}

impl LatentCache {
    pub(super) fn new(kv_type: KvType, context: usize, rank: usize, rope_dims: usize) -> Self {
        let width = rank + rope_dims;
        let len = context * width;
        let data = match kv_type {
            KvType::F16 => Data::F16(vec![f16::ZERO; len]),
            KvType::F32 => Data::F32(vec![0.0; len]),
        };
        Self { data, rank, width }
    }

    /// Stores one token's row.
    pub(super) fn store(&mut self, kernels: Kernels, position: usize, row: &[f32]) {
        let range = position * self.width..(position + 1) * self.width;
        match &mut self.data {
            Data::F16(data) => kernels.to_f16(row, &mut data[range]),
            Data::F32(data) => data[range].copy_from_slice(row),
        }
    }

    /// The latents that each query attends to, weighted and summed: `out` is `[queries, rank]`; `scores` is scratch.
    ///
    /// A query's result has the same bits whatever other queries are beside it.
    pub(super) fn attend(&self, kernels: Kernels, queries: &Queries<'_>, scores: &mut Vec<f32>, out: &mut [f32]) {
        let (rank, width) = (self.rank, self.width);
        match &self.data {
            Data::F16(data) => {
                let dot = |query: &[f32], row: &[f16]| kernels.dot_f16(query, row);
                let add = |weight, row: &[f16], out: &mut [f32]| kernels.axpy_f16(weight, &row[..rank], out);
                attend(kernels, data, width, queries, scores, out, dot, add);
            }
            Data::F32(data) => {
                let dot = |query: &[f32], row: &[f32]| kernels.dot(query, row);
                let add = |weight, row: &[f32], out: &mut [f32]| kernels.axpy(weight, &row[..rank], out);
                attend(kernels, data, width, queries, scores, out, dot, add);
            }
        }
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> u64 {
        match &self.data {
            Data::F16(data) => 2 * data.len() as u64,
            Data::F32(data) => 4 * data.len() as u64,
        }
    }
}

/// Scores, softmax and sum over rows of any type. Blocks of rows are the outer loop, so that a row comes from memory
/// once for all queries.
fn attend<T>(
    kernels: Kernels,
    data: &[T],
    width: usize,
    queries: &Queries<'_>,
    scores: &mut Vec<f32>,
    out: &mut [f32],
    dot: impl Fn(&[f32], &[T]) -> f32,
    add: impl Fn(f32, &[T], &mut [f32]),
) {
    let n = queries.seen.len();
    let most = queries.seen.iter().copied().max().unwrap_or(0);
    let out_width = out.len() / n.max(1);
    scores.clear();
    scores.resize(n * most, 0.0);
    let blocks = || data[..most * width].chunks(BLOCK_ROWS * width).enumerate().map(|(i, rows)| (i * BLOCK_ROWS, rows));
    for (first, rows) in blocks() {
        for (i, query) in queries.rows.chunks_exact(width).enumerate() {
            let scores = &mut scores[i * most + first.min(queries.seen[i])..i * most + queries.seen[i]];
            for (score, row) in scores.iter_mut().zip(rows.chunks_exact(width)) {
                *score = queries.scales[i] * dot(query, row);
            }
        }
    }
    for (scores, seen) in scores.chunks_exact_mut(most.max(1)).zip(queries.seen) {
        kernels.softmax(&mut scores[..*seen]);
    }
    out.fill(0.0);
    for (first, rows) in blocks() {
        for (i, out) in out.chunks_exact_mut(out_width).enumerate() {
            let weights = &scores[i * most + first.min(queries.seen[i])..i * most + queries.seen[i]];
            for (weight, row) in weights.iter().zip(rows.chunks_exact(width)) {
                add(*weight, row, out);
            }
        }
    }
}
