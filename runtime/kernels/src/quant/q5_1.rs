//! Q5_1: 32 values; scale f16, addend f16, 32 fifth bits, 16 bytes as in Q4_0.

use super::TensorType;
use super::block::{Format, Steps, f16_at, head, head_mut, u32_at};

pub(crate) struct Q5_1;

impl Format for Q5_1 {
    const TYPE: TensorType = TensorType::Q5_1;
    const LARGEST: i32 = 31;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<S: Steps>(block: &[u8], q: &mut [i8], scale: &mut [f32], min: &mut [f32]) {
        let (block, q): (&[u8; 24], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 0));
        min.fill(-f16_at::<S>(block, 2));
        *q = S::five_bits(head(&block[8..]), u32_at(block, 4), 0);
    }
}
