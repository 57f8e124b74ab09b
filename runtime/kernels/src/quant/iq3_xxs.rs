//! IQ3_XXS: 256 values, a scale per 32 and a grid index per 4. A value is
//! `d * (s + 0.5) / 2 * sign * grid`.
//!
//! `d: f16 @0, qs: [u8; 64] @2, signs_and_scales: [u32; 8] @66`. The words are those of IQ2_XXS:
//! four times 7 sign bits, and `s` in the top 4 bits.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut, u32_at};
use super::grids::{self, even_signs, with_signs};
use super::iq2_xxs::put8;

pub(crate) struct IQ3_XXS;

impl Format for IQ3_XXS {
    const TYPE: TensorType = TensorType::IQ3_XXS;
    const MAX_CODE: i32 = 62;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 98], &mut [i8; 256]) = (head(block), head_mut(q));
        let d = f16_at::<S>(block, 0);
        for run in 0..8 {
            let bits = u32_at(block, 66 + 4 * run);
            scale[2 * run..2 * run + 2].fill(d * (0.5 + (bits >> 28) as f32) * 0.5);
            for k in 0..4 {
                let at = 2 + 8 * run + 2 * k;
                let low = grids::IQ3_XXS[usize::from(block[at])];
                let high = grids::IQ3_XXS[usize::from(block[at + 1])];
                let grid = u64::from(low) | u64::from(high) << 32;
                put8(
                    &mut q[32 * run + 8 * k..],
                    with_signs(grid, even_signs(bits >> (7 * k))),
                );
            }
        }
    }
}
