//! Bands: 16 weight rows, interleaved so that a register holds a piece of each.
//!
//! A kernel that takes its rows one by one unpacks a block into lanes that belong to different
//! runs, and must add those lanes up. In a band, lane `r` of every register belongs to row `r`: a
//! register of four codes per row is multiplied with four activations, which all rows share, and
//! scales and sums are registers of one value per row.
//!
//! The bytes are those of the rows in another order. Every block of a format is a few 4-byte words
//! and, in some formats, a rest that is no whole word (a 16-bit scale). A *line* is 64 bytes: one
//! word of each row.
//!
//! ```text
//! rows            row 0: block 0, block 1, ...   row 1: block 0, block 1, ...   ...   row 15
//!
//! band            block 0: rest of rows 0..16;  block 1: rest of rows 0..16;  ...
//!                 block 0: line 0 = word 0 of rows 0..16, line 1 = word 1 of rows 0..16, ...
//!                 block 1: line 0, line 1, ...
//!                 ...
//! ```

use super::{Isa, Kernels, Weights};
use crate::quant::TensorType;
use std::ops::Range;

/// Rows per band.
pub const BAND_ROWS: usize = 16;

/// Bytes per line: a word of every row.
pub(crate) const LINE_BYTES: usize = 4 * BAND_ROWS;

/// Order of the bytes of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RowOrder {
    /// Row after row, as in the file.
    #[default]
    Sequential,
    /// Band after band of [`BAND_ROWS`] interleaved rows.
    Interleaved,
}

/// Where a block's words and its rest are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BandLayout {
    pub block_bytes: usize,
    /// Offset of the first word.
    pub words_at: usize,
    pub n_words: usize,
    /// Offset of the rest, which is before or after the words.
    pub rest_at: usize,
    pub rest_bytes: usize,
}

impl BandLayout {
    /// Returns the layout of a block that begins with `rest_bytes` that are no whole word.
    pub const fn rest_first(block_bytes: usize, rest_bytes: usize) -> Self {
        Self {
            block_bytes,
            words_at: rest_bytes,
            n_words: (block_bytes - rest_bytes) / 4,
            rest_at: 0,
            rest_bytes,
        }
    }

    /// Returns the layout of a block that ends with what is no whole word.
    pub const fn rest_last(block_bytes: usize) -> Self {
        Self {
            block_bytes,
            words_at: 0,
            n_words: block_bytes / 4,
            rest_at: block_bytes / 4 * 4,
            rest_bytes: block_bytes % 4,
        }
    }

    /// Returns the bytes of a block's words within a row.
    fn words(self, block: usize) -> Range<usize> {
        let first = block * self.block_bytes + self.words_at;
        first..first + 4 * self.n_words
    }

    /// Returns the bytes of a block's rest within a row.
    fn rest(self, block: usize) -> Range<usize> {
        let first = block * self.block_bytes + self.rest_at;
        first..first + self.rest_bytes
    }

    /// Calls `copy` with every piece of a band: where it is among the rows, and where in the band.
    fn pieces(self, row_bytes: usize, mut copy: impl FnMut(Range<usize>, Range<usize>)) {
        let blocks = row_bytes / self.block_bytes;
        let lines = blocks * self.rest_bytes * BAND_ROWS;
        for row in 0..BAND_ROWS {
            let piece =
                |range: Range<usize>| row * row_bytes + range.start..row * row_bytes + range.end;
            for block in 0..blocks {
                let words = self.words(block);
                for (i, at) in words.step_by(4).enumerate() {
                    let to = lines + (block * self.n_words + i) * LINE_BYTES + 4 * row;
                    copy(piece(at..at + 4), to..to + 4);
                }
                let to = (block * BAND_ROWS + row) * self.rest_bytes;
                copy(piece(self.rest(block)), to..to + self.rest_bytes);
            }
        }
    }

    /// Copies a row of a band.
    pub fn row(self, row_bytes: usize, band: &[u8], row: usize, out: &mut [u8]) {
        let blocks = row_bytes / self.block_bytes;
        let lines = blocks * self.rest_bytes * BAND_ROWS;
        for block in 0..blocks {
            for (i, at) in self.words(block).step_by(4).enumerate() {
                let from = lines + (block * self.n_words + i) * LINE_BYTES + 4 * row;
                out[at..at + 4].copy_from_slice(&band[from..from + 4]);
            }
            let from = (block * BAND_ROWS + row) * self.rest_bytes;
            out[self.rest(block)].copy_from_slice(&band[from..from + self.rest_bytes]);
        }
    }

    /// Interleaves the rows of a band.
    pub fn interleave(self, row_bytes: usize, rows: &[u8], band: &mut [u8]) {
        self.pieces(row_bytes, |from, to| band[to].copy_from_slice(&rows[from]));
    }

    /// Does the opposite of [`interleave`](Self::interleave).
    pub fn separate(self, row_bytes: usize, band: &[u8], rows: &mut [u8]) {
        self.pieces(row_bytes, |to, from| rows[to].copy_from_slice(&band[from]));
    }
}

/// Returns the layout of a type's bands, or `None` for a type that has none.
pub(crate) const fn layout(ty: TensorType) -> Option<BandLayout> {
    let bytes = ty.block_bytes();
    match ty {
        TensorType::Q4_0
        | TensorType::Q5_0
        | TensorType::Q8_0
        | TensorType::IQ4_NL
        | TensorType::IQ1_S
        | TensorType::IQ2_XXS
        | TensorType::IQ2_XS
        | TensorType::IQ2_S
        | TensorType::IQ3_XXS
        | TensorType::IQ3_S => Some(BandLayout::rest_first(bytes, 2)),
        TensorType::MXFP4 => Some(BandLayout::rest_first(bytes, 1)),
        TensorType::Q4_1
        | TensorType::Q5_1
        | TensorType::Q2_K
        | TensorType::Q3_K
        | TensorType::Q4_K
        | TensorType::Q5_K
        | TensorType::Q6_K
        | TensorType::IQ4_XS
        | TensorType::IQ1_M => Some(BandLayout::rest_last(bytes)),
        _ => None,
    }
}

impl Kernels {
    /// Returns the order in which these kernels multiply a matrix of `n_rows` rows the fastest.
    pub fn fastest_order(self, ty: TensorType, n_rows: usize) -> RowOrder {
        #[cfg(target_arch = "x86_64")]
        let has_kernel = self.bands_kernel(ty).is_some();
        #[cfg(not(target_arch = "x86_64"))]
        let has_kernel = false;
        if has_kernel && Weights::has_bands(ty, n_rows) {
            RowOrder::Interleaved
        } else {
            RowOrder::Sequential
        }
    }

    /// Interleaves the rows of whole bands where they are.
    ///
    /// # Panics
    /// When the type has no bands, or `bytes` are not whole bands of whole blocks.
    pub fn interleave(self, ty: TensorType, row_bytes: usize, bytes: &mut [u8]) {
        let layout = layout(ty).unwrap_or_else(|| panic!("{ty} has no bands"));
        let band_bytes = row_bytes * BAND_ROWS;
        assert!(
            row_bytes > 0
                && row_bytes.is_multiple_of(layout.block_bytes)
                && bytes.len().is_multiple_of(band_bytes),
            "whole bands of whole {ty} blocks"
        );
        let mut rows = vec![0; band_bytes];
        for band in bytes.chunks_exact_mut(band_bytes) {
            rows.copy_from_slice(band);
            match self.isa() {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the `Kernels` value proves that the processor has the instructions; there
                // are 16 rows of whole blocks on both sides.
                Isa::Avx512 | Isa::Amx => unsafe {
                    super::x86::bands::interleave_avx512(layout, row_bytes, &rows, BAND_ROWS, band);
                },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                Isa::Avx2 => unsafe {
                    super::x86::bands::interleave_avx2(layout, row_bytes, &rows, BAND_ROWS, band);
                },
                _ => layout.interleave(row_bytes, &rows, band),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_testing::Random;

    #[test]
    fn every_instruction_set_interleaves_alike_and_nothing_is_lost() {
        let mut rng = Random(5);
        for ty in TensorType::ALL {
            let Some(layout) = layout(ty) else { continue };
            assert_eq!(
                layout.block_bytes,
                4 * layout.n_words + layout.rest_bytes,
                "{ty}"
            );
            for blocks in [1, 2, 3, 8] {
                let row_bytes = blocks * ty.block_bytes();
                let rows: Vec<u8> = (0..2 * BAND_ROWS * row_bytes)
                    .map(|_| rng.next() as u8)
                    .collect();
                let mut bands = rows.clone();
                Kernels::SCALAR.interleave(ty, row_bytes, &mut bands);
                assert_ne!(bands, rows, "{ty}");
                for k in Kernels::available() {
                    let mut again = rows.clone();
                    k.interleave(ty, row_bytes, &mut again);
                    assert!(again == bands, "{ty}, {blocks} blocks, {}", k.isa());
                }
                let mut back = vec![0; rows.len()];
                let band_bytes = BAND_ROWS * row_bytes;
                for (band, rows) in bands
                    .chunks_exact(band_bytes)
                    .zip(back.chunks_exact_mut(band_bytes))
                {
                    layout.separate(row_bytes, band, rows);
                }
                assert!(back == rows, "{ty}, {blocks} blocks");
            }
        }
    }

    #[test]
    fn a_line_has_one_word_of_every_row() {
        let row_bytes = TensorType::Q8_0.block_bytes();
        let mut bytes: Vec<u8> = (0..BAND_ROWS)
            .flat_map(|row| (0..row_bytes).map(move |i| (16 * row + i) as u8))
            .collect();
        Kernels::SCALAR.interleave(TensorType::Q8_0, row_bytes, &mut bytes);
        // The scale of row 3.
        assert_eq!(bytes[6..][..2], [48, 49]);
        // Row 3, codes 4 to 8, which follow the scale's two bytes.
        let lines = 2 * BAND_ROWS;
        assert_eq!(bytes[lines + LINE_BYTES + 12..][..4], [54, 55, 56, 57]);
    }
}
