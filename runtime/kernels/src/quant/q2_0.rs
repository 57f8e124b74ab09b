//! Q2_0: 64 values of 2 bits. Code `c` stands for `d * (c - 1)`: -d, 0, d or 2 d.
//!
//! `d: f16 @0, qs: [u8; 16] @2`. A byte of `qs` has four neighboring codes, the lowest bits first.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};

pub(crate) struct Q2_0;

impl Format for Q2_0 {
    const TYPE: TensorType = TensorType::Q2_0;
    const MAX_CODE: i32 = 2;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 18], &mut [i8; 64]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 0));
        for i in 0..16 {
            // A byte's four codes to a byte each, in one word.
            let byte = u32::from(block[2 + i]);
            let codes = (byte | byte << 6 | byte << 12 | byte << 18) & 0x0303_0303;
            // No byte borrows from the next while its top bit is set.
            let codes = ((codes | 0x8080_8080) - 0x0101_0101) ^ 0x8080_8080;
            q[4 * i..][..4].copy_from_slice(&codes.to_le_bytes().map(|code| code as i8));
        }
    }
}
