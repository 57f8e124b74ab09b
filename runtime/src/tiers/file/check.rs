//! Checksums of what is read: compared by the thread that finishes a read, while others compute.

use super::super::source::{ReadError, Source};
use super::Extent;
use xxhash_rust::xxh3::xxh3_64;

/// A part of a buffer that must have a certain checksum once it has been read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Where in the buffer.
    pub at: usize,
    /// Where the bytes come from.
    pub extent: Extent,
    /// XXH3-64 that they must have.
    pub sum: u64,
    /// What they are, for the error: `expert 3 of tensor 'blk.0.ffn_up_exps.weight'`.
    pub what: String,
}

impl Check {
    /// Compares the bytes that are there.
    ///
    /// # Errors
    /// When they have another checksum; `source` is where they came from.
    pub(super) fn of(&self, buffer: &[u8], source: &Source) -> Result<(), ReadError> {
        let Some(bytes) = buffer.get(self.at..).and_then(|rest| rest.get(..self.extent.len)) else {
            unreachable!("{self:?} in a buffer of {}", buffer.len())
        };
        compare(bytes, self.sum)
            .map_err(|found| source.damaged(self.extent.offset, bytes.len(), &self.what, found, self.sum))
    }
}

/// Whether bytes have the checksum `sum`; the error is the one that they have.
pub fn compare(bytes: &[u8], sum: u64) -> Result<(), u64> {
    match xxh3_64(bytes) {
        found if found == sum => Ok(()),
        found => Err(found),
    }
}
