//! Rows of past tokens: storing them in 8 bits, widening them again, and what attention computes over them.
//!
//! A row in 8 bits is its values in blocks of 32, the last one as short as it comes: a 16-bit float scale, then a signed
//! byte a value.
//!
//! A result has the same bits whatever other queries and rows are beside it in a call, and whether rows are given as they
//! are stored or widened before.

#[cfg(target_arch = "x86_64")]
use super::Isa;
use super::Kernels;
use super::ops::{exp, fma, lanes_sum};
use crate::quant::block::f16_to_f32;
use half::f16;
use std::ops::Range;

/// Values that share a scale.
pub(super) const BLOCK: usize = 32;

/// The largest code; its negative is the smallest.
const LARGEST_CODE: f32 = 127.0;

/// Bytes of a row of `width` values in 8 bits: one a value, and two for each block of 32 that is begun.
pub const fn q8_row_bytes(width: usize) -> usize {
    width.saturating_add(2 * width.div_ceil(BLOCK))
}

/// Rows of one width as they are stored, packed.
#[derive(Debug, Clone, Copy)]
pub enum StoredRows<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 16-bit floats.
    F16(&'a [f16]),
    /// As [`Kernels::to_q8`] stores them.
    Q8(&'a [u8]),
}

impl StoredRows<'_> {
    /// How many rows of `width` values they are.
    ///
    /// # Panics
    /// When `width` is 0, or they are not whole rows.
    pub fn count(self, width: usize) -> usize {
        let (len, row) = match self {
            StoredRows::F32(rows) => (rows.len(), width),
            StoredRows::F16(rows) => (rows.len(), width),
            StoredRows::Q8(rows) => (rows.len(), q8_row_bytes(width)),
        };
        assert_eq!(len % row, 0, "whole rows");
        len / row
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn range(self, rows: Range<usize>, width: usize) -> Self {
        let part = |row: usize| rows.start * row..rows.end * row;
        match self {
            StoredRows::F32(all) => StoredRows::F32(&all[part(width)]),
            StoredRows::F16(all) => StoredRows::F16(&all[part(width)]),
            StoredRows::Q8(all) => StoredRows::Q8(&all[part(q8_row_bytes(width))]),
        }
    }
}

impl Kernels {
    /// Widens rows of `width` values.
    ///
    /// # Panics
    /// When `width` is 0, or `out` has not room for exactly these rows.
    pub fn widen_rows(self, rows: StoredRows<'_>, width: usize, out: &mut [f32]) {
        match rows {
            StoredRows::F32(rows) => out.copy_from_slice(rows),
            StoredRows::F16(rows) => self.from_f16(rows, out),
            StoredRows::Q8(rows) => self.from_q8(rows, width, out),
        }
    }

    /// Stores a row in 8 bits. Every value comes back to half a step of its block, a step being the block's largest
    /// magnitude by 127, rounded up to a 16-bit float. A block with something infinite, a NaN or a magnitude above 8
    /// million comes back as NaN.
    ///
    /// # Panics
    /// When `out` has not the length that [`q8_row_bytes`] says.
    pub fn to_q8(self, x: &[f32], out: &mut [u8]) {
        assert_eq!(out.len(), q8_row_bytes(x.len()), "bytes of a row in 8 bits");
        dispatch!(self, to_q8(x: &[f32], out: &mut [u8]))
    }

    /// Widens rows of `width` values that [`to_q8`](Self::to_q8) stored.
    ///
    /// # Panics
    /// When `width` is 0, or the lengths are not those of the same whole rows.
    pub fn from_q8(self, rows: &[u8], width: usize, out: &mut [f32]) {
        let n = out.len() / width;
        assert!(out.len() == n * width && rows.len() == n * q8_row_bytes(width), "lengths of rows in 8 bits");
        dispatch!(self, from_q8(rows: &[u8], width: usize, out: &mut [f32]))
    }

    /// Widens 16-bit floats.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn from_f16(self, x: &[f16], out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "lengths of a conversion");
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves the instructions (AVX-512 comes with AVX2 and F16C); the lengths are equal.
            Isa::Amx | Isa::Avx512 | Isa::Avx2 => unsafe { super::x86::rows::widen(x, out) },
            _ => {
                for (to, from) in out.iter_mut().zip(x) {
                    *to = f16_to_f32(from.to_bits());
                }
            }
        }
    }

    /// `scores[q · stride + r] = query q · row r`; queries and rows are of `width` values, what is between the rows of
    /// scores stays.
    ///
    /// # Panics
    /// When `width` is 0, `queries` or `rows` are not whole rows, or there is no room for the scores.
    pub fn row_dots(self, queries: &[f32], rows: StoredRows<'_>, width: usize, scores: &mut [f32], stride: usize) {
        let (n_queries, n_rows) = (StoredRows::F32(queries).count(width), rows.count(width));
        if n_queries == 0 || n_rows == 0 {
            return;
        }
        assert!(n_rows <= stride && fits(n_queries, stride, n_rows, scores.len()), "room for scores");
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves the instructions; the lengths are checked above.
            Isa::Amx | Isa::Avx512 => unsafe { super::x86::rows::avx512::dots(queries, rows, width, scores, stride) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { super::x86::rows::avx2::dots(queries, rows, width, scores, stride) },
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

    /// `out[q] += Σ_r weights[q · stride + r] · row r`, in the order of the rows. Rows are of `width` values, of which
    /// the first ones as many as `out_width` are read.
    ///
    /// # Panics
    /// When a width is 0, `rows` or `out` are not whole rows, or the weights don't reach.
    pub fn mix_rows(
        self,
        weights: &[f32],
        stride: usize,
        rows: StoredRows<'_>,
        width: usize,
        out: &mut [f32],
        out_width: usize,
    ) {
        let (n_queries, n_rows) = (StoredRows::F32(out).count(out_width), rows.count(width));
        assert!(out_width <= width, "rows as wide as the result");
        if n_queries == 0 || n_rows == 0 {
            return;
        }
        assert!(fits(n_queries, stride, n_rows, weights.len()), "a weight for each row");
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `self` proves the instructions; the lengths are checked above.
            Isa::Amx | Isa::Avx512 => unsafe {
                super::x86::rows::avx512::mix(weights, stride, rows, width, out, out_width)
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { super::x86::rows::avx2::mix(weights, stride, rows, width, out, out_width) },
            _ => {
                let mut row = vec![0.0; width];
                for r in 0..n_rows {
                    self.widen_rows(rows.range(r..r + 1, width), width, &mut row);
                    for (q, out) in out.chunks_exact_mut(out_width).enumerate() {
                        let weight = weights[q * stride + r];
                        out.iter_mut().zip(&row).for_each(|(out, v)| *out += weight * v);
                    }
                }
            }
        }
    }

    /// `x = exp(x - largest x)`; returns the largest and the sum of the results. Of nothing: minus infinity and 0.
    pub fn exp_below_largest(self, x: &mut [f32]) -> (f32, f32) {
        dispatch!(self, exp_below_largest(x: &mut [f32]) -> (f32, f32))
    }

    /// `y = a · y + b · x`.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn blend(self, a: f32, y: &mut [f32], b: f32, x: &[f32]) {
        assert_eq!(x.len(), y.len(), "lengths of a sum");
        dispatch!(self, blend(a: f32, y: &mut [f32], b: f32, x: &[f32]))
    }
}

/// Whether `len` values hold `n` runs of `run`, `stride` from one's beginning to the next one's; `n` is not 0.
fn fits(n: usize, stride: usize, run: usize, len: usize) -> bool {
    (n - 1).checked_mul(stride).and_then(|last| last.checked_add(run)).is_some_and(|end| end <= len)
}

/// The least 16-bit float not below the `largest` magnitude by 127, so that no code is out of range.
fn q8_scale(largest: f32) -> f16 {
    let exact = largest / LARGEST_CODE;
    let near = f16::from_f32_const(exact);
    if near.to_f32_const() < exact { f16::from_bits(near.to_bits() + 1) } else { near }
}

#[inline(always)]
fn to_q8<const FUSED: bool>(x: &[f32], out: &mut [u8]) {
    for (block, out) in x.chunks(BLOCK).zip(out.chunks_mut(BLOCK + 2)) {
        // Compared as bits: a NaN is the largest and ends up in the scale.
        let bits = block.iter().fold(0, |most, v| (v.to_bits() & 0x7fff_ffff).max(most));
        let scale = q8_scale(f32::from_bits(bits));
        let inverse = if scale == f16::ZERO { 0.0 } else { 1.0 / f16_to_f32(scale.to_bits()) };
        out[..2].copy_from_slice(&scale.to_le_bytes());
        for (code, v) in out[2..].iter_mut().zip(block) {
            *code = (v * inverse).round_ties_even() as i8 as u8;
        }
    }
}

#[inline(always)]
fn from_q8<const FUSED: bool>(rows: &[u8], width: usize, out: &mut [f32]) {
    for (row, out) in rows.chunks_exact(q8_row_bytes(width)).zip(out.chunks_exact_mut(width)) {
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
fn exp_below_largest<const FUSED: bool>(x: &mut [f32]) -> (f32, f32) {
    const LANES: usize = 32;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane = *v;
    }
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for v in x.iter_mut() {
        *v = exp::<FUSED>(*v - largest);
    }
    (largest, lanes_sum(x, x, |sum, v, _| sum + v))
}

#[inline(always)]
fn blend<const FUSED: bool>(a: f32, y: &mut [f32], b: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = fma::<FUSED>(b, *x, a * *y);
    }
}

#[cfg(test)]
mod tests;
