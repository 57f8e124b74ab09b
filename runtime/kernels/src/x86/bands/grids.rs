//! Formats with grids, in bands.
//!
//! A grid entry is 8 or 4 magnitudes, each of a few levels. AVX2 loads the entries one by one. AVX-512
//! with VBMI looks up 64 at a time: an entry is also the numbers of its levels, two bytes, of 2 bits
//! for 8 values or of 4 bits for 4 values. A *plane* has one of these bytes of every entry, and
//! `vpermi2b` looks 64 indices up among 128 bytes of it.
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
use super::words::Words;
use crate::quant::TensorType;
use crate::quant::grids;
use crate::x86::lanes::PartialLanes;
use std::arch::x86_64::*;

/// Binary logarithm of what codes with AVX-512 are too large by: more than any magnitude.
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

/// A grid: its entries, and its planes.
struct Grid<E: 'static, const N: usize> {
    entries: &'static [E; N],
    planes: [Plane<N>; 2],
}

static IQ2_XXS_GRID: Grid<u64, 256> = Grid {
    entries: &grids::IQ2_XXS,
    planes: planes(&grids::IQ2_XXS_PACKED),
};
static IQ2_XS_GRID: Grid<u64, 512> = Grid {
    entries: &grids::IQ2_XS,
    planes: planes(&grids::IQ2_XS_PACKED),
};
static IQ2_S_GRID: Grid<u64, 1024> = Grid {
    entries: &grids::IQ2_S,
    planes: planes(&grids::IQ2_S_PACKED),
};
static IQ3_XXS_GRID: Grid<u32, 256> = Grid {
    entries: &grids::IQ3_XXS,
    planes: planes(&grids::IQ3_XXS_PACKED),
};
static IQ3_S_GRID: Grid<u32, 512> = Grid {
    entries: &grids::IQ3_S,
    planes: planes(&grids::IQ3_S_PACKED),
};

static IQ1_GRID: Grid<u64, 2048> = Grid {
    entries: &grids::IQ1,
    planes: planes(&grids::IQ1_PACKED),
};

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
/// Codes of IQ1 by level, -8, 0 or 8, and by the sign of the one that is added.
static IQ1_CODES: Bytes = {
    let mut out = [0; 64];
    let mut i = 0;
    while i < 64 {
        let level = 8 * (i as u8 & 3);
        out[i] = if i >> 2 & 1 == 1 {
            55 + level
        } else {
            57 + level
        };
        i += 1;
    }
    Bytes(out)
};
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
/// Where the bits of the four bytes of a word are taken from: those of byte `j` begin at bit
/// `first + j * step`. What is above `step` bits is of no account.
struct Spread {
    first: usize,
    step: usize,
    bytes: Bytes,
}

const fn spread(first: usize, step: usize) -> Spread {
    Spread {
        first,
        step,
        bytes: bits_from(first as i32, step as i32),
    }
}

/// Four times seven bits.
static SEVENS: Spread = spread(0, 7);
/// Four times two bits, of each byte of a word.
static PAIRS: [Spread; 4] = [spread(0, 2), spread(8, 2), spread(16, 2), spread(24, 2)];
/// Four times three bits, of each half of a word.
static THREES: [Spread; 2] = [spread(0, 3), spread(16, 3)];
/// Four times four bits, of each half of a word.
static NIBBLES: [Spread; 2] = [spread(0, 4), spread(16, 4)];
/// Four bits, of each half of each byte of a word.
static SINGLES: [Spread; 8] = [
    spread(0, 1),
    spread(4, 1),
    spread(8, 1),
    spread(12, 1),
    spread(16, 1),
    spread(20, 1),
    spread(24, 1),
    spread(28, 1),
];

/// What grids need of a register.
///
/// # Safety of all functions
/// As in [`Words`]; AVX-512 with VBMI.
trait GridWords: Words {
    /// What the codes are too large by, as [`BandFormat::OFFSET_BITS`].
    const OFFSET_BITS: Option<usize>;

    /// Takes bits of each word to its bytes.
    unsafe fn spread(self, from: &'static Spread) -> Self;

    /// Returns the signs that seven bits of each byte stand for, whatever the eighth.
    unsafe fn even_signs(self) -> Self;

    /// Returns the codes of a run whose four grid indices per row have 8 values each. `high` has the
    /// bits of the indices from the ninth on, at the bottom of each byte.
    unsafe fn eights<const N: usize>(
        grid: &'static Grid<u64, N>,
        index: Self,
        high: Self,
        signs: Self,
    ) -> [Self; 8];

    /// Does what [`eights`](Self::eights) does with the grid of IQ1: adds one to each value, or minus
    /// one where `signs` has a bit.
    unsafe fn ones(index: Self, high: Self, signs: Self) -> [Self; 8];

    /// Returns the codes of a run whose eight grid indices per row have 4 values each, in two lines.
    /// `codes` are for the grid's levels.
    unsafe fn fours<const N: usize>(
        grid: &'static Grid<u32, N>,
        index: [Self; 2],
        high: [Self; 2],
        signs: Self,
        codes: &'static Bytes,
    ) -> [Self; 8];
}

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
        let second = of_512(bytes.add(512), index, high);
        let first = _mm512_mask_blend_epi8(tenth, first, second);
        if N == 1024 {
            return first;
        }
        let third = of_512(bytes.add(1024), index, high);
        let fourth = of_512(bytes.add(1536), index, high);
        let second = _mm512_mask_blend_epi8(tenth, third, fourth);
        let eleventh = _mm512_test_epi8_mask(high, _mm512_set1_epi8(4));
        _mm512_mask_blend_epi8(eleventh, first, second)
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

/// Takes the lowest bits of a mask from `a` and the others from `b`.
///
/// # Safety
/// As [`look_up`].
#[inline(always)]
unsafe fn join(mask: u8, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller's processor.
    unsafe { _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(mask as i8), a, b) }
}

/// Returns codes of a run whose four grid indices per row have 8 values each.
///
/// # Safety
/// As [`look_up`].
#[inline(always)]
unsafe fn two_bit_levels<const N: usize>(
    planes: &[Plane<N>; 2],
    index: __m512i,
    high: __m512i,
    signs: __m512i,
    codes: &Bytes,
) -> [__m512i; 8] {
    // SAFETY: the caller's processor.
    unsafe {
        let halves = [
            look_up(&planes[0], index, high),
            look_up(&planes[1], index, high),
        ];
        let codes = codes.load();
        let mut q = [codes; 8];
        for (i, q) in q.iter_mut().enumerate() {
            let level = _mm512_multishift_epi64_epi8(TWO_BITS[i].load(), halves[i % 2]);
            let sign = _mm512_multishift_epi64_epi8(SIGNS_AT_2[i].load(), signs);
            *q = _mm512_permutexvar_epi8(join(3, level, sign), codes);
        }
        q
    }
}

impl GridWords for __m512i {
    const OFFSET_BITS: Option<usize> = Some(OFFSET_BITS);

    #[inline(always)]
    unsafe fn spread(self, from: &'static Spread) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_multishift_epi64_epi8(from.bytes.load(), self) }
    }

    #[inline(always)]
    unsafe fn even_signs(self) -> Self {
        // SAFETY: the caller's processor.
        unsafe { _mm512_permutex2var_epi8(EVEN_SIGNS[0].load(), self, EVEN_SIGNS[1].load()) }
    }

    #[inline(always)]
    unsafe fn eights<const N: usize>(
        grid: &'static Grid<u64, N>,
        index: Self,
        high: Self,
        signs: Self,
    ) -> [Self; 8] {
        // SAFETY: the caller's processor.
        unsafe { two_bit_levels(&grid.planes, index, high, signs, &IQ2_CODES) }
    }

    #[inline(always)]
    unsafe fn ones(index: Self, high: Self, signs: Self) -> [Self; 8] {
        // SAFETY: the caller's processor.
        unsafe { two_bit_levels(&IQ1_GRID.planes, index, high, signs, &IQ1_CODES) }
    }

    #[inline(always)]
    unsafe fn fours<const N: usize>(
        grid: &'static Grid<u32, N>,
        index: [Self; 2],
        high: [Self; 2],
        signs: Self,
        codes: &'static Bytes,
    ) -> [Self; 8] {
        // SAFETY: the caller's processor.
        unsafe {
            let codes = codes.load();
            let mut q = [codes; 8];
            for (of_line, q) in q.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let low = look_up(&grid.planes[0], index[of_line], high[of_line]);
                let other = look_up(&grid.planes[1], index[of_line], high[of_line]);
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
}

/// Four indices of each of 8 rows.
#[repr(align(32))]
struct Indices([[u16; 4]; 8]);

/// Writes the indices of a line out, `N` of them being in the grid.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn indices<const N: usize>(index: __m256i, high: __m256i) -> Indices {
    // SAFETY: the caller's processor; 64 bytes are written.
    unsafe {
        let high = if N == 256 {
            _mm256_setzero_si256()
        } else {
            _mm256_and_si256(high, _mm256_set1_epi8((N / 256 - 1) as i8))
        };
        let (a, b) = (
            _mm256_unpacklo_epi8(index, high),
            _mm256_unpackhi_epi8(index, high),
        );
        let mut out = Indices([[0; 4]; 8]);
        let to = out.0.as_mut_ptr().cast::<__m256i>();
        to.write(_mm256_permute2x128_si256::<0x20>(a, b));
        to.add(1).write(_mm256_permute2x128_si256::<0x31>(a, b));
        out
    }
}

/// Gives magnitudes the signs of four bits of each row: those of register `i`.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn signed(magnitudes: __m256i, signs: __m256i, i: usize) -> __m256i {
    // SAFETY: the caller's processor.
    unsafe {
        // In each word, the byte that has the signs of these values, four times.
        let byte = i as i32 / 2;
        let each = [0, 4, 8, 12].map(|first| 0x0101_0101 * (first + byte));
        let bits = [0x0804_0201, 0x8040_2010_u32 as i32][i % 2];
        let bits = _mm256_set1_epi32(bits);
        let set = _mm256_and_si256(signs.shuffle(__m256i::quads(each)), bits);
        // -1 where the bit is set, else 1.
        let sign = _mm256_or_si256(_mm256_cmpeq_epi8(set, bits), _mm256_set1_epi8(1));
        _mm256_sign_epi8(magnitudes, sign)
    }
}

/// Returns the entries of a run's four grid indices per row, 4 values of each row in a register.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn entries<const N: usize>(
    grid: &'static Grid<u64, N>,
    index: __m256i,
    high: __m256i,
) -> [__m256i; 8] {
    // SAFETY: the caller's processor; an index is one of the grid.
    unsafe {
        let indices = indices::<N>(index, high);
        let mut q = [_mm256_setzero_si256(); 8];
        for (k, q) in q.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let mut two = [_mm_setzero_si128(); 4];
            for (i, two) in two.iter_mut().enumerate() {
                let at = |row: usize| grid.entries.as_ptr().add(usize::from(indices.0[row][k]));
                let first = _mm_loadl_epi64(at(2 * i).cast());
                let both = _mm_loadh_pd(_mm_castsi128_pd(first), at(2 * i + 1).cast());
                *two = _mm_castpd_si128(both);
            }
            let x = _mm256_castsi256_ps(_mm256_set_m128i(two[2], two[0]));
            let y = _mm256_castsi256_ps(_mm256_set_m128i(two[3], two[1]));
            *q = [
                _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(x, y)),
                _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(x, y)),
            ];
        }
        q
    }
}

impl GridWords for __m256i {
    const OFFSET_BITS: Option<usize> = Some(7);

    #[inline(always)]
    unsafe fn spread(self, from: &'static Spread) -> Self {
        // SAFETY: the caller's processor.
        unsafe {
            let bits = self.right(from.first);
            let mask = (1 << from.step) - 1;
            let mut bytes = bits.and(Self::all(mask));
            for j in 1..4 {
                let moved = bits.left(j * (8 - from.step));
                bytes = bytes.or_and(moved, Self::all(mask << (8 * j)));
            }
            bytes
        }
    }

    #[inline(always)]
    unsafe fn even_signs(self) -> Self {
        // SAFETY: the caller's processor.
        unsafe {
            let seven = self.and(Self::bytes(0x7f));
            let folded = _mm256_xor_si256(seven, seven.right(4)).and(Self::bytes(15));
            // The eighth bit by the parity of four.
            let odd = Self::quads([
                0x0080_8000,
                0x8000_0080_u32 as i32,
                0x8000_0080_u32 as i32,
                0x0080_8000,
            ]);
            _mm256_or_si256(seven, odd.shuffle(folded))
        }
    }

    #[inline(always)]
    unsafe fn eights<const N: usize>(
        grid: &'static Grid<u64, N>,
        index: Self,
        high: Self,
        signs: Self,
    ) -> [Self; 8] {
        // SAFETY: the caller's processor.
        unsafe {
            let mut q = entries(grid, index, high);
            for (i, q) in q.iter_mut().enumerate() {
                *q = signed(*q, signs, i);
            }
            q
        }
    }

    #[inline(always)]
    unsafe fn ones(index: Self, high: Self, signs: Self) -> [Self; 8] {
        // SAFETY: the caller's processor.
        unsafe {
            let mut q = entries(&IQ1_GRID, index, high);
            for (i, q) in q.iter_mut().enumerate() {
                *q = _mm256_add_epi8(*q, signed(Self::bytes(1), signs, i));
            }
            q
        }
    }

    #[inline(always)]
    unsafe fn fours<const N: usize>(
        grid: &'static Grid<u32, N>,
        index: [Self; 2],
        high: [Self; 2],
        signs: Self,
        _codes: &'static Bytes,
    ) -> [Self; 8] {
        // SAFETY: the caller's processor; an index is one of the grid.
        unsafe {
            let mut q = [Self::all(0); 8];
            for (of_line, q) in q.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let indices = indices::<N>(index[of_line], high[of_line]);
                for (k, q) in q.iter_mut().enumerate() {
                    let mut words = [0; 8];
                    for (word, index) in words.iter_mut().zip(&indices.0) {
                        *word = *grid.entries.get_unchecked(usize::from(index[k])) as i32;
                    }
                    let [a, b, c, d, e, f, g, h] = words;
                    let magnitudes = _mm256_setr_epi32(a, b, c, d, e, f, g, h);
                    *q = signed(magnitudes, signs, 4 * of_line + k);
                }
            }
            q
        }
    }
}

/// Returns four bits of each word as a float: `(bits + 0.5) * factor`.
///
/// # Safety
/// See [`Words`].
#[inline(always)]
unsafe fn scale<W: Words>(words: W, bit: usize, factor: W::Floats) -> W::Floats {
    // SAFETY: the caller's processor.
    unsafe { scale_of(words.right(bit).and(W::all(15)), factor) }
}

/// Returns `(code + 0.5) * factor`.
///
/// # Safety
/// See [`Words`].
#[inline(always)]
unsafe fn scale_of<W: Words>(codes: W, factor: W::Floats) -> W::Floats {
    // SAFETY: the caller's processor.
    unsafe {
        let codes = W::add_floats(codes.to_floats(), W::Floats::splat(0.5));
        W::mul(codes, factor)
    }
}

/// Returns byte `byte` of both halves of each word of `a`, then of `b`.
///
/// # Safety
/// See [`Words`].
#[inline(always)]
unsafe fn of_halves<W: Words>(a: W, b: W, byte: i32) -> W {
    // Two bytes of a word and then zeros, and the same after zeros.
    let of_a = |word: i32| 0x8080_0000_u32 as i32 | (0x0200 + 0x0101 * (4 * word + byte));
    let of_b = |word: i32| (of_a(word) << 16) | 0x8080;
    // SAFETY: the caller's processor.
    unsafe {
        let a = a.shuffle(W::quads([of_a(0), of_a(1), of_a(2), of_a(3)]));
        let b = b.shuffle(W::quads([of_b(0), of_b(1), of_b(2), of_b(3)]));
        a.or_and(b, W::all(-1))
    }
}

/// Declares a format: the factor of a block, and a run of 32 values by its number `$j`, the block's
/// lines and the factor.
macro_rules! grid {
    // The factor comes first in a block, to be multiplied by `$times`.
    (
        $(#[$doc:meta])* $name:ident, $max:expr, $fine:expr, $times:literal,
        |$j:ident, $lines:ident, $factor:ident| $body:expr
    ) => {
        grid!(
            $(#[$doc])* $name, $max, $fine,
            |lines, rest| W::mul(W::load_halves(rest), W::Floats::splat($times)),
            |$j, $lines, $factor| $body
        );
    };
    (
        $(#[$doc:meta])* $name:ident, $max:expr, $fine:expr,
        |$head:ident, $rest:ident| $make_head:expr,
        |$j:ident, $lines:ident, $factor:ident| $body:expr
    ) => {
        $(#[$doc])*
        #[allow(non_camel_case_types)]
        pub(super) struct $name;

        impl<W: GridWords> BandFormat<W> for $name {
            const TYPE: TensorType = TensorType::$name;
            const RUNS: usize = 8;
            const SCALE_PER_16: bool = $fine;
            const MAX_CODE: usize = $max;
            const SIGNED: bool = true;
            const OFFSET_BITS: Option<usize> = W::OFFSET_BITS;
            const NEEDS_VBMI: bool = true;
            const HAS_TILES: bool = false;
            type Head = W::Floats;

            #[inline(always)]
            unsafe fn head($head: *const u8, $rest: *const u8) -> W::Floats {
                let _ = ($head, $rest);
                // SAFETY: the caller's block and processor.
                unsafe { $make_head }
            }

            #[inline(always)]
            unsafe fn run<const $j: usize>($lines: *const u8, $factor: W::Floats) -> Run<W> {
                // SAFETY: everything read lies within the caller's block.
                let (q, scale) = unsafe { $body };
                // SAFETY: the caller's processor.
                let min = [unsafe { W::Floats::splat(0.0) }; 2];
                Run { q, scale, min }
            }
        }
    };
}

grid!(
    /// Per 32 values four indices, and a word of four times seven sign bits and a scale.
    IQ2_XXS, 43, false, 0.25,
    |J, lines, factor| {
        let (index, word): (W, W) = (line(lines, 2 * J), line(lines, 2 * J + 1));
        let signs = word.spread(&SEVENS).even_signs();
        (W::eights(&IQ2_XXS_GRID, index, index, signs), [scale(word, 28, factor); 2])
    }
);

grid!(
    /// 64 bytes of words of an index of 9 bits and seven sign bits, 8 bytes of two scales each.
    IQ2_XS, 43, true, 0.25,
    |J, lines, factor| {
        let (a, b): (W, W) = (line(lines, 2 * J), line(lines, 2 * J + 1));
        let (index, high) = (of_halves(a, b, 0), of_halves(a, b, 1));
        let words: W = line(lines, 16 + J / 4);
        let scales = [scale(words, J % 4 * 8, factor), scale(words, J % 4 * 8 + 4, factor)];
        (W::eights(&IQ2_XS_GRID, index, high, high.right(1).even_signs()), scales)
    }
);

grid!(
    /// 32 bytes of indices, 32 bytes of signs, 8 bytes of two more bits per index, 8 bytes of two
    /// scales each.
    IQ2_S, 43, true, 0.25,
    |J, lines, factor| {
        let (index, signs): (W, W) = (line(lines, J), line(lines, 8 + J));
        let high = line::<W>(lines, 16 + J / 4).spread(&PAIRS[J % 4]);
        let words: W = line(lines, 18 + J / 4);
        let scales = [scale(words, J % 4 * 8, factor), scale(words, J % 4 * 8 + 4, factor)];
        (W::eights(&IQ2_S_GRID, index, high, signs), scales)
    }
);

grid!(
    /// 64 bytes of indices, then a word as that of IQ2_XXS per 32 values.
    IQ3_XXS, 62, false, 0.5,
    |J, lines, factor| {
        let index = [line(lines, 2 * J), line(lines, 2 * J + 1)];
        let word: W = line(lines, 16 + J);
        let signs = word.spread(&SEVENS).even_signs();
        let q = W::fours(&IQ3_XXS_GRID, index, index, signs, &IQ3_XXS_CODES);
        (q, [scale(word, 28, factor); 2])
    }
);

grid!(
    /// 64 bytes of indices, 8 bytes of a ninth bit per index, 32 bytes of signs, 4 bytes of two
    /// scales each, of which a half is taken for `2 s + 1`.
    IQ3_S, 15, false, 2.0,
    |J, lines, factor| {
        let index = [line(lines, 2 * J), line(lines, 2 * J + 1)];
        let ninths: W = line(lines, 16 + J / 4);
        let high = [
            ninths.spread(&SINGLES[2 * (J % 4)]),
            ninths.spread(&SINGLES[2 * (J % 4) + 1]),
        ];
        let q = W::fours(&IQ3_S_GRID, index, high, line(lines, 18 + J), &IQ3_S_CODES);
        (q, [scale(line::<W>(lines, 26), 4 * J, factor); 2])
    }
);

grid!(
    /// 32 bytes of indices, then two bytes per 32 values: three more bits per index, a scale, and the
    /// sign of the eighth that is added to each value.
    IQ1_S, 9, false, 0.25,
    |J, lines, factor| {
        let words: W = line(lines, 8 + J / 2);
        let high = words.spread(&THREES[J % 2]);
        let signs = words.left(16 - 16 * (J % 2)).right_signed(31);
        let code = words.right(16 * (J % 2) + 12).and(W::all(7));
        (W::ones(line(lines, J), high, signs), [scale_of(code, factor); 2])
    }
);

grid!(
    /// 32 bytes of indices, then half a byte per index: three more bits, and the sign of the eighth;
    /// then four words of 16 bits of four scales and four bits of the factor each.
    IQ1_M, 9, true,
    |lines, rest| {
        let (a, b): (W, W) = (line(lines, 12), line(lines, 13));
        let low = a.right(12).and(W::all(0xf)).or_and(a.right(24), W::all(0xf0));
        let d = low.or_and(b.right(4), W::all(0xf00)).or_and(b.right(16), W::all(0xf000));
        W::mul(d.two_halves()[0], W::Floats::splat(0.25))
    },
    |J, lines, factor| {
        let high = line::<W>(lines, 8 + J / 2).spread(&NIBBLES[J % 2]);
        // The fourth bit of each byte, eight times.
        let mut signs = high.right(3).and(W::bytes(1));
        for bits in [1, 2, 4] {
            signs = signs.or_and(signs.left(bits), W::all(-1));
        }
        let scales = line::<W>(lines, 12 + J / 4).right(J / 2 % 2 * 16 + J % 2 * 6);
        let scales = [scales.and(W::all(7)), scales.right(3).and(W::all(7))];
        let q = W::ones(line(lines, J), high, signs);
        (q, [scale_of(scales[0], factor), scale_of(scales[1], factor)])
    }
);
