//! MXFP4: 32 values that are 4-bit floats (E2M1) with one power of two, as in the OCP Microscaling
//! specification.
//!
//! `e: u8 @0, qs: [u8; 16] @1`. The scale is `2^(e - 127)`; codes are packed as in Q4_0. Levels
//! here are twice the float, so that they are whole, and the scale is halved.

use super::TensorType;
use super::block::{Format, UnpackOps, head, head_mut};
use super::iq4_nl::unpack_nibbles;

/// Twice the sixteen 4-bit floats, by code.
pub(crate) const MXFP4_LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

pub(crate) struct MXFP4;

impl Format for MXFP4 {
    const TYPE: TensorType = TensorType::MXFP4;
    const MAX_CODE: i32 = 12;
    const SIGNED: bool = true;
    const LEVELS: Option<&'static [i8; 16]> = Some(&MXFP4_LEVELS);

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 17], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(half_power(block[0]));
        unpack_nibbles(head(&block[1..]), q);
    }
}

/// Returns `2^(exponent - 127) / 2`; the two smallest are subnormal.
#[inline(always)]
fn half_power(exponent: u8) -> f32 {
    let e = u32::from(exponent);
    f32::from_bits(if e < 2 {
        0x0020_0000 << e
    } else {
        (e - 1) << 23
    })
}
