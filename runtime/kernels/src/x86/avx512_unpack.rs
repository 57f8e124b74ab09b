//! Unpacking 256 weights of each format into AVX-512 registers, in the order of the activations.
//!
//! A [`Tile`] has unsigned codes, as the left operand of `dpbusd` must be. A format with negative
//! codes stores them with an offset `o`, and takes it off again through the minimum:
//!
//! ```text
//! scale * (code) - min  =  scale * (code + o) - (min + o * scale)
//! ```
//!
//! Most formats hold the halves of a run 16 bytes apart. Their unpacking first makes registers of
//! *sixteens*: the first 16 codes of runs 0, 2, 4, 6, the second 16 of these, and both of runs 1,
//! 3, 5, 7. [`interleave`] turns those four into the eights that the activations have.

use crate::quant::block::{q3_scales, scales_and_mins};
use crate::quant::iq4_nl::IQ4_LEVELS;
use crate::quant::mxfp4::MXFP4_LEVELS;
use std::arch::x86_64::*;

pub(super) use super::avx512_few_bits::{NVFP4, Q1_0, Q2_0, TQ1_0, TQ2_0};
pub(super) use super::avx512_grids::{IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS};

/// 256 unpacked weights in registers.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Unsigned codes: register `k` has eight `k` of every run.
    pub q: [__m512i; 4],
    /// Scales, one per 16 values in the order of the row.
    pub scale: __m512,
    /// Minimums, one per 16 values in the order of the row; subtracted.
    pub min: __m512,
}

/// Most bytes per 256 values in a format of small blocks (Q8_0).
pub(super) const MAX_GROUP_BYTES: usize = 272;

/// A format that unpacks into a [`Tile`].
pub(super) trait Unpack {
    /// Bytes per 256 values.
    const GROUP_BYTES: usize;
    /// Whether scales are per 16 values; otherwise they are per 32, and neighbors in `scale` are
    /// equal.
    const SCALE_PER_16: bool = false;

    /// Unpacks a group.
    ///
    /// # Safety
    /// `GROUP_BYTES` bytes can be read at `p`, and the processor has the AVX-512 sets of
    /// `Isa::Avx512`.
    unsafe fn unpack(p: *const u8) -> Tile;
}

/// Declares a format and its unpacking.
macro_rules! unpack {
    ($(#[$doc:meta])* $name:ident, $bytes:expr, $fine:expr, |$p:ident| $body:expr) => {
        $(#[$doc])*
        #[allow(non_camel_case_types)]
        pub(super) struct $name;

        impl $crate::x86::avx512_unpack::Unpack for $name {
            const GROUP_BYTES: usize = $bytes;
            const SCALE_PER_16: bool = $fine;

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            unsafe fn unpack($p: *const u8) -> $crate::x86::avx512_unpack::Tile {
                // SAFETY: everything read lies within the caller's `GROUP_BYTES` bytes.
                unsafe { $body }
            }
        }
    };
}
pub(super) use unpack;

/// Turns sixteens into eights. Given are the first halves of the even runs, their second halves,
/// and the first and second halves of the odd runs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) fn interleave([e0, e1, o0, o1]: [__m512i; 4]) -> [__m512i; 4] {
    [
        _mm512_unpacklo_epi64(e0, o0),
        _mm512_unpackhi_epi64(e0, o0),
        _mm512_unpacklo_epi64(e1, o1),
        _mm512_unpackhi_epi64(e1, o1),
    ]
}

/// Loads four times 16 bytes, `step` bytes apart.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn four(p: *const u8, step: usize) -> __m512i {
    // SAFETY: the caller's bytes.
    unsafe {
        let v = _mm512_castsi128_si512(_mm_loadu_si128(p.cast()));
        let v = _mm512_inserti32x4::<1>(v, _mm_loadu_si128(p.add(step).cast()));
        let v = _mm512_inserti32x4::<2>(v, _mm_loadu_si128(p.add(2 * step).cast()));
        _mm512_inserti32x4::<3>(v, _mm_loadu_si128(p.add(3 * step).cast()))
    }
}

/// Loads two times 16 bytes, each twice.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn two_twice(low: *const u8, high: *const u8) -> __m512i {
    // SAFETY: the caller's bytes.
    unsafe {
        let low = _mm512_broadcast_i32x4(_mm_loadu_si128(low.cast()));
        _mm512_mask_broadcast_i32x4(low, 0xff00, _mm_loadu_si128(high.cast()))
    }
}

/// Splits each byte into its low and its high half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) fn nibbles(v: __m512i) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8(15);
    [
        _mm512_and_si512(v, mask),
        _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask),
    ]
}

/// Returns eight values, each twice in a row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) fn each_twice(v: __m256) -> __m512 {
    let index = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    _mm512_permutexvar_ps(index, _mm512_castps256_ps512(v))
}

/// Loads the f16 scales of eight blocks of `step` bytes.
///
/// # Safety
/// The first two bytes of each block can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn eight_scales(p: *const u8, step: usize) -> __m256 {
    // SAFETY: the caller's bytes.
    let at = |i: usize| unsafe { p.add(i * step).cast::<i16>().read_unaligned() };
    _mm256_cvtph_ps(_mm_setr_epi16(
        at(0),
        at(1),
        at(2),
        at(3),
        at(4),
        at(5),
        at(6),
        at(7),
    ))
}

/// Loads the f16 scales and addends that begin eight blocks of `step` bytes. The addends come out
/// negated, as minimums.
///
/// # Safety
/// The first four bytes of each block can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn eight_pairs(p: *const u8, step: usize) -> (__m512, __m512) {
    // SAFETY: the caller's bytes.
    let at = |i: usize| unsafe { p.add(i * step).cast::<i32>().read_unaligned() };
    let pairs = _mm256_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
    let pairs = _mm512_cvtph_ps(pairs);
    let (scale, addend) = (_mm512_moveldup_ps(pairs), _mm512_movehdup_ps(pairs));
    (scale, _mm512_xor_ps(addend, _mm512_set1_ps(-0.0)))
}

/// Loads one f16, sixteen times.
///
/// # Safety
/// Two bytes can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn one_scale(p: *const u8) -> __m512 {
    // SAFETY: the caller's bytes.
    let bits = unsafe { p.cast::<i16>().read_unaligned() };
    _mm512_cvtph_ps(_mm256_set1_epi16(bits))
}

/// Adds `bit` to the bytes of `v` whose fifth bit is set. In each sixteen, the bit of byte `i` is
/// bit `i` of a u16 in the same sixteen of `words`, at the two bytes that `pick` names.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn with_bits(v: __m512i, words: __m512i, pick: i16, bit: i8) -> __m512i {
    let low = i64::from(pick & 0xff) * 0x0101_0101_0101_0101;
    let high = i64::from(pick >> 8) * 0x0101_0101_0101_0101;
    let spread = _mm512_shuffle_epi8(words, _mm512_broadcast_i32x4(_mm_set_epi64x(high, low)));
    let one_each = _mm512_set1_epi64(0x8040_2010_0804_0201_u64 as i64);
    _mm512_mask_add_epi8(
        v,
        _mm512_test_epi8_mask(spread, one_each),
        v,
        _mm512_set1_epi8(bit),
    )
}

/// Returns a byte mask per sixteen: bits 0, 2, 4 and 6.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn even_bits() -> __m512i {
    const B: i64 = 0x0101_0101_0101_0101;
    _mm512_setr_epi64(B, B, B << 2, B << 2, B << 4, B << 4, B << 6, B << 6)
}

/// Shifts the second and the fourth sixteen right by four bits, within 16-bit words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn shift_every_other(v: __m512i) -> __m512i {
    const FOUR: i64 = 0x0004_0004_0004_0004;
    _mm512_srlv_epi16(v, _mm512_setr_epi64(0, 0, FOUR, FOUR, 0, 0, FOUR, FOUR))
}

/// Unpacks 64 bytes of 2-bit codes, as Q2_K and Q3_K pack them (four runs of 32 per 32 bytes), for
/// [`interleave`].
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn two_bit_codes(p: *const u8) -> [__m512i; 4] {
    let mask = _mm512_set1_epi8(3);
    // SAFETY: the caller's bytes.
    let (first, second) = unsafe { (two_twice(p, p.add(32)), two_twice(p.add(16), p.add(48))) };
    let (first, second) = (shift_every_other(first), shift_every_other(second));
    [
        _mm512_and_si512(first, mask),
        _mm512_and_si512(second, mask),
        _mm512_and_si512(_mm512_srli_epi16::<2>(first), mask),
        _mm512_and_si512(_mm512_srli_epi16::<2>(second), mask),
    ]
}

/// Unpacks the scales and minimums of Q4_K and Q5_K, whose block begins at `p`; the scales of odd
/// runs times `odd`.
///
/// # Safety
/// Sixteen bytes can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn k_scales(p: *const u8, odd: f32) -> (__m512, __m512) {
    // SAFETY: the caller's bytes.
    let head = unsafe { &*p.cast::<[u8; 16]>() };
    let (scales, mins) = scales_and_mins(&head[4..]);
    let bytes = _mm_set_epi64x(i64::from_le_bytes(mins), i64::from_le_bytes(scales));
    let both = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    let factors = _mm_cvtph_ps(_mm_set1_epi32(i32::from_le_bytes([
        head[0], head[1], head[2], head[3],
    ])));
    let factors = _mm512_castps128_ps512(_mm_mul_ps(factors, _mm_setr_ps(1.0, 1.0, odd, odd)));
    let each_twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    let mins = _mm512_add_epi32(each_twice, _mm512_set1_epi32(8));
    let by_run = _mm512_setr_epi32(0, 0, 2, 2, 0, 0, 2, 2, 0, 0, 2, 2, 0, 0, 2, 2);
    let scale = _mm512_mul_ps(
        _mm512_permutexvar_ps(each_twice, both),
        _mm512_permutexvar_ps(by_run, factors),
    );
    let min = _mm512_mul_ps(
        _mm512_permutexvar_ps(mins, both),
        _mm512_permutexvar_ps(_mm512_set1_epi32(1), factors),
    );
    (scale, min)
}

/// Replaces 4-bit codes by levels, with an offset of 128.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) fn look_up(codes: __m512i, levels: &[i8; 16]) -> __m512i {
    // SAFETY: sixteen bytes.
    let table = unsafe { _mm_loadu_si128(levels.as_ptr().cast()) };
    let table = _mm512_broadcast_i32x4(_mm_xor_si128(table, _mm_set1_epi8(-128)));
    _mm512_shuffle_epi8(table, codes)
}

unpack!(
    /// Eight blocks of 18 bytes: scale, 16 bytes of codes.
    Q4_0, 8 * 18, false, |p| {
        let [e0, e1] = nibbles(four(p.add(2), 36));
        let [o0, o1] = nibbles(four(p.add(20), 36));
        let scale = each_twice(eight_scales(p, 18));
        Tile { q: interleave([e0, e1, o0, o1]), scale, min: _mm512_mul_ps(scale, _mm512_set1_ps(8.0)) }
    }
);

unpack!(
    /// Eight blocks of 20 bytes: scale, addend, 16 bytes of codes.
    Q4_1, 8 * 20, false, |p| {
        let [e0, e1] = nibbles(four(p.add(4), 40));
        let [o0, o1] = nibbles(four(p.add(24), 40));
        let (scale, min) = eight_pairs(p, 20);
        Tile { q: interleave([e0, e1, o0, o1]), scale, min }
    }
);

unpack!(
    /// Eight blocks of 22 bytes: scale, 4 bytes of fifth bits, 16 bytes of codes.
    Q5_0, 8 * 22, false, |p| {
        let [e0, e1] = nibbles(four(p.add(6), 44));
        let [o0, o1] = nibbles(four(p.add(28), 44));
        let (even, odd) = (four(p, 44), four(p.add(22), 44));
        let q = [
            with_bits(e0, even, 0x0302, 16),
            with_bits(e1, even, 0x0504, 16),
            with_bits(o0, odd, 0x0302, 16),
            with_bits(o1, odd, 0x0504, 16),
        ];
        let scale = each_twice(eight_scales(p, 22));
        Tile { q: interleave(q), scale, min: _mm512_mul_ps(scale, _mm512_set1_ps(16.0)) }
    }
);

unpack!(
    /// Eight blocks of 24 bytes: scale, addend, 4 bytes of fifth bits, 16 bytes of codes.
    Q5_1, 8 * 24, false, |p| {
        let [e0, e1] = nibbles(four(p.add(8), 48));
        let [o0, o1] = nibbles(four(p.add(32), 48));
        let (even, odd) = (four(p, 48), four(p.add(24), 48));
        let q = [
            with_bits(e0, even, 0x0504, 16),
            with_bits(e1, even, 0x0706, 16),
            with_bits(o0, odd, 0x0504, 16),
            with_bits(o1, odd, 0x0706, 16),
        ];
        let (scale, min) = eight_pairs(p, 24);
        Tile { q: interleave(q), scale, min }
    }
);

unpack!(
    /// Eight blocks of 34 bytes: scale, 32 signed bytes.
    Q8_0, 8 * 34, false, |p| {
        let flip = _mm512_set1_epi8(-128);
        let q = [
            _mm512_xor_si512(four(p.add(2), 68), flip),
            _mm512_xor_si512(four(p.add(18), 68), flip),
            _mm512_xor_si512(four(p.add(36), 68), flip),
            _mm512_xor_si512(four(p.add(52), 68), flip),
        ];
        let scale = each_twice(eight_scales(p, 34));
        Tile { q: interleave(q), scale, min: _mm512_mul_ps(scale, _mm512_set1_ps(128.0)) }
    }
);

unpack!(
    /// 16 bytes of scales and minimums, 64 bytes of codes, two factors.
    Q2_K, 84, true, |p| {
        let bytes = _mm_loadu_si128(p.cast());
        let mask = _mm_set1_epi8(15);
        let scales = _mm512_cvtepu8_epi32(_mm_and_si128(bytes, mask));
        let mins = _mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16::<4>(bytes), mask));
        let scale = _mm512_mul_ps(_mm512_cvtepi32_ps(scales), one_scale(p.add(80)));
        let min = _mm512_mul_ps(_mm512_cvtepi32_ps(mins), one_scale(p.add(82)));
        Tile { q: interleave(two_bit_codes(p.add(16))), scale, min }
    }
);

unpack!(
    /// 32 bytes of third bits, 64 bytes of codes, 12 bytes of scales, one factor.
    Q3_K, 110, true, |p| {
        let [e0, e1, o0, o1] = two_bit_codes(p.add(32));
        let first = _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()));
        let second = _mm512_broadcast_i32x4(_mm_loadu_si128(p.add(16).cast()));
        let even = even_bits();
        let odd = _mm512_slli_epi16::<1>(even);
        let four = _mm512_set1_epi8(4);
        let q = [
            _mm512_mask_add_epi8(e0, _mm512_test_epi8_mask(first, even), e0, four),
            _mm512_mask_add_epi8(e1, _mm512_test_epi8_mask(second, even), e1, four),
            _mm512_mask_add_epi8(o0, _mm512_test_epi8_mask(first, odd), o0, four),
            _mm512_mask_add_epi8(o1, _mm512_test_epi8_mask(second, odd), o1, four),
        ];
        let scales = q3_scales(&*p.add(96).cast::<[u8; 12]>());
        let scales = _mm512_cvtepu8_epi32(_mm_loadu_si128(scales.as_ptr().cast()));
        let scales = _mm512_cvtepi32_ps(_mm512_sub_epi32(scales, _mm512_set1_epi32(32)));
        let scale = _mm512_mul_ps(scales, one_scale(p.add(108)));
        Tile { q: interleave(q), scale, min: _mm512_mul_ps(scale, _mm512_set1_ps(4.0)) }
    }
);

/// Mask of the low halves of bytes.
const LOW: i64 = 0x0f0f_0f0f_0f0f_0f0f;

/// Mask of the high halves of bytes.
const HIGH: i64 = !LOW;

unpack!(
    /// Two factors, 12 bytes of scales and minimums, 128 bytes of codes.
    Q4_K, 144, false, |p| {
        let (first, second) = (_mm512_loadu_si512(p.add(16).cast()), _mm512_loadu_si512(p.add(80).cast()));
        // The high halves, of odd runs, stay where they are: sixteen times too large.
        let (scale, min) = k_scales(p, 1.0 / 16.0);
        let pairs = _mm512_setr_epi64(0, 0, 4, 4, 8, 8, 12, 12);
        let halves = _mm512_set4_epi64(HIGH, LOW, HIGH, LOW);
        let eight = |k| {
            let eights = _mm512_add_epi64(pairs, _mm512_set1_epi64(k));
            _mm512_and_si512(_mm512_permutex2var_epi64(first, eights, second), halves)
        };
        Tile { q: [eight(0), eight(1), eight(2), eight(3)], scale, min }
    }
);

unpack!(
    /// As Q4_K with 32 bytes of fifth bits before the codes.
    Q5_K, 176, false, |p| {
        let [e0, o0] = nibbles(four(p.add(48), 32));
        let [e1, o1] = nibbles(four(p.add(64), 32));
        let first = _mm512_broadcast_i32x4(_mm_loadu_si128(p.add(16).cast()));
        let second = _mm512_broadcast_i32x4(_mm_loadu_si128(p.add(32).cast()));
        let even = even_bits();
        let odd = _mm512_slli_epi16::<1>(even);
        let sixteen = _mm512_set1_epi8(16);
        let q = [
            _mm512_mask_add_epi8(e0, _mm512_test_epi8_mask(first, even), e0, sixteen),
            _mm512_mask_add_epi8(e1, _mm512_test_epi8_mask(second, even), e1, sixteen),
            _mm512_mask_add_epi8(o0, _mm512_test_epi8_mask(first, odd), o0, sixteen),
            _mm512_mask_add_epi8(o1, _mm512_test_epi8_mask(second, odd), o1, sixteen),
        ];
        let (scale, min) = k_scales(p, 1.0);
        Tile { q: interleave(q), scale, min }
    }
);

unpack!(
    /// 128 bytes of low bits, 64 bytes of high bits, 16 scales, one factor.
    Q6_K, 210, true, |p| {
        let (fifteen, high) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
        let mut q = [_mm512_setzero_si512(); 4];
        for half in 0..2 {
            let p = p.add(16 * half);
            let bits = shift_every_other(two_twice(p.add(128), p.add(160)));
            let even = _mm512_and_si512(shift_every_other(two_twice(p, p.add(64))), fifteen);
            let odd = _mm512_and_si512(shift_every_other(two_twice(p.add(32), p.add(96))), fifteen);
            // 0xf8: the first argument or both of the others.
            q[half] = _mm512_ternarylogic_epi32::<0xf8>(even, _mm512_slli_epi16::<4>(bits), high);
            q[2 + half] = _mm512_ternarylogic_epi32::<0xf8>(odd, _mm512_slli_epi16::<2>(bits), high);
        }
        let scales = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.add(192).cast()));
        let scale = _mm512_mul_ps(_mm512_cvtepi32_ps(scales), one_scale(p.add(208)));
        Tile { q: interleave(q), scale, min: _mm512_mul_ps(scale, _mm512_set1_ps(32.0)) }
    }
);

unpack!(
    /// Eight blocks of 18 bytes: scale, 16 bytes of codes.
    IQ4_NL, 8 * 18, false, |p| {
        let [e0, e1] = nibbles(four(p.add(2), 36));
        let [o0, o1] = nibbles(four(p.add(20), 36));
        let scale = each_twice(eight_scales(p, 18));
        let q = [e0, e1, o0, o1].map(|q| look_up(q, &IQ4_LEVELS));
        Tile { q: interleave(q), scale, min: _mm512_mul_ps(scale, _mm512_set1_ps(128.0)) }
    }
);

unpack!(
    /// One factor, 2 + 4 bytes of scales, 128 bytes of codes.
    IQ4_XS, 136, false, |p| {
        let [e0, e1] = nibbles(four(p.add(8), 32));
        let [o0, o1] = nibbles(four(p.add(24), 32));
        let q = [e0, e1, o0, o1].map(|q| look_up(q, &IQ4_LEVELS));
        let low = _mm512_set1_epi32(p.add(4).cast::<i32>().read_unaligned());
        let high = _mm512_set1_epi32(i32::from(p.add(2).cast::<u16>().read_unaligned()));
        let fours = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
        let low = _mm512_and_si512(_mm512_srlv_epi32(low, fours), _mm512_set1_epi32(15));
        let high = _mm512_srlv_epi32(high, _mm512_srli_epi32::<1>(fours));
        let high = _mm512_slli_epi32::<4>(_mm512_and_si512(high, _mm512_set1_epi32(3)));
        let scales = _mm512_sub_epi32(_mm512_or_si512(low, high), _mm512_set1_epi32(32));
        let scale = _mm512_mul_ps(_mm512_cvtepi32_ps(scales), one_scale(p));
        Tile { q: interleave(q), scale, min: _mm512_mul_ps(scale, _mm512_set1_ps(128.0)) }
    }
);

unpack!(
    /// Eight blocks of 17 bytes: exponent, 16 bytes of codes.
    MXFP4, 8 * 17, false, |p| {
        let [e0, e1] = nibbles(four(p.add(1), 34));
        let [o0, o1] = nibbles(four(p.add(18), 34));
        let q = [e0, e1, o0, o1].map(|q| look_up(q, &MXFP4_LEVELS));
        let at = |i: usize| i32::from(*p.add(17 * i));
        let e = _mm256_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
        // Half of the power of two; the two smallest are subnormal.
        let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
        let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
        let is_small = _mm256_cmplt_epi32_mask(e, _mm256_set1_epi32(2));
        let bits = _mm256_mask_mov_epi32(normal, is_small, small);
        let scale = each_twice(_mm256_castsi256_ps(bits));
        Tile { q: interleave(q), scale, min: _mm512_mul_ps(scale, _mm512_set1_ps(128.0)) }
    }
);
