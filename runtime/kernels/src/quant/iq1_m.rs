//! IQ1_M: 256 values, a scale per 16 and a grid index per 8. A value is
//! `d * (2 s + 1) * (grid + delta)`.
//!
//! `qs: [u8; 32] @0, qh: [u8; 16] @32, scales: [u16; 4] @48`. Half a byte of `qh` has 3 more bits
//! of a grid index and the sign of `delta`, which is an eighth. A word of `scales` has four times
//! `s` in 3 bits, and 4 bits of `d` (f16) on top.

use super::TensorType;
use super::block::{Format, UnpackOps, head, head_mut, u16_at};
use super::grids;
use super::iq1_s::with_offset;
use super::iq2_xxs::put8;

pub(crate) struct IQ1_M;

impl Format for IQ1_M {
    const TYPE: TensorType = TensorType::IQ1_M;
    const MAX_CODE: i32 = 9;
    const SIGNED: bool = true;
    const SCALE_PER_16: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 56], &mut [i8; 256]) = (head(block), head_mut(q));
        let words: [u16; 4] = std::array::from_fn(|i| u16_at(block, 48 + 2 * i));
        let d = S::f16(
            words[0] >> 12 | words[1] >> 12 << 4 | words[2] >> 12 << 8 | words[3] >> 12 << 12,
        );
        for i in 0..16 {
            scale[i] = d * f32::from(2 * (words[i / 4] >> (3 * (i % 4)) & 7) + 1) * 0.125;
        }
        for k in 0..32 {
            let bits = block[32 + k / 2] >> (4 * (k % 2));
            let grid = grids::IQ1[usize::from(block[k]) | usize::from(bits & 7) << 8];
            put8(&mut q[8 * k..], with_offset(grid, bits & 8 != 0));
        }
    }
}
