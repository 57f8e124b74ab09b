//! Registers of AVX2 and AVX-512 as [`Lanes`], and what kernels over rows need of them beside:
//! parts of a register, for rows whose width is not a multiple of it.

use super::prefetch;
use crate::lanes::Lanes;
use std::arch::x86_64::*;

/// Rows whose dot products with a query are computed together: their sums end up side by side in
/// one register.
pub(super) const ROWS: usize = 4;

/// A register of floats of which the first lanes can be loaded and stored alone.
///
/// # Safety of all functions
/// As in [`Lanes`]; lanes that a [`Part`](Self::Part) does not name are neither read nor written.
pub(super) trait PartialLanes: Lanes {
    /// The first lanes of a register: AVX-512 has masks, AVX2 counts.
    type Part: Copy;

    /// Names all lanes.
    const WHOLE: Self::Part;

    /// Names the first `n` lanes, at most [`COUNT`](Lanes::COUNT).
    fn part(n: usize) -> Self::Part;

    /// Loads 32-bit floats, zeros in the other lanes.
    ///
    /// # Safety
    /// The values can be read; see [`PartialLanes`].
    unsafe fn load_part_f32(p: *const f32, part: Self::Part) -> Self;

    /// Loads 16-bit floats and widens them, zeros in the other lanes.
    ///
    /// # Safety
    /// The values can be read; see [`PartialLanes`].
    unsafe fn load_part_f16(p: *const i16, part: Self::Part) -> Self;

    /// Loads 8-bit codes and multiplies them by a 16-bit float, zeros in the other lanes.
    ///
    /// # Safety
    /// The codes can be read; see [`PartialLanes`].
    unsafe fn load_part_q8(p: *const i8, scale: i16, part: Self::Part) -> Self;

    /// Stores the lanes of `part`.
    ///
    /// # Safety
    /// The values can be written; see [`PartialLanes`].
    unsafe fn store_part(self, p: *mut f32, part: Self::Part);

    /// Returns `value` in every lane.
    ///
    /// # Safety
    /// See [`PartialLanes`].
    unsafe fn splat(value: f32) -> Self;

    /// Stores the sums of the lanes of the first `n` registers, at most four, side by side.
    ///
    /// # Safety
    /// `n` values can be written; see [`PartialLanes`].
    unsafe fn store_sums(registers: [Self; ROWS], to: *mut f32, n: usize);
}

impl Lanes for __m256 {
    const COUNT: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load_f32(p: *const u8) -> Self {
        // SAFETY: the caller's bytes and processor.
        unsafe { _mm256_loadu_ps(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: the caller's bytes and processor.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: the caller's bytes and processor.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self, b: Self, c: Self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum_both(a: Self, b: Self) -> f32 {
        // SAFETY: the caller's processor.
        unsafe { sum_of_8(_mm256_add_ps(a, b)) }
    }

    #[inline(always)]
    fn prefetch(p: *const u8, bytes: usize) {
        prefetch(p, bytes);
    }
}

/// Returns the sum of eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sum_of_8(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

impl PartialLanes for __m256 {
    type Part = usize;

    const WHOLE: usize = 8;

    #[inline(always)]
    fn part(n: usize) -> usize {
        n
    }

    #[inline(always)]
    unsafe fn load_part_f32(p: *const f32, n: usize) -> Self {
        // SAFETY: the caller's values and processor.
        unsafe {
            if n == 8 {
                _mm256_loadu_ps(p)
            } else {
                _mm256_maskload_ps(p, first_lanes(n))
            }
        }
    }

    #[inline(always)]
    unsafe fn load_part_f16(p: *const i16, n: usize) -> Self {
        // SAFETY: the caller's values and processor; there is room for eight.
        unsafe {
            if n == 8 {
                return _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
            }
            let mut few = [0i16; 8];
            std::ptr::copy_nonoverlapping(p, few.as_mut_ptr(), n);
            _mm256_cvtph_ps(_mm_loadu_si128(few.as_ptr().cast()))
        }
    }

    #[inline(always)]
    unsafe fn load_part_q8(p: *const i8, scale: i16, n: usize) -> Self {
        // SAFETY: the caller's codes and processor; there is room for eight.
        unsafe {
            let codes = if n == 8 {
                _mm_loadl_epi64(p.cast())
            } else {
                let mut few = [0i8; 8];
                std::ptr::copy_nonoverlapping(p, few.as_mut_ptr(), n);
                _mm_loadl_epi64(few.as_ptr().cast())
            };
            let scale = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(scale)));
            _mm256_mul_ps(
                _mm256_broadcastss_ps(scale),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
            )
        }
    }

    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        // SAFETY: the caller's values and processor.
        unsafe {
            if n == 8 {
                _mm256_storeu_ps(p, self)
            } else {
                _mm256_maskstore_ps(p, first_lanes(n), self)
            }
        }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn store_sums([a, b, c, d]: [Self; ROWS], to: *mut f32, n: usize) {
        // SAFETY: the caller's values and processor.
        unsafe {
            let ab = _mm256_castps_pd(_mm256_add_ps(
                _mm256_unpacklo_ps(a, b),
                _mm256_unpackhi_ps(a, b),
            ));
            let cd = _mm256_castps_pd(_mm256_add_ps(
                _mm256_unpacklo_ps(c, d),
                _mm256_unpackhi_ps(c, d),
            ));
            let (even, odd) = (_mm256_unpacklo_pd(ab, cd), _mm256_unpackhi_pd(ab, cd));
            let four = _mm256_add_ps(_mm256_castpd_ps(even), _mm256_castpd_ps(odd));
            let sums = _mm_add_ps(
                _mm256_castps256_ps128(four),
                _mm256_extractf128_ps::<1>(four),
            );
            if n == ROWS {
                _mm_storeu_ps(to, sums);
            } else {
                _mm_maskstore_ps(to, _mm256_castsi256_si128(first_lanes(n)), sums);
            }
        }
    }
}

/// Returns a mask of the first `n` of eight lanes; all of them from 8 on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn first_lanes(n: usize) -> __m256i {
    _mm256_cmpgt_epi32(
        _mm256_set1_epi32(n.min(8) as i32),
        _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
    )
}

impl Lanes for __m512 {
    const COUNT: usize = 16;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load_f32(p: *const u8) -> Self {
        // SAFETY: the caller's bytes and processor.
        unsafe { _mm512_loadu_ps(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: the caller's bytes and processor.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: the caller's bytes and processor.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self, b: Self, c: Self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum_both(a: Self, b: Self) -> f32 {
        // SAFETY: the caller's processor.
        unsafe { _mm512_reduce_add_ps(_mm512_add_ps(a, b)) }
    }

    #[inline(always)]
    fn prefetch(p: *const u8, bytes: usize) {
        prefetch(p, bytes);
    }
}

impl PartialLanes for __m512 {
    type Part = __mmask16;

    const WHOLE: __mmask16 = 0xffff;

    #[inline(always)]
    fn part(n: usize) -> __mmask16 {
        ((1u32 << n) - 1) as __mmask16
    }

    #[inline(always)]
    unsafe fn load_part_f32(p: *const f32, part: __mmask16) -> Self {
        // SAFETY: the caller's values and processor.
        unsafe { _mm512_maskz_loadu_ps(part, p) }
    }

    #[inline(always)]
    unsafe fn load_part_f16(p: *const i16, part: __mmask16) -> Self {
        // SAFETY: the caller's values and processor.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(part, p)) }
    }

    #[inline(always)]
    unsafe fn load_part_q8(p: *const i8, scale: i16, part: __mmask16) -> Self {
        // SAFETY: the caller's codes and processor.
        unsafe {
            let codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(part, p));
            let scale = _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(scale)));
            _mm512_mul_ps(_mm512_broadcastss_ps(scale), _mm512_cvtepi32_ps(codes))
        }
    }

    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, part: __mmask16) {
        // SAFETY: the caller's values and processor.
        unsafe { _mm512_mask_storeu_ps(p, part, self) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn store_sums([a, b, c, d]: [Self; ROWS], to: *mut f32, n: usize) {
        // SAFETY: the caller's values and processor.
        unsafe {
            let ab = _mm512_castps_pd(_mm512_add_ps(
                _mm512_unpacklo_ps(a, b),
                _mm512_unpackhi_ps(a, b),
            ));
            let cd = _mm512_castps_pd(_mm512_add_ps(
                _mm512_unpacklo_ps(c, d),
                _mm512_unpackhi_ps(c, d),
            ));
            let (even, odd) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
            let four = _mm512_add_ps(_mm512_castpd_ps(even), _mm512_castpd_ps(odd));
            let two = _mm256_add_ps(
                _mm512_castps512_ps256(four),
                _mm512_extractf32x8_ps::<1>(four),
            );
            let sums = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps::<1>(two));
            _mm_mask_storeu_ps(to, (1 << n) - 1, sums);
        }
    }
}
