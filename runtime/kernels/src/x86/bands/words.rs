//! Registers of a band: [`Words`], which AVX-512 implements for all 16 rows, AVX2 for 8 of them.
//!
//! Unpacking, scaling and the loop over runs are written once over `Words`. What differs between
//! the instruction sets is here: the instructions, and the way to the integer products.
//!
//! # Products with AVX2
//!
//! AVX-512 has `dpbusd`, which adds four products of bytes to 32 bits. AVX2 has `maddubs`, which
//! adds two products in 16 bits, saturating. Activations are within -127 to 127, so a sum of two is
//! at most `2 * 127 * MAX_CODE`, and as many of them are added in 16 bits as fit (`chain`). The
//! integers are the same, so a band has the same bits with both instruction sets.
//!
//! | largest code | sums in 16 bits | formats |
//! |---|---|---|
//! | 15 | 8 | Q4_0, Q4_1, Q4_K, IQ3_S; of a scale per 16 values, 4: Q2_K, Q3_K |
//! | 31 | 4 | Q5_0, Q5_1, Q5_K, MXFP4 |
//! | 63 | 2 | Q6_K, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS |
//! | 128 | 1 | Q8_0, IQ4_NL, IQ4_XS |
//!
//! `maddubs` needs one unsigned operand. A negative code moves its sign to the activation, whose
//! negative always fits, since it is never -128.

use super::formats::{BandFormat, Run};
use super::{Band, interleave};
use crate::activations::ActBlock;
use crate::bands::{BAND_ROWS, BandLayout};
use crate::panel::Panel;
use crate::x86::lanes::PartialLanes;
use std::arch::x86_64::*;

/// A register of words, one of each of [`ROWS`](Self::ROWS) rows.
///
/// # Safety of all functions
/// The caller is compiled for the register's instruction set, and the processor has it. Whatever is
/// read lies within the caller's block.
pub(super) trait Words: Copy {
    /// A float per row.
    type Floats: PartialLanes;
    /// Rows per register: a divisor of the rows of a band.
    const ROWS: usize;
    /// Whether products of codes up to 255 are exact; otherwise codes stay below what their format
    /// says.
    const WIDE_CODES: bool;

    /// Loads a word of each row.
    unsafe fn load(p: *const u8) -> Self;

    /// Loads a 16-bit float of each row and widens it.
    unsafe fn load_halves(p: *const u8) -> Self::Floats;

    /// Loads an exponent of each row: half of that power of two.
    unsafe fn load_exponents(p: *const u8) -> Self::Floats;

    /// Widens the low and the high half of each word.
    unsafe fn two_halves(self) -> [Self::Floats; 2];

    /// Returns one value in every word.
    unsafe fn all(value: i32) -> Self;

    /// Returns one value in every byte.
    #[inline(always)]
    unsafe fn bytes(value: u8) -> Self {
        // SAFETY: the caller's processor.
        unsafe { Self::all(i32::from_ne_bytes([value; 4])) }
    }

    /// Returns the four words again and again.
    unsafe fn quads(words: [i32; 4]) -> Self;

    /// Returns `self & other`.
    unsafe fn and(self, other: Self) -> Self;

    /// Returns `self | other & mask`.
    unsafe fn or_and(self, other: Self, mask: Self) -> Self;

    /// Adds words.
    unsafe fn add(self, other: Self) -> Self;

    /// Shifts every word to the left.
    unsafe fn left(self, bits: usize) -> Self;

    /// Shifts every word to the right; zeros come in.
    unsafe fn right(self, bits: usize) -> Self;

    /// Shifts every word to the right; signs come in.
    unsafe fn right_signed(self, bits: usize) -> Self;

    /// Returns the bytes that the low halves of `index` name, of those of the same 16.
    unsafe fn shuffle(self, index: Self) -> Self;

    /// Adds the byte `value` to each byte of which `bits` and `mask` have a bit in common; `mask`
    /// has one bit per byte, and `value` none that `self` has.
    unsafe fn add_where(self, bits: Self, mask: Self, value: u8) -> Self;

    /// Makes what the products take of signed codes: 128 too large, or as they are.
    unsafe fn signed(self) -> Self;

    /// Converts words to floats.
    unsafe fn to_floats(self) -> Self::Floats;

    /// Multiplies floats.
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;

    /// Adds floats.
    unsafe fn add_floats(a: Self::Floats, b: Self::Floats) -> Self::Floats;

    /// Returns `c - a * b`, rounded once.
    unsafe fn neg_mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;

    /// Returns the products of run `j` of a block of activations: of its first and its second 16
    /// values where the format has scales for both, else of all in the first. `N` tokens are
    /// multiplied with the run.
    unsafe fn dots<F: BandFormat<Self>, const N: usize>(
        run: &Run<Self>,
        x: &ActBlock,
        j: usize,
    ) -> [Self; 2];

    /// Multiplies a band with `N` tokens: [`multiply`](super::multiply), compiled for the
    /// instruction set.
    unsafe fn multiply<F: BandFormat<Self>, const N: usize>(
        panel: &Panel<'_>,
        band: &Band,
        token: usize,
    );

    /// Multiplies rows that are not interleaved with one token: [`multiply_rows`](super::multiply_rows),
    /// compiled for the instruction set.
    unsafe fn multiply_rows<F: BandFormat<Self>>(panel: &Panel<'_>, band: &Band);

    /// Writes up to four lines: of every row, the `n` words from `at` on.
    unsafe fn write_lines(rows: &[*const u8; BAND_ROWS], at: usize, n: usize, to: *mut u8);

    /// Interleaves up to 16 rows.
    unsafe fn interleave(
        layout: BandLayout,
        row_bytes: usize,
        rows: &[u8],
        n_rows: usize,
        band: &mut [u8],
    );
}

/// Returns where the words of run `j` of a block of activations are, and how far apart: word `i` is
/// at `i / 2 * 16 + i % 2`.
///
/// # Safety
/// The block can be read.
#[inline(always)]
unsafe fn word(x: &ActBlock, j: usize, i: usize) -> i32 {
    let words = x.q.as_ptr().cast::<i32>();
    // SAFETY: a block has 64 words, aligned as it is.
    unsafe { words.add(2 * j + i / 2 * 16 + i % 2).read() }
}

/// Returns what takes the offset of the codes off the products of run `j`: for both halves of it,
/// or for all of it and zero.
///
/// # Safety
/// As [`Words`].
#[inline(always)]
pub(super) unsafe fn offsets<W: Words, F: BandFormat<W>>(x: &ActBlock, j: usize) -> [W; 2] {
    // SAFETY: the caller's processor.
    unsafe {
        let zero = W::all(0);
        match F::OFFSET_BITS {
            None => [zero; 2],
            Some(bits) if F::SCALE_PER_16 => [
                W::all(x.offsets[2 * j]).left(bits),
                W::all(x.offsets[2 * j + 1]).left(bits),
            ],
            Some(bits) => [W::all(x.run_offsets[j]).left(bits), zero],
        }
    }
}

impl Words for __m512i {
    type Floats = __m512;
    const ROWS: usize = 16;
    const WIDE_CODES: bool = true;

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        // SAFETY: the caller's bytes and processor.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_halves(p: *const u8) -> __m512 {
        // SAFETY: the caller's bytes and processor.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_exponents(p: *const u8) -> __m512 {
        // SAFETY: the caller's bytes and processor.
        unsafe {
            let e = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(e, _mm512_set1_epi32(1)));
            // The two smallest are subnormal.
            let small = _mm512_sllv_epi32(_mm512_set1_epi32(0x0020_0000), e);
            let is_small = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
            _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, is_small, small))
        }
    }

    #[inline(always)]
    unsafe fn two_halves(self) -> [__m512; 2] {
        // SAFETY: the caller's processor.
        unsafe {
            [
                _mm512_cvtph_ps(_mm512_cvtepi32_epi16(self)),
                _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(self))),
            ]
        }
    }

    #[inline(always)]
    unsafe fn all(value: i32) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    unsafe fn quads([a, b, c, d]: [i32; 4]) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_set4_epi32(d, c, b, a) }
    }

    #[inline(always)]
    unsafe fn and(self, other: Self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_and_si512(self, other) }
    }

    #[inline(always)]
    unsafe fn or_and(self, other: Self, mask: Self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_ternarylogic_epi32::<0xf8>(self, other, mask) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_add_epi32(self, other) }
    }

    #[inline(always)]
    unsafe fn left(self, bits: usize) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_sll_epi32(self, _mm_cvtsi64_si128(bits as i64)) }
    }

    #[inline(always)]
    unsafe fn right(self, bits: usize) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_srl_epi32(self, _mm_cvtsi64_si128(bits as i64)) }
    }

    #[inline(always)]
    unsafe fn right_signed(self, bits: usize) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_sra_epi32(self, _mm_cvtsi64_si128(bits as i64)) }
    }

    #[inline(always)]
    unsafe fn shuffle(self, index: Self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_shuffle_epi8(self, index) }
    }

    #[inline(always)]
    unsafe fn add_where(self, bits: Self, mask: Self, value: u8) -> Self {
        // SAFETY: the caller's processor.
        unsafe {
            let set = _mm512_test_epi8_mask(bits, mask);
            _mm512_mask_add_epi8(self, set, self, Self::bytes(value))
        }
    }

    #[inline(always)]
    unsafe fn signed(self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_xor_si512(self, Self::bytes(0x80)) }
    }

    #[inline(always)]
    unsafe fn to_floats(self) -> __m512 {
        // SAFETY: the caller's processor.
        unsafe { _mm512_cvtepi32_ps(self) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller's processor.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn add_floats(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller's processor.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn neg_mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller's processor.
        unsafe { _mm512_fnmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn dots<F: BandFormat<Self>, const N: usize>(
        run: &Run<Self>,
        x: &ActBlock,
        j: usize,
    ) -> [Self; 2] {
        // SAFETY: the caller's processor.
        unsafe {
            // Where unpacking is long, so few runs are under way at once that a long chain of additions
            // is waited for.
            let halves = F::SCALE_PER_16 || (F::NEEDS_VBMI && N == 1);
            let mut dots = offsets::<Self, F>(x, j);
            for (i, q) in run.q.into_iter().enumerate() {
                let dot = &mut dots[if halves { i / 4 } else { 0 }];
                *dot = _mm512_dpbusd_epi32(*dot, q, _mm512_set1_epi32(word(x, j, i)));
            }
            if halves && !F::SCALE_PER_16 {
                dots[0] = _mm512_add_epi32(dots[0], dots[1]);
            }
            dots
        }
    }

    #[inline]
    unsafe fn multiply<F: BandFormat<Self>, const N: usize>(
        panel: &Panel<'_>,
        band: &Band,
        token: usize,
    ) {
        // SAFETY: the caller's panel and processor.
        unsafe {
            if F::NEEDS_VBMI {
                with_vbmi::multiply::<F, N>(panel, band, token);
            } else {
                without_vbmi::multiply::<F, N>(panel, band, token);
            }
        }
    }

    #[inline]
    unsafe fn multiply_rows<F: BandFormat<Self>>(panel: &Panel<'_>, band: &Band) {
        // SAFETY: the caller's panel and processor.
        unsafe {
            if F::NEEDS_VBMI {
                with_vbmi::multiply_rows::<F>(panel, band);
            } else {
                without_vbmi::multiply_rows::<F>(panel, band);
            }
        }
    }

    #[inline(always)]
    unsafe fn write_lines(rows: &[*const u8; BAND_ROWS], at: usize, n: usize, to: *mut u8) {
        // SAFETY: the caller's rows and processor.
        unsafe { interleave::lines_avx512(rows, at, n, to) }
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
        unsafe { interleave::avx512(layout, row_bytes, rows, n_rows, band) }
    }
}

/// Compiles the kernels for AVX-512 with the given sets.
macro_rules! compiled_for {
    ($module:ident, $features:literal) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            pub(super) unsafe fn multiply<F: BandFormat<__m512i>, const N: usize>(
                panel: &Panel<'_>,
                band: &Band,
                token: usize,
            ) {
                // SAFETY: the caller's panel and processor.
                unsafe { super::super::multiply::<__m512i, F, N>(panel, band, token) }
            }

            #[target_feature(enable = $features)]
            pub(super) unsafe fn multiply_rows<F: BandFormat<__m512i>>(
                panel: &Panel<'_>,
                band: &Band,
            ) {
                // SAFETY: the caller's panel and processor.
                unsafe { super::super::multiply_rows::<__m512i, F>(panel, band) }
            }
        }
    };
}

compiled_for!(
    without_vbmi,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"
);
compiled_for!(
    with_vbmi,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c"
);

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
    const ROWS: usize = 8;
    const WIDE_CODES: bool = false;

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
        token: usize,
    ) {
        // SAFETY: the caller's panel and processor.
        unsafe { super::multiply::<Self, F, N>(panel, band, token) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn multiply_rows<F: BandFormat<Self>>(panel: &Panel<'_>, band: &Band) {
        // SAFETY: the caller's panel and processor.
        unsafe { super::multiply_rows::<Self, F>(panel, band) }
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
