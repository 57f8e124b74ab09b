//! Finds the first files of GGUF models below a folder.

use crate::split_name::split_name;
use std::fs;
use std::path::{Path, PathBuf};

/// Most files and folders that are looked at, so that a folder such as `/` ends.
const MAX_ENTRIES: usize = 100_000;

/// The first file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Name to show and to ask for.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    /// Repository folder of the cache that it is in.
    pub cached_in: Option<PathBuf>,
}

/// Returns the models in a folder and in those up to `depth` below it, sorted. Folders that begin with
/// a dot are left out.
pub(super) fn files(folder: &Path, depth: usize) -> Vec<Part> {
    let mut left = MAX_ENTRIES;
    let mut found = Vec::new();
    walk(folder, depth, &mut left, &mut found);
    found.sort();
    let part = |path: PathBuf| Part {
        name: path
            .strip_prefix(".")
            .unwrap_or(&path)
            .display()
            .to_string(),
        path,
        cached_in: None,
    };
    found
        .into_iter()
        .filter(|path| is_first(path))
        .map(part)
        .collect()
}

/// Collects all GGUF files. Links to folders are not followed, as they may go round in circles.
pub(super) fn walk(folder: &Path, depth: usize, left: &mut usize, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Some(less) = left.checked_sub(1) else {
            return;
        };
        *left = less;
        let (path, name) = (entry.path(), entry.file_name());
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder {
            if depth > 0 && !name.to_string_lossy().starts_with('.') {
                walk(&path, depth - 1, left, found);
            }
        } else if is_gguf(&path) && path.is_file() {
            found.push(path);
        }
    }
}

fn is_gguf(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// Whether a file is a whole model, or the first part of one.
pub(super) fn is_first(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    split_name(&name).is_none_or(|split| split.number == 1)
}
