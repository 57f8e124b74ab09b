//! Interleaving rows: four words of 16 rows at a time with AVX-512, of 8 rows with AVX2.

use super::words::Words;
use crate::bands::{BAND_ROWS, BandLayout, LINE_BYTES};
use crate::x86::prefetch_rows;
use std::arch::x86_64::*;
use std::ops::Range;

/// Words of a row that are loaded at once.
pub(super) const WORDS: usize = 4;

/// Interleaves `n_rows` rows, 1 to 16 of them, with AVX-512. The lanes of missing rows repeat the
/// last one.
///
/// # Safety
/// The processor has the instructions. `rows` are `n_rows` rows of whole blocks, and `band` has
/// room for 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn avx512(
    layout: BandLayout,
    row_bytes: usize,
    rows: &[u8],
    n_rows: usize,
    band: &mut [u8],
) {
    // SAFETY: the caller's rows and processor.
    unsafe { interleave::<__m512i>(layout, row_bytes, rows, n_rows, band) }
}

/// Does what [`avx512`] does, with AVX2.
///
/// # Safety
/// As [`avx512`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn avx2(
    layout: BandLayout,
    row_bytes: usize,
    rows: &[u8],
    n_rows: usize,
    band: &mut [u8],
) {
    // SAFETY: the caller's rows and processor.
    unsafe { interleave::<__m256i>(layout, row_bytes, rows, n_rows, band) }
}

/// Interleaves rows.
///
/// # Safety
/// As [`avx512`]; see [`Words`].
#[inline(always)]
unsafe fn interleave<W: Words>(
    layout: BandLayout,
    row_bytes: usize,
    rows: &[u8],
    n_rows: usize,
    band: &mut [u8],
) {
    assert!(
        (1..=BAND_ROWS).contains(&n_rows)
            && rows.len() >= n_rows * row_bytes
            && band.len() >= BAND_ROWS * row_bytes
    );
    let blocks = row_bytes / layout.block_bytes;
    let to = band.as_mut_ptr();
    // SAFETY: as many bytes are written as there are.
    unsafe {
        let rows = SixteenRows::new(rows.as_ptr(), row_bytes, n_rows);
        let lines = to.add(blocks * layout.rest_bytes * BAND_ROWS);
        for block in 0..blocks {
            let rest = to.add(block * layout.rest_bytes * BAND_ROWS);
            let lines = lines.add(block * layout.n_words * LINE_BYTES);
            rows.interleave_block::<W>(layout, block, rest, lines);
        }
    }
}

/// Where the rows of a band are that is not interleaved.
pub(super) struct SixteenRows {
    rows: [*const u8; BAND_ROWS],
    row_bytes: usize,
}

impl SixteenRows {
    /// Finds `n_rows` rows, one after another; what is missing repeats the last one.
    ///
    /// # Safety
    /// The rows can be read for as long as this is used, and `n_rows` is 1 to 16.
    #[inline(always)]
    pub unsafe fn new(first: *const u8, row_bytes: usize, n_rows: usize) -> Self {
        let rows = std::array::from_fn(|r| first.wrapping_add(r.min(n_rows - 1) * row_bytes));
        Self { rows, row_bytes }
    }

    /// Writes the rests and the lines of a block.
    ///
    /// # Safety
    /// There is such a block, and room for it; see [`Words`].
    #[inline(always)]
    pub unsafe fn interleave_block<W: Words>(
        &self,
        layout: BandLayout,
        block: usize,
        mut rest: *mut u8,
        mut lines: *mut u8,
    ) {
        let first = block * layout.block_bytes;
        // SAFETY: all offsets are within a block of each row, and as much is written as there is.
        unsafe {
            let at = first + layout.rest_at;
            for row in self.rows {
                match layout.rest_bytes {
                    2 => rest
                        .cast::<[u8; 2]>()
                        .write(row.add(at).cast::<[u8; 2]>().read()),
                    n => std::ptr::copy_nonoverlapping(row.add(at), rest, n),
                }
                rest = rest.add(layout.rest_bytes);
            }
            let at = first + layout.words_at;
            let steps = layout.n_words.div_ceil(WORDS);
            for step in 0..steps {
                let share = |step| step * BAND_ROWS / steps;
                self.prefetch(share(step)..share(step + 1), first, layout.block_bytes);
                let word = step * WORDS;
                let n = (layout.n_words - word).min(WORDS);
                W::write_lines(&self.rows, at + 4 * word, n, lines);
                lines = lines.add(n * LINE_BYTES);
            }
        }
    }

    /// Prefetches what follows a block of some of the rows, and what lies under it in the next
    /// band: the lines of memory that begin in the block.
    #[inline(always)]
    fn prefetch(&self, rows: Range<usize>, first: usize, bytes: usize) {
        for row in &self.rows[rows] {
            for at in (first.next_multiple_of(64)..first + bytes).step_by(64) {
                prefetch_rows(row.wrapping_add(at), 64, BAND_ROWS * self.row_bytes);
            }
        }
    }
}

/// Writes up to four lines with AVX-512: of every row, the `n` words from `at` on.
///
/// # Safety
/// The words can be read, the lines written, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn lines_avx512(rows: &[*const u8; BAND_ROWS], at: usize, n: usize, to: *mut u8) {
    let mut quads = [_mm512_setzero_si512(); WORDS];
    for (i, quad) in quads.iter_mut().enumerate() {
        // Rows `i`, `4 + i`, `8 + i` and `12 + i`.
        let words = |part: usize| {
            // SAFETY: the caller's words.
            unsafe {
                let from = rows[4 * part + i].add(at);
                match n {
                    WORDS => _mm_loadu_si128(from.cast()),
                    n => _mm_maskz_loadu_epi32(0xf >> (WORDS - n), from.cast()),
                }
            }
        };
        let v = _mm512_castsi128_si512(words(0));
        let v = _mm512_inserti32x4::<1>(v, words(1));
        let v = _mm512_inserti32x4::<2>(v, words(2));
        *quad = _mm512_inserti32x4::<3>(v, words(3));
    }
    let [a, b, c, d] = quads;
    let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (low2, high2) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    let lines = [
        _mm512_unpacklo_epi64(low, low2),
        _mm512_unpackhi_epi64(low, low2),
        _mm512_unpacklo_epi64(high, high2),
        _mm512_unpackhi_epi64(high, high2),
    ];
    for (i, line) in lines.into_iter().enumerate().take(n) {
        // SAFETY: the caller's lines.
        unsafe { _mm512_storeu_si512(to.add(i * LINE_BYTES).cast(), line) };
    }
}

/// Does what [`lines_avx512`] does, 8 rows at a time, with AVX2.
///
/// # Safety
/// As [`lines_avx512`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn lines_avx2(rows: &[*const u8; BAND_ROWS], at: usize, n: usize, to: *mut u8) {
    let some = _mm_cmpgt_epi32(_mm_set1_epi32(n as i32), _mm_setr_epi32(0, 1, 2, 3));
    for (half, rows) in rows.as_chunks::<8>().0.iter().enumerate() {
        let mut quads = [_mm256_setzero_si256(); WORDS];
        for (i, quad) in quads.iter_mut().enumerate() {
            // Rows `i` and `4 + i`.
            let words = |row: *const u8| {
                // SAFETY: the caller's words.
                unsafe {
                    let from = row.add(at);
                    match n {
                        WORDS => _mm_loadu_si128(from.cast()),
                        _ => _mm_maskload_epi32(from.cast(), some),
                    }
                }
            };
            *quad = _mm256_set_m128i(words(rows[4 + i]), words(rows[i]));
        }
        let [a, b, c, d] = quads;
        let (low, high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (low2, high2) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        let pieces = [
            _mm256_unpacklo_epi64(low, low2),
            _mm256_unpackhi_epi64(low, low2),
            _mm256_unpacklo_epi64(high, high2),
            _mm256_unpackhi_epi64(high, high2),
        ];
        for (i, piece) in pieces.into_iter().enumerate().take(n) {
            // SAFETY: the caller's lines.
            unsafe { _mm256_storeu_si256(to.add(i * LINE_BYTES + 32 * half).cast(), piece) };
        }
    }
}
