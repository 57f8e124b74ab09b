//! Unpacking a run of each row of a band, in the registers that the kernels multiply.
//!
//! Codes are unsigned, as the left operand of `dpbusd` must be. Negative ones get an offset, a power
//! of two, which the kernels take off the dot product again.

use crate::bands::{BandLayout, LINE_BYTES};
use crate::quant::TensorType;
use crate::quant::iq4_nl::IQ4_LEVELS;
use crate::quant::mxfp4::MXFP4_LEVELS;
use crate::x86::avx512_unpack::{self as unpack, Unpack, look_up};
use std::arch::x86_64::*;

/// 32 values of each of 16 rows.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// Unsigned codes: register `i` has values `4 i` to `4 i + 4` of every row.
    pub q: [__m512i; 8],
    /// Scales of the rows, for the first and the second 16 values; the first is for all 32 where
    /// the format has a scale per 32.
    pub scale: [__m512; 2],
    /// Minimums, which are subtracted; zero for a format with an offset.
    pub min: __m512,
}

/// A format with bands.
pub(super) trait BandFormat {
    const TYPE: TensorType;
    /// Runs of 32 values per block.
    const RUNS: usize;
    /// Whether scales are per 16 values; otherwise they are per 32.
    const SCALE_PER_16: bool = false;
    /// Binary logarithm of what codes are too large by, for a format without minimums.
    const OFFSET_BITS: Option<u32> = None;
    const LAYOUT: BandLayout = match crate::bands::layout(Self::TYPE) {
        Some(layout) => layout,
        None => panic!("a format without bands"),
    };
    /// The unpacking of 256 values of one row, to the same codes and scales.
    type Rows: Unpack;
    /// What all runs of a block share.
    type Head: Copy;

    /// Unpacks what the runs of a block share.
    ///
    /// # Safety
    /// The lines and the rest of a block can be read, and the processor has the instructions.
    unsafe fn head(lines: *const u8, rest: *const u8) -> Self::Head;

    /// Unpacks run `J` of a block.
    ///
    /// # Safety
    /// As [`head`](Self::head).
    unsafe fn run<const J: usize>(lines: *const u8, head: Self::Head) -> Run;
}

/// Declares a format.
macro_rules! band {
    (
        $(#[$doc:meta])* $name:ident, $runs:expr, $fine:expr, $offset:expr, $head:ty,
        |$lines:ident, $rest:ident| $make_head:expr,
        |$j:ident, $at:ident, $of:ident| $body:expr
    ) => {
        $(#[$doc])*
        #[allow(non_camel_case_types)]
        pub(super) struct $name;

        impl BandFormat for $name {
            const TYPE: TensorType = TensorType::$name;
            const RUNS: usize = $runs;
            const SCALE_PER_16: bool = $fine;
            const OFFSET_BITS: Option<u32> = $offset;
            type Rows = unpack::$name;
            type Head = $head;

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            unsafe fn head($lines: *const u8, $rest: *const u8) -> $head {
                let _ = ($lines, $rest);
                // SAFETY: everything read lies within the caller's block.
                unsafe { $make_head }
            }

            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
            unsafe fn run<const $j: usize>($at: *const u8, $of: $head) -> Run {
                // SAFETY: everything read lies within the caller's block.
                unsafe { $body }
            }
        }
    };
}

/// Loads a line.
///
/// # Safety
/// It can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn line(lines: *const u8, i: usize) -> __m512i {
    // SAFETY: the caller's line.
    unsafe { _mm512_loadu_si512(lines.add(i * LINE_BYTES).cast()) }
}

/// Shifts every word to the right by a constant.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn right(v: __m512i, bits: usize) -> __m512i {
    _mm512_srl_epi32(v, _mm_cvtsi64_si128(bits as i64))
}

/// Returns one value in every word.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn all(value: i32) -> __m512i {
    _mm512_set1_epi32(value)
}

/// Returns `a | b & mask`, bit by bit.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn or_and(a: __m512i, b: __m512i, mask: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0xf8>(a, b, mask)
}

/// Widens 16 halves that follow one another.
///
/// # Safety
/// 32 bytes can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn halves(rest: *const u8) -> __m512 {
    // SAFETY: the caller's bytes.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(rest.cast())) }
}

/// Widens the low and the high half of each word.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn two_halves(words: __m512i) -> [__m512; 2] {
    [
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)),
        _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(words))),
    ]
}

/// Returns a run whose codes have an offset, with one scale for all of it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn with_offset(q: [__m512i; 8], scale: __m512) -> Run {
    Run {
        q,
        scale: [scale; 2],
        min: _mm512_setzero_ps(),
    }
}

/// Loads four lines of nibbles: the low halves are the first 16 values, the high ones the rest.
///
/// # Safety
/// The four lines from `first` on can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn sixteen_and_sixteen(lines: *const u8, first: usize) -> [__m512i; 8] {
    let mask = _mm512_set1_epi8(15);
    let mut q = [mask; 8];
    for i in 0..4 {
        // SAFETY: the caller's lines.
        let bytes = unsafe { line(lines, first + i) };
        q[i] = _mm512_and_si512(bytes, mask);
        q[4 + i] = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask);
    }
    q
}

/// Puts a fifth bit on top of each code: bit `k` of a row's word is that of value `k`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn with_fifth_bits(q: [__m512i; 8], fifth: __m512i) -> [__m512i; 8] {
    // In each word, the byte of `fifth` that has the bits of these four values, four times.
    let bytes = |byte: i32| {
        let step = all(0x0101_0101 * byte);
        _mm512_add_epi8(
            _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0),
            step,
        )
    };
    let bit = [all(0x0804_0201), all(0x8040_2010_u32 as i32)];
    let sixteen = _mm512_set1_epi8(16);
    let mut out = q;
    for (i, out) in out.iter_mut().enumerate() {
        let bits = _mm512_shuffle_epi8(fifth, bytes(i as i32 / 2));
        let set = _mm512_test_epi8_mask(bits, bit[i % 2]);
        *out = _mm512_mask_add_epi8(*out, set, *out, sixteen);
    }
    out
}

band!(
    /// A scale per 32 values, 16 bytes of codes, 8 too large.
    Q4_0, 1, false, Some(3), __m512,
    |_lines, rest| halves(rest),
    |J, lines, head| with_offset(sixteen_and_sixteen(lines, 0), head)
);

band!(
    /// A word of scale and addend, 16 bytes of codes.
    Q4_1, 1, false, None, [__m512; 2],
    |lines, _rest| two_halves(line(lines, 0)),
    |J, lines, head| {
        let min = _mm512_sub_ps(_mm512_setzero_ps(), head[1]);
        Run { q: sixteen_and_sixteen(lines, 1), scale: [head[0]; 2], min }
    }
);

band!(
    /// A scale, a word of fifth bits, 16 bytes of codes, 16 too large.
    Q5_0, 1, false, Some(4), __m512,
    |_lines, rest| halves(rest),
    |J, lines, head| {
        with_offset(with_fifth_bits(sixteen_and_sixteen(lines, 1), line(lines, 0)), head)
    }
);

band!(
    /// A word of scale and addend, a word of fifth bits, 16 bytes of codes.
    Q5_1, 1, false, None, [__m512; 2],
    |lines, _rest| two_halves(line(lines, 0)),
    |J, lines, head| {
        let min = _mm512_sub_ps(_mm512_setzero_ps(), head[1]);
        let q = with_fifth_bits(sixteen_and_sixteen(lines, 2), line(lines, 1));
        Run { q, scale: [head[0]; 2], min }
    }
);

band!(
    /// A scale, 32 signed bytes.
    Q8_0, 1, false, Some(7), __m512,
    |_lines, rest| halves(rest),
    |J, lines, head| {
        let flip = _mm512_set1_epi8(-128);
        let mut q = [flip; 8];
        for (i, q) in q.iter_mut().enumerate() {
            *q = _mm512_xor_si512(line(lines, i), flip);
        }
        with_offset(q, head)
    }
);

band!(
    /// A scale, 16 bytes of indices of levels.
    IQ4_NL, 1, false, Some(7), __m512,
    |_lines, rest| halves(rest),
    |J, lines, head| {
        let mut q = sixteen_and_sixteen(lines, 0);
        for q in &mut q {
            *q = look_up(*q, &IQ4_LEVELS);
        }
        with_offset(q, head)
    }
);

band!(
    /// An exponent, 16 bytes of indices of levels.
    MXFP4, 1, false, Some(7), __m512,
    |_lines, rest| {
        let e = _mm512_cvtepu8_epi32(_mm_loadu_si128(rest.cast()));
        // Half of the power of two; the two smallest are subnormal.
        let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(e, all(1)));
        let small = _mm512_sllv_epi32(all(0x0020_0000), e);
        let is_small = _mm512_cmplt_epi32_mask(e, all(2));
        _mm512_castsi512_ps(_mm512_mask_mov_epi32(normal, is_small, small))
    },
    |J, lines, head| {
        let mut q = sixteen_and_sixteen(lines, 0);
        for q in &mut q {
            *q = look_up(*q, &MXFP4_LEVELS);
        }
        with_offset(q, head)
    }
);

/// What the runs of a Q4_K or Q5_K block share.
#[derive(Clone, Copy)]
pub(super) struct KHead {
    /// Factors of scales and minimums.
    d: [__m512; 2],
    /// The three words of scales and minimums.
    packed: [__m512i; 3],
}

/// Unpacks [`KHead`] from a block's first four lines.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn k_head(lines: *const u8) -> KHead {
    // SAFETY: the caller's lines.
    unsafe {
        KHead {
            d: two_halves(line(lines, 0)),
            packed: [line(lines, 1), line(lines, 2), line(lines, 3)],
        }
    }
}

/// Unpacks the scale and the minimum of run `j`, as `scales_and_mins` does for all eight.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn k_scale(head: KHead, j: usize) -> [__m512; 2] {
    let [a, b, c] = head.packed;
    let (scale, min) = if j < 4 {
        let six = all(63);
        let low = |v| _mm512_and_si512(right(v, 8 * j), six);
        (low(a), low(b))
    } else {
        let (i, four, two) = (j - 4, all(15), all(0x30));
        let low = |bits| _mm512_and_si512(right(c, bits), four);
        (
            or_and(low(8 * i), right(a, 8 * i + 2), two),
            or_and(low(8 * i + 4), right(b, 8 * i + 2), two),
        )
    };
    [
        _mm512_mul_ps(_mm512_cvtepi32_ps(scale), head.d[0]),
        _mm512_mul_ps(_mm512_cvtepi32_ps(min), head.d[1]),
    ]
}

band!(
    /// Two factors, 12 bytes of scales and minimums, 128 bytes of codes.
    Q4_K, 8, false, None, KHead,
    |lines, _rest| k_head(lines),
    |J, lines, head| {
        let [scale, min] = k_scale(head, J);
        // The high halves, of odd runs, stay where they are: sixteen times too large.
        let odd = J % 2 == 1;
        let mask = _mm512_set1_epi8(if odd { 0xf0_u8 as i8 } else { 15 });
        let mut q = [mask; 8];
        for (i, q) in q.iter_mut().enumerate() {
            *q = _mm512_and_si512(line(lines, 4 + J / 2 * 8 + i), mask);
        }
        let scale = if odd { _mm512_mul_ps(scale, _mm512_set1_ps(1.0 / 16.0)) } else { scale };
        Run { q, scale: [scale; 2], min }
    }
);

band!(
    /// As Q4_K with 32 bytes of fifth bits before the codes.
    Q5_K, 8, false, None, KHead,
    |lines, _rest| k_head(lines),
    |J, lines, head| {
        let [scale, min] = k_scale(head, J);
        let (four, sixteen) = (_mm512_set1_epi8(15), _mm512_set1_epi8(16));
        let mut q = [four; 8];
        for (i, q) in q.iter_mut().enumerate() {
            let low = line(lines, 12 + J / 2 * 8 + i);
            let low = if J % 2 == 1 { _mm512_srli_epi16::<4>(low) } else { low };
            let fifth = line(lines, 4 + i);
            let fifth = if J < 4 {
                _mm512_sll_epi16(fifth, _mm_cvtsi64_si128(4 - J as i64))
            } else {
                _mm512_srl_epi16(fifth, _mm_cvtsi64_si128(J as i64 - 4))
            };
            *q = or_and(_mm512_and_si512(low, four), fifth, sixteen);
        }
        Run { q, scale: [scale; 2], min }
    }
);

band!(
    /// 128 bytes of low bits, 64 bytes of high bits, 16 scales, one factor.
    Q6_K, 8, true, Some(5), __m512,
    |_lines, rest| halves(rest),
    |J, lines, head| {
        let (half, part) = (J / 4, J % 4);
        let (four, high) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
        let mut q = [four; 8];
        for (i, q) in q.iter_mut().enumerate() {
            let low = line(lines, 16 * half + 8 * (part % 2) + i);
            let low = if part < 2 { low } else { _mm512_srli_epi16::<4>(low) };
            let bits = line(lines, 32 + 8 * half + i);
            let bits = match part {
                0 => _mm512_slli_epi16::<4>(bits),
                1 => _mm512_slli_epi16::<2>(bits),
                2 => bits,
                _ => _mm512_srli_epi16::<2>(bits),
            };
            *q = or_and(_mm512_and_si512(low, four), bits, high);
        }
        // The four scales of runs `J` and `J ^ 1` are one word.
        let words = line(lines, 48 + J / 2);
        let scale = |i: usize| {
            let byte = 2 * (J % 2) + i;
            let left = _mm512_sll_epi32(words, _mm_cvtsi64_si128(24 - 8 * byte as i64));
            let scale = _mm512_srai_epi32::<24>(left);
            _mm512_mul_ps(_mm512_cvtepi32_ps(scale), head)
        };
        Run { q, scale: [scale(0), scale(1)], min: _mm512_setzero_ps() }
    }
);

band!(
    /// A factor and 16 high bits of scales, four bytes of their low bits, 128 bytes of indices.
    IQ4_XS, 8, false, Some(7), [__m512i; 3],
    |lines, _rest| {
        let factors = two_halves(line(lines, 0))[0];
        [_mm512_castps_si512(factors), _mm512_srli_epi32::<16>(line(lines, 0)), line(lines, 1)]
    },
    |J, lines, head| {
        let mut q = sixteen_and_sixteen(lines, 2 + 4 * J);
        for q in &mut q {
            *q = look_up(*q, &IQ4_LEVELS);
        }
        let low = _mm512_and_si512(right(head[2], 4 * J), all(15));
        let high = _mm512_and_si512(right(head[1], 2 * J), all(3));
        let s = _mm512_sub_epi32(_mm512_or_si512(low, _mm512_slli_epi32::<4>(high)), all(32));
        let scale = _mm512_mul_ps(_mm512_cvtepi32_ps(s), _mm512_castsi512_ps(head[0]));
        with_offset(q, scale)
    }
);
