//! Copies of a model's experts on other drives, which reads are shared with.
//!
//! A copy is the model once more, or a [pack](super::pack). Every read goes to the file whose drive
//! will have made it first: after all that the drive still has to read, at the rate that the plan
//! gives it. So drives get reads in proportion to their rates, and one that falls behind gets fewer.
//!
//! An expert lies in its buffer as it does when it is read from the first file, since a slot does not
//! remember where its bytes came from. With the model once more that needs no copying: slices are at
//! equal distances from the beginnings of pages.

use super::checksums::Checksums;
use super::ids::ExpertId;
use super::layer::{LayerExperts, Layout, Part, SliceLocation};
use super::pack::Pack;
use crate::tiers::file::{Extent, FileTier, Finish, Span};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tier_plan_formats::FormatError;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::spec::ModelSpec;

/// Bytes that a file is recognized by.
const GGUF_MAGIC: &[u8] = b"GGUF";

/// What a copy consists of.
#[derive(Debug, Clone)]
enum Files {
    /// The parts of the model.
    Model(Vec<PathBuf>),
    Pack(Arc<Pack>),
}

/// An open copy of a model's experts.
#[derive(Debug, Clone)]
pub struct ExpertFiles {
    files: Files,
    share: f64,
}

impl ExpertFiles {
    /// Opens a copy and checks that it is of this model. `share` is the part of the last tier's rate
    /// that its drive has.
    ///
    /// # Errors
    /// When it can't be read, or is of another model.
    pub fn open(
        gguf: &Gguf,
        spec: &ModelSpec,
        path: &Path,
        share: f64,
    ) -> Result<Self, FormatError> {
        let files = if is_gguf(path)? {
            Files::Model(model_parts(gguf, path)?)
        } else {
            Files::Pack(Arc::new(Pack::open(gguf, spec, path)?))
        };
        Ok(Self { files, share })
    }

    /// Returns the part of the last tier's rate that the copy's drive has.
    pub fn share(&self) -> f64 {
        self.share
    }

    /// Returns the paths of its files, in the order of their indices.
    pub fn paths(&self) -> Vec<PathBuf> {
        match &self.files {
            Files::Model(parts) => parts.clone(),
            Files::Pack(pack) => vec![pack.path().to_path_buf()],
        }
    }

    /// Returns where the slices of every expert are that the copy has: `[expert][slice]`, with the index
    /// of the file in [`paths`](Self::paths).
    pub fn places(&self, gguf: &Gguf, spec: &ModelSpec) -> Vec<Vec<Extent>> {
        let Files::Pack(pack) = &self.files else {
            return places(gguf, spec);
        };
        let of_layer = spec.moe_layers().flat_map(|(layer, moe)| {
            let offsets = pack.places(layer as u32).unwrap_or_default();
            offsets
                .iter()
                .enumerate()
                .filter_map(move |(expert, offset)| {
                    let slices = moe.expert_tensors();
                    let bytes = slices
                        .map(|id| gguf.slice(&gguf.tensors()[id], expert, moe.n_expert).len());
                    Some(vec![Extent {
                        part: 0,
                        offset: (*offset)?,
                        len: bytes.sum(),
                    }])
                })
        });
        of_layer.collect()
    }

    /// Returns where the experts of a layer are. `first` is the index of the copy's first file.
    pub(crate) fn of_layer(&self, layer: u32, first: usize) -> LayerCopy {
        match &self.files {
            Files::Model(_) => LayerCopy::Model { first_part: first },
            Files::Pack(pack) => LayerCopy::Packed {
                part: first,
                offsets: pack.places(layer).unwrap_or_default().to_vec(),
            },
        }
    }
}

/// Returns where the slices of every expert of a model are: `[expert][slice]`.
pub fn places(gguf: &Gguf, spec: &ModelSpec) -> Vec<Vec<Extent>> {
    let of_layer = spec.moe_layers().flat_map(|(_, moe)| {
        let slice = |id: usize, expert| Extent::of_slice(&gguf.tensors()[id], expert, moe.n_expert);
        (0..moe.n_expert).map(move |expert| {
            let slices = moe.expert_tensors();
            slices.map(|id| slice(id, expert)).collect()
        })
    });
    of_layer.collect()
}

/// Whether a file begins as a GGUF does.
fn is_gguf(path: &Path) -> Result<bool, FormatError> {
    use std::io::Read;
    let io = |source| FormatError::Io {
        path: path.into(),
        source,
    };
    let mut begin = Vec::new();
    let file = std::fs::File::open(path).map_err(io)?;
    file.take(GGUF_MAGIC.len() as u64)
        .read_to_end(&mut begin)
        .map_err(io)?;
    Ok(begin == GGUF_MAGIC)
}

/// Opens a model that is to be a copy of `gguf`, and returns the paths of its parts.
fn model_parts(gguf: &Gguf, path: &Path) -> Result<Vec<PathBuf>, FormatError> {
    let invalid = |what: String| FormatError::Invalid {
        path: path.into(),
        what,
    };
    let copy = Gguf::open(path).map_err(|error| invalid(error.to_string()))?;
    let same = copy.tensors().len() == gguf.tensors().len()
        && copy.n_parts() == gguf.n_parts()
        && copy.tensors().iter().zip(gguf.tensors()).all(|(a, b)| {
            (&a.name, a.ty, &a.dims, a.part, a.offset) == (&b.name, b.ty, &b.dims, b.part, b.offset)
                && a.slices == b.slices
        });
    if copy.id().hash != gguf.id().hash || !same {
        let model = gguf.path().display();
        return Err(invalid(format!(
            "this is not a copy of {model}; copy that file again, or leave the copy out"
        )));
    }
    let parts = 0..copy.n_parts();
    Ok(parts.map(|part| copy.part_path(part).into()).collect())
}

/// A copy of one layer's experts.
pub(crate) enum LayerCopy {
    /// The model once more; the index of its first file.
    Model { first_part: usize },
    /// Each expert in one piece of a file.
    Packed {
        part: usize,
        /// `[n_expert]` where each begins, if the copy has it.
        offsets: Vec<Option<u64>>,
    },
}

impl LayerCopy {
    /// Returns where an expert's slice is, which the model's file has at `extent`.
    fn slice(&self, part: &Part, expert: ExpertId, extent: Extent) -> Option<Extent> {
        match self {
            LayerCopy::Model { first_part } => Some(Extent {
                part: first_part + extent.part,
                ..extent
            }),
            LayerCopy::Packed {
                part: file,
                offsets,
            } => Some(Extent {
                part: *file,
                offset: offsets.get(expert.index()).copied().flatten()? + part.packed_offset as u64,
                len: extent.len,
            }),
        }
    }
}

/// The reads of one expert from one file.
pub(super) struct ExpertReads {
    pub(super) spans: Vec<Span>,
    pub(super) finish: Finish,
}

impl LayerExperts {
    /// Shares reads with a copy.
    pub(crate) fn add_copy(&mut self, copy: LayerCopy) {
        self.copies.push(copy);
    }

    /// Returns the reads that bring an expert into a buffer of the layer, from the file that will have
    /// made them first.
    pub(super) fn reads(
        &self,
        gguf: &Gguf,
        files: &FileTier,
        checksums: Option<&Checksums>,
        expert: ExpertId,
    ) -> ExpertReads {
        let own = || ExpertReads {
            spans: self.spans(gguf, expert.index(), self.layout),
            finish: self.finish(gguf, checksums, expert.index(), self.layout),
        };
        if self.copies.is_empty() {
            return own();
        }
        let seconds = |file| files.seconds_until_read(file, self.expert_bytes() as u64);
        let of_own = self.spans(gguf, expert.index(), self.layout);
        let mut best = of_own.first().map_or(0.0, |span| seconds(span.extent.part));
        let mut chosen = None;
        for copy in &self.copies {
            let Some(locations) = self.locations_in(gguf, expert, copy) else {
                continue;
            };
            let until = locations.first().map_or(best, |l| seconds(l.extent.part));
            if until < best {
                (best, chosen) = (until, Some(locations));
            }
        }
        chosen.map_or_else(own, |locations| {
            self.reads_of(gguf, checksums, expert, &locations)
        })
    }

    /// Returns the places of an expert's slices in a copy, with those in the buffer, or `None` if the
    /// copy lacks it.
    fn locations_in(
        &self,
        gguf: &Gguf,
        expert: ExpertId,
        copy: &LayerCopy,
    ) -> Option<Vec<SliceLocation>> {
        let location = |part: &Part| {
            let in_model = part.extent(gguf, expert.index());
            let own = self.slice_location(gguf, part, expert.index(), self.layout);
            Some(SliceLocation {
                extent: copy.slice(part, expert, in_model)?,
                buffer_offset: own.buffer_offset,
            })
        };
        self.parts.iter().map(location).collect()
    }

    fn reads_of(
        &self,
        gguf: &Gguf,
        checksums: Option<&Checksums>,
        expert: ExpertId,
        locations: &[SliceLocation],
    ) -> ExpertReads {
        let mut reads = ExpertReads {
            spans: Vec::with_capacity(locations.len()),
            finish: self.finish(gguf, None, expert.index(), self.layout),
        };
        let is_whole =
            self.layout == Layout::WholePages && self.extent_in_copy(expert.index()).is_none();
        for (part, location) in self.parts.iter().zip(locations) {
            let SliceLocation {
                extent,
                buffer_offset: at,
            } = *location;
            // The room around the slice is that of its pages in the model's file.
            let has_room = is_whole && extent.head() == part.extent(gguf, expert.index()).head();
            reads.spans.push(Span {
                extent,
                at,
                whole_pages: has_room,
            });
            let check =
                checksums.map(|sums| sums.slice(gguf, part.tensor, expert.index(), at, extent));
            reads.finish.checks.extend(check);
        }
        reads
    }
}
