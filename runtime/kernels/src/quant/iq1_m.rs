//! IQ1_M: 256 values; a byte of grid number for each 8 values, 4 bits for each 8 values (three more grid bits and the
//! sign of an offset of an eighth), then four u16: sixteen 3-bit scales, and an f16 in the four bits left of each.

use super::TensorType;
use super::block::{Format, Steps, head, head_mut, u16_at};
use super::grids;
use super::iq1_s::with_offset;
use super::iq2_xxs::put8;

pub(crate) struct IQ1_M;

impl Format for IQ1_M {
    const TYPE: TensorType = TensorType::IQ1_M;
    const LARGEST: i32 = 9;
    const SIGNED: bool = true;
    const FINE: bool = true;

    #[inline(always)]
    fn unpack<S: Steps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 56], &mut [i8; 256]) = (head(block), head_mut(q));
        let words: [u16; 4] = std::array::from_fn(|i| u16_at(block, 48 + 2 * i));
        let d = S::f16(words[0] >> 12 | words[1] >> 12 << 4 | words[2] >> 12 << 8 | words[3] >> 12 << 12);
        for i in 0..16 {
            scale[i] = d * f32::from(2 * (words[i / 4] >> (3 * (i % 4)) & 7) + 1) * 0.125;
        }
        for k in 0..32 {
            let bits = block[32 + k / 2] >> (4 * (k % 2));
            let grid = grids::IQ1[usize::from(block[k]) | usize::from(bits & 7) << 8];
            put8(&mut q[8 * k..], with_offset(grid, bits & 8 != 0));
        }
    }
}
