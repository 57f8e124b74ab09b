//! What attention computes over rows of past tokens, on x86-64.
//!
//! A product has one register of sums, over the row from its beginning, and one order in which its lanes are added,
//! however many others are computed beside it. Widening is exact, so it does not matter when it is done.

use crate::kernels::rows::{BLOCK, StoredRows, q8_row_bytes};
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
        while i + 32 <= n {
            // What comes next, to arrive while these rows are worked on.
            _mm_prefetch::<_MM_HINT_T0>(px.wrapping_add(n + i).cast());
            for part in [i, i + 8, i + 16, i + 24] {
                _mm256_storeu_ps(po.add(part), _mm256_cvtph_ps(_mm_loadu_si128(px.add(part).cast())));
            }
            i += 32;
        }
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
    ($n:expr, $kernel:ident, $row:ident, [$($size:literal)*], $most:literal, |$q:ident| $args:tt) => {{
        let mut $q = 0;
        while $q < $n {
            match $n - $q {
                $($size => in_groups!(@call $kernel, $row, $size, $args),)*
                _ => in_groups!(@call $kernel, $row, $most, $args),
            }
            $q += $most;
        }
    }};
    (@call $kernel:ident, $row:ident, $size:literal, ($($arg:expr),*)) => { $kernel::<$row, $size>($($arg),*) };
}

/// Calls `$kernel` for the way in which `$rows` are stored, with where they are.
macro_rules! as_stored {
    ($rows:expr, $kernel:ident, $($arg:expr),*) => {
        match $rows {
            StoredRows::F32(rows) => $kernel::<F32>(rows.as_ptr().cast(), $($arg),*),
            StoredRows::F16(rows) => $kernel::<F16>(rows.as_ptr().cast(), $($arg),*),
            StoredRows::Q8(rows) => $kernel::<Q8>(rows.as_ptr(), $($arg),*),
        }
    };
}

/// One way of storing rows.
trait Stored {
    /// Bytes of a row.
    fn row_bytes(width: usize) -> usize;

    /// The 16 values from `at` on, which is a multiple of 16, or those of them that `mask` names.
    ///
    /// # Safety
    /// The row has them, and the processor has AVX-512.
    unsafe fn load_512(row: *const u8, at: usize, mask: __mmask16) -> __m512;

    /// The eight values from `at` on, which is a multiple of eight.
    ///
    /// # Safety
    /// The row has them, and the processor has AVX2.
    unsafe fn load_256(row: *const u8, at: usize) -> __m256;

    /// The first `n` values, fewer than eight, of those from `at` on.
    ///
    /// # Safety
    /// As [`load_256`](Self::load_256), for those values.
    unsafe fn load_few_256(row: *const u8, at: usize, n: usize) -> __m256;
}

struct F32;
struct F16;
struct Q8;

impl Stored for F32 {
    #[inline(always)]
    fn row_bytes(width: usize) -> usize {
        4 * width
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn load_512(row: *const u8, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, row.cast::<f32>().add(at)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_256(row: *const u8, at: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(row.cast::<f32>().add(at)) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_few_256(row: *const u8, at: usize, n: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_maskload_ps(row.cast::<f32>().add(at), first_lanes(n)) }
    }
}

impl Stored for F16 {
    #[inline(always)]
    fn row_bytes(width: usize) -> usize {
        2 * width
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn load_512(row: *const u8, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, row.cast::<i16>().add(at))) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_256(row: *const u8, at: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(row.cast::<i16>().add(at).cast())) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_few_256(row: *const u8, at: usize, n: usize) -> __m256 {
        let mut few = [0i16; 8];
        // SAFETY: the row has `n` values, and there is room for eight.
        unsafe {
            std::ptr::copy_nonoverlapping(row.cast::<i16>().add(at), few.as_mut_ptr(), n);
            _mm256_cvtph_ps(_mm_loadu_si128(few.as_ptr().cast()))
        }
    }
}

impl Q8 {
    /// Where the code of a value is, and the scale of its block.
    ///
    /// # Safety
    /// The row has it, and the processor has the instructions.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn find(row: *const u8, at: usize) -> (*const i8, __m128) {
        // SAFETY: a block's scale is before its codes.
        unsafe {
            let block = row.add(at / BLOCK * (BLOCK + 2));
            let scale = i32::from(block.cast::<i16>().read_unaligned());
            (block.add(2 + at % BLOCK).cast(), _mm_cvtph_ps(_mm_cvtsi32_si128(scale)))
        }
    }
}

impl Stored for Q8 {
    #[inline(always)]
    fn row_bytes(width: usize) -> usize {
        q8_row_bytes(width)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
    unsafe fn load_512(row: *const u8, at: usize, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise; 16 values from a multiple of 16 on are of one block.
        unsafe {
            let (codes, scale) = Self::find(row, at);
            let codes = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, codes));
            _mm512_mul_ps(_mm512_broadcastss_ps(scale), _mm512_cvtepi32_ps(codes))
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_256(row: *const u8, at: usize) -> __m256 {
        // SAFETY: the caller's promise; eight values from a multiple of eight on are of one block.
        unsafe {
            let (codes, scale) = Self::find(row, at);
            let codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(codes.cast()));
            _mm256_mul_ps(_mm256_broadcastss_ps(scale), _mm256_cvtepi32_ps(codes))
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load_few_256(row: *const u8, at: usize, n: usize) -> __m256 {
        let mut few = [0i8; 8];
        // SAFETY: the row has `n` values, and there is room for eight.
        unsafe {
            let (codes, scale) = Self::find(row, at);
            std::ptr::copy_nonoverlapping(codes, few.as_mut_ptr(), n);
            let codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(few.as_ptr().cast()));
            _mm256_mul_ps(_mm256_broadcastss_ps(scale), _mm256_cvtepi32_ps(codes))
        }
    }
}

/// # Safety
/// The processor has the instructions; `queries` and `rows` are whole rows of `width`; for each query there are scores
/// of all rows, `stride` from one query's to the next one's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
pub(in crate::kernels) unsafe fn dots_avx512(
    queries: &[f32],
    rows: StoredRows<'_>,
    width: usize,
    scores: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { as_stored!(rows, stored_dots_512, rows.count(width), queries, width, scores, stride) }
}

/// # Safety
/// As [`dots_avx512`], `rows` being `n_rows` rows stored so.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn stored_dots_512<R: Stored>(
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
        in_groups!(queries.len() / width, dots_512, R, [1 2 3], 4, |at| (
            q.add(at * width), rows, n_rows, width, s.add(at * stride), stride
        ));
    }
}

/// # Safety
/// As [`dots_avx512`], for `N` queries.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn dots_512<R: Stored, const N: usize>(
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
                step_512::<R, N>(queries, width, row, at, 0xffff, &mut sums);
                at += 16;
            }
            if at < width {
                step_512::<R, N>(queries, width, row, at, last, &mut sums);
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
unsafe fn step_512<R: Stored, const N: usize>(
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
    rows: StoredRows<'_>,
    width: usize,
    out: &mut [f32],
    out_width: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { as_stored!(rows, stored_mix_512, rows.count(width), weights, stride, width, out, out_width) }
}

/// # Safety
/// As [`mix_avx512`], `rows` being `n_rows` rows stored so.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn stored_mix_512<R: Stored>(
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
        in_groups!(out.len() / out_width, mix_512, R, [1 2 3], 4, |at| (
            w.add(at * stride), stride, rows, n_rows, width, to.add(at * out_width), out_width
        ));
    }
}

/// # Safety
/// As [`mix_avx512`], for `N` rows of `out`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn mix_512<R: Stored, const N: usize>(
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
            columns_512::<R, N, 4>(weights, stride, rows, n_rows, width, out, out_width, at, 0xffff);
            at += 64;
        }
        while at < out_width {
            let mask = ((1u32 << (out_width - at).min(16)) - 1) as __mmask16;
            columns_512::<R, N, 1>(weights, stride, rows, n_rows, width, out, out_width, at, mask);
            at += 16;
        }
    }
}

/// `C` registers of columns from `at` on, masked alike.
///
/// # Safety
/// As [`mix_512`], for these columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
#[allow(clippy::too_many_arguments, reason = "pointers with their strides")]
unsafe fn columns_512<R: Stored, const N: usize, const C: usize>(
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
    rows: StoredRows<'_>,
    width: usize,
    scores: &mut [f32],
    stride: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { as_stored!(rows, stored_dots_256, rows.count(width), queries, width, scores, stride) }
}

/// # Safety
/// As [`dots_avx512`], `rows` being `n_rows` rows stored so.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn stored_dots_256<R: Stored>(
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
        in_groups!(queries.len() / width, dots_256, R, [1], 2, |at| (
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
/// As [`dots_avx512`], for `N` queries.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_256<R: Stored, const N: usize>(
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
                step_256::<R, N>(queries, width, row, at, 8, &mut sums);
                at += 8;
            }
            if at < width {
                step_256::<R, N>(queries, width, row, at, width - at, &mut sums);
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

/// Multiplies `n` columns, eight at most, of four rows with `N` queries.
///
/// # Safety
/// As [`dots_256`], for the columns from `at` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn step_256<R: Stored, const N: usize>(
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
    rows: StoredRows<'_>,
    width: usize,
    out: &mut [f32],
    out_width: usize,
) {
    // SAFETY: the caller's promise.
    unsafe { as_stored!(rows, stored_mix_256, rows.count(width), weights, stride, width, out, out_width) }
}

/// # Safety
/// As [`mix_avx512`], `rows` being `n_rows` rows stored so.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn stored_mix_256<R: Stored>(
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
        in_groups!(out.len() / out_width, mix_256, R, [1], 2, |at| (
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
/// As [`mix_avx512`], for `N` rows of `out`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn mix_256<R: Stored, const N: usize>(
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
            columns_256::<R, N, 4>(weights, stride, rows, n_rows, width, out, out_width, at, 8);
            at += 32;
        }
        while at < out_width {
            let n = (out_width - at).min(8);
            columns_256::<R, N, 1>(weights, stride, rows, n_rows, width, out, out_width, at, n);
            at += 8;
        }
    }
}

/// `C` registers of columns from `at` on, of `n` lanes each.
///
/// # Safety
/// As [`mix_256`], for these columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(clippy::too_many_arguments, reason = "pointers with their strides")]
unsafe fn columns_256<R: Stored, const N: usize, const C: usize>(
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
