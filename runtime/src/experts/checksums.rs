//! Checksums of a model's slices: computing them, and comparing reads with them.
//!
//! A slice is the unit of reads: one expert's part of a tensor of experts, or a whole tensor of any
//! other kind.

use crate::tiers::file::{
    Extent, FileTier, ReadError, ReadMode, SliceChecksum, Span, compare, stream,
};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;
use thiserror::Error;
use tier_plan_formats::FormatError;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::spec::{ModelSpec, TensorId};
use tier_plan_formats::source_id::SourceId;
use tier_plan_formats::sums::{Sums, TensorSums};
use xxhash_rust::xxh3::Xxh3;

/// Bytes of one read while checksums are computed.
const CHUNK_BYTES: usize = 2 << 20;

/// Reads in flight while checksums are computed.
const QUEUE_DEPTH: usize = 16;

/// Checksums that belong to the tensors of an open model.
#[derive(Debug)]
pub struct Checksums {
    /// XXH3-64, `[n_tensors][n_slices]`.
    sums: Vec<Vec<u64>>,
}

/// A slice of a model: one expert of a tensor, or slice 0 of any other tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TensorSlice {
    pub(super) tensor: TensorId,
    pub(super) slice: usize,
}

/// A part of a slice that is read at once.
struct Chunk {
    tensor: TensorId,
    extent: Extent,
    /// Whether the chunk ends its slice.
    is_last: bool,
}

/// Checksums could not be computed.
#[derive(Debug, Error)]
pub enum ChecksumError {
    /// The model's file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The progress callback asked to stop.
    #[error("interrupted: no checksums were written")]
    Interrupted,
}

/// Returns the number of slices of each tensor, `[n_tensors]`.
fn slice_counts(gguf: &Gguf, spec: &ModelSpec) -> Vec<usize> {
    let tensors = gguf.tensors().iter();
    let mut counts: Vec<usize> = tensors.map(|t| t.slices.len().max(1)).collect();
    for (_, moe) in spec.moe_layers() {
        moe.expert_tensors()
            .for_each(|id| counts[id] = moe.n_expert);
    }
    counts
}

/// Returns the location of a slice of a tensor with `n_slices` of them.
fn extent(gguf: &Gguf, id: TensorId, n_slices: usize, slice: usize) -> Extent {
    Extent::of_slice(&gguf.tensors()[id], slice, n_slices)
}

/// Cuts all slices into chunks, in the order of tensors and slices. A chunk never spans two slices.
fn chunks(gguf: &Gguf, slice_counts: &[usize]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (tensor, n_slices) in slice_counts.iter().enumerate() {
        for slice in 0..*n_slices {
            let Extent { part, offset, len } = extent(gguf, tensor, *n_slices, slice);
            let mut from = 0;
            loop {
                let to = len.min(from + CHUNK_BYTES);
                let extent = Extent {
                    part,
                    offset: offset + from as u64,
                    len: to - from,
                };
                chunks.push(Chunk {
                    tensor,
                    extent,
                    is_last: to == len,
                });
                from = to;
                if to == len {
                    break;
                }
            }
        }
    }
    chunks
}

/// Reads the whole model, with direct I/O where that is supported, and computes the checksums of
/// all its slices. `made` is the date for the file. `progress` gets the bytes read so far and in
/// all, and returns whether to go on.
///
/// # Errors
/// When reading fails, or `progress` returns false.
pub fn compute_checksums(
    gguf: &Gguf,
    spec: &ModelSpec,
    made: String,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Sums, ChecksumError> {
    let slice_counts = slice_counts(gguf, spec);
    let total = gguf.tensors().iter().map(|t| t.n_bytes).sum();
    let mut tensors: Vec<TensorSums> = gguf
        .tensors()
        .iter()
        .zip(&slice_counts)
        .map(|(info, n)| TensorSums {
            name: info.name.clone(),
            slices: Vec::with_capacity(*n),
        })
        .collect();
    let chunks = chunks(gguf, &slice_counts);
    let paths: Vec<PathBuf> = (0..gguf.n_parts())
        .map(|p| gguf.part_path(p).to_path_buf())
        .collect();
    let files = FileTier::open(&paths, ReadMode::from_env()?)?;
    let spans = |extent: Extent| {
        vec![Span {
            extent,
            at: extent.head(),
            whole_pages: true,
        }]
    };
    let buffer_bytes = chunks
        .iter()
        .map(|chunk| chunk.extent.pages_bytes())
        .max()
        .unwrap_or(0);
    let (mut sum, mut done) = (Xxh3::new(), 0);
    stream(
        &files,
        chunks.iter().map(|chunk| spans(chunk.extent)),
        buffer_bytes,
        QUEUE_DEPTH,
        |at, buffer| {
            let Chunk {
                tensor,
                extent,
                is_last,
            } = &chunks[at];
            sum.update(&buffer[extent.head()..extent.head() + extent.len]);
            if *is_last {
                tensors[*tensor].slices.push(sum.digest());
                sum.reset();
            }
            done += extent.len as u64;
            if progress(done, total) {
                Ok(())
            } else {
                Err(ChecksumError::Interrupted)
            }
        },
    )?;
    files.check()?;
    Ok(Sums {
        model: gguf.id(),
        made,
        tensors,
    })
}

impl Checksums {
    /// Assigns the checksums of the file at `path` to the tensors of this model.
    ///
    /// # Errors
    /// When they are of another model, or their slices are not the model's.
    pub fn bind(
        gguf: &Gguf,
        spec: &ModelSpec,
        sums: &Sums,
        path: &Path,
    ) -> Result<Self, FormatError> {
        let given: SourceId = gguf.id();
        sums.check_model(&given, path)?;
        let mismatch = |name: &str, expected: usize, found: usize| FormatError::Invalid {
            path: path.into(),
            what: format!(
                "tensor '{name}' has {found} checksums, expected {expected}; make new ones with `tier-plan checksum`"
            ),
        };
        let ids: HashMap<&str, TensorId> = gguf
            .tensors()
            .iter()
            .enumerate()
            .map(|(id, t)| (t.name.as_str(), id))
            .collect();
        let mut by_tensor = vec![Vec::new(); gguf.tensors().len()];
        for tensor in &sums.tensors {
            let id = ids.get(tensor.name.as_str()).copied();
            let id = id.ok_or_else(|| mismatch(&tensor.name, 0, tensor.slices.len()))?;
            by_tensor[id] = tensor.slices.clone();
        }
        for (id, expected) in slice_counts(gguf, spec).into_iter().enumerate() {
            if by_tensor[id].len() != expected {
                return Err(mismatch(
                    &gguf.tensors()[id].name,
                    expected,
                    by_tensor[id].len(),
                ));
            }
        }
        Ok(Self { sums: by_tensor })
    }

    /// Returns the checksum that a slice must have at offset `at` of a buffer. `extent` is where it
    /// is read from: the model's own file, or a copy.
    pub(crate) fn slice(
        &self,
        gguf: &Gguf,
        id: TensorId,
        slice: usize,
        at: usize,
        extent: Extent,
    ) -> SliceChecksum {
        SliceChecksum {
            at,
            extent,
            sum: self.sums[id][slice],
            what: self.name(gguf, id, slice),
        }
    }

    /// Returns the name of a slice for errors.
    fn name(&self, gguf: &Gguf, id: TensorId, slice: usize) -> String {
        let name = &gguf.tensors()[id].name;
        if self.sums[id].len() > 1 {
            format!("expert {slice} of tensor '{name}'")
        } else {
            format!("tensor '{name}'")
        }
    }

    /// Compares slices in the mapped file, on `threads` threads. `progress` gets the bytes compared
    /// since its last call, estimated from this thread's share.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] for the first of `slices` that is damaged.
    pub(crate) fn mapped(
        &self,
        gguf: &Gguf,
        slices: &[TensorSlice],
        threads: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), ReadError> {
        let next = AtomicUsize::new(0);
        let damaged: Mutex<Option<(usize, u64)>> = Mutex::new(None);
        let extent_of =
            |of: TensorSlice| extent(gguf, of.tensor, self.sums[of.tensor].len(), of.slice);
        let compare_next = || {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let TensorSlice { tensor, slice } = *slices.get(at)?;
            let len = extent_of(slices[at]).len;
            let info = &gguf.tensors()[tensor];
            let bytes = gguf.slice(info, slice, self.sums[tensor].len());
            if let Err(found) = compare(bytes, self.sums[tensor][slice]) {
                let mut damaged = damaged.lock().unwrap_or_else(|e| e.into_inner());
                if damaged.is_none_or(|(first, _)| at < first) {
                    *damaged = Some((at, found));
                }
            }
            Some(len as u64)
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                let others = || while compare_next().is_some() {};
                if Builder::new().spawn_scoped(scope, others).is_err() {
                    break;
                }
            }
            while let Some(bytes) = compare_next() {
                // The other threads have compared about as much meanwhile.
                progress(bytes * threads.max(1) as u64);
            }
        });
        match damaged.into_inner().unwrap_or_else(|e| e.into_inner()) {
            None => Ok(()),
            Some((at, found)) => {
                let TensorSlice { tensor, slice } = slices[at];
                let Extent { part, offset, len } = extent_of(slices[at]);
                let (path, what) = (
                    gguf.part_path(part).to_path_buf(),
                    self.name(gguf, tensor, slice),
                );
                Err(ReadError::Damaged {
                    path,
                    what,
                    offset,
                    len,
                    found,
                    expected: self.sums[tensor][slice],
                })
            }
        }
    }

    /// Compares the bytes of a tensor with a single slice.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] when the checksum differs.
    pub(crate) fn tensor(&self, gguf: &Gguf, id: TensorId, bytes: &[u8]) -> Result<(), ReadError> {
        let expected = self.sums[id][0];
        compare(bytes, expected).map_err(|found| {
            let Extent { part, offset, len } = extent(gguf, id, 1, 0);
            let (path, what) = (gguf.part_path(part).to_path_buf(), self.name(gguf, id, 0));
            ReadError::Damaged {
                path,
                what,
                offset,
                len,
                found,
                expected,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_formats::model::describe;
    use xxhash_rust::xxh3::xxh3_64;

    fn model() -> (Gguf, ModelSpec) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch/gpt-oss.gguf");
        let gguf = Gguf::open(&path).unwrap();
        let spec = describe(&gguf).unwrap();
        (gguf, spec)
    }

    #[test]
    fn every_slice_has_its_checksum() {
        let (gguf, spec) = model();
        let sums = compute_checksums(&gguf, &spec, "now".into(), &mut |_, _| true).unwrap();
        let n_expert = spec.moe_layers().next().unwrap().1.n_expert;
        let mut experts = 0;
        for (info, tensor) in gguf.tensors().iter().zip(&sums.tensors) {
            let bytes = gguf.bytes(info);
            let n = if info.name.contains("_exps") {
                n_expert
            } else {
                1
            };
            experts += usize::from(n > 1);
            let expected: Vec<u64> = bytes.chunks(bytes.len() / n).map(xxh3_64).collect();
            assert_eq!((&tensor.name, &tensor.slices), (&info.name, &expected));
        }
        assert!(
            experts >= 6,
            "weights and biases of two or three matrices per layer"
        );
        let checks = Checksums::bind(&gguf, &spec, &sums, Path::new("a.sums")).unwrap();
        let slices_of = |tensor: TensorId| {
            (0..checks.sums[tensor].len()).map(move |slice| TensorSlice { tensor, slice })
        };
        let all: Vec<_> = (0..gguf.tensors().len()).flat_map(slices_of).collect();
        for threads in [1, 3] {
            checks.mapped(&gguf, &all, threads, &mut |_| {}).unwrap();
        }
    }

    #[test]
    fn damaged_slices_are_named() {
        let (gguf, spec) = model();
        let mut sums = compute_checksums(&gguf, &spec, "now".into(), &mut |_, _| true).unwrap();
        let id = gguf
            .tensors()
            .iter()
            .position(|t| t.name.contains("_exps"))
            .unwrap();
        let of_tensor = |slice| TensorSlice { tensor: id, slice };
        sums.tensors[id].slices[3] ^= 1;
        let checks = Checksums::bind(&gguf, &spec, &sums, Path::new("a.sums")).unwrap();
        checks
            .mapped(&gguf, &[2, 1].map(of_tensor), 2, &mut |_| {})
            .unwrap();
        let error = checks
            .mapped(&gguf, &[2, 3, 4].map(of_tensor), 2, &mut |_| {})
            .unwrap_err()
            .to_string();
        let offset = extent(&gguf, id, sums.tensors[id].slices.len(), 3).offset;
        for word in [
            "gpt-oss.gguf",
            "expert 3",
            &gguf.tensors()[id].name,
            &format!("offset {offset}"),
        ] {
            assert!(error.contains(word), "{word}: {error}");
        }
        sums.tensors[id].slices.pop();
        let error = Checksums::bind(&gguf, &spec, &sums, Path::new("a.sums"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("a.sums") && error.contains("tier-plan checksum"),
            "{error}"
        );
    }

    #[test]
    fn progress_can_stop_the_computation() {
        let (gguf, spec) = model();
        let mut calls = 0;
        let made = compute_checksums(&gguf, &spec, "now".into(), &mut |_, _| {
            calls += 1;
            calls < 3
        });
        assert!(matches!(made, Err(ChecksumError::Interrupted)));
        assert_eq!(calls, 3);
    }
}
