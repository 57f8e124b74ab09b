//! Matrix products with activations, quantization and dequantization.

use super::operands::row_bytes;
use super::{BatchMatrices, FusedMatvec, Input, Matvec, Quants, TokenGroup, TransposedMatvec};
use super::{MATVEC_ROWS, THREADS, blocks, few, int, null_or};
use crate::device::{Arg, Buffer, View};
use crate::{CudaError, Ops, source};
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// Most matrices per call of [`Ops::matvecs`].
pub const MAX_FUSED: usize = 3;

/// Matrix rows per block of a matmul; the kernel has the same constant.
const TILE_ROWS: u32 = 64;

/// Tokens per block of a matmul; the kernel has the same constant.
const TILE_TOKENS: usize = 32;

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
