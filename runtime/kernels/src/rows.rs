//! Rows of past tokens (KV cache): storing them in 8 bits, widening them, and what attention
//! computes over them.
//!
//! A row in 8 bits is its values in blocks of 32, the last of which may be shorter. A block is a
//! 16-bit float scale, then one signed byte per value: `Q8_0` with a shorter last block.
//!
//! A result has the same bits whatever other queries and rows are in the call, and whether rows are
//! given as they are stored or were widened before.

use super::Kernels;
use super::ops::{LANES, exp, fma, lanes_sum};
use crate::quant::block::f16_to_f32;
use half::f16;
use std::ops::Range;

/// Values per scale.
pub(super) const BLOCK: usize = 32;

/// Largest code; its negative is the smallest.
const LARGEST_CODE: f32 = 127.0;

/// Returns the bytes per row of `width` values in 8 bits: one per value, and two per block of 32
/// that is begun.
#[inline]
pub const fn q8_row_bytes(width: usize) -> usize {
    width.saturating_add(2 * width.div_ceil(BLOCK))
}

/// Packed rows of one width, in the format in which they are stored.
#[derive(Debug, Clone, Copy)]
pub enum StoredRows<'a> {
    /// Rows of 32-bit floats.
    F32(&'a [f32]),
    /// Rows of 16-bit floats.
    F16(&'a [f16]),
    /// Rows in 8 bits, as [`Kernels::to_q8`] writes them.
    Q8(&'a [u8]),
}

impl<'a> StoredRows<'a> {
    /// Returns the number of rows of `width` values.
    ///
    /// # Panics
    /// When `width` is 0, or the length is not a multiple of a row's.
    #[inline]
    pub fn count(self, width: usize) -> usize {
        let (len, row) = match self {
            StoredRows::F32(rows) => (rows.len(), width),
            StoredRows::F16(rows) => (rows.len(), width),
            StoredRows::Q8(rows) => (rows.len(), q8_row_bytes(width)),
        };
        assert_eq!(len % row, 0, "whole rows");
        len / row
    }

    /// Returns the rows as bytes in this machine's order.
    #[inline]
    pub fn bytes(self) -> &'a [u8] {
        let (start, len) = match self {
            StoredRows::F32(rows) => (rows.as_ptr().cast(), size_of_val(rows)),
            StoredRows::F16(rows) => (rows.as_ptr().cast(), size_of_val(rows)),
            StoredRows::Q8(rows) => (rows.as_ptr(), rows.len()),
        };
        // SAFETY: the bytes of numbers, which have no padding.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// Returns a range of the rows.
    ///
    /// # Panics
    /// When the range is out of bounds.
    #[inline]
    pub fn range(self, rows: Range<usize>, width: usize) -> Self {
        let part = |row: usize| rows.start * row..rows.end * row;
        match self {
            StoredRows::F32(all) => StoredRows::F32(&all[part(width)]),
            StoredRows::F16(all) => StoredRows::F16(&all[part(width)]),
            StoredRows::Q8(all) => StoredRows::Q8(&all[part(q8_row_bytes(width))]),
        }
    }
}

/// Rows that a kernel reads, and what the next one reads.
#[derive(Debug, Clone, Copy)]
pub struct RowBlock<'a> {
    /// The rows.
    pub rows: StoredRows<'a>,
    /// Values per row.
    pub width: usize,
    /// Bytes to prefetch meanwhile, evenly over the kernel's work; none by default. Only kernels for
    /// x86-64 do so.
    pub next: &'a [u8],
}

impl<'a> RowBlock<'a> {
    /// Makes a block of rows of `width` values.
    pub fn new(rows: StoredRows<'a>, width: usize) -> Self {
        Self {
            rows,
            width,
            next: &[],
        }
    }

    /// Returns the number of rows.
    fn count(self) -> usize {
        self.rows.count(self.width)
    }
}

impl Kernels {
    /// Widens rows of `width` values to 32-bit floats.
    ///
    /// # Panics
    /// When `width` is 0, or `out` is not exactly as long as these rows.
    #[inline]
    pub fn widen_rows(self, rows: StoredRows<'_>, width: usize, out: &mut [f32]) {
        match rows {
            StoredRows::F32(rows) => out.copy_from_slice(rows),
            StoredRows::F16(rows) => self.from_f16(rows, out),
            StoredRows::Q8(rows) => self.from_q8(rows, width, out),
        }
    }

    /// Quantizes a row to 8 bits. The error of a value is at most half a step of its block, a step
    /// being the block's largest magnitude / 127, rounded up to a 16-bit float.
    ///
    /// A block with an infinity, a NaN or a magnitude above 8 million comes back as NaN.
    ///
    /// # Panics
    /// When `out` is not [`q8_row_bytes`] long.
    #[inline]
    pub fn to_q8(self, x: &[f32], out: &mut [u8]) {
        assert_eq!(out.len(), q8_row_bytes(x.len()), "bytes of a row in 8 bits");
        dispatch!(self, to_q8(x: &[f32], out: &mut [u8]))
    }

    /// Dequantizes rows of `width` values that [`to_q8`](Self::to_q8) wrote.
    ///
    /// # Panics
    /// When `width` is 0, or the lengths are not those of the same whole rows.
    #[inline]
    pub fn from_q8(self, rows: &[u8], width: usize, out: &mut [f32]) {
        let n = out.len() / width;
        assert!(
            out.len() == n * width && rows.len() == n * q8_row_bytes(width),
            "lengths of rows in 8 bits"
        );
        dispatch!(self, from_q8(rows: &[u8], width: usize, out: &mut [f32]))
    }

    /// Widens 16-bit floats.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn from_f16(self, x: &[f16], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "lengths of a conversion");
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves the instructions (AVX-512 comes with AVX2 and F16C); the
            // lengths are equal.
            crate::Isa::Amx | crate::Isa::Avx512 | crate::Isa::Avx2 => unsafe {
                super::x86::rows::widen(x, out)
            },
            _ => {
                for (to, from) in out.iter_mut().zip(x) {
                    *to = f16_to_f32(from.to_bits());
                }
            }
        }
    }

    /// Computes attention scores: `scores[q * stride + r] = query q . row r`. Queries are as wide as
    /// rows; the elements of `scores` between its rows are not written.
    ///
    /// # Panics
    /// When the width is 0, `queries` or the block are not whole rows, or `scores` is too short.
    #[inline]
    pub fn row_dots(self, queries: &[f32], block: RowBlock<'_>, scores: &mut [f32], stride: usize) {
        let RowBlock { rows, width, .. } = block;
        let (n_queries, n_rows) = (StoredRows::F32(queries).count(width), block.count());
        if n_queries == 0 || n_rows == 0 {
            return;
        }
        assert!(
            n_rows <= stride && fits(n_queries, stride, n_rows, scores.len()),
            "room for scores"
        );
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves the instructions; the lengths are checked above.
            crate::Isa::Amx | crate::Isa::Avx512 => unsafe {
                super::x86::rows::avx512(block).dots(queries, scores, stride)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves the instructions; the lengths are checked above.
            crate::Isa::Avx2 => unsafe {
                super::x86::rows::avx2(block).dots(queries, scores, stride)
            },
            _ => {
                let mut row = vec![0.0; width];
                for r in 0..n_rows {
                    self.widen_rows(rows.range(r..r + 1, width), width, &mut row);
                    for (q, query) in queries.chunks_exact(width).enumerate() {
                        scores[q * stride + r] = lanes_sum(query, &row, |sum, a, b| sum + a * b);
                    }
                }
            }
        }
    }

    /// Adds weighted rows: `out[q] += sum over r of weights[q * stride + r] * row r`, in the order
    /// of the rows, of which the first `out_width` values are read.
    ///
    /// # Panics
    /// When a width is 0, the block or `out` are not whole rows, or `weights` is too short.
    #[inline]
    pub fn add_weighted_rows(
        self,
        weights: &[f32],
        stride: usize,
        block: RowBlock<'_>,
        out: &mut [f32],
        out_width: usize,
    ) {
        let RowBlock { rows, width, .. } = block;
        let (n_queries, n_rows) = (StoredRows::F32(out).count(out_width), block.count());
        assert!(out_width <= width, "rows as wide as the result");
        if n_queries == 0 || n_rows == 0 {
            return;
        }
        assert!(
            fits(n_queries, stride, n_rows, weights.len()),
            "a weight for each row"
        );
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves the instructions; the lengths are checked above.
            crate::Isa::Amx | crate::Isa::Avx512 => unsafe {
                super::x86::rows::avx512(block).mix(weights, stride, out, out_width)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves the instructions; the lengths are checked above.
            crate::Isa::Avx2 => unsafe {
                super::x86::rows::avx2(block).mix(weights, stride, out, out_width)
            },
            _ => {
                let mut row = vec![0.0; width];
                for r in 0..n_rows {
                    self.widen_rows(rows.range(r..r + 1, width), width, &mut row);
                    for (q, out) in out.chunks_exact_mut(out_width).enumerate() {
                        let weight = weights[q * stride + r];
                        out.iter_mut()
                            .zip(&row)
                            .for_each(|(out, v)| *out += weight * v);
                    }
                }
            }
        }
    }

    /// Computes the numerators of a softmax, `x = exp(x - max(x))`. Returns the maximum and the sum
    /// of the results: minus infinity and 0 for an empty slice.
    #[inline]
    pub fn exp_minus_max(self, x: &mut [f32]) -> (f32, f32) {
        dispatch!(self, exp_minus_max(x: &mut [f32]) -> (f32, f32))
    }

    /// Computes `y = a * y + b * x`.
    ///
    /// # Panics
    /// When the lengths differ.
    #[inline]
    pub fn axpby(self, a: f32, y: &mut [f32], b: f32, x: &[f32]) {
        assert_eq!(x.len(), y.len(), "lengths of a sum");
        dispatch!(self, axpby(a: f32, y: &mut [f32], b: f32, x: &[f32]))
    }
}

/// Whether `len` values hold `n` runs of `run`, their beginnings `stride` apart; `n` is not 0.
fn fits(n: usize, stride: usize, run: usize, len: usize) -> bool {
    (n - 1)
        .checked_mul(stride)
        .and_then(|last| last.checked_add(run))
        .is_some_and(|end| end <= len)
}

/// Returns the least 16-bit float not below `largest / 127`, so that no code is out of range.
fn q8_scale(largest: f32) -> f16 {
    let exact = largest / LARGEST_CODE;
    let near = f16::from_f32_const(exact);
    if near.to_f32_const() < exact {
        f16::from_bits(near.to_bits() + 1)
    } else {
        near
    }
}

#[inline(always)]
fn to_q8<const FUSED: bool>(x: &[f32], out: &mut [u8]) {
    for (block, out) in x.chunks(BLOCK).zip(out.chunks_mut(BLOCK + 2)) {
        // Compared as bits: a NaN is the largest and ends up in the scale.
        let bits = block
            .iter()
            .fold(0, |most, v| (v.to_bits() & 0x7fff_ffff).max(most));
        let scale = q8_scale(f32::from_bits(bits));
        let inverse = if scale == f16::ZERO {
            0.0
        } else {
            1.0 / f16_to_f32(scale.to_bits())
        };
        out[..2].copy_from_slice(&scale.to_le_bytes());
        for (code, v) in out[2..].iter_mut().zip(block) {
            *code = (v * inverse).round_ties_even() as i8 as u8;
        }
    }
}

#[inline(always)]
fn from_q8<const FUSED: bool>(rows: &[u8], width: usize, out: &mut [f32]) {
    for (row, out) in rows
        .chunks_exact(q8_row_bytes(width))
        .zip(out.chunks_exact_mut(width))
    {
        let (blocks, rest) = row.as_chunks::<{ BLOCK + 2 }>();
        let (outs, out_rest) = out.as_chunks_mut::<BLOCK>();
        for (block, out) in blocks.iter().zip(outs) {
            let scale = f16_to_f32(u16::from_le_bytes([block[0], block[1]]));
            for i in 0..BLOCK {
                out[i] = scale * f32::from(block[2 + i] as i8);
            }
        }
        if let [low, high, codes @ ..] = rest {
            let scale = f16_to_f32(u16::from_le_bytes([*low, *high]));
            for (out, code) in out_rest.iter_mut().zip(codes) {
                *out = scale * f32::from(*code as i8);
            }
        }
    }
}

#[inline(always)]
fn exp_minus_max<const FUSED: bool>(x: &mut [f32]) -> (f32, f32) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane = *v;
    }
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] {
                chunk[i]
            } else {
                lanes[i]
            };
        }
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for v in x.iter_mut() {
        *v = exp::<FUSED>(*v - largest);
    }
    (largest, lanes_sum(x, x, |sum, v, _| sum + v))
}

#[inline(always)]
fn axpby<const FUSED: bool>(a: f32, y: &mut [f32], b: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = fma::<FUSED>(b, *x, a * *y);
    }
}

#[cfg(test)]
mod tests;
