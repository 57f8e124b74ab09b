//! TQ2_0: 256 values of 2 bits. Code `c` stands for `d * (c - 1)`; quantizers write codes 0 to 2.
//!
//! `qs: [u8; 64] @0, d: f16 @64`. Codes are packed as in Q2_K.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};

pub(crate) struct TQ2_0;

impl Format for TQ2_0 {
    const TYPE: TensorType = TensorType::TQ2_0;
    const MAX_CODE: i32 = 2;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 66], &mut [i8; 256]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 64));
        for half in 0..2 {
            let bytes: &[u8; 32] = head(&block[32 * half..]);
            for run in 0..4 {
                for i in 0..32 {
                    q[128 * half + 32 * run + i] = (bytes[i] >> (2 * run) & 3) as i8 - 1;
                }
            }
        }
    }
}
