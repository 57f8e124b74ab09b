//! The index of block-sparse attention on a GPU. The arithmetic is that of `layers/block_index.rs`.

use super::block_rope::BlockRope;
use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, from_value};
use crate::layers::device_cache::DeviceCache;
use tier_plan_cuda::ops::{
    BlockKeys, BlockQueries, CacheRows, Choice, HeadNorms, Heads, IndexQueries, MeanKeys,
    Positions, Reached, RopeTurns,
};
use tier_plan_cuda::{Buffer, CudaError, Ops, View};
use tier_plan_formats::model::spec::{BlockIndex as Spec, BlockScore, RopeSpec};

/// Index of the keys in a layer's cache, after the keys and values of attention.
const KEYS: usize = 2;

/// A layer's index. Its keys are in the layer's cache.
pub(super) struct BlockIndex {
    spec: Spec,
    pub(super) q: Matrix,
    pub(super) k: Matrix,
    q_norm: Buffer,
    k_norm: Buffer,
    /// The rotation of keys of whole blocks, if any rotate.
    rope: Option<BlockRope>,
}

/// Queries and keys of a batch, and their rotation and norms.
#[derive(Clone, Copy)]
struct Rows<'a> {
    queries: View<'a>,
    keys: View<'a>,
    positions: Positions<'a>,
    turns: Option<RopeTurns<'a>>,
    eps: f32,
    /// Whether a token chooses.
    chooses: bool,
}

impl BlockIndex {
    /// Loads an index. `rope` is the rotation of its layer, and the number of its table.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        spec: &Spec,
        rope: Option<(&RopeSpec, usize)>,
    ) -> Result<Self, CudaError> {
        let rope = rope.filter(|_| spec.score == BlockScore::Mean);
        let rope = rope.map(|(spec, table)| BlockRope::new(loader, spec, table));
        Ok(Self {
            q: loader.linear(&spec.q)?,
            k: loader.linear(&spec.k)?,
            q_norm: loader.vector(spec.q_norm)?,
            k_norm: loader.vector(spec.k_norm)?,
            rope: rope.transpose()?,
            spec: *spec,
        })
    }

    /// Returns what a token chooses.
    pub(super) fn choice(&self) -> Choice {
        Choice::from(&self.spec)
    }

    /// Returns how many lists a token has.
    pub(super) fn lists(&self) -> usize {
        self.spec.lists()
    }

    /// Stores the keys in `buffers.index_k` of the batch's tokens. Lists in `buffers.chosen`,
    /// `[tokens, lists, kept]`, what those tokens choose that `parts` names, by the queries in
    /// `buffers.index_q`. `turns` are those of the attention.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        cache: &DeviceCache,
        parts: &[Reached],
        (turns, eps): (Option<RopeTurns<'_>>, f32),
    ) -> Result<(), CudaError> {
        let rows = Rows {
            queries: buffers.index_q.view(),
            keys: buffers.index_k.view(),
            positions: buffers.positions.all(),
            turns,
            eps,
            chooses: parts.iter().any(|part| part.chooses),
        };
        match self.spec.score {
            BlockScore::Best { .. } => self.place(ops, cache, rows)?,
            BlockScore::Mean => self.place_blocks(ops, cache, rows)?,
        }
        let choice = self.choice();
        for Reached { tokens, .. } in parts.iter().filter(|part| part.chooses) {
            let first = tokens.start * self.lists() * choice.kept;
            let lists = from_value(buffers.chosen.view(), first);
            let rows = Rows {
                queries: from_value(rows.queries, tokens.start * self.spec.q.n_out),
                positions: rows.positions.part(tokens.clone()),
                ..rows
            };
            self.choose(ops, cache, rows, buffers.ratings.view(), lists)?;
        }
        Ok(())
    }

    /// Normalizes and rotates queries and keys, and stores the keys.
    fn place(&self, ops: &Ops, cache: &DeviceCache, rows: Rows<'_>) -> Result<(), CudaError> {
        let n_head = if rows.chooses { self.spec.n_head } else { 0 };
        self.place_heads(ops, cache, rows, (n_head, 1))
    }

    /// Normalizes and rotates queries, stores keys as they are, and makes keys of the blocks that tokens
    /// complete.
    fn place_blocks(
        &self,
        ops: &Ops,
        cache: &DeviceCache,
        rows: Rows<'_>,
    ) -> Result<(), CudaError> {
        let (spec, keys, kv_type) = (&self.spec, cache.rows(KEYS), cache.kv_type());
        if rows.chooses {
            self.place_heads(ops, cache, rows, (spec.n_head, 0))?;
        }
        let stored = CacheRows {
            kv_type,
            at: keys,
            heads: 1,
            width: spec.key_dim,
        };
        ops.store(rows.keys, rows.positions, &stored)?;
        ops.mean_keys(&MeanKeys {
            keys,
            key_dim: spec.key_dim,
            block: spec.block,
            norm: self.k_norm.view(),
            eps: rows.eps,
            frequencies: self.rope.as_ref().map(|rope| rope.from(0)),
            positions: rows.positions,
            kv_type,
        })
    }

    /// Normalizes and rotates so many heads of queries and of keys, and stores the keys.
    fn place_heads(
        &self,
        ops: &Ops,
        cache: &DeviceCache,
        rows: Rows<'_>,
        (n_head, n_head_kv): (usize, usize),
    ) -> Result<(), CudaError> {
        let keys = cache.rows(KEYS);
        ops.place_heads(&Heads {
            queries: rows.queries,
            new_keys: rows.keys,
            new_values: rows.keys,
            norms: HeadNorms {
                queries: Some(self.q_norm.view()),
                keys: Some(self.k_norm.view()),
                eps: rows.eps,
                ..HeadNorms::default()
            },
            turns: rows.turns,
            n_head,
            n_head_kv,
            key_width: self.spec.key_dim,
            value_width: 0,
            kv_type: cache.kv_type(),
            positions: rows.positions,
            keys,
            values: keys,
        })
    }

    /// Lists what tokens choose by their queries, `[tokens, lists, kept]`.
    fn choose(
        &self,
        ops: &Ops,
        cache: &DeviceCache,
        rows: Rows<'_>,
        ratings: View<'_>,
        lists: View<'_>,
    ) -> Result<(), CudaError> {
        let (spec, choice) = (&self.spec, self.choice());
        let (keys, kv_type) = (cache.rows(KEYS), cache.kv_type());
        let Rows {
            queries, positions, ..
        } = rows;
        match spec.score {
            BlockScore::Best { local } => {
                let by = BlockQueries {
                    queries,
                    n_head: spec.n_head,
                    key_dim: spec.key_dim,
                    positions,
                    kv_type,
                    keys,
                    choice,
                    local,
                };
                ops.choose_blocks(&by, ratings, lists)
            }
            BlockScore::Mean => {
                let by = IndexQueries {
                    queries,
                    n_head: spec.n_head,
                    key_dim: spec.key_dim,
                    head_weights: None,
                    scale: 1.0 / (spec.key_dim as f32).sqrt(),
                    positions,
                    kv_type,
                    keys,
                    key_rows: BlockKeys::InLast,
                    choice,
                };
                ops.choose_positions(&by, ratings, lists)
            }
        }
    }
}
