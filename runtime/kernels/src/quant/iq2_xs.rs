//! IQ2_XS: 256 values, a scale per 16 and a grid index per 8. A value is
//! `d * (s + 0.5) / 4 * sign * grid`.
//!
//! `d: f16 @0, qs: [u16; 32] @2, scales: [u8; 8] @66`. A word of `qs` has a grid index of 9 bits
//! and 7 sign bits. A byte of `scales` has two values of `s`, the low half first.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut, u16_at};
use super::grids::{self, even_signs, with_signs};
use super::iq2_xxs::put8;

pub(crate) struct IQ2_XS;

impl Format for IQ2_XS {
    const TYPE: TensorType = TensorType::IQ2_XS;
    const MAX_CODE: i32 = 43;
    const SIGNED: bool = true;
    const SCALE_PER_16: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 74], &mut [i8; 256]) = (head(block), head_mut(q));
        iq2_scales(f16_at::<S>(block, 0), head(&block[66..]), head_mut(scale));
        for k in 0..32 {
            let word = u16_at(block, 2 + 2 * k);
            let grid = grids::IQ2_XS[usize::from(word & 511)];
            put8(
                &mut q[8 * k..],
                with_signs(grid, even_signs(u32::from(word >> 9))),
            );
        }
    }
}

/// Unpacks sixteen scales of 4 bits.
#[inline(always)]
pub(super) fn iq2_scales(d: f32, bytes: &[u8; 8], scale: &mut [f32; 16]) {
    for i in 0..8 {
        scale[2 * i] = d * (0.5 + f32::from(bytes[i] & 15)) * 0.25;
        scale[2 * i + 1] = d * (0.5 + f32::from(bytes[i] >> 4)) * 0.25;
    }
}
