//! Lightning indexer on a GPU. The arithmetic is that of `layers/indexer.rs`, or where blocks have one
//! key each, of `layers/pooled_index.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, from_value, product};
use super::mixer::after_all_states;
use crate::layers::device_cache::DeviceCache;
use crate::layers::mixer::Segment;
use tier_plan_cuda::ops::{
    BlockKeys, Choice, IndexQueries, IndexRows, PooledRows, Reached, RopeTurns,
};
use tier_plan_cuda::{Buffer, CudaError, Ops, View};
use tier_plan_formats::model::spec::IndexerSpec;

/// Index of a layer's keys in its cache, after the latents.
const KEYS: usize = 1;

/// A layer's indexer. Its keys are in the layer's cache.
pub(super) struct Indexer {
    spec: IndexerSpec,
    q: Matrix,
    pub(super) k: Matrix,
    k_norm: Buffer,
    k_norm_bias: Buffer,
    pub(super) head_weights: Matrix,
    pub(super) pool: Option<Pool>,
    rope: Option<usize>,
}

/// What makes one key of the keys of a block. Those of a block that is not complete are recurrent
/// state.
pub(super) struct Pool {
    pub(super) gate: Matrix,
    ape: Buffer,
}

impl Indexer {
    /// Loads an indexer. `rope` is its rope table.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        spec: &IndexerSpec,
        rope: Option<usize>,
    ) -> Result<Self, CudaError> {
        let pool = spec.pool.as_ref().map(|pool| {
            Ok::<_, CudaError>(Pool {
                gate: loader.linear(&pool.gate)?,
                ape: loader.vector(pool.ape)?,
            })
        });
        Ok(Self {
            pool: pool.transpose()?,
            q: loader.linear(&spec.q)?,
            k: loader.linear(&spec.k)?,
            k_norm: loader.vector(spec.k_norm)?,
            k_norm_bias: loader.vector(spec.k_norm_bias)?,
            head_weights: loader.linear(&spec.head_weights)?,
            rope,
            spec: spec.clone(),
        })
    }

    /// Returns whether it takes compressed queries quantized.
    pub(super) fn takes_quants(&self) -> bool {
        self.q.takes_quants()
    }

    /// Computes queries to `buffers.raw` from `n` compressed ones.
    pub(super) fn ask(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        n: usize,
        low: View<'_>,
    ) -> Result<(), CudaError> {
        let to = buffers.raw.view();
        product(ops, &self.q, n, low, &buffers.inner, to)
    }

    /// Stores the keys in `buffers.v` of the batch's tokens. Lists in `lists`, `[tokens, kept]`, what
    /// those tokens choose that `parts` names, by the queries in `buffers.raw`.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        cache: &DeviceCache,
        (parts, segments): (&[Reached], &[Segment<'_>]),
        lists: View<'_>,
    ) -> Result<(), CudaError> {
        let (spec, positions) = (&self.spec, buffers.positions.all());
        match &self.pool {
            Some(pool) => self.pool(ops, buffers, cache, pool, segments)?,
            None => self.place(ops, buffers, cache, parts)?,
        }
        let (queries, weights) = (buffers.raw.view(), buffers.index_weights.view());
        let choice = Choice::from(spec.selection);
        for Reached { tokens, .. } in parts.iter().filter(|part| part.chooses) {
            let first = tokens.start;
            let of_tokens = IndexQueries {
                queries: from_value(queries, first * spec.q.n_out),
                n_head: spec.n_head,
                key_dim: spec.key_dim,
                head_weights: Some(from_value(weights, first * spec.n_head)),
                scale: spec.scale,
                positions: positions.part(tokens.clone()),
                kv_type: cache.kv_type(),
                keys: cache.rows(KEYS),
                key_rows: BlockKeys::OfBlocks,
                choice,
            };
            let lists = from_value(lists, first * choice.kept);
            ops.choose_positions(&of_tokens, buffers.ratings.view(), lists)?;
        }
        Ok(())
    }

    /// Stores the keys of positions, and rotates queries where a token chooses.
    fn place(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        cache: &DeviceCache,
        parts: &[Reached],
    ) -> Result<(), CudaError> {
        let (spec, queries) = (&self.spec, buffers.raw.view());
        let turns = self.rope.zip(spec.rope.as_ref());
        ops.place_index(&IndexRows {
            queries: parts.iter().any(|part| part.chooses).then_some(queries),
            n_head: spec.n_head,
            new_keys: buffers.v.view(),
            key_dim: spec.key_dim,
            norm: self.k_norm.view(),
            norm_bias: self.k_norm_bias.view(),
            eps: spec.norm_eps,
            turns: turns.map(|(table, rope)| RopeTurns {
                values: buffers.turns[table].view(),
                kind: rope.kind,
                half: rope.dims / 2,
            }),
            rope_first: spec.rope_first,
            positions: buffers.positions.all(),
            kv_type: cache.kv_type(),
            keys: cache.rows(KEYS),
        })
    }

    /// Stores the keys of the blocks that each text's tokens complete, of the keys in `buffers.v` and
    /// the gates in `buffers.index_k`. Rows that a checkpoint follows end a launch.
    fn pool(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        cache: &DeviceCache,
        pool: &Pool,
        segments: &[Segment<'_>],
    ) -> Result<(), CudaError> {
        let spec = &self.spec;
        let rows = PooledRows {
            new_keys: buffers.v.view(),
            gates: buffers.index_k.view(),
            key_dim: spec.key_dim,
            norm: self.k_norm.view(),
            norm_bias: self.k_norm_bias.view(),
            eps: spec.norm_eps,
            ape: pool.ape.view(),
            block: spec.selection.block,
            positions: buffers.positions.all(),
            open: cache.states(0),
            kv_type: cache.kv_type(),
            keys: cache.rows(KEYS),
        };
        after_all_states(&buffers.positions, segments, cache, |runs| {
            ops.pool_index(&rows, runs)
        })
    }
}
