//! MXFP4: 32 values; one byte that is a power of two (exponent biased by 127), then 16 bytes as in Q4_0 of 4-bit
//! floats. Codes here are twice the float, so that they are whole, and the scale is halved.

use super::TensorType;
use super::block::{Format, Steps, head, head_mut};
use super::iq4_nl::level_numbers;

/// Twice the values of the sixteen 4-bit floats.
pub(crate) const MXFP4_LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

pub(crate) struct MXFP4;

impl Format for MXFP4 {
    const TYPE: TensorType = TensorType::MXFP4;
    const LARGEST: i32 = 12;
    const SIGNED: bool = true;
    const LEVELS: Option<&'static [i8; 16]> = Some(&MXFP4_LEVELS);

    #[inline(always)]
    fn unpack<S: Steps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 17], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(half_power(block[0]));
        level_numbers(head(&block[1..]), q);
    }
}

/// Half of two to the power `exponent - 127`; the two smallest are subnormal.
#[inline(always)]
fn half_power(exponent: u8) -> f32 {
    let e = u32::from(exponent);
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
}
