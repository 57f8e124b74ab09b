//! Q5_0: 32 values of 5 bits. Code `c` stands for `d * (c - 16)`.
//!
//! `d: f16 @0, qh: u32 @2, qs: [u8; 16] @6`. Bit `i` of `qh` is the fifth bit of value `i`; `qs` is
//! packed as in Q4_0.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut, u32_at};

pub(crate) struct Q5_0;

impl Format for Q5_0 {
    const TYPE: TensorType = TensorType::Q5_0;
    const MAX_CODE: i32 = 16;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 22], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 0));
        *q = S::five_bits(head(&block[6..]), u32_at(block, 2), 16);
    }
}
