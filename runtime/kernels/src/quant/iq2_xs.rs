//! IQ2_XS: 256 values; an f16, a u16 for each 8 values (9-bit grid number, seven signs), then a 4-bit scale for each 16.

use super::TensorType;
use super::block::{Format, Steps, f16_at, head, head_mut, u16_at};
use super::grids::{self, even_signs, with_signs};
use super::iq2_xxs::put8;

pub(crate) struct IQ2_XS;

impl Format for IQ2_XS {
    const TYPE: TensorType = TensorType::IQ2_XS;
    const LARGEST: i32 = 43;
    const SIGNED: bool = true;
    const FINE: bool = true;

    #[inline(always)]
    fn unpack<S: Steps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 74], &mut [i8; 256]) = (head(block), head_mut(q));
        iq2_scales(f16_at::<S>(block, 0), head(&block[66..]), head_mut(scale));
        for k in 0..32 {
            let word = u16_at(block, 2 + 2 * k);
            let grid = grids::IQ2_XS[usize::from(word & 511)];
            put8(&mut q[8 * k..], with_signs(grid, even_signs(u32::from(word >> 9))));
        }
    }
}

/// Sixteen scales from 4 bits each.
#[inline(always)]
pub(super) fn iq2_scales(d: f32, bytes: &[u8; 8], scale: &mut [f32; 16]) {
    for i in 0..8 {
        scale[2 * i] = d * (0.5 + f32::from(bytes[i] & 15)) * 0.25;
        scale[2 * i + 1] = d * (0.5 + f32::from(bytes[i] >> 4)) * 0.25;
    }
}
