//! The matmul kernel of F32, F16 and BF16 weights, written once for all registers that are
//! [`Lanes`].
//!
//! A step takes two registers of a weight row and multiplies them with each token, with one
//! register of sums for each of the two. The sums of a row are added up at its end, in the order of
//! [`Lanes::sum_both`]. Columns that do not fill a step are copied to a buffer of zeros first, so
//! that nothing is read past a row's end.

use super::lanes::Lanes;
use super::panel::Panel;
#[cfg(doc)]
use super::panel::PanelFn;

/// A float format of weights.
pub(super) trait FloatFormat {
    /// Bytes per value.
    const BYTES: usize;

    /// Loads a register of values.
    ///
    /// # Safety
    /// `BYTES * L::COUNT` bytes can be read; see [`Lanes`].
    unsafe fn load<L: Lanes>(p: *const u8) -> L;
}

/// Declares the formats with the function of [`Lanes`] that loads each.
macro_rules! float_formats {
    ($($name:ident, $bytes:literal, $load:ident;)*) => {$(
        /// Weights of this element type.
        pub(super) struct $name;

        impl FloatFormat for $name {
            const BYTES: usize = $bytes;

            #[inline(always)]
            unsafe fn load<L: Lanes>(p: *const u8) -> L {
                // SAFETY: the caller's bytes and processor.
                unsafe { L::$load(p) }
            }
        }
    )*};
}

float_formats! {
    F32, 4, load_f32;
    F16, 2, load_f16;
    Bf16, 2, load_bf16;
}

/// Lanes of a register of an instruction set that has 32 of them.
const WIDE_LANES: usize = 16;

/// Rows that are multiplied together with several tokens where there are 32 registers: so each
/// activation is loaded once for all of them, and 24 sums are in registers.
const ROWS_AT_ONCE: usize = 3;

/// The most values of a step: two registers.
const MAX_STEP: usize = 2 * WIDE_LANES;

/// The most bytes of a weight.
const MAX_BYTES: usize = 4;

/// Computes a panel of float weights, two registers of a row per step, each with a sum of its own.
///
/// # Safety
/// As [`PanelFn`] for the instruction set of `L`, for which the caller is compiled.
#[inline(always)]
pub(super) unsafe fn float_panel<L: Lanes, W: FloatFormat, const N: usize>(panel: &Panel<'_>) {
    let cols = panel.x.cols();
    let whole = cols - cols % (2 * L::COUNT);
    // The last, shorter step, filled up with zeros.
    let mut tail = [[0.0f32; MAX_STEP]; N];
    for (n, tail) in tail.iter_mut().enumerate() {
        tail[..cols - whole].copy_from_slice(&panel.x.values()[n * cols + whole..(n + 1) * cols]);
    }
    let n_rows = panel.weights.len() / panel.row_bytes;
    let mut row = 0;
    // SAFETY: the caller's panel and processor; the panel has these rows.
    unsafe {
        if N > 1 && L::COUNT == WIDE_LANES {
            while row + ROWS_AT_ONCE <= n_rows {
                float_rows::<L, W, N, ROWS_AT_ONCE>(panel, row, &tail);
                row += ROWS_AT_ONCE;
            }
        }
        while row < n_rows {
            float_rows::<L, W, N, 1>(panel, row, &tail);
            row += 1;
        }
    }
}

/// Computes `R` rows of a panel from `first` on, given the last step of each token.
///
/// # Safety
/// As [`float_panel`]; the panel has the rows.
#[inline(always)]
unsafe fn float_rows<L: Lanes, W: FloatFormat, const N: usize, const R: usize>(
    panel: &Panel<'_>,
    first: usize,
    tail: &[[f32; MAX_STEP]; N],
) {
    let (cols, step) = (panel.x.cols(), 2 * L::COUNT);
    let whole = cols - cols % step;
    let x = panel.x.values().as_ptr();
    let rows = panel.weights[first * panel.row_bytes..].as_ptr();
    // SAFETY: a step is left in each of the rows and in each of the `N` rows of `x`, or the buffers
    // hold one; the caller's processor and output.
    unsafe {
        let mut acc = [[[L::zero(); 2]; N]; R];
        let mut c = 0;
        while c < whole {
            for (r, acc) in acc.iter_mut().enumerate() {
                let p = rows.add(r * panel.row_bytes + c * W::BYTES);
                L::prefetch(p, step * W::BYTES);
                let w = [W::load(p), W::load(p.add(L::COUNT * W::BYTES))];
                for (n, acc) in acc.iter_mut().enumerate() {
                    add_step::<L>(acc, w, x.add(n * cols + c));
                }
            }
            c += step;
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            if whole < cols {
                let mut bytes = [0u8; MAX_STEP * MAX_BYTES];
                let row = &panel.weights[(first + r) * panel.row_bytes..][..panel.row_bytes];
                bytes[..(cols - whole) * W::BYTES].copy_from_slice(&row[whole * W::BYTES..]);
                let w = [
                    W::load(bytes.as_ptr()),
                    W::load(bytes.as_ptr().add(L::COUNT * W::BYTES)),
                ];
                for (acc, x) in acc.iter_mut().zip(tail) {
                    add_step::<L>(acc, w, x.as_ptr());
                }
            }
            for (n, [low, high]) in acc.iter().enumerate() {
                let sum = L::sum_both(*low, *high);
                panel.out.put(n, panel.first_row + first + r, sum);
            }
        }
    }
}

/// Adds the products of two registers of weights with as many activations, lane by lane.
///
/// # Safety
/// `2 * COUNT` values can be read at `x`; see [`Lanes`].
#[inline(always)]
unsafe fn add_step<L: Lanes>(acc: &mut [L; 2], w: [L; 2], x: *const f32) {
    // SAFETY: the caller's values and processor.
    unsafe {
        acc[0] = L::mul_add(w[0], L::load_f32(x.cast()), acc[0]);
        acc[1] = L::mul_add(w[1], L::load_f32(x.add(L::COUNT).cast()), acc[1]);
    }
}
