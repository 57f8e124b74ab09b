//! Lightning indexer on a GPU. The arithmetic is that of `layers/indexer.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, from_value, product};
use crate::layers::device_cache::DeviceCache;
use tier_plan_cuda::ops::{Choice, IndexQueries, IndexRows, Reached, RopeTurns};
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
    rope: Option<usize>,
}

impl Indexer {
    /// Loads an indexer. `rope` is its rope table.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        spec: &IndexerSpec,
        rope: Option<usize>,
    ) -> Result<Self, CudaError> {
        Ok(Self {
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
        parts: &[Reached],
        lists: View<'_>,
    ) -> Result<(), CudaError> {
        let (spec, positions) = (&self.spec, buffers.positions.all());
        let (keys, kv_type) = (cache.rows(KEYS), cache.kv_type());
        let queries = buffers.raw.view();
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
            positions,
            kv_type,
            keys,
        })?;
        let weights = buffers.index_weights.view();
        let choice = Choice::from(spec.selection);
        for Reached { tokens, .. } in parts.iter().filter(|part| part.chooses) {
            let first = tokens.start;
            let of_tokens = IndexQueries {
                queries: from_value(queries, first * spec.q.n_out),
                n_head: spec.n_head,
                key_dim: spec.key_dim,
                head_weights: from_value(weights, first * spec.n_head),
                scale: spec.scale,
                positions: positions.part(tokens.clone()),
                kv_type,
                keys,
                choice,
            };
            let lists = from_value(lists, first * choice.kept);
            ops.choose_positions(&of_tokens, buffers.ratings.view(), lists)?;
        }
        Ok(())
    }
}
