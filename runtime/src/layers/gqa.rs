//! Grouped-query attention (GQA), causal, over the KV cache.

use super::attention::{Attention, AttentionParts, attend};
use super::kv_rows::KeyValues;
use super::mixer::{MixerInput, Segment};
use crate::layers::cpu_context::{CpuContext, add_bias};
use crate::layers::weights::DenseWeights;
use tier_plan_formats::model::spec::{GqaSpec, NormSpan};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{Activations, needs_quants};

/// Buffers of a GQA mixer.
#[derive(Default)]
pub(super) struct GqaScratch {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    mixed: Vec<f32>,
    /// `e^-g` of the output gate `g`, `[tokens, n_head * key_dim]`.
    gate: Vec<f32>,
    norm: Vec<f32>,
    parts: AttentionParts,
    acts: Option<Activations>,
    acts_width: usize,
}

impl GqaScratch {
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
        if spec.gated {
            grow(&mut self.gate, rows * spec.o.n_in);
        }
        grow(&mut self.norm, spec.q.n_out.max(spec.k.n_out));
        if self.acts_width < spec.o.n_in {
            self.acts_width = spec.o.n_in;
            self.acts = Some(Activations::new(rows, spec.o.n_in));
        }
    }
}

/// Computes `out = o(attention(q x, k x, v x))`, and stores the tokens' keys and values in the
/// cache.
pub(super) fn run(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &GqaSpec,
    input: &MixerInput<'_>,
    cache: &mut KeyValues,
    s: &mut GqaScratch,
    out: &mut [f32],
) {
    let &MixerInput {
        x,
        segments,
        rope,
        norm_eps: eps,
    } = input;
    let n = x.rows();
    let q = &mut s.q[..n * spec.q.n_out];
    let k = &mut s.k[..n * spec.k.n_out];
    let v = &mut s.v[..n * spec.v.n_out];
    let jobs = [
        MatJob::new(weights.linear(&spec.q), x, q),
        MatJob::new(weights.linear(&spec.k), x, k),
        MatJob::new(weights.linear(&spec.v), x, v),
    ];
    matmul_all(c.pool, c.kernels, &jobs);
    add_bias(q, weights.bias(&spec.q));
    add_bias(k, weights.bias(&spec.k));
    add_bias(v, weights.bias(&spec.v));
    let gate: &mut [f32] = if spec.gated {
        &mut s.gate[..n * spec.o.n_in]
    } else {
        &mut []
    };
    take_gates(q, gate, spec.q.n_out, spec.key_dim);
    gate.iter_mut().for_each(|g| *g = -*g);
    c.kernels.exp(gate);
    let by_text = segments
        .iter()
        .flat_map(|segment| segment.positions().map(|at| (segment.pages, at)));
    for (pages, (t, position)) in by_text {
        let q = &mut q[t * spec.q.n_out..][..spec.n_head * spec.key_dim];
        let k = &mut k[t * spec.k.n_out..][..spec.k.n_out];
        if let Some(norm) = spec.qk_norm {
            norm_heads(c, q, weights.vector(norm.q), eps, norm.span, &mut s.norm);
            norm_heads(c, k, weights.vector(norm.k), eps, norm.span, &mut s.norm);
        }
        if let Some(rope) = rope {
            rope.apply(q, spec.key_dim, t);
            rope.apply(k, spec.key_dim, t);
        }
        cache.keys.store(c.kernels, pages, position, k);
        let v = &v[t * spec.v.n_out..][..spec.v.n_out];
        cache.values.store(c.kernels, pages, position, v);
    }
    let (q, gate) = (&*q, &*gate);
    let mixed = &mut s.mixed[..n * spec.o.n_in];
    for segment in segments {
        let rows = segment.rows.start * spec.o.n_in..segment.rows.end * spec.o.n_in;
        let gate = if spec.gated {
            &gate[rows.clone()]
        } else {
            gate
        };
        let sinks = weights.opt_vector(spec.sinks);
        attend_segment(c, spec, segment, q, cache, &mut s.parts);
        gather(c, spec, &s.parts, sinks, gate, &mut mixed[rows]);
    }
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
    };
    let query = |head: usize, t: usize, to: &mut [f32]| {
        let row = segment.rows.start + t;
        let query = &q[row * spec.q.n_out + head * spec.key_dim..][..spec.key_dim];
        to.iter_mut()
            .zip(query)
            .for_each(|(to, q)| *to = spec.scale * q);
    };
    attend(c, &attention, query, parts);
}

/// Writes what the heads of some rows have found, `[rows, n_head * value_dim]`, each divided by
/// one plus its value of `gate` where there are gates.
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
            if spec.gated {
                let gate = &gate[item * mixed.len()..][..mixed.len()];
                mixed.iter_mut().zip(gate).for_each(|(m, g)| *m /= 1.0 + g);
            }
        });
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

fn norm_heads(
    c: CpuContext<'_>,
    row: &mut [f32],
    weight: &[f32],
    eps: f32,
    span: NormSpan,
    scratch: &mut [f32],
) {
    let width = match span {
        NormSpan::Head => weight.len(),
        NormSpan::Full => row.len(),
    };
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
