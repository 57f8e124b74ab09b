//! Folders that outputs go to, made when they are missing.

use super::{Temporary, TemporaryFolder, explain, parent};
use crate::FormatError;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Checks that a folder exists and can be written to, or could be made: before long work.
///
/// # Errors
/// As writing a file there, but for a full disk. Nothing is left behind.
pub fn check_folder(folder: &Path) -> Result<(), FormatError> {
    let there = nearest(folder);
    let possible = if there == folder {
        Temporary::create(there).map(drop)
    } else {
        TemporaryFolder::create(there).map(drop)
    };
    possible.map_err(|source| FormatError::Io {
        path: folder.into(),
        source,
    })
}

/// Returns the folder itself or the closest one above it that exists.
fn nearest(folder: &Path) -> &Path {
    let mut above = folder.ancestors();
    above
        .find(|path| path.symlink_metadata().is_ok() || path.as_os_str().is_empty())
        .map_or(Path::new("."), |path| {
            if path.as_os_str().is_empty() {
                Path::new(".")
            } else {
                path
            }
        })
}

/// Folders that were made for an output, and that are removed again unless something is in them.
#[derive(Debug)]
pub struct NewFolders {
    /// From the outermost to the innermost.
    made: Vec<PathBuf>,
}

impl NewFolders {
    /// Makes a folder and those above it that are missing.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn make(folder: &Path) -> Result<Self, FormatError> {
        let mut new = Self { made: Vec::new() };
        let mut missing: Vec<&Path> = folder
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && !path.exists())
            .collect();
        missing.reverse();
        for path in missing {
            match fs::create_dir(path) {
                Ok(()) => new.made.push(path.to_path_buf()),
                Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => {}
                Err(error) => return Err(failed(path, explain(error, parent(path)))),
            }
        }
        if !folder.as_os_str().is_empty() && !folder.is_dir() {
            return Err(failed(
                folder,
                io::Error::new(
                    ErrorKind::NotADirectory,
                    "this is not a folder; choose another output",
                ),
            ));
        }
        Ok(new)
    }
}

fn failed(path: &Path, source: io::Error) -> FormatError {
    FormatError::Io {
        path: path.into(),
        source,
    }
}

impl Drop for NewFolders {
    fn drop(&mut self) {
        for folder in self.made.iter().rev() {
            // Fails where something is inside, which is then worth keeping.
            let _ = fs::remove_dir(folder);
        }
    }
}
