//! Q2_K: 256 values; 16 bytes of 4-bit scale and 4-bit minimum for each 16 values, 64 bytes of 2-bit codes, and two
//! f16 that multiply the scales and the minimums. Each 32 bytes hold four runs of 32 codes, the lowest bits first.

use super::TensorType;
use super::block::{Format, Steps, f16_at, head, head_mut};

pub(crate) struct Q2_K;

impl Format for Q2_K {
    const TYPE: TensorType = TensorType::Q2_K;
    const LARGEST: i32 = 3;
    const SIGNED: bool = false;
    const HAS_MIN: bool = true;
    const FINE: bool = true;

    #[inline(always)]
    fn unpack<S: Steps>(block: &[u8], q: &mut [i8], scale: &mut [f32], min: &mut [f32]) {
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
