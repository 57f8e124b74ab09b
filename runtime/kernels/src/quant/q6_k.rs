//! Q6_K: 256 values; 128 bytes of low 4 bits, 64 bytes of high 2 bits, 16 signed 8-bit scales and an f16 that
//! multiplies them; less 32. Each half of the block has runs of 32: low halves of 64 bytes, then their high halves.

use super::TensorType;
use super::block::{Format, Steps, f16_at, head, head_mut};

pub(crate) struct Q6_K;

impl Format for Q6_K {
    const TYPE: TensorType = TensorType::Q6_K;
    const LARGEST: i32 = 32;
    const SIGNED: bool = true;
    const FINE: bool = true;

    #[inline(always)]
    fn unpack<S: Steps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
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
