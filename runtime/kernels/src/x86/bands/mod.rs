//! Matmul kernels for AVX-512 and AMX over bands of 16 interleaved rows.
//!
//! Lane `r` of every register belongs to row `r` of the band, so that nothing has to be added
//! across lanes:
//!
//! ```text
//! for each band:
//!     for each block, for each run of 32 values:
//!         run = unpack(block, run)                # 8 registers of codes, scales, minimums
//!         for each token n:
//!             dot = -offset * x.sum of codes  # of a format with an offset
//!             for i in 0..8:  dot = dpbusd(dot, run.q[i], x's values 4 i to 4 i + 4)
//!             scaled[n] += (float(dot) * run.scale) * x.scale
//!             mins[n] -= run.min * x.sum      # of a format with minimums
//!     out[n, rows of the band] = scaled[n] + mins[n]
//! ```
//!
//! With a scale per 16 values there are two dots, and `x.scale` multiplies
//! `float(dot 1) * scale 1 + float(dot 0) * scale 0`.
//!
//! A token's sum with a row has one order, the order of the runs, whoever computes it: these
//! kernels for 1 to 8 tokens, or the tiles for many ([`tiles`]), which differ in how they get at
//! `dot`, an exact integer. Rows that are not interleaved have the same bits too: for several
//! tokens they are interleaved on the way, band by band; for one token, their integers are
//! ([`rows`]).

mod formats;
mod interleave;
mod rows;
mod tiles;

pub(crate) use interleave::interleave;

use super::prefetch;
use crate::activations::ActBlock;
use crate::bands::{BAND_ROWS, LINE_BYTES, RowOrder};
use crate::panel::Panel;
use crate::quant::TensorType;
use crate::quant::block::GROUP;
use formats::{BandFormat, Run};
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Most tokens of a kernel without tiles.
const MAX_TOKENS: usize = 8;

/// Computes a panel of any number of rows and tokens.
///
/// # Safety
/// As [`PanelFn`](crate::panel::PanelFn), for any number of tokens. Interleaved weights are whole
/// bands.
pub(crate) type BandsFn = unsafe fn(&Panel<'_>, RowOrder);

/// Returns the kernel of a type that has bands, with or without tiles.
pub(crate) fn kernel<const TILES: bool>(ty: TensorType) -> Option<BandsFn> {
    Some(match ty {
        TensorType::Q4_0 => matmul::<formats::Q4_0, TILES>,
        TensorType::Q4_1 => matmul::<formats::Q4_1, TILES>,
        TensorType::Q5_0 => matmul::<formats::Q5_0, TILES>,
        TensorType::Q5_1 => matmul::<formats::Q5_1, TILES>,
        TensorType::Q8_0 => matmul::<formats::Q8_0, TILES>,
        TensorType::Q4_K => matmul::<formats::Q4_K, TILES>,
        TensorType::Q5_K => matmul::<formats::Q5_K, TILES>,
        TensorType::Q6_K => matmul::<formats::Q6_K, TILES>,
        TensorType::IQ4_NL => matmul::<formats::IQ4_NL, TILES>,
        TensorType::IQ4_XS => matmul::<formats::IQ4_XS, TILES>,
        TensorType::MXFP4 => matmul::<formats::MXFP4, TILES>,
        _ => return None,
    })
}

/// One band, and where its results go.
#[derive(Clone, Copy)]
struct Band {
    bytes: *const u8,
    /// Blocks per row.
    blocks: usize,
    /// Column of the output for the first row.
    first_row: usize,
    /// Rows whose results are stored.
    n_rows: usize,
}

impl Band {
    /// Returns the address of a block's lines.
    ///
    /// # Safety
    /// The block is one of the band.
    #[inline(always)]
    unsafe fn block<F: BandFormat>(&self, block: usize) -> *const u8 {
        let rests = self.blocks * F::LAYOUT.rest_bytes * BAND_ROWS;
        // SAFETY: within the band.
        unsafe {
            self.bytes
                .add(rests + block * F::LAYOUT.n_words * LINE_BYTES)
        }
    }

    /// Returns the address of a block's rest.
    ///
    /// # Safety
    /// The block is one of the band.
    #[inline(always)]
    unsafe fn rest<F: BandFormat>(&self, block: usize) -> *const u8 {
        // SAFETY: within the band.
        unsafe { self.bytes.add(block * F::LAYOUT.rest_bytes * BAND_ROWS) }
    }

    /// Stores the results of the band's rows with a token.
    ///
    /// # Safety
    /// The panel's output holds them, and the processor has the instructions.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn store(&self, panel: &Panel<'_>, token: usize, sums: __m512) {
        let mask = (0xffffu32 >> (BAND_ROWS - self.n_rows)) as __mmask16;
        // SAFETY: the caller's output.
        unsafe { _mm512_mask_storeu_ps(panel.out.at(token, self.first_row), mask, sums) };
    }
}

thread_local! {
    /// A band of rows that were not interleaved.
    static BAND: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Computes a panel.
///
/// # Safety
/// As [`BandsFn`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn matmul<F: BandFormat, const TILES: bool>(panel: &Panel<'_>, order: RowOrder) {
    let blocks = panel.row_bytes / F::LAYOUT.block_bytes;
    assert!(
        panel.row_bytes == blocks * F::LAYOUT.block_bytes
            && blocks * F::RUNS * 32 == panel.x.cols()
            && panel.weights.len().is_multiple_of(panel.row_bytes)
    );
    let (band_bytes, tokens) = (BAND_ROWS * panel.row_bytes, panel.x.rows());
    let compute = |of_band: &mut dyn FnMut(&Band)| {
        for (i, rows) in panel.weights.chunks(band_bytes).enumerate() {
            let mut band = Band {
                bytes: rows.as_ptr(),
                blocks,
                first_row: panel.first_row + i * BAND_ROWS,
                n_rows: rows.len() / panel.row_bytes,
            };
            if order == RowOrder::Interleaved {
                assert_eq!(rows.len(), band_bytes, "whole bands");
                of_band(&band);
                continue;
            }
            if tokens == 1 {
                // SAFETY: the caller's panel and processor.
                unsafe { rows::multiply::<F>(panel, &band) };
                continue;
            }
            BAND.with_borrow_mut(|scratch| {
                scratch.resize(scratch.len().max(band_bytes), 0);
                // SAFETY: the processor is the caller's, and the rows are whole blocks.
                unsafe { interleave(F::LAYOUT, panel.row_bytes, rows, band.n_rows, scratch) };
                band.bytes = scratch.as_ptr();
                of_band(&band);
            });
        }
    };
    let tiled = if TILES { tiles::count(tokens) } else { 0 };
    let mut few = |band: &Band| {
        // SAFETY: the caller's panel.
        unsafe { few_tokens::<F>(panel, band, tiled) }
    };
    match tiled {
        0 => compute(&mut few),
        // SAFETY: the caller's panel and processor.
        _ => unsafe {
            tiles::with_tokens::<F>(panel, tiled, |tiles| {
                compute(&mut |band| {
                    tiles.multiply::<F>(panel, band);
                    if tiles.is_last {
                        few(band);
                    }
                });
            });
        },
    }
}

/// Computes a band with the tokens from `first` on.
///
/// # Safety
/// As [`BandsFn`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn few_tokens<F: BandFormat>(panel: &Panel<'_>, band: &Band, first: usize) {
    let tokens = panel.x.rows();
    let mut token = first;
    while token < tokens {
        let n = (tokens - token).min(MAX_TOKENS);
        // SAFETY: the caller's panel and processor.
        unsafe {
            match n {
                1 => multiply::<F, 1>(panel, band, token),
                2 => multiply::<F, 2>(panel, band, token),
                3 => multiply::<F, 3>(panel, band, token),
                4 => multiply::<F, 4>(panel, band, token),
                5 => multiply::<F, 5>(panel, band, token),
                6 => multiply::<F, 6>(panel, band, token),
                7 => multiply::<F, 7>(panel, band, token),
                _ => multiply::<F, MAX_TOKENS>(panel, band, token),
            }
        }
        token += n;
    }
}

/// Prefetches a run's share of what follows a block's lines.
#[inline(always)]
fn prefetch_run<F: BandFormat>(lines: *const u8, run: usize) {
    let line = |run| run * F::LAYOUT.n_words / F::RUNS;
    let (first, end) = (line(run), line(run + 1));
    prefetch(
        lines.wrapping_add(first * LINE_BYTES),
        (end - first) * LINE_BYTES,
    );
}

/// Keeps the compiler from mixing the instructions of two runs, whose registers it then has to
/// save on the stack. It moves no read of memory past an `asm` that may write memory.
#[inline(always)]
fn keep_apart() {
    // SAFETY: no instructions.
    unsafe { std::arch::asm!("", options(nostack, preserves_flags)) }
}

/// Sums of `N` tokens with the rows of a band.
type Sums<const N: usize> = [[__m512; 2]; N];

/// Multiplies a band with `N` tokens from `token` on.
///
/// # Safety
/// As [`BandsFn`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn multiply<F: BandFormat, const N: usize>(panel: &Panel<'_>, band: &Band, token: usize) {
    let groups = panel.x.cols().div_ceil(GROUP);
    let mut sums = [[_mm512_setzero_ps(); 2]; N];
    // SAFETY: the band has `blocks` blocks, and each token as many runs.
    unsafe {
        let x = panel.x.blocks().as_ptr().add(token * groups);
        for block in 0..band.blocks {
            let (lines, rest) = (band.block::<F>(block), band.rest::<F>(block));
            prefetch_run::<F>(lines, 0);
            let head = F::head(lines, rest);
            if F::RUNS == 1 {
                let run = F::run::<0>(lines, head);
                add_run::<F, N>(run, x.add(block / 8), groups, block % 8, &mut sums);
                continue;
            }
            let x = x.add(block);
            add_run::<F, N>(F::run::<0>(lines, head), x, groups, 0, &mut sums);
            keep_apart();
            prefetch_run::<F>(lines, 1);
            add_run::<F, N>(F::run::<1>(lines, head), x, groups, 1, &mut sums);
            keep_apart();
            prefetch_run::<F>(lines, 2);
            add_run::<F, N>(F::run::<2>(lines, head), x, groups, 2, &mut sums);
            keep_apart();
            prefetch_run::<F>(lines, 3);
            add_run::<F, N>(F::run::<3>(lines, head), x, groups, 3, &mut sums);
            keep_apart();
            prefetch_run::<F>(lines, 4);
            add_run::<F, N>(F::run::<4>(lines, head), x, groups, 4, &mut sums);
            keep_apart();
            prefetch_run::<F>(lines, 5);
            add_run::<F, N>(F::run::<5>(lines, head), x, groups, 5, &mut sums);
            keep_apart();
            prefetch_run::<F>(lines, 6);
            add_run::<F, N>(F::run::<6>(lines, head), x, groups, 6, &mut sums);
            keep_apart();
            prefetch_run::<F>(lines, 7);
            add_run::<F, N>(F::run::<7>(lines, head), x, groups, 7, &mut sums);
        }
        for (n, [scaled, mins]) in sums.into_iter().enumerate() {
            band.store(panel, token + n, _mm512_add_ps(scaled, mins));
        }
    }
}

/// Returns what takes the offset of the codes off the products of run `j`.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn offsets<F: BandFormat>(x: &ActBlock, j: usize) -> [__m512i; 2] {
    // SAFETY: the caller's processor.
    unsafe {
        let zero = _mm512_setzero_si512();
        match F::OFFSET_BITS {
            None => [zero; 2],
            Some(bits) if F::SCALE_PER_16 => [
                times(_mm512_set1_epi32(x.offsets[2 * j]), bits),
                times(_mm512_set1_epi32(x.offsets[2 * j + 1]), bits),
            ],
            Some(bits) => [times(_mm512_set1_epi32(x.run_offsets[j]), bits), zero],
        }
    }
}

/// Multiplies by a power of two.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn times(v: __m512i, bits: u32) -> __m512i {
    // SAFETY: the caller's processor.
    unsafe { _mm512_sll_epi32(v, _mm_cvtsi32_si128(bits as i32)) }
}

/// Adds the products of run `j` of a block of activations, the blocks of neighboring tokens
/// `stride` apart.
///
/// # Safety
/// The blocks can be read, and the processor has the instructions.
#[inline(always)]
unsafe fn add_run<F: BandFormat, const N: usize>(
    run: Run,
    x: *const ActBlock,
    stride: usize,
    j: usize,
    sums: &mut Sums<N>,
) {
    // SAFETY: the caller's blocks and processor.
    unsafe {
        for (n, sums) in sums.iter_mut().enumerate() {
            let x = x.add(n * stride);
            // Eight `k` of the run is word `16 k + 2 j` and the next.
            let words = (&raw const (*x).q).cast::<i32>().add(2 * j);
            let mut dots = offsets::<F>(&*x, j);
            for (i, q) in run.q.into_iter().enumerate() {
                let dot = &mut dots[if F::SCALE_PER_16 { i / 4 } else { 0 }];
                let word = _mm512_set1_epi32(*words.add(i / 2 * 16 + i % 2));
                *dot = _mm512_dpbusd_epi32(*dot, q, word);
            }
            add_products::<F>(dots, run.scale, run.min, &*x, j, sums);
        }
    }
}

/// Scales the integer products of run `j` of a block of activations, and adds them to the sums
/// of scaled products and of minimums.
///
/// # Safety
/// The processor has the instructions.
#[inline(always)]
unsafe fn add_products<F: BandFormat>(
    dots: [__m512i; 2],
    scale: [__m512; 2],
    min: __m512,
    x: &ActBlock,
    j: usize,
    [scaled, mins]: &mut [__m512; 2],
) {
    // SAFETY: the caller's processor.
    unsafe {
        let mut product = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[0]), scale[0]);
        if F::SCALE_PER_16 {
            product = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[1]), scale[1], product);
        }
        if F::OFFSET_BITS.is_none() {
            *mins = _mm512_fnmadd_ps(min, _mm512_set1_ps(x.run_sums[j]), *mins);
        }
        *scaled = _mm512_fmadd_ps(product, _mm512_set1_ps(x.scale[2 * j]), *scaled);
    }
}
