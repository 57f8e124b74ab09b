//! IQ1_S: 256 values, a scale per 32 and a grid index per 8. A value is
//! `d * (2 s + 1) * (grid + delta)`.
//!
//! `d: f16 @0, qs: [u8; 32] @2, qh: [u16; 8] @34`. A word of `qh` has four times 3 more bits of a
//! grid index, `s` in 3 bits, and the sign of `delta`. Grid values are -1, 0 and 1, and `delta` is
//! an eighth: codes here are in eighths, so that they are whole.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut, u16_at};
use super::grids;
use super::iq2_xxs::put8;

pub(crate) struct IQ1_S;

impl Format for IQ1_S {
    const TYPE: TensorType = TensorType::IQ1_S;
    const MAX_CODE: i32 = 9;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 50], &mut [i8; 256]) = (head(block), head_mut(q));
        let d = f16_at::<S>(block, 0);
        for run in 0..8 {
            let word = u16_at(block, 34 + 2 * run);
            scale[2 * run..2 * run + 2].fill(d * f32::from(2 * (word >> 12 & 7) + 1) * 0.125);
            for k in 0..4 {
                let high = usize::from(word >> (3 * k) & 7);
                let grid = grids::IQ1[usize::from(block[2 + 4 * run + k]) | high << 8];
                put8(
                    &mut q[32 * run + 8 * k..],
                    with_offset(grid, word & 0x8000 != 0),
                );
            }
        }
    }
}

/// Adds one, or minus one, to each of eight signed bytes that are -8, 0 or 8.
#[inline(always)]
pub(super) fn with_offset(grid: u64, negative: bool) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    // With the sign bit flipped the bytes are 0x78, 0x80 or 0x88: nothing carries from one to the
    // next.
    let biased = grid ^ (0x80 * ONES);
    let moved = if negative {
        biased - ONES
    } else {
        biased + ONES
    };
    moved ^ (0x80 * ONES)
}
