//! Grouped-query attention on a GPU. The arithmetic is that of `layers/gqa.rs`.

use super::block_index::BlockIndex;
use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, from_value, product, products};
use super::mixer::{Gate, Mixed, MixerBatch, output};
use crate::layers::device_cache::DeviceCache;
use tier_plan_cuda::ops::{
    Attend, ChosenBlocks, HeadNorms, Heads, Positions, Reached, RopeTurns, Strided,
};
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
    /// Matrices of keys and values, unless the layer reads those of another.
    kv: Option<[Matrix; 2]>,
    o: Matrix,
    qk_norm: Option<QkNorms>,
    /// Ones, if values are normalized.
    v_norm: Option<Buffer>,
    sinks: Option<Buffer>,
    rope: Option<usize>,
    index: Option<BlockIndex>,
    /// Keys and values, and the index's keys.
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
        let index = a.index.as_ref();
        let index = index.map(|index| BlockIndex::new(loader, index, a.rope.as_ref().zip(rope)));
        Ok(Self {
            spec: a.clone(),
            index: index.transpose()?,
            gate: Gate::new(loader, a.gate.as_ref())?,
            q: loader.linear(&a.q)?,
            kv: match a.shared_kv {
                Some(_) => None,
                None => Some([loader.linear(&a.k)?, loader.linear(&a.v)?]),
            },
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
        let first = std::iter::once(&self.q).chain(self.kv.iter().flatten());
        let first = first.chain(gate);
        let index = self.index.iter().flat_map(|index| [&index.q, &index.k]);
        first.chain(index).any(Matrix::takes_quants)
    }

    /// Stores the tokens' keys and values, and computes their attention.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        let (a, MixerBatch { n, eps, .. }) = (&self.spec, batch);
        let mut parts = Vec::new();
        if let Some(index) = &self.index {
            parts = buffers.positions.all().by_reach(index.choice());
        }
        let chooses = parts.iter().any(|part| part.chooses);
        self.project(ops, buffers, n, chooses)?;
        let turns = self
            .rope
            .zip(a.rope.as_ref())
            .map(|(table, rope)| RopeTurns {
                values: buffers.turns[table].view(),
                kind: rope.kind,
                half: rope.dims / 2,
            });
        self.place(ops, buffers, turns, batch)?;
        if let Some(index) = &self.index {
            index.run(ops, buffers, &self.cache, &parts, (turns, eps))?;
        }
        // How many values share a gate, if there are gates. Results are quantized after them.
        let share = match &self.gate {
            Some(gate) => Some((gate.share(a.o.n_in), gate.function)),
            None => a.gated().then_some((1, GateFunction::Sigmoid)),
        };
        let quantizes =
            self.o.takes_quants() && share.is_none() && a.value_dim.is_multiple_of(32) && !chooses;
        if chooses {
            self.attend_by_choice(ops, buffers, &parts)?;
        } else {
            let quants = quantizes.then_some(&mut buffers.inner);
            let attention = self.attention(buffers.q.view(), buffers.positions.all());
            ops.attend(&attention, &buffers.attend, buffers.mixed.view(), quants)?;
        }
        if let Some((share, function)) = share {
            let (mixed, gate) = (buffers.mixed.view(), buffers.gate.view());
            ops.gate(mixed, gate, share, function, n * a.o.n_in)?;
        }
        output(ops, &self.o, n, buffers, Mixed::quantized_if(quantizes))
    }

    /// Projects to queries, keys, values, and gates; for an index to keys, and, where a token
    /// `chooses`, to queries.
    fn project(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        n: usize,
        chooses: bool,
    ) -> Result<(), CudaError> {
        let (a, x, q) = (&self.spec, buffers.answer.view(), buffers.q.view());
        let gated = a.gated();
        let first = if gated { buffers.raw.view() } else { q };
        let (k, v) = (buffers.k.view(), buffers.v.view());
        let mut matrices = vec![(&self.q, first)];
        if let Some([of_keys, of_values]) = &self.kv {
            matrices.extend([(of_keys, k), (of_values, v)]);
        }
        if let Some(index) = &self.index {
            matrices.push((&index.k, buffers.index_k.view()));
            if chooses {
                matrices.push((&index.q, buffers.index_q.view()));
            }
        }
        products(ops, &matrices, n, x, &buffers.quants)?;
        if gated {
            // Each query head is followed by its gate.
            let (heads, width) = (n * a.n_head, a.key_dim);
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
            split(from_value(first, width), &buffers.gate)?;
        }
        let Some(gate) = &self.gate else {
            return Ok(());
        };
        let to = buffers.gate.view();
        product(ops, &gate.matrix, n, x, &buffers.quants, to)
    }

    /// Normalizes and rotates heads, and stores keys and values.
    fn place(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        turns: Option<RopeTurns<'_>>,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        let (a, MixerBatch { n, eps, .. }) = (&self.spec, batch);
        let (q, k, width) = (buffers.q.view(), buffers.k.view(), a.key_dim);
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
                if self.kv.is_some() {
                    ops.rms_norm(k, Some(norm.k.view()), n, a.n_head_kv * width, eps, k)?;
                }
            }
        }
        ops.place_heads(&Heads {
            queries: q,
            new_keys: k,
            new_values: buffers.v.view(),
            norms,
            turns,
            n_head: a.n_head,
            // What another layer has stored is there.
            n_head_kv: self.kv.as_ref().map_or(0, |_| a.n_head_kv),
            key_width: width,
            value_width: a.value_dim,
            kv_type: self.cache.kv_type(),
            positions: buffers.positions.all(),
            keys: self.cache.rows(0),
            values: self.cache.rows(1),
        })?;
        if a.temperature.is_some() {
            ops.scale_rows(q, buffers.factors.view(), n, a.n_head * width)?;
        }
        Ok(())
    }

    /// Returns the attention of tokens to all that they see.
    fn attention<'a>(&'a self, queries: View<'a>, positions: Positions<'a>) -> Attend<'a> {
        let a = &self.spec;
        Attend {
            queries,
            keys: self.cache.rows(0),
            values: self.cache.rows(1),
            kv_type: self.cache.kv_type(),
            n_head_kv: a.n_head_kv,
            group: a.n_head / a.n_head_kv,
            key_width: a.key_dim,
            value_row_width: a.value_dim,
            value_width: a.value_dim,
            scale: a.scale,
            softcap: a.softcap,
            positions,
            window: a.window,
            window_kind: a.window_kind,
            sinks: self.sinks.as_ref().map(Buffer::view),
        }
    }

    /// Computes the attention of a batch in which tokens choose, to `buffers.mixed`. `parts` says
    /// which.
    fn attend_by_choice(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        parts: &[Reached],
    ) -> Result<(), CudaError> {
        let (a, all) = (&self.spec, buffers.positions.all());
        for Reached { tokens, chooses } in parts {
            let queries = from_value(buffers.q.view(), tokens.start * a.n_head * a.key_dim);
            let attention = self.attention(queries, all.part(tokens.clone()));
            let out = from_value(buffers.mixed.view(), tokens.start * a.n_head * a.value_dim);
            match self.index.as_ref().filter(|_| *chooses) {
                Some(index) => {
                    let (per_token, choice) = (index.lists(), index.choice());
                    let first = tokens.start * per_token * choice.kept;
                    let chosen = ChosenBlocks {
                        lists: from_value(buffers.chosen.view(), first),
                        per_token,
                        choice,
                    };
                    ops.attend_chosen(&attention, chosen, &buffers.attend, out)?;
                }
                None => ops.attend(&attention, &buffers.attend, out, None)?,
            }
        }
        Ok(())
    }
}
