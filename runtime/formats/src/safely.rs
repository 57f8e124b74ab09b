//! Files that are either whole or not there: written under a temporary name, then renamed.
//!
//! The temporary file is created exclusively and lies beside the file, since a rename is atomic
//! only within one file system. Contents reach the disk before the rename, so a crash leaves the
//! old file or the new one. What a killed process leaves, the next write to the same folder
//! removes; see [`Temporary`].
//!
//! A path that is a link stays one: the file at its end is replaced, in its own folder. A pipe or
//! a character device, which cannot be replaced by renaming, is written to directly.

mod folder;
mod resumable;
mod signal;
mod synced;
mod target;
mod temporary;
#[cfg(test)]
mod tests;

pub use folder::{NewFolders, check_folder};
pub use resumable::Resumable;
pub use signal::ignore_file_size_signal;
pub use synced::Synced;
pub use temporary::{Temporary, TemporaryFolder};

use super::FormatError;
use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use target::{Target, target};

/// Writes a whole file, or leaves the old one.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    with_file(path, |file| file.write_all(bytes))
}

/// Writes a file through `fill`, or leaves what was there when `fill` or the system fails.
pub fn with_file(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), FormatError> {
    let failed = |source| FormatError::Io {
        path: path.into(),
        source,
    };
    let written = Written::new(path, fill).map_err(failed)?;
    written.publish().map_err(failed)
}

/// Writes several files, all before the first replaces an old one.
///
/// # Errors
/// As [`write()`]. All old files are left, unless renaming itself fails.
pub fn write_together(files: &[(PathBuf, Vec<u8>)]) -> Result<(), FormatError> {
    let failed = |path: &Path, source| FormatError::Io {
        path: path.into(),
        source,
    };
    let mut written = Vec::with_capacity(files.len());
    for (path, bytes) in files {
        let file = Written::new(path, |file| file.write_all(bytes));
        written.push((path, file.map_err(|e| failed(path, e))?));
    }
    for (path, file) in written {
        file.publish().map_err(|e| failed(path, e))?;
    }
    Ok(())
}

/// Checks that [`write()`] could write this file: before hours of work, not after.
///
/// # Errors
/// As [`write()`], but for a full disk. Nothing is left behind.
pub fn check(path: &Path) -> Result<(), FormatError> {
    check_target(path, true)
}

/// Checks as [`check()`], and that the path is not a pipe or a device: for files that are read
/// again.
///
/// # Errors
/// As [`check()`].
pub fn check_file(path: &Path) -> Result<(), FormatError> {
    check_target(path, false)
}

fn check_target(path: &Path, streams: bool) -> Result<(), FormatError> {
    let possible = match target(path) {
        Ok(Target::Direct(_)) if streams => Ok(()),
        Ok(Target::Direct(_)) => Err(io::Error::new(
            ErrorKind::InvalidInput,
            "this is a pipe or a device, expected a file, which is read again",
        )),
        Ok(Target::Replace { target, .. }) => Temporary::create(parent(&target)).map(drop),
        Err(e) => Err(e),
    };
    possible.map_err(|source| FormatError::Io {
        path: path.into(),
        source,
    })
}

/// Returns the folder of a path.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Contents on the disk that do not have their name yet. `None` where they went to a stream.
struct Written(Option<Pending>);

struct Pending {
    temporary: Temporary,
    target: PathBuf,
}

impl Written {
    fn new(
        path: &Path,
        fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> io::Result<Self> {
        let (target, old) = match target(path)? {
            Target::Direct(stream) => {
                let mut file = BufWriter::new(stream.open()?);
                fill(&mut file)?;
                file.flush()?;
                return Ok(Self(None));
            }
            Target::Replace { target, old } => (target, old),
        };
        let temporary = Temporary::create(parent(&target))?;
        let mut file = BufWriter::new(temporary.file().try_clone()?);
        fill(&mut file)?;
        let file = file.into_inner().map_err(|e| e.into_error())?;
        match old {
            // Keeping the old file's mode is a courtesy; a file system without modes is no reason
            // to fail.
            Some(old) => drop(file.set_permissions(old.permissions())),
            None => temporary::set_mode(&file, 0o666 & !temporary::umask()),
        }
        file.sync_all()?;
        Ok(Self(Some(Pending { temporary, target })))
    }

    fn publish(self) -> io::Result<()> {
        let Some(Pending { temporary, target }) = self.0 else {
            return Ok(());
        };
        let renamed = temporary.rename(&target);
        renamed.map_err(|e| explain(e, parent(&target)))?;
        temporary::sync_parent(&target);
        Ok(())
    }
}

/// Adds the mend to the error of writing into a folder.
fn explain(e: io::Error, folder: &Path) -> io::Error {
    // Some file systems, such as `/proc`, claim that what can't be created does not exist.
    let missing = !folder.is_dir();
    let folder = folder.display();
    let words = match e.kind() {
        ErrorKind::NotFound if missing => {
            format!("the folder {folder} does not exist; create it or choose another output")
        }
        ErrorKind::NotADirectory => format!("{folder} is not a folder; choose another output"),
        ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            format!(
                "the folder {folder} cannot be written to ({e}); change its permissions or choose another output"
            )
        }
        ErrorKind::ResourceBusy => {
            format!("this is a mount point, which cannot be replaced ({e}); choose another output")
        }
        _ => return e,
    };
    io::Error::new(e.kind(), words)
}
