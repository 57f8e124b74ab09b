//! Packing weights and activations into tiles, in the scratch memory of a thread.

use super::{TILE_ROWS, TILE_TOKENS};
use crate::activations::ActBlock;
use crate::quant::block::GROUP;
use crate::x86::avx512_unpack::{MAX_GROUP_BYTES, Tile, Unpack};
use crate::x86::prefetch;
use std::arch::x86_64::*;

/// A cache line, to which scratch memory is aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(in crate::x86) struct Line([u8; 64]);

impl Line {
    pub(in crate::x86) const ZERO: Line = Line([0; 64]);
}

/// Parts of a thread's scratch memory, for a format with `lanes` lanes (8 of 32 values or 16 of
/// 16).
///
/// Lane is the outer dimension and group the inner one, on both sides, so that `accumulate_lane`
/// reads memory in one direction.
pub(super) struct Buffers {
    /// Packed activations, `[token / 16, lanes, groups, 64 / lanes, 16, 4]`.
    pub x: *mut i8,
    /// Scales and sums of the activations, `[token / 16, lanes, groups, 2, 16]`.
    pub x_scales: *mut f32,
    /// Codes of 16 rows, `[lanes, groups, 16, 256 / lanes]`.
    pub w: *mut u8,
    /// Scales and minimums of 16 rows per 16 values, as they are unpacked, `[groups, 2, 16, 16]`.
    pub w_unsorted: *mut f32,
    /// Scales and minimums of 16 rows by lane, `[lanes, groups, 2, 16]`.
    pub w_scales: *mut f32,
    /// Sums of rows with tokens, `[token / 16, lanes, 16, 16]`.
    pub sums: *mut f32,
}

impl Buffers {
    /// Lays the parts out in `scratch`, for `panels` times 16 tokens, and grows it if needed.
    pub fn new(scratch: &mut Vec<Line>, panels: usize, groups: usize, lanes: usize) -> Self {
        let x = panels * groups * TILE_TOKENS * GROUP / 64;
        let x_scales = panels * groups * lanes * 2;
        let w = groups * TILE_ROWS * GROUP / 64;
        let w_unsorted = groups * TILE_ROWS * 2;
        let w_scales = groups * lanes * 2;
        let sums = panels * lanes * TILE_ROWS;
        let all = x + x_scales + w + w_unsorted + w_scales + sums;
        if scratch.len() < all {
            scratch.resize(all, Line::ZERO);
        }
        let base = scratch.as_mut_ptr();
        // SAFETY: the parts lie one after another within the `all` lines there are.
        unsafe {
            Self {
                x: base.cast(),
                x_scales: base.add(x).cast(),
                w: base.add(x + x_scales).cast(),
                w_unsorted: base.add(x + x_scales + w).cast(),
                w_scales: base.add(x + x_scales + w + w_unsorted).cast(),
                sums: base.add(x + x_scales + w + w_unsorted + w_scales).cast(),
            }
        }
    }
}

/// Packs up to 16 tokens with their scales, and zeros for those that are missing.
///
/// # Safety
/// The buffers have room, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn pack_tokens<U: Unpack>(
    blocks: &[ActBlock],
    p: usize,
    groups: usize,
    to: &Buffers,
) {
    let lanes = if U::SCALE_PER_16 { 16 } else { 8 };
    let tile = TILE_TOKENS * GROUP / lanes;
    let count = blocks.len() / groups;
    for g in 0..groups {
        let read = |at: &dyn Fn(&ActBlock) -> __m512i| {
            let mut rows = [_mm512_setzero_si512(); TILE_TOKENS];
            for (t, row) in rows.iter_mut().enumerate().take(count) {
                *row = at(&blocks[t * groups + g]);
            }
            transpose(rows)
        };
        let step = |lane: usize| (p * lanes + lane) * groups + g;
        for eight in 0..4 {
            // SAFETY: a block has four registers of values.
            let columns = read(&|block| unsafe {
                _mm512_load_si512(block.q.as_ptr().cast::<__m512i>().add(eight))
            });
            for (i, column) in columns.into_iter().enumerate() {
                let (run, half) = (i / 2, i % 2);
                let (lane, line) = if U::SCALE_PER_16 {
                    (2 * run + eight / 2, 2 * (eight % 2) + half)
                } else {
                    (run, 2 * eight + half)
                };
                // SAFETY: the tile of this lane and group has this line.
                unsafe {
                    _mm512_store_si512(to.x.add(step(lane) * tile + line * 64).cast(), column)
                };
            }
        }
        // SAFETY: a block has a register of scales and one of sums.
        let scales = read(&|block| unsafe { _mm512_load_si512(block.scale.as_ptr().cast()) });
        // SAFETY: a block has a register of sums.
        let sums = read(&|block| unsafe { _mm512_load_si512(block.sums.as_ptr().cast()) })
            .map(|s| _mm512_castsi512_ps(s));
        for lane in 0..lanes {
            let (scale, sum) = if U::SCALE_PER_16 {
                (scales[lane], sums[lane])
            } else {
                (
                    scales[2 * lane],
                    _mm512_add_ps(sums[2 * lane], sums[2 * lane + 1]),
                )
            };
            // SAFETY: every lane and group has two registers.
            unsafe {
                let to = to.x_scales.add(step(lane) * 2 * TILE_TOKENS);
                _mm512_store_si512(to.cast(), scale);
                _mm512_store_ps(to.add(TILE_TOKENS), sum);
            }
        }
    }
}

/// Unpacks up to 16 rows and packs them into tiles.
///
/// # Safety
/// The rows have `cols` values each, the buffers have room, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn pack_rows<U: Unpack>(
    rows: &[u8],
    row_bytes: usize,
    cols: usize,
    to: &Buffers,
) {
    let (whole, groups) = (cols / GROUP, cols.div_ceil(GROUP));
    for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
        let mut w = row.as_ptr();
        for g in 0..whole {
            prefetch(w, U::GROUP_BYTES);
            // SAFETY: the row has `whole` groups.
            unsafe {
                pack_group::<U>(U::unpack(w), r, g, groups, to);
                w = w.add(U::GROUP_BYTES);
            }
        }
        if whole < groups {
            let mut padded = [0u8; MAX_GROUP_BYTES];
            let tail = &row[whole * U::GROUP_BYTES..];
            padded[..tail.len()].copy_from_slice(tail);
            // SAFETY: `padded` is a whole group.
            unsafe { pack_group::<U>(U::unpack(padded.as_ptr()), r, whole, groups, to) };
        }
    }
    let (lanes, stride) = if U::SCALE_PER_16 { (16, 1) } else { (8, 2) };
    for i in 0..2 * groups {
        let mut rows = [_mm512_setzero_si512(); TILE_ROWS];
        for (r, row) in rows.iter_mut().enumerate() {
            // SAFETY: the scales or the minimums of a group.
            *row = unsafe { _mm512_load_si512(to.w_unsorted.add((i * TILE_ROWS + r) * 16).cast()) };
        }
        let columns = transpose(rows);
        for lane in 0..lanes {
            // SAFETY: every lane and group has two registers.
            unsafe {
                _mm512_store_si512(
                    to.w_scales.add((lane * groups * 2 + i) * 16).cast(),
                    columns[lane * stride],
                )
            };
        }
    }
}

/// Writes 256 weights of a row to their tiles.
///
/// # Safety
/// The buffers have room, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn pack_group<U: Unpack>(tile: Tile, row: usize, g: usize, groups: usize, to: &Buffers) {
    let [q0, q1, q2, q3] = tile.q;
    // First and second halves of runs 0, 2, 4 and 6, then those of runs 1, 3, 5 and 7.
    let even = [_mm512_unpacklo_epi64(q0, q1), _mm512_unpacklo_epi64(q2, q3)];
    let odd = [_mm512_unpackhi_epi64(q0, q1), _mm512_unpackhi_epi64(q2, q3)];
    // SAFETY: every lane and group has 16 rows.
    unsafe {
        for (parity, [first, second]) in [even, odd].into_iter().enumerate() {
            if U::SCALE_PER_16 {
                for (half, v) in [first, second].into_iter().enumerate() {
                    let to = |run: usize| {
                        to.w.add((((2 * run + half) * groups + g) * TILE_ROWS + row) * 16)
                            .cast()
                    };
                    _mm_store_si128(to(parity), _mm512_castsi512_si128(v));
                    _mm_store_si128(to(2 + parity), _mm512_extracti32x4_epi32::<1>(v));
                    _mm_store_si128(to(4 + parity), _mm512_extracti32x4_epi32::<2>(v));
                    _mm_store_si128(to(6 + parity), _mm512_extracti32x4_epi32::<3>(v));
                }
            } else {
                let to = |run: usize| to.w.add(((run * groups + g) * TILE_ROWS + row) * 32).cast();
                let low = _mm512_permutex2var_epi64(
                    first,
                    _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                    second,
                );
                let high = _mm512_permutex2var_epi64(
                    first,
                    _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15),
                    second,
                );
                _mm256_store_si256(to(parity), _mm512_castsi512_si256(low));
                _mm256_store_si256(to(2 + parity), _mm512_extracti64x4_epi64::<1>(low));
                _mm256_store_si256(to(4 + parity), _mm512_castsi512_si256(high));
                _mm256_store_si256(to(6 + parity), _mm512_extracti64x4_epi64::<1>(high));
            }
        }
        let scales = to.w_unsorted.add((g * 2 * TILE_ROWS + row) * 16);
        _mm512_store_ps(scales, tile.scale);
        _mm512_store_ps(scales.add(TILE_ROWS * 16), tile.min);
    }
}

/// Transposes 16 rows of 16 columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(in crate::x86) fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let zero = _mm512_setzero_si512();
    let (mut quads, mut out) = ([zero; 16], [zero; 16]);
    // Of each four rows, column `c` of every four columns.
    for i in 0..4 {
        let [a, b, c, d] = [
            rows[4 * i],
            rows[4 * i + 1],
            rows[4 * i + 2],
            rows[4 * i + 3],
        ];
        let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (low2, high2) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        quads[i] = _mm512_unpacklo_epi64(low, low2);
        quads[4 + i] = _mm512_unpackhi_epi64(low, low2);
        quads[8 + i] = _mm512_unpacklo_epi64(high, high2);
        quads[12 + i] = _mm512_unpackhi_epi64(high, high2);
    }
    for c in 0..4 {
        let [q0, q1, q2, q3] = [
            quads[4 * c],
            quads[4 * c + 1],
            quads[4 * c + 2],
            quads[4 * c + 3],
        ];
        let (even, odd) = (
            _mm512_shuffle_i32x4::<0x88>(q0, q1),
            _mm512_shuffle_i32x4::<0xdd>(q0, q1),
        );
        let (even2, odd2) = (
            _mm512_shuffle_i32x4::<0x88>(q2, q3),
            _mm512_shuffle_i32x4::<0xdd>(q2, q3),
        );
        out[c] = _mm512_shuffle_i32x4::<0x88>(even, even2);
        out[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
        out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
        out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
    }
    out
}
