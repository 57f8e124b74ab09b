//! What attention computes over rows of past tokens, on x86-64.
//!
//! A product has one register of sums, over the row from its beginning, and one order in which its lanes are added,
//! however many others are computed beside it. Widening is exact, so it does not matter when it is done.

use crate::rows::{BLOCK, q8_row_bytes};
use half::f16;
use std::arch::x86_64::*;

/// Rows whose products with a query are computed together: their sums end up side by side in one register.
const ROWS: usize = 4;

/// # Safety
/// The processor has the instructions; the lengths are equal.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn widen(x: &[f16], out: &mut [f32]) {
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

pub(crate) mod avx2;
pub(crate) mod avx512;

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

/// A mask of the first `n` of eight lanes; all of them from 8 on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn first_lanes(n: usize) -> __m256i {
    _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
}
