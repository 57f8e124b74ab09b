//! Q5_K: 256 values of 5 bits, a scale and a minimum per 32. Code `c` stands for
//! `d * s * c - dmin * m`.
//!
//! `d: f16 @0, dmin: f16 @2, scales: [u8; 12] @4, qh: [u8; 32] @16, qs: [u8; 128] @48`. Bit `k` of
//! byte `i` of `qh` is the fifth bit of value `32 k + i`; all else is packed as in Q4_K.

use super::TensorType;
use super::block::{Format, UnpackOps, head, head_mut};
use super::q4_k::k_scales;

pub(crate) struct Q5_K;

impl Format for Q5_K {
    const TYPE: TensorType = TensorType::Q5_K;
    const MAX_CODE: i32 = 31;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], min: &mut [f32]) {
        let (block, q): (&[u8; 176], &mut [i8; 256]) = (head(block), head_mut(q));
        k_scales::<S>(block, head_mut(scale), head_mut(min));
        let fifth: &[u8; 32] = head(&block[16..]);
        for pair in 0..4 {
            let bytes: &[u8; 32] = head(&block[48 + 32 * pair..]);
            for i in 0..32 {
                q[64 * pair + i] = (bytes[i] & 15 | (fifth[i] >> (2 * pair) & 1) << 4) as i8;
                q[64 * pair + 32 + i] =
                    (bytes[i] >> 4 | (fifth[i] >> (2 * pair + 1) & 1) << 4) as i8;
            }
        }
    }
}
