//! One token with rows that are not interleaved.
//!
//! 256 values of each of 16 rows are unpacked and multiplied row by row, as in `avx512`. Their
//! integer products and scales are then transposed, so that the rest is what bands do:
//!
//! ```text
//! for each group of 256 values:
//!     for each row r of 16:
//!         tile = unpack(group of row r)
//!         products[r] = two integers per run      # those of its first and its second 16 values,
//!         factors[r] = two floats per run         # or any two parts; two scales, or scale and min
//!     transpose both
//!     for each run j: add the products 2 j and 2 j + 1, scaled
//! ```

use super::formats::BandFormat;
use super::{BAND_ROWS, Band, add_products, offsets};
use crate::activations::ActBlock;
use crate::panel::Panel;
use crate::quant::block::GROUP;
use crate::x86::amx::transpose;
use crate::x86::avx512_unpack::{MAX_GROUP_BYTES, Unpack};
use crate::x86::prefetch_rows;
use std::arch::x86_64::*;

/// Mask of the first lane of every run.
const EVEN: __mmask16 = 0x5555;

/// Multiplies up to 16 rows, one after another at the band's address, with the panel's only token.
///
/// # Safety
/// As [`BandsFn`](super::BandsFn).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn multiply<F: BandFormat>(panel: &Panel<'_>, band: &Band) {
    let group_bytes = <F::Rows as Unpack>::GROUP_BYTES;
    let band_bytes = BAND_ROWS * panel.row_bytes;
    let whole = panel.x.cols() / GROUP;
    let runs_left = panel.x.cols() % GROUP / 32;
    let mut sums = [_mm512_setzero_ps(); 2];
    // SAFETY: the rows have `whole` groups, and what is left of them is copied to a whole group.
    unsafe {
        let row = |r: usize| band.bytes.add(r.min(band.n_rows - 1) * panel.row_bytes);
        for (g, x) in panel.x.blocks().iter().enumerate() {
            let at = g * group_bytes;
            if g < whole {
                add_group::<F>(|r| row(r).add(at), band_bytes, x, 8, &mut sums);
                continue;
            }
            let mut padded = [[0u8; MAX_GROUP_BYTES]; BAND_ROWS];
            for (r, padded) in padded.iter_mut().enumerate() {
                let tail = panel.row_bytes - at;
                std::ptr::copy_nonoverlapping(row(r).add(at), padded.as_mut_ptr(), tail);
            }
            add_group::<F>(|r| padded[r].as_ptr(), band_bytes, x, runs_left, &mut sums);
        }
        band.store(panel, 0, _mm512_add_ps(sums[0], sums[1]));
    }
}

/// Adds the products of the first `runs` runs of a group of a band of `band_bytes` bytes.
///
/// # Safety
/// A whole group can be read at each row's address, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn add_group<F: BandFormat>(
    row: impl Fn(usize) -> *const u8,
    band_bytes: usize,
    x: &ActBlock,
    runs: usize,
    sums: &mut [__m512; 2],
) {
    let zero = _mm512_setzero_si512();
    let (mut products, mut factors) = ([zero; BAND_ROWS], [zero; BAND_ROWS]);
    for r in 0..BAND_ROWS {
        let p = row(r);
        prefetch_rows(p, <F::Rows as Unpack>::GROUP_BYTES, band_bytes);
        // SAFETY: the caller's group.
        let tile = unsafe { F::Rows::unpack(p) };
        let q = x.q.as_ptr().cast::<__m512i>();
        // SAFETY: four aligned registers.
        let q = unsafe { [q.read(), q.add(1).read(), q.add(2).read(), q.add(3).read()] };
        let one = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, tile.q[0], q[0]), tile.q[1], q[1]);
        let two = if F::SCALE_PER_16 { zero } else { one };
        let two = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(two, tile.q[2], q[2]), tile.q[3], q[3]);
        (products[r], factors[r]) = if F::SCALE_PER_16 {
            let low = _mm512_mask_shuffle_epi32::<0b10_10_00_00>(one, !EVEN, two);
            let high = _mm512_mask_shuffle_epi32::<0b11_11_01_01>(two, EVEN, one);
            (_mm512_add_epi32(low, high), _mm512_castps_si512(tile.scale))
        } else {
            let both = _mm512_mask_blend_ps(EVEN, tile.min, tile.scale);
            (two, _mm512_castps_si512(both))
        };
    }
    let (products, factors) = (transpose(products), transpose(factors));
    for j in 0..runs {
        // SAFETY: the caller's processor.
        unsafe {
            let (first, second) = (products[2 * j], products[2 * j + 1]);
            let dots = if F::SCALE_PER_16 {
                [first, second]
            } else {
                [_mm512_add_epi32(first, second), zero]
            };
            let offset = offsets::<F>(x, j);
            let dots = [
                _mm512_add_epi32(dots[0], offset[0]),
                _mm512_add_epi32(dots[1], offset[1]),
            ];
            let [scale, second] =
                [factors[2 * j], factors[2 * j + 1]].map(|v| _mm512_castsi512_ps(v));
            add_products::<F>(dots, [scale, second], second, x, j, sums);
        }
    }
}
