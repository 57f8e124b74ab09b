//! IQ4_NL: 32 values; scale f16, then 16 bytes as in Q4_0 whose codes pick one of sixteen uneven levels.

use super::TensorType;
use super::block::{Format, f16_at, head, head_mut};

/// The levels of IQ4_NL and IQ4_XS.
pub(crate) const IQ4_LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

pub(crate) struct IQ4_NL;

impl Format for IQ4_NL {
    const TYPE: TensorType = TensorType::IQ4_NL;
    const SIGNED: bool = true;
    const WIDE: bool = true;

    #[inline(always)]
    fn unpack(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 18], &mut [i8; 32]) = (head(block), head_mut(q));
        scale.fill(f16_at(block, 0));
        look_up(head(&block[2..]), q, &IQ4_LEVELS);
    }
}

/// Replaces the 32 4-bit codes of 16 bytes (low halves first) by their levels.
#[inline(always)]
pub(super) fn look_up(bytes: &[u8; 16], q: &mut [i8; 32], levels: &[i8; 16]) {
    for i in 0..16 {
        q[i] = levels[usize::from(bytes[i] & 15)];
        q[i + 16] = levels[usize::from(bytes[i] >> 4)];
    }
}
