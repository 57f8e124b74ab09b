//! Registers of AVX2: a word of 8 rows.

use super::{Words, offsets, word};
use crate::activations::ActBlock;
use crate::bands::{BAND_ROWS, BandLayout};
use crate::panel::Panel;
use crate::x86::bands::formats::{BandFormat, Run};
use crate::x86::bands::kernel::{self, Pass};
use crate::x86::bands::{Band, interleave};
use std::arch::x86_64::*;

/// Largest sum of two products of activations with codes up to 1.
const MAX_PAIR_SUM: usize = 2 * 127;

/// Returns how many of a run's sums of two products are added in 16 bits, at most `most`: a power of
/// two.
const fn chain(largest_code: usize, most: usize) -> usize {
    let mut n = most;
    while n * MAX_PAIR_SUM * largest_code > i16::MAX as usize {
        n /= 2;
    }
    n
}

impl Words for __m256i {
    type Floats = __m256;
    type OfBand<T: Copy> = [T; 2];
    const ROWS: usize = 8;
    const WIDE_CODES: bool = false;
    const TAKES_FEWER: bool = true;

    #[inline(always)]
    fn of_band<T: Copy>(value: T) -> [T; 2] {
        [value; 2]
    }

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        // SAFETY: the caller's bytes and processor.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_halves(p: *const u8) -> __m256 {
        // SAFETY: the caller's bytes and processor.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_exponents(p: *const u8) -> __m256 {
        // SAFETY: the caller's bytes and processor.
        unsafe {
            let e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
            // The two smallest are subnormal.
            let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
            let is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
            _mm256_castsi256_ps(_mm256_blendv_epi8(normal, small, is_small))
        }
    }

    #[inline(always)]
    unsafe fn two_halves(self) -> [__m256; 2] {
        // SAFETY: the caller's processor.
        unsafe {
            // The low halves of four words, then their high halves, in each 16 bytes.
            let parts = Self::quads([0x0504_0100, 0x0d0c_0908, 0x0706_0302, 0x0f0e_0b0a]);
            let split = _mm256_permute4x64_epi64::<0b11_01_10_00>(self.shuffle(parts));
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(split)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(split)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn all(value: i32) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_set1_epi32(value) }
    }

    #[inline(always)]
    unsafe fn quads([a, b, c, d]: [i32; 4]) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_setr_epi32(a, b, c, d, a, b, c, d) }
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_and_si256(self, other) }
    }

    #[inline(always)]
    unsafe fn or_and(self, other: Self, mask: Self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_or_si256(self, _mm256_and_si256(other, mask)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_add_epi32(self, other) }
    }

    #[inline(always)]
    unsafe fn left(self, bits: usize) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_sll_epi32(self, _mm_cvtsi64_si128(bits as i64)) }
    }

    #[inline(always)]
    unsafe fn right(self, bits: usize) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_srl_epi32(self, _mm_cvtsi64_si128(bits as i64)) }
    }

    #[inline(always)]
    unsafe fn right_signed(self, bits: usize) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_sra_epi32(self, _mm_cvtsi64_si128(bits as i64)) }
    }

    #[inline(always)]
    unsafe fn shuffle(self, index: Self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_shuffle_epi8(self, index) }
    }

    #[inline(always)]
    unsafe fn add_where(self, bits: Self, mask: Self, value: u8) -> Self {
        // SAFETY: the caller's processor.
        unsafe {
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, mask), mask);
            self.or_and(set, Self::bytes(value))
        }
    }

    #[inline(always)]
    unsafe fn signed(self) -> Self {
        self
    }

    #[inline(always)]
    unsafe fn to_floats(self) -> __m256 {
        // SAFETY: the caller's processor.
        unsafe { _mm256_cvtepi32_ps(self) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller's processor.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn add_floats(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the caller's processor.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn neg_mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the caller's processor.
        unsafe { _mm256_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn dots<F: BandFormat<Self>, const N: usize>(
        run: &Run<Self>,
        x: &ActBlock,
        j: usize,
    ) -> [Self; 2] {
        // SAFETY: the caller's processor.
        unsafe {
            let n = if F::SCALE_PER_16 { 4 } else { 8 };
            let chain = const { chain(F::MAX_CODE, if F::SCALE_PER_16 { 4 } else { 8 }) };
            let ones = _mm256_set1_epi16(1);
            let mut dots = if F::SIGNED {
                [Self::all(0); 2]
            } else {
                offsets::<Self, F>(x, j)
            };
            let mut pairs = Self::all(0);
            for (i, q) in run.q.into_iter().enumerate() {
                let x = _mm256_set1_epi32(word(x, j, i));
                let sums = if F::SIGNED {
                    _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q))
                } else {
                    _mm256_maddubs_epi16(q, x)
                };
                pairs = if i % chain == 0 {
                    sums
                } else {
                    _mm256_add_epi16(pairs, sums)
                };
                if i % chain == chain - 1 {
                    let dot = &mut dots[i / n];
                    *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(pairs, ones));
                }
            }
            dots
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn multiply<F: BandFormat<Self>, const N: usize>(
        panel: &Panel<'_>,
        band: &Band,
        pass: Pass,
    ) {
        // SAFETY: the caller's panel and processor.
        unsafe { kernel::multiply::<Self, F, N>(panel, band, pass) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn multiply_rows<F: BandFormat<Self>>(panel: &Panel<'_>, band: &Band) {
        // SAFETY: the caller's panel and processor.
        unsafe { kernel::multiply_rows::<Self, F>(panel, band) }
    }

    #[inline(always)]
    unsafe fn write_lines(rows: &[*const u8; BAND_ROWS], at: usize, n: usize, to: *mut u8) {
        // SAFETY: the caller's rows and processor.
        unsafe { interleave::lines_avx2(rows, at, n, to) }
    }

    #[inline]
    unsafe fn interleave(
        layout: BandLayout,
        row_bytes: usize,
        rows: &[u8],
        n_rows: usize,
        band: &mut [u8],
    ) {
        // SAFETY: the caller's rows and processor.
        unsafe { interleave::avx2(layout, row_bytes, rows, n_rows, band) }
    }
}

#[cfg(test)]
mod tests {
    use super::chain;

    #[test]
    fn sums_in_16_bits_fit() {
        for (largest_code, most, want) in
            [(15, 8, 8), (15, 4, 4), (31, 8, 4), (63, 4, 2), (128, 8, 1)]
        {
            let n = chain(largest_code, most);
            assert_eq!(n, want, "codes up to {largest_code}");
            let largest = |n| n * 2 * 127 * largest_code;
            assert!(largest(n) < 1 << 15 && (n == most || largest(2 * n) >= 1 << 15));
        }
    }
}
