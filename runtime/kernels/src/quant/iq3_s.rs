//! IQ3_S: 256 values, a scale per 32 and a grid index per 4. A value is
//! `d * (2 s + 1) * sign * grid`.
//!
//! `d: f16 @0, qs: [u8; 64] @2, qh: [u8; 8] @66, signs: [u8; 32] @74, scales: [u8; 4] @106`. A grid
//! index has 8 bits in `qs` and 1 in `qh`.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};
use super::grids::{self, with_signs};
use super::iq2_xxs::put8;

pub(crate) struct IQ3_S;

impl Format for IQ3_S {
    const TYPE: TensorType = TensorType::IQ3_S;
    const MAX_CODE: i32 = 15;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 110], &mut [i8; 256]) = (head(block), head_mut(q));
        let d = f16_at::<S>(block, 0);
        for run in 0..8 {
            let s = block[106 + run / 2] >> (4 * (run % 2)) & 15;
            scale[2 * run..2 * run + 2].fill(d * f32::from(1 + 2 * s));
            let ninth = usize::from(block[66 + run]);
            for k in 0..4 {
                let at = 2 + 8 * run + 2 * k;
                let low = grids::IQ3_S[usize::from(block[at]) | (ninth >> (2 * k) & 1) << 8];
                let high =
                    grids::IQ3_S[usize::from(block[at + 1]) | (ninth >> (2 * k + 1) & 1) << 8];
                let grid = u64::from(low) | u64::from(high) << 32;
                put8(
                    &mut q[32 * run + 8 * k..],
                    with_signs(grid, usize::from(block[74 + 4 * run + k])),
                );
            }
        }
    }
}
