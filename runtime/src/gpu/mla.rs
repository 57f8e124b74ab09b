//! Multi-head latent attention on a GPU. The arithmetic is that of `layers/mla.rs`.

use super::buffers::{GpuBuffers, part_tokens};
use super::indexer::Indexer;
use super::matrix::{GpuLoader, Matrix, from_value, product, products};
use super::mixer::{Gate, Mixed, MixerBatch, output};
use crate::layers::device_cache::DeviceCache;
use crate::layers::rope::LayerRopes;
use std::ops::Range;
use std::sync::Arc;
use tier_plan_cuda::ops::{
    Attend, CacheRows, Choice, ChosenBlocks, Input, Matrices, MatrixTable, Matvec, Quants, Reached,
    RopeTurns, SharedView, Strided, TransposedMatvec,
};
use tier_plan_cuda::{Buffer, CudaError, Ops, View};
use tier_plan_formats::model::spec::{KvUp, MlaSpec, WindowKind};
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// One matrix per head.
pub(super) struct HeadMatrices {
    pub(super) table: MatrixTable<'static>,
    pub(super) ty: TensorType,
    n_out: usize,
    n_in: usize,
}

impl HeadMatrices {
    /// Takes `n_out` rows per head from a matrix in which heads are `stride` rows apart, beginning
    /// with row `first` of each head.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        whole: &Matrix,
        first: usize,
        stride: usize,
        n_out: usize,
    ) -> Result<Self, CudaError> {
        let Matrix { ty, n_in, .. } = *whole;
        let row = ty.row_bytes(n_in as u64).unwrap_or_default() as usize;
        let matrix = |head: usize| {
            let start = whole.range.start + (head * stride + first) * row;
            Some(SharedView {
                buffer: Arc::clone(&whole.bytes),
                range: start..start + n_out * row,
            })
        };
        let matrices = (0..whole.n_out / stride).map(matrix).collect();
        Ok(Self {
            table: MatrixTable::owning(loader.device, matrices)?,
            ty,
            n_out,
            n_in,
        })
    }

    /// Returns whether products take quantized activations.
    pub(super) fn takes_quants(&self) -> bool {
        needs_quants(self.ty)
    }

    /// Computes `out[token, head] = matrix[head] · x[token, head]`. `heads` has the head of each
    /// job.
    pub(super) fn product(
        &self,
        ops: &Ops,
        heads: &Buffer,
        jobs: usize,
        x: View<'_>,
        inner: &mut Quants,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let quantize = self.takes_quants();
        if quantize {
            ops.quantize(x, jobs, self.n_in, inner)?;
        }
        let matvec = Matvec {
            ty: self.ty,
            matrices: Matrices::Chosen(&self.table, heads.view()),
            bias: None,
            jobs,
            n_rows: self.n_out,
            n_cols: self.n_in,
            x: if quantize {
                Input::Quants(inner)
            } else {
                Input::Floats(x)
            },
            jobs_per_x: 1,
        };
        ops.matvec(&matvec, out)
    }
}

/// The projections that take queries to the space of the latents.
enum ToLatents {
    /// Stored transposed: one matrix per head.
    Transposed(HeadMatrices),
    /// Stored as projections from latents to keys, fused with those to values.
    Fused {
        matrix: Matrix,
        /// Indices of the rows that belong to keys.
        key_rows: Buffer,
    },
}

/// The low-rank projection of queries, with its norm.
struct QueryDown {
    matrix: Matrix,
    norm: Buffer,
}

/// Multi-head latent attention with its KV cache.
pub(super) struct Mla {
    spec: MlaSpec,
    q_down: Option<QueryDown>,
    q: Matrix,
    kv_down: Matrix,
    kv_norm: Buffer,
    shared_norm: Option<Buffer>,
    to_latents: ToLatents,
    to_values: HeadMatrices,
    sinks: Option<Buffer>,
    gate: Option<Gate>,
    o: Matrix,
    rope: Option<usize>,
    /// Head of each job of a part.
    heads: Buffer,
    indexer: Option<Indexer>,
    /// Latents with rotated keys, `[positions, kv_rank + rope]`, and the indexer's keys.
    cache: DeviceCache,
}

impl Mla {
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        a: &MlaSpec,
        ropes: LayerRopes,
        cache: DeviceCache,
    ) -> Result<Self, CudaError> {
        let indices = |values: &mut dyn Iterator<Item = usize>| {
            Buffer::of_i32(loader.device, &values.map(|n| n as i32).collect::<Vec<_>>())
        };
        let (to_latents, to_values) = match a.kv_up {
            KvUp::Split { k, v } => {
                let k = loader.rows(k, 0..a.n_head * a.kv_rank, a.nope_dim);
                let v = loader.rows(v, 0..a.n_head * a.value_dim, a.kv_rank);
                let to_values = HeadMatrices::new(loader, &v, 0, a.value_dim, a.value_dim)?;
                (
                    ToLatents::Transposed(HeadMatrices::new(loader, &k, 0, a.kv_rank, a.kv_rank)?),
                    to_values,
                )
            }
            KvUp::Fused(kv) => {
                let stride = a.nope_dim + a.value_dim;
                let kv = loader.rows(kv, 0..a.n_head * stride, a.kv_rank);
                let to_values = HeadMatrices::new(loader, &kv, a.nope_dim, stride, a.value_dim)?;
                let key_rows = indices(
                    &mut (0..a.n_head * a.nope_dim)
                        .map(|i| i / a.nope_dim * stride + i % a.nope_dim),
                );
                (
                    ToLatents::Fused {
                        matrix: kv,
                        key_rows: key_rows?,
                    },
                    to_values,
                )
            }
        };
        let q_down = a.q_down.map(|low| {
            Ok::<_, CudaError>(QueryDown {
                matrix: loader.linear(&low.down)?,
                norm: loader.vector(low.norm)?,
            })
        });
        let indexer = a.reach.indexer();
        let indexer = indexer.map(|indexer| Indexer::new(loader, indexer, ropes.indexer));
        Ok(Self {
            q_down: q_down.transpose()?,
            q: loader.linear(&a.q)?,
            kv_down: loader.linear(&a.kv_down)?,
            kv_norm: loader.vector(a.kv_norm)?,
            shared_norm: loader.opt_vector(a.shared_norm)?,
            to_latents,
            to_values,
            sinks: loader.opt_vector(a.sinks)?,
            gate: Gate::new(loader, a.gate.as_ref())?,
            o: loader.linear(&a.o)?,
            rope: ropes.mixer,
            indexer: indexer.transpose()?,
            heads: indices(&mut (0..part_tokens(a) * a.n_head).map(|job| job % a.n_head))?,
            cache,
            spec: a.clone(),
        })
    }

    pub(super) fn takes_quants(&self) -> bool {
        let first = self.q_down.as_ref().map_or(&self.q, |down| &down.matrix);
        let gate = self.gate.as_ref().map(|gate| &gate.matrix);
        let indexer = self.indexer.iter().flat_map(|i| [&i.k, &i.head_weights]);
        let pool = self.indexer.iter().filter_map(|i| i.pool.as_ref());
        let all = [first, &self.kv_down].into_iter().chain(gate);
        let all = all.chain(pool.map(|pool| &pool.gate));
        all.chain(indexer).any(Matrix::takes_quants)
    }

    /// Stores the tokens' latents, and computes their attention.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        let (a, MixerBatch { n, first_row, .. }) = (&self.spec, batch);
        let choice = a.reach.selection().map(Choice::from);
        let parts = match choice {
            Some(choice) => buffers.positions.all().by_reach(choice),
            None => Vec::new(),
        };
        let chooses = parts.iter().any(|part| part.chooses);
        self.project(ops, buffers, batch, chooses)?;
        self.place(ops, buffers, batch)?;
        // Where the lists of these rows of the batch begin.
        let kept = choice.filter(|_| chooses).map_or(0, |choice| choice.kept);
        let lists_at = first_row * kept;
        if let Some(indexer) = &self.indexer {
            let lists = from_value(buffers.chosen.view(), lists_at);
            let tokens = (&parts[..], batch.segments);
            indexer.run(ops, buffers, &self.cache, tokens, lists)?;
        }
        if let ToLatents::Fused { matrix, key_rows } = &self.to_latents {
            let n_rows = a.n_head * a.nope_dim;
            ops.dequantize_chosen(
                matrix.ty,
                matrix.view(),
                a.kv_rank,
                key_rows.view(),
                n_rows,
                buffers.absorbed.view(),
            )?;
        }
        let mut first = 0;
        while first < n {
            let tokens = first..n.min(first + part_tokens(a));
            first = tokens.end;
            self.part(ops, buffers, tokens, &parts, lists_at)?;
        }
        if let Some(gate) = &self.gate {
            let (mixed, gates) = (buffers.mixed.view(), buffers.gate.view());
            let share = gate.share(a.o.n_in);
            ops.gate(mixed, gates, share, gate.function, n * a.o.n_in)?;
        }
        output(ops, &self.o, n, buffers, Mixed::Floats)
    }

    /// Projects to queries in `buffers.q`, to latents and shared key parts in `buffers.k`, and to
    /// gates; for an indexer to keys, and, where a token `chooses`, to queries and weights of heads.
    fn project(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch<'_>,
        chooses: bool,
    ) -> Result<(), CudaError> {
        let MixerBatch { n, eps, .. } = batch;
        let (x, q, kv) = (buffers.answer.view(), buffers.q.view(), buffers.k.view());
        let (first, to) = self
            .q_down
            .as_ref()
            .map_or((&self.q, q), |down| (&down.matrix, buffers.low.view()));
        let mut matrices = vec![(first, to), (&self.kv_down, kv)];
        let gate = self.gate.as_ref();
        matrices.extend(gate.map(|gate| (&gate.matrix, buffers.gate.view())));
        if let Some(indexer) = &self.indexer {
            matrices.push((&indexer.k, buffers.v.view()));
            let pool = indexer.pool.as_ref();
            matrices.extend(pool.map(|pool| (&pool.gate, buffers.index_k.view())));
            if chooses {
                matrices.push((&indexer.head_weights, buffers.index_weights.view()));
            }
        }
        products(ops, &matrices, n, x, &buffers.quants)?;
        let Some(down) = &self.q_down else {
            return Ok(());
        };
        let (low, n_low) = (buffers.low.view(), down.matrix.n_out);
        ops.rms_norm(low, Some(down.norm.view()), n, n_low, eps, low)?;
        let asks = self.indexer.as_ref().filter(|_| chooses);
        if self.q.takes_quants() || asks.is_some_and(Indexer::takes_quants) {
            ops.quantize(low, n, n_low, &mut buffers.inner)?;
        }
        product(ops, &self.q, n, low, &buffers.inner, q)?;
        asks.map_or(Ok(()), |indexer| indexer.ask(ops, buffers, n, low))
    }

    /// Rotates queries, normalizes latents, normalizes and rotates shared key parts, and stores
    /// both.
    fn place(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        let (a, MixerBatch { n, eps, .. }) = (&self.spec, batch);
        let (rank, q, kv) = (a.kv_rank, buffers.q.view(), buffers.k.view());
        let (width, key_dim) = (rank + a.shared_dim, a.nope_dim + a.shared_dim);
        let norm = |at: View<'_>, weight: &Buffer, values: usize| {
            let rows = Strided { at, stride: width };
            ops.rms_norm_of(rows, Some(weight.view()), n, values, eps, rows)
        };
        norm(kv, &self.kv_norm, rank)?;
        if let Some(weight) = &self.shared_norm {
            norm(from_value(kv, rank), weight, a.shared_dim)?;
        }
        if let Some((table, rope)) = self.rope.zip(a.rope.as_ref()) {
            let turns = RopeTurns {
                values: buffers.turns[table].view(),
                kind: rope.kind,
                half: rope.dims / 2,
            };
            // The last values of each row are rotated.
            let rotate = |rows: View<'_>, skip: usize, heads: usize, width: usize| {
                ops.rope(from_value(rows, skip), &turns, n, heads, width)
            };
            rotate(q, a.nope_dim, a.n_head, key_dim)?;
            rotate(kv, rank, 1, width)?;
        }
        if a.temperature.is_some() {
            ops.scale_rows(q, buffers.factors.view(), n, a.q.n_out)?;
        }
        ops.store(
            kv,
            buffers.positions.all(),
            &CacheRows {
                kv_type: self.cache.kv_type(),
                at: self.cache.rows(0),
                heads: 1,
                width,
            },
        )
    }

    /// Computes attention of some of the batch's tokens, from `buffers.q` to `buffers.mixed`. `parts`
    /// says which tokens of the batch choose what they attend to.
    fn part(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        tokens: Range<usize>,
        parts: &[Reached],
        lists_at: usize,
    ) -> Result<(), CudaError> {
        let a = &self.spec;
        let jobs = tokens.len() * a.n_head;
        self.absorb(ops, buffers, &tokens)?;
        if parts.is_empty() {
            self.attend(ops, buffers, &tokens, tokens.clone(), None)?;
        }
        for part in parts {
            let own = part.tokens.start.max(tokens.start)..part.tokens.end.min(tokens.end);
            if !own.is_empty() {
                let lists = part.chooses.then_some(lists_at);
                self.attend(ops, buffers, &tokens, own, lists)?;
            }
        }
        let (latents, mixed) = (buffers.latents.view(), buffers.mixed.view());
        let mixed = from_value(mixed, tokens.start * a.o.n_in);
        self.to_values
            .product(ops, &self.heads, jobs, latents, &mut buffers.inner, mixed)
    }

    /// Takes the queries of some of the batch's tokens to the space of the latents, in
    /// `buffers.raw`.
    fn absorb(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        tokens: &Range<usize>,
    ) -> Result<(), CudaError> {
        let a = &self.spec;
        let (rank, nope, shared) = (a.kv_rank, a.nope_dim, a.shared_dim);
        let (jobs, key_dim, width) = (tokens.len() * a.n_head, nope + shared, rank + shared);
        let q = buffers.q.view();
        let q = from_value(q, tokens.start * a.q.n_out);
        let (latents, queries) = (buffers.latents.view(), buffers.raw.view());
        let rows = |at, stride| Strided { at, stride };
        ops.copy_rows(
            rows(q, key_dim),
            jobs,
            nope,
            rows(buffers.nope.view(), nope),
        )?;
        match &self.to_latents {
            ToLatents::Transposed(k) => k.product(
                ops,
                &self.heads,
                jobs,
                buffers.nope.view(),
                &mut buffers.inner,
                latents,
            )?,
            ToLatents::Fused { .. } => {
                let transposed = TransposedMatvec {
                    w: buffers.absorbed.view(),
                    heads: a.n_head,
                    jobs,
                    n_rows: nope,
                    n_cols: rank,
                    x: buffers.nope.view(),
                };
                ops.matvec_transposed(&transposed, latents)?;
            }
        }
        ops.copy_rows(rows(latents, rank), jobs, rank, rows(queries, width))?;
        let rotated = rows(from_value(q, nope), key_dim);
        ops.copy_rows(
            rotated,
            jobs,
            shared,
            rows(from_value(queries, rank), width),
        )
    }

    /// Computes attention of `own` tokens of a part, from `buffers.raw` to `buffers.latents`. With
    /// `lists_at`, each attends to its list of `buffers.chosen`, where that of the batch's first
    /// token begins there.
    fn attend(
        &self,
        ops: &Ops,
        buffers: &GpuBuffers,
        part: &Range<usize>,
        own: Range<usize>,
        lists_at: Option<usize>,
    ) -> Result<(), CudaError> {
        let a = &self.spec;
        let (rank, width) = (a.kv_rank, a.kv_rank + a.shared_dim);
        let first = (own.start - part.start) * a.n_head;
        let out = from_value(buffers.latents.view(), first * rank);
        // All query heads share one head of keys, whose values are the latents at its beginning.
        let attention = Attend {
            queries: from_value(buffers.raw.view(), first * width),
            keys: self.cache.rows(0),
            values: self.cache.rows(0),
            kv_type: self.cache.kv_type(),
            n_head_kv: 1,
            group: a.n_head,
            key_width: width,
            value_row_width: width,
            value_width: rank,
            scale: a.scale,
            softcap: None,
            positions: buffers.positions.all().part(own.clone()),
            window: a.reach.window(),
            window_kind: WindowKind::Sliding,
            sinks: self.sinks.as_ref().map(Buffer::view),
        };
        match (lists_at, a.reach.selection().map(Choice::from)) {
            (Some(at), Some(choice)) => {
                let chosen = ChosenBlocks {
                    lists: from_value(buffers.chosen.view(), at + own.start * choice.kept),
                    per_token: 1,
                    choice,
                };
                ops.attend_chosen(&attention, chosen, &buffers.attend, out)
            }
            _ => ops.attend(&attention, &buffers.attend, out, None),
        }
    }
}
