//! TQ1_0: 256 values of three levels, five per byte. Digit `t` stands for `d * (t - 1)`.
//!
//! `qs: [u8; 48] @0, qh: [u8; 4] @48, d: f16 @52`. A byte is a fraction of 256 whose first digits
//! in base 3 are its values: digit `n` of byte `b` is `(b * 3^n mod 256) * 3 / 256`, rounded down.
//! First come digits 0 to 4 of the first 32 bytes of `qs`, the same digit of all bytes side by
//! side, then those of its last 16 bytes, then digits 0 to 3 of `qh`.

use super::TensorType;
use super::block::{Format, UnpackOps, f16_at, head, head_mut};

pub(crate) struct TQ1_0;

impl Format for TQ1_0 {
    const TYPE: TensorType = TensorType::TQ1_0;
    const MAX_CODE: i32 = 1;
    const SIGNED: bool = true;

    #[inline(always)]
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], _min: &mut [f32]) {
        let (block, q): (&[u8; 54], &mut [i8; 256]) = (head(block), head_mut(q));
        scale.fill(f16_at::<S>(block, 52));
        digits::<32>(*head(block), &mut q[..160]);
        digits::<16>(*head(&block[32..]), &mut q[160..240]);
        digits::<4>(*head(&block[48..]), &mut q[240..]);
    }
}

/// Unpacks as many digits of `N` bytes as `q` has room for, minus 1.
#[inline(always)]
fn digits<const N: usize>(mut bytes: [u8; N], q: &mut [i8]) {
    for q in q.chunks_exact_mut(N) {
        for (q, byte) in q.iter_mut().zip(&mut bytes) {
            // `byte * 3 / 256` without wider numbers.
            *q = i8::from(*byte >= 86) + i8::from(*byte >= 171) - 1;
            *byte = byte.wrapping_mul(3);
        }
    }
}
