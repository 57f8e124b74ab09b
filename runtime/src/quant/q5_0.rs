//! Q5_0: 32 values; scale f16, 32 bits that are the fifth bit of each value, 16 bytes as in Q4_0; less 16.

use super::TensorType;
use super::block::{Format, Widen, f16_at, head, head_mut, u16_at};

pub(crate) struct Q5_0;

impl Format for Q5_0 {
    const TYPE: TensorType = TensorType::Q5_0;
    const LARGEST: i32 = 16;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<W: Widen>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 22], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at::<W>(block, 0));
        let (low, high) = (u16_at(block, 2), u16_at(block, 4));
        for i in 0..16 {
            q[i] = (block[6 + i] & 15 | fifth_bit(low, i)) as i8 - 16;
            q[i + 16] = (block[6 + i] >> 4 | fifth_bit(high, i)) as i8 - 16;
        }
    }
}

/// 16 where bit `i` is set.
#[inline(always)]
pub(super) fn fifth_bit(bits: u16, i: usize) -> u8 {
    // Compared with a constant, not shifted by a variable: that is one instruction for sixteen of them.
    if bits & (1 << i) != 0 { 16 } else { 0 }
}
