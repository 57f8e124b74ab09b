//! The gated delta net on a GPU. The arithmetic is that of `layers/delta.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, product, products};
use super::mixer::{Mixed, MixerBatch, after_all_states, output};
use crate::layers::device_cache::DeviceCache;
use tier_plan_cuda::ops::{self, DeltaSizes};
use tier_plan_cuda::{Buffer, CudaError, Ops};
use tier_plan_formats::model::spec::{DeltaInput, DeltaRates, DeltaSpec};

/// A layer's delta net with its state. At position 0 the kernels take the state for zero, so
/// neither loading nor a new text has to write it.
pub(super) struct Delta {
    sizes: DeltaSizes,
    /// Queries, keys and values; with the gates if grouped by key head.
    projection: Matrix,
    gate: Option<Matrix>,
    /// Strengths; with the decays if grouped by key head.
    beta: Matrix,
    alpha: Option<Matrix>,
    conv: Buffer,
    dt_bias: Buffer,
    decay: Buffer,
    norm: Buffer,
    out: Matrix,
    /// The convolution's inputs and the matrices of texts and checkpoints.
    states: DeviceCache,
}

impl Delta {
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        d: &DeltaSpec,
        states: DeviceCache,
    ) -> Result<Self, CudaError> {
        let (projection, gate) = match &d.input {
            DeltaInput::Split { qkv, gate } => (qkv, Some(gate)),
            DeltaInput::ByKeyHead(fused) => (fused, None),
        };
        let (beta, alpha) = match &d.rates {
            DeltaRates::Split { beta, alpha } => (beta, Some(alpha)),
            DeltaRates::ByKeyHead(fused) => (fused, None),
        };
        let sizes = DeltaSizes::from(d);
        Ok(Self {
            projection: loader.linear(projection)?,
            gate: gate.map(|l| loader.linear(l)).transpose()?,
            beta: loader.linear(beta)?,
            alpha: alpha.map(|l| loader.linear(l)).transpose()?,
            conv: loader.vector(d.conv)?,
            dt_bias: loader.vector(d.dt_bias)?,
            decay: loader.vector(d.decay)?,
            norm: loader.vector(d.norm)?,
            out: loader.linear(&d.out)?,
            states,
            sizes,
        })
    }

    pub(super) fn takes_quants(&self) -> bool {
        let second = [&self.gate, &self.alpha].into_iter().flatten();
        [&self.projection, &self.beta]
            .into_iter()
            .chain(second)
            .any(Matrix::takes_quants)
    }

    /// Computes the rows of all texts after their states. Rows that a checkpoint follows end a launch.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        let MixerBatch { n, eps, .. } = batch;
        let (x, strengths) = (buffers.answer.view(), buffers.k.view());
        let mut first = vec![
            (&self.projection, buffers.raw.view()),
            (&self.beta, strengths),
        ];
        first.extend(self.gate.as_ref().map(|gate| (gate, buffers.gate.view())));
        products(ops, &first, n, x, &buffers.quants)?;
        let decays = strengths.floats(n * self.beta.n_out..strengths.words());
        if let Some(alpha) = &self.alpha {
            product(ops, alpha, n, x, &buffers.quants, decays)?;
        }
        let quantizes = self.out.takes_quants() && self.sizes.head_dim.is_multiple_of(32);
        let delta = ops::Delta {
            tokens: n,
            sizes: self.sizes,
            projected: buffers.raw.view(),
            gates: buffers.gate.view(),
            raw_strengths: strengths,
            raw_decays: decays,
            conv: self.conv.view(),
            dt_bias: self.dt_bias.view(),
            decay: self.decay.view(),
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
            ops.delta(&delta, runs)
        })?;
        ops.gate_delta(&delta, quantizes.then_some(&mut buffers.inner))?;
        output(ops, &self.out, n, buffers, Mixed::quantized_if(quantizes))
    }
}
