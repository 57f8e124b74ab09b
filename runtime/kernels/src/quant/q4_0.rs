//! Q4_0: 32 values of 4 bits. Code `c` stands for `d * (c - 8)`.
//!
//! `d: f16 @0, qs: [u8; 16] @2`. The low halves of `qs` are values 0 to 15, the high halves values
//! 16 to 31.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};

pub(crate) struct Q4_0;

impl Format for Q4_0 {
    const TYPE: TensorType = TensorType::Q4_0;
    const MAX_CODE: i32 = 8;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 18], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 0));
        for i in 0..16 {
            q[i] = (block[2 + i] & 15) as i8 - 8;
            q[i + 16] = (block[2 + i] >> 4) as i8 - 8;
        }
    }
}
