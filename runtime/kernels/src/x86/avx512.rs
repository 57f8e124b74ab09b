//! Products with AVX-512 and its 8-bit dot product.

use super::avx512_unpack::{self as unpack, Tile, Unpack};
use super::prefetch;
use crate::activations::{ActBlock, place, run_scale};
use crate::matmul::{Panel, PanelFn, PanelFns};
use crate::quant::TensorType;
use crate::quant::block::GROUP;
use std::arch::x86_64::*;

macro_rules! panel_fns {
    (float, $of:ty; $($n:literal)*) => {
        &[$(float::<$of, $n> as PanelFn),*]
    };
    (quantized, $of:ty; $($n:literal)*) => {
        &[$(quantized::<$of, $n, BY_SCALE> as PanelFn),*]
    };
}

/// The kernels of a type. With `BY_SCALE` all values that share a weight's and an activation's scale are added up as
/// integers, in the order of the tiles ([`super::amx`]); without it two lanes share them, which takes fewer instructions.
pub(crate) fn panels<const BY_SCALE: bool>(ty: TensorType) -> PanelFns {
    match ty {
        TensorType::F32 => panel_fns!(float, F32; 1 2 3 4),
        TensorType::F16 => panel_fns!(float, F16; 1 2 3 4),
        TensorType::BF16 => panel_fns!(float, Bf16; 1 2 3 4),
        TensorType::Q4_0 => panel_fns!(quantized, unpack::Q4_0; 1 2 3 4 5 6 7 8),
        TensorType::Q4_1 => panel_fns!(quantized, unpack::Q4_1; 1 2 3 4 5 6 7 8),
        TensorType::Q5_0 => panel_fns!(quantized, unpack::Q5_0; 1 2 3 4 5 6 7 8),
        TensorType::Q5_1 => panel_fns!(quantized, unpack::Q5_1; 1 2 3 4 5 6 7 8),
        TensorType::Q8_0 => panel_fns!(quantized, unpack::Q8_0; 1 2 3 4 5 6 7 8),
        TensorType::Q2_K => panel_fns!(quantized, unpack::Q2_K; 1 2 3 4 5 6 7 8),
        TensorType::Q3_K => panel_fns!(quantized, unpack::Q3_K; 1 2 3 4 5 6 7 8),
        TensorType::Q4_K => panel_fns!(quantized, unpack::Q4_K; 1 2 3 4 5 6 7 8),
        TensorType::Q5_K => panel_fns!(quantized, unpack::Q5_K; 1 2 3 4 5 6 7 8),
        TensorType::Q6_K => panel_fns!(quantized, unpack::Q6_K; 1 2 3 4 5 6 7 8),
        TensorType::IQ4_NL => panel_fns!(quantized, unpack::IQ4_NL; 1 2 3 4 5 6 7 8),
        TensorType::IQ4_XS => panel_fns!(quantized, unpack::IQ4_XS; 1 2 3 4 5 6 7 8),
        TensorType::MXFP4 => panel_fns!(quantized, unpack::MXFP4; 1 2 3 4 5 6 7 8),
        TensorType::IQ2_XXS => panel_fns!(quantized, unpack::IQ2_XXS; 1 2 3 4 5 6 7 8),
        TensorType::IQ2_XS => panel_fns!(quantized, unpack::IQ2_XS; 1 2 3 4 5 6 7 8),
        TensorType::IQ2_S => panel_fns!(quantized, unpack::IQ2_S; 1 2 3 4 5 6 7 8),
        TensorType::IQ3_XXS => panel_fns!(quantized, unpack::IQ3_XXS; 1 2 3 4 5 6 7 8),
        TensorType::IQ3_S => panel_fns!(quantized, unpack::IQ3_S; 1 2 3 4 5 6 7 8),
        TensorType::IQ1_S => panel_fns!(quantized, unpack::IQ1_S; 1 2 3 4 5 6 7 8),
        TensorType::IQ1_M => panel_fns!(quantized, unpack::IQ1_M; 1 2 3 4 5 6 7 8),
    }
}

/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn quantized<U: Unpack, const N: usize, const BY_SCALE: bool>(panel: &Panel<'_>) {
    /// The most bytes that 256 values have in a format of small blocks.
    const MOST: usize = 272;
    let cols = panel.x.cols();
    let (whole, rest) = (cols / GROUP, cols % GROUP);
    let groups = cols.div_ceil(GROUP);
    let x = panel.x.blocks();
    assert!(x.len() == N * groups && U::GROUP_BYTES <= MOST && panel.row_bytes >= whole * U::GROUP_BYTES);
    let x = x.as_ptr();
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        let mut acc = [[_mm512_setzero_ps(); 2]; N];
        let mut w = row.as_ptr();
        for g in 0..whole {
            prefetch(w, U::GROUP_BYTES);
            // SAFETY: the row has `whole` groups and each row of `x` has at least as many.
            unsafe {
                let tile = U::unpack(w);
                multiply::<U, N, BY_SCALE>(tile, x.add(g), groups, &mut acc);
                w = w.add(U::GROUP_BYTES);
            }
        }
        if rest > 0 {
            let mut padded = [0u8; MOST];
            let tail = &row[whole * U::GROUP_BYTES..];
            padded[..tail.len()].copy_from_slice(tail);
            // SAFETY: `padded` is a whole group, and the last blocks of `x` are filled up with zeros.
            unsafe {
                let tile = U::unpack(padded.as_ptr());
                multiply::<U, N, BY_SCALE>(tile, x.add(whole), groups, &mut acc);
            }
        }
        for (n, acc) in acc.into_iter().enumerate() {
            let both = _mm512_add_ps(acc[0], acc[1]);
            let sum =
                if BY_SCALE && !U::FINE { _mm512_mask_reduce_add_ps(EVEN, both) } else { _mm512_reduce_add_ps(both) };
            // SAFETY: the caller's output holds this element.
            unsafe { panel.out.put(n, panel.first_row + r, sum) };
        }
    }
}

/// The first lane of every run.
const EVEN: __mmask16 = 0x5555;

/// Writes what a block of activations holds of one run of 32 values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) fn quantize_run(run: usize, x: &[f32; 32], block: &mut ActBlock) {
    // SAFETY: two registers of 16 values.
    let x = unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))] };
    // Compared as bits: a NaN is the largest and ends up in the scale.
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let [low, high] = x.map(|x| _mm512_and_si512(_mm512_castps_si512(x), magnitude));
    let largest = _mm512_reduce_max_epu32(_mm512_max_epu32(low, high));
    let (scale, inverse) = run_scale(f32::from_bits(largest));
    for (half, x) in x.into_iter().enumerate() {
        let q = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
        let bytes = _mm512_cvtepi32_epi8(q);
        let eights = [_mm_cvtsi128_si64(bytes), _mm_extract_epi64::<1>(bytes)];
        for (i, eight) in eights.into_iter().enumerate() {
            let to = &mut block.q[8 * place(4 * run + 2 * half + i)..][..8];
            to.copy_from_slice(&eight.to_le_bytes().map(|b| b as i8));
        }
        block.sums[2 * run + half] = scale * _mm512_reduce_add_epi32(q) as f32;
    }
    block.scale[2 * run..][..2].fill(scale);
}

/// Adds the products of 256 weights with `N` tokens, the blocks of neighbouring tokens `stride` apart.
///
/// # Safety
/// The blocks can be read, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn multiply<U: Unpack, const N: usize, const BY_SCALE: bool>(
    tile: Tile,
    x: *const ActBlock,
    stride: usize,
    acc: &mut [[__m512; 2]; N],
) {
    let zero = _mm512_setzero_si512();
    let (first, second) = (_mm512_moveldup_ps(tile.scale), _mm512_movehdup_ps(tile.scale));
    for (n, acc) in acc.iter_mut().enumerate() {
        // SAFETY: the caller's blocks.
        let x = unsafe { &*x.add(n * stride) };
        // SAFETY: a block has four registers of values, one of scales and one of sums, and is aligned to them.
        let (q, scale, sums) = unsafe {
            let q = x.q.as_ptr().cast::<__m512i>();
            let q = [
                _mm512_load_si512(q),
                _mm512_load_si512(q.add(1)),
                _mm512_load_si512(q.add(2)),
                _mm512_load_si512(q.add(3)),
            ];
            (q, _mm512_load_ps(x.scale.as_ptr()), _mm512_load_ps(x.sums.as_ptr()))
        };
        let one = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, tile.q[0], q[0]), tile.q[1], q[1]);
        let two = if U::FINE { zero } else { one };
        let two = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(two, tile.q[2], q[2]), tile.q[3], q[3]);
        let (sum, sums) = match (BY_SCALE, U::FINE) {
            (false, true) => {
                let one = _mm512_mul_ps(_mm512_cvtepi32_ps(one), first);
                (_mm512_fmadd_ps(_mm512_cvtepi32_ps(two), second, one), sums)
            }
            (false, false) => (_mm512_mul_ps(_mm512_cvtepi32_ps(two), tile.scale), sums),
            (true, true) => {
                // The first sixteen of a run to its first lane, the second sixteen to its second lane.
                let low = _mm512_mask_shuffle_epi32::<0b10_10_00_00>(one, !EVEN, two);
                let high = _mm512_mask_shuffle_epi32::<0b11_11_01_01>(two, EVEN, one);
                (_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(low, high)), tile.scale), sums)
            }
            (true, false) => {
                let all = _mm512_add_epi32(two, _mm512_shuffle_epi32::<0b10_11_00_01>(two));
                let sums = _mm512_add_ps(sums, _mm512_permute_ps::<0b10_11_00_01>(sums));
                (_mm512_mul_ps(_mm512_cvtepi32_ps(all), tile.scale), sums)
            }
        };
        acc[0] = _mm512_fmadd_ps(sum, scale, acc[0]);
        acc[1] = _mm512_fnmadd_ps(tile.min, sums, acc[1]);
    }
}

/// A float format: sixteen values from their bytes.
trait Float {
    const BYTES: usize;

    /// # Safety
    /// Sixteen values can be read; the processor has AVX-512.
    unsafe fn load(p: *const u8) -> __m512;
}

struct F32;
struct F16;
struct Bf16;

impl Float for F32 {
    const BYTES: usize = 4;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn load(p: *const u8) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(p.cast()) }
    }
}

impl Float for F16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn load(p: *const u8) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
}

impl Float for Bf16 {
    const BYTES: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn load(p: *const u8) -> __m512 {
        // SAFETY: the caller's.
        let bits = unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    }
}

/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn float<W: Float, const N: usize>(panel: &Panel<'_>) {
    const STEP: usize = 32;
    let cols = panel.x.cols();
    let whole = cols - cols % STEP;
    // The last, shorter step, filled up with zeros.
    let mut tail = [[0.0f32; STEP]; N];
    for (n, tail) in tail.iter_mut().enumerate() {
        tail[..cols - whole].copy_from_slice(&panel.x.values()[n * cols + whole..(n + 1) * cols]);
    }
    let x = panel.x.values().as_ptr();
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        let mut acc = [[_mm512_setzero_ps(); 2]; N];
        let mut c = 0;
        while c < whole {
            // SAFETY: a step is left in the row and in each of the `N` rows of `x`.
            unsafe {
                let p = row.as_ptr().add(c * W::BYTES);
                prefetch(p, STEP * W::BYTES);
                let (w0, w1) = (W::load(p), W::load(p.add(16 * W::BYTES)));
                for (n, acc) in acc.iter_mut().enumerate() {
                    let x = x.add(n * cols + c);
                    acc[0] = _mm512_fmadd_ps(w0, _mm512_loadu_ps(x), acc[0]);
                    acc[1] = _mm512_fmadd_ps(w1, _mm512_loadu_ps(x.add(16)), acc[1]);
                }
            }
            c += STEP;
        }
        if whole < cols {
            let mut bytes = [0u8; STEP * 4];
            bytes[..(cols - whole) * W::BYTES].copy_from_slice(&row[whole * W::BYTES..]);
            // SAFETY: the buffers hold a step.
            unsafe {
                let (w0, w1) = (W::load(bytes.as_ptr()), W::load(bytes.as_ptr().add(16 * W::BYTES)));
                for (acc, x) in acc.iter_mut().zip(&tail) {
                    acc[0] = _mm512_fmadd_ps(w0, _mm512_loadu_ps(x.as_ptr()), acc[0]);
                    acc[1] = _mm512_fmadd_ps(w1, _mm512_loadu_ps(x.as_ptr().add(16)), acc[1]);
                }
            }
        }
        for (n, acc) in acc.into_iter().enumerate() {
            let sum = _mm512_reduce_add_ps(_mm512_add_ps(acc[0], acc[1]));
            // SAFETY: the caller's output holds this element.
            unsafe { panel.out.put(n, panel.first_row + r, sum) };
        }
    }
}
