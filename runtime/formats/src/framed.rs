//! Binary files that begin with a magic, a version and a JSON header: the frame that checksums and
//! packed experts share.

use super::cost;
use super::kind::Kind;
use crate::FormatError;
use crate::source_id::SourceId;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Magic, version, header length.
pub(super) const FIXED_BYTES: usize = 16;

/// A file's source as both headers name it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WireSource {
    name: String,
    hash: String,
}

impl From<&SourceId> for WireSource {
    fn from(id: &SourceId) -> Self {
        Self {
            name: id.name.clone(),
            hash: id.hash.clone(),
        }
    }
}

impl From<WireSource> for SourceId {
    fn from(wire: WireSource) -> Self {
        Self {
            name: wire.name,
            hash: wire.hash,
        }
    }
}

/// Encodes everything up to the end of the header.
pub(super) fn head(magic: [u8; 8], version: u32, header: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FIXED_BYTES + header.len());
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&version.to_le_bytes());
    // A header of 4 GiB is past every limit that readers and writers check.
    bytes.extend_from_slice(
        &u32::try_from(header.len())
            .unwrap_or(u32::MAX)
            .to_le_bytes(),
    );
    bytes.extend_from_slice(header);
    bytes
}

/// Returns the length of the header, which the first [`FIXED_BYTES`] announce; `bytes` may go on.
///
/// # Errors
/// When it is another kind of file, a newer version, or cut short.
pub(super) fn header_bytes(
    kind: &Kind,
    magic: [u8; 8],
    bytes: &[u8],
    path: &Path,
) -> Result<usize, FormatError> {
    let Some(rest) = bytes.strip_prefix(&magic) else {
        return Err(kind.mismatch(path, &Kind::describe(bytes)));
    };
    let [v0, v1, v2, v3, l0, l1, l2, l3, ..] = *rest else {
        return Err(cut_short(kind, path));
    };
    kind.check_version(i64::from(u32::from_le_bytes([v0, v1, v2, v3])), path)?;
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    usize::try_from(length)
        .map_err(|_| FormatError::invalid(path, format!("a header of {length} bytes")))
}

/// Parses a header, unless that would take too much memory. The error is what is wrong with it.
pub(super) fn parse_header<'a, T: Deserialize<'a>>(header: &'a [u8]) -> Result<T, String> {
    cost::of_json(header).check()?;
    serde_json::from_slice(header).map_err(|e| e.to_string())
}

/// Returns the error of a file that ends too early.
pub(super) fn cut_short(kind: &Kind, path: &Path) -> FormatError {
    FormatError::invalid(path, format!("the file is cut short; {}", kind.hint))
}

/// Returns a little-endian number at `at`, if the bytes reach that far.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}
