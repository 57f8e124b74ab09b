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

use std::arch::x86_64::*;

pub(super) use super::avx512_few_bits::{NVFP4, Q1_0, Q2_0, TQ1_0, TQ2_0};

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

/// Replaces 4-bit codes by levels, with an offset of 128.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) fn look_up(codes: __m512i, levels: &[i8; 16]) -> __m512i {
    // SAFETY: sixteen bytes.
    let table = unsafe { _mm_loadu_si128(levels.as_ptr().cast()) };
    let table = _mm512_broadcast_i32x4(_mm_xor_si128(table, _mm_set1_epi8(-128)));
    _mm512_shuffle_epi8(table, codes)
}
