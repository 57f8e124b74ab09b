//! IQ4_XS: 256 values of 4 bits, a scale per 32. Code `c` stands for
//! `d * (s - 32) * IQ4_LEVELS[c]`.
//!
//! `d: f16 @0, scales_h: u16 @2, scales_l: [u8; 4] @4, qs: [u8; 128] @8`. A 6-bit scale has its
//! high two bits in `scales_h`. Each 16 bytes of `qs` are packed as in IQ4_NL.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut, u16_at};
use super::iq4_nl::{IQ4_LEVELS, unpack_nibbles};

pub(crate) struct IQ4_XS;

impl Format for IQ4_XS {
    const TYPE: TensorType = TensorType::IQ4_XS;
    const MAX_CODE: i32 = 127;
    const SIGNED: bool = true;
    const LEVELS: Option<&'static [i8; 16]> = Some(&IQ4_LEVELS);

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 136], &mut [i8; 256]) = (head(block), head_mut(q));
        let (d, high) = (f16_at::<S>(block, 0), u16_at(block, 2));
        for run in 0..8 {
            let low = block[4 + run / 2] >> (4 * (run % 2)) & 15;
            let s = i32::from(low) | i32::from(high >> (2 * run) & 3) << 4;
            scale[2 * run..2 * run + 2].fill(d * (s - 32) as f32);
            unpack_nibbles(head(&block[8 + 16 * run..]), head_mut(&mut q[32 * run..]));
        }
    }
}
