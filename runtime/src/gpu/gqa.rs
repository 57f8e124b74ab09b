//! Grouped-query attention on a GPU. The arithmetic is that of `layers/gqa.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, product, products};
use super::mixer::{Gate, Mixed, MixerBatch, output};
use crate::layers::device_cache::DeviceCache;
use tier_plan_cuda::ops::{Attend, HeadNorms, Heads, RopeTurns, Strided};
use tier_plan_cuda::{Buffer, CudaError, Ops, View};
use tier_plan_formats::model::spec::{GateFunction, GqaSpec, NormSpan, TensorId};

/// Norms of queries and keys.
struct QkNorms {
    q: Buffer,
    k: Buffer,
    span: NormSpan,
    after_rope: bool,
}

/// Grouped-query attention with its KV cache.
pub(super) struct Gqa {
    spec: GqaSpec,
    gate: Option<Gate>,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    qk_norm: Option<QkNorms>,
    /// Ones, if values are normalized.
    v_norm: Option<Buffer>,
    sinks: Option<Buffer>,
    rope: Option<usize>,
    /// Keys and values.
    cache: DeviceCache,
}

impl Gqa {
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        a: &GqaSpec,
        rope: Option<usize>,
        cache: DeviceCache,
    ) -> Result<Self, CudaError> {
        let ones = |width: usize| Buffer::of_f32(loader.device, &vec![1.0; width]);
        let norm = |weights: Option<TensorId>, heads: usize, span: NormSpan| match weights {
            Some(id) => loader.vector(id),
            None if span == NormSpan::Full => ones(heads * a.key_dim),
            None => ones(a.key_dim),
        };
        let qk_norm = a.qk_norm.map(|of| {
            Ok::<_, CudaError>(QkNorms {
                q: norm(of.q, a.n_head, of.span)?,
                k: norm(of.k, a.n_head_kv, of.span)?,
                span: of.span,
                after_rope: of.after_rope,
            })
        });
        Ok(Self {
            spec: a.clone(),
            gate: Gate::new(loader, a.gate.as_ref())?,
            q: loader.linear(&a.q)?,
            k: loader.linear(&a.k)?,
            v: loader.linear(&a.v)?,
            o: loader.linear(&a.o)?,
            qk_norm: qk_norm.transpose()?,
            v_norm: a.value_norm.then(|| ones(a.value_dim)).transpose()?,
            sinks: loader.opt_vector(a.sinks)?,
            rope,
            cache,
        })
    }

    pub(super) fn takes_quants(&self) -> bool {
        let gate = self.gate.as_ref().map(|gate| &gate.matrix);
        let first = [&self.q, &self.k, &self.v].into_iter().chain(gate);
        first.into_iter().any(Matrix::takes_quants)
    }

    /// Stores the tokens' keys and values, and computes their attention.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        let (a, MixerBatch { n, eps, .. }) = (&self.spec, batch);
        let (x, q, k, v) = (
            buffers.answer.view(),
            buffers.q.view(),
            buffers.k.view(),
            buffers.v.view(),
        );
        let (heads, width) = (n * a.n_head, a.key_dim);
        let gated = a.gated();
        let first = if gated { buffers.raw.view() } else { q };
        products(
            ops,
            &[(&self.q, first), (&self.k, k), (&self.v, v)],
            n,
            x,
            &buffers.quants,
        )?;
        if gated {
            // Each query head is followed by its gate.
            let split = |from: View<'_>, to: &Buffer| {
                let to = Strided {
                    at: to.view(),
                    stride: width,
                };
                ops.copy_rows(
                    Strided {
                        at: from,
                        stride: 2 * width,
                    },
                    heads,
                    width,
                    to,
                )
            };
            split(first, &buffers.q)?;
            split(first.floats(width..first.words()), &buffers.gate)?;
        }
        if let Some(gate) = &self.gate {
            product(
                ops,
                &gate.matrix,
                n,
                x,
                &buffers.quants,
                buffers.gate.view(),
            )?;
        }
        let mut norms = HeadNorms {
            values: self.v_norm.as_ref().map(Buffer::view),
            eps,
            ..HeadNorms::default()
        };
        match &self.qk_norm {
            None => {}
            Some(norm) if norm.span == NormSpan::Head => {
                norms.queries = Some(norm.q.view());
                norms.keys = Some(norm.k.view());
                norms.after_rope = norm.after_rope;
            }
            Some(norm) => {
                ops.rms_norm(q, Some(norm.q.view()), n, a.n_head * width, eps, q)?;
                ops.rms_norm(k, Some(norm.k.view()), n, a.n_head_kv * width, eps, k)?;
            }
        }
        let (kv_type, positions) = (self.cache.kv_type(), buffers.positions.all());
        let (keys, values) = (self.cache.rows(0), self.cache.rows(1));
        ops.place_heads(&Heads {
            queries: q,
            new_keys: k,
            new_values: v,
            norms,
            turns: self
                .rope
                .zip(a.rope.as_ref())
                .map(|(table, rope)| RopeTurns {
                    values: buffers.turns[table].view(),
                    kind: rope.kind,
                    half: rope.dims / 2,
                }),
            n_head: a.n_head,
            n_head_kv: a.n_head_kv,
            key_width: width,
            value_width: a.value_dim,
            kv_type,
            positions,
            keys,
            values,
        })?;
        if a.temperature.is_some() {
            ops.scale_rows(q, buffers.factors.view(), n, a.n_head * width)?;
        }
        let attention = Attend {
            queries: q,
            keys,
            values,
            kv_type,
            n_head_kv: a.n_head_kv,
            group: a.n_head / a.n_head_kv,
            key_width: width,
            value_row_width: a.value_dim,
            value_width: a.value_dim,
            scale: a.scale,
            softcap: a.softcap,
            positions,
            window: a.window,
            window_kind: a.window_kind,
            sinks: self.sinks.as_ref().map(Buffer::view),
        };
        // How many values share a gate, if there are gates. Results are quantized after them.
        let share = match &self.gate {
            Some(gate) => Some((gate.share(a.o.n_in), gate.function)),
            None => gated.then_some((1, GateFunction::Sigmoid)),
        };
        let quantizes = self.o.takes_quants() && share.is_none() && a.value_dim.is_multiple_of(32);
        ops.attend(
            &attention,
            &buffers.attend,
            buffers.mixed.view(),
            quantizes.then_some(&mut buffers.inner),
        )?;
        if let Some((share, function)) = share {
            let (mixed, gate) = (buffers.mixed.view(), buffers.gate.view());
            ops.gate(mixed, gate, share, function, n * a.o.n_in)?;
        }
        let mixed = if quantizes {
            Mixed::Quantized
        } else {
            Mixed::Floats
        };
        output(ops, &self.o, n, buffers, mixed)
    }
}
