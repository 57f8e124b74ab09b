//! Mamba-2 on a GPU. The arithmetic is that of `layers/mamba.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, product};
use super::mixer::{Mixed, MixerBatch, after_all_states, output};
use crate::layers::device_cache::DeviceCache;
use tier_plan_cuda::ops::{self, MambaSizes};
use tier_plan_cuda::{Buffer, CudaError, Ops};
use tier_plan_formats::model::spec::MambaSpec;

/// A layer's mixer with its state. At position 0 the kernels take the state for zero, so neither
/// loading nor a new text has to write it.
pub(super) struct Mamba {
    sizes: MambaSizes,
    input: Matrix,
    conv: Buffer,
    conv_bias: Option<Buffer>,
    dt_bias: Buffer,
    decay: Buffer,
    skip: Buffer,
    norm: Buffer,
    out: Matrix,
    /// The convolution's inputs and the matrices of texts and checkpoints.
    states: DeviceCache,
}

impl Mamba {
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        m: &MambaSpec,
        states: DeviceCache,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            sizes: MambaSizes::from(m),
            input: loader.linear(&m.input)?,
            conv: loader.vector(m.conv)?,
            conv_bias: loader.opt_vector(m.conv_bias)?,
            dt_bias: loader.vector(m.dt_bias)?,
            decay: loader.vector(m.decay)?,
            skip: loader.vector(m.skip)?,
            norm: loader.vector(m.norm)?,
            out: loader.linear(&m.out)?,
            states,
        })
    }

    pub(super) fn takes_quants(&self) -> bool {
        self.input.takes_quants()
    }

    /// Computes the rows of all texts after their states. Rows that a checkpoint follows end a launch.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        batch: MixerBatch<'_>,
    ) -> Result<(), CudaError> {
        let MixerBatch { n, eps, .. } = batch;
        let (x, projected) = (buffers.answer.view(), buffers.raw.view());
        product(ops, &self.input, n, x, &buffers.quants, projected)?;
        let in_runs = self.sizes.group_width().is_multiple_of(32);
        let quantizes = self.out.takes_quants() && in_runs;
        let mamba = ops::Mamba {
            tokens: n,
            sizes: self.sizes,
            projected,
            conv: self.conv.view(),
            conv_bias: self.conv_bias.as_ref().map(Buffer::view),
            dt_bias: self.dt_bias.view(),
            decay: self.decay.view(),
            skip: self.skip.view(),
            norm: self.norm.view(),
            eps,
            inputs: self.states.states(0),
            matrices: self.states.states(1),
            convolved: buffers.q.view(),
            rates: buffers.v.view(),
            out: buffers.mixed.view(),
        };
        let (positions, segments) = (&buffers.positions, batch.segments);
        after_all_states(positions, segments, &self.states, |runs| {
            ops.mamba(&mamba, runs)
        })?;
        ops.gate_mamba(&mamba, quantizes.then_some(&mut buffers.inner))?;
        output(ops, &self.out, n, buffers, Mixed::quantized_if(quantizes))
    }
}
