//! Takes a model out of the cache of Hugging Face's tools: its links in every revision, and the blobs
//! that no other link needs.

use super::Found;
use super::hugging_face::{self, folders as folders_in};
use crate::folders::{self, Environment};
use crate::hint::HintExt;
use crate::hub::{self, Here};
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

/// Finds what makes up a cached model. It is given by a path in the cache, by a name that other
/// commands take, or by a name of the list or the end of one. No server is asked.
///
/// # Errors
/// When no model or several have the name, or it is no cached one.
pub fn removal(name: &str, models: &[Found], env: Environment<'_>) -> Result<Removal> {
    let path = Path::new(name);
    if let Some(file) = folders::hub(env).and_then(|cache| at_path(path, &cache)) {
        return of_cached(&file);
    }
    // A name of the list may come with the scheme of its cache.
    let listed = name.strip_prefix("hf:").unwrap_or(name);
    if models.iter().any(|found| found.name == listed) {
        return of_listed(listed, models);
    }
    match hub::locate(path, env)? {
        Some(Here::Cached(path)) => {
            let cache = folders::hub(env).context("no folder of cached models is known")?;
            let file = CachedFile::new(&path, &cache).with_context(|| name.to_string())?;
            of_cached(&file)
        }
        Some(Here::Foreign { file, removed_by }) => Err(anyhow!(
            "{name}: {} belongs to another program, expected a model in the cache of Hugging Face",
            file.display()
        ))
        .hint(removed_by),
        None if path.is_file() && !models.iter().any(|found| is_called(found, name)) => {
            not_cached(path)
        }
        None => of_listed(name, models),
    }
}

/// Whether a model of the list is meant by a name.
fn is_called(found: &Found, name: &str) -> bool {
    let before = found.name.strip_suffix(name);
    let after = found.name.strip_prefix(name);
    before.is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
        || found.cached_in.is_some() && after.is_some_and(|rest| rest.starts_with('/'))
}

fn of_listed(name: &str, models: &[Found]) -> Result<Removal> {
    let exact: Vec<&Found> = models.iter().filter(|found| found.name == name).collect();
    let mut matching = if exact.is_empty() {
        models.iter().filter(|f| is_called(f, name)).collect()
    } else {
        exact
    };
    // Revisions may have different files of a name, which go together.
    matching.dedup_by(|a, b| {
        a.cached_in.is_some() && (&a.cached_in, &a.name) == (&b.cached_in, &b.name)
    });
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
    let cache = found.cached_in.as_deref().and_then(Path::parent);
    match cache.and_then(|cache| CachedFile::new(&found.path, cache)) {
        Some(file) => of_cached(&file),
        None => not_cached(&found.path),
    }
}

/// Refuses a file that is not in the cache.
fn not_cached(path: &Path) -> Result<Removal> {
    let shown = path.display();
    let error = anyhow!("{shown}: a file of yours, expected a model in the cache");
    Err(error).hint(format!("rm {shown}"))
}

/// A file in a snapshot of the cache.
struct CachedFile {
    /// Folder of its repository.
    repository: PathBuf,
    /// Path below any snapshot.
    below: PathBuf,
    /// Owner, repository, and path, as the list shows them.
    name: String,
}

impl CachedFile {
    /// Returns the file of a path; `None` if it is not in a snapshot of that cache.
    fn new(path: &Path, cache: &Path) -> Option<Self> {
        let mut parts = path.strip_prefix(cache).ok()?.components();
        let folder = parts.next()?;
        let of = hugging_face::repository(folder.as_os_str().to_str()?)?;
        let _snapshot = parts
            .next()
            .filter(|part| part.as_os_str() == "snapshots")
            .and_then(|_| parts.next())?;
        let below = parts.as_path().to_path_buf();
        (!below.as_os_str().is_empty()).then(|| Self {
            repository: cache.join(folder),
            name: format!("{of}/{}", below.display()),
            below,
        })
    }
}

/// Returns the cached file that a path leads to, which may be a blob.
fn at_path(path: &Path, cache: &Path) -> Option<CachedFile> {
    let cache = cache.canonicalize().ok()?;
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new(".")).canonicalize().ok()?;
    let path = folder.join(path.file_name()?);
    if !fs::symlink_metadata(&path).is_ok_and(|found| !found.is_dir()) {
        return None;
    }
    if folder.file_name().is_none_or(|name| name != "blobs") {
        return CachedFile::new(&path, &cache);
    }
    let mut left = MAX_ENTRIES;
    folders_in(&folder.parent()?.join("snapshots"))
        .iter()
        .filter_map(|snapshot| all_below(snapshot, &mut left).ok())
        .flatten()
        .find(|link| link.canonicalize().is_ok_and(|target| target == path))
        .and_then(|link| CachedFile::new(&link, &cache))
}

fn of_cached(of: &CachedFile) -> Result<Removal> {
    let CachedFile {
        repository,
        below: file,
        name,
    } = of;
    let snapshots = repository.join("snapshots");
    let blobs = repository.join("blobs").canonicalize().ok();
    let (mut links, mut kept) = (Vec::new(), BTreeSet::new());
    let mut left = MAX_ENTRIES;
    let mut targets = BTreeSet::new();
    for snapshot in folders_in(&snapshots) {
        for path in all_below(&snapshot, &mut left)? {
            let target = path.canonicalize().ok();
            let below = path.strip_prefix(&snapshot).unwrap_or(&path);
            if is_part_of(below, file) {
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
        name: name.clone(),
        links,
        blobs: removed,
        bytes,
        repository: repository.clone(),
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
