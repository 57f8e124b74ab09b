//! The gated delta net on a GPU. The arithmetic is that of `exec/mixer/delta.rs`.

use super::buffers::Room;
use super::matrix::{Maker, Matrix, product, products};
use super::mixer::{Batch, output};
use tier_plan_cuda::ops::{self, DeltaSizes};
use tier_plan_cuda::{Buffer, CudaError, Ops};
use tier_plan_formats::model::spec::{DeltaInput, DeltaRates, DeltaSpec};

/// A layer with its state. That begins with the token at position 0, before which the kernels take it for nothing, so that
/// neither loading nor a new text has to write it.
pub(super) struct Delta {
    sizes: DeltaSizes,
    /// Queries, keys and values, with the gates where they go by key head.
    projection: Matrix,
    gate: Option<Matrix>,
    /// Strengths, with the decays where they go by key head.
    beta: Matrix,
    alpha: Option<Matrix>,
    conv: Buffer,
    dt_bias: Buffer,
    decay: Buffer,
    norm: Buffer,
    out: Matrix,
    inputs: Buffer,
    matrices: Buffer,
}

impl Delta {
    pub(super) fn new(maker: &Maker<'_>, d: &DeltaSpec) -> Result<Self, CudaError> {
        let (projection, gate) = match &d.input {
            DeltaInput::Split { qkv, gate } => (qkv, Some(gate)),
            DeltaInput::ByKeyHead(all) => (all, None),
        };
        let (beta, alpha) = match &d.rates {
            DeltaRates::Split { beta, alpha } => (beta, Some(alpha)),
            DeltaRates::ByKeyHead(all) => (all, None),
        };
        let sizes = DeltaSizes::from(d);
        Ok(Self {
            projection: maker.linear(projection)?,
            gate: gate.map(|l| maker.linear(l)).transpose()?,
            beta: maker.linear(beta)?,
            alpha: alpha.map(|l| maker.linear(l)).transpose()?,
            conv: maker.vector(d.conv)?,
            dt_bias: maker.vector(d.dt_bias)?,
            decay: maker.vector(d.decay)?,
            norm: maker.vector(d.norm)?,
            out: maker.linear(&d.out)?,
            inputs: Buffer::room_f32(maker.device, sizes.kept())?,
            matrices: Buffer::room_f32(maker.device, sizes.matrices())?,
            sizes,
        })
    }

    pub(super) fn takes_quants(&self) -> bool {
        let second = [&self.gate, &self.alpha].into_iter().flatten();
        [&self.projection, &self.beta].into_iter().chain(second).any(Matrix::takes_quants)
    }

    pub(super) fn run(&self, ops: &Ops, room: &mut Room, batch: Batch) -> Result<(), CudaError> {
        let Batch { n, eps, .. } = batch;
        let (x, raw_rates) = (room.answer.view(), room.k.view());
        let mut first = vec![(&self.projection, room.raw.view()), (&self.beta, raw_rates)];
        first.extend(self.gate.as_ref().map(|gate| (gate, room.gate.view())));
        products(ops, &first, n, x, &room.quants)?;
        if let Some(alpha) = &self.alpha {
            let after = raw_rates.floats(n * self.beta.n_out..raw_rates.words());
            product(ops, alpha, n, x, &room.quants, after)?;
        }
        let delta = ops::Delta {
            sizes: self.sizes,
            tokens: n,
            projected: room.raw.view(),
            gates: room.gate.view(),
            raw_rates,
            conv: self.conv.view(),
            dt_bias: self.dt_bias.view(),
            decay: self.decay.view(),
            norm: self.norm.view(),
            eps,
            past: room.past.view(),
            inputs: self.inputs.view(),
            matrices: self.matrices.view(),
            heads: room.q.view(),
            rates: room.v.view(),
            out: room.mixed.view(),
        };
        let quantizes = self.out.takes_quants() && self.sizes.head_dim.is_multiple_of(32);
        ops.delta(&delta, quantizes.then_some(&mut room.inner))?;
        if quantizes {
            return product(ops, &self.out, n, room.mixed.view(), &room.inner, room.out.view());
        }
        output(ops, &self.out, n, room)
    }
}
