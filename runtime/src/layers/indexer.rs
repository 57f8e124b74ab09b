//! Lightning indexer (DeepSeek-V3.2, arXiv 2512.02556): rates all positions up to a token's own, and
//! chooses those that the token attends to.
//!
//! ```text
//! k_m = rope(layer_norm(K x_m))        stored in the cache, one row per position
//! q_i = rope(Q_i c)                    per head i, from the compressed queries c
//! w   = scale · W x
//! rating(t, m) = sum over i of w_i(t) · max(0, q_i(t) · k_m)
//! ```
//!
//! The best ratings are chosen, as many as the selection says; of equal ones, the earlier position. A
//! rating is one sum in the order of the heads, so neither threads nor the rest of a batch change a
//! choice. Indexers that rate blocks are in [`pooled_index`](super::pooled_index).

use super::block_index::by_page;
use super::choice::best_of;
use super::chosen::Chosen;
use super::cpu_context::{CpuContext, add_bias};
use super::kv_rows::RowStore;
use super::mixer::{MixerInput, Segment};
use super::rope::RopeTable;
use super::weights::DenseWeights;
use std::cell::RefCell;
use std::ops::Range;
use tier_plan_formats::model::spec::{IndexerSpec, Selection};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{ActView, RowBlock, StoredRows};

/// Ratings that are held at once: 16 MiB. Few in tests, so that there are several parts.
const MAX_RATINGS: usize = if cfg!(test) { 64 } else { 4 << 20 };

/// Bytes of the ratings that are held at once.
pub(crate) const RATING_BYTES: u64 = (MAX_RATINGS * size_of::<f32>()) as u64;

/// Positions that a thread rates for a token at a time.
const CHUNK: usize = if cfg!(test) { 16 } else { 512 };

/// Heads up to which keys are multiplied as they are stored; for more it pays to widen them first.
const MAX_HEADS_AS_STORED: usize = 8;

thread_local! {
    static LOCAL: RefCell<Local> = RefCell::default();
}

/// Buffers of one thread.
#[derive(Default)]
struct Local {
    /// Keys widened to floats, `[positions, key_dim]`.
    keys: Vec<f32>,
    /// `[n_head, positions]`.
    dots: Vec<f32>,
    /// Positions in the order of their ratings.
    order: Vec<u64>,
}

/// Buffers of the indexers.
#[derive(Default)]
pub(super) struct IndexerScratch {
    /// `[tokens, n_head, key_dim]`.
    q: Vec<f32>,
    /// `[tokens, key_dim]`.
    k: Vec<f32>,
    /// `[tokens, n_head]`.
    head_weights: Vec<f32>,
    /// `[tokens of a part, positions]`.
    ratings: Vec<f32>,
}

impl IndexerScratch {
    /// Grows to batches of `rows` tokens.
    pub(super) fn reserve(&mut self, rows: usize, spec: &IndexerSpec) {
        let grow = |buffer: &mut Vec<f32>, len: usize| {
            if buffer.len() < len {
                buffer.resize(len, 0.0);
            }
        };
        grow(&mut self.q, rows * spec.q.n_out);
        grow(&mut self.k, rows * spec.k.n_out);
        grow(&mut self.head_weights, rows * spec.n_head);
    }
}

/// Returns the tokens of a segment, counted from its first, that don't attend to all positions.
pub(super) fn choosing(segment: &Segment<'_>, selection: Selection) -> Range<usize> {
    let n = segment.rows.len();
    selection.n_dense().saturating_sub(segment.past).min(n)..n
}

/// Stores the keys of a batch's tokens in `cache`, and chooses the positions that each attends to.
/// `q_low` are the tokens' compressed queries.
pub(super) fn choose(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &IndexerSpec,
    (input, q_low): (&MixerInput<'_>, ActView<'_>),
    cache: &mut RowStore,
    s: &mut IndexerScratch,
    chosen: &mut Chosen,
) {
    let n = input.x.rows();
    let top_k = spec.selection.most();
    let rates = |segment: &Segment<'_>| !choosing(segment, spec.selection).is_empty();
    let rates = input.segments.iter().any(rates);
    project(c, weights, spec, (input.x, q_low), rates, s);
    store_keys(c, weights, spec, input, cache, s);
    if input.first_row == 0 {
        chosen.clear();
    }
    if !rates {
        return;
    }
    if let Some(rope) = input.indexer_rope {
        let q = &mut s.q[..n * spec.q.n_out];
        c.pool.for_each_slice(q, spec.q.n_out, |token, row| {
            row.chunks_exact_mut(spec.key_dim)
                .for_each(|head| rotate(rope, spec, head, token));
        });
    }
    for segment in input.segments {
        let tokens = choosing(segment, spec.selection);
        let most = segment.past + segment.rows.len();
        let step = (MAX_RATINGS / most.next_multiple_of(CHUNK)).max(1);
        for first in tokens.clone().step_by(step) {
            let part = first..(first + step).min(tokens.end);
            rate(c, spec, segment, part.clone(), cache, s);
            let first_row = input.first_row + segment.rows.start;
            let rows = first_row + part.start..first_row + part.end;
            let chosen = chosen.add(rows, top_k);
            pick(c, segment, part, &s.ratings, top_k, chosen);
        }
    }
}

/// Projects to keys and, where `rates`, to queries and weights of the heads.
fn project(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &IndexerSpec,
    (x, q_low): (ActView<'_>, ActView<'_>),
    rates: bool,
    s: &mut IndexerScratch,
) {
    let n = x.rows();
    let k = &mut s.k[..n * spec.k.n_out];
    let mut jobs = vec![MatJob::new(weights.linear(&spec.k), x, k)];
    let (q, w) = (
        &mut s.q[..n * spec.q.n_out],
        &mut s.head_weights[..n * spec.n_head],
    );
    if rates {
        jobs.push(MatJob::new(weights.linear(&spec.q), q_low, q));
        jobs.push(MatJob::new(weights.linear(&spec.head_weights), x, w));
    }
    matmul_all(c.pool, c.kernels, &jobs);
    drop(jobs);
    add_bias(&mut s.k[..n * spec.k.n_out], weights.bias(&spec.k));
    if rates {
        add_bias(&mut s.q[..n * spec.q.n_out], weights.bias(&spec.q));
        let w = &mut s.head_weights[..n * spec.n_head];
        add_bias(w, weights.bias(&spec.head_weights));
        w.iter_mut().for_each(|w| *w *= spec.scale);
    }
}

/// Rotates a query or a key.
fn rotate(rope: &RopeTable, spec: &IndexerSpec, row: &mut [f32], token: usize) {
    let rotating = &mut row[spec.rope_first..];
    let width = rotating.len();
    rope.apply(rotating, width, token);
}

/// Normalizes and rotates keys, and stores them.
fn store_keys(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &IndexerSpec,
    input: &MixerInput<'_>,
    cache: &mut RowStore,
    s: &mut IndexerScratch,
) {
    let (norm, bias) = (
        weights.vector(spec.k_norm),
        weights.vector(spec.k_norm_bias),
    );
    for segment in input.segments {
        for (token, position) in segment.positions() {
            let key = &mut s.k[token * spec.key_dim..][..spec.key_dim];
            layer_norm(key, norm, bias, spec.norm_eps);
            if let Some(rope) = input.indexer_rope {
                rotate(rope, spec, key, token);
            }
            cache.store(c.kernels, segment.pages, position, key);
        }
    }
}

/// Computes the layer norm `(x - mean) / sqrt(variance + eps) · weight + bias` (arXiv 1607.06450),
/// in place.
pub(super) fn layer_norm(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let n = x.len() as f32;
    let mean = x.iter().sum::<f32>() / n;
    x.iter_mut().for_each(|x| *x -= mean);
    let variance = x.iter().map(|x| x * x).sum::<f32>() / n;
    let factor = 1.0 / (variance + eps).sqrt();
    for ((x, w), b) in x.iter_mut().zip(weight).zip(bias) {
        *x = *x * factor * w + b;
    }
}

/// Rates the positions up to each of some tokens of a segment, `[tokens, positions]`.
fn rate(
    c: CpuContext<'_>,
    spec: &IndexerSpec,
    segment: &Segment<'_>,
    tokens: Range<usize>,
    cache: &RowStore,
    s: &mut IndexerScratch,
) {
    let chunks = (segment.past + tokens.end).div_ceil(CHUNK);
    let len = tokens.len() * chunks * CHUNK;
    if s.ratings.len() < len {
        s.ratings.resize(len, 0.0);
    }
    let (q, head_weights) = (&s.q, &s.head_weights);
    c.pool
        .for_each_slice(&mut s.ratings[..len], CHUNK, |item, ratings| {
            let (token, chunk) = (tokens.start + item / chunks, item % chunks);
            let seen = segment.past + token + 1;
            let positions = chunk * CHUNK..((chunk + 1) * CHUNK).min(seen);
            let row = segment.rows.start + token;
            let query = Query {
                heads: &q[row * spec.q.n_out..][..spec.q.n_out],
                weights: &head_weights[row * spec.n_head..][..spec.n_head],
                key_dim: spec.key_dim,
            };
            ratings.fill(0.0);
            LOCAL.with_borrow_mut(|local| {
                for run in by_page(positions) {
                    let rows = cache.rows(segment.pages, 0, run.clone());
                    let ratings = &mut ratings[run.start - chunk * CHUNK..][..run.len()];
                    query.rate(c, rows, local, ratings);
                }
            });
        });
}

/// What a token asks keys for.
struct Query<'a> {
    /// `[n_head, key_dim]`.
    heads: &'a [f32],
    /// `[n_head]`, with the factor on ratings.
    weights: &'a [f32],
    key_dim: usize,
}

impl Query<'_> {
    /// Adds the ratings of some keys to `ratings`.
    fn rate<'r>(
        &self,
        c: CpuContext<'_>,
        mut rows: StoredRows<'r>,
        local: &'r mut Local,
        ratings: &mut [f32],
    ) {
        let (n, dim) = (ratings.len(), self.key_dim);
        let Local { keys, dots, .. } = local;
        if self.weights.len() > MAX_HEADS_AS_STORED && !matches!(rows, StoredRows::F32(_)) {
            keys.resize(n * dim, 0.0);
            c.kernels.widen_rows(rows, dim, keys);
            rows = StoredRows::F32(keys);
        }
        dots.resize(self.weights.len() * n, 0.0);
        c.kernels
            .row_dots(self.heads, RowBlock::new(rows, dim), dots, n);
        for (dots, weight) in dots.chunks_exact(n).zip(self.weights) {
            for (rating, dot) in ratings.iter_mut().zip(dots) {
                *rating += weight * dot.max(0.0);
            }
        }
    }
}

/// Writes the positions with the best ratings of some tokens of a segment, `[tokens, top_k]`, in
/// ascending order.
fn pick(
    c: CpuContext<'_>,
    segment: &Segment<'_>,
    tokens: Range<usize>,
    ratings: &[f32],
    top_k: usize,
    chosen: &mut [u32],
) {
    let width = (segment.past + tokens.end).div_ceil(CHUNK) * CHUNK;
    c.pool.for_each_slice(chosen, top_k, |item, chosen| {
        let seen = segment.past + tokens.start + item + 1;
        LOCAL.with_borrow_mut(|local| {
            let ratings = ratings[item * width..][..seen].iter().copied();
            best_of(ratings, &mut local.order, chosen);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_norm_is_the_formula() {
        let mut x = [1.0, 2.0, 3.0, 6.0];
        layer_norm(&mut x, &[1.0, 2.0, 1.0, 0.5], &[0.0, 0.0, 1.0, 0.0], 0.5);
        // Mean 3, variance 3.5.
        let expected = [-1.0, -1.0, 1.0, 0.75];
        assert!(
            x.iter().zip(expected).all(|(x, e)| (x - e).abs() < 1e-6),
            "{x:?}"
        );
    }
}
