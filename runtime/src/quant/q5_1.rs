//! Q5_1: 32 values; scale f16, addend f16, 32 fifth bits, 16 bytes as in Q4_0.

use super::TensorType;
use super::block::{Format, Widen, f16_at, head, head_mut, u16_at};
use super::q5_0::fifth_bit;

pub(crate) struct Q5_1;

impl Format for Q5_1 {
    const TYPE: TensorType = TensorType::Q5_1;
    const LARGEST: i32 = 31;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<W: Widen>(block: &[u8], q: &mut [i8], scale: &mut [f32], min: &mut [f32]) {
        let (block, q): (&[u8; 24], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at::<W>(block, 0));
        min.fill(-f16_at::<W>(block, 2));
        let (low, high) = (u16_at(block, 4), u16_at(block, 6));
        for i in 0..16 {
            q[i] = (block[8 + i] & 15 | fifth_bit(low, i)) as i8;
            q[i + 16] = (block[8 + i] >> 4 | fifth_bit(high, i)) as i8;
        }
    }
}
