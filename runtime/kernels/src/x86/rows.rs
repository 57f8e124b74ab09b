//! What attention computes over rows of past tokens, on x86-64: scores and weighted sums.
//!
//! Rows of keys and values are read as they are stored (F32, F16 or 8 bits with a scale per 32) and
//! widened in registers. A kernel is compiled for one format and `N` queries, which share each
//! load:
//!
//! ```text
//! dots:   for every 4 rows:                       # 4 N sums, one register each
//!             for every register of columns:      # the last one may be a part
//!                 row[0..4] = widen(columns of the 4 rows)
//!                 for each query: sum[query][0..4] += query columns * row[0..4]
//!             scores[query][4 rows] = lanes of sum[query][0..4], added up in one fixed order
//!
//! mix:    for every 4 registers of columns:       # 4 N sums again
//!             sum[query] = out[query]
//!             for each row: sum[query] += weight[query][row] * widen(columns of the row)
//!             out[query] = sum[query]
//! ```
//!
//! A dot product has one register of sums over the row from its beginning, and one order in which
//! its lanes are added. Neither depends on `N` or on the rows beside it. Widening is exact, so a
//! result is the same for rows that were widened before. A row that is missing from the last four
//! is replaced by the last row, and its score is not stored.
//!
//! With 16 registers (AVX2) `N` is at most 2, with 32 (AVX-512) at most 4.

mod formats;

use super::lanes::{PartialLanes, ROWS};
use crate::rows::{RowBlock, StoredRows};
use formats::{F16, F32, Q8, RowFormat};
use half::f16;
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// Bytes per line of the cache.
const LINE: usize = 64;

/// Widens 16-bit floats.
///
/// # Safety
/// The processor has the instructions; the lengths are equal.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn widen(x: &[f16], out: &mut [f32]) {
    let (px, po, n) = (x.as_ptr(), out.as_mut_ptr(), out.len());
    let mut i = 0;
    // SAFETY: all accesses are below `n`.
    unsafe {
        while i + 32 <= n {
            // What follows `x`, to arrive while `x` is worked on.
            _mm_prefetch::<_MM_HINT_T0>(px.wrapping_add(n + i).cast());
            for part in [i, i + 8, i + 16, i + 24] {
                _mm256_storeu_ps(
                    po.add(part),
                    _mm256_cvtph_ps(_mm_loadu_si128(px.add(part).cast())),
                );
            }
            i += 32;
        }
        while i + 8 <= n {
            _mm256_storeu_ps(
                po.add(i),
                _mm256_cvtph_ps(_mm_loadu_si128(px.add(i).cast())),
            );
            i += 8;
        }
    }
    for (to, from) in out[i..].iter_mut().zip(&x[i..]) {
        *to = from.to_f32_const();
    }
}

/// Rounds to 16-bit floats, ties to even.
///
/// # Safety
/// The processor has the instructions; the lengths are equal.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn narrow(x: &[f32], out: &mut [f16]) {
    let (px, po, n) = (x.as_ptr(), out.as_mut_ptr(), out.len());
    let mut i = 0;
    // SAFETY: all accesses are below `n`.
    unsafe {
        while i + 8 <= n {
            let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(px.add(i)));
            _mm_storeu_si128(po.add(i).cast(), half);
            i += 8;
        }
    }
    for (to, from) in out[i..].iter_mut().zip(&x[i..]) {
        *to = f16::from_f32_const(*from);
    }
}

/// Packed rows whose format the kernel's type names.
#[derive(Clone, Copy)]
struct Rows {
    first: *const u8,
    count: usize,
    /// Values per row.
    width: usize,
    /// What is read next.
    next: Next,
}

/// Bytes to prefetch while others are worked on.
#[derive(Clone, Copy)]
struct Next {
    /// Begins with a line of the cache.
    first: *const u8,
    lines: usize,
}

impl Next {
    fn new(bytes: &[u8]) -> Self {
        let before = bytes.as_ptr().addr() % LINE;
        Self {
            first: bytes.as_ptr().wrapping_sub(before),
            lines: if bytes.is_empty() {
                0
            } else {
                (before + bytes.len()).div_ceil(LINE)
            },
        }
    }

    /// Returns part `i` of `n` about equal ones.
    #[inline(always)]
    fn part(self, i: usize, n: usize) -> Self {
        let (first, end) = (self.lines * i / n, self.lines * (i + 1) / n);
        Self {
            first: self.first.wrapping_add(LINE * first),
            lines: end - first,
        }
    }

    /// Prefetches at most `lines` lines more.
    #[inline(always)]
    fn prefetch(&mut self, lines: usize) {
        for _ in 0..lines.min(self.lines) {
            // SAFETY: a prefetch never faults, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.first.cast()) };
            self.first = self.first.wrapping_add(LINE);
            self.lines -= 1;
        }
    }
}

/// Queries of the rows' width, and where their scores go.
#[derive(Clone, Copy)]
struct Scores {
    /// `[queries, width]`, packed.
    queries: *const f32,
    /// `[queries, rows]`, queries `stride` apart.
    scores: *mut f32,
    stride: usize,
}

/// Weights of rows, and where the weighted sums go.
#[derive(Clone, Copy)]
struct Mixture {
    /// `[queries, rows]`, queries `stride` apart.
    weights: *const f32,
    stride: usize,
    /// `[queries, out_width]`, packed; `out_width` is at most the rows' width.
    out: *mut f32,
    out_width: usize,
}

/// Computes the scores of a fixed number of queries.
///
/// # Safety
/// The processor has the kernel's instructions, and all pointers reach as far as the shapes say.
type DotsFn = unsafe fn(&Rows, &Scores);

/// Adds the weighted sums of a fixed number of queries.
///
/// # Safety
/// As [`DotsFn`].
type MixFn = unsafe fn(&Rows, &Mixture);

/// The kernels of one instruction set and row format, for 1, 2, ... queries.
#[derive(Clone, Copy)]
pub(crate) struct RowKernels<'a> {
    dots: &'static [DotsFn],
    mix: &'static [MixFn],
    rows: Rows,
    block: PhantomData<RowBlock<'a>>,
}

impl RowKernels<'_> {
    /// Writes `scores[q * stride + r] = query q . row r`.
    ///
    /// # Safety
    /// The processor has the kernels' instructions. `queries` are whole rows of the rows' width, and
    /// for each query there is room for as many scores as rows, `stride` apart.
    pub(crate) unsafe fn dots(self, queries: &[f32], scores: &mut [f32], stride: usize) {
        let (mut rows, width) = (self.rows, self.rows.width);
        let n_queries = queries.len() / width;
        let (queries, scores) = (queries.as_ptr(), scores.as_mut_ptr());
        let mut q = 0;
        while q < n_queries {
            let count = (n_queries - q).min(self.dots.len());
            rows.next = self
                .rows
                .next
                .part(q / self.dots.len(), n_queries.div_ceil(self.dots.len()));
            // SAFETY: the caller's shapes.
            unsafe {
                let part = Scores {
                    queries: queries.add(q * width),
                    scores: scores.add(q * stride),
                    stride,
                };
                self.dots[count - 1](&rows, &part);
            }
            q += count;
        }
    }

    /// Adds `weights[q * stride + r] * row r` to row `q` of `out`.
    ///
    /// # Safety
    /// The processor has the kernels' instructions. `out` are whole rows of `out_width`, which is at
    /// most the rows' width, and for each of them there are as many weights as rows, `stride` apart.
    pub(crate) unsafe fn mix(
        self,
        weights: &[f32],
        stride: usize,
        out: &mut [f32],
        out_width: usize,
    ) {
        let mut rows = self.rows;
        let n_queries = out.len() / out_width;
        let (weights, out) = (weights.as_ptr(), out.as_mut_ptr());
        let mut q = 0;
        while q < n_queries {
            let count = (n_queries - q).min(self.mix.len());
            rows.next = self
                .rows
                .next
                .part(q / self.mix.len(), n_queries.div_ceil(self.mix.len()));
            // SAFETY: the caller's shapes.
            unsafe {
                let (weights, out) = (weights.add(q * stride), out.add(q * out_width));
                self.mix[count - 1](
                    &rows,
                    &Mixture {
                        weights,
                        stride,
                        out,
                        out_width,
                    },
                );
            }
            q += count;
        }
    }
}

/// Computes the scores of `N` queries.
///
/// # Safety
/// As [`DotsFn`]; the caller is compiled for the instruction set of `L`.
#[inline(always)]
unsafe fn dots<L: PartialLanes, R: RowFormat, const N: usize>(rows: &Rows, to: &Scores) {
    let Rows {
        first,
        count,
        width,
        mut next,
    } = *rows;
    let lines = next.lines.div_ceil(count.div_ceil(ROWS));
    let Scores {
        queries,
        scores,
        stride,
    } = *to;
    let mut r = 0;
    while r < count {
        let left = (count - r).min(ROWS);
        next.prefetch(lines);
        // SAFETY: rows are read up to their width, the last of them again where fewer than four are
        // left; scores are written for the rows that there are.
        unsafe {
            let mut sums = [[L::zero(); ROWS]; N];
            let mut row = [first; ROWS];
            for (i, row) in row.iter_mut().enumerate() {
                *row = first.add((r + i.min(left - 1)) * R::row_bytes(width));
            }
            let mut at = 0;
            while at + L::COUNT <= width {
                add_columns::<L, R, N>(queries, width, row, at, L::WHOLE, &mut sums);
                at += L::COUNT;
            }
            if at < width {
                add_columns::<L, R, N>(queries, width, row, at, L::part(width - at), &mut sums);
            }
            for (n, sums) in sums.into_iter().enumerate() {
                L::store_sums(sums, scores.add(n * stride + r), left);
            }
        }
        r += ROWS;
    }
}

/// Multiplies the columns from `at` on that `part` names of four rows with `N` queries.
///
/// # Safety
/// As [`dots`], for these columns.
#[inline(always)]
unsafe fn add_columns<L: PartialLanes, R: RowFormat, const N: usize>(
    queries: *const f32,
    width: usize,
    rows: [*const u8; ROWS],
    at: usize,
    part: L::Part,
    sums: &mut [[L; ROWS]; N],
) {
    // SAFETY: the caller's columns and processor.
    unsafe {
        let mut row = [L::zero(); ROWS];
        for (row, from) in row.iter_mut().zip(rows) {
            *row = R::load(from, at, part);
        }
        for (q, sums) in sums.iter_mut().enumerate() {
            let query = L::load_part_f32(queries.add(q * width + at), part);
            for (sum, row) in sums.iter_mut().zip(row) {
                *sum = L::mul_add(query, row, *sum);
            }
        }
    }
}

/// Adds the weighted sums of `N` queries.
///
/// # Safety
/// As [`MixFn`]; the caller is compiled for the instruction set of `L`.
#[inline(always)]
unsafe fn mix<L: PartialLanes, R: RowFormat, const N: usize>(rows: &Rows, to: &Mixture) {
    let (whole, left) = (to.out_width / (4 * L::COUNT), to.out_width % (4 * L::COUNT));
    let passes = whole + left.div_ceil(L::COUNT);
    let rows = |pass: usize| Rows {
        next: rows.next.part(pass, passes),
        ..*rows
    };
    let mut at = 0;
    // SAFETY: columns below `out_width` of rows that are as wide or wider.
    unsafe {
        for pass in 0..whole {
            mix_columns::<L, R, N, 4>(rows(pass), *to, at, L::WHOLE);
            at += 4 * L::COUNT;
        }
        for pass in whole..passes {
            let part = L::part((to.out_width - at).min(L::COUNT));
            mix_columns::<L, R, N, 1>(rows(pass), *to, at, part);
            at += L::COUNT;
        }
    }
}

/// Adds the weighted sums of `C` registers of columns from `at` on, of each the lanes that `part`
/// names.
///
/// # Safety
/// As [`mix`], for these columns.
#[inline(always)]
unsafe fn mix_columns<L: PartialLanes, R: RowFormat, const N: usize, const C: usize>(
    rows: Rows,
    to: Mixture,
    at: usize,
    part: L::Part,
) {
    // SAFETY: the caller's columns and processor.
    unsafe {
        let (mut next, lines) = (rows.next, rows.next.lines.div_ceil(rows.count));
        let mut sums = [[L::zero(); C]; N];
        for (q, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                *sum = L::load_part_f32(to.out.add(q * to.out_width + at + c * L::COUNT), part);
            }
        }
        for r in 0..rows.count {
            let row_bytes = R::row_bytes(rows.width);
            next.prefetch(lines);
            let from = rows.first.add(r * row_bytes);
            let mut row = [L::zero(); C];
            for (c, row) in row.iter_mut().enumerate() {
                *row = R::load(from, at + c * L::COUNT, part);
            }
            for (q, sums) in sums.iter_mut().enumerate() {
                let weight = L::splat(*to.weights.add(q * to.stride + r));
                for (sum, row) in sums.iter_mut().zip(row) {
                    *sum = L::mul_add(weight, row, *sum);
                }
            }
        }
        for (q, sums) in sums.into_iter().enumerate() {
            for (c, sum) in sums.into_iter().enumerate() {
                sum.store_part(to.out.add(q * to.out_width + at + c * L::COUNT), part);
            }
        }
    }
}

/// Compiles the kernels for an instruction set: `$lanes` registers, `$n` queries at once.
macro_rules! row_kernels {
    ($module:ident, $lanes:ty, $features:literal, $($n:literal)*) => {
        mod $module {
            use super::*;

            #[target_feature(enable = $features)]
            unsafe fn dots<R: RowFormat, const N: usize>(rows: &Rows, to: &Scores) {
                // SAFETY: the caller's shapes and processor.
                unsafe { super::dots::<$lanes, R, N>(rows, to) }
            }

            #[target_feature(enable = $features)]
            unsafe fn mix<R: RowFormat, const N: usize>(rows: &Rows, to: &Mixture) {
                // SAFETY: the caller's shapes and processor.
                unsafe { super::mix::<$lanes, R, N>(rows, to) }
            }

            fn kernels<'a, R: RowFormat>(rows: Rows) -> RowKernels<'a> {
                RowKernels {
                    dots: const { &[$(dots::<R, $n> as DotsFn),*] },
                    mix: const { &[$(mix::<R, $n> as MixFn),*] },
                    rows,
                    block: PhantomData,
                }
            }

            /// Returns the kernels for the way in which the block's rows are stored.
            pub(crate) fn $module(block: RowBlock<'_>) -> RowKernels<'_> {
                let of = |first| Rows {
                    first,
                    count: block.rows.count(block.width),
                    width: block.width,
                    next: Next::new(block.next),
                };
                match block.rows {
                    StoredRows::F32(rows) => kernels::<F32>(of(rows.as_ptr().cast())),
                    StoredRows::F16(rows) => kernels::<F16>(of(rows.as_ptr().cast())),
                    StoredRows::Q8(rows) => kernels::<Q8>(of(rows.as_ptr())),
                }
            }
        }
        pub(crate) use $module::$module;
    };
}

row_kernels!(avx2, __m256, "avx2,fma,f16c", 1 2);
row_kernels!(avx512, __m512, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c", 1 2 3 4);
