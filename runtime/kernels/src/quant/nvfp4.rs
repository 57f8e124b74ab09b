//! NVFP4: 64 values that are 4-bit floats (E2M1), with an 8-bit float per 16 of them.
//!
//! `scales: [u8; 4] @0, qs: [u8; 32] @4`. Each 16 values have 8 bytes of `qs`: the low halves are
//! their first 8 codes, the high halves their last 8. A scale is an E4M3 float without sign: the
//! top bit is ignored, and 0x7f, a NaN, stands for 0. Levels here are twice the float, as in MXFP4,
//! and scales are halved.

use super::TensorType;
use super::block::{Format, UnpackOps, head, head_mut};
use super::mxfp4::MXFP4_LEVELS;

/// Half of what an E4M3 float is too small by when its bits are those of a 16-bit float, whose
/// exponent has a bias of 15 instead of 7: `2^8 / 2`.
pub(crate) const NVFP4_REBIAS: f32 = 128.0;

pub(crate) struct NVFP4;

impl Format for NVFP4 {
    const TYPE: TensorType = TensorType::NVFP4;
    const MAX_CODE: i32 = 12;
    const SIGNED: bool = true;
    const LEVELS: Option<&'static [i8; 16]> = Some(&MXFP4_LEVELS);
    const SCALE_PER_16: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 36], &mut [i8; 64]) = (head(block), head_mut(q));
        for sixteen in 0..4 {
            scale[sixteen] = half_of_e4m3::<S>(block[sixteen]);
            let bytes: &[u8; 8] = head(&block[4 + 8 * sixteen..]);
            let q: &mut [i8; 16] = head_mut(&mut q[16 * sixteen..]);
            for i in 0..8 {
                q[i] = (bytes[i] & 15) as i8;
                q[i + 8] = (bytes[i] >> 4) as i8;
            }
        }
    }
}

/// Returns half of the E4M3 float with these bits.
#[inline(always)]
fn half_of_e4m3<S: UnpackOps>(bits: u8) -> f32 {
    let magnitude = if bits == 0x7f { 0 } else { bits & 0x7f };
    S::f16(u16::from(magnitude) << 7) * NVFP4_REBIAS
}
