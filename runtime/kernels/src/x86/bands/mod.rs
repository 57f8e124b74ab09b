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
mod tiles;
mod words;

pub(crate) use interleave::{avx2 as interleave_avx2, avx512 as interleave_avx512};

use super::prefetch;
use crate::activations::ActBlock;
use crate::bands::{BAND_ROWS, LINE_BYTES, RowOrder};
use crate::lanes::Lanes;
use crate::panel::Panel;
use crate::quant::TensorType;
use crate::quant::block::GROUP;
use crate::x86::lanes::PartialLanes;
use formats::{BandFormat, Run};
use interleave::SixteenRows;
use std::arch::x86_64::{__m256i, __m512i};
use std::cell::RefCell;
use std::mem::MaybeUninit;
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
        sums: &[Sums<W, N>; 2],
    ) {
        for (half, sums) in sums.iter().enumerate().take(BAND_ROWS / W::ROWS) {
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

/// Computes a panel.
///
/// # Safety
/// As [`BandsFn`].
unsafe fn matmul<W: Words, F: BandFormat<W>>(panel: &Panel<'_>, order: RowOrder) {
    // SAFETY: the caller's panel and processor.
    unsafe { each_band::<W, F>(panel, order, &mut |band| few_tokens::<W, F>(panel, band, 0)) }
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
                    few_tokens::<__m512i, F>(panel, band, tokens);
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

/// Computes a band with the tokens from `first` on.
///
/// # Safety
/// As [`BandsFn`].
unsafe fn few_tokens<W: Words, F: BandFormat<W>>(panel: &Panel<'_>, band: &Band, first: usize) {
    let tokens = panel.x.rows();
    let mut token = first;
    while token < tokens {
        let mut n = (tokens - token).min(MAX_TOKENS);
        // SAFETY: the caller's panel and processor.
        unsafe {
            if n == 1 {
                W::multiply::<F, 1>(panel, band, token, 1);
            } else if W::TAKES_FEWER {
                W::multiply::<F, MAX_TOKENS>(panel, band, token, n);
            } else if F::NEEDS_VBMI {
                // Unpacking is long, and so are these kernels: there are some only.
                n = 1 << n.ilog2();
                match n {
                    2 => W::multiply::<F, 2>(panel, band, token, n),
                    4 => W::multiply::<F, 4>(panel, band, token, n),
                    _ => W::multiply::<F, MAX_TOKENS>(panel, band, token, n),
                }
            } else {
                match n {
                    2 => W::multiply::<F, 2>(panel, band, token, n),
                    3 => W::multiply::<F, 3>(panel, band, token, n),
                    4 => W::multiply::<F, 4>(panel, band, token, n),
                    5 => W::multiply::<F, 5>(panel, band, token, n),
                    6 => W::multiply::<F, 6>(panel, band, token, n),
                    7 => W::multiply::<F, 7>(panel, band, token, n),
                    _ => W::multiply::<F, MAX_TOKENS>(panel, band, token, n),
                }
            }
        }
        token += n;
    }
}

/// Prefetches a run's share of what follows a block's lines.
#[inline(always)]
fn prefetch_run<W: Words, F: BandFormat<W>>(lines: *const u8, run: usize) {
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

/// A block of activations of the first token, and how many tokens there are.
type Tokens = (*const ActBlock, usize);

/// Sums of `N` tokens with the rows of a register: of scaled products and of minimums.
type Sums<W, const N: usize> = [[<W as Words>::Floats; 2]; N];

/// Multiplies a band with `n` tokens from `token` on, at most `N`.
///
/// # Safety
/// As [`BandsFn`]; see [`Words`].
#[inline(always)]
unsafe fn multiply<W: Words, F: BandFormat<W>, const N: usize>(
    panel: &Panel<'_>,
    band: &Band,
    token: usize,
    n: usize,
) {
    let groups = panel.x.cols().div_ceil(GROUP);
    // SAFETY: the band has `blocks` blocks, and each token as many runs.
    unsafe {
        // The second is for the other half of the rows, where a register has half of them.
        let mut sums = [[[W::Floats::splat(0.0); 2]; N]; 2];
        let x = panel.x.blocks().as_ptr().add(token * groups);
        for block in 0..band.blocks {
            let (lines, rest) = (band.block::<W, F>(block), band.rest::<W, F>(block));
            let x = x.add(block * F::RUNS / 8);
            add_block::<W, F, N, true>(lines, rest, (x, n), groups, block % 8, &mut sums);
        }
        band.store::<W, N>(panel, token, n, &sums);
    }
}

/// Room for a block of 16 rows.
#[repr(align(64))]
struct Room {
    rests: [u8; LINE_BYTES],
    lines: [u8; MAX_BLOCK_BYTES * BAND_ROWS],
}

/// Most bytes of a block with bands (Q6_K).
const MAX_BLOCK_BYTES: usize = 210;

/// Multiplies rows that are not interleaved, one after another at the band's address, with the
/// panel's only token.
///
/// # Safety
/// As [`BandsFn`]; see [`Words`].
#[inline(always)]
unsafe fn multiply_rows<W: Words, F: BandFormat<W>>(panel: &Panel<'_>, band: &Band) {
    const {
        assert!(
            F::LAYOUT.block_bytes <= MAX_BLOCK_BYTES
                && F::LAYOUT.rest_bytes * BAND_ROWS <= LINE_BYTES
        )
    };
    let mut room = MaybeUninit::<Room>::uninit();
    // SAFETY: the rows have `blocks` blocks, and so has the token; a block has its room.
    unsafe {
        let rows = SixteenRows::new(band.bytes, panel.row_bytes, band.n_rows);
        let rest = (&raw mut (*room.as_mut_ptr()).rests).cast::<u8>();
        let lines = (&raw mut (*room.as_mut_ptr()).lines).cast::<u8>();
        let mut sums = [[[W::Floats::splat(0.0); 2]; 1]; 2];
        for block in 0..band.blocks {
            rows.interleave_block::<W>(F::LAYOUT, block, rest, lines);
            let x = panel.x.blocks().as_ptr().add(block * F::RUNS / 8);
            add_block::<W, F, 1, false>(lines, rest, (x, 1), 0, block % 8, &mut sums);
        }
        band.store::<W, 1>(panel, 0, 1, &sums);
    }
}

/// Adds the products of a block of each row, register by register: of its runs, or of run `j` of a
/// block of activations if it has one only. What follows the lines is prefetched if `PREFETCH`.
///
/// # Safety
/// As [`add_run`]; the block can be read.
#[inline(always)]
unsafe fn add_block<W: Words, F: BandFormat<W>, const N: usize, const PREFETCH: bool>(
    lines: *const u8,
    rest: *const u8,
    x: Tokens,
    stride: usize,
    j: usize,
    sums: &mut [Sums<W, N>; 2],
) {
    for (half, sums) in sums.iter_mut().enumerate().take(BAND_ROWS / W::ROWS) {
        // SAFETY: the caller's block and processor.
        unsafe {
            let lines = lines.add(half * 4 * W::ROWS);
            let rest = rest.add(half * F::LAYOUT.rest_bytes * W::ROWS);
            add_half::<W, F, N>(lines, rest, x, stride, j, PREFETCH && half == 0, sums);
        }
    }
}

/// Adds the products of the rows of a register, as [`add_block`] says.
///
/// # Safety
/// As [`add_block`].
#[inline(always)]
unsafe fn add_half<W: Words, F: BandFormat<W>, const N: usize>(
    lines: *const u8,
    rest: *const u8,
    x: Tokens,
    stride: usize,
    j: usize,
    prefetches: bool,
    sums: &mut Sums<W, N>,
) {
    let prefetch = |run| {
        if prefetches {
            prefetch_run::<W, F>(lines, run);
        }
    };
    // SAFETY: the caller's block and processor.
    unsafe {
        prefetch(0);
        let head = F::head(lines, rest);
        if F::RUNS == 1 {
            let run = F::run::<0>(lines, head);
            return add_run::<W, F, N>(&run, x, stride, j, sums);
        }
        add_run::<W, F, N>(&F::run::<0>(lines, head), x, stride, 0, sums);
        keep_apart();
        prefetch(1);
        add_run::<W, F, N>(&F::run::<1>(lines, head), x, stride, 1, sums);
        keep_apart();
        prefetch(2);
        add_run::<W, F, N>(&F::run::<2>(lines, head), x, stride, 2, sums);
        keep_apart();
        prefetch(3);
        add_run::<W, F, N>(&F::run::<3>(lines, head), x, stride, 3, sums);
        keep_apart();
        prefetch(4);
        add_run::<W, F, N>(&F::run::<4>(lines, head), x, stride, 4, sums);
        keep_apart();
        prefetch(5);
        add_run::<W, F, N>(&F::run::<5>(lines, head), x, stride, 5, sums);
        keep_apart();
        prefetch(6);
        add_run::<W, F, N>(&F::run::<6>(lines, head), x, stride, 6, sums);
        keep_apart();
        prefetch(7);
        add_run::<W, F, N>(&F::run::<7>(lines, head), x, stride, 7, sums);
    }
}

/// Adds the products of run `j` of a block of activations, the blocks of neighboring tokens
/// `stride` apart.
///
/// # Safety
/// The blocks can be read; see [`Words`].
#[inline(always)]
unsafe fn add_run<W: Words, F: BandFormat<W>, const N: usize>(
    run: &Run<W>,
    (x, n): Tokens,
    stride: usize,
    j: usize,
    sums: &mut Sums<W, N>,
) {
    // SAFETY: the caller's blocks and processor.
    unsafe {
        for (i, sums) in sums.iter_mut().enumerate().take(n) {
            let x = &*x.add(i * stride);
            let dots = W::dots::<F, N>(run, x, j);
            add_products::<W, F>(dots, run.scale, run.min, x, j, sums);
        }
    }
}

/// Scales the integer products of run `j` of a block of activations, and adds them to the sums
/// of scaled products and of minimums.
///
/// # Safety
/// See [`Words`].
#[inline(always)]
unsafe fn add_products<W: Words, F: BandFormat<W>>(
    dots: [W; 2],
    scale: [W::Floats; 2],
    min: [W::Floats; 2],
    x: &ActBlock,
    j: usize,
    [scaled, mins]: &mut [W::Floats; 2],
) {
    // SAFETY: the caller's processor.
    unsafe {
        let mut product = W::mul(dots[0].to_floats(), scale[0]);
        if F::SCALE_PER_16 {
            product = W::Floats::mul_add(dots[1].to_floats(), scale[1], product);
        }
        if F::OFFSET_BITS.is_none() {
            *mins = if F::SCALE_PER_16 {
                let first = W::neg_mul_add(min[0], W::Floats::splat(x.sums[2 * j]), *mins);
                W::neg_mul_add(min[1], W::Floats::splat(x.sums[2 * j + 1]), first)
            } else {
                W::neg_mul_add(min[0], W::Floats::splat(x.run_sums[j]), *mins)
            };
        }
        *scaled = W::Floats::mul_add(product, W::Floats::splat(x.scale[2 * j]), *scaled);
    }
}
