//! Block-sparse attention: which blocks of neighboring tokens a token attends to; see [`BlockIndex`]
//! for the formulas. A choice depends on the text up to its token only.

use super::attend_runs::Run;
use super::choice::best;
use super::cpu_context::{CpuContext, add_bias};
use super::kv_rows::{KeyValues, RowStore};
use super::mixer::{MixerInput, Segment};
use super::pages::PAGE;
use super::rope::RopeTable;
use super::weights::DenseWeights;
use std::cell::RefCell;
use std::ops::Range;
use tier_plan_formats::model::spec::{BlockIndex, BlockScore};
use tier_plan_kernels::RowBlock;
use tier_plan_kernels::pooled::{MatJob, matmul_all};

/// Blocks whose scores are one job.
const CHUNK: usize = if cfg!(test) { 3 } else { 64 };

/// Scores that are computed before tokens choose by them, about.
const MAX_SCORES: usize = if cfg!(test) { 64 } else { 1 << 20 };

thread_local! {
    static LOCAL: RefCell<Local> = RefCell::default();
}

/// Buffers of one thread.
#[derive(Default)]
struct Local {
    /// `[heads, keys]`.
    dots: Vec<f32>,
    order: Vec<u64>,
}

/// Keys and values, and the keys of the index.
pub(crate) struct IndexedCache {
    pub(super) kv: KeyValues,
    /// One row per position. With a key per block, a block's last position has that key once the
    /// block is complete; all other rows are keys before norm and rotation.
    pub(super) index: RowStore,
}

/// The layer's index, and what computes with it.
#[derive(Clone, Copy)]
pub(super) struct Index<'a> {
    pub c: CpuContext<'a>,
    pub weights: &'a DenseWeights,
    pub spec: &'a BlockIndex,
    pub norm_eps: f32,
    /// Rotations prepared for the rows at hand.
    pub rope: Option<&'a RopeTable>,
}

/// Buffers of the indexes.
#[derive(Default)]
pub(super) struct IndexScratch {
    /// `[tokens, n_head, key_dim]`.
    q: Vec<f32>,
    /// `[tokens, key_dim]`.
    k: Vec<f32>,
    /// Rows of keys on their way, `[block, key_dim]`.
    rows: Vec<f32>,
    /// `[tokens of a part, chunks of blocks, sets, CHUNK]`.
    scores: Vec<f32>,
    /// The blocks of each token and set of heads, `[tokens of a text, sets]`, ascending.
    chosen: Vec<Vec<u32>>,
}

impl IndexScratch {
    /// Grows to batches of `rows` tokens of a layer like `spec`.
    pub(super) fn reserve(&mut self, rows: usize, spec: &BlockIndex) {
        let grow = |buffer: &mut Vec<f32>, len: usize| {
            if buffer.len() < len {
                buffer.resize(len, 0.0);
            }
        };
        grow(&mut self.q, rows * spec.q.n_out);
        grow(&mut self.k, rows * spec.k.n_out);
    }
}

impl Index<'_> {
    /// Computes queries and keys of all rows, and stores the keys.
    pub(super) fn store(&self, input: &MixerInput<'_>, cache: &mut RowStore, s: &mut IndexScratch) {
        let (spec, n) = (self.spec, input.x.rows());
        let (q, k) = (&mut s.q[..n * spec.q.n_out], &mut s.k[..n * spec.k.n_out]);
        let jobs = [
            MatJob::new(self.weights.linear(&spec.q), input.x, q),
            MatJob::new(self.weights.linear(&spec.k), input.x, k),
        ];
        matmul_all(self.c.pool, self.c.kernels, &jobs);
        add_bias(q, self.weights.bias(&spec.q));
        add_bias(k, self.weights.bias(&spec.k));
        let norm = self.weights.vector(spec.q_norm);
        self.c.pool.for_each_slice(q, spec.q.n_out, |t, row| {
            for head in row.chunks_exact_mut(spec.key_dim) {
                self.normalize(norm, head);
            }
            if let Some(rope) = self.rope {
                rope.apply(row, spec.key_dim, t);
            }
        });
        for segment in input.segments {
            for (t, position) in segment.positions() {
                let k = &mut k[t * spec.key_dim..][..spec.key_dim];
                match spec.score {
                    BlockScore::Best { .. } => {
                        self.normalize(self.weights.vector(spec.k_norm), k);
                        if let Some(rope) = self.rope {
                            rope.apply(k, spec.key_dim, t);
                        }
                        cache.store(self.c.kernels, segment.pages, position, k);
                    }
                    BlockScore::Mean => {
                        cache.store(self.c.kernels, segment.pages, position, k);
                        if (position + 1).is_multiple_of(spec.block) {
                            self.complete(segment, position, cache, &mut s.rows);
                        }
                    }
                }
            }
        }
    }

    /// Makes the key of the block whose last position is `last`. All its rows are read as they are
    /// stored, so that the key does not depend on which of them came together.
    fn complete(
        &self,
        segment: &Segment<'_>,
        last: usize,
        cache: &mut RowStore,
        rows: &mut Vec<f32>,
    ) {
        let (spec, dim) = (self.spec, self.spec.key_dim);
        let first = last + 1 - spec.block;
        rows.clear();
        rows.resize(2 * dim, 0.0);
        let (row, mean) = rows.split_at_mut(dim);
        for position in first..=last {
            let stored = cache.rows(segment.pages, 0, position..position + 1);
            self.c.kernels.widen_rows(stored, dim, row);
            self.c.kernels.add(mean, row);
        }
        mean.iter_mut().for_each(|v| *v /= spec.block as f32);
        self.normalize(self.weights.vector(spec.k_norm), mean);
        if let Some(rope) = self.rope {
            rope.apply_at(mean, dim, first);
        }
        cache.store(self.c.kernels, segment.pages, last, mean);
    }

    fn normalize(&self, norm: &[f32], head: &mut [f32]) {
        let squares = self.c.kernels.dot(head, head);
        let factor = 1.0 / (squares / head.len() as f32 + self.norm_eps).sqrt();
        head.iter_mut()
            .zip(norm)
            .for_each(|(v, w)| *v *= factor * w);
    }

    /// Returns the blocks that a token at a position may choose.
    fn visible(&self, position: usize) -> usize {
        match self.spec.score {
            BlockScore::Mean => (position + 1) / self.spec.block,
            BlockScore::Best { .. } => position / self.spec.block + 1,
        }
    }

    /// Chooses the blocks of every token of a text's rows, whose keys are stored.
    pub(super) fn choose(&self, segment: &Segment<'_>, cache: &RowStore, s: &mut IndexScratch) {
        let (sets, n) = (self.spec.lists(), segment.rows.len());
        if s.chosen.len() < n * sets {
            s.chosen.resize_with(n * sets, Vec::new);
        }
        let kept = self.spec.kept;
        // Later tokens see more blocks.
        let all = (0..n).take_while(|t| self.visible(segment.past + t) <= kept);
        let n_all = all.count();
        for (i, chosen) in s.chosen[..n_all * sets].iter_mut().enumerate() {
            chosen.clear();
            chosen.extend(0..self.visible(segment.past + i / sets) as u32);
        }
        if n_all == n {
            return;
        }
        let chunks = self.visible(segment.past + n - 1).div_ceil(CHUNK);
        let step = (MAX_SCORES / (chunks * sets * CHUNK)).max(1);
        for first in (n_all..n).step_by(step) {
            let tokens = first..(first + step).min(n);
            s.scores.resize(tokens.len() * chunks * sets * CHUNK, 0.0);
            let (q, scores) = (&s.q, &mut s.scores[..]);
            self.c
                .pool
                .for_each_slice(scores, sets * CHUNK, |item, scores| {
                    let (token, chunk) = (tokens.start + item / chunks, item % chunks);
                    let row = segment.rows.start + token;
                    let query = &q[row * self.spec.q.n_out..][..self.spec.q.n_out];
                    self.score(segment, token, chunk, (query, cache), scores);
                });
            self.pick(segment, tokens, chunks, s);
        }
    }

    /// Scores the blocks of a chunk for a token, `[sets, CHUNK]`.
    fn score(
        &self,
        segment: &Segment<'_>,
        token: usize,
        chunk: usize,
        (query, cache): (&[f32], &RowStore),
        scores: &mut [f32],
    ) {
        let (spec, position) = (self.spec, segment.past + token);
        let blocks = chunk * CHUNK..((chunk + 1) * CHUNK).min(self.visible(position));
        scores.fill(f32::NEG_INFINITY);
        LOCAL.with_borrow_mut(|local| match spec.score {
            BlockScore::Mean => {
                let scale = 1.0 / (spec.key_dim as f32).sqrt();
                local.dots.resize(spec.n_head, 0.0);
                for (block, score) in blocks.zip(scores) {
                    let last = (block + 1) * spec.block - 1;
                    let rows = cache.rows(segment.pages, 0, last..last + 1);
                    let dots = &mut local.dots[..spec.n_head];
                    self.c
                        .kernels
                        .row_dots(query, RowBlock::new(rows, spec.key_dim), dots, 1);
                    *score = scale * dots.iter().map(|dot| dot.max(0.0)).sum::<f32>();
                }
            }
            BlockScore::Best { local: near } => {
                let own = position / spec.block;
                let seen = blocks.start * spec.block..(blocks.end * spec.block).min(position + 1);
                for run in by_page(seen) {
                    let rows = cache.rows(segment.pages, 0, run.clone());
                    local.dots.resize(spec.n_head * run.len(), 0.0);
                    let (dots, n) = (&mut local.dots[..], run.len());
                    self.c
                        .kernels
                        .row_dots(query, RowBlock::new(rows, spec.key_dim), dots, n);
                    for (dots, scores) in dots.chunks_exact(n).zip(scores.chunks_exact_mut(CHUNK)) {
                        for (position, dot) in run.clone().zip(dots) {
                            let score = &mut scores[position / spec.block - blocks.start];
                            *score = score.max(*dot);
                        }
                    }
                }
                let forced = blocks.start.max((own + 1).saturating_sub(near))..blocks.end;
                for scores in scores.chunks_exact_mut(CHUNK) {
                    forced
                        .clone()
                        .for_each(|block| scores[block - blocks.start] = f32::INFINITY);
                }
            }
        });
    }

    /// Has some tokens of a text choose by their scores.
    fn pick(
        &self,
        segment: &Segment<'_>,
        tokens: Range<usize>,
        chunks: usize,
        s: &mut IndexScratch,
    ) {
        let (sets, kept) = (self.spec.lists(), self.spec.kept);
        let scores = &s.scores[..];
        LOCAL.with_borrow_mut(|local| {
            for (i, token) in tokens.enumerate() {
                let visible = self.visible(segment.past + token);
                for set in 0..sets {
                    let of = |block: usize| {
                        let chunk = (i * chunks + block / CHUNK) * sets + set;
                        scores[chunk * CHUNK + block % CHUNK]
                    };
                    let chosen = &mut s.chosen[token * sets + set];
                    best((0..visible).map(of), kept, &mut local.order, chosen);
                }
            }
        });
    }

    /// Lists the rows that a token of a text attends to in a KV head.
    pub(super) fn runs<'a>(
        &self,
        segment: &Segment<'a>,
        (token, kv_head): (usize, usize),
        kv: &'a KeyValues,
        chosen: &[Vec<u32>],
        runs: &mut Vec<Run<'a>>,
    ) {
        let (sets, block) = (self.spec.lists(), self.spec.block);
        let end = segment.past + token + 1;
        let set = if sets == 1 { 0 } else { kv_head };
        let blocks = chosen[token * sets + set].iter().map(|b| *b as usize);
        let ranges = blocks.map(|b| b * block..((b + 1) * block).min(end));
        let tail = match self.spec.score {
            BlockScore::Mean => end / block * block..end,
            BlockScore::Best { .. } => end..end,
        };
        let mut add = |range: Range<usize>| {
            runs.extend(by_page(range).map(|run| Run {
                keys: kv.keys.rows(segment.pages, kv_head, run.clone()),
                values: kv.values.rows(segment.pages, kv_head, run),
            }));
        };
        let mut open: Option<Range<usize>> = None;
        for range in ranges.chain([tail]) {
            match &mut open {
                Some(before) if before.end == range.start => before.end = range.end,
                _ => {
                    if let Some(before) = open.replace(range) {
                        add(before);
                    }
                }
            }
        }
        open.into_iter().for_each(add);
    }
}

impl IndexScratch {
    /// Returns the blocks that the tokens of the last text have chosen.
    pub(super) fn chosen(&self) -> &[Vec<u32>] {
        &self.chosen
    }
}

/// Cuts positions where pages begin.
pub(super) fn by_page(positions: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut next = positions.start;
    std::iter::from_fn(move || {
        let run = next..((next / PAGE + 1) * PAGE).min(positions.end);
        next = run.end;
        (run.start < run.end).then_some(run)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_cut_at_pages() {
        let runs: Vec<_> = by_page(PAGE - 2..2 * PAGE + 1).collect();
        let expected = [PAGE - 2..PAGE, PAGE..2 * PAGE, 2 * PAGE..2 * PAGE + 1];
        assert_eq!(runs, expected);
        assert_eq!(by_page(5..5).count(), 0);
    }
}
