//! The common form of all block formats: integer codes, with a scale and a minimum per 16 of them.
//!
//! Every quantized format of GGUF, however it packs its bits, says `value = scale * code - min`.
//! Unpacking a block into those three is the one thing that a format's file does. Dequantization
//! and the scalar, AVX2 and NEON dot products start from there:
//!
//! ```text
//! dequantize:  value[i] = scale[i / 16] * code[i] - min[i / 16]
//! dot:         sum over each 16 of
//!              scale * act_scale * (integer dot of codes) - min * (act_scale * sum of act codes)
//! ```
//!
//! To add a format: a variant of [`TensorType`] with its sizes, a file with `impl Format`, its name
//! in `with_format!`, and for AVX-512 an `unpack!` in `x86::avx512_unpack`.

use super::TensorType;

/// Values that kernels unpack at a time: one block of the large formats, up to eight of the small
/// ones.
pub(crate) const GROUP: usize = 256;

/// [`GROUP`] unpacked values, in the order of the row.
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct Codes {
    pub q: [i8; GROUP],
    /// One per 16 codes.
    pub scale: [f32; GROUP / 16],
    /// One per 16 codes, subtracted; untouched by formats without minimum.
    pub min: [f32; GROUP / 16],
}

impl Codes {
    pub(crate) const ZERO: Codes = Codes {
        q: [0; GROUP],
        scale: [0.0; GROUP / 16],
        min: [0.0; GROUP / 16],
    };
}

/// A block format: its unpacking, and what bounds its codes.
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "some constants only choose instructions")
)]
pub(crate) trait Format {
    const TYPE: TensorType;
    /// Largest magnitude of a code, at most 128: bounds the 16-bit sums of `x86::avx2`.
    const MAX_CODE: i32;
    /// Whether some codes are negative.
    const SIGNED: bool;
    /// Levels that the output of `unpack` indexes, for formats with a table. Everywhere else "code"
    /// means the level.
    const LEVELS: Option<&'static [i8; 16]> = None;
    /// Whether `min` is written.
    const HAS_MIN: bool = false;
    /// Whether scales are per 16 values; otherwise they are per 32, and neighbors in `scale` are
    /// equal.
    const SCALE_PER_16: bool = false;

    /// Unpacks one block: `q` has the block's number of values, `scale` and `min` a sixteenth of
    /// it.
    fn unpack<S: UnpackOps>(block: &[u8], q: &mut [i8], scale: &mut [f32], min: &mut [f32]);

    /// Returns the code that an element of `q` stands for.
    #[inline(always)]
    fn code(q: i8) -> i8 {
        match Self::LEVELS {
            Some(levels) => levels[q as usize & 15],
            None => q,
        }
    }

    /// Unpacks up to [`GROUP`] values, as many blocks as `bytes` holds; the rest of `out` is zero.
    #[inline(always)]
    fn unpack_group<S: UnpackOps>(bytes: &[u8], out: &mut Codes) {
        let (size, len) = (Self::TYPE.block_bytes(), Self::TYPE.block_len());
        if bytes.len() < GROUP / len * size {
            *out = Codes::ZERO;
        }
        let blocks = bytes.chunks_exact(size).zip(out.q.chunks_exact_mut(len));
        let scales = out
            .scale
            .chunks_exact_mut(len / 16)
            .zip(out.min.chunks_exact_mut(len / 16));
        for ((block, q), (scale, min)) in blocks.zip(scales) {
            Self::unpack::<S>(block, q, scale, min);
        }
    }
}

/// Steps of unpacking that some processors have an instruction for, which compilers do not find.
pub(crate) trait UnpackOps {
    /// Widens the 16-bit float with these bits.
    fn f16(bits: u16) -> f32;

    /// Returns the low halves of all bytes, then the high halves, each with its bit of `fifth` on
    /// top, minus `offset`.
    fn five_bits(bytes: &[u8; 16], fifth: u32, offset: i8) -> [i8; 32];
}

/// The scalar kernels: unpacking and dot products in plain Rust.
pub(crate) struct Plain;

impl UnpackOps for Plain {
    #[inline(always)]
    fn f16(bits: u16) -> f32 {
        f16_to_f32(bits)
    }

    #[inline(always)]
    fn five_bits(bytes: &[u8; 16], fifth: u32, offset: i8) -> [i8; 32] {
        std::array::from_fn(|i| {
            let code = bytes[i % 16] >> (i / 16 * 4) & 15;
            (code | ((fifth >> i & 1) << 4) as u8) as i8 - offset
        })
    }
}

/// Returns the first `N` elements. A block's length is its format's constant, so this never fails.
#[inline(always)]
pub(crate) fn head<const N: usize, T>(slice: &[T]) -> &[T; N] {
    slice.first_chunk().expect("a whole block")
}

/// Returns the first `N` elements for writing, as [`head`] does for reading.
#[inline(always)]
pub(crate) fn head_mut<const N: usize, T>(slice: &mut [T]) -> &mut [T; N] {
    slice.first_chunk_mut().expect("a whole block")
}

/// Reads the little-endian `u16` at byte `at`.
#[inline(always)]
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(*head(&bytes[at..]))
}

/// Reads the little-endian `u32` at byte `at`.
#[inline(always)]
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*head(&bytes[at..]))
}

/// Reads and widens the 16-bit float at byte `at`.
#[inline(always)]
pub(crate) fn f16_at<S: UnpackOps>(bytes: &[u8], at: usize) -> f32 {
    S::f16(u16_at(bytes, at))
}

/// Widens a 16-bit float without branches or subnormal operands (which stall the processor, and
/// scales often are).
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let exponent = magnitude & (0x1f << 23);
    let rebased = magnitude + (112 << 23);
    let normal = if exponent == 0x1f << 23 {
        rebased + (112 << 23)
    } else {
        rebased
    };
    let subnormal = (f32::from_bits(rebased + (1 << 23)) - f32::from_bits(113 << 23)).to_bits();
    f32::from_bits(sign | if exponent == 0 { subnormal } else { normal })
}

/// Splits the 12 bytes of Q4_K and Q5_K into eight 6-bit scales and eight 6-bit minimums, one byte
/// each.
#[inline(always)]
pub(crate) fn scales_and_mins(packed: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (a, b, c) = (u32_at(packed, 0), u32_at(packed, 4), u32_at(packed, 8));
    let join = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).to_le_bytes();
    let scales = join(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030);
    let mins = join(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030);
    (scales, mins)
}

/// Splits the 12 bytes of Q3_K into sixteen 6-bit scales (32 too large), one byte each.
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
            assert!(
                got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                "{bits:#x}: {got} {want}"
            );
        }
    }
}
