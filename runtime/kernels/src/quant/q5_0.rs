//! Q5_0: 32 values; scale f16, 32 bits that are the fifth bit of each value, 16 bytes as in Q4_0; less 16.

use super::TensorType;
use super::block::{Format, Steps, f16_at, head, head_mut, u32_at};

pub(crate) struct Q5_0;

impl Format for Q5_0 {
    const TYPE: TensorType = TensorType::Q5_0;
    const LARGEST: i32 = 16;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: Steps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 22], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 0));
        *q = S::five_bits(head(&block[6..]), u32_at(block, 2), 16);
    }
}
