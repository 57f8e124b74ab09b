//! The cache that `huggingface_hub`, transformers, and llama.cpp share: `models--OWNER--REPO` with
//! `snapshots/REVISION/FILE`, which are links to `blobs/HASH`.

use super::scan::{self, Part};
use std::fs;
use std::path::{Path, PathBuf};

/// Folders of a file below its snapshot that are looked into.
const MAX_DEPTH: usize = 3;

/// Most files and folders of the cache that are looked at.
const MAX_ENTRIES: usize = 100_000;

/// Returns `owner/repo` of a folder in the cache.
pub(super) fn repository(folder: &str) -> Option<String> {
    let name = folder.strip_prefix("models--")?;
    Some(name.replacen("--", "/", 1))
}

/// Returns the models in a cache, one per file of any revision.
pub(super) fn files(cache: &Path) -> Vec<Part> {
    let mut left = MAX_ENTRIES;
    let mut parts = Vec::new();
    for folder in folders(cache) {
        let Some(repository) = folder
            .file_name()
            .and_then(|name| repository(name.to_str()?))
        else {
            continue;
        };
        for snapshot in folders(&folder.join("snapshots")) {
            let mut found = Vec::new();
            scan::walk(&snapshot, MAX_DEPTH, &mut left, &mut found);
            found.sort();
            for path in found.into_iter().filter(|path| scan::is_first(path)) {
                let file = path.strip_prefix(&snapshot).unwrap_or(&path);
                parts.push(Part {
                    name: format!("{repository}/{}", file.display()),
                    cached_in: Some(folder.clone()),
                    path,
                });
            }
        }
    }
    parts
}

/// Returns the folders in a folder, sorted.
pub(super) fn folders(of: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(of).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect();
    folders.sort();
    folders
}
