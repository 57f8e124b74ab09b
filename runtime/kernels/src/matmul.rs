//! Matmul of weight rows with activation rows: cuts the work into panels and hands them to the
//! kernel of the format and the instruction set.
//!
//! With few tokens (decode) a matmul is one pass over the weights and bound by memory bandwidth.
//! With many (prompts) it is blocked, so that weights are read from memory once:
//!
//! ```text
//! if AMX: all tokens but a small rest go to the tile kernel (x86::amx)
//! for each block of weight rows that fits half the L2 cache:
//!     for each N = 4 or 8 tokens:
//!         kernel[N](rows of the block, the tokens)   # from the second time on, weights are cached
//! ```

use super::bands::{self, BAND_ROWS, RowOrder};
use super::panel::Panel;
use super::{ActView, Kernels, OutMatrix, Weights, needs_quants, scalar};
use std::ops::Range;

/// Weight bytes per block that all tokens are multiplied with before the next block: they stay in
/// the second-level cache.
const MAX_BLOCK_BYTES: usize = 64 << 10;

impl Kernels {
    /// Computes `out[t, r] = w.scale * sum over c of w[r, c] * x[t, c]`, for `r` in `rows` and every
    /// row `t` of `x`.
    ///
    /// The result for a row and a token has the same bits whatever `rows`, and however many tokens
    /// there are.
    ///
    /// # Safety
    /// No other thread reads or writes the columns `rows` of `out` at the same time.
    ///
    /// # Panics
    /// When `rows` are out of bounds or cut a band of interleaved rows, the columns of `w` and `x`
    /// differ, `out` is too small, or `x` lacks the form that the type needs.
    pub unsafe fn matmul(
        self,
        w: Weights<'_>,
        rows: Range<usize>,
        x: ActView<'_>,
        out: OutMatrix<'_>,
    ) {
        let (cols, tokens) = (w.n_cols(), x.rows());
        assert_eq!(
            x.cols(),
            cols,
            "columns of the activations and of the weights"
        );
        assert!(
            x.is_quantized() || !needs_quants(w.ty()),
            "{} weights need quantized activations",
            w.ty()
        );
        assert!(
            needs_quants(w.ty()) || x.values().len() == tokens * cols,
            "{} weights need the values",
            w.ty()
        );
        assert!(
            out.holds(tokens, rows.end),
            "{tokens} x {} values do not fit the output",
            rows.end
        );
        let part = w.rows(rows.clone());
        let part =
            part.unwrap_or_else(|| panic!("rows {rows:?} of a matrix of {} rows", w.n_rows()));
        // SAFETY: the shapes are checked above, and writes are the caller's promise.
        unsafe { self.products(w, rows.clone(), part.bytes(), x, out) };
        if w.scale() != 1.0 {
            for token in 0..tokens {
                // SAFETY: `holds` above, and all products are written.
                unsafe { out.multiply(token, rows.clone(), w.scale()) };
            }
        }
    }

    /// Computes the products of a matmul without its factor. `bytes` are those of `rows`.
    ///
    /// # Safety
    /// As [`matmul`](Self::matmul), whose checks hold.
    unsafe fn products(
        self,
        w: Weights<'_>,
        rows: Range<usize>,
        bytes: &[u8],
        x: ActView<'_>,
        out: OutMatrix<'_>,
    ) {
        let (cols, tokens) = (w.n_cols(), x.rows());
        if cols == 0 {
            for (token, row) in (0..tokens).flat_map(|t| rows.clone().map(move |r| (t, r))) {
                // SAFETY: the output holds them.
                unsafe { out.put(token, row, 0.0) };
            }
            return;
        }
        let panel = |weights, first_row, x, out| Panel {
            weights,
            row_bytes: w.row_bytes(),
            first_row,
            x,
            out,
        };
        #[cfg(target_arch = "x86_64")]
        if let Some(kernel) = self.bands_kernel(w.ty()) {
            // SAFETY: `self` proves the instructions, the rest was asserted before; writes are the
            // caller's promise.
            return unsafe { kernel(&panel(bytes, rows.start, x, out), w.order()) };
        }
        if w.order() == RowOrder::Interleaved {
            // SAFETY: the caller's.
            return unsafe { self.separated(w, rows, bytes, x, out) };
        }
        let kernels = match self.isa() {
            #[cfg(target_arch = "x86_64")]
            crate::Isa::Amx => super::x86::avx512::panels::<true>(w.ty()),
            #[cfg(target_arch = "x86_64")]
            crate::Isa::Avx512 => super::x86::avx512::panels::<false>(w.ty()),
            #[cfg(target_arch = "x86_64")]
            crate::Isa::Avx2 => super::x86::avx2::panels(w.ty()),
            #[cfg(target_arch = "aarch64")]
            crate::Isa::Neon => super::neon::panels(w.ty()),
            _ => scalar::panels(w.ty()),
        };
        #[cfg(target_arch = "x86_64")]
        let (x, out, tokens) = match super::x86::amx::kernel_for(w.ty(), tokens) {
            Some((kernel, count)) if self.isa() == crate::Isa::Amx && !rows.is_empty() => {
                let tiled = panel(bytes, rows.start, x.rows_range(0..count), out);
                // SAFETY: `self` proves the instructions, the rest was asserted before; writes are
                // the caller's promise.
                unsafe { kernel(&tiled) };
                (
                    x.rows_range(count..tokens),
                    out.skip_tokens(count),
                    tokens - count,
                )
            }
            _ => (x, out, tokens),
        };
        let one_pass = tokens <= kernels.len();
        let block_rows = if one_pass {
            rows.len()
        } else {
            MAX_BLOCK_BYTES.div_ceil(w.row_bytes())
        }
        .max(1);
        for (i, weights) in bytes.chunks(block_rows * w.row_bytes()).enumerate() {
            let first_row = rows.start + i * block_rows;
            let mut token = 0;
            while token < tokens {
                let count = (tokens - token).min(kernels.len());
                let next = token + count;
                let (x, out) = (x.rows_range(token..next), out.skip_tokens(token));
                let panel = panel(weights, first_row, x, out);
                // SAFETY: `self` proves the instructions, the rest was asserted before; writes are
                // the caller's promise.
                unsafe { kernels[count - 1](&panel) };
                token = next;
            }
        }
    }

    /// Returns the kernel of this instruction set that computes a type in bands.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn bands_kernel(
        self,
        ty: crate::quant::TensorType,
    ) -> Option<super::x86::bands::BandsFn> {
        match self.isa() {
            crate::Isa::Amx => super::x86::bands::amx(ty),
            crate::Isa::Avx512 => super::x86::bands::avx512(ty),
            crate::Isa::Avx2 => super::x86::bands::avx2(ty),
            _ => None,
        }
    }

    /// Computes the products of interleaved rows with kernels that take rows one by one.
    ///
    /// # Safety
    /// As [`products`](Self::products).
    unsafe fn separated(
        self,
        w: Weights<'_>,
        rows: Range<usize>,
        bytes: &[u8],
        x: ActView<'_>,
        out: OutMatrix<'_>,
    ) {
        let Some(layout) = bands::layout(w.ty()) else {
            unreachable!("interleaved rows have a layout");
        };
        let separated = w.in_order(RowOrder::Sequential).unwrap_or(w);
        let mut band_rows = vec![0; BAND_ROWS * w.row_bytes()];
        for (i, band) in bytes.chunks_exact(BAND_ROWS * w.row_bytes()).enumerate() {
            layout.separate(w.row_bytes(), band, &mut band_rows);
            let first = rows.start + i * BAND_ROWS;
            // SAFETY: the caller's.
            unsafe { self.products(separated, first..first + BAND_ROWS, &band_rows, x, out) };
        }
    }
}
