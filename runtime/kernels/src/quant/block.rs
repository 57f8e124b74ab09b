//! What all block formats have in common: small whole-number codes, a scale and a minimum for each sixteen of them.
//!
//! Every quantised format of GGUF, however it packs its bits, says `value = scale * code - min`. Taking a block apart
//! into those three is the one thing a format's file does; decoding and the reference product both start from there.

use super::TensorType;

/// Values that kernels take at a time: one block of the large formats, eight of the small ones.
pub(crate) const GROUP: usize = 256;

/// [`GROUP`] values taken apart, in the order of the row.
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct Codes {
    pub q: [i8; GROUP],
    /// One for each 16 codes.
    pub scale: [f32; GROUP / 16],
    /// One for each 16 codes, subtracted; untouched by formats without minimum.
    pub min: [f32; GROUP / 16],
}

impl Codes {
    pub(crate) const ZERO: Codes = Codes { q: [0; GROUP], scale: [0.0; GROUP / 16], min: [0.0; GROUP / 16] };
}

/// A block format.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "some constants only choose instructions"))]
pub(crate) trait Format {
    const TYPE: TensorType;
    /// The largest magnitude of a code, at most 128.
    const LARGEST: i32;
    /// Some codes are negative.
    const SIGNED: bool;
    /// Where the codes of `unpack` are only numbers of levels, the levels: they are the codes meant everywhere else.
    const LEVELS: Option<&'static [i8; 16]> = None;
    /// There are minimums.
    const HAS_MIN: bool = false;
    /// The halves of 32 values have scales of their own.
    const FINE: bool = false;

    /// Takes one block apart: `q` has the block's number of values, `scale` and `min` a sixteenth of it.
    fn unpack<S: Steps>(block: &[u8], q: &mut [i8], scale: &mut [f32], min: &mut [f32]);

    /// The code that a number out of `unpack` means.
    #[inline(always)]
    fn code(number: i8) -> i8 {
        match Self::LEVELS {
            Some(levels) => levels[number as usize & 15],
            None => number,
        }
    }

    /// Takes up to [`GROUP`] values apart, as many blocks as `bytes` holds; the rest of `out` is zero.
    #[inline(always)]
    fn unpack_group<S: Steps>(bytes: &[u8], out: &mut Codes) {
        let (size, len) = (Self::TYPE.block_bytes(), Self::TYPE.block_len());
        if bytes.len() < GROUP / len * size {
            *out = Codes::ZERO;
        }
        let blocks = bytes.chunks_exact(size).zip(out.q.chunks_exact_mut(len));
        let scales = out.scale.chunks_exact_mut(len / 16).zip(out.min.chunks_exact_mut(len / 16));
        for ((block, q), (scale, min)) in blocks.zip(scales) {
            Self::unpack::<S>(block, q, scale, min);
        }
    }
}

/// Steps of unpacking that some processors have an instruction for and compilers do not find it.
pub(crate) trait Steps {
    /// The 16-bit float with these bits, widened.
    fn f16(bits: u16) -> f32;

    /// The low halves of all bytes, then the high halves, each with its bit of `fifth` on top, less `less`.
    fn five_bits(bytes: &[u8; 16], fifth: u32, less: i8) -> [i8; 32];
}

/// The steps in plain code.
pub(crate) struct Plain;

impl Steps for Plain {
    #[inline(always)]
    fn f16(bits: u16) -> f32 {
        f16_to_f32(bits)
    }

    #[inline(always)]
    fn five_bits(bytes: &[u8; 16], fifth: u32, less: i8) -> [i8; 32] {
        std::array::from_fn(|i| {
            let code = bytes[i % 16] >> (i / 16 * 4) & 15;
            (code | ((fifth >> i & 1) << 4) as u8) as i8 - less
        })
    }
}

/// The first `N` elements. A block's length is its format's constant, so this never fails.
#[inline(always)]
pub(crate) fn head<const N: usize, T>(slice: &[T]) -> &[T; N] {
    slice.first_chunk().expect("a whole block")
}

/// The first `N` elements, to be written. As [`head`].
#[inline(always)]
pub(crate) fn head_mut<const N: usize, T>(slice: &mut [T]) -> &mut [T; N] {
    slice.first_chunk_mut().expect("a whole block")
}

/// The 16-bit number at byte `at`.
#[inline(always)]
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(*head(&bytes[at..]))
}

/// The 32-bit number at byte `at`.
#[inline(always)]
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*head(&bytes[at..]))
}

/// The 16-bit float at byte `at`.
#[inline(always)]
pub(crate) fn f16_at<S: Steps>(bytes: &[u8], at: usize) -> f32 {
    S::f16(u16_at(bytes, at))
}

/// Widens a 16-bit float without branches or subnormal operands (which stall the processor, and scales often are).
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let exponent = magnitude & (0x1f << 23);
    let rebased = magnitude + (112 << 23);
    let normal = if exponent == 0x1f << 23 { rebased + (112 << 23) } else { rebased };
    let subnormal = (f32::from_bits(rebased + (1 << 23)) - f32::from_bits(113 << 23)).to_bits();
    f32::from_bits(sign | if exponent == 0 { subnormal } else { normal })
}

/// Splits the 12 bytes of Q4_K and Q5_K into eight 6-bit scales and eight 6-bit minimums, a byte each.
#[inline(always)]
pub(crate) fn scales_and_mins(packed: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (a, b, c) = (u32_at(packed, 0), u32_at(packed, 4), u32_at(packed, 8));
    let join = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).to_le_bytes();
    let scales = join(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030);
    let mins = join(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030);
    (scales, mins)
}

/// Splits the 12 bytes of Q3_K into sixteen 6-bit scales (32 too large), a byte each.
#[inline(always)]
pub(crate) fn q3_scales(packed: &[u8]) -> [u8; 16] {
    let (a, b, c) = (u32_at(packed, 0), u32_at(packed, 4), u32_at(packed, 8));
    let mut out = [0; 16];
    let parts = [
        a & 0x0f0f_0f0f | c << 4 & 0x3030_3030,
        b & 0x0f0f_0f0f | c << 2 & 0x3030_3030,
        a >> 4 & 0x0f0f_0f0f | c & 0x3030_3030,
        b >> 4 & 0x0f0f_0f0f | c >> 2 & 0x3030_3030,
    ];
    for (to, part) in out.chunks_exact_mut(4).zip(parts) {
        to.copy_from_slice(&part.to_le_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::f16_to_f32;

    #[test]
    fn every_half_float_widens() {
        for bits in 0..=u16::MAX {
            let (got, want) = (f16_to_f32(bits), half::f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}: {got} {want}");
        }
    }
}
