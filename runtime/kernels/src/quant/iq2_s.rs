//! IQ2_S: 256 values, a scale per 16 and a grid index per 8. A value is
//! `d * (s + 0.5) / 4 * sign * grid`.
//!
//! `d: f16 @0, qs: [u8; 32] @2, signs: [u8; 32] @34, qh: [u8; 8] @66, scales: [u8; 8] @74`. A grid
//! index has 8 bits in `qs` and 2 in `qh`.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};
use super::grids::{self, with_signs};
use super::iq2_xs::iq2_scales;
use super::iq2_xxs::put8;

pub(crate) struct IQ2_S;

impl Format for IQ2_S {
    const TYPE: TensorType = TensorType::IQ2_S;
    const MAX_CODE: i32 = 43;
    const SIGNED: bool = true;
    const SCALE_PER_16: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 82], &mut [i8; 256]) = (head(block), head_mut(q));
        iq2_scales(f16_at::<S>(block, 0), head(&block[74..]), head_mut(scale));
        for k in 0..32 {
            let high = usize::from(block[66 + k / 4] >> (2 * (k % 4)) & 3);
            let grid = grids::IQ2_S[usize::from(block[2 + k]) | high << 8];
            put8(
                &mut q[8 * k..],
                with_signs(grid, usize::from(block[34 + k])),
            );
        }
    }
}
