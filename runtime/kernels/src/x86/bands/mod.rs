//! Matmul kernels for AVX2, AVX-512 and AMX over bands of 16 interleaved rows.
//!
//! Lane `r` of every register belongs to row `r` of the band, so that nothing has to be added
//! across lanes. A register of AVX2 has 8 lanes, so it takes two of them for what is one here
//! ([`words`]):
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
//! `float(dot 1) * scale 1 + float(dot 0) * scale 0`; and two minimums, one after the other.
//!
//! A token's sum with a row has one order, the order of the runs, whoever computes it: these
//! kernels for 1 to 8 tokens, or the tiles for many ([`tiles`]), which differ in how they get at
//! `dot`, an exact integer. Rows that are not interleaved have the same bits too: they are
//! interleaved on the way, for one token block by block, for several band by band.

mod formats;
mod grids;
mod interleave;
mod kernel;
mod tiles;
mod words;

pub(crate) use interleave::{avx2 as interleave_avx2, avx512 as interleave_avx512};

use crate::activations::ActBlock;
use crate::bands::{BAND_ROWS, LINE_BYTES, RowOrder};
use crate::panel::Panel;
use crate::quant::TensorType;
use crate::quant::block::GROUP;
use crate::x86::lanes::PartialLanes;
use formats::BandFormat;
use kernel::{Pass, Sums};
use std::arch::x86_64::{__m256i, __m512i};
use std::cell::RefCell;
use std::ops::Range;
use words::Words;

/// Most tokens of a kernel without tiles.
const MAX_TOKENS: usize = 8;

/// Computes a panel of any number of rows and tokens.
///
/// # Safety
/// As [`PanelFn`](crate::panel::PanelFn), for any number of tokens. Interleaved weights are whole
/// bands.
pub(crate) type BandsFn = unsafe fn(&Panel<'_>, RowOrder);

/// Evaluates `$then` with `$F` naming the format of the tensor type `$ty`; returns without one from
/// the function around it for a type that has no bands.
macro_rules! with_band_format {
    ($ty:expr, $F:ident => $then:expr) => {
        with_band_format!(@arms $ty, $F, $then;
            formats: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4;
            grids: IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S)
    };
    (@arms $ty:expr, $F:ident, $then:expr; $($module:ident: $($name:ident)*);*) => {
        match $ty {
            $($(TensorType::$name => {
                type $F = $module::$name;
                $then
            })*)*
            _ => return None,
        }
    };
}

/// Returns the AVX2 kernel of a type, if it has bands there.
pub(crate) fn avx2(ty: TensorType) -> Option<BandsFn> {
    Some(with_band_format!(ty, F => matmul::<__m256i, F>))
}

/// Returns the AVX-512 kernel of a type, if it has bands there.
pub(crate) fn avx512(ty: TensorType) -> Option<BandsFn> {
    Some(with_band_format!(ty, F => in_wide_registers::<F>()))
}

/// Returns the kernel of a type that uses tiles for many tokens, if it has bands there.
pub(crate) fn amx(ty: TensorType) -> Option<BandsFn> {
    Some(with_band_format!(ty, F => {
        if <F as BandFormat<__m512i>>::HAS_TILES {
            tiled::<F>
        } else {
            in_wide_registers::<F>()
        }
    }))
}

/// Returns the AVX-512 kernel of a format, or that of AVX2 where AVX-512 lacks what it takes.
fn in_wide_registers<F: BandFormat<__m512i> + BandFormat<__m256i>>() -> BandsFn {
    if <F as BandFormat<__m512i>>::NEEDS_VBMI && !is_x86_feature_detected!("avx512vbmi") {
        matmul::<__m256i, F>
    } else {
        matmul::<__m512i, F>
    }
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
    /// Whether no band of the panel came before, which would have prefetched it.
    is_first: bool,
}

impl Band {
    /// Returns the address of a block's lines.
    ///
    /// # Safety
    /// The block is one of the band.
    #[inline(always)]
    unsafe fn block<W: Words, F: BandFormat<W>>(&self, block: usize) -> *const u8 {
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
    unsafe fn rest<W: Words, F: BandFormat<W>>(&self, block: usize) -> *const u8 {
        // SAFETY: within the band.
        unsafe { self.bytes.add(block * F::LAYOUT.rest_bytes * BAND_ROWS) }
    }

    /// Stores the results of the rows with `n` tokens from `token` on.
    ///
    /// # Safety
    /// The panel's output holds them; see [`Words`].
    #[inline(always)]
    unsafe fn store<W: Words, const N: usize>(
        &self,
        panel: &Panel<'_>,
        token: usize,
        n: usize,
        sums: &W::OfBand<Sums<W, N>>,
    ) {
        for (half, sums) in sums.as_ref().iter().enumerate() {
            let first = half * W::ROWS;
            let rows = self.n_rows.saturating_sub(first).min(W::ROWS);
            if rows == 0 {
                return;
            }
            for (i, [scaled, mins]) in sums.iter().enumerate().take(n) {
                // SAFETY: the caller's output.
                unsafe {
                    let to = panel.out.at(token + i, self.first_row + first);
                    let sum = W::add_floats(*scaled, *mins);
                    sum.store_part(to, W::Floats::part(rows));
                }
            }
        }
    }
}

thread_local! {
    /// A band of rows that were not interleaved.
    static BAND: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Most bytes of weights that all tokens are multiplied with before the next ones: they stay in the
/// second-level cache.
const MAX_WEIGHT_BYTES: usize = 128 << 10;

/// Most bytes of tokens that are multiplied with these weights before the next tokens: they stay
/// there, too.
const MAX_TOKEN_BYTES: usize = 320 << 10;

/// Computes a panel.
///
/// # Safety
/// As [`BandsFn`].
unsafe fn matmul<W: Words, F: BandFormat<W>>(panel: &Panel<'_>, order: RowOrder) {
    let tokens = panel.x.rows();
    let token_bytes = panel.x.cols().div_ceil(GROUP) * size_of::<ActBlock>();
    let at_once = match order {
        RowOrder::Interleaved => (MAX_TOKEN_BYTES / token_bytes)
            .max(1)
            .next_multiple_of(MAX_TOKENS),
        // Each band would be interleaved for each of these tokens.
        RowOrder::Sequential => tokens,
    };
    if tokens <= at_once {
        // SAFETY: the caller's panel and processor.
        return unsafe {
            each_band::<W, F>(panel, order, &mut |band| {
                few_tokens::<W, F>(panel, band, 0..tokens);
            })
        };
    }
    let rows = (MAX_WEIGHT_BYTES / panel.row_bytes)
        .max(1)
        .next_multiple_of(BAND_ROWS);
    for (i, weights) in panel.weights.chunks(rows * panel.row_bytes).enumerate() {
        let part = Panel {
            weights,
            first_row: panel.first_row + i * rows,
            ..*panel
        };
        for first in (0..tokens).step_by(at_once) {
            let tokens = first..(first + at_once).min(tokens);
            // SAFETY: the caller's panel and processor.
            unsafe {
                each_band::<W, F>(&part, order, &mut |band| {
                    few_tokens::<W, F>(panel, band, tokens.clone());
                });
            }
        }
    }
}

/// Computes a panel, tokens by sixteens in tiles and the rest as [`matmul`] does.
///
/// # Safety
/// As [`BandsFn`].
unsafe fn tiled<F: BandFormat<__m512i>>(panel: &Panel<'_>, order: RowOrder) {
    let tokens = tiles::count(panel.x.rows());
    // SAFETY: the caller's panel and processor.
    unsafe {
        if tokens == 0 {
            return matmul::<__m512i, F>(panel, order);
        }
        tiles::with_tokens::<F>(panel, tokens, |tiles| {
            each_band::<__m512i, F>(panel, order, &mut |band| {
                tiles.multiply::<F>(panel, band);
                if tiles.is_last {
                    few_tokens::<__m512i, F>(panel, band, tokens..panel.x.rows());
                }
            });
        });
    }
}

/// Calls `compute` with each band of a panel, interleaved; rows that are not and have one token only
/// are multiplied as they are.
///
/// # Safety
/// As [`BandsFn`].
unsafe fn each_band<W: Words, F: BandFormat<W>>(
    panel: &Panel<'_>,
    order: RowOrder,
    compute: &mut dyn FnMut(&Band),
) {
    let blocks = panel.row_bytes / F::LAYOUT.block_bytes;
    assert!(
        panel.row_bytes == blocks * F::LAYOUT.block_bytes
            && blocks * F::RUNS * 32 == panel.x.cols()
            && panel.weights.len().is_multiple_of(panel.row_bytes)
    );
    let band_bytes = BAND_ROWS * panel.row_bytes;
    for (i, rows) in panel.weights.chunks(band_bytes).enumerate() {
        let mut band = Band {
            bytes: rows.as_ptr(),
            blocks,
            first_row: panel.first_row + i * BAND_ROWS,
            n_rows: rows.len() / panel.row_bytes,
            is_first: i == 0,
        };
        if order == RowOrder::Interleaved {
            assert_eq!(rows.len(), band_bytes, "whole bands");
            compute(&band);
            continue;
        }
        if panel.x.rows() == 1 {
            // SAFETY: the caller's panel and processor.
            unsafe { W::multiply_rows::<F>(panel, &band) };
            continue;
        }
        BAND.with_borrow_mut(|scratch| {
            scratch.resize(scratch.len().max(band_bytes), 0);
            // SAFETY: the processor is the caller's, and the rows are whole blocks.
            unsafe { W::interleave(F::LAYOUT, panel.row_bytes, rows, band.n_rows, scratch) };
            band.bytes = scratch.as_ptr();
            compute(&band);
        });
    }
}

/// Computes a band with some of the tokens.
///
/// # Safety
/// As [`BandsFn`].
unsafe fn few_tokens<W: Words, F: BandFormat<W>>(
    panel: &Panel<'_>,
    band: &Band,
    tokens: Range<usize>,
) {
    let passes = tokens.len().div_ceil(MAX_TOKENS);
    let mut token = tokens.start;
    while token < tokens.end {
        let left = (tokens.end - token).min(MAX_TOKENS);
        // Where unpacking is long, so are the kernels: there are some only.
        let n = if F::NEEDS_VBMI {
            1 << left.ilog2()
        } else {
            left
        };
        let index = (token - tokens.start) / MAX_TOKENS;
        let pass = Pass {
            token,
            n,
            index,
            passes,
            reads_on: passes == 1 || (index == 0 && band.is_first),
        };
        // SAFETY: the caller's panel and processor.
        unsafe {
            match n {
                1 => W::multiply::<F, 1>(panel, band, pass),
                _ if W::TAKES_FEWER => W::multiply::<F, MAX_TOKENS>(panel, band, pass),
                2 => W::multiply::<F, 2>(panel, band, pass),
                4 => W::multiply::<F, 4>(panel, band, pass),
                _ if F::NEEDS_VBMI => W::multiply::<F, MAX_TOKENS>(panel, band, pass),
                3 => W::multiply::<F, 3>(panel, band, pass),
                5 => W::multiply::<F, 5>(panel, band, pass),
                6 => W::multiply::<F, 6>(panel, band, pass),
                7 => W::multiply::<F, 7>(panel, band, pass),
                _ => W::multiply::<F, MAX_TOKENS>(panel, band, pass),
            }
        }
        token += n;
    }
}
