//! Kimi delta attention on a GPU. The arithmetic is that of `layers/kda.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, product, products};
use super::mixer::{Mixed, MixerBatch, after_all_states, output};
use crate::layers::device_cache::DeviceCache;
use tier_plan_cuda::ops::{self, KdaSizes};
use tier_plan_cuda::{Buffer, CudaError, Ops, View};
use tier_plan_formats::model::spec::{KdaSpec, Projection};

/// A projection of one or two matrices.
struct Projected {
    first: Matrix,
    second: Option<Matrix>,
}

impl Projected {
    fn new(loader: &GpuLoader<'_>, projection: &Projection) -> Result<Self, CudaError> {
        let second = projection.second.as_ref();
        Ok(Self {
            first: loader.linear(&projection.first)?,
            second: second.map(|l| loader.linear(l)).transpose()?,
        })
    }

    /// Returns the values between the matrices, if there are two.
    fn rank(&self) -> usize {
        self.second.as_ref().map_or(0, |second| second.n_in)
    }

    /// Returns where the first matrix's result goes.
    fn first_to<'a>(&self, low: View<'a>, out: View<'a>) -> View<'a> {
        if self.second.is_some() { low } else { out }
    }
}

/// A layer's Kimi delta attention with its state. At position 0 the kernels take the state for
/// zero, so neither loading nor a new text has to write it.
pub(super) struct Kda {
    sizes: KdaSizes,
    /// Queries, keys, and values.
    qkv: [Matrix; 3],
    decay: Projected,
    beta: Matrix,
    gate: Projected,
    /// Of queries, keys, and values, one after the other.
    conv: Buffer,
    decay_bias: Buffer,
    steepness: Buffer,
    norm: Buffer,
    out: Matrix,
    /// The convolutions' inputs and the matrices of texts and checkpoints.
    states: DeviceCache,
}

/// The buffers of a batch's projections.
struct Views<'a> {
    /// Queries, keys, and values, `[tokens, width]` each.
    projected: [View<'a>; 3],
    /// `[tokens, n_head]`.
    strengths: View<'a>,
    /// `[tokens, width]`.
    decays: View<'a>,
    /// `[tokens, width]`.
    gates: View<'a>,
}

impl Kda {
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        k: &KdaSpec,
        states: DeviceCache,
    ) -> Result<Self, CudaError> {
        let [queries, keys, values] = k.qkv.each_ref().map(|l| loader.linear(l));
        let conv = k.conv.map(|id| loader.weights.vector(id)).concat();
        Ok(Self {
            sizes: KdaSizes::from(k),
            qkv: [queries?, keys?, values?],
            decay: Projected::new(loader, &k.decay)?,
            beta: loader.linear(&k.beta)?,
            gate: Projected::new(loader, &k.gate)?,
            conv: Buffer::of_f32(loader.device, &conv)?,
            decay_bias: loader.vector(k.decay_bias)?,
            steepness: loader.vector(k.steepness)?,
            norm: loader.vector(k.norm)?,
            out: loader.linear(&k.out)?,
            states,
        })
    }

    pub(super) fn takes_quants(&self) -> bool {
        let others = [&self.decay.first, &self.beta, &self.gate.first];
        let mut first = self.qkv.iter().chain(others);
        first.any(Matrix::takes_quants)
    }

    /// Computes the rows of all texts after their states. Rows that a checkpoint follows end a launch.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        let MixerBatch { n, eps, .. } = batch;
        self.project(ops, buffers, n)?;
        let quantizes = self.out.takes_quants() && self.sizes.head_dim.is_multiple_of(32);
        let views = self.views(&buffers.raw, &buffers.k, &buffers.gate, n);
        let kda = ops::Kda {
            tokens: n,
            sizes: self.sizes,
            projected: views.projected,
            decays: views.decays,
            raw_strengths: views.strengths,
            gates: views.gates,
            conv: self.conv.view(),
            decay_bias: self.decay_bias.view(),
            steepness: self.steepness.view(),
            norm: self.norm.view(),
            eps,
            inputs: self.states.states(0),
            matrices: self.states.states(1),
            heads: buffers.q.view(),
            rates: buffers.v.view(),
            out: buffers.mixed.view(),
        };
        let (positions, segments) = (&buffers.positions, batch.segments);
        after_all_states(positions, segments, &self.states, |runs| {
            ops.kda(&kda, runs)
        })?;
        ops.gate_kda(&kda, quantizes.then_some(&mut buffers.inner))?;
        output(ops, &self.out, n, buffers, Mixed::quantized_if(quantizes))
    }

    /// Returns the places of the projections of `n` tokens.
    fn views<'a>(
        &self,
        raw: &'a Buffer,
        strengths: &'a Buffer,
        gate: &'a Buffer,
        n: usize,
    ) -> Views<'a> {
        let values = n * self.sizes.width();
        let part =
            |buffer: &'a Buffer, i: usize| buffer.view().floats(i * values..(i + 1) * values);
        Views {
            projected: [0, 1, 2].map(|i| part(raw, i)),
            strengths: strengths.view(),
            decays: part(gate, 0),
            gates: part(gate, 1),
        }
    }

    /// Computes all products with the `n` normalized rows.
    fn project(&self, ops: &Ops, buffers: &mut GpuBuffers, n: usize) -> Result<(), CudaError> {
        let views = self.views(&buffers.raw, &buffers.k, &buffers.gate, n);
        let low = buffers.low.view();
        let [decay, gate] = [&self.decay, &self.gate].map(|p| n * p.rank());
        let lows = [low.floats(0..decay), low.floats(decay..decay + gate)];
        let [queries, keys, values] = views.projected;
        let first = [
            (&self.qkv[0], queries),
            (&self.qkv[1], keys),
            (&self.qkv[2], values),
            (&self.beta, views.strengths),
            (
                &self.decay.first,
                self.decay.first_to(lows[0], views.decays),
            ),
            (&self.gate.first, self.gate.first_to(lows[1], views.gates)),
        ];
        let x = buffers.answer.view();
        products(ops, &first, n, x, &buffers.quants)?;
        let parts = [(&self.decay, views.decays), (&self.gate, views.gates)];
        for ((projection, out), low) in parts.into_iter().zip(lows) {
            let Some(second) = &projection.second else {
                continue;
            };
            if second.takes_quants() {
                ops.quantize(low, n, second.n_in, &mut buffers.inner)?;
            }
            product(ops, second, n, low, &buffers.inner, out)?;
        }
        Ok(())
    }
}
