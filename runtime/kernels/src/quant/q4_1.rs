//! Q4_1: 32 values of 4 bits. Code `c` stands for `d * c + m`.
//!
//! `d: f16 @0, m: f16 @2, qs: [u8; 16] @4`. Codes are packed as in Q4_0.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};

pub(crate) struct Q4_1;

impl Format for Q4_1 {
    const TYPE: TensorType = TensorType::Q4_1;
    const MAX_CODE: i32 = 15;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], min: &mut [f32]) {
        let (block, q): (&[u8; 20], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 0));
        min.fill(-f16_at::<S>(block, 2));
        for i in 0..16 {
            q[i] = (block[4 + i] & 15) as i8;
            q[i + 16] = (block[4 + i] >> 4) as i8;
        }
    }
}
