//! The gated short convolution on a GPU. The arithmetic is that of `layers/short_conv.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, product};
use super::mixer::{Mixed, MixerBatch, after_all_states, output};
use crate::layers::device_cache::DeviceCache;
use tier_plan_cuda::ops;
use tier_plan_cuda::{Buffer, CudaError, Ops};
use tier_plan_formats::model::spec::ShortConvSpec;

/// A layer's short convolution with its state.
pub(super) struct ShortConv {
    channels: usize,
    taps: usize,
    input: Matrix,
    conv: Buffer,
    out: Matrix,
    /// The convolution's inputs of texts and checkpoints.
    states: DeviceCache,
}

impl ShortConv {
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        c: &ShortConvSpec,
        states: DeviceCache,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            channels: c.channels,
            taps: c.taps,
            input: loader.linear(&c.input)?,
            conv: loader.vector(c.conv)?,
            out: loader.linear(&c.out)?,
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
        let n = batch.n;
        let (x, projected) = (buffers.answer.view(), buffers.raw.view());
        product(ops, &self.input, n, x, &buffers.quants, projected)?;
        let conv = ops::ShortConv {
            tokens: n,
            channels: self.channels,
            taps: self.taps,
            projected,
            weight: self.conv.view(),
            inputs: self.states.states(0),
            out: buffers.mixed.view(),
        };
        let (positions, segments) = (&buffers.positions, batch.segments);
        after_all_states(positions, segments, &self.states, |runs| {
            ops.short_conv(&conv, runs)
        })?;
        output(ops, &self.out, n, buffers, Mixed::Floats)
    }
}
