//! Q3_K: 256 values; 32 bytes of third bits (bit `k` of byte `i` belongs to value `32 k + i`), 64 bytes of 2-bit codes
//! as in Q2_K, 12 bytes of sixteen 6-bit scales, and an f16 that multiplies them. Codes are less 4, scales less 32.

use super::TensorType;
use super::block::{Format, Steps, f16_at, head, head_mut, q3_scales};

pub(crate) struct Q3_K;

impl Format for Q3_K {
    const TYPE: TensorType = TensorType::Q3_K;
    const LARGEST: i32 = 4;
    const SIGNED: bool = true;
    const FINE: bool = true;

    #[inline(always)]
    fn unpack<S: Steps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
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
