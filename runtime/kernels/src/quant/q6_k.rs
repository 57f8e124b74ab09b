//! Q6_K: 256 values of 6 bits, a scale per 16. Code `c` stands for `d * s * (c - 32)`.
//!
//! `ql: [u8; 128] @0, qh: [u8; 64] @128, scales: [i8; 16] @192, d: f16 @208`. Each half of the
//! block has four runs of 32: two in the low halves of 64 bytes of `ql`, two in their high halves.
//! Two bits of `qh` go on top of each.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};

pub(crate) struct Q6_K;

impl Format for Q6_K {
    const TYPE: TensorType = TensorType::Q6_K;
    const MAX_CODE: i32 = 32;
    const SIGNED: bool = true;
    const SCALE_PER_16: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 210], &mut [i8; 256]) = (head(block), head_mut(q));
        let d = f16_at::<S>(block, 208);
        for i in 0..16 {
            scale[i] = d * f32::from(block[192 + i] as i8);
        }
        for half in 0..2 {
            let low: &[u8; 64] = head(&block[64 * half..]);
            let high: &[u8; 32] = head(&block[128 + 32 * half..]);
            let q: &mut [i8; 128] = head_mut(&mut q[128 * half..]);
            for i in 0..32 {
                q[i] = (low[i] & 15 | (high[i] & 3) << 4) as i8 - 32;
                q[i + 32] = (low[i + 32] & 15 | (high[i] >> 2 & 3) << 4) as i8 - 32;
                q[i + 64] = (low[i] >> 4 | (high[i] >> 4 & 3) << 4) as i8 - 32;
                q[i + 96] = (low[i + 32] >> 4 | (high[i] >> 6) << 4) as i8 - 32;
            }
        }
    }
}
