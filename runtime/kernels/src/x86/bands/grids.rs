//! Formats with grids, in bands: AVX-512 with VBMI looks up 64 grid indices at a time.
//!
//! A grid entry is 8 or 4 magnitudes, each of a few levels. So an entry is the numbers of its levels,
//! two bytes: of 2 bits for 8 values, of 4 bits for 4 values. A *plane* has one of these bytes of every
//! entry, and `vpermi2b` looks 64 indices up among 128 bytes of it.
//!
//! ```text
//! a line of indices       64 bytes: index k of row r is byte k of word r
//! low, high               plane 0, plane 1 at these indices
//! for each register i:    4 values per row
//!     level = vpmultishiftqb(low or high)     # moves a value's bits to the bottom of a byte
//!     sign = vpmultishiftqb(signs)            # moves its sign to just above them
//!     q = vpermb(level | sign, levels)        # 64 more than the value
//! ```

use super::formats::{BandFormat, Run, line};
use crate::quant::TensorType;
use crate::quant::grids;
use crate::x86::lanes::PartialLanes;
use std::arch::x86_64::*;

/// Binary logarithm of what codes are too large by: more than any magnitude.
const OFFSET_BITS: usize = 6;

/// 64 numbers of one byte.
#[repr(align(64))]
struct Bytes([u8; 64]);

impl Bytes {
    /// Returns the numbers in a register.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    unsafe fn load(&self) -> __m512i {
        // SAFETY: 64 aligned bytes.
        unsafe { _mm512_load_si512(self.0.as_ptr().cast()) }
    }
}

/// The first or the second byte of every entry of a grid.
#[repr(align(64))]
struct Plane<const N: usize>([u8; N]);

/// Splits the entries of a grid into planes.
const fn planes<const N: usize>(packed: &[u16; N]) -> [Plane<N>; 2] {
    let mut planes = [Plane([0; N]), Plane([0; N])];
    let mut i = 0;
    while i < N {
        let [low, high] = packed[i].to_le_bytes();
        planes[0].0[i] = low;
        planes[1].0[i] = high;
        i += 1;
    }
    planes
}

static IQ2_XXS_PLANES: [Plane<256>; 2] = planes(&grids::IQ2_XXS_PACKED);
static IQ2_XS_PLANES: [Plane<512>; 2] = planes(&grids::IQ2_XS_PACKED);
static IQ2_S_PLANES: [Plane<1024>; 2] = planes(&grids::IQ2_S_PACKED);
static IQ3_XXS_PLANES: [Plane<256>; 2] = planes(&grids::IQ3_XXS_PACKED);
static IQ3_S_PLANES: [Plane<512>; 2] = planes(&grids::IQ3_S_PACKED);

/// Eight sign bits by seven stored ones.
static EVEN_SIGNS: [Bytes; 2] = {
    let mut out = [Bytes([0; 64]), Bytes([0; 64])];
    let mut i = 0;
    while i < 128 {
        out[i / 64].0[i % 64] = i as u8 | ((i.count_ones() & 1) << 7) as u8;
        i += 1;
    }
    out
};

/// Codes by the number of a level, `BITS` bits, and the sign above it.
const fn codes<const N: usize>(levels: [u8; N], bits: u32) -> Bytes {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        let level = levels[i & (N - 1)];
        let negative = i >> bits & 1 == 1;
        out[i] = if negative {
            (1 << OFFSET_BITS) - level
        } else {
            (1 << OFFSET_BITS) + level
        };
        i += 1;
    }
    Bytes(out)
}

static IQ2_CODES: Bytes = codes(grids::IQ2_LEVELS, 2);
static IQ3_XXS_CODES: Bytes = codes(grids::IQ3_XXS_LEVELS, 3);
static IQ3_S_CODES: Bytes = codes(grids::IQ3_S_LEVELS, 3);

/// Where bytes are taken from, for `vpmultishiftqb`: byte `j` of a word begins at bit
/// `first + j * step` of the word, wherever it then ends. Words are in pairs.
const fn bits_from(first: i32, step: i32) -> Bytes {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        let word = (i / 4 % 2 * 32) as i32;
        out[i] = ((word + first + (i % 4) as i32 * step) & 63) as u8;
        i += 1;
    }
    Bytes(out)
}

/// Lists `bits_from` for eight registers.
macro_rules! each_register {
    (|$i:ident| $first:expr, $step:expr) => {{
        const ALL: [Bytes; 8] = {
            let mut out = [const { Bytes([0; 64]) }; 8];
            let mut $i = 0;
            while $i < 8 {
                out[$i as usize] = bits_from($first, $step);
                $i += 1;
            }
            out
        };
        ALL
    }};
}

/// Two bits per value: those of register `i` are in byte `i / 2` of the plane `i % 2`.
static TWO_BITS: [Bytes; 8] = each_register!(|i| i / 2 * 8, 2);
/// Their signs, above the two bits.
static SIGNS_AT_2: [Bytes; 8] = each_register!(|i| 4 * i - 2, 1);
/// Four bits per value: the first two of register `i` are in byte `i % 4` of plane 0, of the line
/// `i / 4`.
static FOUR_BITS: [Bytes; 8] = each_register!(|i| i % 4 * 8, 4);
/// The other two, in plane 1.
static OTHER_FOUR_BITS: [Bytes; 8] = each_register!(|i| i % 4 * 8 - 8, 4);
/// Their signs, above three bits.
static SIGNS_AT_3: [Bytes; 8] = each_register!(|i| 4 * i - 3, 1);
/// Four times seven bits.
static SEVENS: Bytes = bits_from(0, 7);
/// Bits of high parts of indices: two, or one, per index, of byte `i` of a word (and of its second
/// half).
static PAIRS: [Bytes; 8] = each_register!(|i| 8 * i, 2);
static SINGLES: [Bytes; 8] = each_register!(|i| 4 * i, 1);

/// Looks a plane up. `high` has the bits of the indices from the ninth on, at the bottom of each byte.
///
/// # Safety
/// The processor has AVX-512 with VBMI.
#[inline(always)]
unsafe fn look_up<const N: usize>(plane: &Plane<N>, index: __m512i, high: __m512i) -> __m512i {
    // SAFETY: the processor is the caller's; there are `N` bytes.
    unsafe {
        let bytes = plane.0.as_ptr();
        if N == 256 {
            return of_256(bytes, index);
        }
        let first = of_512(bytes, index, high);
        if N == 512 {
            return first;
        }
        let tenth = _mm512_test_epi8_mask(high, _mm512_set1_epi8(2));
        _mm512_mask_blend_epi8(tenth, first, of_512(bytes.add(512), index, high))
    }
}

/// Looks up among 512 bytes; see [`look_up`].
///
/// # Safety
/// There are as many, aligned to 64; otherwise as [`look_up`].
#[inline(always)]
unsafe fn of_512(bytes: *const u8, index: __m512i, high: __m512i) -> __m512i {
    // SAFETY: the caller's bytes and processor.
    unsafe {
        let ninth = _mm512_test_epi8_mask(high, _mm512_set1_epi8(1));
        _mm512_mask_blend_epi8(ninth, of_256(bytes, index), of_256(bytes.add(256), index))
    }
}

/// Looks up among 256 bytes; see [`look_up`].
///
/// # Safety
/// As [`of_512`].
#[inline(always)]
unsafe fn of_256(bytes: *const u8, index: __m512i) -> __m512i {
    // SAFETY: the caller's bytes and processor.
    unsafe {
        let p = bytes.cast::<__m512i>();
        let first = _mm512_permutex2var_epi8(p.read(), index, p.add(1).read());
        let second = _mm512_permutex2var_epi8(p.add(2).read(), index, p.add(3).read());
        _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), first, second)
    }
}

/// Looks up the signs that seven bits each stand for, whatever the eighth.
///
/// # Safety
/// As [`look_up`].
#[inline(always)]
unsafe fn even_signs(sevens: __m512i) -> __m512i {
    // SAFETY: the caller's processor.
    unsafe { _mm512_permutex2var_epi8(EVEN_SIGNS[0].load(), sevens, EVEN_SIGNS[1].load()) }
}

/// Takes the lowest bits of a mask from `a` and the others from `b`.
///
/// # Safety
/// As [`look_up`].
#[inline(always)]
unsafe fn join(mask: u8, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller's processor.
    unsafe { _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(mask as i8), a, b) }
}

/// Returns the codes of a run whose four grid indices per row have 8 values each.
///
/// # Safety
/// As [`look_up`].
#[inline(always)]
unsafe fn eights<const N: usize>(
    planes: &[Plane<N>; 2],
    index: __m512i,
    high: __m512i,
    signs: __m512i,
) -> [__m512i; 8] {
    // SAFETY: the caller's processor.
    unsafe {
        let halves = [
            look_up(&planes[0], index, high),
            look_up(&planes[1], index, high),
        ];
        let codes = IQ2_CODES.load();
        let mut q = [codes; 8];
        for (i, q) in q.iter_mut().enumerate() {
            let level = _mm512_multishift_epi64_epi8(TWO_BITS[i].load(), halves[i % 2]);
            let sign = _mm512_multishift_epi64_epi8(SIGNS_AT_2[i].load(), signs);
            *q = _mm512_permutexvar_epi8(join(3, level, sign), codes);
        }
        q
    }
}

/// Returns the codes of a run whose eight grid indices per row have 4 values each, in two lines.
///
/// # Safety
/// As [`look_up`].
#[inline(always)]
unsafe fn fours<const N: usize>(
    planes: &[Plane<N>; 2],
    index: [__m512i; 2],
    high: [__m512i; 2],
    signs: __m512i,
    codes: &Bytes,
) -> [__m512i; 8] {
    // SAFETY: the caller's processor.
    unsafe {
        let codes = codes.load();
        let mut q = [codes; 8];
        for (of_line, q) in q.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let low = look_up(&planes[0], index[of_line], high[of_line]);
            let other = look_up(&planes[1], index[of_line], high[of_line]);
            for (k, q) in q.iter_mut().enumerate() {
                let i = 4 * of_line + k;
                let level = _mm512_multishift_epi64_epi8(FOUR_BITS[i].load(), low);
                let level = _mm512_mask_multishift_epi64_epi8(
                    level,
                    0xcccc_cccc_cccc_cccc,
                    OTHER_FOUR_BITS[i].load(),
                    other,
                );
                let sign = _mm512_multishift_epi64_epi8(SIGNS_AT_3[i].load(), signs);
                *q = _mm512_permutexvar_epi8(join(7, level, sign), codes);
            }
        }
        q
    }
}

/// Returns four bits of each word as a float: `(bits + add) * factor`.
///
/// # Safety
/// As [`look_up`].
#[inline(always)]
unsafe fn scale(words: __m512i, bit: usize, factor: __m512) -> __m512 {
    // SAFETY: the caller's processor.
    unsafe {
        let bits = _mm512_srl_epi32(words, _mm_cvtsi64_si128(bit as i64));
        let bits = _mm512_and_si512(bits, _mm512_set1_epi32(15));
        _mm512_mul_ps(
            _mm512_add_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(0.5)),
            factor,
        )
    }
}

/// Returns byte `byte` of both halves of each word of `a`, then of `b`.
///
/// # Safety
/// As [`look_up`].
#[inline(always)]
unsafe fn of_halves(a: __m512i, b: __m512i, byte: i32) -> __m512i {
    // SAFETY: the caller's processor.
    unsafe {
        // Of a word the bytes 0 and 2, and then zeros.
        let of_a = _mm512_set4_epi32(
            0x8080_0e0c_u32 as i32,
            0x8080_0a08_u32 as i32,
            0x8080_0604_u32 as i32,
            0x8080_0200_u32 as i32,
        );
        let of_a = _mm512_add_epi8(of_a, _mm512_set1_epi32(0x0101 * byte));
        // The same after two zeros.
        let of_b = _mm512_or_si512(_mm512_slli_epi32::<16>(of_a), _mm512_set1_epi32(0x8080));
        _mm512_or_si512(_mm512_shuffle_epi8(a, of_a), _mm512_shuffle_epi8(b, of_b))
    }
}

/// Declares a format with a factor per block, which comes first, and a run of 32 values by its
/// number `$j`, the block's lines and the factor times `$times`.
macro_rules! grid {
    (
        $(#[$doc:meta])* $name:ident, $max:expr, $fine:expr, $times:expr,
        |$j:ident, $lines:ident, $factor:ident| $body:expr
    ) => {
        $(#[$doc])*
        #[allow(non_camel_case_types)]
        pub(super) struct $name;

        impl BandFormat<__m512i> for $name {
            const TYPE: TensorType = TensorType::$name;
            const RUNS: usize = 8;
            const SCALE_PER_16: bool = $fine;
            const MAX_CODE: usize = (1 << OFFSET_BITS) + $max;
            const OFFSET_BITS: Option<usize> = Some(OFFSET_BITS);
            const NEEDS_VBMI: bool = true;
            const HAS_TILES: bool = false;
            type Head = __m512;

            #[inline(always)]
            unsafe fn head(_lines: *const u8, rest: *const u8) -> __m512 {
                // SAFETY: the caller's block and processor.
                unsafe {
                    let d = _mm512_cvtph_ps(_mm256_loadu_si256(rest.cast()));
                    _mm512_mul_ps(d, _mm512_set1_ps($times))
                }
            }

            #[inline(always)]
            unsafe fn run<const $j: usize>($lines: *const u8, $factor: __m512) -> Run<__m512i> {
                // SAFETY: everything read lies within the caller's block.
                let (q, scale) = unsafe { $body };
                // SAFETY: the caller's processor.
                let min = [unsafe { __m512::splat(0.0) }; 2];
                Run { q, scale, min }
            }
        }
    };
}

grid!(
    /// Per 32 values four indices, and a word of four times seven sign bits and a scale.
    IQ2_XXS, 43, false, 0.25,
    |J, lines, factor| {
        let (index, word): (__m512i, __m512i) = (line(lines, 2 * J), line(lines, 2 * J + 1));
        let signs = even_signs(_mm512_multishift_epi64_epi8(SEVENS.load(), word));
        (eights(&IQ2_XXS_PLANES, index, index, signs), [scale(word, 28, factor); 2])
    }
);

grid!(
    /// 64 bytes of words of an index of 9 bits and seven sign bits, 8 bytes of two scales each.
    IQ2_XS, 43, true, 0.25,
    |J, lines, factor| {
        let (a, b): (__m512i, __m512i) = (line(lines, 2 * J), line(lines, 2 * J + 1));
        let (index, high) = (of_halves(a, b, 0), of_halves(a, b, 1));
        let signs = even_signs(_mm512_srli_epi16::<1>(high));
        let words: __m512i = line(lines, 16 + J / 4);
        let scales = [scale(words, J % 4 * 8, factor), scale(words, J % 4 * 8 + 4, factor)];
        (eights(&IQ2_XS_PLANES, index, high, signs), scales)
    }
);

grid!(
    /// 32 bytes of indices, 32 bytes of signs, 8 bytes of two more bits per index, 8 bytes of two
    /// scales each.
    IQ2_S, 43, true, 0.25,
    |J, lines, factor| {
        let (index, signs): (__m512i, __m512i) = (line(lines, J), line(lines, 8 + J));
        let high = _mm512_multishift_epi64_epi8(PAIRS[J % 4].load(), line(lines, 16 + J / 4));
        let words: __m512i = line(lines, 18 + J / 4);
        let scales = [scale(words, J % 4 * 8, factor), scale(words, J % 4 * 8 + 4, factor)];
        (eights(&IQ2_S_PLANES, index, high, signs), scales)
    }
);

grid!(
    /// 64 bytes of indices, then a word as that of IQ2_XXS per 32 values.
    IQ3_XXS, 62, false, 0.5,
    |J, lines, factor| {
        let index = [line(lines, 2 * J), line(lines, 2 * J + 1)];
        let word: __m512i = line(lines, 16 + J);
        let signs = even_signs(_mm512_multishift_epi64_epi8(SEVENS.load(), word));
        let q = fours(&IQ3_XXS_PLANES, index, index, signs, &IQ3_XXS_CODES);
        (q, [scale(word, 28, factor); 2])
    }
);

grid!(
    /// 64 bytes of indices, 8 bytes of a ninth bit per index, 32 bytes of signs, 4 bytes of two
    /// scales each, of which a half is taken for `2 s + 1`.
    IQ3_S, 15, false, 2.0,
    |J, lines, factor| {
        let index = [line(lines, 2 * J), line(lines, 2 * J + 1)];
        let ninths: __m512i = line(lines, 16 + J / 4);
        let high = [
            _mm512_multishift_epi64_epi8(SINGLES[2 * (J % 4)].load(), ninths),
            _mm512_multishift_epi64_epi8(SINGLES[2 * (J % 4) + 1].load(), ninths),
        ];
        let q = fours(&IQ3_S_PLANES, index, high, line(lines, 18 + J), &IQ3_S_CODES);
        (q, [scale(line(lines, 26), 4 * J, factor); 2])
    }
);
