//! `*.experts`: a copy of a model's routed experts, each in one stretch that begins at a page.
//!
//! In a GGUF file the slices of one expert lie in three tensors or more. Here they follow one
//! another, packed, so that an expert is read in one go, straight into a buffer without room for
//! pages that it shares with others. This module knows where experts lie in such a file; their
//! bytes are the model's.

use super::framed::{FIXED_BYTES, WireSource, cut_short, head, header_bytes, parse_header, u64_at};
use super::kind::{PACK, PACK_MAGIC};
use crate::source_id::SourceId;
use crate::{FormatError, check_model};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use xxhash_rust::xxh3::xxh3_64;

/// Every expert begins at a multiple of this: a page, the unit of direct I/O.
pub const ALIGN: u64 = 4096;

/// Longest JSON header, in bytes.
const HEADER_LIMIT: usize = 64 << 20;
/// Exclusive bound on layer numbers.
const LAYER_LIMIT: u32 = 4096;
/// Exclusive bound on expert numbers.
const EXPERT_LIMIT: u32 = 65536;
/// Most experts in one file.
const EXPERTS_LIMIT: u64 = 4_194_304;
/// Most slices of one expert.
const SLICES_LIMIT: usize = 16;

/// The experts of one layer that the file has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackLayer {
    /// Number of the layer in the model.
    pub layer: u32,
    /// Bytes of an expert's slices, in the order in which they follow one another.
    pub slices: Vec<u64>,
    /// Experts, in the order in which they lie in the file.
    pub experts: Vec<u32>,
}

impl PackLayer {
    /// Returns the bytes of an expert.
    pub fn expert_bytes(&self) -> u64 {
        self.slices
            .iter()
            .fold(0, |sum: u64, bytes| sum.saturating_add(*bytes))
    }

    /// Returns the bytes from one expert's beginning to the next one's.
    fn stride(&self) -> Option<u64> {
        self.expert_bytes().checked_next_multiple_of(ALIGN)
    }
}

/// What a file of packed experts holds, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackIndex {
    /// The model that the experts are of.
    pub model: SourceId,
    /// UTC moment, see [`crate::units::show_utc`].
    pub made: String,
    /// Layers, ascending.
    pub layers: Vec<PackLayer>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireHeader {
    model: WireSource,
    made: String,
    layers: Vec<WireLayer>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WireLayer {
    layer: u32,
    slices: Vec<u64>,
    experts: Vec<u32>,
}

impl PackIndex {
    /// Encodes everything before the first expert.
    ///
    /// # Errors
    /// When this could not be read back; `path` is for the message.
    pub fn encode(&self, path: &Path) -> Result<Vec<u8>, FormatError> {
        self.check()
            .map_err(|what| FormatError::invalid(path, what))?;
        let layer = |l: &PackLayer| WireLayer {
            layer: l.layer,
            slices: l.slices.clone(),
            experts: l.experts.clone(),
        };
        let header = WireHeader {
            model: WireSource::from(&self.model),
            made: self.made.clone(),
            layers: self.layers.iter().map(layer).collect(),
        };
        let header = serde_json::to_vec(&header)
            .unwrap_or_else(|_| unreachable!("strings and numbers become JSON"));
        if header.len() > HEADER_LIMIT {
            let what = format!(
                "the header takes {} bytes; at most {HEADER_LIMIT} fit",
                header.len()
            );
            return Err(FormatError::invalid(path, what));
        }
        let mut bytes = head(PACK_MAGIC, 1, &header);
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(ALIGN as usize), 0);
        Ok(bytes)
    }

    /// Returns where each layer's first expert begins, and the file's length, with `start` bytes
    /// before the first expert. Returns `None` on overflow.
    fn places(&self, start: u64) -> Option<(Vec<u64>, u64)> {
        let mut at = start;
        let mut firsts = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            firsts.push(at);
            at = at.checked_add(layer.stride()?.checked_mul(layer.experts.len() as u64)?)?;
        }
        (at < 1 << 63).then_some((firsts, at))
    }

    /// Returns the bytes of all experts with what lies between them.
    pub fn expert_bytes(&self) -> u64 {
        self.places(0).map_or(u64::MAX, |(_, end)| end)
    }

    fn check(&self) -> Result<(), String> {
        let mut before = None;
        let mut count = 0;
        for layer in &self.layers {
            let number = layer.layer;
            if number >= LAYER_LIMIT || before.is_some_and(|b| b >= number) {
                return Err(format!(
                    "layer {number} is out of order or above {}",
                    LAYER_LIMIT - 1
                ));
            }
            before = Some(number);
            if !(1..=SLICES_LIMIT).contains(&layer.slices.len()) || layer.slices.contains(&0) {
                return Err(format!(
                    "layer {number} has no slices of a kind that experts have"
                ));
            }
            let mut seen = HashSet::new();
            if let Some(bad) = layer
                .experts
                .iter()
                .find(|e| **e >= EXPERT_LIMIT || !seen.insert(**e))
            {
                return Err(format!(
                    "expert {bad} of layer {number} is listed twice or above {}",
                    EXPERT_LIMIT - 1
                ));
            }
            count += layer.experts.len() as u64;
        }
        if count > EXPERTS_LIMIT {
            return Err(format!("{count} experts; at most {EXPERTS_LIMIT} fit"));
        }
        self.places(HEADER_LIMIT as u64 * 2)
            .map(|_| ())
            .ok_or_else(|| "its experts take too many bytes".into())
    }
}

/// An index with where it puts experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackFile {
    /// What the file says.
    pub index: PackIndex,
    /// Where each layer's first expert begins.
    firsts: Vec<u64>,
}

impl PackFile {
    /// Returns the offset of the expert at position `nth` of the layer at position `layer`.
    pub fn offset(&self, layer: usize, nth: usize) -> u64 {
        // Counted without overflow when the file was opened, for all positions that it has.
        self.firsts[layer] + self.index.layers[layer].stride().unwrap_or(0) * nth as u64
    }

    /// Refuses the experts of another model.
    ///
    /// # Errors
    /// When the hashes differ; the message has both names.
    pub fn check_model(&self, given: &SourceId, path: &Path) -> Result<(), FormatError> {
        check_model(
            &self.index.model,
            given,
            "file of packed experts",
            "make a new one with `tier-plan pack`",
            path,
        )
    }
}

/// Opens a file and reads what comes before the experts.
///
/// # Errors
/// When it can't be read, is another kind of file, is newer than this program, is damaged, or has
/// not the length that its header makes.
pub fn open(path: &Path) -> Result<PackFile, FormatError> {
    let io = |source| FormatError::Io {
        path: path.into(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    decode(file, length, path)
}

/// Does what [`open`] does, from a source of `length` bytes; `path` is for messages.
///
/// # Errors
/// As [`open`].
pub fn decode(mut from: impl Read, length: u64, path: &Path) -> Result<PackFile, FormatError> {
    let io = |source| FormatError::Io {
        path: path.into(),
        source,
    };
    let mut bytes = Vec::new();
    // Enough of another kind of file to say what it is.
    (&mut from)
        .take(ALIGN)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    let header = header_bytes(&PACK, PACK_MAGIC, &bytes, path)?;
    if header > HEADER_LIMIT {
        return Err(FormatError::invalid(
            path,
            format!("a header of {header} bytes; the file is damaged"),
        ));
    }
    let header_end = FIXED_BYTES + header;
    let start = (header_end + 8).next_multiple_of(ALIGN as usize);
    from.take(start.saturating_sub(bytes.len()) as u64)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    let sum = u64_at(&bytes, header_end).ok_or_else(|| cut_short(&PACK, path))?;
    if sum != xxh3_64(&bytes[..header_end]) {
        let what = "the checksum of its header is wrong: the file is damaged; make it again with `tier-plan pack`";
        return Err(FormatError::invalid(path, what));
    }
    let header: WireHeader = parse_header(&bytes[FIXED_BYTES..header_end])
        .map_err(|e| FormatError::invalid(path, format!("header: {e}; the file is damaged")))?;
    let layer = |l: WireLayer| PackLayer {
        layer: l.layer,
        slices: l.slices,
        experts: l.experts,
    };
    let layers = header.layers.into_iter().map(layer).collect();
    let index = PackIndex {
        model: header.model.into(),
        made: header.made,
        layers,
    };
    index
        .check()
        .map_err(|what| FormatError::invalid(path, format!("{what}; the file is damaged")))?;
    match index.places(start as u64) {
        Some((firsts, end)) if end == length => Ok(PackFile { index, firsts }),
        made => {
            let end = made.map_or("more than can be counted".to_string(), |(_, end)| {
                end.to_string()
            });
            let what = format!(
                "{length} bytes long, but its header makes {end}; make it again with `tier-plan pack`"
            );
            Err(FormatError::invalid(path, what))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index() -> PackIndex {
        PackIndex {
            model: SourceId {
                name: "demo".into(),
                hash: "0123456789abcdef0123456789abcdef".into(),
            },
            made: "2026-11-22T17:00:00Z".into(),
            layers: vec![
                PackLayer {
                    layer: 0,
                    slices: vec![3000, 2000, 100],
                    experts: vec![2, 0],
                },
                PackLayer {
                    layer: 3,
                    slices: vec![4096],
                    experts: vec![],
                },
                PackLayer {
                    layer: 5,
                    slices: vec![4096],
                    experts: vec![7],
                },
            ],
        }
    }

    fn file() -> Vec<u8> {
        let mut bytes = index().encode(Path::new("demo.experts")).unwrap();
        bytes.resize(bytes.len() + index().expert_bytes() as usize, 0x5a);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<PackFile, FormatError> {
        decode(bytes, bytes.len() as u64, Path::new("demo.experts"))
    }

    fn says(bytes: &[u8], words: &str) {
        let error = read(bytes).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }

    #[test]
    fn what_is_written_is_read() {
        let file = read(&file()).unwrap();
        assert_eq!(file.index, index());
        let start = index().encode(Path::new("")).unwrap().len() as u64;
        assert_eq!(
            (file.offset(0, 0), file.offset(0, 1), file.offset(2, 0)),
            (start, start + 8192, start + 16384)
        );
        assert_eq!(index().expert_bytes(), 8192 * 2 + 4096);
    }

    #[test]
    fn the_committed_file_is_read() {
        let bytes = include_bytes!("../../../tests/data/formats/pack.v1.experts");
        assert_eq!(read(bytes).unwrap().index, index());
    }

    #[test]
    fn damage_is_named() {
        let bytes = file();
        says(b"GGUF and so on", "it is a GGUF model");
        says(&bytes[..10], "cut short");
        says(&bytes[..bytes.len() - 1], "but its header makes");
        says(&[&bytes[..], &[0]].concat(), "but its header makes");
        let mut newer = bytes.clone();
        newer[8] = 2;
        says(&newer, "version 2, but this program reads up to version 1");
        let mut flipped = bytes.clone();
        flipped[30] ^= 1;
        says(&flipped, "checksum of its header is wrong");
    }

    #[test]
    fn what_could_not_be_read_back_is_not_written() {
        let with = |change: fn(&mut PackIndex)| {
            let mut index = index();
            change(&mut index);
            index
                .encode(Path::new("demo.experts"))
                .unwrap_err()
                .to_string()
        };
        assert!(with(|i| i.layers[1].layer = 0).contains("layer 0 is out of order"));
        assert!(
            with(|i| i.layers[0].experts = vec![1, 1])
                .contains("expert 1 of layer 0 is listed twice")
        );
        assert!(with(|i| i.layers[2].slices.clear()).contains("layer 5 has no slices"));
        assert!(with(|i| i.layers[2].slices = vec![u64::MAX, 1]).contains("too many bytes"));
    }

    proptest! {
        #[test]
        fn damaged_files_do_no_harm(at in 0usize..600, to: u8, keep in 0usize..600, seal: bool) {
            let mut bytes = file();
            bytes[at] = to;
            bytes.truncate(keep.max(24));
            if seal {
                let header = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]) as usize;
                if let Some(end) = header.checked_add(16) && end + 8 <= bytes.len() {
                    let sum = xxh3_64(&bytes[..end]).to_le_bytes();
                    bytes[end..end + 8].copy_from_slice(&sum);
                }
            }
            let _ = read(&bytes);
        }
    }
}
