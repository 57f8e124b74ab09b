//! What matrix products take: quantized activations, matrices alone and in tables, and groups of
//! tokens.

use super::{int, null_or};
use crate::CudaError;
use crate::device::{Arg, Buffer, Device, View};
use std::sync::Arc;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// 8-bit activations on a device, with a scale per 32 values: the same bits as the CPU's.
pub struct Quants {
    /// `[rows, cols]`.
    pub codes: Buffer,
    /// `[rows, cols / 32]`.
    pub scales: Buffer,
    /// `[rows, cols / 16]`: scale times the sum of codes.
    pub sums: Buffer,
    capacity: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Quants {
    /// Allocates memory for `values` values.
    pub fn new(device: &Arc<dyn Device>, values: usize) -> Result<Self, CudaError> {
        Ok(Self {
            codes: Buffer::new(device, values)?,
            scales: Buffer::new_f32(device, values / 32)?,
            sums: Buffer::new_f32(device, values / 16)?,
            capacity: values,
            rows: 0,
            cols: 0,
        })
    }

    /// Takes the shape of what a kernel will write. Returns its three arguments.
    pub(super) fn take_shape(&mut self, rows: usize, cols: usize) -> [Arg; 3] {
        assert!(
            cols.is_multiple_of(32) && rows * cols <= self.capacity,
            "{rows} x {cols} values"
        );
        (self.rows, self.cols) = (rows, cols);
        [
            self.codes.view().arg(),
            self.scales.view().arg(),
            self.sums.view().arg(),
        ]
    }

    /// Takes the shape of what a kernel will write, or returns null arguments for `None`.
    pub(super) fn fill_or_null(quants: Option<&mut Quants>, rows: usize, cols: usize) -> [Arg; 3] {
        quants.map_or([Arg::Pointer(0); 3], |quants| quants.take_shape(rows, cols))
    }
}

/// Matrices of one format and size: one for all jobs, or one of several per job.
#[derive(Clone, Copy)]
pub enum Matrices<'a> {
    /// One matrix for every job.
    One(View<'a>),
    /// Job `i` takes matrix `i` of the table.
    Table(&'a MatrixTable<'a>),
    /// Job `i` takes the matrix whose index is `which[i]`, `[jobs]` integers on the device. For an
    /// index outside of the table or of a missing matrix, the result stays as it is.
    Chosen(&'a MatrixTable<'a>, View<'a>),
}

impl Matrices<'_> {
    /// Returns a kernel's arguments: the one matrix, the table, its length, and the choices of the
    /// jobs. `bytes` are those of a matrix.
    pub(super) fn args(self, jobs: usize, bytes: usize) -> [Arg; 4] {
        let (one, table, which) = match self {
            Matrices::One(w) => (Some(w.aligned()), None, None),
            Matrices::Table(table) => (None, Some(table), None),
            Matrices::Chosen(table, which) => (None, Some(table), Some(which)),
        };
        let smallest = one.map(View::len).or(table.and_then(|t| t.smallest));
        assert!(
            smallest.is_none_or(|len| len >= bytes),
            "matrices of {bytes} bytes"
        );
        assert!(which.is_none_or(|w| w.words() >= jobs), "{jobs} choices");
        let n_table = table.map_or(0, |t| t.n);
        [
            null_or(one),
            null_or(table.map(|t| t.pointers.view())),
            int(n_table),
            null_or(which),
        ]
    }

    /// Returns the number of matrices.
    pub(super) fn count(self) -> usize {
        match self {
            Matrices::One(_) => 1,
            Matrices::Table(table) | Matrices::Chosen(table, _) => table.n,
        }
    }
}

/// A product of matrices with few rows of activations:
/// `out[job, row] = bias[matrix, row] + sum over c of w[matrix, row, c] * x[job / jobs_per_x, c]`.
#[derive(Clone, Copy)]
pub struct Matvec<'a> {
    /// Format of the matrices.
    pub ty: TensorType,
    /// `[n_rows, n_cols]` each.
    pub matrices: Matrices<'a>,
    /// `[matrices, n_rows]`.
    pub bias: Option<View<'a>>,
    /// Number of rows of results.
    pub jobs: usize,
    /// Rows of a matrix.
    pub n_rows: usize,
    /// Columns of a matrix.
    pub n_cols: usize,
    /// `[jobs / jobs_per_x, n_cols]`.
    pub x: Input<'a>,
    /// Consecutive jobs that share a row of `x`.
    pub jobs_per_x: usize,
}

/// A product of each head with its transposed matrix:
/// `out[job, c] = sum over r of x[job, r] * w[job % heads, r, c]`.
#[derive(Clone, Copy)]
pub struct TransposedMatvec<'a> {
    /// `[heads, n_rows, n_cols]` floats.
    pub w: View<'a>,
    /// Number of matrices.
    pub heads: usize,
    /// Rows of results, a multiple of `heads`.
    pub jobs: usize,
    /// Rows of a matrix.
    pub n_rows: usize,
    /// Columns of a matrix.
    pub n_cols: usize,
    /// `[jobs, n_rows]`.
    pub x: View<'a>,
}

/// One of several matrices that are multiplied with the same activations in one launch.
#[derive(Clone, Copy)]
pub struct FusedMatvec<'a> {
    /// Format of the matrix.
    pub ty: TensorType,
    /// `[n_rows, n_cols]`.
    pub w: View<'a>,
    /// Rows of the matrix.
    pub n_rows: usize,
    /// `[n_rows]`.
    pub bias: Option<View<'a>>,
    /// `[tokens, n_rows]`.
    pub out: View<'a>,
}

/// A table of matrices by index, some of which may be missing.
pub struct MatrixTable<'a> {
    pub(super) pointers: Buffer,
    pub(super) n: usize,
    /// Bytes of the smallest matrix; `None` if all are missing.
    pub(super) smallest: Option<usize>,
    /// Owners of the matrices, for a table that keeps them.
    held: Vec<Arc<Buffer>>,
    _borrowed: std::marker::PhantomData<View<'a>>,
}

/// A range of bytes of a buffer with shared ownership.
#[derive(Clone)]
#[allow(missing_docs)]
pub struct SharedView {
    pub buffer: Arc<Buffer>,
    pub range: std::ops::Range<usize>,
}

impl SharedView {
    fn view(&self) -> View<'_> {
        self.buffer.view().part(self.range.clone())
    }
}

impl MatrixTable<'static> {
    /// Makes a table that keeps the memory of its matrices.
    ///
    /// # Panics
    /// When a matrix is not inside of its buffer, or not aligned to 16 bytes.
    pub fn owning(
        device: &Arc<dyn Device>,
        matrices: Vec<Option<SharedView>>,
    ) -> Result<Self, CudaError> {
        let views: Vec<_> = matrices
            .iter()
            .map(|m| m.as_ref().map(SharedView::view))
            .collect();
        let MatrixTable {
            pointers,
            n,
            smallest,
            ..
        } = MatrixTable::new(device, &views)?;
        let held = matrices
            .into_iter()
            .flatten()
            .map(|matrix| matrix.buffer)
            .collect();
        Ok(Self {
            pointers,
            n,
            smallest,
            held,
            _borrowed: std::marker::PhantomData,
        })
    }
}

impl<'a> MatrixTable<'a> {
    /// Copies a table of the matrices' addresses to the device.
    ///
    /// # Panics
    /// When a matrix is not aligned to 16 bytes.
    pub fn new(device: &Arc<dyn Device>, matrices: &[Option<View<'a>>]) -> Result<Self, CudaError> {
        let address =
            |m: &Option<View<'a>>| m.map_or(0, |view| view.aligned().address()).to_ne_bytes();
        let bytes: Vec<u8> = matrices.iter().flat_map(address).collect();
        Ok(Self {
            pointers: Buffer::of_bytes(device, &bytes)?,
            n: matrices.len(),
            smallest: matrices.iter().flatten().map(|m| m.len()).min(),
            held: Vec::new(),
            _borrowed: std::marker::PhantomData,
        })
    }

    /// Puts another matrix into a table that keeps its memory, or none.
    ///
    /// # Panics
    /// When there is no such index, or the matrix is not in memory that the table keeps.
    pub fn replace(&self, index: usize, matrix: Option<View<'_>>) -> Result<(), CudaError> {
        let is_kept = |matrix: View<'_>| self.held.iter().any(|held| matrix.is_of(held));
        assert!(
            index < self.n && matrix.is_none_or(is_kept),
            "matrix {index} of {}",
            self.n
        );
        let address = matrix.map_or(0, |view| view.aligned().address());
        let pointers = self.pointers.view();
        let first = index * size_of::<u64>();
        let pointer = pointers.part(first..first + size_of::<u64>());
        pointer.write(&address.to_ne_bytes())
    }
}

/// Consecutive tokens that are multiplied with one matrix of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenGroup {
    /// Index of the matrix; the results of a missing one stay as they are.
    pub matrix: usize,
    /// First of the gathered tokens.
    pub first: usize,
    /// Number of tokens in the group.
    pub tokens: usize,
}

/// Groups of tokens, on the host and on the device.
#[derive(Clone, Copy)]
pub struct TokenGroups<'a> {
    pub(super) groups: &'a [TokenGroup],
    pub(super) on_device: View<'a>,
}

impl<'a> TokenGroups<'a> {
    /// 32-bit values of a group on the device.
    pub const WORDS: usize = 3;

    /// Returns no groups. `buffer` is any memory of the device.
    pub fn none(buffer: View<'a>) -> Self {
        Self {
            groups: &[],
            on_device: buffer.part(0..0),
        }
    }

    /// Copies groups to the device, to `buffer`, `[groups, 3]`.
    pub fn send(groups: &'a [TokenGroup], buffer: View<'a>) -> Result<Self, CudaError> {
        let numbers = groups.iter().flat_map(|g| [g.matrix, g.first, g.tokens]);
        let bytes: Vec<u8> = numbers.flat_map(|v| (v as i32).to_ne_bytes()).collect();
        buffer.write(&bytes)?;
        Ok(Self {
            groups,
            on_device: buffer.part(0..bytes.len()),
        })
    }

    /// Whether there are no groups.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }
}

/// Matrices of a [matmul](super::Ops::matmul).
#[derive(Clone, Copy)]
pub enum BatchMatrices<'a> {
    /// One matrix and a number of tokens.
    One(View<'a>, usize),
    /// Several matrices, each with tokens of its own.
    Groups(&'a MatrixTable<'a>, TokenGroups<'a>),
}

/// Activations of a product.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// `[rows, cols]`, for quantized formats.
    Quants(&'a Quants),
    /// `[rows, cols]`, for F32, F16 and BF16.
    Floats(View<'a>),
}

impl<'a> Input<'a> {
    /// Selects the form of activations that matrices of a format take.
    pub fn for_type(ty: TensorType, floats: View<'a>, quants: &'a Quants) -> Self {
        if needs_quants(ty) {
            Input::Quants(quants)
        } else {
            Input::Floats(floats)
        }
    }

    /// Returns the three arguments of a product of matrices of a format with `[rows, cols]`.
    pub(super) fn args(self, ty: TensorType, rows: usize, cols: usize) -> [Arg; 3] {
        match self {
            Input::Quants(x) => {
                assert!(
                    needs_quants(ty) && x.rows >= rows && x.cols == cols,
                    "activations for {ty}"
                );
                [
                    x.codes.view().arg(),
                    x.scales.view().arg(),
                    x.sums.view().arg(),
                ]
            }
            Input::Floats(x) => {
                assert!(
                    !needs_quants(ty) && x.words() >= rows * cols,
                    "activations for {ty}"
                );
                [x.aligned().arg(), Arg::Pointer(0), Arg::Pointer(0)]
            }
        }
    }
}

/// Returns the bytes of a matrix row.
pub(super) fn row_bytes(ty: TensorType, n_cols: usize) -> usize {
    ty.row_bytes(n_cols as u64)
        .unwrap_or_else(|| panic!("rows of {n_cols} {ty} values")) as usize
}
