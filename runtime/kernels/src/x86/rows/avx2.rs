//! Products and sums over rows with AVX2.

use super::{F16, F32, Q8, ROWS, Stored, first_lanes};
use crate::rows::StoredRows;
use std::arch::x86_64::*;

/// # Safety
/// As [`super::avx512::dots`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn dots(queries: &[f32], rows: StoredRows<'_>, width: usize, scores: &mut [f32], stride: usize) {
    // SAFETY: the caller's promise.
    unsafe { as_stored!(rows, stored_dots, rows.count(width), queries, width, scores, stride) }
}

/// # Safety
/// As [`dots`], `rows` being `n_rows` rows stored so.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn stored_dots<R: Stored>(
    rows: *const u8,
    n_rows: usize,
    queries: &[f32],
    width: usize,
    scores: &mut [f32],
    stride: usize,
) {
    let (q, s) = (queries.as_ptr(), scores.as_mut_ptr());
    // SAFETY: the caller's promise.
    unsafe {
        in_groups!(queries.len() / width, block_dots, R, [1], 2, |at| (
            q.add(at * width),
            rows,
            n_rows,
            width,
            s.add(at * stride),
            stride
        ));
    }
}

/// # Safety
/// As [`dots`], for `N` queries.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block_dots<R: Stored, const N: usize>(
    queries: *const f32,
    rows: *const u8,
    n_rows: usize,
    width: usize,
    scores: *mut f32,
    stride: usize,
) {
    let mut r = 0;
    while r < n_rows {
        let left = (n_rows - r).min(ROWS);
        let mut sums = [[_mm256_setzero_ps(); ROWS]; N];
        // SAFETY: rows are read up to their width, the last of them again where there are fewer than four; scores are
        // written for the rows that there are.
        unsafe {
            let mut row = [rows; ROWS];
            for (i, row) in row.iter_mut().enumerate() {
                *row = rows.add((r + i.min(left - 1)) * R::row_bytes(width));
            }
            let mut at = 0;
            while at + 8 <= width {
                step::<R, N>(queries, width, row, at, 8, &mut sums);
                at += 8;
            }
            if at < width {
                step::<R, N>(queries, width, row, at, width - at, &mut sums);
            }
            for (n, sums) in sums.into_iter().enumerate() {
                let four = add_lanes(sums);
                let to = scores.add(n * stride + r);
                if left == ROWS {
                    _mm_storeu_ps(to, four);
                } else {
                    _mm_maskstore_ps(to, _mm256_castsi256_si128(first_lanes(left)), four);
                }
            }
        }
        r += ROWS;
    }
}

/// Multiplies `n` columns, eight at most, of four rows with `N` queries.
///
/// # Safety
/// As [`block_dots`], for the columns from `at` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step<R: Stored, const N: usize>(
    queries: *const f32,
    width: usize,
    rows: [*const u8; ROWS],
    at: usize,
    n: usize,
    sums: &mut [[__m256; ROWS]; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [_mm256_setzero_ps(); ROWS];
        for (row, from) in row.iter_mut().zip(rows) {
            *row = if n == 8 { R::load_256(from, at) } else { R::load_few_256(from, at, n) };
        }
        for (q, sums) in sums.iter_mut().enumerate() {
            let query = queries.add(q * width).cast();
            let query = if n == 8 { F32::load_256(query, at) } else { F32::load_few_256(query, at, n) };
            for (sum, row) in sums.iter_mut().zip(row) {
                *sum = _mm256_fmadd_ps(query, row, *sum);
            }
        }
    }
}

/// The sums of the lanes of four registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_lanes([a, b, c, d]: [__m256; ROWS]) -> __m128 {
    let ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
    let cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
    let four =
        _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps::<1>(four))
}

/// # Safety
/// As [`super::avx512::mix`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn mix(
    weights: &[f32],
    stride: usize,
    rows: StoredRows<'_>,
    width: usize,
    out: &mut [f32],
    out_width: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { as_stored!(rows, stored_mix, rows.count(width), weights, stride, width, out, out_width) }
}

/// # Safety
/// As [`mix`], `rows` being `n_rows` rows stored so.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn stored_mix<R: Stored>(
    rows: *const u8,
    n_rows: usize,
    weights: &[f32],
    stride: usize,
    width: usize,
    out: &mut [f32],
    out_width: usize,
) {
    let (w, to) = (weights.as_ptr(), out.as_mut_ptr());
    // SAFETY: the caller's promise.
    unsafe {
        in_groups!(out.len() / out_width, block_mix, R, [1], 2, |at| (
            w.add(at * stride),
            stride,
            rows,
            n_rows,
            width,
            to.add(at * out_width),
            out_width
        ));
    }
}

/// # Safety
/// As [`mix`], for `N` rows of `out`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn block_mix<R: Stored, const N: usize>(
    weights: *const f32,
    stride: usize,
    rows: *const u8,
    n_rows: usize,
    width: usize,
    out: *mut f32,
    out_width: usize,
) {
    let mut at = 0;
    // SAFETY: columns below `out_width` of rows that are as wide or wider.
    unsafe {
        while at + 32 <= out_width {
            columns::<R, N, 4>(weights, stride, rows, n_rows, width, out, out_width, at, 8);
            at += 32;
        }
        while at < out_width {
            let n = (out_width - at).min(8);
            columns::<R, N, 1>(weights, stride, rows, n_rows, width, out, out_width, at, n);
            at += 8;
        }
    }
}

/// `C` registers of columns from `at` on, of `n` lanes each.
///
/// # Safety
/// As [`block_mix`], for these columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(clippy::too_many_arguments, reason = "pointers with their strides")]
unsafe fn columns<R: Stored, const N: usize, const C: usize>(
    weights: *const f32,
    stride: usize,
    rows: *const u8,
    n_rows: usize,
    width: usize,
    out: *mut f32,
    out_width: usize,
    at: usize,
    n: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); C]; N];
        for (q, sums) in sums.iter_mut().enumerate() {
            let out = out.add(q * out_width).cast::<u8>();
            for (c, sum) in sums.iter_mut().enumerate() {
                let at = at + 8 * c;
                *sum = if n == 8 { F32::load_256(out, at) } else { F32::load_few_256(out, at, n) };
            }
        }
        for r in 0..n_rows {
            let from = rows.add(r * R::row_bytes(width));
            let mut row = [_mm256_setzero_ps(); C];
            for (c, row) in row.iter_mut().enumerate() {
                let at = at + 8 * c;
                *row = if n == 8 { R::load_256(from, at) } else { R::load_few_256(from, at, n) };
            }
            for (q, sums) in sums.iter_mut().enumerate() {
                let weight = _mm256_set1_ps(*weights.add(q * stride + r));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = _mm256_fmadd_ps(weight, row, *sum);
                }
            }
        }
        for (q, sums) in sums.into_iter().enumerate() {
            for (c, sum) in sums.into_iter().enumerate() {
                let to = out.add(q * out_width + at + 8 * c);
                if n == 8 { _mm256_storeu_ps(to, sum) } else { _mm256_maskstore_ps(to, first_lanes(n), sum) }
            }
        }
    }
}
