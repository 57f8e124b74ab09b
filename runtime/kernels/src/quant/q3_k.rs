//! Q3_K: 256 values of 3 bits, a scale per 16. Code `c` stands for `d * (s - 32) * (c - 4)`.
//!
//! `hmask: [u8; 32] @0, qs: [u8; 64] @32, scales: [u8; 12] @96, d: f16 @108`. Bit `k` of byte `i`
//! of `hmask` is the third bit of value `32 k + i`. The low two bits are packed as in Q2_K, the
//! sixteen 6-bit scales by [`q3_scales`](super::block::q3_scales).

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut, q3_scales};

pub(crate) struct Q3_K;

impl Format for Q3_K {
    const TYPE: TensorType = TensorType::Q3_K;
    const MAX_CODE: i32 = 4;
    const SIGNED: bool = true;
    const SCALE_PER_16: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 110], &mut [i8; 256]) = (head(block), head_mut(q));
        let d = f16_at::<S>(block, 108);
        for (to, s) in scale.iter_mut().zip(q3_scales(&block[96..])) {
            *to = d * (f32::from(s) - 32.0);
        }
        let third: &[u8; 32] = head(block);
        for half in 0..2 {
            let bytes: &[u8; 32] = head(&block[32 + 32 * half..]);
            for run in 0..4 {
                for i in 0..32 {
                    let low = bytes[i] >> (2 * run) & 3;
                    let high = third[i] >> (4 * half + run) & 1;
                    q[128 * half + 32 * run + i] = (low | high << 2) as i8 - 4;
                }
            }
        }
    }
}
