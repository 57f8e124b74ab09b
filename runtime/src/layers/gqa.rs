//! Grouped-query attention (GQA), causal, over the KV cache.

use super::attend_runs::{Run, RunShape, attend_runs};
use super::attention::{Attention, AttentionParts, attend};
use super::block_index::{Index, IndexScratch};
use super::kv_rows::{KeyValues, RowStore};
use super::mixer::{MixerInput, Segment};
use crate::layers::cpu_context::{CpuContext, add_bias};
use crate::layers::weights::DenseWeights;
use tier_plan_formats::model::spec::{
    GateFunction, GqaSpec, NormSpan, OutputGate, QkNorm, TensorId,
};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{ActView, Activations, needs_quants};

/// Buffers of a GQA mixer.
#[derive(Default)]
pub(super) struct GqaScratch {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    /// Of the output gates, `[tokens, gate_width]`: `e^-g` of gates `g` that come with queries, the
    /// factors of others.
    gate: Vec<f32>,
    norm: Vec<f32>,
    index: IndexScratch,
    parts: AttentionParts,
    acts: Option<Activations>,
    acts_width: usize,
}

impl GqaScratch {
    /// Returns where `n` rows go that are projected elsewhere.
    pub(super) fn projected(&mut self, n: usize, spec: &GqaSpec) -> ProjectedRows<'_> {
        ProjectedRows {
            q: &mut self.q[..n * spec.q.n_out],
            k: &mut self.k[..n * spec.k.n_out],
            v: &mut self.v[..n * spec.v.n_out],
            gate: &mut self.gate[..n * spec.separate_gates()],
        }
    }

    /// Grows to batches of `rows` tokens of a layer like `spec`.
    pub(super) fn reserve(&mut self, rows: usize, spec: &GqaSpec) {
        let grow = |buffer: &mut Vec<f32>, len: usize| {
            if buffer.len() < len {
                buffer.resize(len, 0.0);
            }
        };
        grow(&mut self.q, rows * spec.q.n_out);
        grow(&mut self.k, rows * spec.k.n_out);
        grow(&mut self.v, rows * spec.v.n_out);
        grow(&mut self.mixed, rows * spec.o.n_in);
        grow(&mut self.gate, rows * gate_width(spec));
        let widest = spec.q.n_out.max(spec.k.n_out).max(spec.v.n_out);
        grow(&mut self.norm, widest);
        if let Some(index) = &spec.index {
            self.index.reserve(rows, index);
        }
        if self.acts_width < spec.o.n_in {
            self.acts_width = spec.o.n_in;
            self.acts = Some(Activations::new(rows, spec.o.n_in));
        }
    }
}

/// What the matrices before attention make of a batch's rows, to be written by what has them.
pub(crate) struct ProjectedRows<'a> {
    /// `[rows, q.n_out]`: queries, or each head's query with its gate.
    pub(crate) q: &'a mut [f32],
    /// `[rows, k.n_out]`
    pub(crate) k: &'a mut [f32],
    /// `[rows, v.n_out]`
    pub(crate) v: &'a mut [f32],
    /// `[rows, gates]`: gates that have a matrix of their own; else empty.
    pub(crate) gate: &'a mut [f32],
}

/// The cache of a layer, and the keys of its index where it has one.
pub(super) struct GqaCache<'a> {
    pub kv: &'a mut KeyValues,
    pub index: Option<&'a mut RowStore>,
}

/// Computes `out = o(attention(q x, k x, v x))`, and stores the tokens' keys and values in the
/// cache: the layer's own, or that of the layer whose keys and values it shares.
pub(super) fn run(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &GqaSpec,
    input: &MixerInput<'_>,
    cache: GqaCache<'_>,
    s: &mut GqaScratch,
    out: &mut [f32],
) {
    let n = input.x.rows();
    project(c, weights, spec, input.x, s);
    attend_to_cache(c, weights, spec, (input, n), cache, s);
    let mixed = &s.mixed[..n * spec.o.n_in];
    let Some(acts) = &mut s.acts else {
        unreachable!("reserved at load")
    };
    acts.fill_shared(
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
        &[MatJob::new(weights.linear(&spec.o), acts.view(), out)],
    );
    add_bias(out, weights.bias(&spec.o));
}

/// Computes the attention of `n` rows that were [projected](GqaScratch::projected) elsewhere, and
/// stores their keys and values. Returns what the last matrix takes, `[rows, o.n_in]`.
pub(super) fn attend_projected<'s>(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &GqaSpec,
    (input, n): (&MixerInput<'_>, usize),
    cache: &mut KeyValues,
    s: &'s mut GqaScratch,
) -> &'s [f32] {
    open_gate_values(c, spec, n, s);
    let cache = GqaCache {
        kv: cache,
        index: None,
    };
    attend_to_cache(c, weights, spec, (input, n), cache, s);
    &s.mixed[..n * spec.o.n_in]
}

/// Computes the attention of `n` projected rows into `s.mixed`, under their gates, and stores their
/// keys and values.
fn attend_to_cache(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &GqaSpec,
    (input, n): (&MixerInput<'_>, usize),
    cache: GqaCache<'_>,
    s: &mut GqaScratch,
) {
    let GqaCache {
        kv: cache,
        index: index_keys,
    } = cache;
    place_heads(c, weights, spec, input, cache, s);
    let index = spec.index.as_ref().zip(index_keys).map(|(spec, keys)| {
        let index = Index {
            c,
            weights,
            spec,
            norm_eps: input.norm_eps,
            rope: input.rope,
        };
        index.store(input, keys, &mut s.index);
        (index, &*keys)
    });
    let q = &s.q[..n * spec.q.n_out];
    let gate = &s.gate[..n * gate_width(spec)];
    let mixed = &mut s.mixed[..n * spec.o.n_in];
    for segment in input.segments {
        let rows = &segment.rows;
        let gate = &gate[rows.start * gate_width(spec)..rows.end * gate_width(spec)];
        let sinks = weights.opt_vector(spec.sinks);
        let mixed = &mut mixed[rows.start * spec.o.n_in..rows.end * spec.o.n_in];
        if let Some((index, keys)) = &index {
            index.choose(segment, keys, &mut s.index);
            let chosen = (*index, s.index.chosen());
            attend_chosen(c, spec, segment, (q, cache), chosen, sinks, mixed);
            open_gates(c, spec, gate, mixed);
            continue;
        }
        attend_segment(c, spec, segment, q, cache, &mut s.parts);
        gather(c, spec, &s.parts, sinks, gate, mixed);
    }
}

/// Computes queries, keys, values and gates. Gates that come with queries become `e^-g`, others
/// the factors on the result.
fn project(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &GqaSpec,
    x: ActView<'_>,
    s: &mut GqaScratch,
) {
    let n = x.rows();
    let q = &mut s.q[..n * spec.q.n_out];
    let gate = &mut s.gate[..n * gate_width(spec)];
    let (mut k, mut v): (&mut [f32], &mut [f32]) = (&mut [], &mut []);
    let mut jobs = vec![MatJob::new(weights.linear(&spec.q), x, q)];
    if spec.shared_kv.is_none() {
        (k, v) = (&mut s.k[..n * spec.k.n_out], &mut s.v[..n * spec.v.n_out]);
        jobs.push(MatJob::new(weights.linear(&spec.k), x, k));
        if !spec.keys_are_values() {
            jobs.push(MatJob::new(weights.linear(&spec.v), x, v));
        }
    }
    if let Some(OutputGate::Separate { linear, .. }) = &spec.gate {
        jobs.push(MatJob::new(weights.linear(linear), x, gate));
    }
    matmul_all(c.pool, c.kernels, &jobs);
    drop(jobs);
    add_bias(q, weights.bias(&spec.q));
    if spec.shared_kv.is_none() {
        add_bias(k, weights.bias(&spec.k));
        if spec.keys_are_values() {
            v.copy_from_slice(k);
        } else {
            add_bias(v, weights.bias(&spec.v));
        }
    }
    if let Some(OutputGate::Separate { linear, .. }) = &spec.gate {
        add_bias(gate, weights.bias(linear));
    }
    open_gate_values(c, spec, n, s);
}

/// Makes of the gates of `n` projected rows what results are put under: `e^-g` of gates that come
/// with queries, which are taken from between those; the factors of others.
fn open_gate_values(c: CpuContext<'_>, spec: &GqaSpec, n: usize, s: &mut GqaScratch) {
    let q = &mut s.q[..n * spec.q.n_out];
    let gate = &mut s.gate[..n * gate_width(spec)];
    match &spec.gate {
        None => {}
        Some(OutputGate::WithQueries) => {
            take_gates(q, gate, spec.q.n_out, spec.key_dim);
            gate.iter_mut().for_each(|g| *g = -*g);
            c.kernels.exp(gate);
        }
        Some(OutputGate::Separate { function, .. }) => match function {
            GateFunction::Sigmoid => gate.iter_mut().for_each(|g| *g = 1.0 / (1.0 + (-*g).exp())),
            GateFunction::Softplus => gate.iter_mut().for_each(|g| *g = softplus(*g)),
        },
    }
}

/// Normalizes and rotates queries and keys, and stores keys and values in the cache.
fn place_heads(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &GqaSpec,
    input: &MixerInput<'_>,
    cache: &mut KeyValues,
    s: &mut GqaScratch,
) {
    let eps = input.norm_eps;
    let (before, after) = match spec.qk_norm {
        Some(norm) if norm.after_rope => (None, Some(norm)),
        norm => (norm, None),
    };
    let weights_of = |id| weights.opt_vector(id).unwrap_or(&[]);
    let by_text = input
        .segments
        .iter()
        .flat_map(|segment| segment.positions().map(|at| (segment.pages, at)));
    for (pages, (t, position)) in by_text {
        let mut place = |row: &mut [f32], of: fn(&QkNorm) -> Option<TensorId>| {
            let mut normalize = |norm: Option<QkNorm>, row: &mut [f32]| {
                if let Some(norm) = norm {
                    let width = match norm.span {
                        NormSpan::Head => spec.key_dim,
                        NormSpan::Full => row.len(),
                    };
                    norm_heads(c, row, weights_of(of(&norm)), width, eps, &mut s.norm);
                }
            };
            normalize(before, row);
            if let Some(rope) = input.rope {
                rope.apply(row, spec.key_dim, t);
            }
            normalize(after, row);
        };
        let q = &mut s.q[t * spec.q.n_out..][..spec.n_head * spec.key_dim];
        place(q, |norm| norm.q);
        if spec.shared_kv.is_some() {
            continue;
        }
        let k = &mut s.k[t * spec.k.n_out..][..spec.k.n_out];
        place(k, |norm| norm.k);
        cache.keys.store(c.kernels, pages, position, k);
        let v = &mut s.v[t * spec.v.n_out..][..spec.v.n_out];
        if spec.value_norm {
            norm_heads(c, v, &[], spec.value_dim, eps, &mut s.norm);
        }
        cache.values.store(c.kernels, pages, position, v);
    }
}

/// Returns the gates per token.
fn gate_width(spec: &GqaSpec) -> usize {
    if spec.gated() {
        spec.o.n_in
    } else {
        spec.separate_gates()
    }
}

/// Returns `ln(1 + eˣ)`, which is `x` to the last bit where `eˣ` could overflow.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// Computes the attention of the rows of one text into `parts`; `q` has those of the batch.
fn attend_segment(
    c: CpuContext<'_>,
    spec: &GqaSpec,
    segment: &Segment<'_>,
    q: &[f32],
    cache: &KeyValues,
    parts: &mut AttentionParts,
) {
    let attention = Attention {
        keys: &cache.keys,
        values: &cache.values,
        pages: segment.pages,
        value_width: spec.value_dim,
        n_head_kv: spec.n_head_kv,
        group: spec.n_head / spec.n_head_kv,
        tokens: segment.rows.len(),
        past: segment.past,
        window: spec.window,
        window_kind: spec.window_kind,
        softcap: spec.softcap,
    };
    let query = |head: usize, t: usize, to: &mut [f32]| {
        let row = segment.rows.start + t;
        let query = &q[row * spec.q.n_out + head * spec.key_dim..][..spec.key_dim];
        let growth = spec
            .temperature
            .map_or(1.0, |t| t.at(segment.past + row - segment.rows.start));
        let factor = spec.scale * growth;
        to.iter_mut()
            .zip(query)
            .for_each(|(to, q)| *to = factor * q);
    };
    attend(c, &attention, query, parts);
}

/// Writes what the heads of some rows have found, `[rows, n_head * value_dim]`, each value under
/// its gate where there are gates.
fn gather(
    c: CpuContext<'_>,
    spec: &GqaSpec,
    parts: &AttentionParts,
    sinks: Option<&[f32]>,
    gate: &[f32],
    mixed: &mut [f32],
) {
    let group = spec.n_head / spec.n_head_kv;
    c.pool
        .for_each_slice(mixed, group * spec.value_dim, |item, mixed| {
            let (t, kv_head) = (item / spec.n_head_kv, item % spec.n_head_kv);
            for (g, mixed) in mixed.chunks_exact_mut(spec.value_dim).enumerate() {
                let head = kv_head * group + g;
                parts.result(c.kernels, head, t, sinks.map(|s| s[head]), mixed);
            }
            open_gate(spec, gate, item, mixed);
        });
}

/// Puts what the heads of some rows have found, `[rows, n_head * value_dim]`, under its gates.
fn open_gates(c: CpuContext<'_>, spec: &GqaSpec, gate: &[f32], mixed: &mut [f32]) {
    let width = spec.n_head / spec.n_head_kv * spec.value_dim;
    c.pool.for_each_slice(mixed, width, |item, mixed| {
        open_gate(spec, gate, item, mixed)
    });
}

/// Puts the values of a token's KV head, the `item`th of all, under their gates.
fn open_gate(spec: &GqaSpec, gate: &[f32], item: usize, mixed: &mut [f32]) {
    match &spec.gate {
        None => {}
        Some(OutputGate::WithQueries) => {
            let gate = &gate[item * mixed.len()..][..mixed.len()];
            mixed.iter_mut().zip(gate).for_each(|(m, g)| *m /= 1.0 + g);
        }
        Some(OutputGate::Separate { linear, .. }) => {
            // As many gates as heads, or as values.
            let values = spec.o.n_in / linear.n_out;
            let n = mixed.len() / values;
            let gates = &gate[item * n..][..n];
            for (mixed, gate) in mixed.chunks_exact_mut(values).zip(gates) {
                mixed.iter_mut().for_each(|m| *m *= gate);
            }
        }
    }
}

/// Computes the attention of the rows of one text to the blocks that they have chosen, `[rows,
/// n_head * value_dim]`; `q` has the queries of the batch.
fn attend_chosen<'a>(
    c: CpuContext<'_>,
    spec: &GqaSpec,
    segment: &'a Segment<'a>,
    (q, cache): (&[f32], &'a KeyValues),
    (index, chosen): (Index<'_>, &[Vec<u32>]),
    sinks: Option<&[f32]>,
    mixed: &mut [f32],
) {
    let shape = RunShape {
        n_head_kv: spec.n_head_kv,
        group: spec.n_head / spec.n_head_kv,
        key_width: spec.key_dim,
        value_width: spec.value_dim,
    };
    let runs = |token: usize, kv_head: usize, runs: &mut Vec<Run<'a>>| {
        index.runs(segment, (token, kv_head), cache, chosen, runs);
    };
    let query = |head: usize, t: usize, to: &mut [f32]| {
        let row = segment.rows.start + t;
        let query = &q[row * spec.q.n_out + head * spec.key_dim..][..spec.key_dim];
        to.iter_mut()
            .zip(query)
            .for_each(|(to, q)| *to = spec.scale * q);
    };
    attend_runs(c, shape, runs, query, sinks, mixed);
}

/// Splits rows of `width` values into heads, moved together at the rows' beginnings, and the gate
/// that follows each. Where `gate` is empty there are no gates.
fn take_gates(q: &mut [f32], gate: &mut [f32], width: usize, key_dim: usize) {
    if gate.is_empty() {
        return;
    }
    for (row, gate) in q
        .chunks_exact_mut(width)
        .zip(gate.chunks_exact_mut(width / 2))
    {
        for (head, gate) in gate.chunks_exact_mut(key_dim).enumerate() {
            let at = 2 * head * key_dim;
            gate.copy_from_slice(&row[at + key_dim..][..key_dim]);
            row.copy_within(at..at + key_dim, head * key_dim);
        }
    }
}

/// Normalizes every `width` values of a row; without weights where there are none.
fn norm_heads(
    c: CpuContext<'_>,
    row: &mut [f32],
    weight: &[f32],
    width: usize,
    eps: f32,
    scratch: &mut [f32],
) {
    for head in row.chunks_exact_mut(width) {
        let scratch = &mut scratch[..width];
        scratch.copy_from_slice(head);
        c.kernels.rms_norm(scratch, weight, eps, head);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_part_from_their_heads() {
        // Two tokens, three heads of two values, each with its gate after it.
        let mut q: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let mut gate = vec![-1.0; 12];
        take_gates(&mut q, &mut gate, 12, 2);
        assert_eq!(q[..6], [0.0, 1.0, 4.0, 5.0, 8.0, 9.0]);
        assert_eq!(q[12..18], [12.0, 13.0, 16.0, 17.0, 20.0, 21.0]);
        assert_eq!(
            gate,
            [
                2.0, 3.0, 6.0, 7.0, 10.0, 11.0, 14.0, 15.0, 18.0, 19.0, 22.0, 23.0
            ]
        );
        let plain = q.clone();
        take_gates(&mut q, &mut [], 12, 2);
        assert_eq!(q, plain);
    }
}
