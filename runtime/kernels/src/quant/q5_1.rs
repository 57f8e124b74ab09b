//! Q5_1: 32 values of 5 bits. Code `c` stands for `d * c + m`.
//!
//! `d: f16 @0, m: f16 @2, qh: u32 @4, qs: [u8; 16] @8`. Codes are packed as in Q5_0.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut, u32_at};

pub(crate) struct Q5_1;

impl Format for Q5_1 {
    const TYPE: TensorType = TensorType::Q5_1;
    const MAX_CODE: i32 = 31;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], min: &mut [f32]) {
        let (block, q): (&[u8; 24], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 0));
        min.fill(-f16_at::<S>(block, 2));
        *q = S::five_bits(head(&block[8..]), u32_at(block, 4), 0);
    }
}
