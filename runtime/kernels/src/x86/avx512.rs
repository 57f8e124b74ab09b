//! Matmul kernels for AVX-512 with VNNI, the 8-bit dot product, of the formats that are not computed
//! in `bands`.
//!
//! 256 weights are unpacked straight into four registers in the order of the activations
//! (`avx512_unpack`), and multiplied from there with up to 8 tokens:
//!
//! ```text
//! for each weight row:
//!     for each group of 256 values:
//!         tile = unpack(group)                  # 4 registers of codes, 1 of scales, 1 of minimums
//!         for each token n:
//!             dot  = dpbusd(dpbusd(0, tile.q[0], x.q[0]), tile.q[1], x.q[1]) ... # 2 lanes/run
//!             acc[n][0] += float(dot) * tile.scale * x.scale
//!             acc[n][1] -= tile.min * x.sums
//!     out[n] = sum of the lanes of acc[n][0] + acc[n][1]
//! ```
//!
//! `dpbusd` multiplies unsigned by signed bytes and adds four products to a 32-bit lane without
//! saturation. A lane gets at most 16 products of 255 * 127, so nothing can overflow. Its left
//! operand is unsigned: see `avx512_unpack` for the offset that makes codes so.
//!
//! # `BY_SCALE`
//!
//! Two lanes have the products of a run. They can be multiplied by the (equal) scales one by one,
//! or be added as integers first. The first takes fewer instructions; the second is what AMX tiles
//! do, since a tile product adds up everything that shares a scale. The two differ in rounding.
//! Where AMX is used, `BY_SCALE` makes these kernels add in its order, so that a token has the same
//! bits whether a tile or a leftover kernel computed it.

use super::avx512_unpack::{self as unpack, MAX_GROUP_BYTES, Tile, Unpack};
use super::prefetch;
use crate::activations::{ActBlock, OFFSET_BITS, RUN_OFFSET_BITS, place, run_scale};
use crate::float_panel::{Bf16, F16, F32, FloatFormat, float_panel};
use crate::panel::{Panel, PanelFn, PanelFns};
use crate::quant::TensorType;
use crate::quant::block::GROUP;
use std::arch::x86_64::*;

/// Lists the instances of a kernel for the given numbers of tokens.
macro_rules! panel_fns {
    (float, $of:ty; $($n:literal)*) => {
        &[$(float::<$of, $n> as PanelFn),*]
    };
    (quantized, $of:ty; $($n:literal)*) => {
        &[$(quantized::<$of, $n, BY_SCALE> as PanelFn),*]
    };
}

/// Returns the kernels of a type, for 1, 2, ... tokens. `BY_SCALE` gives the order of sums of the
/// AMX kernels.
pub(crate) fn panels<const BY_SCALE: bool>(ty: TensorType) -> PanelFns {
    match ty {
        TensorType::F32 => panel_fns!(float, F32; 1 2 3 4),
        TensorType::F16 => panel_fns!(float, F16; 1 2 3 4),
        TensorType::BF16 => panel_fns!(float, Bf16; 1 2 3 4),
        // Computed in `bands`.
        TensorType::Q4_0
        | TensorType::Q4_1
        | TensorType::Q5_0
        | TensorType::Q5_1
        | TensorType::Q8_0
        | TensorType::Q2_K
        | TensorType::Q3_K
        | TensorType::Q4_K
        | TensorType::Q5_K
        | TensorType::Q6_K
        | TensorType::IQ4_NL
        | TensorType::IQ4_XS
        | TensorType::MXFP4
        | TensorType::IQ1_S
        | TensorType::IQ1_M
        | TensorType::IQ2_XXS
        | TensorType::IQ2_XS
        | TensorType::IQ2_S
        | TensorType::IQ3_XXS
        | TensorType::IQ3_S => &[],
        // `Weights` has none of these.
        TensorType::I8 | TensorType::I16 | TensorType::I32 | TensorType::I64 | TensorType::F64 => {
            &[]
        }
        TensorType::Q1_0 => panel_fns!(quantized, unpack::Q1_0; 1 2 3 4 5 6 7 8),
        TensorType::Q2_0 => panel_fns!(quantized, unpack::Q2_0; 1 2 3 4 5 6 7 8),
        TensorType::TQ1_0 => panel_fns!(quantized, unpack::TQ1_0; 1 2 3 4 5 6 7 8),
        TensorType::TQ2_0 => panel_fns!(quantized, unpack::TQ2_0; 1 2 3 4 5 6 7 8),
        TensorType::NVFP4 => panel_fns!(quantized, unpack::NVFP4; 1 2 3 4 5 6 7 8),
    }
}

/// Computes a panel of a quantized format.
///
/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn quantized<U: Unpack, const N: usize, const BY_SCALE: bool>(panel: &Panel<'_>) {
    let cols = panel.x.cols();
    let (whole, rest) = (cols / GROUP, cols % GROUP);
    let groups = cols.div_ceil(GROUP);
    let x = panel.x.blocks();
    assert!(
        x.len() == N * groups
            && U::GROUP_BYTES <= MAX_GROUP_BYTES
            && panel.row_bytes >= whole * U::GROUP_BYTES
    );
    let x = x.as_ptr();
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        let mut acc = [[_mm512_setzero_ps(); 2]; N];
        let mut w = row.as_ptr();
        for g in 0..whole {
            prefetch(w, U::GROUP_BYTES);
            // SAFETY: the row has `whole` groups and each row of `x` has at least as many.
            unsafe {
                let tile = U::unpack(w);
                add_tile::<U, N, BY_SCALE>(tile, x.add(g), groups, &mut acc);
                w = w.add(U::GROUP_BYTES);
            }
        }
        if rest > 0 {
            let mut padded = [0u8; MAX_GROUP_BYTES];
            let tail = &row[whole * U::GROUP_BYTES..];
            padded[..tail.len()].copy_from_slice(tail);
            // SAFETY: `padded` is a whole group, and the last blocks of `x` are filled up with
            // zeros.
            unsafe {
                let tile = U::unpack(padded.as_ptr());
                add_tile::<U, N, BY_SCALE>(tile, x.add(whole), groups, &mut acc);
            }
        }
        for (n, acc) in acc.into_iter().enumerate() {
            let both = _mm512_add_ps(acc[0], acc[1]);
            let sum = if BY_SCALE && !U::SCALE_PER_16 {
                _mm512_mask_reduce_add_ps(EVEN, both)
            } else {
                _mm512_reduce_add_ps(both)
            };
            // SAFETY: the caller's output holds this element.
            unsafe { panel.out.put(n, panel.first_row + r, sum) };
        }
    }
}

/// Mask of the first lane of every run.
const EVEN: __mmask16 = 0x5555;

/// Quantizes one run of a block of activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) fn quantize_run(run: usize, x: &[f32; 32], block: &mut ActBlock) {
    // SAFETY: two registers of 16 values.
    let x = unsafe {
        [
            _mm512_loadu_ps(x.as_ptr()),
            _mm512_loadu_ps(x.as_ptr().add(16)),
        ]
    };
    // Compared as bits: a NaN is the largest and ends up in the scale.
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    let [low, high] = x.map(|x| _mm512_and_si512(_mm512_castps_si512(x), magnitude));
    let largest = _mm512_reduce_max_epu32(_mm512_max_epu32(low, high));
    let (scale, inverse) = run_scale(f32::from_bits(largest));
    let mut both = 0;
    for (half, x) in x.into_iter().enumerate() {
        let q = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
        let bytes = _mm512_cvtepi32_epi8(q);
        let eights = [_mm_cvtsi128_si64(bytes), _mm_extract_epi64::<1>(bytes)];
        for (i, eight) in eights.into_iter().enumerate() {
            let to = &mut block.q[8 * place(4 * run + 2 * half + i)..][..8];
            to.copy_from_slice(&eight.to_le_bytes().map(|b| b as i8));
        }
        let sum = _mm512_reduce_add_epi32(q);
        block.sums[2 * run + half] = scale * sum as f32;
        block.offsets[2 * run + half] = -(sum << OFFSET_BITS);
        both += sum;
    }
    block.run_sums[run] = scale * both as f32;
    block.run_offsets[run] = -(both << RUN_OFFSET_BITS);
    block.scale[2 * run..][..2].fill(scale);
}

/// Adds the dot products of 256 weights with `N` tokens, the blocks of neighboring tokens `stride`
/// apart.
///
/// # Safety
/// The blocks can be read, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn add_tile<U: Unpack, const N: usize, const BY_SCALE: bool>(
    tile: Tile,
    x: *const ActBlock,
    stride: usize,
    acc: &mut [[__m512; 2]; N],
) {
    let zero = _mm512_setzero_si512();
    let (first, second) = (
        _mm512_moveldup_ps(tile.scale),
        _mm512_movehdup_ps(tile.scale),
    );
    for (n, acc) in acc.iter_mut().enumerate() {
        // SAFETY: the caller's blocks.
        let x = unsafe { &*x.add(n * stride) };
        // SAFETY: a block has four registers of values, one of scales and one of sums, and is
        // aligned to them.
        let (q, scale, sums) = unsafe {
            let q = x.q.as_ptr().cast::<__m512i>();
            let q = [
                _mm512_load_si512(q),
                _mm512_load_si512(q.add(1)),
                _mm512_load_si512(q.add(2)),
                _mm512_load_si512(q.add(3)),
            ];
            (
                q,
                _mm512_load_ps(x.scale.as_ptr()),
                _mm512_load_ps(x.sums.as_ptr()),
            )
        };
        let one = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, tile.q[0], q[0]), tile.q[1], q[1]);
        let two = if U::SCALE_PER_16 { zero } else { one };
        let two = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(two, tile.q[2], q[2]), tile.q[3], q[3]);
        let (sum, sums) = match (BY_SCALE, U::SCALE_PER_16) {
            (false, true) => {
                let one = _mm512_mul_ps(_mm512_cvtepi32_ps(one), first);
                (_mm512_fmadd_ps(_mm512_cvtepi32_ps(two), second, one), sums)
            }
            (false, false) => (_mm512_mul_ps(_mm512_cvtepi32_ps(two), tile.scale), sums),
            (true, true) => {
                // The first sixteen of a run to its first lane, the second sixteen to its second
                // lane.
                let low = _mm512_mask_shuffle_epi32::<0b10_10_00_00>(one, !EVEN, two);
                let high = _mm512_mask_shuffle_epi32::<0b11_11_01_01>(two, EVEN, one);
                (
                    _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(low, high)), tile.scale),
                    sums,
                )
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

/// Computes a panel of a float format.
///
/// # Safety
/// As [`PanelFn`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn float<W: FloatFormat, const N: usize>(panel: &Panel<'_>) {
    // SAFETY: the caller's panel.
    unsafe { float_panel::<__m512, W, N>(panel) }
}
