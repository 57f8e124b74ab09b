//! The expert pack: a file that holds a model's experts as one contiguous copy each, so that a miss
//! is one sequential read.

use super::layer::{LayerExperts, Layout};
use crate::tiers::file::{FileTier, ReadError, ReadMode, stream};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;
use tier_plan_formats::FormatError;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::spec::{ModelSpec, MoeSpec};
use tier_plan_formats::pack::{ALIGN, PackIndex, PackLayer, open};
use tier_plan_formats::safely::{self, Synced};

/// Experts in flight while they are copied.
const QUEUE_DEPTH: usize = 8;

/// Bytes at the beginning of a slice that are compared, to recognize a pack of another version of
/// the model.
const SAMPLE_BYTES: usize = 4096;

/// Experts could not be copied.
#[derive(Debug, Error)]
pub enum PackError {
    /// The model's file could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The pack could not be written.
    #[error(transparent)]
    Write(#[from] FormatError),
    /// The progress callback asked to stop.
    #[error("interrupted: no experts were written")]
    Interrupted,
}

/// An open pack that belongs to an open model.
#[derive(Debug)]
pub struct Pack {
    path: PathBuf,
    /// Per layer of the model: `[n_expert]` the offset of each expert, if the pack has it.
    layers: HashMap<u32, Vec<Option<u64>>>,
    saving: Saving,
}

/// What contiguous experts save, on average over all experts of a pack.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Saving {
    /// Experts in the pack.
    pub experts: u64,
    /// Bytes that direct I/O reads per expert from the model's file, whole pages included.
    pub before_bytes: f64,
    /// Bytes that direct I/O reads per expert from the pack.
    pub after_bytes: f64,
    /// Separate extents per expert in the model's file; in the pack it is one.
    pub stretches: f64,
}

/// Returns the bytes of an expert's slices, in the order in which the store keeps them.
fn slice_bytes(gguf: &Gguf, moe: &MoeSpec) -> Vec<u64> {
    moe.expert_tensors()
        .map(|id| gguf.tensors()[id].n_bytes / moe.n_expert as u64)
        .collect()
}

impl Pack {
    /// Opens a pack and checks that it is of this model.
    ///
    /// # Errors
    /// When it can't be read, is damaged, or is of another model or another version of this one.
    pub fn open(gguf: &Gguf, spec: &ModelSpec, path: &Path) -> Result<Self, FormatError> {
        let packed = open(path)?;
        packed.check_model(&gguf.id(), path)?;
        let invalid = |what: String| FormatError::Invalid {
            path: path.into(),
            what,
        };
        let io = |source| FormatError::Io {
            path: path.into(),
            source,
        };
        let moes: HashMap<u32, &MoeSpec> = spec
            .moe_layers()
            .map(|(layer, moe)| (layer as u32, moe))
            .collect();
        let mut file = File::open(path).map_err(io)?;
        let mut layers = HashMap::new();
        let mut saving = Saving::default();
        for (
            position,
            PackLayer {
                layer,
                slices: found,
                experts,
            },
        ) in packed.index.layers.iter().enumerate()
        {
            let moe = moes
                .get(layer)
                .ok_or_else(|| invalid(format!("layer {layer} has no routed experts")))?;
            let expected = slice_bytes(gguf, moe);
            if *found != expected || experts.iter().any(|e| *e as usize >= moe.n_expert) {
                let what = format!(
                    "layer {layer} has {} experts of {expected:?} bytes in the model, but others here; make it again with \
                     `tier-plan pack`",
                    moe.n_expert
                );
                return Err(invalid(what));
            }
            let mut offsets = vec![None; moe.n_expert];
            let source = LayerExperts::all_pooled(gguf, moe);
            for (nth, expert) in experts.iter().enumerate() {
                let offset = packed.offset(position, nth);
                offsets[*expert as usize] = Some(offset);
                let spans = source.spans(gguf, *expert as usize, Layout::Packed);
                saving.experts += 1;
                saving.stretches += spans.len() as f64;
                saving.before_bytes += spans
                    .iter()
                    .map(|s| s.extent.pages_bytes() as f64)
                    .sum::<f64>();
                saving.after_bytes += source.expert_bytes().next_multiple_of(ALIGN as usize) as f64;
            }
            if let Some(expert) = experts.first() {
                let same = same_bytes(
                    gguf,
                    moe,
                    *expert as usize,
                    &mut file,
                    packed.offset(position, 0),
                )
                .map_err(io)?;
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
            layers.insert(*layer, offsets);
        }
        let n_experts = saving.experts.max(1) as f64;
        saving.stretches /= n_experts;
        saving.before_bytes /= n_experts;
        saving.after_bytes /= n_experts;
        Ok(Self {
            path: path.into(),
            layers,
            saving,
        })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns what the pack saves per expert.
    pub fn saving(&self) -> Saving {
        self.saving
    }

    /// Returns the offsets of a layer's experts, `[n_expert]`; `None` where the pack lacks the
    /// layer.
    pub(crate) fn places(&self, layer: u32) -> Option<&[Option<u64>]> {
        self.layers.get(&layer).map(Vec::as_slice)
    }
}

/// Whether the beginnings of an expert's slices in the model equal those at `offset` of a pack.
fn same_bytes(
    gguf: &Gguf,
    moe: &MoeSpec,
    expert: usize,
    file: &mut File,
    offset: u64,
) -> io::Result<bool> {
    let mut at = offset;
    for id in moe.expert_tensors() {
        let slice = gguf.slice(&gguf.tensors()[id], expert, moe.n_expert);
        let expected = &slice[..slice.len().min(SAMPLE_BYTES)];
        let mut found = vec![0; expected.len()];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut found)?;
        if found != expected {
            return Ok(false);
        }
        at += slice.len() as u64;
    }
    Ok(true)
}

/// Returns the index of a pack with these experts, `[n_moe_layers][..]`, in the order in which they
/// will be written. `made` is its date.
pub fn index(gguf: &Gguf, spec: &ModelSpec, experts: &[Vec<u32>], made: String) -> PackIndex {
    let layers = spec
        .moe_layers()
        .zip(experts)
        .filter(|(_, experts)| !experts.is_empty());
    let layer = |((layer, moe), experts): ((usize, &MoeSpec), &Vec<u32>)| PackLayer {
        layer: layer as u32,
        slices: slice_bytes(gguf, moe),
        experts: experts.clone(),
    };
    PackIndex {
        model: gguf.id(),
        made,
        layers: layers.map(layer).collect(),
    }
}

/// Writes a pack, whole or not at all. `progress` gets the bytes written so far and in all, and
/// returns whether to go on.
///
/// # Errors
/// When reading or writing fails, or `progress` returns false.
pub fn write(
    gguf: &Gguf,
    spec: &ModelSpec,
    index: &PackIndex,
    path: &Path,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(), PackError> {
    let head = index.encode(path)?;
    let total = index.expert_bytes();
    let parts: Vec<PathBuf> = (0..gguf.n_parts())
        .map(|p| gguf.part_path(p).to_path_buf())
        .collect();
    let files = FileTier::open(&parts, ReadMode::from_env()?)?;
    let moes: HashMap<u32, &MoeSpec> = spec
        .moe_layers()
        .map(|(layer, moe)| (layer as u32, moe))
        .collect();
    let mut items = Vec::new();
    let mut buffer_bytes = 0;
    for packed in &index.layers {
        let Some(moe) = moes.get(&packed.layer) else {
            continue;
        };
        let source = LayerExperts::all_pooled(gguf, moe);
        buffer_bytes = buffer_bytes.max(source.expert_bytes());
        items.extend(packed.experts.iter().map(|e| {
            (
                source.spans(gguf, *e as usize, Layout::Packed),
                source.expert_bytes(),
            )
        }));
    }
    // The error that stopped the copy, unless it was an error of writing.
    let mut stopped = None;
    let written = safely::with_file(path, |file| {
        file.write_all(&head)?;
        let mut done = 0;
        let mut synced = Synced::default();
        let spans = items.iter().map(|(spans, _)| spans.clone());
        let copied = stream(&files, spans, buffer_bytes, QUEUE_DEPTH, |index, buffer| {
            let bytes = items[index].1;
            let padding = bytes.next_multiple_of(ALIGN as usize) - bytes;
            let written = file
                .write_all(&buffer[..bytes])
                .and_then(|()| file.write_all(&[0; ALIGN as usize][..padding]));
            written.map_err(CopyError::Write)?;
            done += (bytes + padding) as u64;
            let on_drive = synced.after(file.get_ref(), done);
            on_drive.map_err(CopyError::Write)?;
            if progress(done, total) {
                Ok(())
            } else {
                Err(CopyError::Interrupted)
            }
        });
        let copied = copied.and_then(|()| files.check().map_err(CopyError::from));
        copied.map_err(|stop| match stop {
            CopyError::Write(error) => error,
            CopyError::Read(error) => {
                stopped = Some(PackError::Read(error));
                io::ErrorKind::Other.into()
            }
            CopyError::Interrupted => {
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

/// The reason for which copying stopped.
enum CopyError {
    Read(ReadError),
    Write(io::Error),
    Interrupted,
}

impl From<ReadError> for CopyError {
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
    fn a_pack_has_the_bytes_at_its_offsets() {
        let (gguf, spec) = model();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.experts");
        let experts: Vec<Vec<u32>> = spec
            .moe_layers()
            .enumerate()
            .map(|(i, _)| vec![3, 4 + i as u32 % 4, 2])
            .collect();
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
    fn a_pack_of_another_version_is_refused() {
        let (gguf, spec) = model();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.experts");
        let experts: Vec<Vec<u32>> = spec.moe_layers().map(|_| vec![1]).collect();
        write(
            &gguf,
            &spec,
            &index(&gguf, &spec, &experts, "then".into()),
            &path,
            &mut |_, _| true,
        )
        .unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let at = Pack::open(&gguf, &spec, &path).unwrap().layers[&0][1].unwrap();
        bytes[at as usize + 5] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let error = Pack::open(&gguf, &spec, &path).unwrap_err().to_string();
        assert!(
            error.contains("expert 1 of layer 0") && error.contains("(then)"),
            "{error}"
        );
        let other = PackIndex {
            layers: vec![PackLayer {
                layer: 0,
                slices: vec![5],
                experts: vec![],
            }],
            ..index(&gguf, &spec, &[], String::new())
        };
        std::fs::write(&path, other.encode(&path).unwrap()).unwrap();
        let error = Pack::open(&gguf, &spec, &path).unwrap_err().to_string();
        assert!(
            error.contains("layer 0 has") && error.contains("tier-plan pack"),
            "{error}"
        );
    }

    #[test]
    fn an_interrupted_pack_leaves_no_file() {
        let (gguf, spec) = model();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.experts");
        let experts: Vec<Vec<u32>> = spec.moe_layers().map(|_| vec![0, 1]).collect();
        let stopped = write(
            &gguf,
            &spec,
            &index(&gguf, &spec, &experts, String::new()),
            &path,
            &mut |_, _| false,
        );
        assert!(matches!(stopped, Err(PackError::Interrupted)));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
