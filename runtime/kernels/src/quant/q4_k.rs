//! Q4_K: 256 values of 4 bits, a scale and a minimum per 32. Code `c` stands for
//! `d * s * c - dmin * m`.
//!
//! `d: f16 @0, dmin: f16 @2, scales: [u8; 12] @4, qs: [u8; 128] @16`. The low halves of each 32
//! bytes of `qs` are one run of 32 codes, the high halves the next.
//! [`scales_and_mins`](super::block::scales_and_mins) unpacks `scales`.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut, scales_and_mins};

pub(crate) struct Q4_K;

impl Format for Q4_K {
    const TYPE: TensorType = TensorType::Q4_K;
    const MAX_CODE: i32 = 15;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], min: &mut [f32]) {
        let (block, q): (&[u8; 144], &mut [i8; 256]) = (head(block), head_mut(q));
        k_scales::<S>(block, head_mut(scale), head_mut(min));
        for pair in 0..4 {
            let bytes: &[u8; 32] = head(&block[16 + 32 * pair..]);
            for i in 0..32 {
                q[64 * pair + i] = (bytes[i] & 15) as i8;
                q[64 * pair + 32 + i] = (bytes[i] >> 4) as i8;
            }
        }
    }
}

/// Unpacks the scales and minimums that begin a block of Q4_K or Q5_K.
#[inline(always)]
pub(super) fn k_scales<S: UnpackOps>(block: &[u8], scale: &mut [f32; 16], min: &mut [f32; 16]) {
    let (d, dmin) = (f16_at::<S>(block, 0), f16_at::<S>(block, 2));
    let (scales, mins) = scales_and_mins(&block[4..]);
    for i in 0..16 {
        scale[i] = d * f32::from(scales[i / 2]);
        min[i] = dmin * f32::from(mins[i / 2]);
    }
}
