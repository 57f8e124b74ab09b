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

mod avx2;
mod avx512;
mod tables;

use super::formats::{BandFormat, Run, line};
use super::words::Words;
use crate::quant::TensorType;
use crate::x86::lanes::PartialLanes;
use tables::*;

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
