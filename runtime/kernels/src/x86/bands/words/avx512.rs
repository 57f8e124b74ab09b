//! Registers of AVX-512: a word of all 16 rows.

use super::{Words, offsets, word};
use crate::activations::ActBlock;
use crate::bands::{BAND_ROWS, BandLayout};
use crate::panel::Panel;
use crate::x86::bands::formats::{BandFormat, Run};
use crate::x86::bands::kernel::{self, Pass};
use crate::x86::bands::{Band, interleave};
use std::arch::x86_64::*;

impl Words for __m512i {
    type Floats = __m512;
    type OfBand<T: Copy> = [T; 1];
    const ROWS: usize = 16;
    const WIDE_CODES: bool = true;
    const TAKES_FEWER: bool = false;

    #[inline(always)]
    fn of_band<T: Copy>(value: T) -> [T; 1] {
        [value; 1]
    }

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
        pass: Pass,
    ) {
        // SAFETY: the caller's panel and processor.
        unsafe {
            if F::NEEDS_VBMI {
                with_vbmi::multiply::<F, N>(panel, band, pass);
            } else {
                without_vbmi::multiply::<F, N>(panel, band, pass);
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
                pass: Pass,
            ) {
                // SAFETY: the caller's panel and processor.
                unsafe { kernel::multiply::<__m512i, F, N>(panel, band, pass) }
            }

            #[target_feature(enable = $features)]
            pub(super) unsafe fn multiply_rows<F: BandFormat<__m512i>>(
                panel: &Panel<'_>,
                band: &Band,
            ) {
                // SAFETY: the caller's panel and processor.
                unsafe { kernel::multiply_rows::<__m512i, F>(panel, band) }
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
