//! `*.sums`: checksums of a model's slices, by which later reads are verified.
//!
//! A tensor that holds all experts of a layer has a checksum for each of them, every other tensor
//! one.

use super::framed::{FIXED_BYTES, WireSource, cut_short, head, header_bytes, parse_header, u64_at};
use super::kind::{SUMS, SUMS_MAGIC};
use crate::source_id::SourceId;
use crate::{FormatError, check_model, safely};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::Path;
use xxhash_rust::xxh3::xxh3_64;

/// Most slices that one file may list, as many as its bytes could hold.
const MAX_SLICES: u64 = SUMS.limit_bytes / 8;

/// The checksums of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSums {
    /// Name of the tensor.
    pub name: String,
    /// XXH3-64 of each of its slices, which are of one length and follow one another.
    pub slices: Vec<u64>,
}

/// The checksums of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sums {
    /// The model whose bytes were summed.
    pub model: SourceId,
    /// UTC moment, see [`crate::units::show_utc`].
    pub made: String,
    /// In the order of the file.
    pub tensors: Vec<TensorSums>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireHeader {
    model: WireSource,
    made: String,
    tensors: Vec<WireTensor>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireTensor {
    name: String,
    slices: u32,
}

impl Sums {
    /// Encodes the file.
    pub fn encode(&self) -> Vec<u8> {
        let tensor = |t: &TensorSums| WireTensor {
            name: t.name.clone(),
            slices: t.slices.len() as u32,
        };
        let header = WireHeader {
            model: WireSource::from(&self.model),
            made: self.made.clone(),
            tensors: self.tensors.iter().map(tensor).collect(),
        };
        let header = serde_json::to_vec(&header)
            .unwrap_or_else(|_| unreachable!("strings and numbers become JSON"));
        let mut bytes = head(SUMS_MAGIC, 1, &header);
        bytes.extend(
            self.tensors
                .iter()
                .flat_map(|t| &t.slices)
                .flat_map(|sum| sum.to_le_bytes()),
        );
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        bytes
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When the system refuses, or the file could not be read back.
    pub fn write(&self, path: &Path) -> Result<(), FormatError> {
        let bytes = self.encode();
        if decode(&bytes, path)? != *self {
            return Err(FormatError::invalid(
                path,
                "these checksums can't be told in a file",
            ));
        }
        safely::write(path, &bytes)
    }

    /// Refuses checksums of another model.
    ///
    /// # Errors
    /// When the hashes differ; the message has both names.
    pub fn check_model(&self, given: &SourceId, path: &Path) -> Result<(), FormatError> {
        check_model(
            &self.model,
            given,
            "file of checksums",
            "make new ones with `tier-plan checksum`",
            path,
        )
    }
}

/// Reads a file of checksums.
///
/// # Errors
/// When it can't be read, is another kind of file, is newer than this program, damaged or cut
/// short.
pub fn read(path: &Path) -> Result<Sums, FormatError> {
    decode(&SUMS.read(path)?, path)
}

/// Decodes a file's bytes; `path` is for messages.
///
/// # Errors
/// As [`read`].
pub fn decode(bytes: &[u8], path: &Path) -> Result<Sums, FormatError> {
    let header_end = FIXED_BYTES.saturating_add(header_bytes(&SUMS, SUMS_MAGIC, bytes, path)?);
    let cut = || cut_short(&SUMS, path);
    let header = bytes.get(FIXED_BYTES..header_end).ok_or_else(cut)?;
    let body_end = bytes
        .len()
        .checked_sub(8)
        .filter(|end| *end >= header_end)
        .ok_or_else(cut)?;
    if u64_at(bytes, body_end) != Some(xxh3_64(&bytes[..body_end])) {
        return Err(FormatError::invalid(
            path,
            "the checksum of this file itself is wrong: it is damaged or cut short; make it again with `tier-plan checksum`",
        ));
    }
    let header: WireHeader = parse_header(header)
        .map_err(|e| FormatError::invalid(path, format!("header: {e}; the file is damaged")))?;
    let announced: u64 = header.tensors.iter().map(|t| u64::from(t.slices)).sum();
    if announced > MAX_SLICES || announced * 8 != (body_end - header_end) as u64 {
        let there = (body_end - header_end) / 8;
        let what = format!(
            "the header announces {announced} checksums, but {there} are there; make it again"
        );
        return Err(FormatError::invalid(path, what));
    }
    let mut names = HashSet::new();
    if let Some(twice) = header
        .tensors
        .iter()
        .find(|t| !names.insert(t.name.as_str()))
    {
        let name = super::text::quote(&twice.name);
        return Err(FormatError::invalid(
            path,
            format!("tensor {name} is listed twice; make it again"),
        ));
    }
    let mut words = bytes[header_end..body_end]
        .as_chunks::<8>()
        .0
        .iter()
        .map(|word| u64::from_le_bytes(*word));
    let tensors = header.tensors.into_iter().map(|t| {
        let slices = words.by_ref().take(t.slices as usize).collect();
        TensorSums {
            name: t.name,
            slices,
        }
    });
    let tensors = tensors.collect();
    Ok(Sums {
        model: header.model.into(),
        made: header.made,
        tensors,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sums() -> Sums {
        let tensor = |name: &str, slices: &[u64]| TensorSums {
            name: name.into(),
            slices: slices.to_vec(),
        };
        Sums {
            model: SourceId {
                name: "demo".into(),
                hash: "0123456789abcdef0123456789abcdef".into(),
            },
            made: "2026-11-22T17:00:00Z".into(),
            tensors: vec![
                tensor("token_embd.weight", &[7]),
                tensor("blk.0.ffn_up_exps.weight", &[1, u64::MAX, 3]),
            ],
        }
    }

    fn says(bytes: &[u8], words: &str) {
        let error = decode(bytes, Path::new("demo.sums"))
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{error}");
    }

    /// With its own checksum put right.
    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let end = bytes.len() - 8;
        let sum = xxh3_64(&bytes[..end]).to_le_bytes();
        bytes[end..].copy_from_slice(&sum);
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("demo.sums");
        sums().write(&path).unwrap();
        assert_eq!(read(&path).unwrap(), sums());
        let other = SourceId {
            name: "other".into(),
            hash: "f".repeat(32),
        };
        let error = sums().check_model(&other, &path).unwrap_err().to_string();
        assert!(
            error.contains("'demo' (0123456789ab)") && error.contains("'other'"),
            "{error}"
        );
    }

    #[test]
    fn the_committed_file_is_read() {
        let bytes = include_bytes!("../../../tests/data/formats/sums.v1.sums");
        assert_eq!(decode(bytes, Path::new("sums.v1.sums")).unwrap(), sums());
    }

    #[test]
    fn damage_is_named() {
        let bytes = sums().encode();
        says(b"GGUF and so on", "it is a GGUF model");
        says(&bytes[..10], "cut short");
        says(&bytes[..bytes.len() - 1], "damaged or cut short");
        let mut newer = bytes.clone();
        newer[8] = 2;
        says(&newer, "version 2, but this program reads up to version 1");
        let mut flipped = bytes.clone();
        let at = flipped.len() - 12;
        flipped[at] ^= 1;
        says(&flipped, "checksum of this file itself is wrong");
        let text = String::from_utf8_lossy(&bytes[16..]).into_owned();
        let at = 16 + text.find("\"slices\":1").unwrap() + 9;
        let mut more = bytes.clone();
        more[at] = b'9';
        says(&sealed(more), "announces 12 checksums, but 4 are there");
    }

    proptest! {
        #[test]
        fn damaged_files_do_no_harm(at in 0usize..400, to: u8, keep in 0usize..500, seal: bool) {
            let mut bytes = sums().encode();
            let n = bytes.len();
            bytes[at % n] = to;
            bytes.truncate(keep.clamp(24, n));
            let bytes = if seal { sealed(bytes) } else { bytes };
            let _ = decode(&bytes, Path::new("demo.sums"));
        }
    }
}
