//! IQ2_XXS: 256 values, a scale per 32 and a grid index per 8. A value is
//! `d * (s + 0.5) / 4 * sign * grid`.
//!
//! `d: f16 @0`, then per 32 values 8 bytes: four grid indices of 8 bits and a `u32` of four times 7
//! sign bits with `s` in its top 4 bits. The eighth sign makes the number of minus signs even.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut, u32_at};
use super::grids::{self, even_signs, with_signs};

pub(crate) struct IQ2_XXS;

impl Format for IQ2_XXS {
    const TYPE: TensorType = TensorType::IQ2_XXS;
    const MAX_CODE: i32 = 43;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 66], &mut [i8; 256]) = (head(block), head_mut(q));
        let d = f16_at::<S>(block, 0);
        for run in 0..8 {
            let at = 2 + 8 * run;
            let bits = u32_at(block, at + 4);
            scale[2 * run..2 * run + 2].fill(d * (0.5 + (bits >> 28) as f32) * 0.25);
            for k in 0..4 {
                let grid = grids::IQ2_XXS[usize::from(block[at + k])];
                put8(
                    &mut q[32 * run + 8 * k..],
                    with_signs(grid, even_signs(bits >> (7 * k))),
                );
            }
        }
    }
}

/// Writes the eight bytes of `values`, the lowest first.
#[inline(always)]
pub(super) fn put8(q: &mut [i8], values: u64) {
    *head_mut::<8, i8>(q) = values.to_le_bytes().map(|b| b as i8);
}
