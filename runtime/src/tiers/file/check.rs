//! Checksums of what is read, compared by the reader thread that finishes a request.

use super::super::source::{ReadError, Source};
use super::Extent;
use xxhash_rust::xxh3::xxh3_64;

/// The checksum that a range of a buffer must have once it has been read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceChecksum {
    /// Offset of the range in the buffer.
    pub at: usize,
    /// The bytes of the file that the range holds.
    pub extent: Extent,
    /// Expected XXH3-64.
    pub sum: u64,
    /// Name of the slice for errors: `expert 3 of tensor 'blk.0.ffn_up_exps.weight'`.
    pub what: String,
}

impl SliceChecksum {
    /// Compares the buffer's bytes with the checksum; `source` is the file that they were read
    /// from.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] when the checksum differs.
    pub(super) fn verify(&self, buffer: &[u8], source: &Source) -> Result<(), ReadError> {
        let Some(bytes) = buffer
            .get(self.at..)
            .and_then(|rest| rest.get(..self.extent.len))
        else {
            unreachable!("{self:?} in a buffer of {}", buffer.len())
        };
        compare(bytes, self.sum).map_err(|found| {
            source.damaged(self.extent.offset, bytes.len(), &self.what, found, self.sum)
        })
    }
}

/// Compares the XXH3-64 of `bytes` with `sum`.
///
/// # Errors
/// The checksum that the bytes have, when it is another.
pub fn compare(bytes: &[u8], sum: u64) -> Result<(), u64> {
    match xxh3_64(bytes) {
        found if found == sum => Ok(()),
        found => Err(found),
    }
}
