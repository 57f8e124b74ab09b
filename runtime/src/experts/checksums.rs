//! Checksums of a model's slices: making them, and holding what is read against them.
//!
//! A slice is what is read at once: one expert's part of a tensor, or a whole tensor of any other kind.

use crate::tiers::file::{Check, Extent, FileTier, ReadError, ReadMode, Span, compare, stream};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use thiserror::Error;
use tier_plan_formats::FormatError;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::spec::{ModelSpec, TensorId};
use tier_plan_formats::source_id::SourceId;
use tier_plan_formats::sums::{Sums, TensorSums};
use xxhash_rust::xxh3::Xxh3;

/// Bytes that are read at once to make checksums.
const PIECE_BYTES: usize = 2 << 20;

/// How many of them are in flight.
const DEPTH: usize = 16;

/// Checksums that belong to the tensors of an open model.
#[derive(Debug)]
pub struct Checks {
    /// By tensor, by slice.
    sums: Vec<Vec<u64>>,
}

/// Checksums could not be made.
#[derive(Debug, Error)]
pub enum SumsError {
    /// The model's file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Whoever is told of progress asked to stop.
    #[error("interrupted: no checksums were written")]
    Interrupted,
}

/// Slices of each tensor.
fn slices(gguf: &Gguf, spec: &ModelSpec) -> Vec<usize> {
    let mut slices = vec![1; gguf.tensors().len()];
    for (_, moe) in spec.moe_layers() {
        moe.expert_tensors().for_each(|id| slices[id] = moe.n_expert);
    }
    slices
}

/// Where a tensor's slice lies in the file.
fn extent(gguf: &Gguf, id: TensorId, slices: usize, slice: usize) -> Extent {
    let info = &gguf.tensors()[id];
    let len = info.n_bytes as usize / slices;
    Extent { part: info.part, offset: info.offset + (slice * len) as u64, len }
}

/// Reads the whole model, past the page cache where that can be done, and makes the checksums of all its slices.
/// `progress` is told how many bytes of how many have been read, and says whether to go on.
///
/// # Errors
/// When reading fails, or `progress` says no.
pub fn make_sums(
    gguf: &Gguf,
    spec: &ModelSpec,
    made: String,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Sums, SumsError> {
    let slices = slices(gguf, spec);
    let total = gguf.tensors().iter().map(|t| t.n_bytes).sum();
    let mut tensors: Vec<TensorSums> = gguf
        .tensors()
        .iter()
        .zip(&slices)
        .map(|(info, n)| TensorSums { name: info.name.clone(), slices: Vec::with_capacity(*n) })
        .collect();
    // Tensors, and so slices, begin anywhere; pieces end where slices do.
    let mut pieces = Vec::new();
    for (id, n) in slices.iter().enumerate() {
        for slice in 0..*n {
            let Extent { part, offset, len } = extent(gguf, id, *n, slice);
            let mut from = 0;
            loop {
                let to = len.min(from + PIECE_BYTES);
                pieces.push((id, Extent { part, offset: offset + from as u64, len: to - from }, to == len));
                from = to;
                if to == len {
                    break;
                }
            }
        }
    }
    let paths: Vec<PathBuf> = (0..gguf.n_parts()).map(|p| gguf.part_path(p).to_path_buf()).collect();
    let files = FileTier::open(&paths, ReadMode::from_env()?)?;
    let spans = |extent: Extent| vec![Span { extent, at: extent.head(), whole_pages: true }];
    let room = pieces.iter().map(|(_, extent, _)| extent.pages_bytes()).max().unwrap_or(0);
    let (mut sum, mut done) = (Xxh3::new(), 0);
    stream(&files, pieces.iter().map(|(_, extent, _)| spans(*extent)), room, DEPTH, |at, buffer| {
        let (id, extent, last) = &pieces[at];
        sum.update(&buffer[extent.head()..extent.head() + extent.len]);
        if *last {
            tensors[*id].slices.push(sum.digest());
            sum.reset();
        }
        done += extent.len as u64;
        if progress(done, total) { Ok(()) } else { Err(SumsError::Interrupted) }
    })?;
    files.check()?;
    Ok(Sums { model: gguf.id(), made, tensors })
}

impl Checks {
    /// The checksums of a file for the tensors of this model.
    ///
    /// # Errors
    /// When they are of another model, or do not name its slices.
    pub fn bind(gguf: &Gguf, spec: &ModelSpec, sums: &Sums, path: &Path) -> Result<Self, FormatError> {
        let given: SourceId = gguf.id();
        sums.check_model(&given, path)?;
        let wrong = |name: &str, expected: usize, found: usize| FormatError::Invalid {
            path: path.into(),
            what: format!(
                "tensor '{name}' has {expected} slices and {found} checksums; make new ones with `tier-plan checksum`"
            ),
        };
        let ids: HashMap<&str, TensorId> =
            gguf.tensors().iter().enumerate().map(|(id, t)| (t.name.as_str(), id)).collect();
        let mut by_tensor = vec![Vec::new(); gguf.tensors().len()];
        for tensor in &sums.tensors {
            let id = ids.get(tensor.name.as_str()).copied();
            let id = id.ok_or_else(|| wrong(&tensor.name, 0, tensor.slices.len()))?;
            by_tensor[id] = tensor.slices.clone();
        }
        for (id, expected) in slices(gguf, spec).into_iter().enumerate() {
            if by_tensor[id].len() != expected {
                return Err(wrong(&gguf.tensors()[id].name, expected, by_tensor[id].len()));
            }
        }
        Ok(Self { sums: by_tensor })
    }

    /// What a slice must be once it lies at `at` of a buffer, read from `extent`: the model's own file or a copy.
    pub(crate) fn slice(&self, gguf: &Gguf, id: TensorId, slice: usize, at: usize, extent: Extent) -> Check {
        Check { at, extent, sum: self.sums[id][slice], what: self.name(gguf, id, slice) }
    }

    fn name(&self, gguf: &Gguf, id: TensorId, slice: usize) -> String {
        let name = &gguf.tensors()[id].name;
        if self.sums[id].len() > 1 { format!("expert {slice} of tensor '{name}'") } else { format!("tensor '{name}'") }
    }

    /// Compares slices where they are mapped, on all `threads`. `progress` is told of the bytes.
    ///
    /// # Errors
    /// When a slice is damaged: the first of those listed.
    pub(crate) fn mapped(
        &self,
        gguf: &Gguf,
        slices: &[(TensorId, usize)],
        threads: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), ReadError> {
        let next = AtomicUsize::new(0);
        let damaged: Mutex<Option<(usize, u64)>> = Mutex::new(None);
        let extent_of = |(id, slice): (TensorId, usize)| extent(gguf, id, self.sums[id].len(), slice);
        let compare_next = || {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let (id, slice) = *slices.get(at)?;
            let len = extent_of((id, slice)).len;
            let bytes = &gguf.bytes(&gguf.tensors()[id])[slice * len..(slice + 1) * len];
            if let Err(found) = compare(bytes, self.sums[id][slice]) {
                let mut damaged = damaged.lock().unwrap_or_else(|e| e.into_inner());
                if damaged.is_none_or(|(first, _)| at < first) {
                    *damaged = Some((at, found));
                }
            }
            Some(len as u64)
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|| while compare_next().is_some() {});
            }
            while let Some(bytes) = compare_next() {
                // What the others have done meanwhile is about as much.
                progress(bytes * threads.max(1) as u64);
            }
        });
        match damaged.into_inner().unwrap_or_else(|e| e.into_inner()) {
            None => Ok(()),
            Some((at, found)) => {
                let (id, slice) = slices[at];
                let Extent { part, offset, len } = extent_of((id, slice));
                let (path, what) = (gguf.part_path(part).to_path_buf(), self.name(gguf, id, slice));
                Err(ReadError::Damaged { path, what, offset, len, found, expected: self.sums[id][slice] })
            }
        }
    }

    /// Compares a whole tensor's bytes.
    ///
    /// # Errors
    /// When they are damaged.
    pub(crate) fn tensor(&self, gguf: &Gguf, id: TensorId, bytes: &[u8]) -> Result<(), ReadError> {
        let expected = self.sums[id][0];
        compare(bytes, expected).map_err(|found| {
            let Extent { part, offset, len } = extent(gguf, id, 1, 0);
            let (path, what) = (gguf.part_path(part).to_path_buf(), self.name(gguf, id, 0));
            ReadError::Damaged { path, what, offset, len, found, expected }
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
    fn sums_are_of_the_slices() {
        let (gguf, spec) = model();
        let sums = make_sums(&gguf, &spec, "now".into(), &mut |_, _| true).unwrap();
        let n_expert = spec.moe_layers().next().unwrap().1.n_expert;
        let mut experts = 0;
        for (info, tensor) in gguf.tensors().iter().zip(&sums.tensors) {
            let bytes = gguf.bytes(info);
            let n = if info.name.contains("_exps") { n_expert } else { 1 };
            experts += usize::from(n > 1);
            let expected: Vec<u64> = bytes.chunks(bytes.len() / n).map(xxh3_64).collect();
            assert_eq!((&tensor.name, &tensor.slices), (&info.name, &expected));
        }
        assert!(experts >= 6, "weights and biases of two or three matrices a layer");
        let checks = Checks::bind(&gguf, &spec, &sums, Path::new("a.sums")).unwrap();
        let all: Vec<_> =
            (0..gguf.tensors().len()).flat_map(|id| (0..checks.sums[id].len()).map(move |s| (id, s))).collect();
        for threads in [1, 3] {
            checks.mapped(&gguf, &all, threads, &mut |_| {}).unwrap();
        }
    }

    #[test]
    fn what_differs_is_named() {
        let (gguf, spec) = model();
        let mut sums = make_sums(&gguf, &spec, "now".into(), &mut |_, _| true).unwrap();
        let id = gguf.tensors().iter().position(|t| t.name.contains("_exps")).unwrap();
        sums.tensors[id].slices[3] ^= 1;
        let checks = Checks::bind(&gguf, &spec, &sums, Path::new("a.sums")).unwrap();
        checks.mapped(&gguf, &[(id, 2), (id, 1)], 2, &mut |_| {}).unwrap();
        let error = checks.mapped(&gguf, &[(id, 2), (id, 3), (id, 4)], 2, &mut |_| {}).unwrap_err().to_string();
        let offset = extent(&gguf, id, sums.tensors[id].slices.len(), 3).offset;
        for word in ["gpt-oss.gguf", "expert 3", &gguf.tensors()[id].name, &format!("offset {offset}")] {
            assert!(error.contains(word), "{word}: {error}");
        }
        sums.tensors[id].slices.pop();
        let error = Checks::bind(&gguf, &spec, &sums, Path::new("a.sums")).unwrap_err().to_string();
        assert!(error.contains("a.sums") && error.contains("tier-plan checksum"), "{error}");
    }

    #[test]
    fn making_stops_when_told_to() {
        let (gguf, spec) = model();
        let mut calls = 0;
        let made = make_sums(&gguf, &spec, "now".into(), &mut |_, _| {
            calls += 1;
            calls < 3
        });
        assert!(matches!(made, Err(SumsError::Interrupted)));
        assert_eq!(calls, 3);
    }
}
