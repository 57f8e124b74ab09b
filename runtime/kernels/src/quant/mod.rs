//! Block formats of GGUF tensors: their sizes, and the scalar dequantization of each to `f32`.
//!
//! One file per block format, whose header gives the layout (`field: type @byte`). The fast kernels
//! are in the modules beside this one; the code here is what they are tested against, and is itself
//! tested against llama.cpp's values.
//!
//! ```
//! use tier_plan_kernels::quant::{TensorType, dequantize_row};
//!
//! // One block of Q8_0: the scale 0.5 as a 16-bit float, then 32 signed bytes.
//! let mut block = vec![0x00, 0x38];
//! block.extend((0..32).map(|i| i - 16).map(|code: i8| code as u8));
//! assert_eq!(TensorType::Q8_0.row_bytes(32), Some(block.len() as u64));
//!
//! let mut values = [0.0; 32];
//! dequantize_row(TensorType::Q8_0, &block, &mut values);
//! assert_eq!((values[0], values[31]), (-8.0, 7.5));
//! ```

#![forbid(unsafe_code)]
// The formats keep the names that the field gives them.
#![allow(non_camel_case_types)]

pub(crate) mod block;
pub mod grids;
mod iq1_m;
mod iq1_s;
mod iq2_s;
mod iq2_xs;
mod iq2_xxs;
mod iq3_s;
mod iq3_xxs;
pub(crate) mod iq4_nl;
mod iq4_xs;
pub(crate) mod mxfp4;
pub(crate) mod nvfp4;
mod q1_0;
mod q2_0;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod tq1_0;
mod tq2_0;

/// Types that stand for the formats, where a kernel is chosen by format at compile time.
pub(crate) mod types {
    pub(crate) use super::{
        iq1_m::IQ1_M, iq1_s::IQ1_S, iq2_s::IQ2_S, iq2_xs::IQ2_XS, iq2_xxs::IQ2_XXS, iq3_s::IQ3_S,
        iq3_xxs::IQ3_XXS, iq4_nl::IQ4_NL, iq4_xs::IQ4_XS, mxfp4::MXFP4, nvfp4::NVFP4, q1_0::Q1_0,
        q2_0::Q2_0, q2_k::Q2_K, q3_k::Q3_K, q4_0::Q4_0, q4_1::Q4_1, q4_k::Q4_K, q5_0::Q5_0,
        q5_1::Q5_1, q5_k::Q5_K, q6_k::Q6_K, q8_0::Q8_0, tq1_0::TQ1_0, tq2_0::TQ2_0,
    };
}

use block::{Codes, Format, GROUP, Plain, f16_to_f32, head};
use thiserror::Error;

/// Evaluates `$then` with `$F` naming the [`Format`] of the tensor type `$ty`, or `$float` for a
/// type without blocks.
macro_rules! with_format {
    ($ty:expr, $F:ident => $then:expr, float => $float:expr) => {
        $crate::quant::with_format!(@arms $ty, $F, $then, $float;
            Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M IQ4_NL
            IQ4_XS MXFP4 Q1_0 Q2_0 TQ1_0 TQ2_0 NVFP4)
    };
    (@arms $ty:expr, $F:ident, $then:expr, $float:expr; $($name:ident)*) => {
        match $ty {
            $($crate::quant::TensorType::$name => {
                type $F = $crate::quant::types::$name;
                $then
            })*
            $crate::quant::TensorType::F32
            | $crate::quant::TensorType::F16
            | $crate::quant::TensorType::BF16
            | $crate::quant::TensorType::I8
            | $crate::quant::TensorType::I16
            | $crate::quant::TensorType::I32
            | $crate::quant::TensorType::I64
            | $crate::quant::TensorType::F64 => $float,
        }
    };
}
pub(crate) use with_format;

/// Dequantizes a row of `out.len()` values of type `ty`, whose bytes are laid out as in the file.
///
/// ```
/// use tier_plan_kernels::quant::{TensorType, dequantize_row};
///
/// let mut values = [0.0; 2];
/// dequantize_row(TensorType::BF16, &[0x80, 0x3f, 0x00, 0xc0], &mut values);
/// assert_eq!(values, [1.0, -2.0]);
/// ```
///
/// # Panics
/// When `out.len()` is not a multiple of the block length, or `bytes` is not exactly as long as
/// those blocks.
pub fn dequantize_row(ty: TensorType, bytes: &[u8], out: &mut [f32]) {
    let expected = ty.row_bytes(out.len() as u64);
    assert_eq!(
        expected,
        Some(bytes.len() as u64),
        "a row of {} {ty} values",
        out.len()
    );
    with_format!(ty, F => dequantize_blocks::<F>(bytes, out), float => match ty {
        TensorType::F32 => widen(bytes, out, f32::from_le_bytes),
        TensorType::F16 => widen(bytes, out, |b| f16_to_f32(u16::from_le_bytes(b))),
        TensorType::I8 => widen(bytes, out, |b| f32::from(i8::from_le_bytes(b))),
        TensorType::I16 => widen(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
        TensorType::I32 => widen(bytes, out, |b| i32::from_le_bytes(b) as f32),
        TensorType::I64 => widen(bytes, out, |b| i64::from_le_bytes(b) as f32),
        TensorType::F64 => widen(bytes, out, |b| f64::from_le_bytes(b) as f32),
        _ => widen(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
    });
}

/// Converts elements of `N` bytes one by one.
fn widen<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    for (to, from) in out.iter_mut().zip(bytes.chunks_exact(N)) {
        *to = convert(*head(from));
    }
}

fn dequantize_blocks<F: Format>(bytes: &[u8], out: &mut [f32]) {
    let mut codes = Codes::ZERO;
    let group_bytes = GROUP / F::TYPE.block_len() * F::TYPE.block_bytes();
    for (bytes, out) in bytes.chunks(group_bytes).zip(out.chunks_mut(GROUP)) {
        F::unpack_group::<Plain>(bytes, &mut codes);
        for (i, to) in out.iter_mut().enumerate() {
            *to = codes.scale[i / 16] * f32::from(F::code(codes.q[i])) - codes.min[i / 16];
        }
    }
}

/// The element type of a GGUF tensor. The discriminant is `ggml_type`, the number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
#[repr(u32)]
pub enum TensorType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
    Q2_0 = 42,
}

/// A `ggml_type` without a decoder here.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("tensor type {0} is not supported")]
pub struct UnknownType(pub u32);

impl TensorType {
    /// Every type of weights, by its number in the file: there are kernels for all of them.
    pub const ALL: [TensorType; 28] = {
        use TensorType::*;
        [
            F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS, IQ2_XS,
            IQ3_XXS, IQ1_S, IQ4_NL, IQ3_S, IQ2_S, IQ4_XS, IQ1_M, BF16, TQ1_0, TQ2_0, MXFP4, NVFP4,
            Q1_0, Q2_0,
        ]
    };

    /// Types of tables and parameters, which no kernel multiplies with.
    pub const UNMULTIPLIED: [TensorType; 5] = {
        use TensorType::*;
        [I8, I16, I32, I64, F64]
    };

    /// Whether there are kernels that multiply with weights of this type.
    #[inline]
    pub fn has_kernels(self) -> bool {
        !Self::UNMULTIPLIED.contains(&self)
    }

    /// Returns the type with this number in a GGUF file.
    ///
    /// # Errors
    /// When no type has the number.
    pub fn from_id(id: u32) -> Result<Self, UnknownType> {
        Self::ALL
            .into_iter()
            .chain(Self::UNMULTIPLIED)
            .find(|t| *t as u32 == id)
            .ok_or(UnknownType(id))
    }

    /// Returns the type with this name (`Q4_K`), without regard to case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|t| t.name().eq_ignore_ascii_case(name))
    }

    /// Returns the name that llama.cpp uses, for example `Q4_K`.
    #[inline]
    pub fn name(self) -> &'static str {
        use TensorType::*;
        match self {
            F32 => "F32",
            F16 => "F16",
            Q4_0 => "Q4_0",
            Q4_1 => "Q4_1",
            Q5_0 => "Q5_0",
            Q5_1 => "Q5_1",
            Q8_0 => "Q8_0",
            Q2_K => "Q2_K",
            Q3_K => "Q3_K",
            Q4_K => "Q4_K",
            Q5_K => "Q5_K",
            Q6_K => "Q6_K",
            IQ2_XXS => "IQ2_XXS",
            IQ2_XS => "IQ2_XS",
            IQ3_XXS => "IQ3_XXS",
            IQ1_S => "IQ1_S",
            IQ4_NL => "IQ4_NL",
            IQ3_S => "IQ3_S",
            IQ2_S => "IQ2_S",
            IQ4_XS => "IQ4_XS",
            IQ1_M => "IQ1_M",
            BF16 => "BF16",
            I8 => "I8",
            I16 => "I16",
            I32 => "I32",
            I64 => "I64",
            F64 => "F64",
            TQ1_0 => "TQ1_0",
            TQ2_0 => "TQ2_0",
            MXFP4 => "MXFP4",
            NVFP4 => "NVFP4",
            Q1_0 => "Q1_0",
            Q2_0 => "Q2_0",
        }
    }

    /// Returns the values per block: 1, or a power of two from 32 to 256.
    #[inline]
    pub const fn block_len(self) -> usize {
        use TensorType::*;
        match self {
            F32 | F16 | BF16 | I8 | I16 | I32 | I64 | F64 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | IQ4_NL | MXFP4 => 32,
            Q2_0 | NVFP4 => 64,
            Q1_0 => 128,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K | IQ2_XXS | IQ2_XS | IQ3_XXS | IQ1_S | IQ3_S
            | IQ2_S | IQ4_XS | IQ1_M | TQ1_0 | TQ2_0 => 256,
        }
    }

    /// Returns the bytes per block.
    #[inline]
    pub const fn block_bytes(self) -> usize {
        use TensorType::*;
        match self {
            I8 => 1,
            F16 | BF16 | I16 => 2,
            F32 | I32 => 4,
            I64 | F64 => 8,
            Q4_0 | IQ4_NL | Q1_0 | Q2_0 => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            MXFP4 => 17,
            NVFP4 => 36,
            Q2_K => 84,
            Q3_K => 110,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
            IQ2_XXS => 66,
            IQ2_XS => 74,
            IQ2_S => 82,
            IQ3_XXS => 98,
            IQ3_S => 110,
            IQ1_S => 50,
            IQ1_M => 56,
            IQ4_XS => 136,
            TQ1_0 => 54,
            TQ2_0 => 66,
        }
    }

    /// Returns the bytes per row of `cols` values, or `None` where `cols` is not a multiple of the
    /// block length or the size overflows.
    ///
    /// ```
    /// use tier_plan_kernels::quant::TensorType;
    ///
    /// assert_eq!(TensorType::Q4_K.row_bytes(2048), Some(8 * 144)); // 4.5 bits per value
    /// assert_eq!(TensorType::Q4_K.row_bytes(100), None); // blocks have 256 values
    /// ```
    #[inline]
    pub fn row_bytes(self, cols: u64) -> Option<u64> {
        let len = self.block_len() as u64;
        if !cols.is_multiple_of(len) {
            return None;
        }
        (cols / len).checked_mul(self.block_bytes() as u64)
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// Reads raw blocks and the values that llama.cpp decodes from them.
    pub(crate) fn golden(ty: TensorType) -> (Vec<u8>, Vec<f32>) {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/dequant");
        let bytes = std::fs::read(dir.join(format!("{ty}.bin"))).unwrap();
        let values = std::fs::read(dir.join(format!("{ty}.f32"))).unwrap();
        (
            bytes,
            values
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect(),
        )
    }

    #[test]
    fn decoding_matches_the_published_values() {
        for ty in TensorType::ALL
            .into_iter()
            .filter(|ty| *ty != TensorType::F32)
        {
            let (bytes, want) = golden(ty);
            let mut got = vec![f32::NAN; want.len()];
            dequantize_row(ty, &bytes, &mut got);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!(
                    (got - want).abs() <= 1e-6 * want.abs(),
                    "{ty} value {i}: {got}, expected {want}"
                );
            }
            assert!(
                want.iter().any(|v| *v != 0.0),
                "{ty}: the published values are all zero"
            );
        }
    }

    #[test]
    fn every_published_type_is_listed() {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/dequant");
        let names = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap());
        let types: Vec<String> = names
            .filter_map(|name| Some(name.strip_suffix(".bin")?.to_string()))
            .collect();
        for name in &types {
            assert!(
                TensorType::from_name(name).is_some(),
                "{name} has published values, but TensorType::ALL lacks it"
            );
        }
        // All but F32, which needs no decoding.
        assert_eq!(types.len(), TensorType::ALL.len() - 1);
    }

    #[test]
    fn f32_decodes_to_itself() {
        let values = [0.0f32, -1.5, f32::MIN_POSITIVE, 3.0e38];
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut out = [0.0; 4];
        dequantize_row(TensorType::F32, &bytes, &mut out);
        assert_eq!(out, values);
    }

    #[test]
    fn integers_and_doubles_convert() {
        use TensorType::*;
        let decoded = |ty: TensorType, bytes: &[u8]| {
            let mut out = vec![f32::NAN; bytes.len() / ty.block_bytes()];
            dequantize_row(ty, bytes, &mut out);
            out
        };
        assert_eq!(decoded(I8, &[0x80, 0x7f]), [-128.0, 127.0]);
        assert_eq!(decoded(I16, &[0x00, 0x80, 0xff, 0x7f]), [-32768.0, 32767.0]);
        assert_eq!(decoded(I32, &(-3i32).to_le_bytes()), [-3.0]);
        assert_eq!(decoded(I64, &(1i64 << 40).to_le_bytes()), [1099511627776.0]);
        assert_eq!(decoded(F64, &(-0.75f64).to_le_bytes()), [-0.75]);
        for ty in TensorType::UNMULTIPLIED {
            assert_eq!(TensorType::from_id(ty as u32), Ok(ty));
            assert!(!ty.has_kernels() && !TensorType::ALL.contains(&ty));
            let bytes = vec![0; 4 * ty.block_bytes()];
            assert!(crate::Weights::new(ty, &bytes, 2, 2).is_none(), "{ty}");
        }
    }

    #[test]
    fn every_type_takes_any_bytes_and_odd_numbers_of_blocks() {
        for ty in TensorType::ALL {
            for blocks in [0usize, 1, 7, 8, 9] {
                let bytes: Vec<u8> = (0..blocks * ty.block_bytes())
                    .map(|i| (i * 151 + 7 * blocks) as u8)
                    .collect();
                let mut whole = vec![0.0; blocks * ty.block_len()];
                dequantize_row(ty, &bytes, &mut whole);
                let mut one = vec![0.0; ty.block_len()];
                for block in 0..blocks {
                    let part = &bytes[block * ty.block_bytes()..][..ty.block_bytes()];
                    dequantize_row(ty, part, &mut one);
                    // Arithmetic may give a NaN any payload.
                    let same = one.iter().zip(&whole[block * ty.block_len()..]);
                    assert!(
                        same.clone()
                            .all(|(a, b)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())),
                        "{ty} block {block} of {blocks}"
                    );
                }
            }
        }
    }
}
