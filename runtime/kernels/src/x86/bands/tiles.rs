//! AMX tiles over bands: 16 tokens by 16 rows at a time.
//!
//! An unpacked run of a band is, as it is, the right side of a tile product: each of its eight
//! registers has four codes of 16 rows. The left side is the same run of 16 tokens. Both are kept
//! in a thread's scratch memory: the tokens for all bands, the unpacked band for all tokens.
//!
//! ```text
//! pack the tokens: per 16 of them and run, 16 rows of 32 values, 16 scales and 16 sums
//! for each band:
//!     unpack it: per run, 8 registers of codes, scales and minimums
//!     for each 16 tokens:
//!         mins[t] -= minimum * sum of t, run after run    # of a format with minimums
//!         for each run:
//!             start the tile product of a later run
//!             scaled[t] += (float(row t of the product) * scale) * scale of t
//!         out[t, rows of the band] = scaled[t] + mins[t]
//! ```
//!
//! A product gets to the registers through memory, so it is started [`IN_FLIGHT`] runs before it is
//! needed.

use super::formats::{BandFormat, Run};
use super::{BAND_ROWS, Band, LINE_BYTES};
use crate::activations::{ActBlock, OFFSET_BITS, RUN_OFFSET_BITS};
use crate::panel::Panel;
use crate::quant::block::GROUP;
use crate::x86::amx::{Line, TILE_TOKENS, configure};
use crate::x86::prefetch;
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;

/// Fewest tokens that are worth a tile product.
const MIN_TOKENS: usize = 9;

/// Runs whose tile products are under way.
const IN_FLIGHT: usize = 2;

/// Buffers for products.
const BUFFERS: usize = 4;

/// Most bytes of packed tokens at a time: they stay in the second-level cache.
const MAX_PACKED_BYTES: usize = 768 << 10;

/// Bytes per run of 16 packed tokens.
const RUN_BYTES: usize = 32 * TILE_TOKENS;

/// Numbers per run of 16 tokens or rows: scales or sums, twice where they are per 16 values.
const HALVES: usize = 2;

/// Returns how many of the first of `tokens` tokens are computed with tiles.
pub(super) fn count(tokens: usize) -> usize {
    let left = tokens % TILE_TOKENS;
    if left < MIN_TOKENS {
        tokens - left
    } else {
        tokens
    }
}

thread_local! {
    /// Packed tokens and an unpacked band.
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Packed tokens, and room for an unpacked band.
pub(super) struct Tiles {
    /// First of the tokens.
    first: usize,
    n_tokens: usize,
    /// Whether no tokens of the panel come after these.
    pub(super) is_last: bool,
    /// Runs per row.
    runs: usize,
    /// `[tokens / 16, runs, 16, 32]`.
    x: *mut i8,
    /// `[tokens / 16, runs, 16]`.
    x_scales: *mut f32,
    /// `[tokens / 16, runs, 16]` sums for minimums, or `[tokens / 16, runs, 2, 16]` 32-bit integers
    /// to take offsets off, the second of two only where scales are per 16 values.
    x_sums: *mut f32,
    /// `[runs, 8, 16, 4]`.
    codes: *mut u8,
    /// `[runs, 2, 16]`.
    scales: *mut f32,
    /// `[runs, 16]`.
    mins: *mut f32,
}

/// Packs the first `tiled` tokens of a panel, as many at a time as the cache holds, and calls
/// `multiply` with each lot.
///
/// # Safety
/// As [`BandsFn`](super::BandsFn), and the processor has tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn with_tokens<F: BandFormat<__m512i>>(
    panel: &Panel<'_>,
    tiled: usize,
    mut multiply: impl FnMut(&Tiles),
) {
    let runs = panel.x.cols() / 32;
    let per_tile = runs * (RUN_BYTES + (1 + HALVES) * 4 * TILE_TOKENS);
    let tiles = tiled.div_ceil(TILE_TOKENS);
    let most = (MAX_PACKED_BYTES / per_tile.max(1)).max(1);
    // As many as make lots of about equal size.
    let at_once = tiles.div_ceil(tiles.div_ceil(most));
    SCRATCH.with_borrow_mut(|scratch| {
        configure(if F::SCALE_PER_16 { 16 } else { 32 });
        for first in (0..tiled).step_by(at_once * TILE_TOKENS) {
            let n_tokens = (tiled - first).min(at_once * TILE_TOKENS);
            let lot = Tiles {
                first,
                n_tokens,
                is_last: first + n_tokens == tiled,
                ..Tiles::new(scratch, at_once, runs)
            };
            // SAFETY: the scratch memory was made for so many; the processor is the caller's.
            unsafe { lot.pack::<F>(panel) };
            multiply(&lot);
        }
        // SAFETY: gives the tiles back, which nothing reads any more.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    });
}

impl Tiles {
    /// Lays the parts out in `scratch`, for `tiles` times 16 tokens, and grows it if needed.
    fn new(scratch: &mut Vec<Line>, tiles: usize, runs: usize) -> Self {
        let (x, scales) = (tiles * runs * RUN_BYTES / 64, tiles * runs);
        let (codes, factors) = (runs * 8, runs * HALVES);
        let all = x + (1 + HALVES) * scales + codes + factors + runs;
        if scratch.len() < all {
            scratch.resize(all, Line::ZERO);
        }
        let base = scratch.as_mut_ptr();
        // SAFETY: the parts lie one after another within the `all` lines there are.
        unsafe {
            let x_scales = base.add(x);
            let x_sums = x_scales.add(scales);
            let w = x_sums.add(HALVES * scales);
            Self {
                first: 0,
                n_tokens: 0,
                is_last: false,
                runs,
                x: base.cast(),
                x_scales: x_scales.cast(),
                x_sums: x_sums.cast(),
                codes: w.cast(),
                scales: w.add(codes).cast(),
                mins: w.add(codes + factors).cast(),
            }
        }
    }

    /// Packs the tokens.
    ///
    /// # Safety
    /// The parts have room for them, and the processor has the instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn pack<F: BandFormat<__m512i>>(&self, panel: &Panel<'_>) {
        let groups = panel.x.cols().div_ceil(GROUP);
        let blocks = &panel.x.blocks()[self.first * groups..];
        for token in 0..self.n_tokens.next_multiple_of(TILE_TOKENS) {
            let (tile, row) = (token / TILE_TOKENS, token % TILE_TOKENS);
            for group in 0..groups {
                let runs = (self.runs - 8 * group).min(8);
                let run = tile * self.runs + 8 * group;
                let block = (token < self.n_tokens).then(|| &blocks[token * groups + group]);
                // SAFETY: the caller's parts.
                unsafe { self.pack_block::<F>(block, run, runs, row) };
            }
        }
    }

    /// Packs the first `runs` runs of a token's block as row `row` of their tiles, or zeros.
    ///
    /// # Safety
    /// As [`pack`](Self::pack).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn pack_block<F: BandFormat<__m512i>>(
        &self,
        block: Option<&ActBlock>,
        first: usize,
        runs: usize,
        row: usize,
    ) {
        // SAFETY: the caller's parts.
        unsafe {
            for run in 0..runs {
                let at = first + run;
                let to = self.x.add(at * RUN_BYTES + 32 * row).cast::<u64>();
                for k in 0..4 {
                    let eight =
                        block.map_or(0, |b| b.q.as_ptr().cast::<u64>().add(8 * k + run).read());
                    to.add(k).write(eight);
                }
                *self.x_scales.add(TILE_TOKENS * at + row) =
                    block.map_or(0.0, |b| b.scale[2 * run]);
                let sums = self.x_sums.add(HALVES * TILE_TOKENS * at + row);
                let offset = |of: i32, from, bits| f32::from_bits((of >> from << bits) as u32);
                match F::OFFSET_BITS {
                    None => *sums = block.map_or(0.0, |b| b.run_sums[run]),
                    Some(bits) if F::SCALE_PER_16 => {
                        let of = |half| block.map_or(0, |b| b.offsets[2 * run + half]);
                        *sums = offset(of(0), OFFSET_BITS, bits);
                        *sums.add(TILE_TOKENS) = offset(of(1), OFFSET_BITS, bits);
                    }
                    Some(bits) => {
                        let of = block.map_or(0, |b| b.run_offsets[run]);
                        *sums = offset(of, RUN_OFFSET_BITS, bits);
                    }
                }
            }
        }
    }

    /// Multiplies a band with the tokens.
    ///
    /// # Safety
    /// As [`BandsFn`](super::BandsFn); the tiles are configured for the format.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    pub(super) unsafe fn multiply<F: BandFormat<__m512i>>(&self, panel: &Panel<'_>, band: &Band) {
        // SAFETY: the caller's band.
        unsafe {
            self.unpack::<F>(band);
            for tile in 0..self.n_tokens.div_ceil(TILE_TOKENS) {
                self.multiply_tile::<F>(panel, band, tile);
            }
        }
    }

    /// Unpacks a band.
    ///
    /// # Safety
    /// As [`multiply`](Self::multiply).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn unpack<F: BandFormat<__m512i>>(&self, band: &Band) {
        // SAFETY: the caller's band.
        unsafe {
            for block in 0..band.blocks {
                let (lines, rest) = (
                    band.block::<__m512i, F>(block),
                    band.rest::<__m512i, F>(block),
                );
                prefetch(lines, F::LAYOUT.n_words * LINE_BYTES);
                let head = F::head(lines, rest);
                let at = block * F::RUNS;
                self.keep::<F>(at, F::run::<0>(lines, head));
                if F::RUNS > 1 {
                    self.keep::<F>(at + 1, F::run::<1>(lines, head));
                    self.keep::<F>(at + 2, F::run::<2>(lines, head));
                    self.keep::<F>(at + 3, F::run::<3>(lines, head));
                    self.keep::<F>(at + 4, F::run::<4>(lines, head));
                    self.keep::<F>(at + 5, F::run::<5>(lines, head));
                    self.keep::<F>(at + 6, F::run::<6>(lines, head));
                    self.keep::<F>(at + 7, F::run::<7>(lines, head));
                }
            }
        }
    }

    /// Stores an unpacked run.
    ///
    /// # Safety
    /// As [`multiply`](Self::multiply).
    #[inline(always)]
    unsafe fn keep<F: BandFormat<__m512i>>(&self, at: usize, run: Run<__m512i>) {
        // SAFETY: the parts have room for the runs of a band.
        unsafe {
            for (i, q) in run.q.into_iter().enumerate() {
                _mm512_store_si512(self.codes.add((8 * at + i) * 64).cast(), q);
            }
            let scales = self.scales.add(HALVES * at * BAND_ROWS);
            _mm512_store_ps(scales, run.scale[0]);
            if F::SCALE_PER_16 {
                _mm512_store_ps(scales.add(BAND_ROWS), run.scale[1]);
            }
            if F::OFFSET_BITS.is_none() {
                _mm512_store_ps(self.mins.add(at * BAND_ROWS), run.min[0]);
            }
        }
    }

    /// Multiplies the unpacked band with 16 tokens.
    ///
    /// # Safety
    /// As [`multiply`](Self::multiply).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
    unsafe fn multiply_tile<F: BandFormat<__m512i>>(
        &self,
        panel: &Panel<'_>,
        band: &Band,
        tile: usize,
    ) {
        #[repr(C, align(64))]
        struct Products(MaybeUninit<[i32; BUFFERS * HALVES * TILE_TOKENS * BAND_ROWS]>);
        let halves = if F::SCALE_PER_16 { 2 } else { 1 };
        let first = tile * self.runs;
        let mut products = Products(MaybeUninit::uninit());
        let products = products.0.as_mut_ptr().cast::<i32>();
        let product = |run: usize, half: usize| {
            // SAFETY: one of the buffers.
            unsafe { products.add((run % BUFFERS * HALVES + half) * TILE_TOKENS * BAND_ROWS) }
        };
        let start = |run: usize| {
            for half in 0..halves {
                // SAFETY: the run's tiles and a buffer.
                unsafe {
                    tile_product(
                        self.x.add((first + run) * RUN_BYTES + 16 * half),
                        self.codes.add(512 * run + 256 * half),
                        product(run, half),
                    );
                }
            }
        };
        for run in 0..IN_FLIGHT.min(self.runs) {
            start(run);
        }
        // The minimums first, while the first products are under way: registers hold sums of one
        // kind at a time.
        let mut mins = [_mm512_setzero_ps(); TILE_TOKENS];
        if F::OFFSET_BITS.is_none() {
            for run in 0..self.runs {
                // SAFETY: numbers of the run.
                unsafe {
                    let min = _mm512_load_ps(self.mins.add(run * BAND_ROWS));
                    let sums = self.x_sums.add(HALVES * (first + run) * TILE_TOKENS);
                    for (t, mins) in mins.iter_mut().enumerate() {
                        *mins = _mm512_fnmadd_ps(min, _mm512_set1_ps(*sums.add(t)), *mins);
                    }
                }
            }
        }
        let mut kept = MaybeUninit::<[__m512; TILE_TOKENS]>::uninit();
        kept.write(mins);
        let mut scaled = [_mm512_setzero_ps(); TILE_TOKENS];
        for run in 0..self.runs {
            if run + IN_FLIGHT < self.runs {
                start(run + IN_FLIGHT);
            }
            // SAFETY: numbers of the run, and products that were stored.
            unsafe {
                let scale = self.scales.add(HALVES * run * BAND_ROWS);
                let scale = [
                    _mm512_load_ps(scale),
                    _mm512_load_ps(scale.add((halves - 1) * BAND_ROWS)),
                ];
                let scales = self.x_scales.add((first + run) * TILE_TOKENS);
                let offsets = self.x_sums.add(HALVES * (first + run) * TILE_TOKENS);
                for (t, scaled) in scaled.iter_mut().enumerate() {
                    let dot = |half| {
                        let row = product(run, half).add(t * BAND_ROWS);
                        let mut dot = _mm512_load_si512(row.cast());
                        if F::OFFSET_BITS.is_some() {
                            let offset = offsets.add(half * TILE_TOKENS + t).cast::<i32>();
                            dot = _mm512_add_epi32(dot, _mm512_set1_epi32(*offset));
                        }
                        _mm512_cvtepi32_ps(dot)
                    };
                    let mut product = _mm512_mul_ps(dot(0), scale[0]);
                    if F::SCALE_PER_16 {
                        product = _mm512_fmadd_ps(dot(1), scale[1], product);
                    }
                    *scaled = _mm512_fmadd_ps(product, _mm512_set1_ps(*scales.add(t)), *scaled);
                }
            }
        }
        let n = (self.n_tokens - tile * TILE_TOKENS).min(TILE_TOKENS);
        // SAFETY: written above.
        let mins = unsafe { kept.assume_init() };
        for (t, (scaled, mins)) in scaled.into_iter().zip(mins).enumerate().take(n) {
            let token = self.first + tile * TILE_TOKENS + t;
            // SAFETY: the caller's output.
            unsafe { band.store::<__m512i, 1>(panel, token, 1, &[[[scaled, mins]]]) };
        }
    }
}

/// Multiplies a run of 16 tokens, rows 32 bytes apart, by lines of codes.
///
/// # Safety
/// The tiles are configured, both operands are whole tiles, and 16 x 16 integers can be written. No
/// other code uses tiles.
#[inline(always)]
unsafe fn tile_product(x: *const i8, codes: *const u8, to: *mut i32) {
    // SAFETY: the caller's tiles.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm1, [{x} + {row}]",
            "tileloadd tmm2, [{codes} + {line}]",
            "tdpbsud tmm0, tmm1, tmm2",
            "tilestored [{to} + {line}], tmm0",
            x = in(reg) x,
            codes = in(reg) codes,
            to = in(reg) to,
            row = in(reg) 32usize,
            line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _,
            options(nostack, preserves_flags),
        );
    }
}
