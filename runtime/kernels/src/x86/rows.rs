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

use super::lanes::{PartialLanes, ROWS};
use crate::rows::{BLOCK, StoredRows, q8_row_bytes};
use half::f16;
use std::arch::x86_64::*;
use std::marker::PhantomData;

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

/// A format of stored rows.
trait RowFormat {
    /// Returns the bytes per row of `width` values.
    fn row_bytes(width: usize) -> usize;

    /// Loads the values from column `at` on, a multiple of the register's lanes.
    ///
    /// # Safety
    /// The row has the values that `part` names; see [`PartialLanes`].
    unsafe fn load<L: PartialLanes>(row: *const u8, at: usize, part: L::Part) -> L;
}

/// Rows of 32-bit floats.
struct F32;

/// Rows of 16-bit floats.
struct F16;

/// Rows of signed bytes with a 16-bit float per 32 before them.
struct Q8;

impl RowFormat for F32 {
    #[inline(always)]
    fn row_bytes(width: usize) -> usize {
        4 * width
    }

    #[inline(always)]
    unsafe fn load<L: PartialLanes>(row: *const u8, at: usize, part: L::Part) -> L {
        // SAFETY: the caller's row and processor.
        unsafe { L::load_part_f32(row.cast::<f32>().add(at), part) }
    }
}

impl RowFormat for F16 {
    #[inline(always)]
    fn row_bytes(width: usize) -> usize {
        2 * width
    }

    #[inline(always)]
    unsafe fn load<L: PartialLanes>(row: *const u8, at: usize, part: L::Part) -> L {
        // SAFETY: the caller's row and processor.
        unsafe { L::load_part_f16(row.cast::<i16>().add(at), part) }
    }
}

impl RowFormat for Q8 {
    #[inline(always)]
    fn row_bytes(width: usize) -> usize {
        q8_row_bytes(width)
    }

    #[inline(always)]
    unsafe fn load<L: PartialLanes>(row: *const u8, at: usize, part: L::Part) -> L {
        const { assert!(BLOCK.is_multiple_of(L::COUNT), "a register is of one block") };
        // SAFETY: the caller's row and processor; a block's scale is before its codes.
        unsafe {
            let block = row.add(at / BLOCK * (BLOCK + 2));
            let scale = block.cast::<i16>().read_unaligned();
            L::load_part_q8(block.add(2 + at % BLOCK).cast(), scale, part)
        }
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
    ahead: Ahead,
}

/// Bytes to fetch into the cache while others are worked on.
#[derive(Clone, Copy)]
struct Ahead {
    first: *const u8,
    len: usize,
}

impl Ahead {
    /// Returns part `i` of `n` about equal ones, in whole lines of the cache.
    #[inline(always)]
    fn part(self, i: usize, n: usize) -> Self {
        let lines = self.len.div_ceil(64);
        let (first, end) = (64 * (lines * i / n), 64 * (lines * (i + 1) / n));
        Self {
            first: self.first.wrapping_add(first),
            len: end - first,
        }
    }

    /// Returns the lines per step with which `steps` steps fetch all.
    #[inline(always)]
    fn lines_per(self, steps: usize) -> usize {
        (self.len / 64).div_ceil(steps)
    }

    /// Fetches the next `lines` lines, as far as there are so many.
    #[inline(always)]
    fn fetch(&mut self, lines: usize) {
        for _ in 0..lines.min(self.len / 64) {
            // SAFETY: a prefetch never faults, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.first.cast()) };
            self.first = self.first.wrapping_add(64);
            self.len -= 64;
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
    first: *const u8,
    ahead: Ahead,
    rows: PhantomData<StoredRows<'a>>,
}

impl RowKernels<'_> {
    fn rows_of(self, count: usize, width: usize) -> Rows {
        Rows {
            first: self.first,
            count,
            width,
            ahead: self.ahead,
        }
    }

    /// Writes `scores[q * stride + r] = query q . row r` for `n_rows` rows of `width` values.
    ///
    /// # Safety
    /// The processor has the kernels' instructions. There are `n_rows` rows of `width` values,
    /// `queries` are whole rows of `width`, and for each query there is room for `n_rows` scores,
    /// `stride` apart.
    pub(crate) unsafe fn dots(
        self,
        n_rows: usize,
        width: usize,
        queries: &[f32],
        scores: &mut [f32],
        stride: usize,
    ) {
        let mut rows = self.rows_of(n_rows, width);
        let n_queries = queries.len() / width;
        let (queries, scores) = (queries.as_ptr(), scores.as_mut_ptr());
        let mut q = 0;
        while q < n_queries {
            let count = (n_queries - q).min(self.dots.len());
            rows.ahead = self
                .ahead
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

    /// Adds `weights[q * stride + r] * row r` to row `q` of `out`, for `n_rows` rows of `width`
    /// values.
    ///
    /// # Safety
    /// The processor has the kernels' instructions. There are `n_rows` rows of `width` values,
    /// `out` are whole rows of `out_width`, which is at most `width`, and for each of them there
    /// are `n_rows` weights, `stride` apart.
    pub(crate) unsafe fn mix(
        self,
        n_rows: usize,
        width: usize,
        weights: &[f32],
        stride: usize,
        out: &mut [f32],
        out_width: usize,
    ) {
        let mut rows = self.rows_of(n_rows, width);
        let n_queries = out.len() / out_width;
        let (weights, out) = (weights.as_ptr(), out.as_mut_ptr());
        let mut q = 0;
        while q < n_queries {
            let count = (n_queries - q).min(self.mix.len());
            rows.ahead = self
                .ahead
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
        mut ahead,
    } = *rows;
    let lines = ahead.lines_per(count.div_ceil(ROWS));
    let Scores {
        queries,
        scores,
        stride,
    } = *to;
    let mut r = 0;
    while r < count {
        let left = (count - r).min(ROWS);
        ahead.fetch(lines);
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
        ahead: rows.ahead.part(pass, passes),
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
        let (mut ahead, lines) = (rows.ahead, rows.ahead.lines_per(rows.count));
        let mut sums = [[L::zero(); C]; N];
        for (q, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                *sum = L::load_part_f32(to.out.add(q * to.out_width + at + c * L::COUNT), part);
            }
        }
        for r in 0..rows.count {
            let row_bytes = R::row_bytes(rows.width);
            ahead.fetch(lines);
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

            fn kernels<'a, R: RowFormat>(first: *const u8, ahead: Ahead) -> RowKernels<'a> {
                RowKernels {
                    dots: const { &[$(dots::<R, $n> as DotsFn),*] },
                    mix: const { &[$(mix::<R, $n> as MixFn),*] },
                    first,
                    ahead,
                    rows: PhantomData,
                }
            }

            /// Returns the kernels for the way in which `rows` are stored.
            pub(crate) fn $module<'a>(rows: StoredRows<'a>, ahead: &[u8]) -> RowKernels<'a> {
                let ahead = Ahead {
                    first: ahead.as_ptr(),
                    len: ahead.len(),
                };
                match rows {
                    StoredRows::F32(rows) => kernels::<F32>(rows.as_ptr().cast(), ahead),
                    StoredRows::F16(rows) => kernels::<F16>(rows.as_ptr().cast(), ahead),
                    StoredRows::Q8(rows) => kernels::<Q8>(rows.as_ptr(), ahead),
                }
            }
        }
        pub(crate) use $module::$module;
    };
}

row_kernels!(avx2, __m256, "avx2,fma,f16c", 1 2);
row_kernels!(avx512, __m512, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c", 1 2 3 4);
