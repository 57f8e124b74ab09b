//! Multi-head latent attention (MLA), with the projections to keys and values absorbed.
//!
//! A head's score `q · (K c)` equals `(Kᵀ q) · c`, and its result `Σ w (V c)` equals `V (Σ w c)`.
//! So queries are taken to the space of the latents `c`, all heads attend to the same cached rows,
//! and what they gather is taken back.

use super::attention::{Attention, AttentionParts, attend};
use super::chosen::Chosen;
use super::delta::softplus;
use super::indexer::{self, IndexerScratch};
use super::kv_rows::{LatentRows, RowStore};
use super::mixer::MixerInput;
use super::pooled_index::{self, PooledKeys, PooledScratch};
use super::sparse::{SparseAttention, SparseParts, attend_chosen};
use crate::layers::cpu_context::{CpuContext, add_bias};
use crate::layers::weights::DenseWeights;
use std::cell::RefCell;
use std::ops::Range;
use tier_plan_formats::model::spec::{
    GateFunction, KvUp, Linear, LowRank, MlaSpec, OutputGate, WindowKind,
};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::quant::dequantize_row;
use tier_plan_kernels::{ActView, Activations, Weights, needs_quants};

/// Floats in the space of the latents that are worked on at once: 16 MiB. Larger batches are taken
/// in parts. Few in tests, so that there are several parts.
const MAX_LATENT_VALUES: usize = if cfg!(test) { 512 } else { 4 << 20 };

thread_local! {
    /// A row of a matrix, one buffer per thread.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Buffers of an MLA mixer.
#[derive(Default)]
pub(super) struct MlaScratch {
    /// `[tokens, q_rank]`.
    q_low: Vec<f32>,
    /// `[tokens, q_rank]`: `q_low` after its norm.
    q_normed: Vec<f32>,
    /// `[tokens, n_head, nope_dim + shared_dim]`.
    q: Vec<f32>,
    /// `[tokens, kv_rank + shared_dim]`.
    kv: Vec<f32>,
    /// One row for the cache, `[kv_rank + shared_dim]`.
    row: Vec<f32>,
    /// Gates on the result, `[tokens, n_head or n_head * value_dim]`.
    gate: Vec<f32>,
    indexer: IndexerScratch,
    pooled: PooledScratch,
    /// `[n_head, tokens of a part, nope_dim]`.
    nope: Vec<f32>,
    /// `[n_head, tokens of a part, kv_rank]`.
    latents: Vec<f32>,
    /// `[n_head, tokens of a part, value_dim]`.
    values: Vec<f32>,
    parts: AttentionParts,
    sparse_parts: SparseParts,
    /// `[tokens, n_head, value_dim]`.
    mixed: Vec<f32>,
    /// Activations of rows that are tokens.
    acts: Activations,
    acts_len: usize,
    /// Activations of rows that are heads of tokens.
    head_acts: Activations,
    head_acts_len: usize,
}

/// Returns the tokens of a batch that are worked on at once.
fn part_tokens(spec: &MlaSpec) -> usize {
    (MAX_LATENT_VALUES / (spec.n_head * spec.kv_rank)).max(1)
}

impl MlaScratch {
    /// Grows to batches of `rows` tokens of a layer like `spec`.
    pub(super) fn reserve(&mut self, rows: usize, spec: &MlaSpec) {
        let grow = |buffer: &mut Vec<f32>, len: usize| {
            if buffer.len() < len {
                buffer.resize(len, 0.0);
            }
        };
        let q_low = spec.q_down.map_or(0, |low| low.down.n_out);
        let heads = spec.n_head * part_tokens(spec).min(rows);
        grow(&mut self.q_low, rows * q_low);
        grow(&mut self.q_normed, rows * q_low);
        grow(&mut self.q, rows * spec.q.n_out);
        grow(&mut self.kv, rows * spec.kv_down.n_out);
        grow(&mut self.row, spec.kv_down.n_out);
        grow(
            &mut self.gate,
            rows * gate(spec).map_or(0, |(g, _)| g.n_out),
        );
        match spec.reach.indexer() {
            Some(spec) if spec.pool.is_some() => self.pooled.reserve(rows, spec),
            Some(spec) => self.indexer.reserve(rows, spec),
            None => {}
        }
        grow(&mut self.nope, heads * spec.nope_dim);
        grow(&mut self.latents, heads * spec.kv_rank);
        grow(&mut self.values, heads * spec.value_dim);
        grow(&mut self.mixed, rows * spec.o.n_in);
        let room = |acts: &mut Activations, len: &mut usize, rows: usize, cols: usize| {
            // Rows are padded to 256 values in the 8-bit form.
            let wanted = rows * cols.next_multiple_of(256);
            if *len < wanted {
                *len = wanted;
                *acts = Activations::new(rows, cols.next_multiple_of(256));
            }
        };
        room(
            &mut self.acts,
            &mut self.acts_len,
            rows,
            q_low.max(spec.o.n_in),
        );
        room(
            &mut self.head_acts,
            &mut self.head_acts_len,
            heads,
            spec.nope_dim.max(spec.kv_rank),
        );
    }
}

/// Computes `out = o(attention(x))`, and stores the tokens' latents in the cache. A layer's indexer
/// leaves its choices for later layers in the [`Chosen`].
pub(super) fn run(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &MlaSpec,
    input: &MixerInput<'_>,
    cache: &mut LatentRows,
    (s, chosen): (&mut MlaScratch, &mut Chosen),
    out: &mut [f32],
) {
    let n = input.x.rows();
    project(c, weights, spec, input, s);
    if let (Some(spec), Some(keys)) = (spec.reach.indexer(), &mut cache.index_keys) {
        let input = (input, s.acts.view());
        match &spec.pool {
            Some(pool) => {
                let keys = PooledKeys {
                    keys,
                    open: &mut cache.open,
                };
                let pooled = &mut s.pooled;
                pooled_index::choose(c, weights, (spec, pool), input, keys, pooled, chosen);
            }
            None => indexer::choose(c, weights, spec, input, keys, &mut s.indexer, chosen),
        }
    }
    let latents = &mut cache.latents;
    store_latents(c, weights, spec, input, latents, s);
    let mut first = 0;
    while first < n {
        let last = (first + part_tokens(spec)).min(n);
        attend_part(c, weights, spec, input, first..last, latents, (s, chosen));
        first = last;
    }
    let mixed = &mut s.mixed[..n * spec.o.n_in];
    if let Some((linear, function)) = gate(spec) {
        let gate = &mut s.gate[..n * linear.n_out];
        let width = mixed.len() / gate.len();
        multiply_gates(c, function, gate, mixed, width);
    }
    s.acts.fill_shared(
        c.pool,
        c.kernels,
        n,
        spec.o.n_in,
        mixed,
        needs_quants(weights.ty(spec.o.weight)),
    );
    matmul_all(
        c.pool,
        c.kernels,
        &[MatJob::new(weights.linear(&spec.o), s.acts.view(), out)],
    );
    add_bias(out, weights.bias(&spec.o));
}

/// Returns the matrix of the gates, and what makes factors of them.
fn gate(spec: &MlaSpec) -> Option<(&Linear, GateFunction)> {
    match &spec.gate {
        Some(OutputGate::Separate { linear, function }) => Some((linear, *function)),
        Some(OutputGate::WithQueries) | None => None,
    }
}

/// Multiplies every `width` values of `mixed` by one gate.
fn multiply_gates(
    c: CpuContext<'_>,
    function: GateFunction,
    gate: &mut [f32],
    mixed: &mut [f32],
    width: usize,
) {
    match function {
        GateFunction::Sigmoid => {
            gate.iter_mut().for_each(|g| *g = -*g);
            c.kernels.exp(gate);
            gate.iter_mut().for_each(|g| *g = 1.0 / (1.0 + *g));
        }
        GateFunction::Softplus => gate.iter_mut().for_each(|g| *g = softplus(*g)),
    }
    for (mixed, gate) in mixed.chunks_exact_mut(width).zip(gate) {
        mixed.iter_mut().for_each(|m| *m *= *gate);
    }
}

/// Projects to queries, rotated, in `q`, to latents and shared key parts in `kv`, and to gates.
fn project(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &MlaSpec,
    input: &MixerInput<'_>,
    s: &mut MlaScratch,
) {
    let &MixerInput {
        x,
        rope,
        norm_eps: eps,
        ..
    } = input;
    let n = x.rows();
    let q = &mut s.q[..n * spec.q.n_out];
    let kv = &mut s.kv[..n * spec.kv_down.n_out];
    let gate = gate(spec).map(|(linear, _)| (linear, &mut s.gate[..n * linear.n_out]));
    let mut jobs = vec![MatJob::new(weights.linear(&spec.kv_down), x, kv)];
    if let Some((linear, gate)) = gate {
        jobs.push(MatJob::new(weights.linear(linear), x, gate));
    }
    match &spec.q_down {
        None => {
            jobs.push(MatJob::new(weights.linear(&spec.q), x, q));
            matmul_all(c.pool, c.kernels, &jobs);
            drop(jobs);
        }
        Some(LowRank { down: q_down, norm }) => {
            let rank = q_down.n_out;
            let (low, normed) = (&mut s.q_low[..n * rank], &mut s.q_normed[..n * rank]);
            jobs.push(MatJob::new(weights.linear(q_down), x, low));
            matmul_all(c.pool, c.kernels, &jobs);
            drop(jobs);
            add_bias(low, weights.bias(q_down));
            for (low, normed) in low.chunks_exact(rank).zip(normed.chunks_exact_mut(rank)) {
                c.kernels.rms_norm(low, weights.vector(*norm), eps, normed);
            }
            let mut readers = std::iter::once(&spec.q).chain(spec.reach.indexer().map(|i| &i.q));
            let quantize = readers.any(|l| needs_quants(weights.ty(l.weight)));
            s.acts
                .fill_shared(c.pool, c.kernels, n, rank, normed, quantize);
            matmul_all(
                c.pool,
                c.kernels,
                &[MatJob::new(weights.linear(&spec.q), s.acts.view(), q)],
            );
        }
    }
    add_bias(&mut s.q[..n * spec.q.n_out], weights.bias(&spec.q));
    let kv = &mut s.kv[..n * spec.kv_down.n_out];
    add_bias(kv, weights.bias(&spec.kv_down));
    if let Some((linear, _)) = self::gate(spec) {
        add_bias(&mut s.gate[..n * linear.n_out], weights.bias(linear));
    }
    if let Some(rope) = rope {
        let q = &mut s.q[..n * spec.q.n_out];
        c.pool.for_each_slice(q, spec.q.n_out, |token, row| {
            for head in row.chunks_exact_mut(spec.nope_dim + spec.shared_dim) {
                rope.apply(&mut head[spec.nope_dim..], spec.shared_dim, token);
            }
        });
    }
}

/// Normalizes latents, normalizes and rotates key parts, and stores both in the cache.
fn store_latents(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &MlaSpec,
    input: &MixerInput<'_>,
    cache: &mut RowStore,
    s: &mut MlaScratch,
) {
    let width = spec.kv_down.n_out;
    let row = &mut s.row[..width];
    let by_text = input
        .segments
        .iter()
        .flat_map(|segment| segment.positions().map(|at| (segment.pages, at)));
    for (pages, (token, position)) in by_text {
        let kv = &s.kv[token * width..][..width];
        let (latent, key) = row.split_at_mut(spec.kv_rank);
        c.kernels.rms_norm(
            &kv[..spec.kv_rank],
            weights.vector(spec.kv_norm),
            input.norm_eps,
            latent,
        );
        match spec.shared_norm {
            Some(norm) => {
                let norm = weights.vector(norm);
                c.kernels
                    .rms_norm(&kv[spec.kv_rank..], norm, input.norm_eps, key);
            }
            None => key.copy_from_slice(&kv[spec.kv_rank..]),
        }
        if let Some(rope) = input.rope {
            rope.apply(key, spec.shared_dim, token);
        }
        cache.store(c.kernels, pages, position, row);
    }
}

/// Computes the attention of some of the batch's tokens, from `q` to `mixed`.
fn attend_part(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &MlaSpec,
    input: &MixerInput<'_>,
    tokens: Range<usize>,
    cache: &RowStore,
    (s, chosen): (&mut MlaScratch, &Chosen),
) {
    let n = tokens.len();
    let (rank, nope_dim) = (spec.kv_rank, spec.nope_dim);
    let key_dim = nope_dim + spec.shared_dim;
    let sinks = weights.opt_vector(spec.sinks);
    let q = &s.q[tokens.start * spec.q.n_out..tokens.end * spec.q.n_out];
    let query = |head: usize, token: usize| &q[(token * spec.n_head + head) * key_dim..][..key_dim];
    let latents = &mut s.latents[..spec.n_head * n * rank];
    match spec.kv_up {
        KvUp::Split { k, .. } => {
            let nope = &mut s.nope[..spec.n_head * n * nope_dim];
            for (i, to) in nope.chunks_exact_mut(nope_dim).enumerate() {
                to.copy_from_slice(&query(i / n, i % n)[..nope_dim]);
            }
            s.head_acts.fill_shared(
                c.pool,
                c.kernels,
                spec.n_head * n,
                nope_dim,
                nope,
                needs_quants(weights.ty(k)),
            );
            let k = weights.matrix(k, spec.n_head * rank, nope_dim);
            by_head(c, spec.n_head, s.head_acts.view(), latents, |head| {
                part(k, head * rank, rank)
            });
        }
        KvUp::Fused(kv) => {
            let kv = weights.matrix(kv, spec.n_head * (nope_dim + spec.value_dim), rank);
            c.pool.for_each_slice(latents, n * rank, |head, latents| {
                let keys = part(kv, head * (nope_dim + spec.value_dim), nope_dim);
                latents.fill(0.0);
                ROW.with_borrow_mut(|row| {
                    row.resize(rank, 0.0);
                    for i in 0..nope_dim {
                        let Some(bytes) = keys.row(i) else {
                            unreachable!("as many rows as asked for")
                        };
                        dequantize_row(kv.ty(), bytes, row);
                        for (token, latent) in latents.chunks_exact_mut(rank).enumerate() {
                            let factor = kv.scale() * query(head, token)[i];
                            c.kernels.axpy(factor, row, latent);
                        }
                    }
                });
            });
        }
    }
    for segment in input.segments {
        let rows = segment.rows.start.max(tokens.start)..segment.rows.end.min(tokens.end);
        if rows.is_empty() {
            continue;
        }
        let past = segment.past + rows.start - segment.rows.start;
        // Those that see no more positions than they may choose attend to all.
        let n_dense = spec.reach.selection().map_or(rows.len(), |selection| {
            selection.n_dense().saturating_sub(past).min(rows.len())
        });
        // All heads read the same rows: one head of keys, whose values are the latents at their
        // beginning.
        let attention = Attention {
            keys: cache,
            values: cache,
            pages: segment.pages,
            value_width: rank,
            n_head_kv: 1,
            group: spec.n_head,
            tokens: n_dense,
            past,
            window: spec.reach.window(),
            window_kind: WindowKind::Sliding,
            softcap: None,
        };
        let first = rows.start - tokens.start;
        let absorbed = &*latents;
        let query_row = |head: usize, t: usize, to: &mut [f32]| {
            let scale = spec.scale * spec.temperature.map_or(1.0, |temper| temper.at(past + t));
            let row = absorbed[(head * n + first + t) * rank..][..rank]
                .iter()
                .chain(&query(head, first + t)[nope_dim..]);
            to.iter_mut().zip(row).for_each(|(to, q)| *to = scale * q);
        };
        if n_dense > 0 {
            attend(c, &attention, query_row, &mut s.parts);
        }
        if n_dense < rows.len() {
            let of_batch = input.first_row + rows.start + n_dense..input.first_row + rows.end;
            let attention = SparseAttention {
                rows: cache,
                pages: segment.pages,
                value_width: rank,
                n_head: spec.n_head,
                chosen: chosen.of(of_batch),
            };
            let query_row =
                |head: usize, t: usize, to: &mut [f32]| query_row(head, n_dense + t, to);
            attend_chosen(c, &attention, query_row, &mut s.sparse_parts);
        }
        let (dense, sparse) = (&s.parts, &s.sparse_parts);
        c.pool.for_each_slice(latents, rank, |i, latent| {
            let (head, token) = (i / n, i % n);
            let sink = sinks.map(|sinks| sinks[head]);
            match token.checked_sub(first) {
                Some(t) if t < n_dense => dense.result(c.kernels, head, t, sink, latent),
                Some(t) if t < rows.len() => {
                    sparse.result(c.kernels, (head, t - n_dense), sink, latent);
                }
                _ => {}
            }
        });
    }
    let (v, first, stride) = match spec.kv_up {
        KvUp::Split { v, .. } => (v, 0, spec.value_dim),
        KvUp::Fused(kv) => (kv, nope_dim, nope_dim + spec.value_dim),
    };
    let values = &mut s.values[..spec.n_head * n * spec.value_dim];
    s.head_acts.fill_shared(
        c.pool,
        c.kernels,
        spec.n_head * n,
        rank,
        latents,
        needs_quants(weights.ty(v)),
    );
    let v = weights.matrix(v, spec.n_head * stride, rank);
    by_head(c, spec.n_head, s.head_acts.view(), values, |head| {
        part(v, head * stride + first, spec.value_dim)
    });
    let mixed = &mut s.mixed[tokens.start * spec.o.n_in..tokens.end * spec.o.n_in];
    for (i, to) in mixed.chunks_exact_mut(spec.value_dim).enumerate() {
        let (token, head) = (i / spec.n_head, i % spec.n_head);
        to.copy_from_slice(&values[(head * n + token) * spec.value_dim..][..spec.value_dim]);
    }
}

/// Multiplies each head's rows of `x`, `[n_head, tokens, _]`, by its own matrix into `out`,
/// `[n_head, tokens, _]`.
fn by_head<'a>(
    c: CpuContext<'_>,
    n_head: usize,
    x: ActView<'_>,
    out: &mut [f32],
    matrix: impl Fn(usize) -> Weights<'a>,
) {
    let n = x.rows() / n_head;
    let len = out.len() / n_head;
    let job = |(head, out)| MatJob::new(matrix(head), x.rows_range(head * n..(head + 1) * n), out);
    let jobs: Vec<MatJob<'_>> = out.chunks_exact_mut(len).enumerate().map(job).collect();
    matmul_all(c.pool, c.kernels, &jobs);
}

/// Returns `count` rows of a matrix.
fn part(w: Weights<'_>, first: usize, count: usize) -> Weights<'_> {
    w.rows(first..first + count)
        .unwrap_or_else(|| unreachable!("shapes are checked when the model is described"))
}

#[cfg(test)]
mod tests;
