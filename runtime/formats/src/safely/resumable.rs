//! A file of unfinished work that a later run continues.
//!
//! Its name is known before it exists, so others may plant something under it. It is never read or
//! written through a link, only its owner may read it, and a second process keeps off it.

use super::temporary::{is_at, is_locked_elsewhere, not_followed, same_owner, sync_parent};
use super::{Temporary, parent};
use crate::FormatError;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Unfinished work under its own name.
#[derive(Debug)]
pub struct Resumable {
    path: PathBuf,
    /// The file under that name, locked.
    held: Option<File>,
}

impl Resumable {
    /// Takes over what an earlier run left, if anything, and checks that it can be replaced.
    ///
    /// # Errors
    /// When what is there is not a file of this user, when another process is writing it, or when
    /// the folder cannot be written to.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let held = Self::take(path).map_err(|source| FormatError::Io {
            path: path.into(),
            source,
        })?;
        Ok(Self {
            path: path.into(),
            held,
        })
    }

    fn take(path: &Path) -> io::Result<Option<File>> {
        let own = Temporary::create(parent(path))?.file().metadata()?;
        let found = match fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        check(&found, &own)?;
        let file = not_followed().read(true).write(true).open(path)?;
        check(&file.metadata()?, &own)?;
        if is_locked_elsewhere(&file) {
            return Err(busy());
        }
        Ok(Some(file))
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file that an earlier run left.
    ///
    /// # Errors
    /// When the system has no handle left.
    pub fn file(&self) -> io::Result<Option<File>> {
        self.held.as_ref().map(File::try_clone).transpose()
    }

    /// Replaces the contents, whole or not at all.
    ///
    /// # Errors
    /// When the file system refuses, or another process has written the file meanwhile.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FormatError> {
        self.replace(bytes).map_err(|source| FormatError::Io {
            path: self.path.clone(),
            source,
        })
    }

    fn replace(&mut self, bytes: &[u8]) -> io::Result<()> {
        let temporary = Temporary::create(parent(&self.path))?;
        temporary.file().write_all(bytes)?;
        temporary.file().sync_all()?;
        let undisturbed = match &self.held {
            // It may have been removed by hand.
            Some(held) => is_at(held, &self.path) || !is_there(&self.path),
            None => !is_there(&self.path),
        };
        if !undisturbed {
            return Err(busy());
        }
        self.held = Some(temporary.rename(&self.path)?);
        sync_parent(&self.path);
        Ok(())
    }

    /// Renames the file, so that other work can begin under its name. A link at `to` is replaced,
    /// not followed.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn set_aside(&mut self, to: &Path) -> Result<(), FormatError> {
        if self.held.take().is_some() {
            fs::rename(&self.path, to).map_err(|source| FormatError::Io {
                path: to.into(),
                source,
            })?;
        }
        Ok(())
    }

    /// Removes the file when the work is finished.
    pub fn remove(self) {
        if self
            .held
            .as_ref()
            .is_some_and(|held| is_at(held, &self.path))
        {
            // The finished work is safe; a leftover is only untidy.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn busy() -> io::Error {
    io::Error::new(
        ErrorKind::ResourceBusy,
        "another process is writing this file; wait for it or choose another output",
    )
}

/// Refuses what no earlier run of this user can have left.
fn check(found: &Metadata, own: &Metadata) -> io::Result<()> {
    let what = if found.is_symlink() {
        "a link"
    } else if found.is_dir() {
        "a folder"
    } else if !found.is_file() {
        "not a regular file"
    } else if !same_owner(found, own) {
        "another user's file"
    } else {
        return Ok(());
    };
    Err(io::Error::new(
        ErrorKind::InvalidInput,
        format!(
            "this is {what}, but unfinished work is kept under this name; remove it or choose another output"
        ),
    ))
}
