//! Matmul kernels for AVX2: the scalar unpacking compiled for it, and a dot product of its own.
//! Types that have bands are multiplied by [`bands`](super::bands) instead.
//!
//! The loop over rows and groups is [`quantized_panel`], which calls [`add_block`] with 256
//! unpacked weights in the order of the row. It brings them into the order of the activations
//! (`activations`), four runs at a time:
//!
//! ```text
//! for each four runs (half of the group):
//!     w[0..4] = eights 0, 1, 2, 3 of the four runs, side by side          # 32 bytes each
//!     for each token n:
//!         p[k] = maddubs(|w[k]|, x[n][k] with the sign of w[k])   # 16 sums of 2 products, 16 bits
//!         sum  = add over k, and widen to 8 sums in 32 bits               # two lanes per run
//!         acc[n] += float(sum) * weight scales * x scales
//! ```
//!
//! # Why 16-bit sums cannot overflow
//!
//! `maddubs` multiplies unsigned by signed bytes and adds neighbors in 16 bits, saturating.
//! Activation codes are within -127 to 127, and the codes of these formats have magnitudes of at most
//! 12 (NVFP4). So the four pair sums of a run are at most `4 * 12 * 2 * 127 = 12192`, below 2^15, and
//! are added before they are widened to 32 bits. A format with a scale per 16 values (NVFP4) keeps the
//! first two eights of a run apart from the last two.
//!
//! A negative code cannot be the unsigned operand: its sign moves to the activation (`sign`), whose
//! negative always fits, since it is never -128.

use super::lanes::sum_of_8;
use super::prefetch;
use crate::activations::ActBlock;
use crate::float_panel::{Bf16, F16, F32, FloatFormat, float_panel};
use crate::panel::{BlockDot, Panel, PanelFn, PanelFns, quantized_panel};
use crate::quant::block::{Codes, Format, GROUP, UnpackOps};
use crate::quant::{TensorType, with_format};
use std::arch::x86_64::*;

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
pub(crate) fn panels(ty: TensorType) -> PanelFns {
    with_format!(ty, F => const {
        match crate::bands::layout(F::TYPE) {
            None => panel_fns!(quantized, F),
            Some(_) => &[],
        }
    }, float => match ty {
        TensorType::F32 => panel_fns!(float, F32),
        TensorType::F16 => panel_fns!(float, F16),
        _ => panel_fns!(float, Bf16),
    })
}

/// Unpacking and dot products with AVX2. Only kernels that are compiled for AVX2 and F16C name
/// this type.
struct Avx2;

impl UnpackOps for Avx2 {
    #[inline(always)]
    fn f16(bits: u16) -> f32 {
        // SAFETY: only code that runs where the instruction is present names this type.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    }

    #[inline(always)]
    fn five_bits(bytes: &[u8; 16], fifth: u32, offset: i8) -> [i8; 32] {
        const EACH: i64 = 0x0101_0101_0101_0101;
        // SAFETY: only code that runs where the instructions are present names this type; a
        // register is 32 bytes.
        unsafe {
            let spread = _mm256_setr_epi64x(0, EACH, 2 * EACH, 3 * EACH);
            let one_each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let bits = _mm256_shuffle_epi8(_mm256_set1_epi32(fifth as i32), spread);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, one_each), one_each);
            let low = _mm_loadu_si128(bytes.as_ptr().cast());
            let both = _mm256_set_m128i(_mm_srli_epi16::<4>(low), low);
            let codes = _mm256_and_si256(both, _mm256_set1_epi8(15));
            let codes = _mm256_or_si256(codes, _mm256_and_si256(set, _mm256_set1_epi8(16)));
            std::mem::transmute::<__m256i, [i8; 32]>(_mm256_sub_epi8(
                codes,
                _mm256_set1_epi8(offset),
            ))
        }
    }
}

impl BlockDot for Avx2 {
    type Ops = Avx2;
    type Acc = __m256;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the caller's processor.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn add_block<F: Format, const N: usize>(
        codes: &Codes,
        x: [&ActBlock; N],
        acc: &mut [__m256; N],
    ) {
        // SAFETY: the caller's processor.
        unsafe { add_block::<F, N>(codes, x, acc) }
    }

    #[inline(always)]
    unsafe fn sum(acc: __m256) -> f32 {
        // SAFETY: the caller's processor.
        unsafe { sum_of_8(acc) }
    }

    #[inline(always)]
    fn prefetch(p: *const u8, bytes: usize) {
        prefetch(p, bytes);
    }
}

/// Computes a panel of a quantized format.
///
/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantized<F: Format, const N: usize>(panel: &Panel<'_>) {
    // SAFETY: the caller's panel.
    unsafe { quantized_panel::<Avx2, F, N>(panel) }
}

/// Computes a panel of a float format.
///
/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float<W: FloatFormat, const N: usize>(panel: &Panel<'_>) {
    // SAFETY: the caller's panel.
    unsafe { float_panel::<__m256, W, N>(panel) }
}

/// Adds the dot products of 256 weights with `N` tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_block<F: Format, const N: usize>(codes: &Codes, x: [&ActBlock; N], acc: &mut [__m256; N]) {
    const {
        assert!(
            4 * MAX_PAIR_SUM * F::MAX_CODE <= i16::MAX as i32 && !F::HAS_MIN,
            "a run's sums fit 16 bits, and there is no minimum"
        )
    };
    for four in 0..2 {
        // Eights of four runs, side by side as the activations have them.
        let [w0, w1] = eights::<F>(codes, 4 * four, 0);
        let [w2, w3] = eights::<F>(codes, 4 * four, 16);
        let scale = load8(&codes.scale, 8 * four);
        for n in 0..N {
            let p0 = pair_sums::<F>(w0, load32(&x[n].q, 32 * four));
            let p1 = pair_sums::<F>(w1, load32(&x[n].q, 64 + 32 * four));
            let p2 = pair_sums::<F>(w2, load32(&x[n].q, 128 + 32 * four));
            let p3 = pair_sums::<F>(w3, load32(&x[n].q, 192 + 32 * four));
            let (first, second) = (_mm256_add_epi16(p0, p1), _mm256_add_epi16(p2, p3));
            let sum = if F::SCALE_PER_16 {
                let first = _mm256_mul_ps(floats(first), _mm256_moveldup_ps(scale));
                _mm256_fmadd_ps(floats(second), _mm256_movehdup_ps(scale), first)
            } else {
                _mm256_mul_ps(floats(_mm256_add_epi16(first, second)), scale)
            };
            acc[n] = _mm256_fmadd_ps(sum, load8(&x[n].scale, 8 * four), acc[n]);
        }
    }
}

/// Largest sum of two products of activations with codes of magnitude 1.
const MAX_PAIR_SUM: i32 = 2 * 127;

/// Returns the sums of two neighboring products, in 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pair_sums<F: Format>(w: __m256i, x: __m256i) -> __m256i {
    if F::SIGNED {
        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
    } else {
        _mm256_maddubs_epi16(w, x)
    }
}

/// Adds neighboring 16-bit sums, and converts what they give.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn floats(pairs: __m256i) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// Returns two eights of each of four runs: those at `at` of every run, and the next ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eights<F: Format>(codes: &Codes, run: usize, at: usize) -> [__m256i; 2] {
    let sixteen = |run: usize| &codes.q[32 * run + at..][..16];
    let (r0, r1, r2, r3) = (
        sixteen(run),
        sixteen(run + 1),
        sixteen(run + 2),
        sixteen(run + 3),
    );
    // SAFETY: all slices are 16 bytes.
    let (mut even, mut odd) = unsafe {
        let even = _mm256_loadu2_m128i(r2.as_ptr().cast(), r0.as_ptr().cast());
        (
            even,
            _mm256_loadu2_m128i(r3.as_ptr().cast(), r1.as_ptr().cast()),
        )
    };
    if let Some(levels) = F::LEVELS {
        // SAFETY: sixteen bytes.
        let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(levels.as_ptr().cast()) });
        (even, odd) = (
            _mm256_shuffle_epi8(table, even),
            _mm256_shuffle_epi8(table, odd),
        );
    }
    [
        _mm256_unpacklo_epi64(even, odd),
        _mm256_unpackhi_epi64(even, odd),
    ]
}

/// Loads 32 codes from `at` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load32(q: &[i8; GROUP], at: usize) -> __m256i {
    let part = &q[at..][..32];
    // SAFETY: the slice is 32 bytes.
    unsafe { _mm256_loadu_si256(part.as_ptr().cast()) }
}

/// Loads eight floats from `at` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load8(values: &[f32], at: usize) -> __m256 {
    let part = &values[at..][..8];
    // SAFETY: the slice is eight values.
    unsafe { _mm256_loadu_ps(part.as_ptr()) }
}
