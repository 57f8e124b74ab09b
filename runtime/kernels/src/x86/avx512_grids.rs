//! Unpacking 256 weights of the grid formats (IQ1, IQ2, IQ3) into AVX-512 registers.
//!
//! Register `k` of a [`Tile`] holds eight `k` of every run. For a grid of 8 values an eight is one
//! entry, so the register is one gather of eight 64-bit words; for a grid of 4 values it is one
//! gather of sixteen 32-bit words. Signs are applied as `OFFSET + magnitude` or
//! `OFFSET - magnitude`, so that codes come out unsigned.

use super::avx512_unpack::{Tile, each_twice, one_scale, unpack};
use crate::quant::block::f16_to_f32;
use crate::quant::grids;
use std::arch::x86_64::*;

/// Offset of all codes, so that none is negative; the largest magnitude is 62.
const OFFSET: i8 = 64;

/// Returns the tile of codes that have [`OFFSET`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn tile(q: [__m512i; 4], scale: __m512) -> Tile {
    Tile {
        q,
        scale,
        min: _mm512_mul_ps(scale, _mm512_set1_ps(f32::from(OFFSET))),
    }
}

/// Gathers entries of a table of 64-bit words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn gather8<const N: usize>(table: &[u64; N], index: __m512i) -> __m512i {
    const { assert!(N.is_power_of_two()) };
    let index = _mm512_and_si512(index, _mm512_set1_epi64(N as i64 - 1));
    // SAFETY: every index is below the length.
    unsafe { _mm512_i64gather_epi64::<8>(index, table.as_ptr().cast()) }
}

/// Gathers entries of a table of 32-bit words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn gather16<const N: usize>(table: &[u32; N], index: __m512i) -> __m512i {
    const { assert!(N.is_power_of_two()) };
    let index = _mm512_and_si512(index, _mm512_set1_epi32(N as i32 - 1));
    // SAFETY: every index is below the length.
    unsafe { _mm512_i32gather_epi32::<4>(index, table.as_ptr().cast()) }
}

/// Adds [`OFFSET`] to magnitudes, negated where their sign bit is set. The signs of a lane's eight
/// bytes are byte `k` of that lane of `signs`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn with_signs(magnitudes: __m512i, signs: __m512i, k: usize) -> __m512i {
    const EACH: i64 = 0x0101_0101_0101_0101;
    let pick = _mm512_broadcast_i32x4(_mm_set_epi64x((8 + k as i64) * EACH, k as i64 * EACH));
    let bits = _mm512_set1_epi64(0x8040_2010_0804_0201_u64 as i64);
    let negative = _mm512_test_epi8_mask(_mm512_shuffle_epi8(signs, pick), bits);
    let offset = _mm512_set1_epi8(OFFSET);
    _mm512_mask_sub_epi8(
        _mm512_add_epi8(offset, magnitudes),
        negative,
        offset,
        magnitudes,
    )
}

/// Sets the high bit of each byte where the other seven have an odd number of ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn with_even_parity(sevens: __m512i) -> __m512i {
    const O: i8 = -128;
    let odd = _mm512_broadcast_i32x4(_mm_setr_epi8(
        0, O, O, 0, O, 0, 0, O, O, 0, 0, O, 0, O, O, 0,
    ));
    let mask = _mm512_set1_epi8(15);
    let low = _mm512_shuffle_epi8(odd, _mm512_and_si512(sevens, mask));
    let high = _mm512_shuffle_epi8(odd, _mm512_and_si512(_mm512_srli_epi16::<4>(sevens), mask));
    // 0xf6: the first argument, or exactly one of the others.
    _mm512_ternarylogic_epi64::<0xf6>(sevens, low, high)
}

/// Spreads four times seven bits of each lane to bytes, and adds their eighth bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn four_sevens(v: __m512i) -> __m512i {
    let part = |v, mask| _mm512_and_si512(v, _mm512_set1_epi64(mask));
    let low = _mm512_or_si512(part(v, 0x7f), part(_mm512_slli_epi64::<1>(v), 0x7f00));
    let high = _mm512_or_si512(
        part(_mm512_slli_epi64::<2>(v), 0x7f_0000),
        part(_mm512_slli_epi64::<3>(v), 0x7f00_0000),
    );
    with_even_parity(_mm512_or_si512(low, high))
}

/// Loads eight 32-bit words, widened to 64 bits.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn words(p: *const u8) -> __m512i {
    // SAFETY: the caller's bytes.
    _mm512_cvtepu32_epi64(unsafe { _mm256_loadu_si256(p.cast()) })
}

/// Loads eight 16-bit words, widened to 64 bits.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn half_words(p: *const u8) -> __m512i {
    // SAFETY: the caller's bytes.
    _mm512_cvtepu16_epi64(unsafe { _mm_loadu_si128(p.cast()) })
}

/// Loads eight bytes, widened to 64 bits.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn bytes(p: *const u8) -> __m512i {
    // SAFETY: the caller's bytes.
    _mm512_cvtepu8_epi64(unsafe { _mm_loadl_epi64(p.cast()) })
}

/// Returns byte `k` of each lane as an index, with the low `bits` bits of `high`, shifted right by
/// `shift`, above it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn index(low: __m512i, k: usize, high: __m512i, shift: usize, bits: u32) -> __m512i {
    let low = _mm512_and_si512(
        _mm512_srl_epi64(low, _mm_cvtsi64_si128(8 * k as i64)),
        _mm512_set1_epi64(0xff),
    );
    let high = _mm512_srl_epi64(high, _mm_cvtsi64_si128(shift as i64));
    let high = _mm512_and_si512(high, _mm512_set1_epi64((1 << bits) - 1));
    _mm512_or_si512(low, _mm512_slli_epi64::<8>(high))
}

/// Returns `d * (0.5 + s) * factor`, each twice, of eight `s` in 64-bit lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn run_scales(d: __m512, s: __m512i, factor: f32) -> __m512 {
    let s = each_twice(_mm256_cvtepi32_ps(_mm512_cvtepi64_epi32(s)));
    _mm512_mul_ps(
        _mm512_mul_ps(d, _mm512_add_ps(s, _mm512_set1_ps(0.5))),
        _mm512_set1_ps(factor),
    )
}

/// Unpacks the sixteen 4-bit scales of IQ2_XS and IQ2_S.
///
/// # Safety
/// Eight bytes can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn fine_scales(d: __m512, p: *const u8) -> __m512 {
    // SAFETY: the caller's bytes.
    let pairs = _mm_cvtepu8_epi16(unsafe { _mm_loadl_epi64(p.cast()) });
    let s = _mm_and_si128(
        _mm_or_si128(pairs, _mm_slli_epi16::<4>(pairs)),
        _mm_set1_epi8(15),
    );
    let s = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(s));
    _mm512_mul_ps(
        _mm512_mul_ps(d, _mm512_add_ps(s, _mm512_set1_ps(0.5))),
        _mm512_set1_ps(0.25),
    )
}

/// Returns bytes `2 k` and `2 k + 1` of each lane, one 32-bit word each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn byte_pair(v: __m512i, k: usize) -> __m512i {
    const ZERO: i32 = 0x8080_8000_u32 as i32;
    let first = _mm_setr_epi32(ZERO, ZERO + 1, ZERO + 8, ZERO + 9);
    let pick = _mm_add_epi32(first, _mm_set1_epi32(2 * k as i32));
    _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(pick))
}

/// Adds [`OFFSET`] and an eighth of a level, negative in the lanes of `negative`, to grid entries
/// in eighths.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn with_eighth(grid: __m512i, negative: __mmask8) -> __m512i {
    let (plus, minus) = (_mm512_set1_epi8(OFFSET + 1), _mm512_set1_epi8(OFFSET - 1));
    _mm512_add_epi8(grid, _mm512_mask_blend_epi64(negative, plus, minus))
}

unpack!(
    /// One factor, then for each run four grid numbers and 32 bits of signs and scale.
    IQ2_XXS, 66, false, |p| {
        let v = _mm512_loadu_si512(p.add(2).cast());
        let signs = four_sevens(_mm512_srli_epi64::<32>(v));
        let q = [
            with_signs(gather8(&grids::IQ2_XXS, v), signs, 0),
            with_signs(gather8(&grids::IQ2_XXS, _mm512_srli_epi64::<8>(v)), signs, 1),
            with_signs(gather8(&grids::IQ2_XXS, _mm512_srli_epi64::<16>(v)), signs, 2),
            with_signs(gather8(&grids::IQ2_XXS, _mm512_srli_epi64::<24>(v)), signs, 3),
        ];
        tile(q, run_scales(one_scale(p), _mm512_srli_epi64::<60>(v), 0.25))
    }
);

unpack!(
    /// One factor, for each eight a u16 of grid number and signs, 8 bytes of scales.
    IQ2_XS, 74, true, |p| {
        let v = _mm512_loadu_si512(p.add(2).cast());
        let part = |v, mask| _mm512_and_si512(v, _mm512_set1_epi64(mask));
        let low = _mm512_or_si512(part(_mm512_srli_epi64::<9>(v), 0x7f), part(_mm512_srli_epi64::<17>(v), 0x7f00));
        let high = _mm512_or_si512(
            part(_mm512_srli_epi64::<25>(v), 0x7f_0000),
            part(_mm512_srli_epi64::<33>(v), 0x7f00_0000),
        );
        let signs = with_even_parity(_mm512_or_si512(low, high));
        let q = [
            with_signs(gather8(&grids::IQ2_XS, v), signs, 0),
            with_signs(gather8(&grids::IQ2_XS, _mm512_srli_epi64::<16>(v)), signs, 1),
            with_signs(gather8(&grids::IQ2_XS, _mm512_srli_epi64::<32>(v)), signs, 2),
            with_signs(gather8(&grids::IQ2_XS, _mm512_srli_epi64::<48>(v)), signs, 3),
        ];
        tile(q, fine_scales(one_scale(p), p.add(66)))
    }
);

unpack!(
    /// One factor, 32 bytes of grid numbers, 32 of signs, 8 of two more grid bits each, 8 of
    /// scales.
    IQ2_S, 82, true, |p| {
        let (low, signs, high) = (words(p.add(2)), words(p.add(34)), bytes(p.add(66)));
        let q = [0, 1, 2, 3].map(|k| with_signs(gather8(&grids::IQ2_S, index(low, k, high, 2 * k, 2)), signs, k));
        tile(q, fine_scales(one_scale(p), p.add(74)))
    }
);

unpack!(
    /// One factor, 64 bytes of grid numbers, 8 words of signs and scale.
    IQ3_XXS, 98, false, |p| {
        let (v, words) = (_mm512_loadu_si512(p.add(2).cast()), words(p.add(66)));
        let signs = four_sevens(words);
        let q = [0, 1, 2, 3].map(|k| with_signs(gather16(&grids::IQ3_XXS, byte_pair(v, k)), signs, k));
        tile(q, run_scales(one_scale(p), _mm512_srli_epi64::<28>(words), 0.5))
    }
);

unpack!(
    /// One factor, 64 bytes of grid numbers, 8 of ninth bits, 32 of signs, 4 of scales.
    IQ3_S, 110, false, |p| {
        let (v, ninth, signs) = (_mm512_loadu_si512(p.add(2).cast()), bytes(p.add(66)), words(p.add(74)));
        // The odd bits of each byte, moved down by one, in the upper half of the lane.
        let ninth = _mm512_or_si512(ninth, _mm512_slli_epi64::<31>(ninth));
        let q = [0, 1, 2, 3].map(|k| {
            let bit = _mm512_srl_epi32(ninth, _mm_cvtsi64_si128(2 * k as i64));
            let bit = _mm512_slli_epi32::<8>(_mm512_and_si512(bit, _mm512_set1_epi32(1)));
            with_signs(gather16(&grids::IQ3_S, _mm512_or_si512(byte_pair(v, k), bit)), signs, k)
        });
        let s = _mm512_set1_epi32(p.add(106).cast::<i32>().read_unaligned());
        let s = _mm512_srlv_epi32(s, _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28));
        let s = _mm512_slli_epi32::<1>(_mm512_and_si512(s, _mm512_set1_epi32(15)));
        let s = _mm512_cvtepi32_ps(_mm512_or_si512(s, _mm512_set1_epi32(1)));
        tile(q, _mm512_mul_ps(one_scale(p), s))
    }
);

unpack!(
    /// One factor, 32 bytes of grid numbers, 8 u16 of grid bits, scale and sign of the eighth.
    IQ1_S, 50, false, |p| {
        let (low, high) = (words(p.add(2)), half_words(p.add(34)));
        let negative = _mm512_test_epi64_mask(high, _mm512_set1_epi64(0x8000));
        let q = [0, 1, 2, 3].map(|k| with_eighth(gather8(&grids::IQ1, index(low, k, high, 3 * k, 3)), negative));
        let s = _mm512_and_si512(_mm512_srli_epi64::<12>(high), _mm512_set1_epi64(7));
        // (0.5 + s) * 0.25 is (2 s + 1) eighths.
        tile(q, run_scales(one_scale(p), s, 0.25))
    }
);

unpack!(
    /// 32 bytes of grid numbers, 16 of grid bits and signs of the eighths, 4 u16 of scales and of
    /// bits of one factor.
    IQ1_M, 56, true, |p| {
        let (low, high) = (words(p), half_words(p.add(32)));
        let q = [0, 1, 2, 3].map(|k| {
            let negative = _mm512_test_epi64_mask(high, _mm512_set1_epi64(8 << (4 * k)));
            with_eighth(gather8(&grids::IQ1, index(low, k, high, 4 * k, 3)), negative)
        });
        let packed = p.add(48).cast::<u64>().read_unaligned();
        let d = packed >> 12 & 0x000f | packed >> 24 & 0x00f0 | packed >> 36 & 0x0f00 | packed >> 48 & 0xf000;
        let d = _mm512_set1_ps(f16_to_f32(d as u16));
        // Sixteen lanes of 32 bits, four from each u16.
        let s = _mm512_cvtepu16_epi32(_mm256_setr_epi64x(
            spread(packed), spread(packed >> 16), spread(packed >> 32), spread(packed >> 48),
        ));
        let s = _mm512_srlv_epi32(s, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 3, 6, 9)));
        let s = _mm512_cvtepi32_ps(_mm512_and_si512(s, _mm512_set1_epi32(7)));
        let s = _mm512_mul_ps(_mm512_add_ps(s, _mm512_set1_ps(0.5)), _mm512_set1_ps(0.25));
        tile(q, _mm512_mul_ps(d, s))
    }
);

/// Returns the lowest 16 bits, four times.
#[inline(always)]
fn spread(v: u64) -> i64 {
    ((v & 0xffff) * 0x0001_0001_0001_0001) as i64
}
