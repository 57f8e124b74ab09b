//! The gated delta net on a GPU. The arithmetic is that of `layers/delta.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, product, products};
use super::mixer::{MixerBatch, output};
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
    inputs: Buffer,
    matrices: Buffer,
}

impl Delta {
    pub(super) fn new(loader: &GpuLoader<'_>, d: &DeltaSpec) -> Result<Self, CudaError> {
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
            inputs: Buffer::new_f32(loader.device, sizes.conv_state())?,
            matrices: Buffer::new_f32(loader.device, sizes.matrices())?,
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

    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch,
    ) -> Result<(), CudaError> {
        let MixerBatch { n, eps, .. } = batch;
        let (x, raw_rates) = (buffers.answer.view(), buffers.k.view());
        let mut first = vec![
            (&self.projection, buffers.raw.view()),
            (&self.beta, raw_rates),
        ];
        first.extend(self.gate.as_ref().map(|gate| (gate, buffers.gate.view())));
        products(ops, &first, n, x, &buffers.quants)?;
        if let Some(alpha) = &self.alpha {
            let after = raw_rates.floats(n * self.beta.n_out..raw_rates.words());
            product(ops, alpha, n, x, &buffers.quants, after)?;
        }
        let delta = ops::Delta {
            sizes: self.sizes,
            tokens: n,
            projected: buffers.raw.view(),
            gates: buffers.gate.view(),
            raw_rates,
            conv: self.conv.view(),
            dt_bias: self.dt_bias.view(),
            decay: self.decay.view(),
            norm: self.norm.view(),
            eps,
            past: buffers.past.view(),
            inputs: self.inputs.view(),
            matrices: self.matrices.view(),
            heads: buffers.q.view(),
            rates: buffers.v.view(),
            out: buffers.mixed.view(),
        };
        let quantizes = self.out.takes_quants() && self.sizes.head_dim.is_multiple_of(32);
        ops.delta(&delta, quantizes.then_some(&mut buffers.inner))?;
        if quantizes {
            return product(
                ops,
                &self.out,
                n,
                buffers.mixed.view(),
                &buffers.inner,
                buffers.out.view(),
            );
        }
        output(ops, &self.out, n, buffers)
    }
}
