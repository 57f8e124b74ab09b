//! A copy of a model's experts in which each lies in one piece: making it, and finding experts in it.

use super::layer::{Home, LayerExperts, Layout};
use crate::tiers::file::{FileTier, ReadError, ReadMode, stream};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::spec::{ModelSpec, MoeSpec};
use tier_plan_formats::pack::{ALIGN, PackIndex, PackLayer, open};
use tier_plan_formats::{FormatError, safely};

/// Experts in flight while they are copied.
const DEPTH: usize = 8;

/// Bytes of a slice that are compared to tell a copy of this file from one of another version of it.
const SAMPLE_BYTES: usize = 4096;

/// Experts could not be copied.
#[derive(Debug, Error)]
pub enum PackError {
    /// The model's file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The copy could not be written.
    #[error(transparent)]
    Write(#[from] FormatError),
    /// Whoever is told of progress asked to stop.
    #[error("interrupted: no experts were written")]
    Interrupted,
}

/// A copy that belongs to an open model.
#[derive(Debug)]
pub struct Pack {
    path: PathBuf,
    /// By layer of the model, by expert: where it begins.
    layers: HashMap<u32, Vec<Option<u64>>>,
    saving: Saving,
}

/// What an expert in one piece spares, on average over all that a copy has.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Saving {
    /// Experts.
    pub experts: u64,
    /// Bytes of whole pages that are read for one from the model's file.
    pub before_bytes: f64,
    /// The same from the copy.
    pub after_bytes: f64,
    /// Stretches of the model's file that one lies in; in the copy it is one.
    pub stretches: f64,
}

/// Bytes of an expert's slices, in the order in which the engine holds them.
fn slices(gguf: &Gguf, moe: &MoeSpec) -> Vec<u64> {
    moe.expert_tensors().map(|id| gguf.tensors()[id].n_bytes / moe.n_expert as u64).collect()
}

/// A layer of which all experts are where the file has them.
fn layer_of(gguf: &Gguf, moe: &MoeSpec) -> LayerExperts {
    LayerExperts::new(gguf, moe, (0..moe.n_expert).map(|_| Home::Pooled).collect(), 0)
}

impl Pack {
    /// Opens a copy and makes sure that it is of this model.
    ///
    /// # Errors
    /// When it can't be read, is damaged, is of another model, or of another version of this one's bytes.
    pub fn open(gguf: &Gguf, spec: &ModelSpec, path: &Path) -> Result<Self, FormatError> {
        let packed = open(path)?;
        packed.check_model(&gguf.id(), path)?;
        let invalid = |what: String| FormatError::Invalid { path: path.into(), what };
        let io = |source| FormatError::Io { path: path.into(), source };
        let moes: HashMap<u32, &MoeSpec> = spec.moe_layers().map(|(layer, moe)| (layer as u32, moe)).collect();
        let mut file = File::open(path).map_err(io)?;
        let mut layers = HashMap::new();
        let mut saving = Saving::default();
        for (position, PackLayer { layer, slices: found, experts }) in packed.index.layers.iter().enumerate() {
            let moe = moes.get(layer).ok_or_else(|| invalid(format!("layer {layer} has no routed experts")))?;
            let expected = slices(gguf, moe);
            if *found != expected || experts.iter().any(|e| *e as usize >= moe.n_expert) {
                let what = format!(
                    "layer {layer} has {} experts of {expected:?} bytes in the model, but others here; make it again with \
                     `tier-plan pack`",
                    moe.n_expert
                );
                return Err(invalid(what));
            }
            let mut places = vec![None; moe.n_expert];
            let source = layer_of(gguf, moe);
            for (nth, expert) in experts.iter().enumerate() {
                let offset = packed.offset(position, nth);
                places[*expert as usize] = Some(offset);
                let spans = source.spans(gguf, *expert as usize, Layout::Packed);
                saving.experts += 1;
                saving.stretches += spans.len() as f64;
                saving.before_bytes += spans.iter().map(|s| s.extent.pages_bytes() as f64).sum::<f64>();
                saving.after_bytes += source.expert_bytes.next_multiple_of(ALIGN as usize) as f64;
            }
            if let Some(expert) = experts.first() {
                let same =
                    same_bytes(gguf, moe, *expert as usize, &mut file, packed.offset(position, 0)).map_err(io)?;
                if !same {
                    let what = format!(
                        "expert {expert} of layer {layer} is not what it is in {}: the model was changed since the copy was \
                         made ({}); make it again with `tier-plan pack`",
                        gguf.path().display(),
                        packed.index.made
                    );
                    return Err(invalid(what));
                }
            }
            layers.insert(*layer, places);
        }
        let n = saving.experts.max(1) as f64;
        saving.stretches /= n;
        saving.before_bytes /= n;
        saving.after_bytes /= n;
        Ok(Self { path: path.into(), layers, saving })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it spares.
    pub fn saving(&self) -> Saving {
        self.saving
    }

    /// Where the experts of a layer of the model begin, those that the copy has.
    pub(crate) fn places(&self, layer: u32) -> Option<&[Option<u64>]> {
        self.layers.get(&layer).map(Vec::as_slice)
    }
}

/// Whether the beginnings of an expert's slices are the same in the model and at `offset` of a copy.
fn same_bytes(gguf: &Gguf, moe: &MoeSpec, expert: usize, file: &mut File, offset: u64) -> io::Result<bool> {
    let mut at = offset;
    for id in moe.expert_tensors() {
        let all = gguf.bytes(&gguf.tensors()[id]);
        let len = all.len() / moe.n_expert;
        let expected = &all[expert * len..][..len.min(SAMPLE_BYTES)];
        let mut found = vec![0; expected.len()];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut found)?;
        if found != expected {
            return Ok(false);
        }
        at += len as u64;
    }
    Ok(true)
}

/// What a copy with these experts (by position of the layer with routed experts, in the order in which they will lie)
/// would hold.
pub fn index(gguf: &Gguf, spec: &ModelSpec, experts: &[Vec<u32>], made: String) -> PackIndex {
    let layers = spec.moe_layers().zip(experts).filter(|(_, experts)| !experts.is_empty());
    let layer = |((layer, moe), experts): ((usize, &MoeSpec), &Vec<u32>)| PackLayer {
        layer: layer as u32,
        slices: slices(gguf, moe),
        experts: experts.clone(),
    };
    PackIndex { model: gguf.id(), made, layers: layers.map(layer).collect() }
}

/// Writes a copy, whole or not at all. `progress` is told how many bytes of how many have been written, and says whether
/// to go on.
///
/// # Errors
/// When reading or writing fails, or `progress` says no.
pub fn write(
    gguf: &Gguf,
    spec: &ModelSpec,
    index: &PackIndex,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(), PackError> {
    let head = index.encode(path)?;
    let total = index.expert_bytes();
    let parts: Vec<PathBuf> = (0..gguf.n_parts()).map(|p| gguf.part_path(p).to_path_buf()).collect();
    let files = FileTier::open(&parts, ReadMode::from_env()?)?;
    let moes: HashMap<u32, &MoeSpec> = spec.moe_layers().map(|(layer, moe)| (layer as u32, moe)).collect();
    let mut items = Vec::new();
    let mut room = 0;
    for packed in &index.layers {
        let Some(moe) = moes.get(&packed.layer) else { continue };
        let source = layer_of(gguf, moe);
        room = room.max(source.expert_bytes);
        items.extend(
            packed.experts.iter().map(|e| (source.spans(gguf, *e as usize, Layout::Packed), source.expert_bytes)),
        );
    }
    // What stopped the copy, where it was not the file that is written to.
    let mut stopped = None;
    let written = safely::with_file(path, |file| {
        file.write_all(&head)?;
        let mut done = 0;
        let copied = stream(&files, items.iter().map(|(spans, _)| spans.clone()), room, DEPTH, |at, buffer| {
            let bytes = items[at].1;
            let padding = bytes.next_multiple_of(ALIGN as usize) - bytes;
            let put = file.write_all(&buffer[..bytes]).and_then(|()| file.write_all(&[0; ALIGN as usize][..padding]));
            put.map_err(Stop::Write)?;
            done += (bytes + padding) as u64;
            if progress(done, total) { Ok(()) } else { Err(Stop::Asked) }
        });
        let copied = copied.and_then(|()| files.check().map_err(Stop::from));
        copied.map_err(|stop| match stop {
            Stop::Write(error) => error,
            Stop::Read(error) => {
                stopped = Some(PackError::Read(error));
                io::ErrorKind::Other.into()
            }
            Stop::Asked => {
                stopped = Some(PackError::Interrupted);
                io::ErrorKind::Interrupted.into()
            }
        })
    });
    match stopped {
        Some(error) => Err(error),
        None => Ok(written?),
    }
}

/// Why copying stopped.
enum Stop {
    Read(ReadError),
    Write(io::Error),
    Asked,
}

impl From<ReadError> for Stop {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_formats::model::describe;

    fn model() -> (Gguf, ModelSpec) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch/gpt-oss.gguf");
        let gguf = Gguf::open(&path).unwrap();
        let spec = describe(&gguf).unwrap();
        (gguf, spec)
    }

    #[test]
    fn a_copy_has_the_bytes_where_it_says() {
        let (gguf, spec) = model();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.experts");
        let experts: Vec<Vec<u32>> = spec.moe_layers().enumerate().map(|(i, _)| vec![3, 4 + i as u32 % 4, 2]).collect();
        let index = index(&gguf, &spec, &experts, "now".into());
        let (mut told, mut calls) = (0, 0);
        write(&gguf, &spec, &index, &path, &mut |done, total| {
            (told, calls) = (done, calls + 1);
            assert!(done <= total);
            true
        })
        .unwrap();
        assert_eq!((told, calls), (index.expert_bytes(), 3 * experts.len()));
        let pack = Pack::open(&gguf, &spec, &path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for ((layer, moe), listed) in spec.moe_layers().zip(&experts) {
            let places = pack.places(layer as u32).unwrap();
            for expert in 0..moe.n_expert {
                let Some(offset) = places[expert] else {
                    assert!(!listed.contains(&(expert as u32)));
                    continue;
                };
                assert!(offset.is_multiple_of(ALIGN));
                let slice = |id| {
                    let all = gguf.bytes(&gguf.tensors()[id]);
                    let len = all.len() / moe.n_expert;
                    all[expert * len..(expert + 1) * len].to_vec()
                };
                let expected: Vec<u8> = moe.expert_tensors().flat_map(slice).collect();
                assert_eq!(bytes[offset as usize..][..expected.len()], expected);
            }
        }
        let saving = pack.saving();
        assert_eq!(saving.experts, 3 * experts.len() as u64);
        assert_eq!(saving.stretches, 6.0, "three matrices with a bias each");
        assert!(saving.after_bytes < saving.before_bytes, "{saving:?}");
    }

    #[test]
    fn a_copy_of_another_version_is_refused() {
        let (gguf, spec) = model();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.experts");
        let experts: Vec<Vec<u32>> = spec.moe_layers().map(|_| vec![1]).collect();
        write(&gguf, &spec, &index(&gguf, &spec, &experts, "then".into()), &path, &mut |_, _| true).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let at = Pack::open(&gguf, &spec, &path).unwrap().layers[&0][1].unwrap();
        bytes[at as usize + 5] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = Pack::open(&gguf, &spec, &path).unwrap_err().to_string();
        assert!(error.contains("expert 1 of layer 0") && error.contains("(then)"), "{error}");
        let other = PackIndex {
            layers: vec![PackLayer { layer: 0, slices: vec![5], experts: vec![] }],
            ..index(&gguf, &spec, &[], String::new())
        };
        std::fs::write(&path, other.encode(&path).unwrap()).unwrap();
        let error = Pack::open(&gguf, &spec, &path).unwrap_err().to_string();
        assert!(error.contains("layer 0 has") && error.contains("tier-plan pack"), "{error}");
    }

    #[test]
    fn a_copy_that_is_interrupted_leaves_nothing() {
        let (gguf, spec) = model();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.experts");
        let experts: Vec<Vec<u32>> = spec.moe_layers().map(|_| vec![0, 1]).collect();
        let stopped = write(&gguf, &spec, &index(&gguf, &spec, &experts, String::new()), &path, &mut |_, _| false);
        assert!(matches!(stopped, Err(PackError::Interrupted)));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
