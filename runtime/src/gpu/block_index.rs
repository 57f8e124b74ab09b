//! The index of block-sparse attention on a GPU. The arithmetic is that of `layers/block_index.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, from_value};
use crate::layers::device_cache::DeviceCache;
use tier_plan_cuda::ops::{BlockQueries, Choice, HeadNorms, Heads, Reached, RopeTurns};
use tier_plan_cuda::{Buffer, CudaError, Ops};
use tier_plan_formats::model::spec::{BlockIndex as Spec, BlockScore};

/// Index of the keys in a layer's cache, after the keys and values of attention.
const KEYS: usize = 2;

/// A layer's index. Its keys are in the layer's cache.
pub(super) struct BlockIndex {
    spec: Spec,
    pub(super) q: Matrix,
    pub(super) k: Matrix,
    q_norm: Buffer,
    k_norm: Buffer,
}

impl BlockIndex {
    pub(super) fn new(loader: &GpuLoader<'_>, spec: &Spec) -> Result<Self, CudaError> {
        Ok(Self {
            q: loader.linear(&spec.q)?,
            k: loader.linear(&spec.k)?,
            q_norm: loader.vector(spec.q_norm)?,
            k_norm: loader.vector(spec.k_norm)?,
            spec: *spec,
        })
    }

    /// Returns what a token chooses.
    pub(super) fn choice(&self) -> Choice {
        Choice::from(&self.spec)
    }

    /// Returns how many lists a token has.
    pub(super) fn lists(&self) -> usize {
        self.spec.n_head
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
        let (spec, positions) = (&self.spec, buffers.positions.all());
        let (keys, kv_type) = (cache.rows(KEYS), cache.kv_type());
        let (queries, new_keys) = (buffers.index_q.view(), buffers.index_k.view());
        let chooses = parts.iter().any(|part| part.chooses);
        ops.place_heads(&Heads {
            queries,
            new_keys,
            new_values: new_keys,
            norms: HeadNorms {
                queries: Some(self.q_norm.view()),
                keys: Some(self.k_norm.view()),
                eps,
                ..HeadNorms::default()
            },
            turns,
            n_head: if chooses { spec.n_head } else { 0 },
            n_head_kv: 1,
            key_width: spec.key_dim,
            value_width: 0,
            kv_type,
            positions,
            keys,
            values: keys,
        })?;
        let choice = self.choice();
        for Reached { tokens, .. } in parts.iter().filter(|part| part.chooses) {
            let of_tokens = BlockQueries {
                queries: from_value(queries, tokens.start * spec.q.n_out),
                n_head: spec.n_head,
                key_dim: spec.key_dim,
                positions: positions.part(tokens.clone()),
                kv_type,
                keys,
                choice,
                local: match spec.score {
                    BlockScore::Best { local } => local,
                    // Refused when the plan is checked.
                    BlockScore::Mean => 0,
                },
            };
            let first = tokens.start * self.lists() * choice.kept;
            let lists = from_value(buffers.chosen.view(), first);
            ops.choose_blocks(&of_tokens, buffers.ratings.view(), lists)?;
        }
        Ok(())
    }
}
