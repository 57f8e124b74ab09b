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

/// Computes a panel of float weights, two registers of a row per step, each with a sum of its own.
///
/// # Safety
/// As [`PanelFn`] for the instruction set of `L`, for which the caller is compiled.
#[inline(always)]
pub(super) unsafe fn float_panel<L: Lanes, W: FloatFormat, const N: usize>(panel: &Panel<'_>) {
    /// The most values of a step: two registers of 16 lanes.
    const MAX_STEP: usize = 32;
    /// The most bytes of a weight.
    const MAX_BYTES: usize = 4;
    let step = 2 * L::COUNT;
    let cols = panel.x.cols();
    let whole = cols - cols % step;
    // The last, shorter step, filled up with zeros.
    let mut tail = [[0.0f32; MAX_STEP]; N];
    for (n, tail) in tail.iter_mut().enumerate() {
        tail[..cols - whole].copy_from_slice(&panel.x.values()[n * cols + whole..(n + 1) * cols]);
    }
    let x = panel.x.values().as_ptr();
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        // SAFETY: the caller's processor.
        let mut acc = [[unsafe { L::zero() }; 2]; N];
        let mut c = 0;
        while c < whole {
            // SAFETY: a step is left in the row and in each of the `N` rows of `x`.
            unsafe {
                let p = row.as_ptr().add(c * W::BYTES);
                L::prefetch(p, step * W::BYTES);
                let w = [W::load(p), W::load(p.add(L::COUNT * W::BYTES))];
                for (n, acc) in acc.iter_mut().enumerate() {
                    add_step::<L>(acc, w, x.add(n * cols + c));
                }
            }
            c += step;
        }
        if whole < cols {
            let mut bytes = [0u8; MAX_STEP * MAX_BYTES];
            bytes[..(cols - whole) * W::BYTES].copy_from_slice(&row[whole * W::BYTES..]);
            // SAFETY: the buffers hold a step.
            unsafe {
                let w = [
                    W::load(bytes.as_ptr()),
                    W::load(bytes.as_ptr().add(L::COUNT * W::BYTES)),
                ];
                for (acc, x) in acc.iter_mut().zip(&tail) {
                    add_step::<L>(acc, w, x.as_ptr());
                }
            }
        }
        for (n, [low, high]) in acc.into_iter().enumerate() {
            // SAFETY: the caller's processor; the caller's output holds this element.
            unsafe {
                panel
                    .out
                    .put(n, panel.first_row + r, L::sum_both(low, high))
            };
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
