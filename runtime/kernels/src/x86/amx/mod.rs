//! Matmul kernels for AMX: tiles of 8-bit integers, for prompts, of the formats that are not computed
//! in `bands`.
//!
//! A tile product (`tdpbusd`) multiplies 16 weight rows by 16 tokens over up to 64 bytes, and adds
//! up integers. But values may only be added as integers while they share both scales. So a product
//! here takes 32 values of each row (16 where the format has a scale per 16), and its 16 x 16
//! integers are then scaled with AVX-512, sixteen tokens per register. Those few instructions bound
//! the speed; the tiles themselves are faster.
//!
//! The scaled sums of run 0 of every group are kept apart from those of run 1, and so on. A *lane*
//! is such a position: 8 runs, or 16 half runs. One lane's sums for 16 rows and 16 tokens are 16
//! registers.
//!
//! ```text
//! for each set of tokens whose packed form fits the L2 cache:              # MAX_PACKED_BYTES
//!     pack_tokens: transpose 16 tokens to lines of 4 bytes per token  # the right side of tdpbusd
//!     for each 16 weight rows:
//!         pack_rows: unpack, once for all tokens; one 16-row tile per lane and group
//!         for each lane, for each 16 tokens:                               # accumulate_lane
//!             start the first PRODUCTS_IN_FLIGHT tile products
//!             mins[row] -= row minimum * token sum, over all groups   # while those are under way
//!             for each group g:
//!                 start the tile product of group g + PRODUCTS_IN_FLIGHT
//!                 acc[row] += (float(product of group g) * row scale) * token scale
//!             sums[lane][row] = acc + mins
//!         store_results: add the lanes, transpose to [token, row], store
//! ```
//!
//! Tiles can only be read through memory: a product is stored to one of `PRODUCT_BUFFERS` buffers
//! and loaded from there `PRODUCTS_IN_FLIGHT` products later, so that its latency is hidden.
//!
//! The order of all sums is that of the AVX-512 kernels with `BY_SCALE`, which compute the tokens
//! that are left over.

mod detect;
mod pack;

pub(crate) use detect::available;
pub(super) use pack::{Line, transpose};

use super::avx512_unpack::{self as unpack, MAX_GROUP_BYTES, Unpack};
use crate::panel::{Panel, PanelFn};
use crate::quant::TensorType;
use crate::quant::block::GROUP;
use pack::{Buffers, pack_rows, pack_tokens};
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::mem::MaybeUninit;

/// Tokens per tile product.
pub(super) const TILE_TOKENS: usize = 16;

/// Fewest tokens for which packing pays.
const MIN_TOKENS: usize = 20;

/// Fewest leftover tokens that are worth a tile product of their own.
const MIN_LEFTOVER_TOKENS: usize = 9;

/// Weight rows per tile product.
const TILE_ROWS: usize = 16;

/// Tile products that are started before the first is waited for.
const PRODUCTS_IN_FLIGHT: usize = 2;

/// Buffers for the integers of tile products.
const PRODUCT_BUFFERS: usize = 4;

/// Most bytes of packed activations at a time: they stay in the second-level cache.
const MAX_PACKED_BYTES: usize = 768 << 10;

/// Returns the kernel of a type, and how many of the first of `tokens` tokens it is the fastest
/// for; `None` for float formats and few tokens.
pub(crate) fn kernel_for(ty: TensorType, tokens: usize) -> Option<(PanelFn, usize)> {
    let leftover = tokens % TILE_TOKENS;
    let count = if leftover < MIN_LEFTOVER_TOKENS {
        tokens - leftover
    } else {
        tokens
    };
    let kernel: PanelFn = match ty {
        _ if tokens < MIN_TOKENS => return None,
        TensorType::F32 | TensorType::F16 | TensorType::BF16 => return None,
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
        | TensorType::IQ3_S => return None,
        TensorType::I8 | TensorType::I16 | TensorType::I32 | TensorType::I64 | TensorType::F64 => {
            return None;
        }
        TensorType::Q1_0 => matmul_panel::<unpack::Q1_0>,
        TensorType::Q2_0 => matmul_panel::<unpack::Q2_0>,
        TensorType::TQ1_0 => matmul_panel::<unpack::TQ1_0>,
        TensorType::TQ2_0 => matmul_panel::<unpack::TQ2_0>,
        TensorType::NVFP4 => matmul_panel::<unpack::NVFP4>,
    };
    Some((kernel, count))
}

/// Tile configuration, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

thread_local! {
    /// Scratch memory of this thread.
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Computes a panel of any number of tokens.
///
/// # Safety
/// As [`PanelFn`], and [`available`] was true.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn matmul_panel<U: Unpack>(panel: &Panel<'_>) {
    let lanes = if U::SCALE_PER_16 { 16 } else { 8 };
    let cols = panel.x.cols();
    let groups = cols.div_ceil(GROUP);
    let tokens = panel.x.blocks().len() / groups;
    assert!(U::GROUP_BYTES <= MAX_GROUP_BYTES && panel.row_bytes >= cols / GROUP * U::GROUP_BYTES);
    let group_bytes = TILE_TOKENS * (GROUP + lanes * 8);
    let max_panels = (MAX_PACKED_BYTES / (group_bytes * groups)).max(1);
    let panels = tokens.div_ceil(TILE_TOKENS);
    // As many as make parts of about equal size.
    let panels_at_once = panels.div_ceil(panels.div_ceil(max_panels));
    SCRATCH.with_borrow_mut(|scratch| {
        let to = Buffers::new(scratch, panels_at_once, groups, lanes);
        configure(GROUP / lanes);
        for (i, blocks) in panel
            .x
            .blocks()
            .chunks(panels_at_once * TILE_TOKENS * groups)
            .enumerate()
        {
            let first_token = i * panels_at_once * TILE_TOKENS;
            let n_panels = (blocks.len() / groups).div_ceil(TILE_TOKENS);
            for (p, blocks) in blocks.chunks(TILE_TOKENS * groups).enumerate() {
                // SAFETY: the buffers were made for so many; the instructions are the caller's
                // promise.
                unsafe { pack_tokens::<U>(blocks, p, groups, &to) };
            }
            for (b, rows) in panel
                .weights
                .chunks(TILE_ROWS * panel.row_bytes)
                .enumerate()
            {
                let n_rows = rows.len() / panel.row_bytes;
                // SAFETY: the buffers were made for so many; the tiles are configured, and the
                // caller's output holds the product.
                unsafe {
                    pack_rows::<U>(rows, panel.row_bytes, cols, &to);
                    for lane in 0..lanes {
                        for p in 0..n_panels {
                            accumulate_lane::<U>(lane, p, groups, &to);
                        }
                    }
                    for p in 0..n_panels {
                        let count = (blocks.len() / groups - p * TILE_TOKENS).min(TILE_TOKENS);
                        let (token, row) = (
                            first_token + p * TILE_TOKENS,
                            panel.first_row + b * TILE_ROWS,
                        );
                        store_results(
                            panel,
                            token,
                            count,
                            row,
                            n_rows,
                            to.sums.add(p * lanes * TILE_ROWS * TILE_TOKENS),
                            lanes,
                        );
                    }
                }
            }
        }
        // SAFETY: gives the tiles back, which nothing reads any more.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    });
}

/// Configures tile 0 for results, tile 1 for `bytes` bytes of each row of the left side, tile 2 for
/// as many of each column of the right side.
#[inline]
pub(super) fn configure(bytes: usize) {
    let mut config = TileConfig {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [0; 16],
        rows: [0; 16],
    };
    config.row_bytes[..3].copy_from_slice(&[64, bytes as u16, 64]);
    config.rows[..3].copy_from_slice(&[TILE_ROWS as u8, TILE_ROWS as u8, (bytes / 4) as u8]);
    // SAFETY: a valid configuration of palette 1; only kernels of `Isa::Amx` run this, on a
    // processor with tiles.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const config, options(readonly, nostack, preserves_flags))
    };
}

/// Multiplies 16 rows by 16 tokens, and adds up one lane over all groups.
///
/// # Safety
/// The buffers are filled, the tiles configured, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn accumulate_lane<U: Unpack>(lane: usize, p: usize, groups: usize, from: &Buffers) {
    #[repr(C, align(64))]
    struct Products(MaybeUninit<[i32; PRODUCT_BUFFERS * TILE_ROWS * TILE_TOKENS]>);
    let lanes = if U::SCALE_PER_16 { 16 } else { 8 };
    let bytes = GROUP / lanes;
    let step = (p * lanes + lane) * groups;
    let mut products = Products(MaybeUninit::uninit());
    let products = products.0.as_mut_ptr().cast::<i32>();
    // SAFETY: the parts of the buffers for this lane and these tokens.
    let (x, x_scales, w, w_scales, sums) = unsafe {
        (
            from.x.add(step * TILE_TOKENS * bytes),
            from.x_scales.add(step * 2 * TILE_TOKENS),
            from.w.add(lane * groups * TILE_ROWS * bytes),
            from.w_scales.add(lane * groups * 2 * TILE_ROWS),
            from.sums.add((p * lanes + lane) * TILE_ROWS * TILE_TOKENS),
        )
    };
    let start_product = |g: usize| {
        // SAFETY: tiles of group `g`, and a buffer for one product.
        unsafe {
            let to = products.add(g % PRODUCT_BUFFERS * TILE_ROWS * TILE_TOKENS);
            tile_product(
                w.add(g * TILE_ROWS * bytes),
                x.add(g * TILE_TOKENS * bytes),
                to,
                bytes,
            );
        }
    };
    for g in 0..PRODUCTS_IN_FLIGHT.min(groups) {
        start_product(g);
    }
    // The minimums first, while the first products are under way: registers hold sums of one kind
    // at a time.
    let mut mins = [_mm512_setzero_ps(); TILE_ROWS];
    for g in 0..groups {
        // SAFETY: scales of group `g`.
        unsafe {
            let sum = _mm512_load_ps(x_scales.add(g * 2 * TILE_TOKENS + TILE_TOKENS));
            let min = w_scales.add(g * 2 * TILE_ROWS + TILE_ROWS);
            for (r, acc) in mins.iter_mut().enumerate() {
                *acc = _mm512_fnmadd_ps(_mm512_set1_ps(*min.add(r)), sum, *acc);
            }
        }
    }
    for (r, acc) in mins.into_iter().enumerate() {
        // SAFETY: the sums of this lane and these rows.
        unsafe { _mm512_store_ps(sums.add(r * TILE_TOKENS), acc) };
    }
    let mut acc = [_mm512_setzero_ps(); TILE_ROWS];
    for g in 0..groups {
        if g + PRODUCTS_IN_FLIGHT < groups {
            start_product(g + PRODUCTS_IN_FLIGHT);
        }
        // SAFETY: scales of group `g`, and products that were stored.
        unsafe {
            let scale = _mm512_load_ps(x_scales.add(g * 2 * TILE_TOKENS));
            let weights = w_scales.add(g * 2 * TILE_ROWS);
            let products = products.add(g % PRODUCT_BUFFERS * TILE_ROWS * TILE_TOKENS);
            for (r, acc) in acc.iter_mut().enumerate() {
                let product =
                    _mm512_cvtepi32_ps(_mm512_load_si512(products.add(r * TILE_TOKENS).cast()));
                let product = _mm512_mul_ps(product, _mm512_set1_ps(*weights.add(r)));
                *acc = _mm512_fmadd_ps(product, scale, *acc);
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        // SAFETY: the sums of this lane and these rows.
        unsafe {
            let to = sums.add(r * TILE_TOKENS);
            _mm512_store_ps(to, _mm512_add_ps(acc, _mm512_load_ps(to)));
        }
    }
}

/// Multiplies a tile of 16 rows, `bytes` bytes of each, by a tile of 16 tokens.
///
/// # Safety
/// The tiles are configured for `bytes`, both operands are whole tiles, and 16 x 16 integers can be
/// written. No other code uses tiles.
#[inline(always)]
unsafe fn tile_product(w: *const u8, x: *const i8, to: *mut i32, bytes: usize) {
    // SAFETY: the caller's tiles.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tileloadd tmm1, [{w} + {bytes}]",
            "tileloadd tmm2, [{x} + {line}]",
            "tdpbusd tmm0, tmm1, tmm2",
            "tilestored [{to} + {line}], tmm0",
            w = in(reg) w,
            x = in(reg) x,
            to = in(reg) to,
            bytes = in(reg) bytes,
            line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _,
            options(nostack, preserves_flags),
        );
    }
}

/// Adds up the lanes of `[lanes, 16, 16]` sums, in the order of `_mm512_reduce_add_ps`, and stores
/// the results of `n_rows` rows with `count` tokens.
///
/// # Safety
/// The output holds them, no other thread touches them, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn store_results(
    panel: &Panel<'_>,
    token: usize,
    count: usize,
    row: usize,
    n_rows: usize,
    sums: *const f32,
    lanes: usize,
) {
    let mut rows = [_mm512_setzero_si512(); TILE_ROWS];
    for (r, out) in rows.iter_mut().enumerate().take(n_rows) {
        let mut all = [_mm512_setzero_ps(); 16];
        for (lane, sum) in all.iter_mut().enumerate().take(lanes) {
            // SAFETY: the sums of a lane and a row.
            *sum = unsafe { _mm512_load_ps(sums.add((lane * TILE_ROWS + r) * TILE_TOKENS)) };
        }
        let mut n = lanes;
        while n > 1 {
            n /= 2;
            for lane in 0..n {
                all[lane] = _mm512_add_ps(all[lane], all[lane + n]);
            }
        }
        // With 8 lanes the register's other 8 are zero: they make a negative zero positive.
        let sum = if lanes == 8 {
            _mm512_add_ps(all[0], _mm512_setzero_ps())
        } else {
            all[0]
        };
        *out = _mm512_castps_si512(sum);
    }
    let mask = (0xffffu32 >> (16 - n_rows)) as __mmask16;
    for (t, values) in transpose(rows).into_iter().enumerate().take(count) {
        // SAFETY: the caller's output.
        unsafe { _mm512_mask_storeu_epi32(panel.out.at(token + t, row).cast(), mask, values) };
    }
}
