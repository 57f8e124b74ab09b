//! Attention of DeepSeek-V4: a window of near tokens, and compressed vectors of the blocks before;
//! see [`CompressedSpec`] and [`Compressor`] for the formulas.
//!
//! A compressed vector is made once, when its block's last token comes. Until then the block's rows
//! are recurrent state, and so are the vectors of the window: `window` of them, that of a position at
//! the position's remainder. A token passes over its window in runs that end at multiples of
//! `window`. So a batch gives the same bits as its tokens one by one.

use super::attend_runs::{Run, RunShape, attend_runs};
use super::compressed_index::{IndexQueries, IndexScratch, IndexShape};
use super::cpu_context::{CpuContext, add_bias};
use super::kv_rows::RowStore;
use super::mixer::{MixerInput, Segment};
use super::pooling::{Member, pool};
use super::recurrent::{RecurrentState, copy_mixer_state};
use super::rope::RopeTable;
use super::weights::DenseWeights;
use std::ops::Range;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::{CompressedSpec, Compressor, Linear};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{ActView, Activations, StoredRows, needs_quants};

/// What a layer keeps of all texts.
pub(crate) struct CompressedCache {
    pub(super) stores: CompressedStores,
    /// Per text, then of checkpoints: the vectors of the window, then the rows of open blocks.
    pub(super) states: Vec<RecurrentState>,
}

/// Rows by block.
pub(crate) struct CompressedStores {
    /// Compressed vectors.
    far: Option<RowStore>,
    /// Keys of the index.
    pub(super) index: Option<RowStore>,
}

impl CompressedStores {
    pub(super) fn new(spec: &CompressedSpec, kv_type: KvType, positions: usize) -> Self {
        let rows = |of: &Compressor| RowStore::of_blocks(kv_type, positions, of.width(), of.ratio);
        let mut stores = spec.compressors().map(rows);
        Self {
            far: stores.next(),
            index: stores.next(),
        }
    }

    pub(super) fn all(&self) -> Vec<&RowStore> {
        self.far.iter().chain(&self.index).collect()
    }

    pub(super) fn all_mut(&mut self) -> Vec<&mut RowStore> {
        self.far.iter_mut().chain(&mut self.index).collect()
    }
}

/// Vectors that a text's tokens find near, by position.
#[derive(Clone, Copy)]
enum Near<'a> {
    /// Those of the last `window` positions, each at its remainder.
    Ring(&'a [f32]),
    /// Those from a position on.
    From(usize, &'a [f32]),
}

impl<'a> Near<'a> {
    /// Returns the vectors of some positions, none of which but the first is a multiple of `window`.
    fn rows(self, positions: Range<usize>, window: usize, dim: usize) -> Run<'a> {
        let (first, all) = match self {
            Near::Ring(all) => (positions.start % window, all),
            Near::From(first, all) => (positions.start - first, all),
        };
        let rows = StoredRows::F32(&all[first * dim..][..positions.len() * dim]);
        Run {
            keys: rows,
            values: rows,
        }
    }
}

/// Buffers of the mixer.
#[derive(Default)]
pub(super) struct CompressedScratch {
    /// `[tokens, q_rank]`.
    q_low: Vec<f32>,
    /// `[tokens, q_rank]`: `q_low` after its norm.
    q_normed: Vec<f32>,
    low_acts: Activations,
    /// `[tokens, n_head, key_dim]`.
    q: Vec<f32>,
    /// `[tokens, key_dim]`.
    kv: Vec<f32>,
    /// Vectors before a text's rows that these see, and their own, `[_, key_dim]`.
    near: Vec<f32>,
    /// By compressor: `K` and `G`, `[tokens, _]` each.
    open: [[Vec<f32>; 2]; 2],
    index: IndexScratch,
    /// `[tokens, n_head, key_dim]`: what the heads find.
    found: Vec<f32>,
    /// `[n_group, tokens, n_head / n_group * key_dim]`.
    grouped: Vec<f32>,
    grouped_acts: Activations,
    /// `[n_group, tokens, rank]`.
    low: Vec<f32>,
    /// `[tokens, n_group, rank]`.
    mixed: Vec<f32>,
    mixed_acts: Activations,
}

impl CompressedScratch {
    /// Grows to batches of `rows` tokens of a layer like `spec`.
    pub(super) fn reserve(&mut self, rows: usize, spec: &CompressedSpec) {
        let grow = |buffer: &mut Vec<f32>, width: usize| {
            if buffer.len() < rows * width {
                buffer.resize(rows * width, 0.0);
            }
        };
        grow(&mut self.q_low, spec.q.n_in);
        grow(&mut self.q_normed, spec.q.n_in);
        grow(&mut self.q, spec.q.n_out);
        grow(&mut self.kv, spec.kv.n_out);
        for (open, compressor) in self.open.iter_mut().zip(spec.compressors()) {
            open.iter_mut()
                .for_each(|rows| grow(rows, compressor.kv.n_out));
        }
        grow(&mut self.found, spec.q.n_out);
        grow(&mut self.grouped, spec.q.n_out);
        grow(&mut self.low, spec.o.n_in);
        grow(&mut self.mixed, spec.o.n_in);
    }
}

/// Computes `out = o(attention(x))`, and stores the tokens' vectors and the blocks that they
/// complete.
pub(super) fn run(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &CompressedSpec,
    input: &MixerInput<'_>,
    cache: &mut CompressedCache,
    s: &mut CompressedScratch,
    out: &mut [f32],
) {
    let layer = Layer {
        c,
        weights,
        spec,
        norm_eps: input.norm_eps,
        rope: input.rope,
    };
    layer.project(input, s);
    layer.place(input, s);
    for segment in input.segments {
        let mut buffer = std::mem::take(&mut s.near);
        let first = layer.gather(segment, &cache.states, s, &mut buffer);
        layer.store(segment, cache, s);
        let near = match (first, cache.states.get(segment.state as usize)) {
            (None, Some(state)) => Near::Ring(&state.inputs[..spec.window_values()]),
            (first, _) => Near::From(first.unwrap_or(segment.past), &buffer),
        };
        layer.attend(segment, &cache.stores, near, s);
        s.near = buffer;
    }
    layer.output(input.x.rows(), s, out);
}

/// A layer, and what computes it.
#[derive(Clone, Copy)]
struct Layer<'a> {
    c: CpuContext<'a>,
    weights: &'a DenseWeights,
    spec: &'a CompressedSpec,
    norm_eps: f32,
    /// Rotations prepared for the rows at hand.
    rope: Option<&'a RopeTable>,
}

impl Layer<'_> {
    /// Computes the products of all rows.
    fn project(&self, input: &MixerInput<'_>, s: &mut CompressedScratch) {
        let (c, spec, x, n) = (self.c, self.spec, input.x, input.x.rows());
        let rank = spec.q.n_in;
        let mut products = vec![
            (&spec.q_down.down, &mut s.q_low[..n * rank]),
            (&spec.kv, &mut s.kv[..n * spec.kv.n_out]),
        ];
        for (open, compressor) in s.open.iter_mut().zip(spec.compressors()) {
            let [k, g] = open;
            let len = n * compressor.kv.n_out;
            products.push((&compressor.kv, &mut k[..len]));
            products.push((&compressor.gate, &mut g[..len]));
        }
        self.products(x, products);
        let norm = self.weights.vector(spec.q_down.norm);
        let (low, normed) = (&s.q_low, &mut s.q_normed[..n * rank]);
        c.pool.for_each_slice(normed, rank, |t, normed| {
            let low = &low[t * rank..][..rank];
            c.kernels.rms_norm(low, norm, self.norm_eps, normed);
        });
        let index = spec.far.and_then(|far| far.index);
        let quantized = |linear: &Linear| needs_quants(self.weights.ty(linear.weight));
        let quantize = quantized(&spec.q) || index.is_some_and(|index| quantized(&index.q));
        s.low_acts
            .fill_shared(c.pool, c.kernels, n, rank, normed, quantize);
        let q = &mut s.q[..n * spec.q.n_out];
        let mut products = vec![(&spec.q, q)];
        if let Some(index) = &index {
            let IndexQueries { q, head_weights } = s.index.queries(n, IndexShape::of(index));
            products.push((&index.q, q));
            self.products(x, vec![(&index.weights, head_weights)]);
        }
        self.products(s.low_acts.view(), products);
    }

    fn products(&self, x: ActView<'_>, mut products: Vec<(&Linear, &mut [f32])>) {
        let jobs = products.iter_mut();
        let jobs = jobs.map(|(linear, out)| MatJob::new(self.weights.linear(linear), x, out));
        let jobs: Vec<_> = jobs.collect();
        matmul_all(self.c.pool, self.c.kernels, &jobs);
        drop(jobs);
        for (linear, out) in products {
            add_bias(out, self.weights.bias(linear));
        }
    }

    /// Normalizes and rotates queries and the tokens' vectors, and adds positions to gates.
    fn place(&self, input: &MixerInput<'_>, s: &mut CompressedScratch) {
        let (c, spec, n) = (self.c, self.spec, input.x.rows());
        let dim = spec.key_dim;
        let q = &mut s.q[..n * spec.q.n_out];
        c.pool.for_each_slice(q, spec.q.n_out, |t, row| {
            for head in row.chunks_exact_mut(dim) {
                self.normalize(&[], head);
                self.rotate(head, t);
            }
        });
        let norm = self.weights.vector(spec.kv_norm);
        c.pool.for_each_slice(&mut s.kv[..n * dim], dim, |t, row| {
            self.normalize(norm, row);
            self.rotate(row, t);
        });
        if let Some(index) = spec.far.and_then(|far| far.index) {
            let dim = index.key_dim;
            let IndexQueries { q, head_weights } = s.index.queries(n, IndexShape::of(&index));
            c.pool.for_each_slice(q, index.q.n_out, |t, row| {
                row.chunks_exact_mut(dim)
                    .for_each(|head| self.rotate(head, t));
            });
            let scale = 1.0 / ((index.n_head * dim) as f32).sqrt();
            head_weights.iter_mut().for_each(|w| *w *= scale);
        }
        for (open, compressor) in s.open.iter_mut().zip(spec.compressors()) {
            let ape = self.weights.vector(compressor.ape);
            let width = compressor.kv.n_out;
            for (t, position) in input.segments.iter().flat_map(Segment::positions) {
                let gate = &mut open[1][t * width..][..width];
                let at = position % compressor.ratio;
                c.kernels.add(gate, &ape[at * width..][..width]);
            }
        }
    }

    /// Divides a head by the root of its mean square, and multiplies it by weights if there are any.
    fn normalize(&self, norm: &[f32], head: &mut [f32]) {
        let squares = self.c.kernels.dot(head, head);
        let factor = 1.0 / (squares / head.len() as f32 + self.norm_eps).sqrt();
        head.iter_mut().for_each(|v| *v *= factor);
        head.iter_mut().zip(norm).for_each(|(v, w)| *v *= w);
    }

    /// Rotates the last values of a head of a row at hand.
    fn rotate(&self, head: &mut [f32], row: usize) {
        if let Some(rope) = self.rope {
            let dims = self.spec.rope.dims;
            let first = head.len() - dims;
            rope.apply(&mut head[first..], dims, row);
        }
    }

    /// Gathers the vectors that a text's rows find near: those before them that they see, and their
    /// own. Returns the first's position. One row finds all in the state once it is stored there:
    /// then nothing is gathered, and `None` returned.
    fn gather(
        &self,
        segment: &Segment<'_>,
        states: &[RecurrentState],
        s: &CompressedScratch,
        near: &mut Vec<f32>,
    ) -> Option<usize> {
        let (dim, window) = (self.spec.key_dim, self.spec.window);
        if segment.rows.len() == 1 {
            return None;
        }
        let first = (segment.past + 1).saturating_sub(window).min(segment.past);
        near.clear();
        let ring = &states[segment.state as usize].inputs;
        for position in first..segment.past {
            near.extend_from_slice(&ring[position % window * dim..][..dim]);
        }
        near.extend_from_slice(&s.kv[segment.rows.start * dim..segment.rows.end * dim]);
        Some(first)
    }

    /// Stores the vectors of a text's rows, and of the blocks that they complete.
    fn store(&self, segment: &Segment<'_>, cache: &mut CompressedCache, s: &mut CompressedScratch) {
        let CompressedCache { stores, states } = cache;
        let (dim, window) = (self.spec.key_dim, self.spec.window);
        let mut checkpoints = segment.checkpoints.iter().peekable();
        for (row, position) in segment.positions() {
            let state = &mut states[segment.state as usize].inputs;
            let (ring, mut open) = state.split_at_mut(self.spec.window_values());
            let kv = &s.kv[row * dim..][..dim];
            ring[position % window * dim..][..dim].copy_from_slice(kv);
            let far = stores.far.iter_mut().chain(&mut stores.index);
            let compressors = self.spec.compressors().zip(&s.open);
            for ((compressor, [k, g]), store) in compressors.zip(far) {
                let (own, rest) = open.split_at_mut(compressor.state_values());
                open = rest;
                let width = compressor.kv.n_out;
                let slot = position % compressor.past() * 2 * width;
                own[slot..][..width].copy_from_slice(&k[row * width..][..width]);
                own[slot + width..][..width].copy_from_slice(&g[row * width..][..width]);
                if (position + 1).is_multiple_of(compressor.ratio) {
                    let vector = self.compress(compressor, own, position);
                    let block = position / compressor.ratio;
                    store.store_block(self.c.kernels, segment.pages, block, &vector);
                }
            }
            if let Some((_, to)) = checkpoints.next_if(|(end, _)| *end == row + 1) {
                copy_mixer_state(states, segment.state, *to);
            }
        }
    }

    /// Makes the vector of the block whose last position is `last`, from the rows of open blocks,
    /// `[past, 2, _]` by position.
    fn compress(&self, compressor: &Compressor, open: &[f32], last: usize) -> Vec<f32> {
        let (ratio, dim, width) = (compressor.ratio, compressor.width(), compressor.kv.n_out);
        let first = last + 1 - ratio;
        let row = |position: usize, column: usize| {
            let slot = position % compressor.past() * 2 * width;
            (
                &open[slot + column..][..dim],
                &open[slot + width + column..][..dim],
            )
        };
        let before = if compressor.overlap {
            first.min(ratio)
        } else {
            0
        };
        let own = (first..=last).map(|position| row(position, width - dim));
        let members = (first - before..first).map(|position| row(position, 0));
        let members: Vec<Member<'_>> = members.chain(own).collect();
        let mut vector = pool(&members, dim);
        self.normalize(self.weights.vector(compressor.norm), &mut vector);
        if let Some(rope) = self.rope {
            let dims = self.spec.rope.dims;
            rope.apply_at(&mut vector[dim - dims..], dims, first);
        }
        vector
    }

    /// Computes the attention of a text's rows.
    fn attend<'a>(
        &self,
        segment: &'a Segment<'a>,
        stores: &'a CompressedStores,
        near: Near<'a>,
        s: &mut CompressedScratch,
    ) {
        let (spec, dim) = (self.spec, self.spec.key_dim);
        let index = spec.far.and_then(|far| far.index);
        if let (Some(index), Some(keys)) = (&index, &stores.index) {
            s.index.choose(self.c, IndexShape::of(index), segment, keys);
        }
        let ratio = spec.far.map_or(1, |far| far.compressor.ratio);
        let chosen = s.index.chosen();
        let runs = |token: usize, _: usize, runs: &mut Vec<Run<'a>>| {
            let end = segment.past + token + 1;
            if let Some(far) = &stores.far {
                let run = |block: usize| {
                    let rows = far.block(segment.pages, block);
                    Run {
                        keys: rows,
                        values: rows,
                    }
                };
                match index {
                    Some(_) => runs.extend(chosen[token].iter().map(|b| run(*b as usize))),
                    None => runs.extend((0..end / ratio).map(run)),
                }
            }
            // At most one multiple of the window lies within it.
            let first = end.saturating_sub(spec.window);
            let cut = (end - 1) / spec.window * spec.window;
            let (old, new) = (first..cut.max(first), cut.max(first)..end);
            let parts = [old, new].into_iter().filter(|part| !part.is_empty());
            runs.extend(parts.map(|part| near.rows(part, spec.window, dim)));
        };
        let q = &s.q[segment.rows.start * spec.q.n_out..];
        let query = |head: usize, token: usize, to: &mut [f32]| {
            let query = &q[token * spec.q.n_out + head * dim..][..dim];
            to.iter_mut()
                .zip(query)
                .for_each(|(to, q)| *to = spec.scale * q);
        };
        let shape = RunShape {
            n_head_kv: 1,
            group: spec.n_head,
            key_width: dim,
            value_width: dim,
        };
        let rows = segment.rows.start * spec.q.n_out..segment.rows.end * spec.q.n_out;
        let sinks = Some(self.weights.vector(spec.sinks));
        attend_runs(self.c, shape, runs, query, sinks, &mut s.found[rows]);
    }

    /// Turns results back, and takes each group of heads to the output.
    fn output(&self, n: usize, s: &mut CompressedScratch, out: &mut [f32]) {
        let (c, spec) = (self.c, self.spec);
        let (groups, width) = (spec.n_group, spec.o_down.n_in);
        let rank = spec.o_down.n_out / groups;
        let (found, grouped) = (&s.found, &mut s.grouped[..n * spec.q.n_out]);
        c.pool.for_each_slice(grouped, width, |item, row| {
            let (group, t) = (item / n, item % n);
            row.copy_from_slice(&found[(t * groups + group) * width..][..width]);
            if let Some(rope) = self.rope {
                let dims = spec.rope.dims;
                for head in row.chunks_exact_mut(spec.key_dim) {
                    rope.undo(&mut head[spec.key_dim - dims..], dims, t);
                }
            }
        });
        let quantize = needs_quants(self.weights.ty(spec.o_down.weight));
        let acts = &mut s.grouped_acts;
        acts.fill_shared(c.pool, c.kernels, groups * n, width, grouped, quantize);
        let low = &mut s.low[..n * spec.o.n_in];
        let all = self.weights.linear(&spec.o_down);
        let job = |(group, out)| {
            let Some(rows) = all.rows(group * rank..(group + 1) * rank) else {
                unreachable!("shapes are checked when the model is described")
            };
            let x = s.grouped_acts.view().rows_range(group * n..(group + 1) * n);
            MatJob::new(rows, x, out)
        };
        let jobs: Vec<_> = low
            .chunks_exact_mut(n * rank)
            .enumerate()
            .map(job)
            .collect();
        matmul_all(c.pool, c.kernels, &jobs);
        drop(jobs);
        let mixed = &mut s.mixed[..n * spec.o.n_in];
        for (item, to) in mixed.chunks_exact_mut(rank).enumerate() {
            let (t, group) = (item / groups, item % groups);
            to.copy_from_slice(&s.low[(group * n + t) * rank..][..rank]);
        }
        add_bias(mixed, self.weights.bias(&spec.o_down));
        let quantize = needs_quants(self.weights.ty(spec.o.weight));
        let acts = &mut s.mixed_acts;
        acts.fill_shared(c.pool, c.kernels, n, spec.o.n_in, mixed, quantize);
        self.products(s.mixed_acts.view(), vec![(&spec.o, out)]);
    }
}
