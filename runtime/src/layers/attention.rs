//! Softmax attention of many queries to the rows of a KV cache, split among threads (as in
//! FlashAttention).
//!
//! Queries that read the same rows pass over them together, in blocks. For many queries, a few rows
//! at a time are widened to 32-bit floats and stay in the first-level cache meanwhile; for few, the
//! rows that come next are prefetched. The context is cut at fixed positions into chunks, and a
//! query's result is merged from its parts by chunk, in their order. So a result has the same bits
//! whatever queries are beside it, and whether one thread did all chunks or several did some each.

mod part;

pub(super) use part::{Part, PartialSoftmax, PartialSoftmaxRef};

use super::kv_rows::RowStore;
use super::pages::{PAGE, PageIdx};
use crate::layers::cpu_context::CpuContext;
use std::cell::RefCell;
use std::ops::Range;
use tier_plan_formats::model::spec::WindowKind;
use tier_plan_kernels::{Kernels, RowBlock, StoredRows};

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

/// A pass over the rows of a chunk.
struct Pass<'a> {
    store: &'a RowStore,
    chunk: usize,
    /// The rows that are read after it: their store, and the first one's position.
    then: (&'a RowStore, usize),
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
        let (key_width, positions) = (a.keys.width(), self.positions(chunk));
        let keys = Pass {
            store: a.keys,
            chunk,
            then: (a.values, positions.start),
        };
        self.for_each_run(kernels, &keys, tile, |rows, queries, at| {
            let scores = &mut scores[queries.start * CHUNK + at..];
            let queries = &self.queries[queries.start * key_width..queries.end * key_width];
            kernels.row_dots(queries, rows, scores, CHUNK);
        });
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
        let values = Pass {
            store: a.values,
            chunk,
            then: (a.keys, positions.end),
        };
        self.for_each_run(kernels, &values, tile, |rows, queries, at| {
            let weights = &scores[queries.start * CHUNK + at..];
            let mixed = &mut part.mixed[queries.start * width..queries.end * width];
            kernels.add_weighted_rows(weights, CHUNK, rows, mixed, width);
        });
    }

    /// Returns the positions of a chunk that a token sees; an empty range within the chunk if none.
    fn seen_of(&self, chunk: usize, token: usize) -> Range<usize> {
        let (seen, first) = (self.a.seen(token), chunk * CHUNK);
        let start = seen.start.clamp(first, first + CHUNK);
        start..seen.end.clamp(start, first + CHUNK)
    }

    /// Returns the positions of a chunk that any token sees. Later tokens see later positions, so
    /// the first and the last one see all that any does.
    fn positions(&self, chunk: usize) -> Range<usize> {
        self.seen_of(chunk, self.tokens.start).start..self.seen_of(chunk, self.tokens.end - 1).end
    }

    /// Returns the positions from `first` on, and before `end`, whose rows are taken at a time: all
    /// of one page.
    fn tile(&self, store: &RowStore, first: usize, end: usize) -> Range<usize> {
        let step = (TILE_VALUES / store.width() / 4 * 4).clamp(4, CHUNK);
        let page_end = (first / PAGE + 1) * PAGE;
        first..(first + step).min(end).min(page_end)
    }

    /// Returns the bytes of the rows that are taken at a time from position `first` on; none where
    /// the batch has no such position.
    fn tile_bytes<'s>(&self, store: &'s RowStore, first: usize) -> &'s [u8] {
        let a = self.a;
        let tile = self.tile(store, first, a.past + a.tokens);
        if tile.is_empty() {
            return &[];
        }
        store.rows(a.pages, self.kv_head, tile).bytes()
    }

    /// Goes through the rows of a chunk in order, a few at a time, and calls `work` once per run of
    /// neighboring tokens that see equal rows: with the rows, the indices of the tokens' queries,
    /// and the first row's position in the chunk. Rows that are multiplied as they are stored come
    /// with the bytes that are read next.
    fn for_each_run(
        &self,
        kernels: Kernels,
        pass: &Pass<'_>,
        buffer: &mut Vec<f32>,
        mut work: impl FnMut(RowBlock<'_>, Range<usize>, usize),
    ) {
        let Pass { store, chunk, then } = *pass;
        let (width, positions) = (store.width(), self.positions(chunk));
        let mut next = positions.start;
        while next < positions.end {
            let tile = self.tile(store, next, positions.end);
            next = tile.end;
            let mut rows = store.rows(self.a.pages, self.kv_head, tile.clone());
            let mut read_next: &[u8] = &[];
            if self.heads * self.tokens.len() <= MAX_QUERIES_AS_STORED
                || matches!(rows, StoredRows::F32(_))
            {
                read_next = if next < positions.end {
                    self.tile_bytes(store, next)
                } else {
                    self.tile_bytes(then.0, then.1)
                };
            } else {
                let len = tile.len() * width;
                if buffer.len() < len {
                    buffer.resize(len, 0.0);
                }
                kernels.widen_rows(rows, width, &mut buffer[..len]);
                rows = StoredRows::F32(&buffer[..len]);
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
                    let rows = RowBlock {
                        next: std::mem::take(&mut read_next),
                        ..RowBlock::new(rows, width)
                    };
                    work(
                        rows,
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
