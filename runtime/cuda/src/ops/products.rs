//! Matrix products with activations, quantization and dequantization.

use super::{MATVEC_ROWS, THREADS, blocks, few, int, null_or};
use crate::device::{Arg, Buffer, Device, View};
use crate::{CudaError, Ops, source};
use std::sync::Arc;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// Most matrices per call of [`Ops::matvecs`].
pub const MAX_FUSED: usize = 3;

/// Matrix rows per block of a matmul; the kernel has the same constant.
const TILE_ROWS: u32 = 64;

/// Tokens per block of a matmul; the kernel has the same constant.
const TILE_TOKENS: usize = 32;

/// 8-bit activations on a device, with a scale per 32 values: the same bits as the CPU's.
pub struct Quants {
    /// `[rows, cols]`.
    pub codes: Buffer,
    /// `[rows, cols / 32]`.
    pub scales: Buffer,
    /// `[rows, cols / 16]`: scale times the sum of codes.
    pub sums: Buffer,
    capacity: usize,
    rows: usize,
    cols: usize,
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
    pointers: Buffer,
    n: usize,
    /// Bytes of the smallest matrix; `None` if all are missing.
    smallest: Option<usize>,
    /// Owners of the matrices, for a table that keeps them.
    _held: Vec<Arc<Buffer>>,
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
            _held: held,
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
            _held: Vec::new(),
            _borrowed: std::marker::PhantomData,
        })
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
    groups: &'a [TokenGroup],
    on_device: View<'a>,
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

/// Matrices of a [matmul](Ops::matmul).
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

impl Ops {
    /// Quantizes `[rows, cols]` to 8 bits: the same bits as the CPU's.
    ///
    /// # Panics
    /// When `cols` is not a multiple of 32.
    pub fn quantize(
        &self,
        x: View<'_>,
        rows: usize,
        cols: usize,
        out: &mut Quants,
    ) -> Result<(), CudaError> {
        assert!(x.words() >= rows * cols, "{rows} x {cols} values");
        let n_runs = rows * cols / 32;
        let [codes, scales, sums] = out.take_shape(rows, cols);
        let args = [x.arg(), int(n_runs), codes, scales, sums];
        self.launch(
            "quantize",
            [blocks(n_runs, THREADS / 32), 1, 1],
            THREADS,
            &args,
        )
    }

    /// Multiplies matrices with few rows of activations; `out` is `[jobs, n_rows]`.
    pub fn matvec(&self, m: &Matvec<'_>, out: View<'_>) -> Result<(), CudaError> {
        let &Matvec {
            ty,
            matrices,
            bias,
            jobs,
            n_rows,
            n_cols,
            x,
            jobs_per_x,
        } = m;
        let [one, table, n_table, which] = matrices.args(jobs, n_rows * row_bytes(ty, n_cols));
        assert!(
            bias.is_none_or(|b| b.words() >= matrices.count() * n_rows),
            "biases of {n_rows} rows"
        );
        assert!(
            jobs_per_x > 0 && out.words() >= jobs * n_rows,
            "{jobs} x {n_rows} results"
        );
        let [x, scale, sums] = x.args(ty, jobs.div_ceil(jobs_per_x), n_cols);
        let (bias, rows, cols) = (null_or(bias), int(n_rows), int(n_cols));
        let args = [
            one,
            table,
            n_table,
            which,
            bias,
            rows,
            cols,
            x,
            scale,
            sums,
            int(jobs_per_x),
            out.arg(),
        ];
        let grid = [blocks(n_rows, MATVEC_ROWS as u32), few(jobs), 1];
        self.launch(
            source::matvec_kernel(ty),
            grid,
            32 * MATVEC_ROWS as u32,
            &args,
        )
    }

    /// Multiplies up to [`MAX_FUSED`] matrices with the same `tokens` rows of activations in one
    /// launch.
    ///
    /// # Panics
    /// When there are more matrices, or their formats are not of one [family](source::family).
    pub fn matvecs(
        &self,
        fused: &[FusedMatvec<'_>],
        tokens: usize,
        n_cols: usize,
        x: Input<'_>,
    ) -> Result<(), CudaError> {
        let Some(first) = fused.first() else {
            return Ok(());
        };
        assert!(fused.len() <= MAX_FUSED, "{} matrices at once", fused.len());
        let (kernel, _) = source::family(first.ty);
        let mut args = Vec::with_capacity(5 * MAX_FUSED + 4);
        let mut n_blocks = 0;
        for matrix in fused {
            let &FusedMatvec { ty, n_rows, .. } = matrix;
            let (its_kernel, format) = source::family(ty);
            assert!(its_kernel == kernel, "{ty} is not multiplied by {kernel}");
            assert!(
                matrix.w.len() >= n_rows * row_bytes(ty, n_cols),
                "{n_rows} rows of {n_cols} {ty} values"
            );
            assert!(
                matrix.bias.is_none_or(|b| b.words() >= n_rows),
                "a bias of {n_rows} rows"
            );
            assert!(
                matrix.out.words() >= tokens * n_rows,
                "{tokens} x {n_rows} results"
            );
            args.extend([
                matrix.w.aligned().arg(),
                int(format),
                int(n_rows),
                null_or(matrix.bias),
                matrix.out.arg(),
            ]);
            n_blocks += n_rows.div_ceil(MATVEC_ROWS);
        }
        for _ in fused.len()..MAX_FUSED {
            args.extend([
                Arg::Pointer(0),
                Arg::Int(0),
                Arg::Int(0),
                Arg::Pointer(0),
                Arg::Pointer(0),
            ]);
        }
        args.push(int(n_cols));
        args.extend(x.args(first.ty, tokens, n_cols));
        self.launch(
            kernel,
            [blocks(n_blocks, 1), few(tokens), 1],
            32 * MATVEC_ROWS as u32,
            &args,
        )
    }

    /// Multiplies matrices with many tokens: `out[token, row] = sum over c of w[row, c] * x[token,
    /// c]`.
    ///
    /// # Panics
    /// When the activations are not in the form that the format takes.
    pub fn matmul(
        &self,
        ty: TensorType,
        batch: BatchMatrices<'_>,
        n_rows: usize,
        n_cols: usize,
        x: Input<'_>,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let row_bytes = row_bytes(ty, n_cols);
        let (one, table, tokens, groups) = match batch {
            BatchMatrices::One(w, tokens) => (Some(w.aligned()), None, tokens, None),
            BatchMatrices::Groups(table, groups) => (None, Some(table), 0, Some(groups)),
        };
        let alone = [TokenGroup {
            matrix: 0,
            first: 0,
            tokens,
        }];
        let ranges = groups.map_or(&alone[..], |g| g.groups);
        let smallest = one.map(View::len).or(table.and_then(|t| t.smallest));
        assert!(
            smallest.is_none_or(|len| len >= n_rows * row_bytes),
            "{n_rows} rows of {row_bytes} bytes"
        );
        let end = ranges.iter().map(|g| g.first + g.tokens).max().unwrap_or(0);
        assert!(out.words() >= end * n_rows, "{end} x {n_rows} results");
        let n_table = table.map_or(0, |t| t.n);
        let most = ranges.iter().map(|g| g.tokens).max().unwrap_or(0);
        let mut args = vec![
            null_or(one),
            null_or(table.map(|t| t.pointers.view())),
            int(n_table),
            null_or(groups.map(|g| g.on_device)),
            int(most),
            int(n_rows),
            int(n_cols),
        ];
        match x {
            Input::Quants(x) => {
                assert!(
                    needs_quants(ty) && x.rows >= end && x.cols == n_cols,
                    "activations for {ty}"
                );
                args.extend([
                    x.codes.view().arg(),
                    x.scales.view().arg(),
                    x.sums.view().arg(),
                ]);
            }
            Input::Floats(x) => {
                assert!(
                    !needs_quants(ty) && x.words() >= end * n_cols,
                    "activations for {ty}"
                );
                args.push(x.aligned().arg());
            }
        }
        args.push(out.arg());
        let grid = [
            blocks(n_rows, TILE_ROWS),
            few(most.div_ceil(TILE_TOKENS)),
            few(ranges.len()),
        ];
        self.launch(source::matmul_kernel(ty), grid, 128, &args)
    }

    /// Dequantizes the rows of `n_cols` values whose indices are `rows`; `out` is `[rows, n_cols]`.
    pub fn dequantize(
        &self,
        ty: TensorType,
        w: View<'_>,
        n_cols: usize,
        rows: &[u32],
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let row_bytes = row_bytes(ty, n_cols);
        let end = rows.iter().max().map_or(0, |row| *row as usize + 1);
        assert!(
            w.len() >= end * row_bytes,
            "{end} rows of {row_bytes} bytes"
        );
        let indices: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
        let which = Buffer::of_i32(&self.device, &indices)?;
        self.dequantize_chosen(ty, w, n_cols, which.view(), rows.len(), out)
    }

    /// Dequantizes the rows whose indices are on the device, `which` `[n]`. The indices are not
    /// checked.
    pub fn dequantize_chosen(
        &self,
        ty: TensorType,
        w: View<'_>,
        n_cols: usize,
        which: View<'_>,
        n: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        assert!(
            which.words() >= n && out.words() >= n * n_cols,
            "{n} rows of {n_cols} values"
        );
        let args = [
            w.aligned().arg(),
            which.arg(),
            int(n),
            int(n_cols),
            out.arg(),
        ];
        let threads = n * if needs_quants(ty) {
            n_cols / 32
        } else {
            n_cols
        };
        self.launch(
            source::dequantize_kernel(ty),
            [blocks(threads, THREADS), 1, 1],
            THREADS,
            &args,
        )
    }

    /// Multiplies each head with its transposed matrix; `out` is `[jobs, n_cols]`.
    pub fn matvec_transposed(
        &self,
        m: &TransposedMatvec<'_>,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let &TransposedMatvec {
            w,
            heads,
            jobs,
            n_rows,
            n_cols,
            x,
        } = m;
        assert!(
            heads > 0 && w.words() >= heads * n_rows * n_cols,
            "{heads} x {n_rows} x {n_cols}"
        );
        assert!(
            x.words() >= jobs * n_rows && out.words() >= jobs * n_cols,
            "{jobs} jobs"
        );
        let args = [
            w.arg(),
            int(heads),
            int(n_rows),
            int(n_cols),
            x.arg(),
            out.arg(),
        ];
        self.launch(
            "matvec_transposed",
            [blocks(n_cols, THREADS), few(jobs), 1],
            THREADS,
            &args,
        )
    }
}
