//! Attention whose KV cache is in main memory: the GPU multiplies the matrices before and after it, and
//! the CPU does what is between (`layers/gqa.rs`).

use super::matrix::{GpuLoader, Matrix, from_value, product, products};
use super::mixer::{Gate, Mixed, output};
use super::streams::BlockInput;
use super::workspace::{BlockEnd, Output, Purpose, Residual, Workspace};
use crate::layers::gqa::ProjectedRows;
use std::ops::Range;
use tier_plan_cuda::CudaError;
use tier_plan_formats::model::spec::{GqaSpec, LayerSpec};

/// The matrices of a layer's attention, with what is before and after them.
pub(super) struct Projections {
    input: BlockInput,
    q: Matrix,
    k: Matrix,
    /// Left out where keys are values.
    v: Option<Matrix>,
    gate: Option<Gate>,
    o: Matrix,
    end: BlockEnd,
}

impl Projections {
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        layer: &LayerSpec,
        a: &GqaSpec,
    ) -> Result<Self, CudaError> {
        let connection = layer.residual.connections.map(|c| c.mixer);
        let v = (!a.keys_are_values()).then(|| loader.linear(&a.v));
        Ok(Self {
            input: BlockInput::new(loader, connection.as_ref(), layer.mixer_norm)?,
            q: loader.linear(&a.q)?,
            k: loader.linear(&a.k)?,
            v: v.transpose()?,
            gate: Gate::new(loader, a.gate.as_ref())?,
            o: loader.linear(&a.o)?,
            end: BlockEnd {
                norm: loader.opt_vector(layer.residual.mixer_norm)?,
                scale: layer.residual.mixer_scale,
            },
        })
    }

    /// Returns whether any product takes quantized activations.
    fn takes_quants(&self) -> bool {
        let gate = self.gate.as_ref().map(|gate| &gate.matrix);
        let first = [&self.q, &self.k].into_iter().chain(&self.v).chain(gate);
        first.into_iter().any(Matrix::takes_quants)
    }
}

/// The matrices of a layer's attention on a GPU.
pub(crate) struct ProjectionsPart<'a> {
    pub(super) projections: &'a Projections,
    pub(super) work: &'a mut Workspace,
}

impl ProjectionsPart<'_> {
    /// Projects rows of the hidden state to queries, keys, values, and gates, and copies those to the
    /// host.
    pub(crate) fn project(
        &mut self,
        rows: Range<usize>,
        to: ProjectedRows<'_>,
    ) -> Result<(), CudaError> {
        let Self { projections, work } = self;
        let Projections {
            input,
            q,
            k,
            v,
            gate,
            ..
        } = *projections;
        let n = rows.len();
        let form = Output::quantized_if(projections.takes_quants());
        input.read(work, rows, Residual::None, form, Purpose::Block)?;
        let Workspace {
            ops,
            buffers,
            answer,
            ..
        } = &mut **work;
        // One after the other, so that one read brings all of them.
        let (x, quants, raw) = (buffers.answer.view(), &buffers.quants, buffers.raw.view());
        let first_k = n * q.n_out;
        let first_v = first_k + n * k.n_out;
        let first_gate = first_v + v.as_ref().map_or(0, |v| n * v.n_out);
        let len = first_gate + gate.as_ref().map_or(0, |gate| n * gate.matrix.n_out);
        let mut matrices = vec![(q, raw), (k, from_value(raw, first_k))];
        matrices.extend(v.iter().map(|v| (v, from_value(raw, first_v))));
        products(ops, &matrices, n, x, quants)?;
        if let Some(gate) = gate {
            let of_gate = from_value(raw, first_gate);
            product(ops, &gate.matrix, n, x, quants, of_gate)?;
        }
        answer.resize(len, 0.0);
        raw.read_f32(answer)?;
        let (q, rest) = answer.split_at(first_k);
        let (k, rest) = rest.split_at(first_v - first_k);
        let (v, gate) = rest.split_at(first_gate - first_v);
        to.q.copy_from_slice(q);
        to.k.copy_from_slice(k);
        to.v.copy_from_slice(if v.is_empty() { k } else { v });
        to.gate.copy_from_slice(gate);
        Ok(())
    }

    /// Adds to rows of the hidden state what the last matrix makes of the attention's result, `[rows,
    /// n_in]`.
    pub(crate) fn finish(self, rows: Range<usize>, mixed: &[f32]) -> Result<(), CudaError> {
        let Self { projections, work } = self;
        let n = rows.len();
        work.buffers.mixed.view().write_f32(mixed)?;
        let Workspace { ops, buffers, .. } = &mut *work;
        output(ops, &projections.o, n, buffers, Mixed::Floats)?;
        work.finish(&projections.end, n)?;
        work.add_out(rows)
    }
}
