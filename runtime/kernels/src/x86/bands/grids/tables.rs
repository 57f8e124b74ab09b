//! Grids, and where the bits of their indices and signs are.

use crate::quant::grids;
use std::arch::x86_64::{__m512i, _mm512_load_si512};

/// Binary logarithm of what codes with AVX-512 are too large by: more than any magnitude.
pub(super) const OFFSET_BITS: usize = 6;

/// 64 numbers of one byte.
#[repr(align(64))]
pub(super) struct Bytes(pub(super) [u8; 64]);

impl Bytes {
    /// Returns the numbers in a register.
    ///
    /// # Safety
    /// The processor has AVX-512.
    #[inline(always)]
    pub(super) unsafe fn load(&self) -> __m512i {
        // SAFETY: 64 aligned bytes.
        unsafe { _mm512_load_si512(self.0.as_ptr().cast()) }
    }
}

/// The first or the second byte of every entry of a grid.
#[repr(align(64))]
pub(super) struct Plane<const N: usize>(pub(super) [u8; N]);

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
pub(super) struct Grid<E: 'static, const N: usize> {
    pub(super) entries: &'static [E; N],
    pub(super) planes: [Plane<N>; 2],
}

pub(super) static IQ2_XXS_GRID: Grid<u64, 256> = Grid {
    entries: &grids::IQ2_XXS,
    planes: planes(&grids::IQ2_XXS_PACKED),
};
pub(super) static IQ2_XS_GRID: Grid<u64, 512> = Grid {
    entries: &grids::IQ2_XS,
    planes: planes(&grids::IQ2_XS_PACKED),
};
pub(super) static IQ2_S_GRID: Grid<u64, 1024> = Grid {
    entries: &grids::IQ2_S,
    planes: planes(&grids::IQ2_S_PACKED),
};
pub(super) static IQ3_XXS_GRID: Grid<u32, 256> = Grid {
    entries: &grids::IQ3_XXS,
    planes: planes(&grids::IQ3_XXS_PACKED),
};
pub(super) static IQ3_S_GRID: Grid<u32, 512> = Grid {
    entries: &grids::IQ3_S,
    planes: planes(&grids::IQ3_S_PACKED),
};
pub(super) static IQ1_GRID: Grid<u64, 2048> = Grid {
    entries: &grids::IQ1,
    planes: planes(&grids::IQ1_PACKED),
};

/// Eight sign bits by seven stored ones.
pub(super) static EVEN_SIGNS: [Bytes; 2] = {
    let mut out = [Bytes([0; 64]), Bytes([0; 64])];
    let mut i = 0;
    while i < 128 {
        out[i / 64].0[i % 64] = i as u8 | ((i.count_ones() & 1) << 7) as u8;
        i += 1;
    }
    out
};

/// Codes by the number of a level, `bits` bits, and the sign above it.
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

pub(super) static IQ2_CODES: Bytes = codes(grids::IQ2_LEVELS, 2);
pub(super) static IQ3_XXS_CODES: Bytes = codes(grids::IQ3_XXS_LEVELS, 3);
pub(super) static IQ3_S_CODES: Bytes = codes(grids::IQ3_S_LEVELS, 3);
/// Codes of IQ1 by level, -8, 0 or 8, and by the sign of the one that is added.
pub(super) static IQ1_CODES: Bytes = {
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
pub(super) static TWO_BITS: [Bytes; 8] = each_register!(|i| i / 2 * 8, 2);
/// Their signs, above the two bits.
pub(super) static SIGNS_AT_2: [Bytes; 8] = each_register!(|i| 4 * i - 2, 1);
/// Four bits per value: the first two of register `i` are in byte `i % 4` of plane 0, of the line
/// `i / 4`.
pub(super) static FOUR_BITS: [Bytes; 8] = each_register!(|i| i % 4 * 8, 4);
/// The other two, in plane 1.
pub(super) static OTHER_FOUR_BITS: [Bytes; 8] = each_register!(|i| i % 4 * 8 - 8, 4);
/// Their signs, above three bits.
pub(super) static SIGNS_AT_3: [Bytes; 8] = each_register!(|i| 4 * i - 3, 1);

/// Where the bits of the four bytes of a word are taken from: those of byte `j` begin at bit
/// `first + j * step`. What is above `step` bits is of no account.
pub(super) struct Spread {
    pub(super) first: usize,
    pub(super) step: usize,
    pub(super) bytes: Bytes,
}

const fn spread(first: usize, step: usize) -> Spread {
    Spread {
        first,
        step,
        bytes: bits_from(first as i32, step as i32),
    }
}

/// Four times seven bits.
pub(super) static SEVENS: Spread = spread(0, 7);
/// Four times two bits, of each byte of a word.
pub(super) static PAIRS: [Spread; 4] = [spread(0, 2), spread(8, 2), spread(16, 2), spread(24, 2)];
/// Four times three bits, of each half of a word.
pub(super) static THREES: [Spread; 2] = [spread(0, 3), spread(16, 3)];
/// Four times four bits, of each half of a word.
pub(super) static NIBBLES: [Spread; 2] = [spread(0, 4), spread(16, 4)];
/// Four bits, of each half of each byte of a word.
pub(super) static SINGLES: [Spread; 8] = [
    spread(0, 1),
    spread(4, 1),
    spread(8, 1),
    spread(12, 1),
    spread(16, 1),
    spread(20, 1),
    spread(24, 1),
    spread(28, 1),
];
