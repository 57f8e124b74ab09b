//! Matrices and vectors of a model on a GPU, and their products.

use super::buffers::Room;
use crate::layers::weights::DenseWeights;
use std::ops::Range;
use std::sync::Arc;
use tier_plan_cuda::ops::{Batch, Gated, Input, MOST_PARTS, Matrices, Pair, Part, Quants};
use tier_plan_cuda::{Buffer, CudaError, Device, Ops, View, source};
use tier_plan_formats::model::spec::{Activation, GatedFfn, Linear, TensorId};
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// Rows from which on matrices are multiplied with many at a time.
const MANY: usize = 8;

/// A matrix on a GPU: a tensor as it lies in the file, or some of its rows.
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

    /// Activations as it takes them.
    fn input<'a>(&self, x: View<'a>, quants: &'a Quants) -> Input<'a> {
        if self.takes_quants() { Input::Quants(quants) } else { Input::Floats(x) }
    }
}

/// Takes a model's tensors to a GPU, or finds those that are there.
#[derive(Clone, Copy)]
pub(super) struct Maker<'a> {
    pub(super) device: &'a Arc<dyn Device>,
    pub(super) weights: &'a DenseWeights,
}

impl Maker<'_> {
    /// Rows `rows` of a tensor that the GPU has.
    pub(super) fn rows(&self, id: TensorId, rows: Range<usize>, n_in: usize) -> Matrix {
        let ty = self.weights.ty(id);
        let Some(bytes) = self.weights.on_device(id) else {
            unreachable!("loading took the tensors of a GPU's parts there")
        };
        let row = ty.row_bytes(n_in as u64).unwrap_or_default() as usize;
        let range = rows.start * row..rows.end * row;
        Matrix { bytes: Arc::clone(bytes), range, ty, n_out: rows.len(), n_in, bias: None }
    }

    pub(super) fn linear(&self, l: &Linear) -> Result<Matrix, CudaError> {
        let bias = self.weights.bias(l).map(|bias| Buffer::of_f32(self.device, bias)).transpose()?;
        Ok(Matrix { bias, ..self.rows(l.weight, l.first_row..l.first_row + l.n_out, l.n_in) })
    }

    pub(super) fn vector(&self, id: TensorId) -> Result<Buffer, CudaError> {
        Buffer::of_f32(self.device, self.weights.vector(id))
    }

    pub(super) fn opt_vector(&self, id: Option<TensorId>) -> Result<Option<Buffer>, CudaError> {
        id.map(|id| self.vector(id)).transpose()
    }
}

/// `out = matrix · x + bias` for `n` rows; `quants` are those of `x`, where the matrix takes them.
pub(super) fn product(
    ops: &Ops,
    matrix: &Matrix,
    n: usize,
    x: View<'_>,
    quants: &Quants,
    out: View<'_>,
) -> Result<(), CudaError> {
    let &Matrix { ty, n_out, n_in, .. } = matrix;
    let x = matrix.input(x, quants);
    if n < MANY {
        return ops.biased_matvec(ty, Matrices::One(matrix.view()), matrix.bias(), n, n_out, n_in, x, 1, out);
    }
    ops.matmul(ty, Batch::One(matrix.view(), n), n_out, n_in, x, out)?;
    match matrix.bias() {
        Some(bias) => ops.add_bias(out, bias, None, n, n_out),
        None => Ok(()),
    }
}

/// [`product`] of several matrices with the same rows; for few rows one launch, if a kernel knows all their types.
pub(super) fn products<'a>(
    ops: &Ops,
    matrices: &[(&'a Matrix, View<'a>)],
    n: usize,
    x: View<'_>,
    quants: &Quants,
) -> Result<(), CudaError> {
    let mut left = matrices.to_vec();
    while let Some(&(first, _)) = left.first() {
        let of = |m: &Matrix| (source::family(m.ty).0, m.n_in);
        let (now, later): (Vec<_>, Vec<_>) = left.into_iter().partition(|(m, _)| of(m) == of(first));
        if n >= MANY || now.len() == 1 || now.len() > MOST_PARTS {
            now.iter().try_for_each(|(matrix, out)| product(ops, matrix, n, x, quants, *out))?;
        } else {
            let part = |m: &'a Matrix, out| Part { ty: m.ty, w: m.view(), n_rows: m.n_out, bias: m.bias(), out };
            let parts: Vec<_> = now.iter().map(|(m, out)| part(m, *out)).collect();
            ops.matvecs(&parts, n, first.n_in, first.input(x, quants))?;
        }
        left = later;
    }
    Ok(())
}

/// A gated feed-forward block.
pub(super) struct Ffn {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Ffn {
    pub(super) fn new(maker: &Maker<'_>, ffn: &GatedFfn) -> Result<Self, CudaError> {
        let [gate, up, down] = [&ffn.gate, &ffn.up, &ffn.down].map(|l| maker.linear(l));
        Ok(Self { gate: gate?, up: up?, down: down? })
    }

    /// Whether its first products take 8-bit activations.
    pub(super) fn takes_quants(&self) -> bool {
        self.gate.takes_quants() || self.up.takes_quants()
    }

    /// `room.out = down(silu(gate x) · up x)` for `n` rows of `room.answer`, quantised where it takes that.
    pub(super) fn run(&self, ops: &Ops, room: &mut Room, n: usize) -> Result<(), CudaError> {
        let (x, width) = (room.answer.view(), self.gate.n_out);
        let (gate, up) = (room.ffn_gate.view(), room.ffn_up.view());
        let quants = self.down.takes_quants().then_some(&mut room.inner);
        if n < MANY && self.gate.ty == self.up.ty {
            let gated = Gated {
                ty: self.gate.ty,
                matrices: Pair::One([self.gate.view(), self.up.view()]),
                biases: [self.gate.bias(), self.up.bias()],
                activation: Activation::Silu,
                jobs: n,
                n_rows: width,
                n_cols: self.gate.n_in,
                x: self.gate.input(x, &room.quants),
                jobs_per_x: 1,
            };
            ops.gated(&gated, gate, quants)?;
        } else {
            products(ops, &[(&self.gate, gate), (&self.up, up)], n, x, &room.quants)?;
            ops.activate(Activation::Silu, gate, up, n, width, quants)?;
        }
        product(ops, &self.down, n, gate, &room.inner, room.out.view())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_cuda::shim;
    use tier_plan_kernels::random::Random;

    #[test]
    fn matrices_multiplied_at_once_make_what_each_makes_alone() {
        use TensorType::{F16, F32, Q4_0, Q5_1, Q8_0};
        let device: Arc<dyn Device> = shim::shared();
        let (ops, mut random, n_in) = (Ops::new(Arc::clone(&device)), Random::new("several matrices"), 96);
        // Of one family, of several, more than a launch takes, with biases and without.
        for types in [&[Q4_0, Q8_0, Q4_0][..], &[Q5_1, F32, Q8_0], &[F16, Q4_0], &[Q4_0, Q4_0, Q8_0, Q5_1]] {
            let make = |(i, ty): (usize, &TensorType), random: &mut Random| {
                let n_out = 7 + i;
                let bytes = random.weights(*ty, n_out * n_in);
                let bias = (i != 1).then(|| Buffer::of_f32(&device, &random.floats(n_out)).unwrap());
                let on_device = Arc::new(Buffer::of_bytes(&device, &bytes).unwrap());
                Matrix { bytes: on_device, range: 0..bytes.len(), ty: *ty, n_out, n_in, bias }
            };
            let matrices: Vec<_> = types.iter().enumerate().map(|of| make(of, &mut random)).collect();
            for n in [1, 2, MANY] {
                let x = Buffer::of_f32(&device, &random.floats(n * n_in)).unwrap();
                let mut quants = Quants::new(&device, n * n_in).unwrap();
                ops.quantize(x.view(), n, n_in, &mut quants).unwrap();
                let room =
                    || -> Vec<_> { matrices.iter().map(|m| Buffer::room_f32(&device, n * m.n_out).unwrap()).collect() };
                let (together, alone) = (room(), room());
                let parts: Vec<_> = matrices.iter().zip(&together).map(|(m, out)| (m, out.view())).collect();
                products(&ops, &parts, n, x.view(), &quants).unwrap();
                for ((matrix, out), together) in matrices.iter().zip(&alone).zip(&together) {
                    product(&ops, matrix, n, x.view(), &quants, out.view()).unwrap();
                    assert_eq!(out.view().to_f32().unwrap(), together.view().to_f32().unwrap(), "{types:?}, {n} rows");
                }
            }
        }
    }
}
