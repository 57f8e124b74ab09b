//! The product of a band with a few tokens, and of one token with rows that are not interleaved.

use super::Band;
use super::formats::{BandFormat, Run};
use super::interleave::SixteenRows;
use super::words::Words;
use crate::activations::ActBlock;
use crate::bands::{BAND_ROWS, LINE_BYTES};
use crate::lanes::Lanes;
use crate::panel::Panel;
use crate::quant::block::GROUP;
use crate::x86::lanes::PartialLanes;
use crate::x86::{L2_PREFETCH_BYTES, prefetch_both};
use std::mem::MaybeUninit;

/// A pass over a band: with which tokens, and what it prefetches.
#[derive(Clone, Copy)]
pub(super) struct Pass {
    /// First token.
    pub token: usize,
    /// Number of tokens.
    pub n: usize,
    /// Index among the passes over the band, which share out the blocks of the next one.
    pub index: usize,
    pub passes: usize,
    /// Whether it prefetches what follows the lines that it reads instead: the only pass, or one over
    /// a band that nothing prefetched.
    pub reads_on: bool,
}

impl Pass {
    /// Returns how far after a block's lines those are that are prefetched into the second-level
    /// cache; 0 for none but what is read anyhow, which saves a branch.
    #[inline(always)]
    fn far<W: Words, F: BandFormat<W>>(self, band: &Band, block: usize) -> usize {
        if self.reads_on {
            L2_PREFETCH_BYTES
        } else if block % self.passes == self.index {
            band.blocks * F::LAYOUT.block_bytes * BAND_ROWS
        } else {
            0
        }
    }
}

/// Prefetches a run's share of what comes soon after a block's lines, and of what is `far` away.
#[inline(always)]
fn prefetch_run<W: Words, F: BandFormat<W>>(lines: *const u8, run: usize, far: usize) {
    let line = |run| run * F::LAYOUT.n_words / F::RUNS * LINE_BYTES;
    prefetch_both(
        lines.wrapping_add(line(run)),
        line(run + 1) - line(run),
        far,
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
pub(super) type Sums<W, const N: usize> = [[<W as Words>::Floats; 2]; N];

/// Multiplies a band with the tokens of a pass, at most `N`.
///
/// # Safety
/// As [`BandsFn`]; see [`Words`].
#[inline(always)]
pub(super) unsafe fn multiply<W: Words, F: BandFormat<W>, const N: usize>(
    panel: &Panel<'_>,
    band: &Band,
    pass: Pass,
) {
    let groups = panel.x.cols().div_ceil(GROUP);
    // Known to the compiler, but where one kernel takes any number.
    let n = if W::TAKES_FEWER { pass.n } else { N };
    // SAFETY: the band has `blocks` blocks, and each token as many runs.
    unsafe {
        let mut sums = W::of_band([[W::Floats::splat(0.0); 2]; N]);
        let x = panel.x.blocks().as_ptr().add(pass.token * groups);
        for block in 0..band.blocks {
            let (lines, rest) = (band.block::<W, F>(block), band.rest::<W, F>(block));
            let x = x.add(block * F::RUNS / 8);
            let far = pass.far::<W, F>(band, block);
            add_block::<W, F, N>(lines, rest, (x, n), groups, block % 8, Some(far), &mut sums);
        }
        band.store::<W, N>(panel, pass.token, n, &sums);
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
pub(super) unsafe fn multiply_rows<W: Words, F: BandFormat<W>>(panel: &Panel<'_>, band: &Band) {
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
        let mut sums = W::of_band([[W::Floats::splat(0.0); 2]; 1]);
        for block in 0..band.blocks {
            rows.interleave_block::<W>(F::LAYOUT, block, rest, lines);
            let x = panel.x.blocks().as_ptr().add(block * F::RUNS / 8);
            add_block::<W, F, 1>(lines, rest, (x, 1), 0, block % 8, None, &mut sums);
        }
        band.store::<W, 1>(panel, 0, 1, &sums);
    }
}

/// Adds the products of a block of each row, register by register: of its runs, or of run `j` of a
/// block of activations if it has one only.
///
/// # Safety
/// As [`add_run`]; the block can be read.
#[inline(always)]
unsafe fn add_block<W: Words, F: BandFormat<W>, const N: usize>(
    lines: *const u8,
    rest: *const u8,
    x: Tokens,
    stride: usize,
    j: usize,
    far: Option<usize>,
    sums: &mut W::OfBand<Sums<W, N>>,
) {
    for (half, sums) in sums.as_mut().iter_mut().enumerate() {
        // SAFETY: the caller's block and processor.
        unsafe {
            let lines = lines.add(half * 4 * W::ROWS);
            let rest = rest.add(half * F::LAYOUT.rest_bytes * W::ROWS);
            // Once for both.
            let far = far.filter(|_| half == 0);
            add_half::<W, F, N>(lines, rest, x, stride, j, far, sums);
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
    far: Option<usize>,
    sums: &mut Sums<W, N>,
) {
    let prefetch = |run| {
        if let Some(far) = far {
            prefetch_run::<W, F>(lines, run, far);
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
pub(super) unsafe fn add_products<W: Words, F: BandFormat<W>>(
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
