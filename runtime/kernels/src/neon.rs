//! Products with NEON and its `dotprod` extension: the plain unpacking compiled for it, and a dot product of its own.
//!
//! The order of the values is that of `x86::avx2`, in registers of half the width: one holds eight values each of two
//! runs of 32, so that the four lanes of their products stand under the four scales of those runs.
//!
//! Only the products are here. The operations between them and what attention does with stored rows run the plain code,
//! which every AArch64 compiler turns into NEON by itself. Nothing is asked into the caches ahead: no processor of this
//! kind has been measured.

use super::activations::ActBlock;
use super::matmul::{Panel, PanelFn, PanelFns};
use crate::quant::block::{Codes, Format, GROUP, Steps};
use crate::quant::{TensorType, with_format};
use std::arch::aarch64::*;
use std::arch::asm;

macro_rules! panel_fns {
    ($kernel:ident, $of:ty) => {{
        const PANELS: &[PanelFn] = &[$kernel::<$of, 1>, $kernel::<$of, 2>, $kernel::<$of, 3>, $kernel::<$of, 4>];
        PANELS
    }};
}

/// The kernels of a type.
pub(super) fn panels(ty: TensorType) -> PanelFns {
    with_format!(ty, F => panel_fns!(quantized, F), float => match ty {
        TensorType::F32 => panel_fns!(float, F32),
        TensorType::F16 => panel_fns!(float, F16),
        _ => panel_fns!(float, Bf16),
    })
}

/// The steps of unpacking with NEON.
struct Neon;

impl Steps for Neon {
    #[inline(always)]
    fn f16(bits: u16) -> f32 {
        // SAFETY: every AArch64 processor that this is compiled for has NEON.
        unsafe { vgetq_lane_f32::<0>(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits)))) }
    }

    #[inline(always)]
    fn five_bits(bytes: &[u8; 16], fifth: u32, less: i8) -> [i8; 32] {
        const BIT: u64 = 0x8040_2010_0804_0201;
        const EACH: u64 = 0x0101_0101_0101_0101;
        let mut out = [0; 32];
        // SAFETY: as above; sixteen bytes are read, and each half of `out` is sixteen.
        unsafe {
            let low = vld1q_u8(bytes.as_ptr());
            let fifth = vreinterpretq_u8_u32(vdupq_n_u32(fifth));
            let one_each = vreinterpretq_u8_u64(vdupq_n_u64(BIT));
            for (half, codes) in [vandq_u8(low, vdupq_n_u8(15)), vshrq_n_u8::<4>(low)].into_iter().enumerate() {
                // Every bit's byte, eight times.
                let first = 2 * half as u64 * EACH;
                let spread = vreinterpretq_u8_u64(vcombine_u64(vcreate_u64(first), vcreate_u64(first + EACH)));
                let set = vtstq_u8(vqtbl1q_u8(fifth, spread), one_each);
                let codes = vorrq_u8(codes, vandq_u8(set, vdupq_n_u8(16)));
                let codes = vsubq_s8(vreinterpretq_s8_u8(codes), vdupq_n_s8(less));
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
    // The intrinsic is not stable yet.
    // SAFETY: the function is compiled for the extension that has the instruction, which reads and writes nothing else.
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

/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn quantized<F: Format, const N: usize>(panel: &Panel<'_>) {
    let groups = panel.x.cols().div_ceil(GROUP);
    let group_bytes = GROUP / F::TYPE.block_len() * F::TYPE.block_bytes();
    let x = panel.x.blocks();
    let mut codes = Codes::ZERO;
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        let mut acc = [vdupq_n_f32(0.0); N];
        for (g, bytes) in row.chunks(group_bytes).enumerate() {
            F::unpack_group::<Neon>(bytes, &mut codes);
            let mut blocks = [&x[g]; N];
            for (n, block) in blocks.iter_mut().enumerate() {
                *block = &x[n * groups + g];
            }
            multiply::<F, N>(&codes, blocks, &mut acc);
        }
        for (n, acc) in acc.into_iter().enumerate() {
            // SAFETY: the caller's output holds this element.
            unsafe { panel.out.put(n, panel.first_row + r, vaddvq_f32(acc)) };
        }
    }
}

/// Adds the products of 256 weights with `N` tokens.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn multiply<F: Format, const N: usize>(codes: &Codes, x: [&ActBlock; N], acc: &mut [float32x4_t; N]) {
    for two in 0..4 {
        // Two runs of 32 values: their eights side by side, as the activations have them.
        let [w0, w1] = eights::<F>(codes, 2 * two, 0);
        let [w2, w3] = eights::<F>(codes, 2 * two, 16);
        let scale = load4(&codes.scale, 4 * two);
        let (first, second) = (vtrn1q_f32(scale, scale), vtrn2q_f32(scale, scale));
        for n in 0..N {
            let x_scale = load4(&x[n].scale, 4 * two);
            let [x0, x1, x2, x3] = [0, 64, 128, 192].map(|at| load16(&x[n].q, at + 16 * two));
            let one = dot(dot(vdupq_n_s32(0), w0, x0), w1, x1);
            let sum = if F::FINE {
                let two = dot(dot(vdupq_n_s32(0), w2, x2), w3, x3);
                vfmaq_f32(vmulq_f32(vcvtq_f32_s32(one), first), vcvtq_f32_s32(two), second)
            } else {
                vmulq_f32(vcvtq_f32_s32(dot(dot(one, w2, x2), w3, x3)), scale)
            };
            acc[n] = vfmaq_f32(acc[n], sum, x_scale);
            if F::HAS_MIN {
                acc[n] = vfmsq_f32(acc[n], load4(&codes.min, 4 * two), load4(&x[n].sums, 4 * two));
            }
        }
    }
}

/// Two eights each of two runs: those at `at` of both runs, and those 8 further.
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
    [vreinterpretq_s8_s64(vzip1q_s64(even, odd)), vreinterpretq_s8_s64(vzip2q_s64(even, odd))]
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn load16(q: &[i8; GROUP], at: usize) -> int8x16_t {
    let part = &q[at..][..16];
    // SAFETY: the slice is 16 bytes.
    unsafe { vld1q_s8(part.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn load4(values: &[f32], at: usize) -> float32x4_t {
    let part = &values[at..][..4];
    // SAFETY: the slice is four values.
    unsafe { vld1q_f32(part.as_ptr()) }
}

/// A float format: eight values from their bytes, wherever these begin.
trait Float {
    const BYTES: usize;

    /// # Safety
    /// Eight values can be read.
    unsafe fn load(p: *const u8) -> [float32x4_t; 2];
}

struct F32;
struct F16;
struct Bf16;

impl Float for F32 {
    const BYTES: usize = 4;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(p: *const u8) -> [float32x4_t; 2] {
        // SAFETY: the caller's.
        unsafe { [vreinterpretq_f32_u8(vld1q_u8(p)), vreinterpretq_f32_u8(vld1q_u8(p.add(16)))] }
    }
}

impl Float for F16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(p: *const u8) -> [float32x4_t; 2] {
        // SAFETY: the caller's.
        let half = vreinterpretq_f16_u8(unsafe { vld1q_u8(p) });
        [vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)]
    }
}

impl Float for Bf16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(p: *const u8) -> [float32x4_t; 2] {
        // SAFETY: the caller's.
        let bits = vreinterpretq_u16_u8(unsafe { vld1q_u8(p) });
        let (low, high) = (vshll_n_u16::<16>(vget_low_u16(bits)), vshll_high_n_u16::<16>(bits));
        [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
    }
}

/// Values that the products of floats take at a time.
const STEP: usize = 16;

/// Adds the products of [`STEP`] weights with as many values, lane by lane.
///
/// # Safety
/// [`STEP`] values can be read at `x`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn add_step(acc: &mut [float32x4_t; STEP / 4], w: [[float32x4_t; 2]; 2], x: *const f32) {
    for (i, acc) in acc.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *acc = vfmaq_f32(*acc, w[i / 2][i % 2], unsafe { vld1q_f32(x.add(4 * i)) });
    }
}

/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "neon,dotprod")]
unsafe fn float<W: Float, const N: usize>(panel: &Panel<'_>) {
    let cols = panel.x.cols();
    let whole = cols - cols % STEP;
    // The last, shorter step, filled up with zeros.
    let mut tail = [[0.0f32; STEP]; N];
    for (n, tail) in tail.iter_mut().enumerate() {
        tail[..cols - whole].copy_from_slice(&panel.x.values()[n * cols + whole..(n + 1) * cols]);
    }
    let x = panel.x.values().as_ptr();
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        let mut acc = [[vdupq_n_f32(0.0); STEP / 4]; N];
        let mut c = 0;
        while c < whole {
            // SAFETY: a step is left in the row and in each of the `N` rows of `x`.
            unsafe {
                let p = row.as_ptr().add(c * W::BYTES);
                let w = [W::load(p), W::load(p.add(8 * W::BYTES))];
                for (n, acc) in acc.iter_mut().enumerate() {
                    add_step(acc, w, x.add(n * cols + c));
                }
            }
            c += STEP;
        }
        if whole < cols {
            let mut bytes = [0u8; STEP * 4];
            bytes[..(cols - whole) * W::BYTES].copy_from_slice(&row[whole * W::BYTES..]);
            // SAFETY: the buffers hold a step.
            unsafe {
                let w = [W::load(bytes.as_ptr()), W::load(bytes.as_ptr().add(8 * W::BYTES))];
                for (acc, x) in acc.iter_mut().zip(&tail) {
                    add_step(acc, w, x.as_ptr());
                }
            }
        }
        for (n, [a, b, c, d]) in acc.into_iter().enumerate() {
            let sum = vaddvq_f32(vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d)));
            // SAFETY: the caller's output holds this element.
            unsafe { panel.out.put(n, panel.first_row + r, sum) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Neon;
    use crate::quant::block::{Plain, Steps};

    #[test]
    fn every_half_float_widens_as_in_plain_code() {
        for bits in 0..=u16::MAX {
            let (got, want) = (Neon::f16(bits), Plain::f16(bits));
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}: {got} {want}");
        }
    }

    #[test]
    fn fifth_bits_join_as_in_plain_code() {
        let bytes = std::array::from_fn(|i| (i * 37 + 11) as u8);
        for bit in 0..32 {
            for (fifth, less) in [(1 << bit, 0), (!(1 << bit), 16), (0x9e37_79b9_u32.rotate_left(bit), 16)] {
                assert_eq!(Neon::five_bits(&bytes, fifth, less), Plain::five_bits(&bytes, fifth, less), "{fifth:#x}");
            }
        }
    }
}
