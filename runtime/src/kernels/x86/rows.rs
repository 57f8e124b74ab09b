//! What attention computes over rows of past tokens, on x86-64.
//!
//! A product has one register of sums, over the row from its beginning, and one order in which its lanes are added,
//! however many others are computed beside it.

use half::f16;
use std::arch::x86_64::*;

/// Rows whose products with a query are computed together: their sums end up side by side in one register.
const ROWS: usize = 4;

/// # Safety
/// The processor has the instructions; the lengths are equal.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn widen(x: &[f16], out: &mut [f32]) {
    let (px, po, n) = (x.as_ptr(), out.as_mut_ptr(), out.len());
    let mut i = 0;
    // SAFETY: all accesses are below `n`.
    unsafe {
        while i + 8 <= n {
            _mm256_storeu_ps(po.add(i), _mm256_cvtph_ps(_mm_loadu_si128(px.add(i).cast())));
            i += 8;
        }
    }
    for (to, from) in out[i..].iter_mut().zip(&x[i..]) {
        *to = from.to_f32_const();
    }
}

/// Splits `n` queries into groups of at most `$most` and calls `$kernel` with the size of each and where it begins.
macro_rules! in_groups {
    ($n:expr, $kernel:ident, [$($size:literal)*], $most:literal, |$q:ident| $args:tt) => {{
        let mut $q = 0;
        while $q < $n {
            match $n - $q {
                $($size => in_groups!(@call $kernel, $size, $args),)*
                _ => in_groups!(@call $kernel, $most, $args),
            }
            $q += $most;
        }
    }};
    (@call $kernel:ident, $size:literal, ($($arg:expr),*)) => { $kernel::<$size>($($arg),*) };
}

/// # Safety
/// The processor has the instructions; `queries` and `rows` are whole rows of `width`; for each query there are scores
/// of all rows, `stride` from one query's to the next one's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn dots_avx512(
    queries: &[f32],
    rows: &[f32],
    width: usize,
    scores: &mut [f32],
    stride: usize,
) {
    let (q, s, n_rows) = (queries.as_ptr(), scores.as_mut_ptr(), rows.len() / width);
    // SAFETY: the caller's promise.
    unsafe {
        in_groups!(queries.len() / width, dots_512, [1 2 3], 4, |at| (
            q.add(at * width), rows.as_ptr(), n_rows, width, s.add(at * stride), stride
        ));
    }
}

/// # Safety
/// As [`dots_avx512`], for `N` queries.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn dots_512<const N: usize>(
    queries: *const f32,
    rows: *const f32,
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
                *row = rows.add((r + i.min(left - 1)) * width);
            }
            let mut at = 0;
            while at + 16 <= width {
                step_512(queries, width, row, at, 0xffff, &mut sums);
                at += 16;
            }
            if at < width {
                step_512(queries, width, row, at, last, &mut sums);
            }
            for (n, sums) in sums.into_iter().enumerate() {
                let four = add_lanes_512(sums);
                _mm_mask_storeu_ps(scores.add(n * stride + r), (1 << left) - 1, four);
            }
        }
        r += ROWS;
    }
}

/// Multiplies 16 columns or fewer of four rows with `N` queries.
///
/// # Safety
/// As [`dots_512`], for the columns from `at` on that `mask` names.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn step_512<const N: usize>(
    queries: *const f32,
    width: usize,
    rows: [*const f32; ROWS],
    at: usize,
    mask: __mmask16,
    sums: &mut [[__m512; ROWS]; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [_mm512_setzero_ps(); ROWS];
        for (row, from) in row.iter_mut().zip(rows) {
            *row = _mm512_maskz_loadu_ps(mask, from.add(at));
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
fn add_lanes_512([a, b, c, d]: [__m512; ROWS]) -> __m128 {
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
pub(in crate::kernels) unsafe fn mix_avx512(
    weights: &[f32],
    stride: usize,
    rows: &[f32],
    width: usize,
    out: &mut [f32],
    out_width: usize,
) {
    let (w, to, n_rows) = (weights.as_ptr(), out.as_mut_ptr(), rows.len() / width);
    // SAFETY: the caller's promise.
    unsafe {
        in_groups!(out.len() / out_width, mix_512, [1 2 3], 4, |at| (
            w.add(at * stride), stride, rows.as_ptr(), n_rows, width, to.add(at * out_width), out_width
        ));
    }
}

/// # Safety
/// As [`mix_avx512`], for `N` rows of `out`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn mix_512<const N: usize>(
    weights: *const f32,
    stride: usize,
    rows: *const f32,
    n_rows: usize,
    width: usize,
    out: *mut f32,
    out_width: usize,
) {
    let mut at = 0;
    // SAFETY: columns below `out_width` of rows that are as wide or wider.
    unsafe {
        while at + 64 <= out_width {
            columns_512::<N, 4>(weights, stride, rows.add(at), n_rows, width, out.add(at), out_width, 0xffff);
            at += 64;
        }
        while at < out_width {
            let mask = ((1u32 << (out_width - at).min(16)) - 1) as __mmask16;
            columns_512::<N, 1>(weights, stride, rows.add(at), n_rows, width, out.add(at), out_width, mask);
            at += 16;
        }
    }
}

/// `C` registers of columns, masked alike.
///
/// # Safety
/// As [`mix_512`], for these columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
#[allow(clippy::too_many_arguments, reason = "pointers with their strides")]
unsafe fn columns_512<const N: usize, const C: usize>(
    weights: *const f32,
    stride: usize,
    rows: *const f32,
    n_rows: usize,
    width: usize,
    out: *mut f32,
    out_width: usize,
    mask: __mmask16,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); C]; N];
        for (n, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_maskz_loadu_ps(mask, out.add(n * out_width + 16 * c));
            }
        }
        for r in 0..n_rows {
            let mut row = [_mm512_setzero_ps(); C];
            for (c, row) in row.iter_mut().enumerate() {
                *row = _mm512_maskz_loadu_ps(mask, rows.add(r * width + 16 * c));
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
                _mm512_mask_storeu_ps(out.add(n * out_width + 16 * c), mask, sum);
            }
        }
    }
}

/// A mask of the first `n` of eight lanes; all of them from 8 on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn first_lanes(n: usize) -> __m256i {
    _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
}

/// # Safety
/// As [`dots_avx512`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn dots_avx2(
    queries: &[f32],
    rows: &[f32],
    width: usize,
    scores: &mut [f32],
    stride: usize,
) {
    let (q, s, n_rows) = (queries.as_ptr(), scores.as_mut_ptr(), rows.len() / width);
    // SAFETY: the caller's promise.
    unsafe {
        in_groups!(queries.len() / width, dots_256, [1], 2, |at| (
            q.add(at * width),
            rows.as_ptr(),
            n_rows,
            width,
            s.add(at * stride),
            stride
        ));
    }
}

/// # Safety
/// As [`dots_avx512`], for `N` queries.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_256<const N: usize>(
    queries: *const f32,
    rows: *const f32,
    n_rows: usize,
    width: usize,
    scores: *mut f32,
    stride: usize,
) {
    let last = first_lanes(width % 8);
    let mut r = 0;
    while r < n_rows {
        let left = (n_rows - r).min(ROWS);
        let mut sums = [[_mm256_setzero_ps(); ROWS]; N];
        // SAFETY: rows are read up to their width, the last of them again where there are fewer than four; scores are
        // written for the rows that there are.
        unsafe {
            let mut row = [rows; ROWS];
            for (i, row) in row.iter_mut().enumerate() {
                *row = rows.add((r + i.min(left - 1)) * width);
            }
            let mut at = 0;
            while at + 8 <= width {
                step_256::<N, false>(queries, width, row, at, last, &mut sums);
                at += 8;
            }
            if at < width {
                step_256::<N, true>(queries, width, row, at, last, &mut sums);
            }
            for (n, sums) in sums.into_iter().enumerate() {
                let four = add_lanes_256(sums);
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

/// Eight values, or those that `mask` names.
///
/// # Safety
/// They can be read, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_256<const MASKED: bool>(from: *const f32, mask: __m256i) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { if MASKED { _mm256_maskload_ps(from, mask) } else { _mm256_loadu_ps(from) } }
}

/// Multiplies eight columns or, masked, fewer of four rows with `N` queries.
///
/// # Safety
/// As [`dots_256`], for the columns from `at` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step_256<const N: usize, const MASKED: bool>(
    queries: *const f32,
    width: usize,
    rows: [*const f32; ROWS],
    at: usize,
    mask: __m256i,
    sums: &mut [[__m256; ROWS]; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut row = [_mm256_setzero_ps(); ROWS];
        for (row, from) in row.iter_mut().zip(rows) {
            *row = load_256::<MASKED>(from.add(at), mask);
        }
        for (n, sums) in sums.iter_mut().enumerate() {
            let query = load_256::<MASKED>(queries.add(n * width + at), mask);
            for (sum, row) in sums.iter_mut().zip(row) {
                *sum = _mm256_fmadd_ps(query, row, *sum);
            }
        }
    }
}

/// The sums of the lanes of four registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_lanes_256([a, b, c, d]: [__m256; ROWS]) -> __m128 {
    let ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
    let cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
    let four =
        _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
    _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps::<1>(four))
}

/// # Safety
/// As [`mix_avx512`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn mix_avx2(
    weights: &[f32],
    stride: usize,
    rows: &[f32],
    width: usize,
    out: &mut [f32],
    out_width: usize,
) {
    let (w, to, n_rows) = (weights.as_ptr(), out.as_mut_ptr(), rows.len() / width);
    // SAFETY: the caller's promise.
    unsafe {
        in_groups!(out.len() / out_width, mix_256, [1], 2, |at| (
            w.add(at * stride),
            stride,
            rows.as_ptr(),
            n_rows,
            width,
            to.add(at * out_width),
            out_width
        ));
    }
}

/// # Safety
/// As [`mix_avx512`], for `N` rows of `out`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn mix_256<const N: usize>(
    weights: *const f32,
    stride: usize,
    rows: *const f32,
    n_rows: usize,
    width: usize,
    out: *mut f32,
    out_width: usize,
) {
    let mut at = 0;
    // SAFETY: columns below `out_width` of rows that are as wide or wider.
    unsafe {
        while at + 32 <= out_width {
            let all = first_lanes(8);
            columns_256::<N, 4, false>(weights, stride, rows.add(at), n_rows, width, out.add(at), out_width, all);
            at += 32;
        }
        while at < out_width {
            let mask = first_lanes(out_width - at);
            columns_256::<N, 1, true>(weights, stride, rows.add(at), n_rows, width, out.add(at), out_width, mask);
            at += 8;
        }
    }
}

/// `C` registers of columns, masked alike if at all.
///
/// # Safety
/// As [`mix_256`], for these columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(clippy::too_many_arguments, reason = "pointers with their strides")]
unsafe fn columns_256<const N: usize, const C: usize, const MASKED: bool>(
    weights: *const f32,
    stride: usize,
    rows: *const f32,
    n_rows: usize,
    width: usize,
    out: *mut f32,
    out_width: usize,
    mask: __m256i,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); C]; N];
        for (n, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                *sum = load_256::<MASKED>(out.add(n * out_width + 8 * c), mask);
            }
        }
        for r in 0..n_rows {
            let mut row = [_mm256_setzero_ps(); C];
            for (c, row) in row.iter_mut().enumerate() {
                *row = load_256::<MASKED>(rows.add(r * width + 8 * c), mask);
            }
            for (n, sums) in sums.iter_mut().enumerate() {
                let weight = _mm256_set1_ps(*weights.add(n * stride + r));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = _mm256_fmadd_ps(weight, row, *sum);
                }
            }
        }
        for (n, sums) in sums.into_iter().enumerate() {
            for (c, sum) in sums.into_iter().enumerate() {
                let to = out.add(n * out_width + 8 * c);
                if MASKED { _mm256_maskstore_ps(to, mask, sum) } else { _mm256_storeu_ps(to, sum) }
            }
        }
    }
}
