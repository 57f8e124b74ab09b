//! Registers of a band: [`Words`], which AVX-512 implements for all 16 rows, AVX2 for 8 of them.
//!
//! Unpacking, scaling and the loop over runs are written once over `Words`. What differs between
//! the instruction sets is here: the instructions, and the way to the integer products.
//!
//! # Products with AVX2
//!
//! AVX-512 has `dpbusd`, which adds four products of bytes to 32 bits. AVX2 has `maddubs`, which
//! adds two products in 16 bits, saturating. Activations are within -127 to 127, so a sum of two is
//! at most `2 * 127 * MAX_CODE`, and as many of them are added in 16 bits as fit (`chain`). The
//! integers are the same, so a band has the same bits with both instruction sets.
//!
//! | largest code | sums in 16 bits | formats |
//! |---|---|---|
//! | 15 | 8 | Q4_0, Q4_1, Q4_K, IQ3_S; of a scale per 16 values, 4: Q2_K, Q3_K |
//! | 31 | 4 | Q5_0, Q5_1, Q5_K, MXFP4 |
//! | 63 | 2 | Q6_K, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS |
//! | 128 | 1 | Q8_0, IQ4_NL, IQ4_XS |
//!
//! `maddubs` needs one unsigned operand. A negative code moves its sign to the activation, whose
//! negative always fits, since it is never -128.

mod avx2;
mod avx512;

use super::Band;
use super::formats::{BandFormat, Run};
use super::kernel::Pass;
use crate::activations::{ActBlock, OFFSET_BITS, RUN_OFFSET_BITS};
use crate::bands::{BAND_ROWS, BandLayout};
use crate::panel::Panel;
use crate::x86::lanes::PartialLanes;
use std::cmp::Ordering;

/// A register of words, one of each of [`ROWS`](Self::ROWS) rows.
///
/// # Safety of all functions
/// The caller is compiled for the register's instruction set, and the processor has it. Whatever is
/// read lies within the caller's block.
pub(super) trait Words: Copy {
    /// A float per row.
    type Floats: PartialLanes;
    /// Something for each register of a word of a band.
    type OfBand<T: Copy>: AsRef<[T]> + AsMut<[T]>;
    /// Rows per register: a divisor of the rows of a band.
    const ROWS: usize;
    /// Whether products of codes up to 255 are exact; otherwise codes stay below what their format
    /// says.
    const WIDE_CODES: bool;

    /// Whether a kernel takes fewer than its `N` tokens as fast: its sums are in memory anyhow.
    const TAKES_FEWER: bool;

    /// Returns the same for each register of a word of a band.
    fn of_band<T: Copy>(value: T) -> Self::OfBand<T>;

    /// Loads a word of each row.
    unsafe fn load(p: *const u8) -> Self;

    /// Loads a 16-bit float of each row and widens it.
    unsafe fn load_halves(p: *const u8) -> Self::Floats;

    /// Loads an exponent of each row: half of that power of two.
    unsafe fn load_exponents(p: *const u8) -> Self::Floats;

    /// Widens the low and the high half of each word.
    unsafe fn two_halves(self) -> [Self::Floats; 2];

    /// Returns one value in every word.
    unsafe fn all(value: i32) -> Self;

    /// Returns one value in every byte.
    #[inline(always)]
    unsafe fn bytes(value: u8) -> Self {
        // SAFETY: the caller's processor.
        unsafe { Self::all(i32::from_ne_bytes([value; 4])) }
    }

    /// Returns the four words again and again.
    unsafe fn quads(words: [i32; 4]) -> Self;

    /// Returns `self & other`.
    unsafe fn and(self, other: Self) -> Self;

    /// Returns `self | other & mask`.
    unsafe fn or_and(self, other: Self, mask: Self) -> Self;

    /// Adds words.
    unsafe fn add(self, other: Self) -> Self;

    /// Shifts every word to the left.
    unsafe fn left(self, bits: usize) -> Self;

    /// Shifts every word to the right; zeros come in.
    unsafe fn right(self, bits: usize) -> Self;

    /// Shifts every word to the right; signs come in.
    unsafe fn right_signed(self, bits: usize) -> Self;

    /// Returns the bytes that the low halves of `index` name, of those of the same 16.
    unsafe fn shuffle(self, index: Self) -> Self;

    /// Adds the byte `value` to each byte of which `bits` and `mask` have a bit in common; `mask`
    /// has one bit per byte, and `value` none that `self` has.
    unsafe fn add_where(self, bits: Self, mask: Self, value: u8) -> Self;

    /// Makes what the products take of signed codes: 128 too large, or as they are.
    unsafe fn signed(self) -> Self;

    /// Converts words to floats.
    unsafe fn to_floats(self) -> Self::Floats;

    /// Multiplies floats.
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;

    /// Adds floats.
    unsafe fn add_floats(a: Self::Floats, b: Self::Floats) -> Self::Floats;

    /// Returns `c - a * b`, rounded once.
    unsafe fn neg_mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;

    /// Returns the products of run `j` of a block of activations: of its first and its second 16
    /// values where the format has scales for both, else of all in the first. `N` tokens are
    /// multiplied with the run.
    unsafe fn dots<F: BandFormat<Self>, const N: usize>(
        run: &Run<Self>,
        x: &ActBlock,
        j: usize,
    ) -> [Self; 2];

    /// Multiplies a band with the tokens of a pass, at most `N`: [`multiply`](super::kernel::multiply), compiled for
    /// the instruction set.
    unsafe fn multiply<F: BandFormat<Self>, const N: usize>(
        panel: &Panel<'_>,
        band: &Band,
        pass: Pass,
    );

    /// Multiplies rows that are not interleaved with one token: [`multiply_rows`](super::kernel::multiply_rows),
    /// compiled for the instruction set.
    unsafe fn multiply_rows<F: BandFormat<Self>>(panel: &Panel<'_>, band: &Band);

    /// Writes up to four lines: of every row, the `n` words from `at` on.
    unsafe fn write_lines(rows: &[*const u8; BAND_ROWS], at: usize, n: usize, to: *mut u8);

    /// Interleaves up to 16 rows.
    unsafe fn interleave(
        layout: BandLayout,
        row_bytes: usize,
        rows: &[u8],
        n_rows: usize,
        band: &mut [u8],
    );
}

/// Returns where the words of run `j` of a block of activations are, and how far apart: word `i` is
/// at `i / 2 * 16 + i % 2`.
///
/// # Safety
/// The block can be read.
#[inline(always)]
unsafe fn word(x: &ActBlock, j: usize, i: usize) -> i32 {
    let words = x.q.as_ptr().cast::<i32>();
    // SAFETY: a block has 64 words, aligned as it is.
    unsafe { words.add(2 * j + i / 2 * 16 + i % 2).read() }
}

/// Returns what takes the offset of the codes off the products of run `j`: for both halves of it,
/// or for all of it and zero.
///
/// # Safety
/// As [`Words`].
#[inline(always)]
pub(super) unsafe fn offsets<W: Words, F: BandFormat<W>>(x: &ActBlock, j: usize) -> [W; 2] {
    // SAFETY: the caller's processor.
    unsafe {
        let zero = W::all(0);
        match F::OFFSET_BITS {
            None => [zero; 2],
            // Not by `map`, whose closure would be a call: it has no target features.
            Some(bits) if F::SCALE_PER_16 => [
                scaled_offset(x.offsets[2 * j], OFFSET_BITS, bits),
                scaled_offset(x.offsets[2 * j + 1], OFFSET_BITS, bits),
            ],
            Some(bits) => [scaled_offset(x.run_offsets[j], RUN_OFFSET_BITS, bits), zero],
        }
    }
}

/// Returns what was multiplied by the offset of `from` bits for that of `to` bits. Nothing is to be
/// done for the common formats, whose loads then need no arithmetic.
///
/// # Safety
/// As [`Words`].
#[inline(always)]
unsafe fn scaled_offset<W: Words>(offset: i32, from: usize, to: usize) -> W {
    // SAFETY: the caller's processor.
    unsafe {
        let offset = W::all(offset);
        match to.cmp(&from) {
            Ordering::Less => offset.right_signed(from - to),
            Ordering::Equal => offset,
            Ordering::Greater => offset.left(to - from),
        }
    }
}
