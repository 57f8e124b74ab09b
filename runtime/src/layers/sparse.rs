//! Softmax attention of tokens to chosen rows of a KV cache, which all heads share.
//!
//! Each token has a list of its own. Lists are cut into chunks of fixed length, and a query's result
//! is merged from its parts by chunk, in their order (online softmax, arXiv 2205.14135). So a result
//! has the same bits whatever tokens are beside it and however many threads there are.

use super::attention::{Part, PartialSoftmax, PartialSoftmaxRef};
use super::chosen::Lists;
use super::cpu_context::CpuContext;
use super::kv_rows::RowStore;
use super::pages::PageIdx;
use std::cell::RefCell;
use std::ops::Range;
use tier_plan_kernels::{Kernels, RowBlock, StoredRows};

/// Positions per chunk. Few in tests, so that there are several chunks.
const CHUNK: usize = if cfg!(test) { 4 } else { 256 };

/// Heads that pass over gathered rows together.
const MAX_HEADS: usize = if cfg!(test) { 3 } else { 32 };

/// Values that are gathered at a time, about: 16 KiB of floats.
const TILE_VALUES: usize = 4096;

thread_local! {
    static LOCAL: RefCell<Local> = RefCell::default();
}

/// Buffers of one thread.
#[derive(Default)]
struct Local {
    /// `[heads, row width]`.
    queries: Vec<f32>,
    /// `[heads, CHUNK]`.
    scores: Vec<f32>,
    /// Gathered rows, `[rows, row width]`.
    tile: Vec<f32>,
    /// The part of a job for one chunk.
    part: Vec<f32>,
}

/// The rows that some tokens of one text attend to.
#[derive(Clone, Copy)]
pub(super) struct SparseAttention<'a> {
    /// One row per position: key, and value at its beginning.
    pub rows: &'a RowStore,
    /// The pages of the text.
    pub pages: &'a [PageIdx],
    /// Values at the beginning of a row that are mixed.
    pub value_width: usize,
    pub n_head: usize,
    /// Positions of each token.
    pub chosen: Lists<'a>,
}

/// How the work is split into jobs: of a token, some heads, and one chunk or all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Jobs {
    tokens: usize,
    n_head: usize,
    /// Chunks of a list that are jobs of their own; with 1, a job has all chunks.
    chunks: usize,
    value_width: usize,
}

impl Jobs {
    fn head_blocks(&self) -> usize {
        self.n_head.div_ceil(MAX_HEADS)
    }

    fn len(&self) -> usize {
        self.tokens * self.head_blocks() * self.chunks
    }

    /// Returns the heads of a block.
    fn heads(&self, block: usize) -> Range<usize> {
        block * MAX_HEADS..((block + 1) * MAX_HEADS).min(self.n_head)
    }

    /// Returns the floats per part.
    fn part_len(&self) -> usize {
        MAX_HEADS.min(self.n_head) * (self.value_width + 2)
    }
}

/// Results of [`attend_chosen`] by job, and the memory for them.
#[derive(Default)]
pub(super) struct SparseParts {
    jobs: Jobs,
    /// `[jobs, part_len]`.
    data: Vec<f32>,
}

impl SparseParts {
    /// Writes the result of one query, `[value_width]`. `sink` is a score without a value.
    pub(super) fn result(
        &self,
        kernels: Kernels,
        (head, token): (usize, usize),
        sink: Option<f32>,
        out: &mut [f32],
    ) {
        let (jobs, width) = (&self.jobs, self.jobs.value_width);
        let block = head / MAX_HEADS;
        let heads = jobs.heads(block);
        let (query, queries) = (head - heads.start, heads.len());
        let first = (token * jobs.head_blocks() + block) * jobs.chunks;
        let (mut largest, mut sum) = (f32::NEG_INFINITY, 0.0);
        let mut merged = PartialSoftmax {
            largest: &mut largest,
            sum: &mut sum,
            mixed: &mut *out,
        };
        let parts = self.data[first * jobs.part_len()..].chunks_exact(jobs.part_len());
        for part in parts.take(jobs.chunks) {
            let (mixed, rest) = part.split_at(queries * width);
            merged.merge(
                kernels,
                PartialSoftmaxRef {
                    largest: rest[query],
                    sum: rest[queries + query],
                    mixed: &mixed[query * width..][..width],
                },
            );
        }
        if *merged.sum == 0.0 {
            // A token that attends to nothing gathers nothing.
            out.fill(0.0);
            return;
        }
        let factor = merged.factor(sink);
        out.iter_mut().for_each(|v| *v *= factor);
    }
}

/// Computes the attention of all heads of some tokens into `parts`. `query` writes a query, `[row
/// width]`, given its head and its token; the factor on scores is in it.
pub(super) fn attend_chosen(
    c: CpuContext<'_>,
    a: &SparseAttention<'_>,
    query: impl Fn(usize, usize, &mut [f32]) + Sync,
    parts: &mut SparseParts,
) {
    let mut jobs = Jobs {
        tokens: a.chosen.len(),
        n_head: a.n_head,
        chunks: 1,
        value_width: a.value_width,
    };
    if jobs.len() < 4 * c.pool.n_threads() {
        jobs.chunks = a.chosen.longest().div_ceil(CHUNK).max(1);
    }
    let (len, part_len) = (jobs.len() * jobs.part_len(), jobs.part_len());
    if parts.data.len() < len {
        parts.data.resize(len, 0.0);
    }
    parts.jobs = jobs;
    c.pool
        .for_each_slice(&mut parts.data[..len], part_len, |job, part| {
            let (rest, chunk) = (job / jobs.chunks, job % jobs.chunks);
            let (token, block) = (rest / jobs.head_blocks(), rest % jobs.head_blocks());
            let heads = jobs.heads(block);
            LOCAL.with_borrow_mut(|local| {
                let width = a.rows.width();
                let mut queries = std::mem::take(&mut local.queries);
                queries.resize(heads.len() * width, 0.0);
                for (head, to) in heads.clone().zip(queries.chunks_exact_mut(width)) {
                    query(head, token, to);
                }
                let positions = a.chosen.list(token);
                let mut part = Part::new(part, heads.len(), a.value_width);
                if jobs.chunks > 1 {
                    // Lists may be shorter than the longest.
                    let positions = positions.chunks(CHUNK).nth(chunk).unwrap_or_default();
                    attend_chunk(c.kernels, a, &queries, positions, local, &mut part);
                } else {
                    all_chunks(c.kernels, a, &queries, positions, local, &mut part);
                }
                local.queries = queries;
            });
        });
}

/// Computes all chunks of a token's list, one after the other.
fn all_chunks(
    kernels: Kernels,
    a: &SparseAttention<'_>,
    queries: &[f32],
    positions: &[u32],
    local: &mut Local,
    part: &mut Part<'_>,
) {
    let n = queries.len() / a.rows.width();
    let mut chunks = positions.chunks(CHUNK);
    let first = chunks.next().unwrap_or_default();
    attend_chunk(kernels, a, queries, first, local, part);
    let mut buffer = std::mem::take(&mut local.part);
    buffer.resize(n * (a.value_width + 2), 0.0);
    for chunk in chunks {
        let mut next = Part::new(&mut buffer, n, a.value_width);
        attend_chunk(kernels, a, queries, chunk, local, &mut next);
        for query in 0..n {
            part.query_mut(query).merge(kernels, next.query(query));
        }
    }
    local.part = buffer;
}

/// Computes what queries find at some positions.
fn attend_chunk(
    kernels: Kernels,
    a: &SparseAttention<'_>,
    queries: &[f32],
    positions: &[u32],
    local: &mut Local,
    part: &mut Part<'_>,
) {
    let Local { scores, tile, .. } = local;
    let (width, n) = (a.rows.width(), queries.len() / a.rows.width());
    scores.resize(n * CHUNK, 0.0);
    part.clear();
    if positions.is_empty() {
        return;
    }
    let step = (TILE_VALUES / width / 4 * 4).clamp(4, CHUNK);
    for (i, positions) in positions.chunks(step).enumerate() {
        gather(kernels, a, positions, tile);
        let rows = StoredRows::F32(tile);
        kernels.row_dots(
            queries,
            RowBlock::new(rows, width),
            &mut scores[i * step..],
            CHUNK,
        );
    }
    for query in 0..n {
        let scores = &mut scores[query * CHUNK..][..positions.len()];
        (part.largest[query], part.sums[query]) = kernels.exp_minus_max(scores);
    }
    for (i, positions) in positions.chunks(step).enumerate() {
        gather(kernels, a, positions, tile);
        let (weights, rows) = (&scores[i * step..], StoredRows::F32(tile));
        kernels.add_weighted_rows(
            weights,
            CHUNK,
            RowBlock::new(rows, width),
            part.mixed,
            a.value_width,
        );
    }
}

/// Widens the rows at some positions into `tile`.
fn gather(kernels: Kernels, a: &SparseAttention<'_>, positions: &[u32], tile: &mut Vec<f32>) {
    let width = a.rows.width();
    tile.resize(positions.len() * width, 0.0);
    for (position, to) in positions.iter().zip(tile.chunks_exact_mut(width)) {
        let at = *position as usize;
        kernels.widen_rows(a.rows.rows(a.pages, 0, at..at + 1), width, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::chosen::Chosen;
    use crate::layers::pages::mixed_pages;
    use tier_plan_formats::model::kv::KvType;
    use tier_plan_kernels::threads::ThreadPool;
    use tier_plan_testing::Random;

    const WIDTH: usize = 10;
    const VALUE: usize = 7;
    const HEADS: usize = 7;

    /// Attention by the formula, in 64 bits.
    fn expected(query: &[f32], rows: &[&[f32]], sink: Option<f32>) -> Vec<f64> {
        let dot = |row: &&[f32]| -> f64 {
            let products = row.iter().zip(query).map(|(a, b)| f64::from(a * b));
            products.sum()
        };
        let weights: Vec<f64> = rows.iter().map(|row| dot(row).exp()).collect();
        let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |s| f64::from(s).exp());
        let column = |i: usize| {
            let terms = rows.iter().zip(&weights).map(|(r, w)| w * f64::from(r[i]));
            terms.sum::<f64>() / sum
        };
        (0..VALUE).map(column).collect()
    }

    #[test]
    fn tokens_attend_to_what_was_chosen_for_them() {
        let (mut random, positions) = (Random(4), 30);
        let rows = random.noise(positions * WIDTH);
        let queries = random.noise(4 * HEADS * WIDTH);
        let pages = mixed_pages(positions);
        // Lists of several chunks, of one, and of no position.
        let chosen: [Vec<u32>; 4] = [(9, 0), (7, 1), (0, 2), (2, 2)]
            .map(|(n, first)| (0..n).map(|i| i * 3 + first).collect());
        let mut lists = Chosen::default();
        for (row, list) in chosen.iter().enumerate() {
            lists.add_one(row, list.iter().copied());
        }
        for kernels in Kernels::available() {
            let mut store = RowStore::new(KvType::F32, 1, positions, WIDTH);
            for (position, row) in rows.chunks_exact(WIDTH).enumerate() {
                store.store(kernels, &pages, position, row);
            }
            let attention = SparseAttention {
                rows: &store,
                pages: &pages,
                value_width: VALUE,
                n_head: HEADS,
                chosen: lists.of(0..4),
            };
            let query = |head: usize, token: usize, to: &mut [f32]| {
                to.copy_from_slice(&queries[(token * HEADS + head) * WIDTH..][..WIDTH]);
            };
            let run = |threads: usize, sink: Option<f32>| -> Vec<f32> {
                let pool = ThreadPool::new(threads);
                let c = CpuContext {
                    pool: &pool,
                    kernels,
                };
                let mut parts = SparseParts::default();
                attend_chosen(c, &attention, query, &mut parts);
                let mut out = vec![f32::NAN; 4 * HEADS * VALUE];
                for (i, out) in out.chunks_exact_mut(VALUE).enumerate() {
                    parts.result(kernels, (i % HEADS, i / HEADS), sink, out);
                }
                out
            };
            for sink in [None, Some(0.7)] {
                // One thread takes a list as a whole, several take its chunks apart.
                let found = run(1, sink);
                assert_eq!(found, run(4, sink), "{kernels:?}: bits of threads");
                for (i, found) in found.chunks_exact(VALUE).enumerate() {
                    let list = &chosen[i / HEADS];
                    if list.is_empty() {
                        assert!(found.iter().all(|v| *v == 0.0), "{kernels:?}");
                        continue;
                    }
                    let row = |at: &u32| &rows[*at as usize * WIDTH..][..WIDTH];
                    let rows: Vec<&[f32]> = list.iter().map(row).collect();
                    let query = &queries[i * WIDTH..][..WIDTH];
                    for (found, expected) in found.iter().zip(expected(query, &rows, sink)) {
                        assert!((f64::from(*found) - expected).abs() < 1e-5, "{kernels:?}");
                    }
                }
            }
        }
    }
}
