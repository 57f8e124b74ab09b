//! What is done with the bytes of a request once all are there, by the reader thread that reads the
//! last of them.

use super::super::source::{ReadError, Source};
use super::SliceChecksum;
use std::ops::Range;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::{BAND_ROWS, Kernels};

/// Checksums that the bytes must have, and matrices whose rows are then interleaved.
#[derive(Debug, Clone, Default)]
pub struct Finish {
    /// Compared first.
    pub checks: Vec<SliceChecksum>,
    /// Interleaved where the checksums are right.
    pub bands: Vec<BandsInBuffer>,
}

/// A matrix in a buffer whose rows are interleaved.
#[derive(Debug, Clone)]
pub struct BandsInBuffer {
    /// The kernels that will read it.
    pub kernels: Kernels,
    /// Type of the values.
    pub ty: TensorType,
    /// Bytes of the buffer: whole bands.
    pub range: Range<usize>,
    /// Bytes per row.
    pub row_bytes: usize,
}

impl Finish {
    /// Whether all of it is about a buffer of `len` bytes.
    pub(super) fn fits(&self, len: usize) -> bool {
        let ends = self
            .checks
            .iter()
            .map(|c| c.at.checked_add(c.extent.len))
            .chain(self.bands.iter().map(|b| Some(b.range.end)));
        let whole = |b: &BandsInBuffer| {
            let band_bytes = b.row_bytes * BAND_ROWS;
            b.range.start <= b.range.end && b.range.len().is_multiple_of(band_bytes)
        };
        self.bands.iter().all(whole)
            && ends
                .into_iter()
                .all(|end| end.is_some_and(|end| end <= len))
    }

    /// Compares the buffer with the checksums, and interleaves its matrices.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] when a checksum differs.
    pub(super) fn run(&self, buffer: &mut [u8], sources: &[Source]) -> Result<(), ReadError> {
        for check in &self.checks {
            check.verify(buffer, &sources[check.extent.part])?;
        }
        for bands in &self.bands {
            let bytes = &mut buffer[bands.range.clone()];
            bands.kernels.interleave(bands.ty, bands.row_bytes, bytes);
        }
        Ok(())
    }
}
