//! What mixes tokens on a GPU: grouped heads and latents here, the delta net in a file of its own. The arithmetic is that of `exec/mixer`.

use super::buffers::{Room, part_tokens};
use super::delta::Delta;
use super::matrix::{Maker, Matrix, product, products};
use std::sync::Arc;
use tier_plan_cuda::ops::{Attend, Heads as NewHeads, Input, Matrices, Positions, Quants, SharedPart, Strided, Table};
use tier_plan_cuda::{Buffer, CudaError, Device, Ops, View};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::{GqaSpec, KvUp, Mixer as MixerSpec, MlaSpec, NormSpan};
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// The cache of a plan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cache {
    pub(super) kv_type: KvType,
    /// Positions that there is room for.
    pub(super) context: usize,
}

impl Cache {
    fn rows(self, device: &Arc<dyn Device>, heads: usize, width: usize) -> Result<Buffer, CudaError> {
        Buffer::new(device, heads * self.context * self.kv_type.row_bytes(width as u64) as usize)
    }
}

/// A batch of `n` tokens: the normed state is in `room.answer`, quantised where `Mixer::takes_quants` says so.
#[derive(Clone, Copy)]
pub(super) struct Batch {
    pub(super) n: usize,
    pub(super) past: usize,
    pub(super) eps: f32,
}

/// A layer's attention with its keys and values, or its delta net with its state.
pub(super) enum Mixer {
    Gqa(Box<Gqa>),
    Mla(Box<Mla>),
    Delta(Box<Delta>),
}

impl Mixer {
    /// `rope` is the table that the layer rotates by.
    pub(super) fn new(
        maker: &Maker<'_>,
        spec: &MixerSpec,
        rope: Option<usize>,
        cache: Cache,
    ) -> Result<Self, CudaError> {
        match spec {
            MixerSpec::Gqa(a) => Ok(Self::Gqa(Box::new(Gqa::new(maker, a, rope, cache)?))),
            MixerSpec::Mla(a) => Ok(Self::Mla(Box::new(Mla::new(maker, a, rope, cache)?))),
            MixerSpec::Delta(d) => Ok(Self::Delta(Box::new(Delta::new(maker, d)?))),
        }
    }

    /// Whether any of its first products takes 8-bit activations.
    pub(super) fn takes_quants(&self) -> bool {
        match self {
            Self::Gqa(a) => [&a.q, &a.k, &a.v].into_iter().any(Matrix::takes_quants),
            Self::Mla(a) => a.q_down.as_ref().map_or(&a.q, |(m, _)| m).takes_quants() || a.kv_down.takes_quants(),
            Self::Delta(d) => d.takes_quants(),
        }
    }

    /// `room.out = mixer(x)`; the tokens' keys and values are added to the cache, or the state goes on to after them.
    pub(super) fn run(&self, ops: &Ops, room: &mut Room, batch: Batch) -> Result<(), CudaError> {
        match self {
            Self::Gqa(a) => a.run(ops, room, batch),
            Self::Mla(a) => a.run(ops, room, batch),
            Self::Delta(d) => d.run(ops, room, batch),
        }
    }
}

pub(super) struct Gqa {
    spec: GqaSpec,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    qk_norm: Option<(Buffer, Buffer, NormSpan)>,
    sinks: Option<Buffer>,
    rope: Option<usize>,
    keys: Buffer,
    values: Buffer,
    cache: Cache,
}

impl Gqa {
    fn new(maker: &Maker<'_>, a: &GqaSpec, rope: Option<usize>, cache: Cache) -> Result<Self, CudaError> {
        let norms = a.qk_norm.map(|norm| Ok::<_, CudaError>((maker.vector(norm.q)?, maker.vector(norm.k)?, norm.span)));
        Ok(Self {
            spec: a.clone(),
            q: maker.linear(&a.q)?,
            k: maker.linear(&a.k)?,
            v: maker.linear(&a.v)?,
            o: maker.linear(&a.o)?,
            qk_norm: norms.transpose()?,
            sinks: maker.opt_vector(a.sinks)?,
            rope,
            keys: cache.rows(maker.device, a.n_head_kv, a.key_dim)?,
            values: cache.rows(maker.device, a.n_head_kv, a.value_dim)?,
            cache,
        })
    }

    fn run(&self, ops: &Ops, room: &mut Room, batch: Batch) -> Result<(), CudaError> {
        let (a, Batch { n, past, eps }) = (&self.spec, batch);
        let (x, q, k, v) = (room.answer.view(), room.q.view(), room.k.view(), room.v.view());
        let (heads, width) = (n * a.n_head, a.key_dim);
        let first = if a.gated { room.raw.view() } else { q };
        products(ops, &[(&self.q, first), (&self.k, k), (&self.v, v)], n, x, &room.quants)?;
        if a.gated {
            // Each head is followed by its gate.
            let apart = |from: View<'_>, to: &Buffer| {
                let to = Strided { at: to.view(), stride: width };
                ops.copy_rows(Strided { at: from, stride: 2 * width }, heads, width, to)
            };
            apart(first, &room.q)?;
            apart(first.floats(width..first.words()), &room.gate)?;
        }
        let norms = self.qk_norm.as_ref().map(|(q, k, span)| (q.view(), k.view(), *span));
        if let Some((for_q, for_k, NormSpan::Full)) = norms {
            ops.rms_norm(q, Some(for_q), n, a.n_head * width, eps, q)?;
            ops.rms_norm(k, Some(for_k), n, a.n_head_kv * width, eps, k)?;
        }
        let Cache { kv_type, context } = self.cache;
        let positions = Positions { past, on_device: room.past.view() };
        ops.place_heads(&NewHeads {
            queries: q,
            new_keys: k,
            new_values: v,
            norms: norms.filter(|(.., span)| *span == NormSpan::Head).map(|(q, k, _)| (q, k, eps)),
            turns: self.rope.map(|table| (room.turns[table].view(), a.rope.kind, a.rope.dims / 2)),
            tokens: n,
            n_head: a.n_head,
            n_head_kv: a.n_head_kv,
            key_width: width,
            value_width: a.value_dim,
            kv_type,
            context,
            positions,
            keys: self.keys.view(),
            values: self.values.view(),
        })?;
        let attention = Attend {
            queries: q,
            keys: self.keys.view(),
            values: self.values.view(),
            kv_type,
            context,
            n_head_kv: a.n_head_kv,
            group: a.n_head / a.n_head_kv,
            key_width: width,
            value_row_width: a.value_dim,
            value_width: a.value_dim,
            scale: a.scale,
            tokens: n,
            positions,
            first: 0,
            window: a.window,
            sinks: self.sinks.as_ref().map(Buffer::view),
        };
        // Gates stand between them and the last product.
        let quantizes = self.o.takes_quants() && !a.gated && a.value_dim.is_multiple_of(32);
        ops.attend(&attention, &room.attend, room.mixed.view(), quantizes.then_some(&mut room.inner))?;
        if a.gated {
            ops.gate(room.mixed.view(), room.gate.view(), n * a.o.n_in)?;
        }
        if quantizes {
            return product(ops, &self.o, n, room.mixed.view(), &room.inner, room.out.view());
        }
        output(ops, &self.o, n, room)
    }
}

/// `room.out = o(room.mixed)`.
pub(super) fn output(ops: &Ops, o: &Matrix, n: usize, room: &mut Room) -> Result<(), CudaError> {
    if o.takes_quants() {
        ops.quantize(room.mixed.view(), n, o.n_in, &mut room.inner)?;
    }
    product(ops, o, n, room.mixed.view(), &room.inner, room.out.view())
}

/// Matrices of heads, one each.
struct Heads {
    table: Table<'static>,
    ty: TensorType,
    n_out: usize,
    n_in: usize,
}

impl Heads {
    /// Of every `stride` rows the `n_out` from `first` on.
    fn new(maker: &Maker<'_>, whole: &Matrix, first: usize, stride: usize, n_out: usize) -> Result<Self, CudaError> {
        let Matrix { ty, n_in, .. } = *whole;
        let row = ty.row_bytes(n_in as u64).unwrap_or_default() as usize;
        let part = |head: usize| -> Option<SharedPart> {
            let at = whole.range.start + (head * stride + first) * row;
            Some((Arc::clone(&whole.bytes), at..at + n_out * row))
        };
        let parts = (0..whole.n_out / stride).map(part).collect();
        Ok(Self { table: Table::owning(maker.device, parts)?, ty, n_out, n_in })
    }

    /// `out[token, head] = matrix[head] · x[token, head]`, which `heads` numbers.
    fn product(
        &self,
        ops: &Ops,
        heads: &Buffer,
        jobs: usize,
        x: View<'_>,
        inner: &mut Quants,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let chosen = Matrices::Chosen(&self.table, heads.view());
        if !needs_quants(self.ty) {
            return ops.matvec(self.ty, chosen, jobs, self.n_out, self.n_in, Input::Floats(x), 1, out);
        }
        ops.quantize(x, jobs, self.n_in, inner)?;
        ops.matvec(self.ty, chosen, jobs, self.n_out, self.n_in, Input::Quants(inner), 1, out)
    }
}

/// What takes queries to the space of the latents.
enum ToLatents {
    /// The keys' projections, turned.
    Turned(Heads),
    /// As they are: the matrix, and the numbers of the rows that belong to keys.
    AsTheyAre(Matrix, Buffer),
}

pub(super) struct Mla {
    spec: MlaSpec,
    q_down: Option<(Matrix, Buffer)>,
    q: Matrix,
    kv_down: Matrix,
    kv_norm: Buffer,
    to_latents: ToLatents,
    to_values: Heads,
    o: Matrix,
    rope: Option<usize>,
    rows: Buffer,
    /// Heads' numbers for the jobs of a part.
    heads: Buffer,
    cache: Cache,
}

impl Mla {
    fn new(maker: &Maker<'_>, a: &MlaSpec, rope: Option<usize>, cache: Cache) -> Result<Self, CudaError> {
        let numbers = |of: &mut dyn Iterator<Item = usize>| {
            Buffer::of_i32(maker.device, &of.map(|n| n as i32).collect::<Vec<_>>())
        };
        let (to_latents, to_values) = match a.kv_up {
            KvUp::Split { k, v } => {
                let k = maker.rows(k, 0..a.n_head * a.kv_rank, a.nope_dim);
                let v = maker.rows(v, 0..a.n_head * a.value_dim, a.kv_rank);
                let to_values = Heads::new(maker, &v, 0, a.value_dim, a.value_dim)?;
                (ToLatents::Turned(Heads::new(maker, &k, 0, a.kv_rank, a.kv_rank)?), to_values)
            }
            KvUp::Fused(kv) => {
                let stride = a.nope_dim + a.value_dim;
                let kv = maker.rows(kv, 0..a.n_head * stride, a.kv_rank);
                let to_values = Heads::new(maker, &kv, a.nope_dim, stride, a.value_dim)?;
                let key_rows =
                    numbers(&mut (0..a.n_head * a.nope_dim).map(|i| i / a.nope_dim * stride + i % a.nope_dim));
                (ToLatents::AsTheyAre(kv, key_rows?), to_values)
            }
        };
        let q_down = a.q_down.map(|low| Ok::<_, CudaError>((maker.linear(&low.down)?, maker.vector(low.norm)?)));
        Ok(Self {
            q_down: q_down.transpose()?,
            q: maker.linear(&a.q)?,
            kv_down: maker.linear(&a.kv_down)?,
            kv_norm: maker.vector(a.kv_norm)?,
            to_latents,
            to_values,
            o: maker.linear(&a.o)?,
            rope,
            rows: cache.rows(maker.device, 1, a.kv_rank + a.rope.dims)?,
            heads: numbers(&mut (0..part_tokens(a) * a.n_head).map(|job| job % a.n_head))?,
            cache,
            spec: a.clone(),
        })
    }

    fn run(&self, ops: &Ops, room: &mut Room, batch: Batch) -> Result<(), CudaError> {
        let (a, Batch { n, past, eps }) = (&self.spec, batch);
        let (rank, pairs) = (a.kv_rank, a.rope.dims / 2);
        let (width, key_dim) = (rank + a.rope.dims, a.nope_dim + a.rope.dims);
        let (x, q, kv) = (room.answer.view(), room.q.view(), room.k.view());
        let (first, to) = self.q_down.as_ref().map_or((&self.q, q), |(down, _)| (down, room.low.view()));
        products(ops, &[(first, to), (&self.kv_down, kv)], n, x, &room.quants)?;
        if let Some((down, norm)) = &self.q_down {
            let low = room.low.view();
            ops.rms_norm(low, Some(norm.view()), n, down.n_out, eps, low)?;
            if self.q.takes_quants() {
                ops.quantize(low, n, down.n_out, &mut room.inner)?;
            }
            product(ops, &self.q, n, low, &room.inner, q)?;
        }
        let latents = Strided { at: kv, stride: width };
        ops.rms_norm_of(latents, Some(self.kv_norm.view()), n, rank, eps, latents)?;
        if let Some(table) = self.rope {
            let turns = room.turns[table].view();
            // What rotates are the last values of each row.
            let rotated = |of: View<'_>, still: usize, heads: usize, width: usize| {
                ops.rope(of.floats(still..of.words()), turns, a.rope.kind, n, heads, width, pairs)
            };
            rotated(q, a.nope_dim, a.n_head, key_dim)?;
            rotated(kv, rank, 1, width)?;
        }
        if a.temperature.is_some() {
            ops.scale_rows(q, room.factors.view(), n, a.q.n_out)?;
        }
        let positions = Positions { past, on_device: room.past.view() };
        ops.store(self.cache.kv_type, kv, n, 1, width, self.cache.context, positions, self.rows.view())?;
        if let ToLatents::AsTheyAre(kv, rows) = &self.to_latents {
            let n_rows = a.n_head * a.nope_dim;
            ops.dequantize_chosen(kv.ty, kv.view(), rank, rows.view(), n_rows, room.absorbed.view())?;
        }
        let mut first = 0;
        while first < n {
            let tokens = part_tokens(a).min(n - first);
            self.part(ops, room, past, first, tokens)?;
            first += tokens;
        }
        output(ops, &self.o, n, room)
    }

    /// Attention of some of the batch's tokens, from `room.q` to `room.mixed`.
    fn part(&self, ops: &Ops, room: &mut Room, past: usize, first: usize, n: usize) -> Result<(), CudaError> {
        let a = &self.spec;
        let (rank, nope, rope, jobs) = (a.kv_rank, a.nope_dim, a.rope.dims, n * a.n_head);
        let (key_dim, width) = (nope + rope, rank + rope);
        let q = room.q.view();
        let q = q.floats(first * a.q.n_out..q.words());
        let (latents, queries) = (room.latents.view(), room.raw.view());
        let rows = |at, stride| Strided { at, stride };
        ops.copy_rows(rows(q, key_dim), jobs, nope, rows(room.nope.view(), nope))?;
        match &self.to_latents {
            ToLatents::Turned(k) => k.product(ops, &self.heads, jobs, room.nope.view(), &mut room.inner, latents)?,
            ToLatents::AsTheyAre(..) => {
                let w = room.absorbed.view();
                ops.matvec_transposed(w, a.n_head, jobs, nope, rank, room.nope.view(), latents)?;
            }
        }
        ops.copy_rows(rows(latents, rank), jobs, rank, rows(queries, width))?;
        let rotated = rows(q.floats(nope..q.words()), key_dim);
        ops.copy_rows(rotated, jobs, rope, rows(queries.floats(rank..queries.words()), width))?;
        // All heads read the same rows: one head of keys, whose values are the latents at their beginning.
        let attention = Attend {
            queries,
            keys: self.rows.view(),
            values: self.rows.view(),
            kv_type: self.cache.kv_type,
            context: self.cache.context,
            n_head_kv: 1,
            group: a.n_head,
            key_width: width,
            value_row_width: width,
            value_width: rank,
            scale: a.scale,
            tokens: n,
            positions: Positions { past, on_device: room.past.view() },
            first,
            window: None,
            sinks: None,
        };
        ops.attend(&attention, &room.attend, latents, None)?;
        let mixed = room.mixed.view();
        let mixed = mixed.floats(first * a.o.n_in..mixed.words());
        self.to_values.product(ops, &self.heads, jobs, latents, &mut room.inner, mixed)
    }
}
