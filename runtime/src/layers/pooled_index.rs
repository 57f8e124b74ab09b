//! The indexer of GLM-5.3-Flash: rates complete blocks of positions by one key each, and chooses those
//! whose positions the token attends to; see [`IndexerSpec`] and [`KeyPool`] for the formulas.
//!
//! ```text
//! k_t    = layer_norm(K x_t)                    g_t = G x_t + ape[t mod P]
//! key_b  = sum over the block of softmax(g) · k   stored in the cache, one row per block
//! q_i    = Q_i c                                per head i, from the compressed queries c
//! w      = scale · W x
//! rating(t, b) = sum over i of w_i(t) · max(0, q_i(t) · key_b)
//! ```
//!
//! A key is made once, when its block's last token comes. Until then the block's rows are recurrent
//! state. So a batch gives the same bits as its tokens one by one.

use super::chosen::Chosen;
use super::compressed_index::{IndexQueries, IndexScratch, IndexShape};
use super::cpu_context::{CpuContext, add_bias};
use super::indexer::{choosing, layer_norm};
use super::kv_rows::RowStore;
use super::mixer::{MixerInput, Segment};
use super::pooling::{Member, pool};
use super::recurrent::{RecurrentState, copy_mixer_state};
use super::weights::DenseWeights;
use std::ops::Range;
use tier_plan_formats::model::spec::{IndexerSpec, KeyPool, Selection};
use tier_plan_kernels::ActView;
use tier_plan_kernels::pooled::{MatJob, matmul_all};

/// Buffers of the pooled indexers.
#[derive(Default)]
pub(super) struct PooledScratch {
    /// `[tokens, key_dim]`.
    k: Vec<f32>,
    /// `[tokens, key_dim]`.
    gate: Vec<f32>,
    blocks: IndexScratch,
}

impl PooledScratch {
    /// Grows to batches of `rows` tokens of a layer like `spec`.
    pub(super) fn reserve(&mut self, rows: usize, spec: &IndexerSpec) {
        for buffer in [&mut self.k, &mut self.gate] {
            if buffer.len() < rows * spec.key_dim {
                buffer.resize(rows * spec.key_dim, 0.0);
            }
        }
        self.blocks.queries(rows, shape(spec));
    }
}

/// What an indexer keeps of all texts.
pub(super) struct PooledKeys<'a> {
    /// Keys of blocks.
    pub keys: &'a mut RowStore,
    /// Per text, then of checkpoints: keys and gates of open blocks, `[block, 2, key_dim]`.
    pub open: &'a mut [RecurrentState],
}

fn shape(spec: &IndexerSpec) -> IndexShape {
    IndexShape {
        n_head: spec.n_head,
        key_dim: spec.key_dim,
        ratio: spec.selection.block,
        kept: spec.selection.blocks,
    }
}

/// Stores the keys of the blocks that a batch's tokens complete, and chooses the positions that each
/// token attends to. `q_low` are the tokens' compressed queries.
pub(super) fn choose(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    (spec, pool): (&IndexerSpec, &KeyPool),
    (input, q_low): (&MixerInput<'_>, ActView<'_>),
    cache: PooledKeys<'_>,
    s: &mut PooledScratch,
    chosen: &mut Chosen,
) {
    let chooses = |segment: &Segment<'_>| !choosing(segment, spec.selection).is_empty();
    let any_chooses = input.segments.iter().any(chooses);
    project(c, weights, (spec, pool), (input.x, q_low), any_chooses, s);
    let PooledKeys { keys, open } = cache;
    let ape = weights.vector(pool.ape);
    let norm = (
        weights.vector(spec.k_norm),
        weights.vector(spec.k_norm_bias),
    );
    for segment in input.segments {
        for (row, position) in segment.positions() {
            let dim = spec.key_dim;
            let (k, gate) = (
                &mut s.k[row * dim..][..dim],
                &mut s.gate[row * dim..][..dim],
            );
            layer_norm(k, norm.0, norm.1, spec.norm_eps);
            let at = position % spec.selection.block;
            c.kernels.add(gate, &ape[at * dim..][..dim]);
        }
        store(c, spec, segment, (&mut *keys, &mut *open), s);
    }
    if input.first_row == 0 {
        chosen.clear();
    }
    for segment in input.segments.iter().filter(|segment| chooses(segment)) {
        s.blocks.choose(c, shape(spec), segment, keys);
        list(spec.selection, segment, input.first_row, &s.blocks, chosen);
    }
}

/// Projects to keys and gates and, where a token chooses, to queries and weights of the heads.
fn project(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    (spec, pool): (&IndexerSpec, &KeyPool),
    (x, q_low): (ActView<'_>, ActView<'_>),
    chooses: bool,
    s: &mut PooledScratch,
) {
    let (n, dim) = (x.rows(), spec.key_dim);
    let (k, gate) = (&mut s.k[..n * dim], &mut s.gate[..n * dim]);
    let IndexQueries { q, head_weights } = s.blocks.queries(n, shape(spec));
    let mut jobs = vec![
        MatJob::new(weights.linear(&spec.k), x, k),
        MatJob::new(weights.linear(&pool.gate), x, gate),
    ];
    if chooses {
        jobs.push(MatJob::new(weights.linear(&spec.q), q_low, q));
        jobs.push(MatJob::new(
            weights.linear(&spec.head_weights),
            x,
            head_weights,
        ));
    }
    matmul_all(c.pool, c.kernels, &jobs);
    drop(jobs);
    add_bias(k, weights.bias(&spec.k));
    add_bias(gate, weights.bias(&pool.gate));
    if chooses {
        add_bias(q, weights.bias(&spec.q));
        add_bias(head_weights, weights.bias(&spec.head_weights));
        head_weights.iter_mut().for_each(|w| *w *= spec.scale);
    }
}

/// Remembers keys and gates of a text's rows, and stores the keys of the blocks that they complete.
fn store(
    c: CpuContext<'_>,
    spec: &IndexerSpec,
    segment: &Segment<'_>,
    (keys, states): (&mut RowStore, &mut [RecurrentState]),
    s: &PooledScratch,
) {
    let (dim, block) = (spec.key_dim, spec.selection.block);
    let mut checkpoints = segment.checkpoints.iter().peekable();
    for (row, position) in segment.positions() {
        let open = &mut states[segment.state as usize].inputs;
        let slot = &mut open[position % block * 2 * dim..][..2 * dim];
        slot[..dim].copy_from_slice(&s.k[row * dim..][..dim]);
        slot[dim..].copy_from_slice(&s.gate[row * dim..][..dim]);
        if (position + 1).is_multiple_of(block) {
            let members: Vec<Member<'_>> = open
                .chunks_exact(2 * dim)
                .map(|row| row.split_at(dim))
                .collect();
            let key = pool(&members, dim);
            keys.store_block(c.kernels, segment.pages, position / block, &key);
        }
        if let Some((_, to)) = checkpoints.next_if(|(end, _)| *end == row + 1) {
            copy_mixer_state(states, segment.state, *to);
        }
    }
}

/// Lists the positions of the blocks that a text's tokens have chosen and, where the selection has
/// it, of the tail after the last complete block.
fn list(
    selection: Selection,
    segment: &Segment<'_>,
    first_row: usize,
    blocks: &IndexScratch,
    chosen: &mut Chosen,
) {
    let block = selection.block;
    for token in choosing(segment, selection) {
        let end = segment.past + token + 1;
        let tail = if selection.tail {
            end / block * block..end
        } else {
            end..end
        };
        let ranges = blocks.chosen()[token].iter().map(|b| *b as usize);
        let ranges = ranges.map(|b| b * block..(b + 1) * block).chain([tail]);
        let positions = ranges.flat_map(|range: Range<usize>| range.start as u32..range.end as u32);
        chosen.add_one(first_row + segment.rows.start + token, positions);
    }
}

#[cfg(test)]
mod tests;
