//! Products with AVX2: the plain unpacking compiled for it, and a dot product of its own.

use super::prefetch;
use crate::activations::ActBlock;
use crate::matmul::{Panel, PanelFn, PanelFns};
use crate::quant::block::{Codes, Format, GROUP, Steps};
use crate::quant::{TensorType, with_format};
use std::arch::x86_64::*;

macro_rules! panel_fns {
    ($kernel:ident, $of:ty) => {{
        const PANELS: &[PanelFn] = &[$kernel::<$of, 1>, $kernel::<$of, 2>, $kernel::<$of, 3>, $kernel::<$of, 4>];
        PANELS
    }};
}

/// The kernels of a type.
pub(crate) fn panels(ty: TensorType) -> PanelFns {
    with_format!(ty, F => panel_fns!(quantized, F), float => match ty {
        TensorType::F32 => panel_fns!(float, F32),
        TensorType::F16 => panel_fns!(float, F16),
        _ => panel_fns!(float, Bf16),
    })
}

/// The steps of unpacking with AVX2 and F16C. Only kernels that are compiled for these name this type.
struct Avx2;

impl Steps for Avx2 {
    #[inline(always)]
    fn f16(bits: u16) -> f32 {
        // SAFETY: only code that runs where the instruction is present names this type.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    }

    #[inline(always)]
    fn five_bits(bytes: &[u8; 16], fifth: u32, less: i8) -> [i8; 32] {
        const EACH: i64 = 0x0101_0101_0101_0101;
        // SAFETY: as above; a register is 32 bytes.
        unsafe {
            let spread = _mm256_setr_epi64x(0, EACH, 2 * EACH, 3 * EACH);
            let one_each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let bits = _mm256_shuffle_epi8(_mm256_set1_epi32(fifth as i32), spread);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, one_each), one_each);
            let low = _mm_loadu_si128(bytes.as_ptr().cast());
            let both = _mm256_set_m128i(_mm_srli_epi16::<4>(low), low);
            let codes = _mm256_and_si256(both, _mm256_set1_epi8(15));
            let codes = _mm256_or_si256(codes, _mm256_and_si256(set, _mm256_set1_epi8(16)));
            std::mem::transmute::<__m256i, [i8; 32]>(_mm256_sub_epi8(codes, _mm256_set1_epi8(less)))
        }
    }
}

/// The sum of eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn sum(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantized<F: Format, const N: usize>(panel: &Panel<'_>) {
    let groups = panel.x.cols().div_ceil(GROUP);
    let group_bytes = GROUP / F::TYPE.block_len() * F::TYPE.block_bytes();
    let x = panel.x.blocks();
    let mut codes = Codes::ZERO;
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        let mut acc = [_mm256_setzero_ps(); N];
        for (g, bytes) in row.chunks(group_bytes).enumerate() {
            prefetch(bytes.as_ptr(), group_bytes);
            F::unpack_group::<Avx2>(bytes, &mut codes);
            let mut blocks = [&x[g]; N];
            for (n, block) in blocks.iter_mut().enumerate() {
                *block = &x[n * groups + g];
            }
            multiply::<F, N>(&codes, blocks, &mut acc);
        }
        for (n, acc) in acc.into_iter().enumerate() {
            // SAFETY: the caller's output holds this element.
            unsafe { panel.out.put(n, panel.first_row + r, sum(acc)) };
        }
    }
}

/// Adds the products of 256 weights with `N` tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<F: Format, const N: usize>(codes: &Codes, x: [&ActBlock; N], acc: &mut [__m256; N]) {
    for four in 0..2 {
        // Four runs of 32 values: their eights side by side, as the activations have them.
        let [w0, w1] = eights::<F>(codes, 4 * four, 0);
        let [w2, w3] = eights::<F>(codes, 4 * four, 16);
        let scale = load8(&codes.scale, 8 * four);
        let (first, second) = (_mm256_moveldup_ps(scale), _mm256_movehdup_ps(scale));
        for n in 0..N {
            let x_scale = load8(&x[n].scale, 8 * four);
            let p0 = products::<F>(w0, load32(&x[n].q, 32 * four));
            let p1 = products::<F>(w1, load32(&x[n].q, 64 + 32 * four));
            let p2 = products::<F>(w2, load32(&x[n].q, 128 + 32 * four));
            let p3 = products::<F>(w3, load32(&x[n].q, 192 + 32 * four));
            let (one, two) = if 4 * PAIR * F::LARGEST <= MOST && !F::FINE {
                let all = _mm256_add_epi16(_mm256_add_epi16(p0, p1), _mm256_add_epi16(p2, p3));
                (widened(all), _mm256_setzero_si256())
            } else if 2 * PAIR * F::LARGEST <= MOST {
                (widened(_mm256_add_epi16(p0, p1)), widened(_mm256_add_epi16(p2, p3)))
            } else {
                (_mm256_add_epi32(widened(p0), widened(p1)), _mm256_add_epi32(widened(p2), widened(p3)))
            };
            let sum = if F::FINE {
                let one = _mm256_mul_ps(_mm256_cvtepi32_ps(one), first);
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(two), second, one)
            } else {
                _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(one, two)), scale)
            };
            acc[n] = _mm256_fmadd_ps(sum, x_scale, acc[n]);
            if F::HAS_MIN {
                acc[n] = _mm256_fnmadd_ps(load8(&codes.min, 8 * four), load8(&x[n].sums, 8 * four), acc[n]);
            }
        }
    }
}

/// The most that a sum in 16 bits holds.
const MOST: i32 = i16::MAX as i32;

/// The most that two products of a code of magnitude 1 with activations come to.
const PAIR: i32 = 2 * 127;

/// Sums of two neighbouring products, in 16 bits: at most 128 times [`PAIR`], which fits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products<F: Format>(w: __m256i, x: __m256i) -> __m256i {
    if F::SIGNED {
        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
    } else {
        _mm256_maddubs_epi16(w, x)
    }
}

/// Sums of neighbours, in 32 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widened(pairs: __m256i) -> __m256i {
    _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
}

/// Two eights each of four runs: those at `at` of every run, and those 8 further.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eights<F: Format>(codes: &Codes, run: usize, at: usize) -> [__m256i; 2] {
    let sixteen = |run: usize| &codes.q[32 * run + at..][..16];
    let (r0, r1, r2, r3) = (sixteen(run), sixteen(run + 1), sixteen(run + 2), sixteen(run + 3));
    // SAFETY: all slices are 16 bytes.
    let (mut even, mut odd) = unsafe {
        let even = _mm256_loadu2_m128i(r2.as_ptr().cast(), r0.as_ptr().cast());
        (even, _mm256_loadu2_m128i(r3.as_ptr().cast(), r1.as_ptr().cast()))
    };
    if let Some(levels) = F::LEVELS {
        // SAFETY: sixteen bytes.
        let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(levels.as_ptr().cast()) });
        (even, odd) = (_mm256_shuffle_epi8(table, even), _mm256_shuffle_epi8(table, odd));
    }
    [_mm256_unpacklo_epi64(even, odd), _mm256_unpackhi_epi64(even, odd)]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load32(q: &[i8; GROUP], at: usize) -> __m256i {
    let part = &q[at..][..32];
    // SAFETY: the slice is 32 bytes.
    unsafe { _mm256_loadu_si256(part.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load8(values: &[f32], at: usize) -> __m256 {
    let part = &values[at..][..8];
    // SAFETY: the slice is eight values.
    unsafe { _mm256_loadu_ps(part.as_ptr()) }
}

/// A float format: eight values from their bytes.
trait Float {
    const BYTES: usize;

    /// # Safety
    /// Eight values can be read; the processor has AVX2 and F16C.
    unsafe fn load(p: *const u8) -> __m256;
}

struct F32;
struct F16;
struct Bf16;

impl Float for F32 {
    const BYTES: usize = 4;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(p.cast()) }
    }
}

impl Float for F16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
}

impl Float for Bf16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(p: *const u8) -> __m256 {
        // SAFETY: the caller's.
        let bits = unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
}

/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn float<W: Float, const N: usize>(panel: &Panel<'_>) {
    const STEP: usize = 16;
    let cols = panel.x.cols();
    let whole = cols - cols % STEP;
    // The last, shorter step, filled up with zeros.
    let mut tail = [[0.0f32; STEP]; N];
    for (n, tail) in tail.iter_mut().enumerate() {
        tail[..cols - whole].copy_from_slice(&panel.x.values()[n * cols + whole..(n + 1) * cols]);
    }
    let x = panel.x.values().as_ptr();
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        let mut acc = [[_mm256_setzero_ps(); 2]; N];
        let mut c = 0;
        while c < whole {
            // SAFETY: a step is left in the row and in each of the `N` rows of `x`.
            unsafe {
                let p = row.as_ptr().add(c * W::BYTES);
                prefetch(p, STEP * W::BYTES);
                let (w0, w1) = (W::load(p), W::load(p.add(8 * W::BYTES)));
                for (n, acc) in acc.iter_mut().enumerate() {
                    let x = x.add(n * cols + c);
                    acc[0] = _mm256_fmadd_ps(w0, _mm256_loadu_ps(x), acc[0]);
                    acc[1] = _mm256_fmadd_ps(w1, _mm256_loadu_ps(x.add(8)), acc[1]);
                }
            }
            c += STEP;
        }
        if whole < cols {
            let mut bytes = [0u8; STEP * 4];
            bytes[..(cols - whole) * W::BYTES].copy_from_slice(&row[whole * W::BYTES..]);
            // SAFETY: the buffers hold a step.
            unsafe {
                let (w0, w1) = (W::load(bytes.as_ptr()), W::load(bytes.as_ptr().add(8 * W::BYTES)));
                for (acc, x) in acc.iter_mut().zip(&tail) {
                    acc[0] = _mm256_fmadd_ps(w0, _mm256_loadu_ps(x.as_ptr()), acc[0]);
                    acc[1] = _mm256_fmadd_ps(w1, _mm256_loadu_ps(x.as_ptr().add(8)), acc[1]);
                }
            }
        }
        for (n, acc) in acc.into_iter().enumerate() {
            // SAFETY: the caller's output holds this element.
            unsafe { panel.out.put(n, panel.first_row + r, sum(_mm256_add_ps(acc[0], acc[1]))) };
        }
    }
}
