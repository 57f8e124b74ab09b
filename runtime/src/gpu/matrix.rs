//! Matrices and vectors of a model on a GPU, and matrix products.

use super::buffers::GpuBuffers;
use crate::layers::rope::RopeTable;
use crate::layers::weights::DenseWeights;
use std::ops::Range;
use std::sync::Arc;
use tier_plan_cuda::ops::{
    BatchMatrices, FusedMatvec, GateUpMatrices, Gated, Input, MAX_FUSED, Matrices, Matvec, Quants,
};
use tier_plan_cuda::{Buffer, CudaError, Device, Ops, View, source};
use tier_plan_formats::model::spec::{Activation, GatedFfn, Linear, TensorId};
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// Rows from which on matrices are multiplied by matmul instead of matvec.
const MATMUL_MIN_ROWS: usize = 8;

/// A matrix on a GPU: a tensor as in the model file, or some of its rows.
pub(super) struct Matrix {
    pub(super) bytes: Arc<Buffer>,
    pub(super) range: Range<usize>,
    pub(super) ty: TensorType,
    pub(super) n_out: usize,
    pub(super) n_in: usize,
    bias: Option<Buffer>,
}

impl Matrix {
    pub(super) fn view(&self) -> View<'_> {
        self.bytes.view().part(self.range.clone())
    }

    pub(super) fn takes_quants(&self) -> bool {
        needs_quants(self.ty)
    }

    fn bias(&self) -> Option<View<'_>> {
        self.bias.as_ref().map(Buffer::view)
    }

    /// Selects the form of activations that the matrix takes.
    fn input<'a>(&self, x: View<'a>, quants: &'a Quants) -> Input<'a> {
        Input::for_type(self.ty, x, quants)
    }
}

/// Loads the tensors of a GPU's parts: matrices are there already, vectors are copied.
#[derive(Clone, Copy)]
pub(super) struct GpuLoader<'a> {
    pub(super) device: &'a Arc<dyn Device>,
    pub(super) weights: &'a DenseWeights,
    /// Rope tables of the model.
    pub(super) ropes: &'a [RopeTable],
}

impl GpuLoader<'_> {
    /// Returns rows of a tensor that is on the GPU.
    pub(super) fn rows(&self, id: TensorId, rows: Range<usize>, n_in: usize) -> Matrix {
        let ty = self.weights.ty(id);
        let Some(bytes) = self.weights.on_device(id) else {
            unreachable!("loading copied the tensors of a GPU's parts there")
        };
        let row = ty.row_bytes(n_in as u64).unwrap_or_default() as usize;
        let range = rows.start * row..rows.end * row;
        Matrix {
            bytes: Arc::clone(bytes),
            range,
            ty,
            n_out: rows.len(),
            n_in,
            bias: None,
        }
    }

    pub(super) fn linear(&self, l: &Linear) -> Result<Matrix, CudaError> {
        let bias = self
            .weights
            .bias(l)
            .map(|bias| Buffer::of_f32(self.device, bias))
            .transpose()?;
        Ok(Matrix {
            bias,
            ..self.rows(l.weight, l.first_row..l.first_row + l.n_out, l.n_in)
        })
    }

    pub(super) fn vector(&self, id: TensorId) -> Result<Buffer, CudaError> {
        Buffer::of_f32(self.device, self.weights.vector(id))
    }

    pub(super) fn opt_vector(&self, id: Option<TensorId>) -> Result<Option<Buffer>, CudaError> {
        id.map(|id| self.vector(id)).transpose()
    }
}

/// Returns rows of a buffer with rows of `width` values.
pub(super) fn of_rows<'a>(view: View<'a>, rows: &Range<usize>, width: usize) -> View<'a> {
    view.floats(rows.start * width..rows.end * width)
}

/// Returns a buffer from one of its values on.
pub(super) fn from_value(view: View<'_>, first: usize) -> View<'_> {
    view.floats(first..view.words())
}

/// Computes `out = matrix · x + bias` for `n` rows. `quants` is the quantized form of `x`, where
/// the matrix takes it.
pub(super) fn product(
    ops: &Ops,
    matrix: &Matrix,
    n: usize,
    x: View<'_>,
    quants: &Quants,
    out: View<'_>,
) -> Result<(), CudaError> {
    let &Matrix {
        ty, n_out, n_in, ..
    } = matrix;
    let x = matrix.input(x, quants);
    if n < MATMUL_MIN_ROWS {
        let matvec = Matvec {
            ty,
            matrices: Matrices::One(matrix.view()),
            bias: matrix.bias(),
            jobs: n,
            n_rows: n_out,
            n_cols: n_in,
            x,
            jobs_per_x: 1,
        };
        return ops.matvec(&matvec, out);
    }
    ops.matmul(
        ty,
        BatchMatrices::One(matrix.view(), n),
        n_out,
        n_in,
        x,
        out,
    )?;
    match matrix.bias() {
        Some(bias) => ops.add_bias(out, bias, None, n, n_out),
        None => Ok(()),
    }
}

/// Computes the [`product`] of several matrices with the same rows. For few rows, matrices whose
/// formats are of one family take one launch.
pub(super) fn products<'a>(
    ops: &Ops,
    matrices: &[(&'a Matrix, View<'a>)],
    n: usize,
    x: View<'_>,
    quants: &Quants,
) -> Result<(), CudaError> {
    let mut left = matrices.to_vec();
    while let Some(&(first, _)) = left.first() {
        let family = |m: &Matrix| (source::family(m.ty).0, m.n_in);
        let (now, later): (Vec<_>, Vec<_>) = left
            .into_iter()
            .partition(|(m, _)| family(m) == family(first));
        let at_once = if n >= MATMUL_MIN_ROWS { 1 } else { MAX_FUSED };
        for now in now.chunks(at_once) {
            if let [(matrix, out)] = now {
                product(ops, matrix, n, x, quants, *out)?;
                continue;
            }
            let fuse = |m: &'a Matrix, out| FusedMatvec {
                ty: m.ty,
                w: m.view(),
                n_rows: m.n_out,
                bias: m.bias(),
                out,
            };
            let fused: Vec<_> = now.iter().map(|(m, out)| fuse(m, *out)).collect();
            ops.matvecs(&fused, n, first.n_in, first.input(x, quants))?;
        }
        left = later;
    }
    Ok(())
}

/// The matrices of a feed-forward block, gated in most models.
pub(super) struct FfnMatrices {
    gate: Option<Matrix>,
    up: Matrix,
    down: Matrix,
    activation: Activation,
}

impl FfnMatrices {
    pub(super) fn new(loader: &GpuLoader<'_>, ffn: &GatedFfn) -> Result<Self, CudaError> {
        Ok(Self {
            gate: ffn.gate.as_ref().map(|l| loader.linear(l)).transpose()?,
            up: loader.linear(&ffn.up)?,
            down: loader.linear(&ffn.down)?,
            activation: ffn.activation,
        })
    }

    /// Whether gate or up take quantized activations.
    pub(super) fn takes_quants(&self) -> bool {
        self.gate.as_ref().is_some_and(Matrix::takes_quants) || self.up.takes_quants()
    }

    /// Computes `buffers.out = down(activation(gate x, up x))` for `n` rows of `buffers.answer`,
    /// quantized in `buffers.quants` where the matrices take that.
    pub(super) fn run(
        &self,
        ops: &Ops,
        buffers: &mut GpuBuffers,
        n: usize,
    ) -> Result<(), CudaError> {
        let Self { gate, up, down, .. } = self;
        let (x, width) = (buffers.answer.view(), up.n_out);
        let (of_gate, of_up) = (buffers.ffn_gate.view(), buffers.ffn_up.view());
        let quants = down.takes_quants().then_some(&mut buffers.inner);
        let one_format = gate.as_ref().is_none_or(|gate| gate.ty == up.ty);
        if n < MATMUL_MIN_ROWS && one_format {
            let gated = Gated {
                ty: up.ty,
                matrices: match gate {
                    Some(gate) => GateUpMatrices::One([gate.view(), up.view()]),
                    None => GateUpMatrices::Up(up.view()),
                },
                biases: [gate.as_ref().and_then(Matrix::bias), up.bias()],
                factors: None,
                activation: self.activation,
                jobs: n,
                n_rows: width,
                n_cols: up.n_in,
                x: up.input(x, &buffers.quants),
                jobs_per_x: 1,
            };
            ops.gated(&gated, of_gate, quants)?;
        } else {
            // Without a gate, the product with up takes its place.
            let of_up = if gate.is_some() { of_up } else { of_gate };
            let gate = gate.iter().map(|gate| (gate, of_gate));
            let both: Vec<_> = gate.chain([(up, of_up)]).collect();
            products(ops, &both, n, x, &buffers.quants)?;
            ops.activate(self.activation, of_gate, of_up, n, width, quants)?;
        }
        product(ops, down, n, of_gate, &buffers.inner, buffers.out.view())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_cuda::shim;
    use tier_plan_kernels::random::Random;

    #[test]
    fn fused_products_match_single_ones() {
        use TensorType::{F16, F32, Q4_0, Q5_1, Q8_0};
        let device: Arc<dyn Device> = shim::shared();
        let (ops, mut random, n_in) = (
            Ops::new(Arc::clone(&device)),
            Random::new("several matrices"),
            96,
        );
        // One family, several, more than a launch takes; with biases and without.
        for types in [
            &[Q4_0, Q8_0, Q4_0][..],
            &[Q5_1, F32, Q8_0],
            &[F16, Q4_0],
            &[Q4_0, Q4_0, Q8_0, Q5_1],
        ] {
            let make = |(i, ty): (usize, &TensorType), random: &mut Random| {
                let n_out = 7 + i;
                let bytes = random.weights(*ty, n_out * n_in);
                let bias =
                    (i != 1).then(|| Buffer::of_f32(&device, &random.floats(n_out)).unwrap());
                let on_device = Arc::new(Buffer::of_bytes(&device, &bytes).unwrap());
                Matrix {
                    bytes: on_device,
                    range: 0..bytes.len(),
                    ty: *ty,
                    n_out,
                    n_in,
                    bias,
                }
            };
            let matrices: Vec<_> = types
                .iter()
                .enumerate()
                .map(|indexed| make(indexed, &mut random))
                .collect();
            for n in [1, 2, MATMUL_MIN_ROWS] {
                let x = Buffer::of_f32(&device, &random.floats(n * n_in)).unwrap();
                let mut quants = Quants::new(&device, n * n_in).unwrap();
                ops.quantize(x.view(), n, n_in, &mut quants).unwrap();
                let results = || -> Vec<_> {
                    matrices
                        .iter()
                        .map(|m| Buffer::new_f32(&device, n * m.n_out).unwrap())
                        .collect()
                };
                let (together, alone) = (results(), results());
                let parts: Vec<_> = matrices
                    .iter()
                    .zip(&together)
                    .map(|(m, out)| (m, out.view()))
                    .collect();
                products(&ops, &parts, n, x.view(), &quants).unwrap();
                for ((matrix, out), together) in matrices.iter().zip(&alone).zip(&together) {
                    product(&ops, matrix, n, x.view(), &quants, out.view()).unwrap();
                    assert_eq!(
                        out.view().to_f32().unwrap(),
                        together.view().to_f32().unwrap(),
                        "{types:?}, {n} rows"
                    );
                }
            }
        }
    }
}
