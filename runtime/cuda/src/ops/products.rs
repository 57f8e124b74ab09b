//! Products of matrices with activations, quantisation and decoding.

use super::{MATVEC_ROWS, THREADS, blocks, few, int, null_or};
use crate::device::{Arg, Buffer, Device, View};
use crate::{CudaError, Ops, source};
use std::sync::Arc;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// Matrices that are multiplied at once at most.
pub const MOST_PARTS: usize = 3;

/// Rows of a block of a product with many tokens, as the kernel has them.
const TILE_ROWS: u32 = 64;

/// Tokens of such a block.
const TILE_TOKENS: usize = 32;

/// 8-bit activations on a device, 32 values a scale, quantised as the processor quantises them.
pub struct Quants {
    /// `[rows, cols]`.
    pub codes: Buffer,
    /// `[rows, cols / 32]`.
    pub scales: Buffer,
    /// `[rows, cols / 16]`: scale times the sum of codes.
    pub sums: Buffer,
    room: usize,
    rows: usize,
    cols: usize,
}

impl Quants {
    /// Room for `values` values.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn new(device: &Arc<dyn Device>, values: usize) -> Result<Self, CudaError> {
        Ok(Self {
            codes: Buffer::new(device, values)?,
            scales: Buffer::room_f32(device, values / 32)?,
            sums: Buffer::room_f32(device, values / 16)?,
            room: values,
            rows: 0,
            cols: 0,
        })
    }
}

impl Quants {
    /// Takes the shape of what a kernel will write; returns its three arguments.
    pub(super) fn take_shape(&mut self, rows: usize, cols: usize) -> [Arg; 3] {
        assert!(cols.is_multiple_of(32) && rows * cols <= self.room, "{rows} x {cols} values");
        (self.rows, self.cols) = (rows, cols);
        [self.codes.view().arg(), self.scales.view().arg(), self.sums.view().arg()]
    }

    /// Null arguments where nothing is to be quantised.
    pub(super) fn fill_or_null(quants: Option<(&mut Quants, usize, usize)>) -> [Arg; 3] {
        quants.map_or([Arg::Pointer(0); 3], |(quants, rows, cols)| quants.take_shape(rows, cols))
    }
}

/// Matrices of one type and size: one for all jobs, or several of which each job has one.
#[derive(Clone, Copy)]
pub enum Matrices<'a> {
    /// The same for every job.
    One(View<'a>),
    /// The job's own, by number.
    Table(&'a Table<'a>),
    /// The one that `which`, `[jobs]` whole numbers on the device, says; a number outside the table is none, and the
    /// job's result stays as it is.
    Chosen(&'a Table<'a>, View<'a>),
}

impl Matrices<'_> {
    /// A kernel's arguments: the one matrix, the table, its length, and what each job chose; `bytes` are those of a matrix.
    pub(super) fn args(self, jobs: usize, bytes: usize) -> [Arg; 4] {
        let (one, table, which) = match self {
            Matrices::One(w) => (Some(w.aligned()), None, None),
            Matrices::Table(table) => (None, Some(table), None),
            Matrices::Chosen(table, which) => (None, Some(table), Some(which)),
        };
        let least = one.map(View::len).or(table.and_then(|t| t.least));
        assert!(least.is_none_or(|len| len >= bytes), "matrices of {bytes} bytes");
        assert!(which.is_none_or(|w| w.words() >= jobs), "{jobs} choices");
        let n_table = table.map_or(0, |t| t.n);
        [null_or(one), null_or(table.map(|t| t.pointers.view())), int(n_table), null_or(which)]
    }

    /// How many there are.
    pub(super) fn count(self) -> usize {
        match self {
            Matrices::One(_) => 1,
            Matrices::Table(table) | Matrices::Chosen(table, _) => table.n,
        }
    }
}

/// One of several matrices that are multiplied with the same activations.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// Of the matrix.
    pub ty: TensorType,
    /// `[n_rows, _]`.
    pub w: View<'a>,
    /// Rows.
    pub n_rows: usize,
    /// `[n_rows]`.
    pub bias: Option<View<'a>>,
    /// `[tokens, n_rows]`.
    pub out: View<'a>,
}

/// Matrices by number; some may be missing.
pub struct Table<'a> {
    pointers: Buffer,
    n: usize,
    /// Bytes of the smallest; none when all are missing.
    least: Option<usize>,
    /// What it names, where it keeps it itself.
    _held: Vec<Arc<Buffer>>,
    _borrowed: std::marker::PhantomData<View<'a>>,
}

/// Bytes of a buffer that has several owners.
pub type SharedPart = (Arc<Buffer>, std::ops::Range<usize>);

impl Table<'static> {
    /// A table that keeps the memory of its matrices.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a matrix is not inside its buffer.
    pub fn owning(device: &Arc<dyn Device>, matrices: Vec<Option<SharedPart>>) -> Result<Self, CudaError> {
        let views: Vec<_> =
            matrices.iter().map(|m| m.as_ref().map(|(buffer, range)| buffer.view().part(range.clone()))).collect();
        let Table { pointers, n, least, .. } = Table::new(device, &views)?;
        let held = matrices.into_iter().flatten().map(|(buffer, _)| buffer).collect();
        Ok(Self { pointers, n, least, _held: held, _borrowed: std::marker::PhantomData })
    }
}

impl<'a> Table<'a> {
    /// A table on the device of its matrices.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a matrix does not begin at a multiple of 16.
    pub fn new(device: &Arc<dyn Device>, matrices: &[Option<View<'a>>]) -> Result<Self, CudaError> {
        let address = |m: &Option<View<'a>>| m.map_or(0, |view| view.aligned().address()).to_ne_bytes();
        let bytes: Vec<u8> = matrices.iter().flat_map(address).collect();
        Ok(Self {
            pointers: Buffer::of_bytes(device, &bytes)?,
            n: matrices.len(),
            least: matrices.iter().flatten().map(|m| m.len()).min(),
            _held: Vec::new(),
            _borrowed: std::marker::PhantomData,
        })
    }
}

/// Tokens of a batch that one matrix of a table is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// The matrix, by its number; one that is missing leaves its results as they are.
    pub matrix: usize,
    /// The first token, of those gathered.
    pub first: usize,
    /// Tokens.
    pub tokens: usize,
}

/// Groups that the device knows.
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    all: &'a [Group],
    on_device: View<'a>,
}

impl<'a> Groups<'a> {
    /// 32-bit values of one on the device.
    pub const WORDS: usize = 3;

    /// None.
    pub fn none(room: View<'a>) -> Self {
        Self { all: &[], on_device: room.part(0..0) }
    }

    /// Sends them to the device, to `room`, `[groups, 3]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there is too little room.
    pub fn send(all: &'a [Group], room: View<'a>) -> Result<Self, CudaError> {
        let numbers = all.iter().flat_map(|g| [g.matrix, g.first, g.tokens]);
        let bytes: Vec<u8> = numbers.flat_map(|v| (v as i32).to_ne_bytes()).collect();
        room.write(&bytes)?;
        Ok(Self { all, on_device: room.part(0..bytes.len()) })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

/// Matrices of a product with many tokens.
#[derive(Clone, Copy)]
pub enum Batch<'a> {
    /// One matrix and so many tokens.
    One(View<'a>, usize),
    /// Several, each with tokens of its own.
    Groups(&'a Table<'a>, Groups<'a>),
}

/// Activations of a product.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    /// For quantised formats.
    Quants(&'a Quants),
    /// For F32, F16 and BF16: `[rows, cols]`.
    Floats(View<'a>),
}

impl Input<'_> {
    /// The three arguments of a product of matrices of a type with `[rows, cols]`.
    pub(super) fn args(self, ty: TensorType, rows: usize, cols: usize) -> [Arg; 3] {
        match self {
            Input::Quants(x) => {
                assert!(needs_quants(ty) && x.rows >= rows && x.cols == cols, "activations for {ty}");
                [x.codes.view().arg(), x.scales.view().arg(), x.sums.view().arg()]
            }
            Input::Floats(x) => {
                assert!(!needs_quants(ty) && x.words() >= rows * cols, "activations for {ty}");
                [x.aligned().arg(), Arg::Pointer(0), Arg::Pointer(0)]
            }
        }
    }
}

/// Bytes of a row.
pub(super) fn row_bytes(ty: TensorType, n_cols: usize) -> usize {
    ty.row_bytes(n_cols as u64).unwrap_or_else(|| panic!("rows of {n_cols} {ty} values")) as usize
}

impl Ops {
    /// Quantises `[rows, cols]` to 8 bits, as the processor does, to the bit.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When `cols` is no multiple of 32, or there is not room.
    pub fn quantize(&self, x: View<'_>, rows: usize, cols: usize, out: &mut Quants) -> Result<(), CudaError> {
        assert!(x.words() >= rows * cols, "{rows} x {cols} values");
        let n_runs = rows * cols / 32;
        let [codes, scales, sums] = out.take_shape(rows, cols);
        let args = [x.arg(), int(n_runs), codes, scales, sums];
        self.launch("quantize", [blocks(n_runs, THREADS / 32), 1, 1], THREADS, &args)
    }

    /// `out[job, row] = sum over c of w[row, c] * x[job / jobs_per_x, c]`, `out` `[jobs, n_rows]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn matvec(
        &self,
        ty: TensorType,
        matrices: Matrices<'_>,
        jobs: usize,
        n_rows: usize,
        n_cols: usize,
        x: Input<'_>,
        jobs_per_x: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        self.biased_matvec(ty, matrices, None, jobs, n_rows, n_cols, x, jobs_per_x, out)
    }

    /// [`matvec`](Self::matvec) with a bias added, `[_, n_rows]` with a row for every matrix.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn biased_matvec(
        &self,
        ty: TensorType,
        matrices: Matrices<'_>,
        bias: Option<View<'_>>,
        jobs: usize,
        n_rows: usize,
        n_cols: usize,
        x: Input<'_>,
        jobs_per_x: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let [one, table, n_table, which] = matrices.args(jobs, n_rows * row_bytes(ty, n_cols));
        assert!(bias.is_none_or(|b| b.words() >= matrices.count() * n_rows), "biases of {n_rows} rows");
        assert!(jobs_per_x > 0 && out.words() >= jobs * n_rows, "{jobs} x {n_rows} results");
        let [x, scale, sums] = x.args(ty, jobs.div_ceil(jobs_per_x), n_cols);
        let (bias, rows, cols) = (null_or(bias), int(n_rows), int(n_cols));
        let args = [one, table, n_table, which, bias, rows, cols, x, scale, sums, int(jobs_per_x), out.arg()];
        let grid = [blocks(n_rows, MATVEC_ROWS as u32), few(jobs), 1];
        self.launch(source::matvec_kernel(ty), grid, 32 * MATVEC_ROWS as u32, &args)
    }

    /// Products of up to [`MOST_PARTS`] matrices, whose types are of one [family](source::family), with the same `tokens` rows
    /// of activations; one launch.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there are too many, of several families, or a size does not fit.
    pub fn matvecs(&self, parts: &[Part<'_>], tokens: usize, n_cols: usize, x: Input<'_>) -> Result<(), CudaError> {
        let Some(first) = parts.first() else { return Ok(()) };
        assert!(parts.len() <= MOST_PARTS, "{} matrices at once", parts.len());
        let (kernel, _) = source::family(first.ty);
        let mut args = Vec::with_capacity(5 * MOST_PARTS + 4);
        let mut n_blocks = 0;
        for part in parts {
            let &Part { ty, n_rows, .. } = part;
            let (of, number) = source::family(ty);
            assert!(of == kernel, "{ty} is not multiplied by {kernel}");
            assert!(part.w.len() >= n_rows * row_bytes(ty, n_cols), "{n_rows} rows of {n_cols} {ty} values");
            assert!(part.bias.is_none_or(|b| b.words() >= n_rows), "a bias of {n_rows} rows");
            assert!(part.out.words() >= tokens * n_rows, "{tokens} x {n_rows} results");
            args.extend([part.w.aligned().arg(), int(number), int(n_rows), null_or(part.bias), part.out.arg()]);
            n_blocks += n_rows.div_ceil(MATVEC_ROWS);
        }
        for _ in parts.len()..MOST_PARTS {
            args.extend([Arg::Pointer(0), Arg::Int(0), Arg::Int(0), Arg::Pointer(0), Arg::Pointer(0)]);
        }
        args.push(int(n_cols));
        args.extend(x.args(first.ty, tokens, n_cols));
        self.launch(kernel, [blocks(n_blocks, 1), few(tokens), 1], 32 * MATVEC_ROWS as u32, &args)
    }

    /// `out[token, row] = sum over c of w[row, c] * x[token, c]`, for many tokens at a time.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit, or activations are not those of the type.
    pub fn matmul(
        &self,
        ty: TensorType,
        batch: Batch<'_>,
        n_rows: usize,
        n_cols: usize,
        x: Input<'_>,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let row_bytes = ty.row_bytes(n_cols as u64).unwrap_or_else(|| panic!("rows of {n_cols} {ty} values")) as usize;
        let (one, table, tokens, groups) = match batch {
            Batch::One(w, tokens) => (Some(w.aligned()), None, tokens, None),
            Batch::Groups(table, groups) => (None, Some(table), 0, Some(groups)),
        };
        let alone = [Group { matrix: 0, first: 0, tokens }];
        let all = groups.map_or(&alone[..], |g| g.all);
        let least = one.map(View::len).or(table.and_then(|t| t.least));
        assert!(least.is_none_or(|len| len >= n_rows * row_bytes), "{n_rows} rows of {row_bytes} bytes");
        let last = all.iter().map(|g| g.first + g.tokens).max().unwrap_or(0);
        assert!(out.words() >= last * n_rows, "{last} x {n_rows} results");
        let n_table = table.map_or(0, |t| t.n);
        let most = all.iter().map(|g| g.tokens).max().unwrap_or(0);
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
                assert!(needs_quants(ty) && x.rows >= last && x.cols == n_cols, "activations for {ty}");
                args.extend([x.codes.view().arg(), x.scales.view().arg(), x.sums.view().arg()]);
            }
            Input::Floats(x) => {
                assert!(!needs_quants(ty) && x.words() >= last * n_cols, "activations for {ty}");
                args.push(x.aligned().arg());
            }
        }
        args.push(out.arg());
        let grid = [blocks(n_rows, TILE_ROWS), few(most.div_ceil(TILE_TOKENS)), few(all.len())];
        self.launch(source::matmul_kernel(ty), grid, 128, &args)
    }

    /// Decodes rows of `n_cols` values: those numbered by `rows`, `out` `[rows, n_cols]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a row is not there, or a size does not fit.
    pub fn dequantize(
        &self,
        ty: TensorType,
        w: View<'_>,
        n_cols: usize,
        rows: &[u32],
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let row_bytes = ty.row_bytes(n_cols as u64).unwrap_or_else(|| panic!("rows of {n_cols} {ty} values")) as usize;
        let last = rows.iter().max().map_or(0, |row| *row as usize + 1);
        assert!(w.len() >= last * row_bytes, "{last} rows of {row_bytes} bytes");
        let numbers: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
        let which = Buffer::of_i32(&self.device, &numbers)?;
        self.dequantize_chosen(ty, w, n_cols, which.view(), rows.len(), out)
    }

    /// [`dequantize`](Self::dequantize) with the numbers on the device, `[n]`. Each must be that of a row: nothing looks.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn dequantize_chosen(
        &self,
        ty: TensorType,
        w: View<'_>,
        n_cols: usize,
        which: View<'_>,
        n: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        assert!(which.words() >= n && out.words() >= n * n_cols, "{n} rows of {n_cols} values");
        let args = [w.aligned().arg(), which.arg(), int(n), int(n_cols), out.arg()];
        let threads = n * if needs_quants(ty) { n_cols / 32 } else { n_cols };
        self.launch(source::dequantize_kernel(ty), [blocks(threads, THREADS), 1, 1], THREADS, &args)
    }

    /// Each head's product with its transposed matrix: `out[job, c] = sum over r of x[job, r] * w[job % heads, r, c]`, `x`
    /// `[jobs, n_rows]` and `w` `[heads, n_rows, n_cols]`, both floats.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn matvec_transposed(
        &self,
        w: View<'_>,
        heads: usize,
        jobs: usize,
        n_rows: usize,
        n_cols: usize,
        x: View<'_>,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        assert!(heads > 0 && w.words() >= heads * n_rows * n_cols, "{heads} x {n_rows} x {n_cols}");
        assert!(x.words() >= jobs * n_rows && out.words() >= jobs * n_cols, "{jobs} jobs");
        let args = [w.arg(), int(heads), int(n_rows), int(n_cols), x.arg(), out.arg()];
        self.launch("matvec_transposed", [blocks(n_cols, THREADS), few(jobs), 1], THREADS, &args)
    }
}
