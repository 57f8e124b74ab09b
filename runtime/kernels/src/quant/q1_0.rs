//! Q1_0: 128 values of 1 bit. Bit `b` stands for `d * (2 b - 1)`.
//!
//! `d: f16 @0, qs: [u8; 16] @2`. Bit `i % 8` of byte `i / 8` of `qs` is value `i`. Codes here are
//! eight times as large, -8 and 8, and the scale is an eighth: so they are the fifth bits of codes
//! that are otherwise zero.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut, u32_at};

pub(crate) struct Q1_0;

impl Format for Q1_0 {
    const TYPE: TensorType = TensorType::Q1_0;
    const MAX_CODE: i32 = 8;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 18], &mut [i8; 128]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 0) * 0.125);
        for run in 0..4 {
            let bits = u32_at(block, 2 + 4 * run);
            q[32 * run..][..32].copy_from_slice(&S::five_bits(&[0; 16], bits, 8));
        }
    }
}
