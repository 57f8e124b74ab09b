//! Q8_0: 32 values of 8 bits. Code `c` stands for `d * c`.
//!
//! `d: f16 @0, qs: [i8; 32] @2`.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};

pub(crate) struct Q8_0;

impl Format for Q8_0 {
    const TYPE: TensorType = TensorType::Q8_0;
    const MAX_CODE: i32 = 128;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 34], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 0));
        for i in 0..32 {
            q[i] = block[2 + i] as i8;
        }
    }
}
