//! The space of latent experts on a GPU: the matrices to it and back.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, product};
use super::workspace::Workspace;
use std::ops::Range;
use tier_plan_cuda::{Buffer, CudaError};
use tier_plan_formats::model::spec::Latent as LatentSpec;

/// The matrices of a layer's space of latent experts.
pub(super) struct Latent {
    down: Matrix,
    norm: Option<Buffer>,
    up: Matrix,
}

/// What the experts' sum is added to in `buffers.out`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Onto {
    /// Nothing: the buffer is overwritten.
    Nothing,
    /// The shared expert's result.
    Shared,
}

impl Latent {
    pub(super) fn new(loader: &GpuLoader<'_>, latent: &LatentSpec) -> Result<Self, CudaError> {
        Ok(Self {
            down: loader.linear(&latent.down)?,
            norm: loader.opt_vector(latent.norm)?,
            up: loader.linear(&latent.up)?,
        })
    }

    /// Returns the width of the space.
    pub(super) fn width(&self) -> usize {
        self.down.n_out
    }

    pub(super) fn takes_quants(&self) -> bool {
        self.down.takes_quants()
    }

    /// Computes what experts read of `n` rows that are normalized in `buffers.answer`, to these
    /// values of that buffer.
    pub(super) fn enter(
        &self,
        work: &Workspace,
        n: usize,
        values: Range<usize>,
    ) -> Result<(), CudaError> {
        let buffers = &work.buffers;
        let x = buffers.answer.view();
        product(
            &work.ops,
            &self.down,
            n,
            x,
            &buffers.quants,
            x.floats(values),
        )
    }

    /// Takes experts' sums, which are these values of `buffers.answer`, back to the hidden state's
    /// width, in `buffers.out`. The normalized rows are overwritten.
    pub(super) fn leave(
        &self,
        work: &mut Workspace,
        values: Range<usize>,
        onto: Onto,
    ) -> Result<(), CudaError> {
        let (ops, hidden, width) = (&work.ops, work.hidden, self.width());
        let n = values.len() / width;
        let GpuBuffers {
            answer, out, inner, ..
        } = &mut work.buffers;
        let sums = answer.view().floats(values);
        if let Some(norm) = &self.norm {
            ops.rms_norm(sums, Some(norm.view()), n, width, work.eps, sums)?;
        }
        if self.up.takes_quants() {
            ops.quantize(sums, n, width, inner)?;
        }
        match onto {
            Onto::Nothing => product(ops, &self.up, n, sums, inner, out.view()),
            Onto::Shared => {
                let result = answer.view().floats(0..n * hidden);
                product(ops, &self.up, n, sums, inner, result)?;
                ops.add(out.view(), result, n * hidden)
            }
        }
    }

    /// Takes experts' sums of the host, `[n, latent]`, to the hidden state's width, in `buffers.out`.
    pub(super) fn leave_from(&self, work: &mut Workspace, sums: &[f32]) -> Result<(), CudaError> {
        work.buffers.answer.view().write_f32(sums)?;
        self.leave(work, 0..sums.len(), Onto::Nothing)
    }
}
