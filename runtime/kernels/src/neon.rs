//! Matmul kernels for NEON with its `dotprod` extension: the scalar unpacking compiled for it, and
//! a dot product of its own.
//!
//! The order of the values is that of `x86::avx2`, in registers of half the width. A register holds
//! an eight of each of two runs of 32, so that the four lanes of their products are under the four
//! scales of those runs. `sdot` adds products of signed bytes to 32 bits, so neither offsets nor
//! 16-bit sums are needed:
//!
//! ```text
//! for each two runs (a quarter of the group):
//!     w[0..4] = eights 0, 1, 2, 3 of the two runs, side by side        # 16 bytes each
//!     for each token n:
//!         sum = sdot(... sdot(0, w[0], x[n][0]) ..., w[3], x[n][3])    # two lanes per run
//!         acc[n] += float(sum) * weight scales * x scales
//!         acc[n] -= minimums * x sums
//! ```
//!
//! Only matmuls are here. Element-wise operations and attention rows run the scalar code, which
//! every AArch64 compiler turns into NEON by itself. Nothing is prefetched: no processor of this
//! kind has been measured.

use super::activations::ActBlock;
use super::float_panel::{Bf16, F16, F32, FloatFormat, float_panel};
use super::lanes::Lanes;
use super::panel::{BlockDot, Panel, PanelFn, PanelFns, quantized_panel};
use crate::quant::block::{Codes, Format, GROUP, UnpackOps};
use crate::quant::{TensorType, with_format};
use std::arch::aarch64::*;
use std::arch::asm;

/// Lists the instances of a kernel for 1 to 4 tokens.
macro_rules! panel_fns {
    ($kernel:ident, $of:ty) => {{
        const PANELS: &[PanelFn] = &[
            $kernel::<$of, 1>,
            $kernel::<$of, 2>,
            $kernel::<$of, 3>,
            $kernel::<$of, 4>,
        ];
        PANELS
    }};
}

/// Returns the kernels of a type, for 1, 2, ... tokens.
pub(super) fn panels(ty: TensorType) -> PanelFns {
    with_format!(ty, F => panel_fns!(quantized, F), float => match ty {
        TensorType::F32 => panel_fns!(float, F32),
        TensorType::F16 => panel_fns!(float, F16),
        _ => panel_fns!(float, Bf16),
    })
}

/// Unpacking and dot products with NEON.
struct Neon;

impl UnpackOps for Neon {
    #[inline(always)]
    fn f16(bits: u16) -> f32 {
        // SAFETY: every AArch64 processor that this is compiled for has NEON.
        unsafe { vgetq_lane_f32::<0>(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits)))) }
    }

    #[inline(always)]
    fn five_bits(bytes: &[u8; 16], fifth: u32, offset: i8) -> [i8; 32] {
        const BIT: u64 = 0x8040_2010_0804_0201;
        const EACH: u64 = 0x0101_0101_0101_0101;
        let mut out = [0; 32];
        // SAFETY: every AArch64 processor that this is compiled for has NEON; sixteen bytes are
        // read, and each half of `out` is sixteen.
        unsafe {
            let low = vld1q_u8(bytes.as_ptr());
            let fifth = vreinterpretq_u8_u32(vdupq_n_u32(fifth));
            let one_each = vreinterpretq_u8_u64(vdupq_n_u64(BIT));
            for (half, codes) in [vandq_u8(low, vdupq_n_u8(15)), vshrq_n_u8::<4>(low)]
                .into_iter()
                .enumerate()
            {
                // Every bit's byte, eight times.
                let first = 2 * half as u64 * EACH;
                let spread = vreinterpretq_u8_u64(vcombine_u64(
                    vcreate_u64(first),
                    vcreate_u64(first + EACH),
                ));
                let set = vtstq_u8(vqtbl1q_u8(fifth, spread), one_each);
                let codes = vorrq_u8(codes, vandq_u8(set, vdupq_n_u8(16)));
                let codes = vsubq_s8(vreinterpretq_s8_u8(codes), vdupq_n_s8(offset));
                vst1q_s8(out[16 * half..][..16].as_mut_ptr(), codes);
            }
        }
        out
    }
}

/// Adds to each lane the products of its four bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // The intrinsic is not stable yet. SAFETY: the function is compiled for the extension that has
    // the instruction, which reads and writes nothing else.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {w:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

impl BlockDot for Neon {
    type Ops = Neon;
    type Acc = float32x4_t;

    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        // SAFETY: every AArch64 processor that this is compiled for has NEON.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    unsafe fn add_block<F: Format, const N: usize>(
        codes: &Codes,
        x: [&ActBlock; N],
        acc: &mut [float32x4_t; N],
    ) {
        // SAFETY: the caller's processor.
        unsafe { add_block::<F, N>(codes, x, acc) }
    }

    #[inline(always)]
    unsafe fn sum(acc: float32x4_t) -> f32 {
        // SAFETY: every AArch64 processor that this is compiled for has NEON.
        unsafe { vaddvq_f32(acc) }
    }
}

/// Computes a panel of a quantized format.
///
/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn quantized<F: Format, const N: usize>(panel: &Panel<'_>) {
    // SAFETY: the caller's panel.
    unsafe { quantized_panel::<Neon, F, N>(panel) }
}

/// Computes a panel of a float format.
///
/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn float<W: FloatFormat, const N: usize>(panel: &Panel<'_>) {
    // SAFETY: the caller's panel.
    unsafe { float_panel::<Eight, W, N>(panel) }
}

/// Adds the dot products of 256 weights with `N` tokens.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_block<F: Format, const N: usize>(
    codes: &Codes,
    x: [&ActBlock; N],
    acc: &mut [float32x4_t; N],
) {
    for two in 0..4 {
        // Eights of two runs, side by side as the activations have them.
        let [w0, w1] = eights::<F>(codes, 2 * two, 0);
        let [w2, w3] = eights::<F>(codes, 2 * two, 16);
        let scale = load4(&codes.scale, 4 * two);
        let (first, second) = (vtrn1q_f32(scale, scale), vtrn2q_f32(scale, scale));
        for n in 0..N {
            let x_scale = load4(&x[n].scale, 4 * two);
            let [x0, x1, x2, x3] = [0, 64, 128, 192].map(|at| load16(&x[n].q, at + 16 * two));
            let one = dot(dot(vdupq_n_s32(0), w0, x0), w1, x1);
            let sum = if F::SCALE_PER_16 {
                let two = dot(dot(vdupq_n_s32(0), w2, x2), w3, x3);
                vfmaq_f32(
                    vmulq_f32(vcvtq_f32_s32(one), first),
                    vcvtq_f32_s32(two),
                    second,
                )
            } else {
                vmulq_f32(vcvtq_f32_s32(dot(dot(one, w2, x2), w3, x3)), scale)
            };
            acc[n] = vfmaq_f32(acc[n], sum, x_scale);
            if F::HAS_MIN {
                acc[n] = vfmsq_f32(
                    acc[n],
                    load4(&codes.min, 4 * two),
                    load4(&x[n].sums, 4 * two),
                );
            }
        }
    }
}

/// Returns two eights of each of two runs: those at `at` of both runs, and the next ones.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn eights<F: Format>(codes: &Codes, run: usize, at: usize) -> [int8x16_t; 2] {
    let mut even = load16(&codes.q, 32 * run + at);
    let mut odd = load16(&codes.q, 32 * run + 32 + at);
    if let Some(levels) = F::LEVELS {
        // SAFETY: sixteen bytes.
        let table = unsafe { vld1q_s8(levels.as_ptr()) };
        even = vqtbl1q_s8(table, vreinterpretq_u8_s8(even));
        odd = vqtbl1q_s8(table, vreinterpretq_u8_s8(odd));
    }
    let (even, odd) = (vreinterpretq_s64_s8(even), vreinterpretq_s64_s8(odd));
    [
        vreinterpretq_s8_s64(vzip1q_s64(even, odd)),
        vreinterpretq_s8_s64(vzip2q_s64(even, odd)),
    ]
}

/// Loads 16 codes from `at` on.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn load16(q: &[i8; GROUP], at: usize) -> int8x16_t {
    let part = &q[at..][..16];
    // SAFETY: the slice is 16 bytes.
    unsafe { vld1q_s8(part.as_ptr()) }
}

/// Loads four floats from `at` on.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn load4(values: &[f32], at: usize) -> float32x4_t {
    let part = &values[at..][..4];
    // SAFETY: the slice is four values.
    unsafe { vld1q_f32(part.as_ptr()) }
}

/// Two registers as one of eight lanes: as many as a load of 16-bit floats fills.
#[derive(Clone, Copy)]
struct Eight([float32x4_t; 2]);

impl Lanes for Eight {
    const COUNT: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: every AArch64 processor that this is compiled for has NEON.
        unsafe { Self([vdupq_n_f32(0.0); 2]) }
    }

    #[inline(always)]
    unsafe fn load_f32(p: *const u8) -> Self {
        // SAFETY: the caller's bytes.
        unsafe {
            Self([
                vreinterpretq_f32_u8(vld1q_u8(p)),
                vreinterpretq_f32_u8(vld1q_u8(p.add(16))),
            ])
        }
    }

    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: the caller's bytes.
        unsafe {
            let half = vreinterpretq_f16_u8(vld1q_u8(p));
            Self([vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)])
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: the caller's bytes.
        unsafe {
            let bits = vreinterpretq_u16_u8(vld1q_u8(p));
            let (low, high) = (
                vshll_n_u16::<16>(vget_low_u16(bits)),
                vshll_high_n_u16::<16>(bits),
            );
            Self([vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)])
        }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self, b: Self, c: Self) -> Self {
        // SAFETY: every AArch64 processor that this is compiled for has NEON.
        unsafe {
            Self([
                vfmaq_f32(c.0[0], a.0[0], b.0[0]),
                vfmaq_f32(c.0[1], a.0[1], b.0[1]),
            ])
        }
    }

    #[inline(always)]
    unsafe fn sum_both(a: Self, b: Self) -> f32 {
        // SAFETY: every AArch64 processor that this is compiled for has NEON.
        unsafe {
            vaddvq_f32(vaddq_f32(
                vaddq_f32(a.0[0], a.0[1]),
                vaddq_f32(b.0[0], b.0[1]),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Neon;
    use crate::quant::block::{Plain, UnpackOps};

    #[test]
    fn every_half_float_widens_as_in_plain_code() {
        for bits in 0..=u16::MAX {
            let (got, want) = (Neon::f16(bits), Plain::f16(bits));
            assert!(
                got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(),
                "{bits:#x}: {got} {want}"
            );
        }
    }

    #[test]
    fn fifth_bits_join_as_in_plain_code() {
        let bytes = std::array::from_fn(|i| (i * 37 + 11) as u8);
        for bit in 0..32 {
            for (fifth, less) in [
                (1 << bit, 0),
                (!(1 << bit), 16),
                (0x9e37_79b9_u32.rotate_left(bit), 16),
            ] {
                assert_eq!(
                    Neon::five_bits(&bytes, fifth, less),
                    Plain::five_bits(&bytes, fifth, less),
                    "{fifth:#x}"
                );
            }
        }
    }
}
