//! Panels: the unit of work of a matmul kernel, and the loops that all instruction sets share.
//!
//! A [`Panel`] is some weight rows and `N` tokens. A kernel is compiled for one format and one `N`,
//! so that the sums of a weight row with `N` tokens live in registers, and a weight is unpacked
//! once for `N` tokens:
//!
//! ```text
//! for each weight row r:
//!     acc[0..N] = 0
//!     for each group g of 256 values:
//!         prefetch the bytes a little ahead
//!         codes = unpack(row r, group g)                   # 256 codes, 16 scales, 16 minimums
//!         for n in 0..N:
//!             acc[n] += dot(codes, x[n].block[g])   # what each instruction set writes for itself
//!     for n in 0..N:
//!         out[n, r] = sum of the lanes of acc[n]
//! ```
//!
//! The order of additions in a row's sum depends on the instruction set only, never on `N`, the
//! other rows or the other tokens. So a result has the same bits however a matmul is cut into
//! panels.
//!
//! [`quantized_panel`] is that loop for the scalar, AVX2 and NEON kernels, which share the
//! unpacking of [`Format`] and differ in [`BlockDot`]. AVX-512 has a loop of its own, because it
//! unpacks into registers (`x86::avx512`). `float_panel` serves F32, F16 and BF16 weights on
//! every instruction set with `Lanes`.

use super::ActView;
use super::OutMatrix;
use super::activations::ActBlock;
use crate::quant::block::{Codes, Format, GROUP, UnpackOps};

/// Some weight rows, and as many tokens as the kernel that gets the panel is compiled for.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    /// The weight rows, packed.
    pub weights: &'a [u8],
    pub row_bytes: usize,
    /// Column of `out` for the first weight row.
    pub first_row: usize,
    /// Exactly the kernel's number of tokens.
    pub x: ActView<'a>,
    /// Row 0 belongs to the first token of `x`.
    pub out: OutMatrix<'a>,
}

/// Computes a panel.
///
/// # Safety
/// The processor has the kernel's instructions. `x` has the kernel's number of tokens and, for
/// quantized formats, the 8-bit form. `weights` are whole rows of `x.cols()` values, at least one
/// each. `out` holds the whole result, and no other thread touches that part of it.
pub(super) type PanelFn = unsafe fn(&Panel<'_>);

/// Kernels of one format, for 1, 2, 3, ... tokens.
pub(super) type PanelFns = &'static [PanelFn];

/// Dot products of 256 unpacked weights with activations, on one instruction set.
pub(super) trait BlockDot {
    /// Steps of unpacking with this instruction set.
    type Ops: UnpackOps;

    /// Running sum of one weight row with one token, in lanes.
    type Acc: Copy;

    /// Returns the empty sum.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn zero() -> Self::Acc;

    /// Adds the dot products of 256 weights with `N` tokens.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn add_block<F: Format, const N: usize>(
        codes: &Codes,
        x: [&ActBlock; N],
        acc: &mut [Self::Acc; N],
    );

    /// Returns the sum of the lanes.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn sum(acc: Self::Acc) -> f32;

    /// Prefetches weights, `bytes` bytes per group.
    #[inline(always)]
    fn prefetch(_p: *const u8, _bytes: usize) {}
}

/// Computes a panel of a quantized format from its unpacked groups.
///
/// # Safety
/// As [`PanelFn`] for the instruction set of `D`, for which the caller is compiled.
#[inline(always)]
pub(super) unsafe fn quantized_panel<D: BlockDot, F: Format, const N: usize>(panel: &Panel<'_>) {
    let groups = panel.x.cols().div_ceil(GROUP);
    let group_bytes = GROUP / F::TYPE.block_len() * F::TYPE.block_bytes();
    let x = panel.x.blocks();
    let mut codes = Codes::ZERO;
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        // SAFETY: the caller's processor.
        let mut acc = [unsafe { D::zero() }; N];
        for (g, bytes) in row.chunks(group_bytes).enumerate() {
            D::prefetch(bytes.as_ptr(), group_bytes);
            F::unpack_group::<D::Ops>(bytes, &mut codes);
            let mut blocks = [&x[g]; N];
            for (n, block) in blocks.iter_mut().enumerate() {
                *block = &x[n * groups + g];
            }
            // SAFETY: the caller's processor.
            unsafe { D::add_block::<F, N>(&codes, blocks, &mut acc) };
        }
        for (n, acc) in acc.into_iter().enumerate() {
            // SAFETY: the caller's processor; the caller's output holds this element.
            unsafe { panel.out.put(n, panel.first_row + r, D::sum(acc)) };
        }
    }
}
