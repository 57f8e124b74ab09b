//! Unpacking 256 weights into AVX-512 registers, in the order of the activations: of the formats of
//! one or two bits per value, and of NVFP4.
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

use crate::quant::mxfp4::MXFP4_LEVELS;
use crate::quant::nvfp4::NVFP4_REBIAS;
use std::arch::x86_64::*;

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

/// Most bytes per 256 values (NVFP4).
pub(super) const MAX_GROUP_BYTES: usize = 144;

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

        impl Unpack for $name {
            const GROUP_BYTES: usize = $bytes;
            const SCALE_PER_16: bool = $fine;

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            unsafe fn unpack($p: *const u8) -> Tile {
                // SAFETY: everything read lies within the caller's `GROUP_BYTES` bytes.
                unsafe { $body }
            }
        }
    };
}

/// Turns sixteens into eights. Given are the first halves of the even runs, their second halves,
/// and the first and second halves of the odd runs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn interleave([e0, e1, o0, o1]: [__m512i; 4]) -> [__m512i; 4] {
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
unsafe fn four(p: *const u8, step: usize) -> __m512i {
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
fn nibbles(v: __m512i) -> [__m512i; 2] {
    let mask = _mm512_set1_epi8(15);
    [
        _mm512_and_si512(v, mask),
        _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask),
    ]
}

/// Loads one f16, sixteen times.
///
/// # Safety
/// Two bytes can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn one_scale(p: *const u8) -> __m512 {
    // SAFETY: the caller's bytes.
    let bits = unsafe { p.cast::<i16>().read_unaligned() };
    _mm512_cvtph_ps(_mm256_set1_epi16(bits))
}

/// Shifts the second and the fourth sixteen right by four bits, within 16-bit words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn shift_every_other(v: __m512i) -> __m512i {
    const FOUR: i64 = 0x0004_0004_0004_0004;
    _mm512_srlv_epi16(v, _mm512_setr_epi64(0, 0, FOUR, FOUR, 0, 0, FOUR, FOUR))
}

/// Unpacks 64 bytes of 2-bit codes, as TQ2_0 packs them (four runs of 32 per 32 bytes), for
/// [`interleave`].
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn two_bit_codes(p: *const u8) -> [__m512i; 4] {
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

/// Replaces 4-bit codes by levels, with an offset of 128.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn look_up(codes: __m512i, levels: &[i8; 16]) -> __m512i {
    // SAFETY: sixteen bytes.
    let table = unsafe { _mm_loadu_si128(levels.as_ptr().cast()) };
    let table = _mm512_broadcast_i32x4(_mm_xor_si128(table, _mm_set1_epi8(-128)));
    _mm512_shuffle_epi8(table, codes)
}

/// Loads the f16 scales of blocks of 18 bytes, for the 16 scales of 256 values: each of `N` scales
/// `16 / N` times.
///
/// # Safety
/// The first two bytes of each block can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn repeated_scales<const N: usize>(p: *const u8) -> __m512 {
    let mut bits = [0i16; 16];
    for (i, bits) in bits.chunks_exact_mut(16 / N).enumerate() {
        // SAFETY: the caller's bytes.
        bits.fill(unsafe { p.add(18 * i).cast::<i16>().read_unaligned() });
    }
    // SAFETY: sixteen numbers of 16 bits.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) })
}

unpack!(
    /// Two blocks of 18 bytes: scale, 16 bytes of bits. Codes are 0 and 1, with twice the scale.
    Q1_0, 2 * 18, false, |p| {
        // Byte `k` of a run has the bits of its eight `k`. So byte `k` of all four runs of a block
        // side by side, then of both blocks.
        let by_eight = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        let low = _mm_shuffle_epi8(_mm_loadu_si128(p.add(2).cast()), by_eight);
        let high = _mm_shuffle_epi8(_mm_loadu_si128(p.add(20).cast()), by_eight);
        let (first, second) = (_mm_unpacklo_epi32(low, high), _mm_unpackhi_epi32(low, high));
        let ones = _mm512_set1_epi8(1);
        let q = [
            _mm_cvtsi128_si64(first),
            _mm_extract_epi64::<1>(first),
            _mm_cvtsi128_si64(second),
            _mm_extract_epi64::<1>(second),
        ].map(|bits| _mm512_maskz_mov_epi8(bits as u64, ones));
        let min = repeated_scales::<2>(p);
        Tile { q, scale: _mm512_add_ps(min, min), min }
    }
);

unpack!(
    /// Four blocks of 18 bytes: scale, 16 bytes of four neighboring codes.
    Q2_0, 4 * 18, false, |p| {
        let (bytes, mask) = (four(p.add(2), 18), _mm512_set1_epi8(3));
        let first = _mm512_and_si512(bytes, mask);
        let second = _mm512_and_si512(_mm512_srli_epi16::<2>(bytes), mask);
        let third = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask);
        let fourth = _mm512_and_si512(_mm512_srli_epi16::<6>(bytes), mask);
        // The even run of each block is in its first 8 bytes, the odd run in its last 8.
        let even = [_mm512_unpacklo_epi8(first, second), _mm512_unpacklo_epi8(third, fourth)];
        let odd = [_mm512_unpackhi_epi8(first, second), _mm512_unpackhi_epi8(third, fourth)];
        let q = [
            _mm512_unpacklo_epi16(even[0], even[1]),
            _mm512_unpackhi_epi16(even[0], even[1]),
            _mm512_unpacklo_epi16(odd[0], odd[1]),
            _mm512_unpackhi_epi16(odd[0], odd[1]),
        ];
        let scale = repeated_scales::<4>(p);
        Tile { q: interleave(q), scale, min: scale }
    }
);

unpack!(
    /// 64 bytes of codes, scale.
    TQ2_0, 66, false, |p| {
        let scale = one_scale(p.add(64));
        Tile { q: interleave(two_bit_codes(p)), scale, min: scale }
    }
);

/// Returns the first base-3 digit of each byte times a power of 3, which is given for each 16 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn digits(bytes: __m512i, powers: __m512i) -> __m512i {
    // Products modulo 256, of the low and of the high bytes of the 16.
    let low = _mm512_mullo_epi16(bytes, powers);
    let high = _mm512_mullo_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(-256)), powers);
    let product = _mm512_mask_blend_epi8(0xaaaa_aaaa_aaaa_aaaa, low, high);
    let one = _mm512_set1_epi8(1);
    let at_least_1 = _mm512_cmpge_epu8_mask(product, _mm512_set1_epi8(86));
    let at_least_2 = _mm512_cmpge_epu8_mask(product, _mm512_set1_epi8(171_u8 as i8));
    let digit = _mm512_maskz_mov_epi8(at_least_1, one);
    _mm512_mask_add_epi8(digit, at_least_2, digit, one)
}

/// Returns the powers of 3 for the four sixteens of a register; the last two numbers are for the
/// two halves of the last sixteen, of 4 bytes of two powers each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn powers(first: i64, second: i64, third: i64, fourth: [i64; 2]) -> __m512i {
    const EACH: i64 = 0x0001_0001_0001_0001;
    let [a, b, c] = [first, second, third].map(|power| power * EACH);
    _mm512_setr_epi64(a, a, b, b, c, c, fourth[0], fourth[1])
}

/// A power of 3 for each 16 bits.
const fn alike(power: i64) -> [i64; 2] {
    [power * 0x0001_0001_0001_0001; 2]
}

/// Powers 0 and 1 for 4 bytes each, then 2 and 3.
const FOUR_POWERS: [i64; 2] = [0x0003_0003_0001_0001, 0x001b_001b_0009_0009];

unpack!(
    /// 48 + 4 bytes of base-3 digits, scale.
    TQ1_0, 54, false, |p| {
        let a = _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast()));
        let b = _mm512_broadcast_i32x4(_mm_loadu_si128(p.add(16).cast()));
        let c = _mm_loadu_si128(p.add(32).cast());
        let h = _mm_set1_epi32(p.add(48).cast::<i32>().read_unaligned());
        // Runs 0 to 4 are digits 0 to 4 of `a` and `b`, run 5 and 6 digits 0 to 3 of `c`, and run
        // 7 its digit 4 and the digits of `h`.
        let q = [
            digits(_mm512_inserti32x4::<3>(a, c), powers(1, 9, 81, alike(9))),
            digits(_mm512_inserti32x4::<3>(b, c), powers(1, 9, 81, alike(27))),
            digits(_mm512_mask_broadcast_i32x4(a, 0xff00, c), powers(3, 27, 1, alike(81))),
            digits(
                _mm512_inserti32x4::<3>(_mm512_mask_broadcast_i32x4(b, 0xff00, c), h),
                powers(3, 27, 3, FOUR_POWERS),
            ),
        ];
        let scale = one_scale(p.add(52));
        Tile { q: interleave(q), scale, min: scale }
    }
);

unpack!(
    /// Four blocks of 36 bytes: 4 scales, 8 bytes of codes per 16 values.
    NVFP4, 4 * 36, true, |p| {
        let two = |p: *const u8| {
            let low = _mm512_castsi256_si512(_mm256_loadu_si256(p.cast()));
            _mm512_inserti64x4::<1>(low, _mm256_loadu_si256(p.add(36).cast()))
        };
        let (low, high) = (two(p.add(4)), two(p.add(76)));
        // The first sixteens of all runs, then the second ones.
        let even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
        let odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
        let [q0, q1] = nibbles(_mm512_permutex2var_epi64(low, even, high));
        let [q2, q3] = nibbles(_mm512_permutex2var_epi64(low, odd, high));
        let q = [q0, q1, q2, q3].map(|q| look_up(q, &MXFP4_LEVELS));
        let at = |i: usize| p.add(36 * i).cast::<i32>().read_unaligned();
        let bytes = _mm_setr_epi32(at(0), at(1), at(2), at(3));
        let is_number = _mm_cmpneq_epi8_mask(bytes, _mm_set1_epi8(0x7f));
        let bytes = _mm_maskz_mov_epi8(is_number, _mm_and_si128(bytes, _mm_set1_epi8(0x7f)));
        let halves = _mm256_slli_epi16::<7>(_mm256_cvtepu8_epi16(bytes));
        let scale = _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(NVFP4_REBIAS));
        Tile { q, scale, min: _mm512_mul_ps(scale, _mm512_set1_ps(128.0)) }
    }
);
