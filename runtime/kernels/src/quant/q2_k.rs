//! Q2_K: 256 values of 2 bits, a scale and a minimum per 16. Code `c` stands for
//! `d * s * c - dmin * m`.
//!
//! `scales: [u8; 16] @0, qs: [u8; 64] @16, d: f16 @80, dmin: f16 @82`. The low half of a byte of
//! `scales` is `s`, the high half `m`. Each 32 bytes of `qs` hold four runs of 32 codes, the lowest
//! two bits first.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};

pub(crate) struct Q2_K;

impl Format for Q2_K {
    const TYPE: TensorType = TensorType::Q2_K;
    const MAX_CODE: i32 = 3;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;
    const SCALE_PER_16: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], min: &mut [f32]) {
        let (block, q): (&[u8; 84], &mut [i8; 256]) = (head(block), head_mut(q));
        let (d, dmin) = (f16_at::<S>(block, 80), f16_at::<S>(block, 82));
        for i in 0..16 {
            scale[i] = d * f32::from(block[i] & 15);
            min[i] = dmin * f32::from(block[i] >> 4);
        }
        for half in 0..2 {
            let bytes: &[u8; 32] = head(&block[16 + 32 * half..]);
            for run in 0..4 {
                for i in 0..32 {
                    q[128 * half + 32 * run + i] = (bytes[i] >> (2 * run) & 3) as i8;
                }
            }
        }
    }
}
