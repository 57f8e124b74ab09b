//! GGUF files that are on this machine: in folders, and in the cache of Hugging Face's tools.

mod hugging_face;
mod removal;
mod scan;
#[cfg(test)]
mod tests;

pub use removal::{Removal, removal};
pub use scan::Part;

use crate::store;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::{placement, record};
use tier_plan_runtime::gguf::{Gguf, Value};
use tier_plan_runtime::quant::TensorType;

/// Most files of a folder that are read for being a plan or a record.
const MAX_BESIDE: usize = 256;

/// Folders below a folder of models that are looked into.
const MAX_DEPTH: usize = 4;

/// Where to look.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Folder whose own files are listed.
    pub here: Option<PathBuf>,
    /// Folders that are listed with those in them.
    pub folders: Vec<PathBuf>,
    /// Cache of Hugging Face's tools.
    pub hugging_face: Option<PathBuf>,
}

/// A GGUF model, whose parts count as one.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Found {
    /// Path, or owner, repository, and file in a cache.
    pub name: String,
    /// First file.
    pub path: PathBuf,
    /// Repository folder in the cache that it is in, if it is in one.
    pub cached_in: Option<PathBuf>,
    /// Bytes of all parts.
    pub bytes: u64,
    /// Number of parts.
    pub parts: usize,
    /// Architecture, as the file says.
    pub arch: Option<String>,
    /// Tensor type of most bytes.
    pub quantization: Option<String>,
    /// Values of all tensors.
    pub parameters: Option<u64>,
    /// Plans of this model in its folder.
    pub plans: Vec<PathBuf>,
    /// Profile beside it.
    pub profile: Option<PathBuf>,
    /// Packed copy of its experts beside it.
    pub pack: Option<PathBuf>,
    /// What it decoded at, in the newest record in its folder.
    pub measured: Option<Measured>,
    /// Why it cannot be opened.
    pub error: Option<String>,
}

/// A measured speed.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Tokens per second while decoding.
    pub decode_tok_s: f64,
    /// When, in UTC.
    pub when: String,
}

/// Returns the models of some places, each file once, sorted by name.
pub fn list(places: &Places) -> Vec<Found> {
    let mut parts: Vec<Part> = Vec::new();
    if let Some(here) = &places.here {
        parts.extend(scan::files(here, 0));
    }
    for folder in &places.folders {
        parts.extend(scan::files(folder, MAX_DEPTH));
    }
    if let Some(cache) = &places.hugging_face {
        parts.extend(hugging_face::files(cache));
    }
    let mut seen = BTreeSet::new();
    let mut beside = BTreeMap::new();
    let mut found: Vec<Found> = parts
        .into_iter()
        .filter(|part| {
            let real = part
                .path
                .canonicalize()
                .unwrap_or_else(|_| part.path.clone());
            seen.insert(real)
        })
        .map(|part| describe(part, &mut beside))
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Plans and records of one folder.
#[derive(Debug, Clone, Default)]
struct Beside {
    /// Hash of the model, and the file.
    plans: Vec<(String, PathBuf)>,
    /// Newest speed by hash of the model.
    speeds: BTreeMap<String, Measured>,
}

impl Beside {
    fn read(folder: &Path) -> Self {
        let mut found = Self::default();
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        let ours = |path: &&PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.ends_with(".toml") || name.ends_with(".record.json")
        };
        for path in paths.iter().filter(ours).take(MAX_BESIDE) {
            if path.extension().is_some_and(|e| e == "toml") {
                if let Ok(plan) = placement::read(path) {
                    found.plans.push((plan.model.hash, path.clone()));
                }
            } else if let Ok(record) = record::read(path)
                && let Some(model) = &record.model
                && !record.emulated
                && record.decode_tokens > 0
            {
                let speed = Measured {
                    decode_tok_s: record.decode_tok_s(),
                    when: record.when.clone(),
                };
                let known = found.speeds.get(&model.hash);
                // Moments are written so that the later one is the larger text.
                if known.is_none_or(|known| known.when < speed.when) {
                    found.speeds.insert(model.hash.clone(), speed);
                }
            }
        }
        found
    }
}

fn describe(part: Part, folders: &mut BTreeMap<PathBuf, Beside>) -> Found {
    let Part {
        name,
        path,
        cached_in,
    } = part;
    let mut found = Found {
        name,
        bytes: fs::metadata(&path).map_or(0, |metadata| metadata.len()),
        parts: 1,
        cached_in,
        path,
        ..Found::default()
    };
    let gguf = match Gguf::open(&found.path) {
        Ok(gguf) => gguf,
        Err(error) => {
            found.error = Some(error.to_string());
            return found;
        }
    };
    let own = gguf.id().hash;
    found.bytes = gguf.file_bytes();
    found.parts = gguf.n_parts();
    found.arch = gguf
        .get("general.architecture")
        .and_then(Value::as_str)
        .map(str::to_string);
    found.quantization = main_type(&gguf).map(|ty| ty.to_string());
    found.parameters = Some(parameters(&gguf));
    let exists = |path: PathBuf| Some(path).filter(|path| path.exists());
    found.profile = exists(found.path.with_extension("profile"));
    found.pack = exists(store::default_pack(&gguf));
    let folder = found.path.parent().unwrap_or(Path::new(".")).to_path_buf();
    let beside = folders
        .entry(folder)
        .or_insert_with_key(|folder| Beside::read(folder));
    let plans = beside.plans.iter().filter(|(hash, _)| *hash == own);
    found.plans = plans.map(|(_, path)| path.clone()).collect();
    found.measured = beside.speeds.get(&own).cloned();
    found
}

fn main_type(gguf: &Gguf) -> Option<TensorType> {
    let mut bytes: BTreeMap<TensorType, u64> = BTreeMap::new();
    for tensor in gguf.tensors() {
        let sum = bytes.entry(tensor.ty).or_default();
        *sum = sum.saturating_add(tensor.n_bytes);
    }
    bytes
        .into_iter()
        .max_by_key(|(_, bytes)| *bytes)
        .map(|(ty, _)| ty)
}

fn parameters(gguf: &Gguf) -> u64 {
    gguf.tensors().iter().fold(0u64, |sum, tensor| {
        let values = tensor
            .dims
            .iter()
            .fold(1u64, |n, dim| n.saturating_mul(*dim));
        sum.saturating_add(values)
    })
}
