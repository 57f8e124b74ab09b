//! GGUF model files: metadata and tensors of versions 2 and 3, whole or split, mapped into memory.
//!
//! Opening looks at the headers only; tensor bytes are read by the system when they are touched.
//! This module knows the container and nothing of networks: what a key means is `model`'s business,
//! what a block means `quant`'s. A file must not be changed while it is open.

mod ask;
mod bands;
#[allow(
    unsafe_code,
    reason = "a signal handler is installed through the system's C interface"
)]
mod bus;
mod error;
mod foreign;
mod foreign_types;
mod header;
#[allow(
    unsafe_code,
    reason = "a memory map is only sound while nothing shortens the file"
)]
mod map;
mod pieces;
mod split;
mod stack;
mod tensor;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod value;
mod write;

pub use bus::report_bus_errors;
pub use error::GgufError;
pub use header::{Header, MAX_ARRAY, MAX_HEADER_BYTES, MAX_KEYS, MAX_TENSORS};
pub use map::Advice;
pub use tensor::{SlicePlace, TensorInfo};
pub use value::{ArrayValue, Value};
pub use write::{BadTensor, Draft, DraftTensor};

use crate::source_id::SourceId;
use map::{Copied, Map};
use split::{MAX_PARTS, PartName};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tier_plan_kernels::RowOrder;
use xxhash_rust::xxh3::Xxh3;

/// An open model: one file, or all parts of a split one.
#[derive(Debug)]
pub struct Gguf {
    parts: Vec<Part>,
    /// Of the first part, without the keys that only describe the splitting.
    metadata: Vec<(String, Value)>,
    keys: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    /// By tensor: the order of its rows, that of the file unless they were interleaved in memory.
    row_orders: Vec<RowOrder>,
    names: HashMap<String, usize>,
    id: SourceId,
}

/// A mapped file of the model.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    map: Map,
    /// Instead of the mapping, where the tensors were copied.
    copied: Option<Copied>,
}

/// What a header says about its part of a split model.
struct SplitKeys {
    /// Number of the part, from 0.
    no: u32,
    count: u32,
    /// Tensors of all parts.
    tensors: Option<u64>,
}

impl Gguf {
    /// Opens a model. Of a split one any part may be given: all are opened, by their names beside
    /// it.
    ///
    /// ```
    /// use std::path::Path;
    /// use tier_plan_formats::gguf::Gguf;
    ///
    /// let gguf = Gguf::open(Path::new("../../profiles/demo/demo.gguf"))?;
    /// let embedding = gguf.tensor("token_embd.weight").expect("every model has one");
    /// assert_eq!(gguf.bytes(embedding).len() as u64, embedding.n_bytes);
    /// assert_eq!(gguf.str("general.architecture")?, "qwen3moe");
    /// # Ok::<(), tier_plan_formats::gguf::GgufError>(())
    /// ```
    ///
    /// # Errors
    /// The file can't be read, is something else, is cut short or damaged, or a part is missing or
    /// does not belong.
    pub fn open(path: &Path) -> Result<Gguf, GgufError> {
        let (part, header) = open_part(path)?;
        let Some(keys) = split_keys(&header, path)? else {
            return Gguf::assemble(vec![(part, header)], None);
        };
        if is_joined(&part, &header) {
            return Err(GgufError::split(
                path,
                "these are the parts of a split model joined by bytes, which is no whole model: give the parts as \
                 they were downloaded, or merge them with llama.cpp's `llama-gguf-split --merge`",
            ));
        }
        let Some(name) = PartName::parse(path) else {
            let (number, count) = (keys.no + 1, keys.count);
            return Err(GgufError::split(
                path,
                format!(
                    "this is part {number} of {count} of a split model, so its name must end in \
                     '-{number:05}-of-{count:05}.gguf' for the other parts to be found; give all parts their names back"
                ),
            ));
        };
        if (name.number, name.count) != (keys.no + 1, keys.count) {
            return Err(misnamed(path, name.number, name.count, &keys));
        }

        let mut given = Some((part, header));
        let mut parts = Vec::new();
        for number in 1..=keys.count {
            let this = if number == name.number {
                given.take()
            } else {
                None
            };
            let (part, header) = match this {
                Some(this) => this,
                None => open_sibling(&name, number, path)?,
            };
            match split_keys(&header, &part.path)? {
                Some(k) if (k.no + 1, k.count) == (number, keys.count) => {}
                Some(k) => return Err(misnamed(&part.path, number, keys.count, &k)),
                None => {
                    let what = format!(
                        "expected part {number} of {}, but the file has no split.count above 1, so it belongs to \
                         another model; download this part again",
                        keys.count
                    );
                    return Err(GgufError::split(&part.path, what));
                }
            }
            parts.push((part, header));
        }
        Gguf::assemble(parts, keys.tensors)
    }

    /// Puts parts together, first one first.
    fn assemble(
        files: Vec<(Part, Header)>,
        expected_tensors: Option<u64>,
    ) -> Result<Gguf, GgufError> {
        let mut hash = Xxh3::new();
        let mut metadata = Vec::new();
        let mut parts: Vec<Part> = Vec::with_capacity(files.len());
        let mut tensors: Vec<TensorInfo> = Vec::new();
        let mut names: HashMap<String, usize> = HashMap::new();
        for (index, (part, header)) in files.into_iter().enumerate() {
            let bytes = part.map.bytes();
            // In range: the decoder took this many bytes from this very slice.
            hash.update(&bytes[..header.header_bytes as usize]);
            hash.update(&(bytes.len() as u64).to_le_bytes());
            if index == 0 {
                metadata = header.metadata;
            }
            for mut tensor in header.tensors {
                tensor.part = index;
                if let Some(&first) = names.get(&tensor.name) {
                    let (name, other) = (&tensor.name, &parts[tensors[first].part].path);
                    let what = format!(
                        "tensor '{name}' is in {} too, so the two are not parts of one model; download all parts again",
                        other.display()
                    );
                    return Err(GgufError::split(&part.path, what));
                }
                names.insert(tensor.name.clone(), tensors.len());
                tensors.push(tensor);
            }
            parts.push(part);
        }
        let first = parts.first().map(|p| p.path.clone()).unwrap_or_default();
        if let Some(expected) = expected_tensors
            && expected != tensors.len() as u64
        {
            let (found, n) = (tensors.len(), parts.len());
            let what = format!(
                "split.tensors.count says that the model has {expected} tensors, but its {n} parts hold {found}; \
                 they come from different models or releases: download all parts again"
            );
            return Err(GgufError::split(&first, what));
        }
        let tensors = stack::stack(tensors, &first)?;
        let names = tensors
            .iter()
            .enumerate()
            .map(|(i, t)| (t.name.clone(), i))
            .collect();
        let keys: HashMap<String, usize> = metadata
            .iter()
            .enumerate()
            .map(|(i, (k, _))| (k.clone(), i))
            .collect();
        let name = keys
            .get("general.name")
            .and_then(|&i| metadata[i].1.as_str())
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .map_or_else(|| split::stem(&first), str::to_string);
        let id = SourceId {
            name,
            hash: format!("{:032x}", hash.digest128()),
        };
        Ok(Gguf {
            parts,
            metadata,
            keys,
            row_orders: vec![RowOrder::default(); tensors.len()],
            tensors,
            names,
            id,
        })
    }

    /// Returns the file, or the first part.
    pub fn path(&self) -> &Path {
        self.part_path(0)
    }

    /// Returns the file of a part, from 0.
    ///
    /// # Panics
    /// If there is no such part.
    pub fn part_path(&self, part: usize) -> &Path {
        &self.parts[part].path
    }

    /// Returns the number of files, 1 unless the model is split.
    pub fn n_parts(&self) -> usize {
        self.parts.len()
    }

    /// Returns the bytes of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.map.bytes().len() as u64).sum()
    }

    /// Returns the metadata keys and values in file order; of a split model, those of the first
    /// part.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// Returns the value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|&i| &self.metadata[i].1)
    }

    /// Returns all tensors, in file order, parts in order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Returns the tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.names.get(name).map(|&i| &self.tensors[i])
    }

    /// Copies all files into memory of this process, on huge pages where the system has them. A
    /// mapped file usually has 4 KiB pages, on which a processor reads at little more than half the
    /// rate. `progress` gets the bytes copied so far and the total.
    ///
    /// # Errors
    /// When a file can't be read, has changed, or the memory can't be had; the model then stays
    /// mapped.
    pub fn copy_to_memory(
        &mut self,
        threads: usize,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), GgufError> {
        let total = self.file_bytes();
        let mut done = 0;
        let mut copies = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            let copied = Copied::read(&part.path, &part.map, threads, &mut |bytes| {
                done += bytes;
                progress(done, total);
            });
            copies.push(copied.map_err(|e| GgufError::io(&part.path, e))?);
        }
        for (part, copied) in self.parts.iter_mut().zip(copies) {
            part.copied = Some(copied);
        }
        Ok(())
    }

    /// Whether [`copy_to_memory`](Self::copy_to_memory) was done.
    pub fn is_copied(&self) -> bool {
        self.parts.iter().all(|p| p.copied.is_some())
    }

    /// Returns the memory that [`copy_to_memory`](Self::copy_to_memory) filled, one slice per part.
    pub fn copied_bytes(&self) -> impl Iterator<Item = &[u8]> {
        self.parts
            .iter()
            .filter_map(|p| p.copied.as_ref().map(Copied::bytes))
    }

    /// Returns a tensor's bytes. Unless they were copied, they are mapped: read from the file when
    /// they are touched, and dropped under memory pressure.
    ///
    /// # Panics
    /// If the tensor is of another model, or holds experts that lie apart.
    pub fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        self.slice(tensor, 0, 1)
    }

    /// Returns the bytes of the slice `index` of a tensor's `n` equal slices; see
    /// [`bytes`](Self::bytes).
    ///
    /// # Panics
    /// If the tensor is of another model or has no such slice.
    pub fn slice(&self, tensor: &TensorInfo, index: usize, n: usize) -> &[u8] {
        // In range for tensors of this model: checked when the file was opened, and a mapping has a
        // fixed length.
        let SlicePlace {
            part,
            offset,
            n_bytes,
        } = tensor.slice(index, n);
        let part = &self.parts[part];
        let bytes = part.copied.as_ref().map_or(part.map.bytes(), Copied::bytes);
        &bytes[offset as usize..][..n_bytes as usize]
    }

    /// Tells the system how `len` bytes from byte `start` of the tensor on will be read. A hint: it
    /// can't fail, and ranges outside the tensor are cut off.
    pub fn advise(&self, tensor: &TensorInfo, start: u64, len: u64, advice: Advice) {
        let start = start.min(tensor.n_bytes);
        let len = len.min(tensor.n_bytes - start);
        if let Some(part) = self.parts.get(tensor.part) {
            part.map
                .advise((tensor.offset + start) as usize, len as usize, advice);
        }
    }

    /// Gives [`advise`](Self::advise)'s hint for all bytes of all files.
    pub fn advise_all(&self, advice: Advice) {
        for part in &self.parts {
            part.map.advise(0, part.map.bytes().len(), advice);
        }
    }

    /// Returns the model's name, with a hash of the headers and lengths of all its files. Files
    /// that differ only in the values of their weights have the same hash.
    pub fn id(&self) -> SourceId {
        self.id.clone()
    }
}

fn open_part(path: &Path) -> Result<(Part, Header), GgufError> {
    let map = Map::open(path).map_err(|e| GgufError::io(path, e))?;
    let header = Header::decode(map.bytes(), path).map_err(pieces::explain)?;
    Ok((
        Part {
            path: path.to_path_buf(),
            map,
            copied: None,
        },
        header,
    ))
}

/// Returns whether another part of a split model follows in the same file.
fn is_joined(part: &Part, header: &Header) -> bool {
    let bytes = part.map.bytes();
    let ends = header.tensors.iter().map(|t| t.offset + t.n_bytes);
    let end = ends.max().unwrap_or(header.header_bytes);
    // A part may be padded at its end.
    [end, end.next_multiple_of(header.alignment)]
        .iter()
        .filter_map(|at| bytes.get(usize::try_from(*at).ok()?..))
        .any(|rest| rest.starts_with(b"GGUF"))
}

fn open_sibling(name: &PartName, number: u32, given: &Path) -> Result<(Part, Header), GgufError> {
    let path = name.sibling(number);
    match open_part(&path) {
        Err(GgufError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            let what = format!(
                "part {number} of {} is missing (asked for by {}); download it into the same folder",
                name.count,
                given.display()
            );
            Err(GgufError::split(&path, what))
        }
        other => other,
    }
}

fn misnamed(path: &Path, number: u32, count: u32, keys: &SplitKeys) -> GgufError {
    let what = format!(
        "the name says part {number} of {count}, but the file says part {} of {}; give it the name it was published under, or \
         download it again",
        keys.no + 1,
        keys.count
    );
    GgufError::split(path, what)
}

/// Reads what the header says about splitting; `None` for a whole model.
fn split_keys(header: &Header, path: &Path) -> Result<Option<SplitKeys>, GgufError> {
    let integer = |key: &str, limit: u64| match header.get(key) {
        None => Ok(None),
        Some(value) => value
            .as_i128()
            .and_then(|v| u64::try_from(v).ok())
            .filter(|&v| v <= limit)
            .map(Some)
            .ok_or_else(|| GgufError::WrongValue {
                path: path.to_path_buf(),
                key: key.to_string(),
                expected: format!("an integer from 0 to {limit}"),
                found: value.describe(),
            }),
    };
    let count = integer("split.count", MAX_PARTS.into())?.unwrap_or(0) as u32;
    if count <= 1 {
        return Ok(None);
    }
    let Some(no) = integer("split.no", u64::from(count) - 1)? else {
        return Err(GgufError::split(
            path,
            format!("split.count is {count}, but split.no is missing; download it again"),
        ));
    };
    let tensors = integer("split.tensors.count", u64::MAX)?;
    Ok(Some(SplitKeys {
        no: no as u32,
        count,
        tensors,
    }))
}
