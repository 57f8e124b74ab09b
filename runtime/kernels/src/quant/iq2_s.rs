//! IQ2_S: 256 values; an f16, for each 8 values a byte of grid number, 32 bytes of signs, 8 bytes of two more grid bits
//! for each 8 values, then a 4-bit scale for each 16.

use super::TensorType;
use super::block::{Format, Steps, f16_at, head, head_mut};
use super::grids::{self, with_signs};
use super::iq2_xs::iq2_scales;
use super::iq2_xxs::put8;

pub(crate) struct IQ2_S;

impl Format for IQ2_S {
    const TYPE: TensorType = TensorType::IQ2_S;
    const LARGEST: i32 = 43;
    const SIGNED: bool = true;
    const FINE: bool = true;

    #[inline(always)]
    fn unpack<S: Steps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 82], &mut [i8; 256]) = (head(block), head_mut(q));
        iq2_scales(f16_at::<S>(block, 0), head(&block[74..]), head_mut(scale));
        for k in 0..32 {
            let high = usize::from(block[66 + k / 4] >> (2 * (k % 4)) & 3);
            let grid = grids::IQ2_S[usize::from(block[2 + k]) | high << 8];
            put8(&mut q[8 * k..], with_signs(grid, usize::from(block[34 + k])));
        }
    }
}
