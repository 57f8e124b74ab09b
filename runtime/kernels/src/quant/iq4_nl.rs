//! IQ4_NL: 32 values of 4 bits that index sixteen uneven levels. Code `c` stands for
//! `d * IQ4_LEVELS[c]`.
//!
//! `d: f16 @0, qs: [u8; 16] @2`. Codes are packed as in Q4_0.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};

/// Levels of IQ4_NL and IQ4_XS by code.
pub(crate) const IQ4_LEVELS: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

pub(crate) struct IQ4_NL;

impl Format for IQ4_NL {
    const TYPE: TensorType = TensorType::IQ4_NL;
    const MAX_CODE: i32 = 127;
    const SIGNED: bool = true;
    const LEVELS: Option<&'static [i8; 16]> = Some(&IQ4_LEVELS);

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 18], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 0));
        unpack_nibbles(head(&block[2..]), q);
    }
}

/// Unpacks 32 codes of 4 bits from 16 bytes, low halves first.
#[inline(always)]
pub(super) fn unpack_nibbles(bytes: &[u8; 16], q: &mut [i8; 32]) {
    for i in 0..16 {
        q[i] = (bytes[i] & 15) as i8;
        q[i + 16] = (bytes[i] >> 4) as i8;
    }
}
