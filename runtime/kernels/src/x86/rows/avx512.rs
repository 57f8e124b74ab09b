//! Products and sums over rows with AVX-512.

use super::{F16, F32, Q8, ROWS, Stored};
use crate::rows::StoredRows;
use std::arch::x86_64::*;

/// # Safety
/// The processor has the instructions; `queries` and `rows` are whole rows of `width`; for each query there are scores
/// of all rows, `stride` from one query's to the next one's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(crate) unsafe fn dots(queries: &[f32], rows: StoredRows<'_>, width: usize, scores: &mut [f32], stride: usize) {
    // SAFETY: the caller's promise.
    unsafe { as_stored!(rows, stored_dots, rows.count(width), queries, width, scores, stride) }
}

/// # Safety
/// As [`dots`], `rows` being `n_rows` rows stored so.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
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
        in_groups!(queries.len() / width, block_dots, R, [1 2 3], 4, |at| (
            q.add(at * width), rows, n_rows, width, s.add(at * stride), stride
        ));
    }
}

/// # Safety
/// As [`dots`], for `N` queries.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn block_dots<R: Stored, const N: usize>(
    queries: *const f32,
    rows: *const u8,
    n_rows: usize,
    width: usize,
    scores: *mut f32,
    stride: usize,
) {
    let last = ((1u32 << (width % 16)) - 1) as __mmask16;
    let mut r = 0;
    while r < n_rows {
        let left = (n_rows - r).min(ROWS);
        let mut sums = [[_mm512_setzero_ps(); ROWS]; N];
        // SAFETY: rows are read up to their width, the last of them again where there are fewer than four; scores are
        // written for the rows that there are.
        unsafe {
            // A row that is missing is the last one again.
            let mut row = [rows; ROWS];
            for (i, row) in row.iter_mut().enumerate() {
                *row = rows.add((r + i.min(left - 1)) * R::row_bytes(width));
            }
            let mut at = 0;
            while at + 16 <= width {
                step::<R, N>(queries, width, row, at, 0xffff, &mut sums);
                at += 16;
            }
            if at < width {
                step::<R, N>(queries, width, row, at, last, &mut sums);
            }
            for (n, sums) in sums.into_iter().enumerate() {
                let four = add_lanes(sums);
                _mm_mask_storeu_ps(scores.add(n * stride + r), (1 << left) - 1, four);
            }
        }
        r += ROWS;
    }
}

/// Multiplies 16 columns or fewer of four rows with `N` queries.
///
/// # Safety
/// As [`block_dots`], for the columns from `at` on that `mask` names.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn step<R: Stored, const N: usize>(
    queries: *const f32,
    width: usize,
    rows: [*const u8; ROWS],
    at: usize,
    mask: __mmask16,
    sums: &mut [[__m512; ROWS]; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [_mm512_setzero_ps(); ROWS];
        for (row, from) in row.iter_mut().zip(rows) {
            *row = R::load_512(from, at, mask);
        }
        for (n, sums) in sums.iter_mut().enumerate() {
            let query = _mm512_maskz_loadu_ps(mask, queries.add(n * width + at));
            for (sum, row) in sums.iter_mut().zip(row) {
                *sum = _mm512_fmadd_ps(query, row, *sum);
            }
        }
    }
}

/// The sums of the lanes of four registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
fn add_lanes([a, b, c, d]: [__m512; ROWS]) -> __m128 {
    let ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    let cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    let four =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    let two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps::<1>(four));
    _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps::<1>(two))
}

/// # Safety
/// The processor has the instructions; `rows` are whole rows of `width`, `out` of `out_width`, which is no larger; for
/// each row of `out` there are weights of all rows, `stride` from one's to the next one's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
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
        in_groups!(out.len() / out_width, block_mix, R, [1 2 3], 4, |at| (
            w.add(at * stride), stride, rows, n_rows, width, to.add(at * out_width), out_width
        ));
    }
}

/// # Safety
/// As [`mix`], for `N` rows of `out`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
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
        while at + 64 <= out_width {
            columns::<R, N, 4>(weights, stride, rows, n_rows, width, out, out_width, at, 0xffff);
            at += 64;
        }
        while at < out_width {
            let mask = ((1u32 << (out_width - at).min(16)) - 1) as __mmask16;
            columns::<R, N, 1>(weights, stride, rows, n_rows, width, out, out_width, at, mask);
            at += 16;
        }
    }
}

/// `C` registers of columns from `at` on, masked alike.
///
/// # Safety
/// As [`block_mix`], for these columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
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
    mask: __mmask16,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); C]; N];
        for (n, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_maskz_loadu_ps(mask, out.add(n * out_width + at + 16 * c));
            }
        }
        for r in 0..n_rows {
            let mut row = [_mm512_setzero_ps(); C];
            for (c, row) in row.iter_mut().enumerate() {
                *row = R::load_512(rows.add(r * R::row_bytes(width)), at + 16 * c, mask);
            }
            for (n, sums) in sums.iter_mut().enumerate() {
                let weight = _mm512_set1_ps(*weights.add(n * stride + r));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = _mm512_fmadd_ps(weight, row, *sum);
                }
            }
        }
        for (n, sums) in sums.into_iter().enumerate() {
            for (c, sum) in sums.into_iter().enumerate() {
                _mm512_mask_storeu_ps(out.add(n * out_width + at + 16 * c), mask, sum);
            }
        }
    }
}
