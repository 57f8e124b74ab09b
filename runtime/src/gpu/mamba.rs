//! Mamba-2 on a GPU. The arithmetic is that of `layers/mamba.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, of_rows, product};
use super::mixer::{Mixed, MixerBatch, after_states, output};
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

    /// Computes the rows of each text after its state. Rows that a checkpoint follows end a launch.
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
        let quantizes = batch.is_one_part() && self.out.takes_quants() && in_runs;
        after_states(batch.segments, &self.states, |rows, state| {
            let quants = quantizes.then_some(&mut buffers.inner);
            let mamba = ops::Mamba {
                sizes: self.sizes,
                projected: of_rows(projected, &rows, self.sizes.projected()),
                conv: self.conv.view(),
                conv_bias: self.conv_bias.as_ref().map(Buffer::view),
                dt_bias: self.dt_bias.view(),
                decay: self.decay.view(),
                skip: self.skip.view(),
                norm: self.norm.view(),
                eps,
                positions: buffers.positions.all().part(rows.clone()),
                inputs: self.states.state(0, state),
                matrices: self.states.state(1, state),
                convolved: buffers.q.view(),
                rates: buffers.v.view(),
                out: of_rows(buffers.mixed.view(), &rows, self.out.n_in),
            };
            ops.mamba(&mamba, quants)
        })?;
        output(ops, &self.out, n, buffers, Mixed::quantized_if(quantizes))
    }
}
