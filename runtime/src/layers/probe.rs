//! A benchmark hook: one layer's attention over a filled KV cache, apart from the rest of a
//! network.

use super::attention::{Attention, AttentionParts, attend};
use super::kv_rows::RowStore;
use super::pages::{PageIdx, pages_for};
use crate::layers::cpu_context::CpuContext;
use tier_plan_formats::model::kv::KvType;
use tier_plan_kernels::Kernels;
use tier_plan_kernels::threads::ThreadPool;

/// Sizes of a layer's attention.
#[derive(Debug, Clone, Copy)]
pub struct AttentionSizes {
    /// Query heads.
    pub n_head: usize,
    /// KV heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Values per head.
    pub dim: usize,
    /// Tokens in the KV cache, the batch's own included.
    pub context: usize,
    /// Tokens of the batch, at the end of the context.
    pub tokens: usize,
}

/// A layer's KV cache full of noise, and queries to it.
pub struct AttentionProbe {
    pool: ThreadPool,
    kernels: Kernels,
    sizes: AttentionSizes,
    keys: RowStore,
    values: RowStore,
    pages: Vec<PageIdx>,
    queries: Vec<f32>,
    parts: AttentionParts,
    mixed: Vec<f32>,
}

impl AttentionProbe {
    /// Makes a full KV cache and the queries of a batch.
    pub fn new(kv_type: KvType, threads: usize, kernels: Kernels, sizes: AttentionSizes) -> Self {
        let AttentionSizes {
            n_head,
            n_head_kv,
            dim,
            context,
            tokens,
        } = sizes;
        let pages: Vec<PageIdx> = (0..pages_for(context) as PageIdx).collect();
        let store = |seed: u64| {
            let mut rows = RowStore::new(kv_type, n_head_kv, context, dim);
            for position in 0..context {
                rows.store(
                    kernels,
                    &pages,
                    position,
                    &noise(seed + position as u64, n_head_kv * dim),
                );
            }
            rows
        };
        Self {
            pool: ThreadPool::new(threads),
            kernels,
            sizes,
            keys: store(1),
            values: store(1 << 32),
            pages,
            queries: noise(0, tokens * n_head * dim),
            parts: AttentionParts::default(),
            mixed: vec![0.0; tokens * n_head * dim],
        }
    }

    /// Computes the attention of the batch, `[tokens, n_head, dim]`.
    pub fn run(&mut self) -> &[f32] {
        let AttentionSizes {
            n_head,
            n_head_kv,
            dim,
            context,
            tokens,
        } = self.sizes;
        let c = CpuContext {
            pool: &self.pool,
            kernels: self.kernels,
        };
        let attention = Attention {
            keys: &self.keys,
            values: &self.values,
            pages: &self.pages,
            value_width: dim,
            n_head_kv,
            group: n_head / n_head_kv,
            tokens,
            past: context - tokens,
            window: None,
            window_kind: Default::default(),
            softcap: None,
        };
        let queries = &self.queries;
        let query = |head: usize, token: usize, to: &mut [f32]| {
            to.copy_from_slice(&queries[(token * n_head + head) * dim..][..dim]);
        };
        attend(c, &attention, query, &mut self.parts);
        let parts = &self.parts;
        let group = n_head / n_head_kv;
        c.pool
            .for_each_slice(&mut self.mixed, group * dim, |item, mixed| {
                for (g, mixed) in mixed.chunks_exact_mut(dim).enumerate() {
                    parts.result(
                        c.kernels,
                        item % n_head_kv * group + g,
                        item / n_head_kv,
                        None,
                        mixed,
                    );
                }
            });
        &self.mixed
    }
}

/// Returns numbers from -1 to 1 that the seed decides.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}
