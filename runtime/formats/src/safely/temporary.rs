//! Temporary files and folders: created exclusively under a random name, locked while they are
//! in use, and removed when they are dropped.
//!
//! A killed process can't remove its own. So whoever creates the next temporary in a folder also
//! removes the ones that no process holds a lock on. Process numbers would not do: in a container
//! they repeat. Where the file system has no locks, leftovers stay.

use super::explain;
use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// What every name of a temporary begins and ends with.
const PREFIX: &str = ".tier-plan-";
const SUFFIX: &str = ".partial";

/// Names that are tried. Random names collide with none; another process's cleaning may take one.
const MAX_ATTEMPTS: usize = 100;

/// Whether a file name is one that temporaries have.
pub(super) fn is_temporary(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PREFIX.as_bytes())
        && name.as_encoded_bytes().ends_with(SUFFIX.as_bytes())
}

/// Returns a name that can't be guessed, so that nothing can be planted under it.
fn random_name() -> String {
    let number = RandomState::new().hash_one(std::process::id());
    format!("{PREFIX}{number:016x}{SUFFIX}")
}

/// A file that only its owner can read, and that is removed unless it is renamed.
#[derive(Debug)]
pub struct Temporary {
    path: PathBuf,
    file: File,
    renamed: bool,
}

impl Temporary {
    /// Creates an empty file in a folder, and removes what killed processes left there.
    ///
    /// # Errors
    /// When the folder does not exist or cannot be written to.
    pub fn create(folder: &Path) -> io::Result<Self> {
        let (path, file) = create(folder, |path| {
            private().read(true).write(true).create_new(true).open(path)
        })?;
        sweep(folder, &file);
        Ok(Self {
            path,
            file,
            renamed: false,
        })
    }

    /// Returns the open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Renames the file over `target` and returns it, still locked.
    pub(super) fn rename(mut self, target: &Path) -> io::Result<File> {
        // A lock belongs to the open file, of which this is another handle.
        let file = self.file.try_clone()?;
        fs::rename(&self.path, target)?;
        self.renamed = true;
        Ok(file)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            // Nothing more can be done about a failure here, and the first error is the one worth
            // reporting.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A folder that is removed with its contents unless it is published.
#[derive(Debug)]
pub struct TemporaryFolder {
    path: PathBuf,
    /// Holds the lock.
    file: File,
    published: bool,
}

impl TemporaryFolder {
    /// Creates an empty folder in a folder, and removes what killed processes left there.
    ///
    /// # Errors
    /// When the folder does not exist or cannot be written to.
    pub fn create(folder: &Path) -> io::Result<Self> {
        let (path, file) = create(folder, |path| {
            private_folder().create(path)?;
            opened(path, true)
        })?;
        sweep(folder, &file);
        Ok(Self {
            path,
            file,
            published: false,
        })
    }

    /// Returns the path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Renames the folder to a free name. Returns `false` where the name is taken.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn publish(&mut self, target: &Path) -> io::Result<bool> {
        if target.symlink_metadata().is_ok() {
            return Ok(false);
        }
        set_mode(&self.file, 0o777 & !umask());
        match fs::rename(&self.path, target) {
            Ok(()) => {
                self.published = true;
                sync_parent(target);
                Ok(true)
            }
            // Another program took the name since it was looked at. Full folders and files are
            // never replaced.
            Err(_) if target.symlink_metadata().is_ok() => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Creates something under a random name and locks it.
fn create(folder: &Path, make: impl Fn(&Path) -> io::Result<File>) -> io::Result<(PathBuf, File)> {
    for _ in 0..MAX_ATTEMPTS {
        let path = folder.join(random_name());
        match make(&path) {
            // A process that is cleaning up takes what is not locked yet, and then removes it.
            Ok(file) if !is_locked_elsewhere(&file) && is_at(&file, &path) => {
                return Ok((path, file));
            }
            Ok(_) => continue,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(explain(error, folder)),
        }
    }
    Err(io::Error::other(
        "no temporary file could be kept there; another program removes them",
    ))
}

/// Locks a file, or returns `true` where another process has. A file system without locks counts
/// as unlocked.
pub(super) fn is_locked_elsewhere(file: &File) -> bool {
    matches!(file.try_lock(), Err(TryLockError::WouldBlock))
}

/// Removes the temporaries in a folder that no process holds. `own` is one of this process, whose
/// owner theirs must have.
fn sweep(folder: &Path, own: &File) {
    let Ok(own) = own.metadata() else { return };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if is_temporary(&entry.file_name()) {
            // What can't be removed is another user's, or in use.
            let _ = remove_if_dead(&entry.path(), &own);
        }
    }
}

fn remove_if_dead(path: &Path, own: &Metadata) -> io::Result<()> {
    let found = fs::symlink_metadata(path)?;
    if !(found.is_file() || found.is_dir()) || !same_owner(&found, own) {
        return Ok(());
    }
    let file = opened(path, found.is_dir())?;
    // Without a lock there is no telling whether a process still writes it.
    if file.try_lock().is_err() || !is_at(&file, path) {
        return Ok(());
    }
    if found.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
}

/// Opens what is there for locking: never through a link, and without waiting at a pipe.
fn opened(path: &Path, folder: bool) -> io::Result<File> {
    // Some network file systems lock only what is open for writing.
    not_followed().read(true).write(!folder).open(path)
}

/// Whether a path still leads to an open file.
pub(super) fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(there)) => same_file(&open, &there),
        _ => false,
    }
}

/// Syncs the folder of a path, since a rename survives a crash only then. Not every file system
/// can.
pub(super) fn sync_parent(path: &Path) {
    if let Ok(folder) = File::open(super::parent(path)) {
        let _ = folder.sync_all();
    }
}

/// Returns the mode bits that new files do not get, 022 where the system does not tell.
pub(super) fn umask() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("Umask:"));
    mask.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok())
        .unwrap_or(0o022)
}

#[cfg(unix)]
mod system {
    use super::*;
    use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};

    pub fn private() -> OpenOptions {
        let mut options = OpenOptions::new();
        options.mode(0o600).custom_flags(libc::O_NOFOLLOW);
        options
    }

    pub fn private_folder() -> fs::DirBuilder {
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        builder
    }

    pub fn not_followed() -> OpenOptions {
        let mut options = OpenOptions::new();
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        options
    }

    pub fn same_owner(one: &Metadata, other: &Metadata) -> bool {
        one.uid() == other.uid()
    }

    pub fn same_file(one: &Metadata, other: &Metadata) -> bool {
        (one.dev(), one.ino()) == (other.dev(), other.ino())
    }

    /// Sets the mode. A file system without modes is no reason to fail.
    pub fn set_mode(file: &File, mode: u32) {
        let _ = file.set_permissions(fs::Permissions::from_mode(mode));
    }
}

#[cfg(not(unix))]
mod system {
    use super::*;

    pub fn private() -> OpenOptions {
        OpenOptions::new()
    }

    pub fn private_folder() -> fs::DirBuilder {
        fs::DirBuilder::new()
    }

    pub fn not_followed() -> OpenOptions {
        OpenOptions::new()
    }

    pub fn same_owner(_: &Metadata, _: &Metadata) -> bool {
        true
    }

    pub fn same_file(one: &Metadata, other: &Metadata) -> bool {
        one.file_type() == other.file_type()
    }

    pub fn set_mode(_: &File, _: u32) {}
}

pub(super) use system::{not_followed, same_owner, set_mode};
use system::{private, private_folder, same_file};
