//! Takes a model out of the cache of Hugging Face's tools: its links in every revision, and the blobs
//! that no other link needs.

use super::Found;
use super::hugging_face::folders;
use crate::hint::HintExt;
use crate::split_name::split_name;
use anyhow::{Context, Result, anyhow, bail};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Most files of a repository that are looked at.
const MAX_ENTRIES: usize = 100_000;

/// What is to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// Name of the model.
    pub name: String,
    /// Files and links by the names that tools know.
    pub links: Vec<PathBuf>,
    /// Files that only these links lead to.
    pub blobs: Vec<PathBuf>,
    /// Bytes that become free.
    pub bytes: u64,
    repository: PathBuf,
}

/// Finds what makes up the cached model of a name: the name that the list shows, or the end of one.
///
/// # Errors
/// When no model or several have the name, or it is no cached one.
pub fn removal(name: &str, models: &[Found]) -> Result<Removal> {
    let name = name.strip_prefix("hf:").unwrap_or(name);
    let ends = |found: &&Found| {
        let rest = found.name.strip_suffix(name);
        rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
    };
    let of_repository = |found: &&Found| {
        let rest = found.name.strip_prefix(name);
        found.cached_in.is_some() && rest.is_some_and(|rest| rest.starts_with('/'))
    };
    let exact = models
        .iter()
        .filter(|found| found.name == name)
        .collect::<Vec<_>>();
    let matching = if exact.is_empty() {
        models
            .iter()
            .filter(|f| ends(f) || of_repository(f))
            .collect()
    } else {
        exact
    };
    let found = match matching.as_slice() {
        [] => {
            return Err(anyhow!(
                "{name}: no such model, expected a name of the list"
            ))
            .hint("`tier-plan models` lists them");
        }
        [found] => *found,
        several => {
            let names: Vec<&str> = several.iter().map(|found| found.name.as_str()).collect();
            bail!(
                "{name}: {} models, expected one of {}",
                several.len(),
                names.join(", ")
            );
        }
    };
    let Some(repository) = &found.cached_in else {
        return Err(anyhow!(
            "{}: a file of yours, expected a model in the cache",
            found.path.display()
        ))
        .hint(format!("rm {}", found.path.display()));
    };
    of_cached(found, repository)
}

fn of_cached(found: &Found, repository: &Path) -> Result<Removal> {
    let snapshots = repository.join("snapshots");
    let file = found
        .path
        .strip_prefix(&snapshots)
        .ok()
        .and_then(|below| {
            let mut below = below.components();
            below.next()?;
            Some(below.as_path().to_path_buf())
        })
        .with_context(|| format!("{}: not in a snapshot of the cache", found.path.display()))?;
    let blobs = repository.join("blobs").canonicalize().ok();
    let (mut links, mut kept) = (Vec::new(), BTreeSet::new());
    let mut left = MAX_ENTRIES;
    let mut targets = BTreeSet::new();
    for snapshot in folders(&snapshots) {
        for path in all_below(&snapshot, &mut left)? {
            let target = path.canonicalize().ok();
            let below = path.strip_prefix(&snapshot).unwrap_or(&path);
            if is_part_of(below, &file) {
                targets.extend(target);
                links.push(path);
            } else {
                kept.extend(target);
            }
        }
    }
    links.sort();
    let in_blobs = |path: &PathBuf| blobs.as_ref().is_some_and(|blobs| path.starts_with(blobs));
    let is_link = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink());
    let removed: Vec<PathBuf> = targets
        .into_iter()
        .filter(|target| in_blobs(target) && !kept.contains(target))
        .collect();
    let size = |path: &PathBuf| fs::metadata(path).map_or(0, |metadata| metadata.len());
    // Where a file system has no links, the names are the files.
    let files = links.iter().filter(|path| !is_link(path));
    let bytes = removed
        .iter()
        .chain(files)
        .map(size)
        .fold(0, u64::saturating_add);
    Ok(Removal {
        name: found.name.clone(),
        links,
        blobs: removed,
        bytes,
        repository: repository.to_path_buf(),
    })
}

/// Returns all files and links below a folder, so that nothing that needs a blob is missed.
fn all_below(folder: &Path, left: &mut usize) -> Result<Vec<PathBuf>> {
    let (mut files, mut open) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(folder) = open.pop() {
        let shown = || folder.display().to_string();
        for entry in fs::read_dir(&folder).with_context(shown)? {
            let entry = entry.with_context(shown)?;
            *left = left.checked_sub(1).with_context(|| {
                format!(
                    "{}: more than {MAX_ENTRIES} files, too many to tell which are still needed",
                    shown()
                )
            })?;
            if entry.file_type().with_context(shown)?.is_dir() {
                open.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    Ok(files)
}

/// Whether a file is one of a model whose first file is `first`.
fn is_part_of(path: &Path, first: &Path) -> bool {
    if path == first {
        return true;
    }
    let names = path.file_name().zip(first.file_name());
    let Some((name, of)) = names.and_then(|(name, of)| Some((name.to_str()?, of.to_str()?))) else {
        return false;
    };
    let split = split_name(name).zip(split_name(of));
    path.parent() == first.parent()
        && split.is_some_and(|(a, b)| a.stem == b.stem && a.count == b.count)
}

impl Removal {
    /// Removes the files, and the folders of the repository that are empty then.
    ///
    /// # Errors
    /// When the system refuses to remove a file.
    pub fn remove(&self) -> Result<()> {
        for path in self.links.iter().chain(&self.blobs) {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("removing {}", path.display()));
                }
                _ => {}
            }
        }
        for link in &self.links {
            let above = link.ancestors().skip(1);
            // A folder with anything in it stays, by the system's own check.
            for folder in
                above.take_while(|folder| folder.starts_with(self.repository.join("snapshots")))
            {
                if fs::remove_dir(folder).is_err() {
                    break;
                }
            }
        }
        Ok(())
    }
}
