//! The index of blocks with one key each: which blocks of tokens a token attends to; see
//! [`CompressedIndex`] for the formula.

use super::choice::best;
use super::cpu_context::CpuContext;
use super::kv_rows::RowStore;
use super::mixer::Segment;
use std::cell::RefCell;
use tier_plan_formats::model::spec::CompressedIndex;
use tier_plan_kernels::RowBlock;

/// Blocks whose scores are one job.
const CHUNK: usize = if cfg!(test) { 4 } else { 64 };

/// Scores that are computed before tokens choose by them, about.
const MAX_SCORES: usize = if cfg!(test) { 64 } else { 1 << 20 };

thread_local! {
    /// Dot products of one key with all heads, one buffer per thread.
    static DOTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Buffers of the indexes.
#[derive(Default)]
pub(super) struct IndexScratch {
    /// `[tokens, n_head, key_dim]`.
    q: Vec<f32>,
    /// `[tokens, n_head]`.
    head_weights: Vec<f32>,
    /// `[tokens of a part, blocks]`.
    scores: Vec<f32>,
    order: Vec<u64>,
    /// The blocks of each token of a text, ascending.
    chosen: Vec<Vec<u32>>,
}

/// Sizes of an index.
#[derive(Debug, Clone, Copy)]
pub(super) struct IndexShape {
    pub n_head: usize,
    pub key_dim: usize,
    /// Tokens per block.
    pub ratio: usize,
    /// Blocks that a token chooses at most.
    pub kept: usize,
}

impl IndexShape {
    pub(super) fn of(spec: &CompressedIndex) -> Self {
        Self {
            n_head: spec.n_head,
            key_dim: spec.key_dim,
            ratio: spec.compressor.ratio,
            kept: spec.kept,
        }
    }

    /// Returns the values of a token's queries.
    fn q_len(self) -> usize {
        self.n_head * self.key_dim
    }
}

/// What tokens ask keys for.
pub(super) struct IndexQueries<'a> {
    /// `[tokens, n_head, key_dim]`.
    pub q: &'a mut [f32],
    /// `[tokens, n_head]`.
    pub head_weights: &'a mut [f32],
}

impl IndexScratch {
    /// Returns the queries of `n` tokens.
    pub(super) fn queries(&mut self, n: usize, shape: IndexShape) -> IndexQueries<'_> {
        let grow = |buffer: &mut Vec<f32>, len: usize| {
            if buffer.len() < len {
                buffer.resize(len, 0.0);
            }
        };
        grow(&mut self.q, n * shape.q_len());
        grow(&mut self.head_weights, n * shape.n_head);
        IndexQueries {
            q: &mut self.q[..n * shape.q_len()],
            head_weights: &mut self.head_weights[..n * shape.n_head],
        }
    }

    /// Returns the blocks that the tokens of the last text have chosen.
    pub(super) fn chosen(&self) -> &[Vec<u32>] {
        &self.chosen
    }

    /// Chooses the blocks of every token of a text's rows.
    pub(super) fn choose(
        &mut self,
        c: CpuContext<'_>,
        shape: IndexShape,
        segment: &Segment<'_>,
        keys: &RowStore,
    ) {
        let (ratio, n) = (shape.ratio, segment.rows.len());
        let visible = |token: usize| (segment.past + token + 1) / ratio;
        if self.chosen.len() < n {
            self.chosen.resize_with(n, Vec::new);
        }
        // Later tokens see more blocks.
        let n_all = (0..n).take_while(|t| visible(*t) <= shape.kept).count();
        for (token, chosen) in self.chosen[..n_all].iter_mut().enumerate() {
            chosen.clear();
            chosen.extend(0..visible(token) as u32);
        }
        let width = visible(n.max(1) - 1).next_multiple_of(CHUNK).max(CHUNK);
        let step = (MAX_SCORES / width).max(1);
        for first in (n_all..n).step_by(step) {
            let tokens = first..(first + step).min(n);
            self.scores.resize(tokens.len() * width, 0.0);
            let (q, head_weights) = (&self.q, &self.head_weights);
            let score = |item: usize, scores: &mut [f32]| {
                let (token, chunk) = (first + item / (width / CHUNK), item % (width / CHUNK));
                let row = segment.rows.start + token;
                let query = &q[row * shape.q_len()..][..shape.q_len()];
                let weights = &head_weights[row * shape.n_head..][..shape.n_head];
                DOTS.with_borrow_mut(|dots| {
                    dots.resize(shape.n_head, 0.0);
                    let blocks = chunk * CHUNK..visible(token);
                    for (block, score) in blocks.zip(scores) {
                        let key = keys.block(segment.pages, block);
                        c.kernels
                            .row_dots(query, RowBlock::new(key, shape.key_dim), dots, 1);
                        let terms = dots.iter().zip(weights);
                        *score = terms.map(|(dot, w)| w * dot.max(0.0)).sum();
                    }
                });
            };
            c.pool.for_each_slice(&mut self.scores, CHUNK, score);
            for (token, scores) in tokens.zip(self.scores.chunks_exact(width)) {
                let scores = scores[..visible(token)].iter().copied();
                best(scores, shape.kept, &mut self.order, &mut self.chosen[token]);
            }
        }
    }
}
