//! Interleaving rows with AVX-512: four words of 16 rows at a time.

use crate::bands::{BAND_ROWS, BandLayout, LINE_BYTES};
use crate::x86::prefetch_rows;
use std::arch::x86_64::*;

/// Words of a row that are loaded at once.
const WORDS: usize = 4;

/// Interleaves `n_rows` rows, 1 to 16 of them. The lanes of missing rows repeat the last one.
///
/// # Safety
/// The processor has the instructions. `rows` are `n_rows` rows of whole blocks, and `band` has
/// room for 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
pub(crate) unsafe fn interleave(
    layout: BandLayout,
    row_bytes: usize,
    rows: &[u8],
    n_rows: usize,
    band: &mut [u8],
) {
    let blocks = row_bytes / layout.block_bytes;
    assert!(
        (1..=BAND_ROWS).contains(&n_rows)
            && rows.len() >= n_rows * row_bytes
            && band.len() >= BAND_ROWS * row_bytes
    );
    let row: [*const u8; BAND_ROWS] =
        std::array::from_fn(|r| rows[r.min(n_rows - 1) * row_bytes..].as_ptr());
    let mut to = band.as_mut_ptr();
    // SAFETY: all offsets are within a block of each row, and as much is written as there is.
    unsafe {
        for block in 0..blocks {
            let at = block * layout.block_bytes + layout.rest_at;
            for row in row {
                match layout.rest_bytes {
                    2 => to
                        .cast::<[u8; 2]>()
                        .write(row.add(at).cast::<[u8; 2]>().read()),
                    n => std::ptr::copy_nonoverlapping(row.add(at), to, n),
                }
                to = to.add(layout.rest_bytes);
            }
        }
        for block in 0..blocks {
            let at = block * layout.block_bytes + layout.words_at;
            for word in (0..layout.n_words).step_by(WORDS) {
                let n = (layout.n_words - word).min(WORDS);
                let lines = four_lines(&row, BAND_ROWS * row_bytes, at + 4 * word, n);
                for line in lines.into_iter().take(n) {
                    _mm512_storeu_si512(to.cast(), line);
                    to = to.add(LINE_BYTES);
                }
            }
        }
    }
}

/// Returns up to four lines: of every row of a band of `band_bytes` bytes, the `n` words from `at`
/// on.
///
/// # Safety
/// The words can be read, and the processor has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn four_lines(
    rows: &[*const u8; BAND_ROWS],
    band_bytes: usize,
    at: usize,
    n: usize,
) -> [__m512i; WORDS] {
    let mut quads = [_mm512_setzero_si512(); WORDS];
    for (i, quad) in quads.iter_mut().enumerate() {
        // Rows `i`, `4 + i`, `8 + i` and `12 + i`.
        let words = |part: usize| {
            // SAFETY: the caller's words.
            unsafe {
                let from = rows[4 * part + i].add(at);
                prefetch_rows(from, 1, band_bytes);
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
    [
        _mm512_unpacklo_epi64(low, low2),
        _mm512_unpackhi_epi64(low, low2),
        _mm512_unpacklo_epi64(high, high2),
        _mm512_unpackhi_epi64(high, high2),
    ]
}
