//! Softmax attention of many queries to the rows of a KV cache, split among threads (as in
//! FlashAttention).
//!
//! Queries that read the same rows pass over them together, in blocks. A few rows at a time are
//! widened to 32-bit floats and stay in the first-level cache meanwhile. The context is cut at
//! fixed positions into chunks, and a query's result is merged from its parts by chunk, in their
//! order. So a result has the same bits whatever queries are beside it, and whether one thread did
//! all chunks or several did some each.

use super::kv_rows::RowStore;
use super::pages::{PAGE, PageIdx};
use crate::layers::cpu_context::CpuContext;
use std::cell::RefCell;
use std::ops::Range;
use tier_plan_formats::model::spec::WindowKind;
use tier_plan_kernels::{Kernels, StoredRows};

/// Positions per chunk: their scores stay in the second-level cache. Few in tests, so that there
/// are several chunks.
const CHUNK: usize = if cfg!(test) { 4 } else { 256 };

/// Queries per block at most.
const MAX_QUERIES: usize = if cfg!(test) { 6 } else { 32 };

/// Queries per block up to which rows are multiplied as they are stored; for more it pays to widen
/// the rows first.
const MAX_QUERIES_AS_STORED: usize = if cfg!(test) { 4 } else { 8 };

/// Values that are widened at a time, about: 16 KiB of floats.
const TILE_VALUES: usize = 4096;

thread_local! {
    static LOCAL: RefCell<Local> = RefCell::default();
}

/// Buffers of one thread.
#[derive(Default)]
struct Local {
    /// `[queries, key width]`.
    queries: Vec<f32>,
    /// `[queries, CHUNK]`.
    scores: Vec<f32>,
    /// Rows widened to floats, `[positions, width]`.
    tile: Vec<f32>,
    /// The part of a block for one chunk.
    part: Vec<f32>,
}

/// The rows of one layer that a batch attends to, and the shape of its queries.
#[derive(Clone, Copy)]
pub(super) struct Attention<'a> {
    /// Rows of `[n_head_kv, key width]` by position.
    pub keys: &'a RowStore,
    /// Rows of `[n_head_kv, _]` by position; may be the keys.
    pub values: &'a RowStore,
    /// The pages of the text.
    pub pages: &'a [PageIdx],
    /// Values at the beginning of a row of `values` that are mixed.
    pub value_width: usize,
    /// KV heads.
    pub n_head_kv: usize,
    /// Query heads per KV head.
    pub group: usize,
    /// Tokens of the batch, whose rows are stored already.
    pub tokens: usize,
    /// Tokens of the text before the batch.
    pub past: usize,
    /// Sliding window: positions that a token sees at most, its own and those just before it.
    pub window: Option<usize>,
    /// Where a window begins.
    pub window_kind: WindowKind,
    /// Scores `s` become `cap · tanh(s / cap)`.
    pub softcap: Option<f32>,
}

impl Attention<'_> {
    /// Returns the positions that a token of the batch sees.
    fn seen(&self, token: usize) -> Range<usize> {
        let end = self.past + token + 1;
        let start = self.window.map_or(0, |window| match self.window_kind {
            WindowKind::Sliding => end.saturating_sub(window),
            WindowKind::Chunked => (end - 1) / window * window,
        });
        start..end
    }
}

/// How queries are split into jobs: blocks of some heads of a group and some tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Blocks {
    /// Query heads per KV head.
    group: usize,
    tokens: usize,
    block_heads: usize,
    block_tokens: usize,
    /// Index of the first chunk that any token sees.
    first: usize,
    /// Jobs per block, one per chunk; with 1, a job is a block with all its chunks.
    chunks: usize,
    value_width: usize,
}

impl Blocks {
    /// Returns a split that keeps `threads` busy. No split changes a result.
    fn new(a: &Attention<'_>, threads: usize) -> Self {
        let seen = a.seen(0).start..a.past + a.tokens;
        let (first, end) = (seen.start / CHUNK, seen.end.div_ceil(CHUNK));
        // Heads in even shares, then as many tokens as there is room for.
        let block_heads = a.group.div_ceil(a.group.div_ceil(MAX_QUERIES));
        let block_tokens = (MAX_QUERIES / block_heads).clamp(1, a.tokens);
        let (group, tokens, value_width) = (a.group, a.tokens, a.value_width);
        let mut blocks = Self {
            group,
            tokens,
            block_heads,
            block_tokens,
            first,
            chunks: 1,
            value_width,
        };
        if blocks.jobs(a.n_head_kv) < 4 * threads {
            blocks.chunks = (end - first).max(1);
        }
        // Smaller blocks read the same rows more often, so this comes last.
        while threads > 1
            && blocks.jobs(a.n_head_kv) < 2 * threads
            && blocks.block_heads * blocks.block_tokens > 4
        {
            let larger = if blocks.block_tokens > 1 {
                &mut blocks.block_tokens
            } else {
                &mut blocks.block_heads
            };
            *larger = larger.div_ceil(2);
        }
        blocks
    }

    fn head_blocks(&self) -> usize {
        self.group.div_ceil(self.block_heads)
    }

    fn token_blocks(&self) -> usize {
        self.tokens.div_ceil(self.block_tokens)
    }

    fn jobs(&self, n_head_kv: usize) -> usize {
        n_head_kv * self.head_blocks() * self.token_blocks() * self.chunks
    }

    /// Returns the queries per block at most.
    fn queries(&self) -> usize {
        self.block_heads * self.block_tokens
    }

    /// Returns the floats per part.
    fn part_len(&self) -> usize {
        self.queries() * (self.value_width + 2)
    }

    /// Returns what a job computes.
    fn job(&self, job: usize) -> Job {
        let (rest, chunk) = (job / self.chunks, job % self.chunks);
        let (rest, token_block) = (rest / self.token_blocks(), rest % self.token_blocks());
        let (kv_head, head_block) = (rest / self.head_blocks(), rest % self.head_blocks());
        let heads =
            head_block * self.block_heads..((head_block + 1) * self.block_heads).min(self.group);
        let tokens = token_block * self.block_tokens
            ..((token_block + 1) * self.block_tokens).min(self.tokens);
        Job {
            kv_head,
            heads,
            tokens,
            chunk: (self.chunks > 1).then_some(self.first + chunk),
        }
    }

    /// Returns the first job of a query's block, and the query's index in the block.
    fn place(&self, head: usize, token: usize) -> (usize, usize) {
        let (kv_head, head) = (head / self.group, head % self.group);
        let (head_block, head) = (head / self.block_heads, head % self.block_heads);
        let (token_block, token) = (token / self.block_tokens, token % self.block_tokens);
        let heads = self
            .block_heads
            .min(self.group - head_block * self.block_heads);
        let block = (kv_head * self.head_blocks() + head_block) * self.token_blocks() + token_block;
        (block * self.chunks, token * heads + head)
    }
}

/// A job of [`attend`].
struct Job {
    kv_head: usize,
    /// Query heads, counted within the KV head's group.
    heads: Range<usize>,
    tokens: Range<usize>,
    /// One chunk, or all of them where `None`.
    chunk: Option<usize>,
}

impl Job {
    fn n_queries(&self) -> usize {
        self.heads.len() * self.tokens.len()
    }
}

/// The softmax of one query over some positions (online softmax): the largest score, the sum of the
/// exponentials below it, and the rows mixed by them, not yet divided by the sum. Over no position:
/// minus infinity, 0 and zeros.
pub(super) struct PartialSoftmax<'a> {
    pub largest: &'a mut f32,
    pub sum: &'a mut f32,
    pub mixed: &'a mut [f32],
}

/// A [`PartialSoftmax`] to read.
#[derive(Clone, Copy)]
pub(super) struct PartialSoftmaxRef<'a> {
    pub largest: f32,
    pub sum: f32,
    pub mixed: &'a [f32],
}

impl PartialSoftmax<'_> {
    /// Merges the softmax over later positions.
    pub(super) fn merge(&mut self, kernels: Kernels, later: PartialSoftmaxRef<'_>) {
        if later.sum == 0.0 {
            return;
        }
        if *self.sum == 0.0 {
            (*self.largest, *self.sum) = (later.largest, later.sum);
            self.mixed.copy_from_slice(later.mixed);
            return;
        }
        let largest = self.largest.max(later.largest);
        let (a, b) = (
            (*self.largest - largest).exp(),
            (later.largest - largest).exp(),
        );
        kernels.axpby(a, self.mixed, b, later.mixed);
        *self.sum = a * *self.sum + b * later.sum;
        *self.largest = largest;
    }

    /// Returns the factor on what is mixed, with an attention sink where there is one: a score
    /// beside those of the positions, which takes its share of the weights and has no value.
    pub(super) fn factor(&self, sink: Option<f32>) -> f32 {
        let (largest, sum) = (*self.largest, *self.sum);
        match sink {
            Some(sink) => {
                let most = largest.max(sink);
                let a = (largest - most).exp();
                a / (a * sum + (sink - most).exp())
            }
            None => 1.0 / sum,
        }
    }
}

/// What a block finds in one chunk or in several: `[queries, value_width]`, then `[queries]`
/// largest scores, then `[queries]` sums.
pub(super) struct Part<'a> {
    pub mixed: &'a mut [f32],
    pub largest: &'a mut [f32],
    pub sums: &'a mut [f32],
    width: usize,
}

impl<'a> Part<'a> {
    pub(super) fn new(part: &'a mut [f32], queries: usize, width: usize) -> Self {
        let (mixed, rest) = part.split_at_mut(queries * width);
        let (largest, rest) = rest.split_at_mut(queries);
        Self {
            mixed,
            largest,
            sums: &mut rest[..queries],
            width,
        }
    }

    /// Sets the part to that of no position.
    pub(super) fn clear(&mut self) {
        self.mixed.fill(0.0);
        self.largest.fill(f32::NEG_INFINITY);
        self.sums.fill(0.0);
    }

    pub(super) fn query_mut(&mut self, query: usize) -> PartialSoftmax<'_> {
        let mixed = &mut self.mixed[query * self.width..][..self.width];
        PartialSoftmax {
            largest: &mut self.largest[query],
            sum: &mut self.sums[query],
            mixed,
        }
    }

    pub(super) fn query(&self, query: usize) -> PartialSoftmaxRef<'_> {
        let mixed = &self.mixed[query * self.width..][..self.width];
        PartialSoftmaxRef {
            largest: self.largest[query],
            sum: self.sums[query],
            mixed,
        }
    }
}

/// Results of [`attend`] by job, and the memory for them.
#[derive(Default)]
pub(super) struct AttentionParts {
    blocks: Blocks,
    /// `[jobs, part_len]`.
    data: Vec<f32>,
}

impl AttentionParts {
    /// Writes the result of one query, `[value_width]`, with its head's attention sink, if any.
    pub(super) fn result(
        &self,
        kernels: Kernels,
        head: usize,
        token: usize,
        sink: Option<f32>,
        out: &mut [f32],
    ) {
        let (blocks, width) = (&self.blocks, self.blocks.value_width);
        let (first, query) = blocks.place(head, token);
        let queries = blocks.job(first).n_queries();
        let (mut largest, mut sum) = (f32::NEG_INFINITY, 0.0);
        let mut merged = PartialSoftmax {
            largest: &mut largest,
            sum: &mut sum,
            mixed: &mut *out,
        };
        for part in self.data[first * blocks.part_len()..]
            .chunks_exact(blocks.part_len())
            .take(blocks.chunks)
        {
            let (mixed, rest) = part.split_at(queries * width);
            let (largest, sums) = (rest[query], rest[queries + query]);
            let mixed = &mixed[query * width..][..width];
            merged.merge(
                kernels,
                PartialSoftmaxRef {
                    largest,
                    sum: sums,
                    mixed,
                },
            );
        }
        let factor = merged.factor(sink);
        out.iter_mut().for_each(|v| *v *= factor);
    }
}

/// Computes the attention of all heads of all tokens of a batch into `parts`.
///
/// `query` writes a query, `[key width]`, given its head (of all) and its token. The factor on
/// scores is in the query.
pub(super) fn attend(
    c: CpuContext<'_>,
    a: &Attention<'_>,
    query: impl Fn(usize, usize, &mut [f32]) + Sync,
    parts: &mut AttentionParts,
) {
    let blocks = Blocks::new(a, c.pool.n_threads());
    let len = blocks.jobs(a.n_head_kv) * blocks.part_len();
    if parts.data.len() < len {
        parts.data.resize(len, 0.0);
    }
    parts.blocks = blocks;
    c.pool
        .for_each_slice(&mut parts.data[..len], blocks.part_len(), |job, part| {
            let job = blocks.job(job);
            let n = job.n_queries();
            let Job {
                kv_head,
                heads,
                tokens,
                chunk,
            } = job;
            LOCAL.with_borrow_mut(|local| {
                let width = a.keys.width();
                // Taken out for now, as the other buffers are passed on.
                let mut queries = std::mem::take(&mut local.queries);
                queries.resize(n * width, 0.0);
                let places = tokens
                    .clone()
                    .flat_map(|t| heads.clone().map(move |h| (kv_head * a.group + h, t)));
                for ((head, token), to) in places.zip(queries.chunks_exact_mut(width)) {
                    query(head, token, to);
                }
                let block = Block {
                    a,
                    kv_head,
                    heads: heads.len(),
                    tokens: tokens.clone(),
                    queries: &queries,
                };
                let mut part = Part::new(part, n, a.value_width);
                match chunk {
                    Some(chunk) => block.chunk(c.kernels, chunk, local, &mut part),
                    None => block.all_chunks(c.kernels, local, &mut part),
                }
                local.queries = queries;
            });
        });
}

/// Queries that pass over the rows of a KV head together.
struct Block<'a> {
    a: &'a Attention<'a>,
    kv_head: usize,
    /// Number of query heads.
    heads: usize,
    tokens: Range<usize>,
    /// `[tokens, heads, key width]`.
    queries: &'a [f32],
}

impl Block<'_> {
    /// Computes all chunks, one after the other.
    fn all_chunks(&self, kernels: Kernels, local: &mut Local, part: &mut Part<'_>) {
        let seen = self.a.seen(self.tokens.start).start..self.a.seen(self.tokens.end - 1).end;
        let chunks = seen.start / CHUNK..seen.end.div_ceil(CHUNK);
        self.chunk(kernels, chunks.start, local, part);
        let (n, width) = (self.heads * self.tokens.len(), self.a.value_width);
        let mut next = std::mem::take(&mut local.part);
        next.resize(n * (width + 2), 0.0);
        for chunk in chunks.skip(1) {
            let mut next = Part::new(&mut next, n, width);
            self.chunk(kernels, chunk, local, &mut next);
            for query in 0..n {
                part.query_mut(query).merge(kernels, next.query(query));
            }
        }
        local.part = next;
    }

    /// Computes what the queries see of one chunk.
    fn chunk(&self, kernels: Kernels, chunk: usize, local: &mut Local, part: &mut Part<'_>) {
        let (a, heads) = (self.a, self.heads);
        let Local { scores, tile, .. } = local;
        scores.resize(heads * self.tokens.len() * CHUNK, 0.0);
        part.clear();
        let key_width = a.keys.width();
        let positions = self.positions(chunk);
        let then = (a.values, positions.start);
        self.for_each_run(
            kernels,
            (a.keys, chunk),
            then,
            tile,
            |rows, ahead, queries, at| {
                let scores = &mut scores[queries.start * CHUNK + at..];
                let queries = &self.queries[queries.start * key_width..queries.end * key_width];
                kernels.row_dots(queries, rows, ahead, key_width, scores, CHUNK);
            },
        );
        for query in 0..heads * self.tokens.len() {
            let seen = self.seen_of(chunk, self.tokens.start + query / heads);
            let range = query * CHUNK + seen.start - chunk * CHUNK
                ..query * CHUNK + seen.end - chunk * CHUNK;
            if let Some(cap) = a.softcap {
                let capped = |s: &mut f32| *s = cap * (*s / cap).tanh();
                scores[range.clone()].iter_mut().for_each(capped);
            }
            (part.largest[query], part.sums[query]) = kernels.exp_minus_max(&mut scores[range]);
        }
        let width = a.value_width;
        let then = (a.keys, positions.end);
        self.for_each_run(
            kernels,
            (a.values, chunk),
            then,
            tile,
            |rows, ahead, queries, at| {
                let weights = &scores[queries.start * CHUNK + at..];
                let mixed = &mut part.mixed[queries.start * width..queries.end * width];
                kernels.add_weighted_rows(
                    weights,
                    CHUNK,
                    rows,
                    ahead,
                    a.values.width(),
                    mixed,
                    width,
                );
            },
        );
    }

    /// Returns the positions of a chunk that a token sees; an empty range within the chunk if none.
    fn seen_of(&self, chunk: usize, token: usize) -> Range<usize> {
        let (seen, first) = (self.a.seen(token), chunk * CHUNK);
        let start = seen.start.clamp(first, first + CHUNK);
        start..seen.end.clamp(start, first + CHUNK)
    }

    /// Returns the positions of a chunk that any token sees. Later tokens see later positions, so the
    /// first and the last one see all that any does.
    fn positions(&self, chunk: usize) -> Range<usize> {
        self.seen_of(chunk, self.tokens.start).start..self.seen_of(chunk, self.tokens.end - 1).end
    }

    /// Returns the positions from `next` on whose rows are taken at a time: of one page, and before
    /// `end`.
    fn tile(&self, store: &RowStore, next: usize, end: usize) -> Range<usize> {
        let step = (TILE_VALUES / store.width() / 4 * 4).clamp(4, CHUNK);
        let page_end = (next / PAGE + 1) * PAGE;
        next..(next + step).min(end).min(page_end)
    }

    /// Goes through the rows of a chunk in order, a few at a time, and calls `work` once per run of
    /// neighboring tokens that see equal rows: with the rows, the bytes that are read next, the
    /// indices of the tokens' queries, and the first row's position in the chunk. `then` are the
    /// rows that are read after the chunk, by their store and their first position.
    fn for_each_run(
        &self,
        kernels: Kernels,
        (store, chunk): (&RowStore, usize),
        (then, then_first): (&RowStore, usize),
        buffer: &mut Vec<f32>,
        mut work: impl FnMut(StoredRows<'_>, &[u8], Range<usize>, usize),
    ) {
        let (a, width, positions) = (self.a, store.width(), self.positions(chunk));
        let all_end = a.past + a.tokens;
        let mut next = positions.start;
        while next < positions.end {
            let tile = self.tile(store, next, positions.end);
            next = tile.end;
            let mut rows = store.rows(a.pages, self.kv_head, tile.clone());
            let (store_ahead, ahead) = if next < positions.end {
                (store, self.tile(store, next, positions.end))
            } else {
                (then, self.tile(then, then_first.min(all_end), all_end))
            };
            let mut ahead = if ahead.is_empty() {
                &[]
            } else {
                store_ahead.rows(a.pages, self.kv_head, ahead).bytes()
            };
            if self.heads * self.tokens.len() > MAX_QUERIES_AS_STORED
                && !matches!(rows, StoredRows::F32(_))
            {
                let len = tile.len() * width;
                if buffer.len() < len {
                    buffer.resize(len, 0.0);
                }
                kernels.widen_rows(rows, width, &mut buffer[..len]);
                rows = StoredRows::F32(&buffer[..len]);
                ahead = &[];
            }
            let seen = |token: usize| {
                let seen = self.seen_of(chunk, token);
                let start = seen.start.clamp(tile.start, tile.end);
                start..seen.end.clamp(start, tile.end)
            };
            let mut token = self.tokens.start;
            while token < self.tokens.end {
                let (first, alike) = (token, seen(token));
                while token < self.tokens.end && seen(token) == alike {
                    token += 1;
                }
                if !alike.is_empty() {
                    let rows = rows.range(alike.start - tile.start..alike.end - tile.start, width);
                    let number = |token: usize| (token - self.tokens.start) * self.heads;
                    work(
                        rows,
                        ahead,
                        number(first)..number(token),
                        alike.start - chunk * CHUNK,
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
