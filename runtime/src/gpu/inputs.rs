//! Inputs that tokens have for every layer, and what layers make of them, on a GPU. The arithmetic is that
//! of `engine/residual.rs`. The table stays with the CPU, which sends its rows.

use super::Gpu;
use super::matrix::{GpuLoader, Matrix, product};
use super::workspace::{BlockEnd, Workspace};
use std::ops::Range;
use tier_plan_cuda::ops;
use tier_plan_cuda::{Buffer, CudaError};
use tier_plan_formats::model::spec::{Activation, LayerInput, TokenInputs};

/// What makes tokens' inputs of their embeddings and their rows of the table.
pub(super) struct InputProjection {
    matrix: Matrix,
    /// Of each layer's part, `[dim]`.
    norm: Buffer,
    /// Values per layer.
    dim: usize,
}

/// What a layer makes of its part of the inputs: `x += norm(proj (gelu(gate x) · u))`.
pub(super) struct EndInput {
    gate: Matrix,
    proj: Matrix,
    end: BlockEnd,
    layer: usize,
}

impl InputProjection {
    pub(super) fn new(loader: &GpuLoader<'_>, own: &TokenInputs) -> Result<Self, CudaError> {
        Ok(Self {
            matrix: loader.linear(&own.proj)?,
            norm: loader.vector(own.norm)?,
            dim: own.dim,
        })
    }

    /// Makes the inputs of rows of the batch, whose embeddings are the hidden state and whose rows of the
    /// table are in `buffers.input_rows`: launches only.
    pub(super) fn fill(&self, work: &mut Workspace, rows: Range<usize>) -> Result<(), CudaError> {
        let (n, first, hidden) = (rows.len(), rows.start, work.hidden);
        if self.matrix.takes_quants() {
            let x = work
                .buffers
                .x
                .view()
                .floats(rows.start * hidden..rows.end * hidden);
            work.ops.quantize(x, n, hidden, &mut work.buffers.quants)?;
        }
        let (x, buffers) = (work.state(rows), &work.buffers);
        let projected = buffers.input_products.view();
        product(&work.ops, &self.matrix, n, x, &buffers.quants, projected)?;
        let inputs = ops::TokenInputs {
            tokens: n,
            layers: self.matrix.n_out / self.dim,
            dim: self.dim,
            hidden,
            projected,
            rows: buffers.input_rows.view(),
            norm: self.norm.view(),
            eps: work.eps,
            first,
            capacity: work.batch,
        };
        work.ops.token_inputs(&inputs, buffers.inputs.view())
    }
}

impl EndInput {
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        input: &LayerInput,
        layer: usize,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            gate: loader.linear(&input.gate)?,
            proj: loader.linear(&input.proj)?,
            end: BlockEnd {
                norm: Some(loader.vector(input.norm)?),
                scale: 1.0,
            },
            layer,
        })
    }

    /// Computes to `buffers.out` what the inputs of rows, whose hidden state is complete, add to it.
    pub(super) fn run(&self, work: &mut Workspace, rows: Range<usize>) -> Result<(), CudaError> {
        let (n, hidden, dim) = (rows.len(), work.hidden, self.gate.n_out);
        let first = (self.layer * work.batch + rows.start) * dim;
        let Workspace { ops, buffers, .. } = &mut *work;
        let x = buffers
            .x
            .view()
            .floats(rows.start * hidden..rows.end * hidden);
        if self.gate.takes_quants() {
            ops.quantize(x, n, hidden, &mut buffers.quants)?;
        }
        let gate = buffers.ffn_gate.view();
        product(ops, &self.gate, n, x, &buffers.quants, gate)?;
        let inputs = buffers.inputs.view().floats(first..first + n * dim);
        let quants = self.proj.takes_quants().then_some(&mut buffers.inner);
        ops.activate(Activation::Gelu, gate, inputs, n, dim, quants)?;
        product(ops, &self.proj, n, gate, &buffers.inner, buffers.out.view())?;
        work.finish(&self.end, n)
    }
}

impl Gpu {
    /// Takes the tokens' rows of the table, `[rows, layers * dim]`.
    pub(crate) fn put_input_rows(&self, values: &[f32]) -> Result<(), CudaError> {
        self.work.buffers.input_rows.view().write_f32(values)
    }

    /// Makes the inputs of rows of the batch, whose rows of the table were [put](Self::put_input_rows)
    /// and whose embeddings are the hidden state.
    ///
    /// # Errors
    /// When the projection is elsewhere.
    pub(crate) fn fill_inputs(&mut self, rows: Range<usize>) -> Result<(), CudaError> {
        let Self { inputs, work, .. } = self;
        match inputs {
            Some(inputs) => inputs.fill(work, rows),
            None => Err(work.missing("the projection of tokens' inputs")),
        }
    }
}
