//! Products of weight rows with activation rows: cuts the work into panels and hands them to the kernel of the format
//! and the instruction set.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::Isa;
use super::{ActView, Kernels, OutMatrix, Weights, needs_quants, scalar};
use std::ops::Range;

/// Some weight rows and as many tokens as the kernel that gets it is made for.
pub(super) struct Panel<'a> {
    /// The rows, one after another.
    pub weights: &'a [u8],
    pub row_bytes: usize,
    /// Where the first of the rows is written.
    pub first_row: usize,
    /// Exactly the kernel's number of tokens.
    pub x: ActView<'a>,
    /// Token 0 is the first of `x`.
    pub out: OutMatrix<'a>,
}

/// Computes a panel.
///
/// # Safety
/// The processor has the kernel's instructions; `x` has the kernel's number of tokens and, for formats that need it, the
/// 8-bit form; `weights` are whole rows of `x.cols()` values, at least one each; `out` holds all of the product, and no
/// other thread touches that part of it.
pub(super) type PanelFn = unsafe fn(&Panel<'_>);

/// Kernels of one format, for 1, 2, 3 and so on tokens.
pub(super) type PanelFns = &'static [PanelFn];

/// Weight bytes that are worked on for all tokens before the next are: they stay in the second-level cache.
const BLOCK_BYTES: usize = 64 << 10;

impl Kernels {
    /// `out[t, r] = sum over c of w[r, c] * x[t, c]`, for `r` in `rows` and every row `t` of `x`.
    ///
    /// A row's product with a token has the same bits whatever `rows` and however many tokens it is computed with.
    ///
    /// # Safety
    /// No other thread reads or writes the columns `rows` of `out` at the same time.
    ///
    /// # Panics
    /// When `rows` are not all in `w`, the columns of `w` and `x` differ, `out` is too small, or `x` lacks the 8-bit form
    /// that the type needs.
    pub unsafe fn matmul(self, w: Weights<'_>, rows: Range<usize>, x: ActView<'_>, out: OutMatrix<'_>) {
        let (cols, tokens) = (w.n_cols(), x.rows());
        assert_eq!(x.cols(), cols, "columns of the activations and of the weights");
        assert!(x.is_quantized() || !needs_quants(w.ty()), "{} weights need quantised activations", w.ty());
        assert!(needs_quants(w.ty()) || x.values().len() == tokens * cols, "{} weights need the values", w.ty());
        assert!(out.holds(tokens, rows.end), "{tokens} x {} values do not fit the output", rows.end);
        let part = w.rows(rows.clone());
        let part = part.unwrap_or_else(|| panic!("rows {rows:?} of a matrix of {} rows", w.n_rows()));
        if cols == 0 {
            for (token, row) in (0..tokens).flat_map(|t| rows.clone().map(move |r| (t, r))) {
                // SAFETY: `holds` above.
                unsafe { out.put(token, row, 0.0) };
            }
            return;
        }
        let kernels = match self.isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => super::x86::avx512::panels::<true>(w.ty()),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => super::x86::avx512::panels::<false>(w.ty()),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => super::x86::avx2::panels(w.ty()),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => super::neon::panels(w.ty()),
            _ => scalar::panels(w.ty()),
        };
        #[cfg(target_arch = "x86_64")]
        let (x, out, tokens) = match super::x86::amx::tiled(w.ty(), tokens) {
            Some((kernel, count)) if self.isa() == Isa::Amx && !rows.is_empty() => {
                let (weights, row_bytes, first_row) = (part.bytes(), w.row_bytes(), rows.start);
                let panel = Panel { weights, row_bytes, first_row, x: x.rows_range(0..count), out };
                // SAFETY: `self` proves the instructions, the rest was asserted above; writes are the caller's promise.
                unsafe { kernel(&panel) };
                (x.rows_range(count..tokens), out.skip_tokens(count), tokens - count)
            }
            _ => (x, out, tokens),
        };
        let one_pass = tokens <= kernels.len();
        let block_rows = if one_pass { rows.len() } else { BLOCK_BYTES.div_ceil(w.row_bytes()) }.max(1);
        for (i, weights) in part.bytes().chunks(block_rows * w.row_bytes()).enumerate() {
            let first_row = rows.start + i * block_rows;
            let mut token = 0;
            while token < tokens {
                let count = (tokens - token).min(kernels.len());
                let next = token + count;
                let (x, out) = (x.rows_range(token..next), out.skip_tokens(token));
                let panel = Panel { weights, row_bytes: w.row_bytes(), first_row, x, out };
                // SAFETY: `self` proves the instructions, the rest was asserted above; writes are the caller's promise.
                unsafe { kernels[count - 1](&panel) };
                token = next;
            }
        }
    }
}
