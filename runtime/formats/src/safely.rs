//! Files that are either whole or not there: written under a temporary name, then renamed.
//!
//! The temporary name ends in `.partial` and lies beside the file, since a rename is atomic only
//! within one file system. Contents reach the disk before the rename, so a crash leaves the old
//! file or the new one.

use super::FormatError;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Writes a whole file, or leaves the old one.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    with_file(path, |file| file.write_all(bytes))
}

/// Writes a file through `fill`, or leaves what was there when `fill` or the system fails.
///
/// A symbolic link is followed; a device or a pipe, which cannot be replaced by renaming, is
/// written to directly.
pub fn with_file(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), FormatError> {
    replace(path, fill).map_err(|source| FormatError::Io {
        path: path.into(),
        source,
    })
}

/// Checks that [`write()`] could write this file: before hours of work, not after.
///
/// # Errors
/// As [`write()`], but for a full disk. Nothing is left behind.
pub fn check(path: &Path) -> Result<(), FormatError> {
    let possible = match target(path) {
        Ok(Target::Direct(_)) => Ok(()),
        Ok(Target::Replace { folder, .. }) => Partial::create(&folder).map(|_| ()),
        Err(e) => Err(e),
    };
    possible.map_err(|source| FormatError::Io {
        path: path.into(),
        source,
    })
}

/// The way in which a path is written to.
enum Target {
    /// A device or a pipe: as it is.
    Direct(PathBuf),
    /// A file, there or not, by renaming another in its folder.
    Replace {
        target: PathBuf,
        folder: PathBuf,
        old: Option<fs::Metadata>,
    },
}

fn target(path: &Path) -> io::Result<Target> {
    let target = match fs::symlink_metadata(path) {
        Ok(link) if link.is_symlink() => {
            fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
        }
        _ => path.to_path_buf(),
    };
    let old = fs::metadata(&target).ok();
    if let Some(old) = &old {
        if old.is_dir() {
            return Err(io::Error::new(
                ErrorKind::IsADirectory,
                "this is a folder; name a file inside it",
            ));
        }
        if !old.is_file() {
            return Ok(Target::Direct(target));
        }
    }
    if target.file_name().is_none() {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            "this is not the name of a file",
        ));
    }
    let folder = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    Ok(Target::Replace {
        target,
        folder,
        old,
    })
}

fn replace(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> io::Result<()> {
    let (target, folder, old) = match target(path)? {
        Target::Direct(target) => {
            let mut file = BufWriter::new(OpenOptions::new().write(true).open(target)?);
            fill(&mut file)?;
            return file.flush();
        }
        Target::Replace {
            target,
            folder,
            old,
        } => (target, folder, old),
    };
    let (partial, file) = Partial::create(&folder)?;
    let mut file = BufWriter::new(file);
    fill(&mut file)?;
    let file = file.into_inner().map_err(|e| e.into_error())?;
    if let Some(old) = old {
        // Keeping the old file's mode is a courtesy; a file system without modes is no reason to
        // fail.
        let _ = file.set_permissions(old.permissions());
    }
    file.sync_all()?;
    drop(file);
    partial.rename(&target)?;
    // The rename itself survives a crash only when the folder is synced too; not every file system
    // can.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

/// A temporary file that is removed unless it is renamed.
struct Partial {
    path: PathBuf,
    renamed: bool,
}

impl Partial {
    fn create(folder: &Path) -> io::Result<(Partial, File)> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        loop {
            let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!(
                ".tier-plan-{}-{serial}.partial",
                std::process::id()
            ));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    return Ok((
                        Partial {
                            path,
                            renamed: false,
                        },
                        file,
                    ));
                }
                // Left behind by a killed process that had our number: take the next name.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(explain(e, folder)),
            }
        }
    }

    fn rename(mut self, target: &Path) -> io::Result<()> {
        fs::rename(&self.path, target)?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.renamed {
            // Nothing more can be done about a failure here, and the first error is the one worth
            // reporting.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn explain(e: io::Error, folder: &Path) -> io::Error {
    let folder = folder.display();
    let words = match e.kind() {
        ErrorKind::NotFound => {
            format!("the folder {folder} does not exist; create it or choose another output")
        }
        ErrorKind::NotADirectory => format!("{folder} is not a folder; choose another output"),
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            format!(
                "the folder {folder} cannot be written to ({e}); change its permissions or choose another output"
            )
        }
        _ => return e,
    };
    io::Error::new(e.kind(), words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn replaces_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["a.toml"]);
    }

    #[test]
    fn a_failure_keeps_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.toml");
        write(&path, b"one").unwrap();
        let error = with_file(&path, |file| {
            file.write_all(&[7; 100_000])?;
            Err(io::Error::other("the source dried up"))
        });
        assert!(
            error
                .unwrap_err()
                .to_string()
                .ends_with("a.toml: the source dried up")
        );
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(names(dir.path()), ["a.toml"]);
    }

    #[test]
    fn errors_name_the_folder_and_the_mend() {
        let dir = tempfile::tempdir().unwrap();
        let missing = write(&dir.path().join("no/such/a.toml"), b"x")
            .unwrap_err()
            .to_string();
        assert!(
            missing.contains("no/such does not exist; create it or choose another output"),
            "{missing}"
        );
        let folder = write(dir.path(), b"x").unwrap_err().to_string();
        assert!(
            folder.contains("this is a folder; name a file inside it"),
            "{folder}"
        );
        fs::write(dir.path().join("file"), b"").unwrap();
        let inside = write(&dir.path().join("file/a.toml"), b"x")
            .unwrap_err()
            .to_string();
        assert!(inside.contains("is not a folder"), "{inside}");
    }

    #[test]
    fn a_check_says_beforehand_what_a_write_would_say() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), b"kept").unwrap();
        for name in ["", "no/such/a.toml", "file/a.toml", ".."] {
            let path = dir.path().join(name);
            let before = check(&path).unwrap_err().to_string();
            assert_eq!(before, write(&path, b"x").unwrap_err().to_string());
        }
        check(&dir.path().join("file")).unwrap();
        check(&dir.path().join("new")).unwrap();
        assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"kept");
        assert_eq!(names(dir.path()), ["file"]);
    }

    #[test]
    fn a_folder_without_permission_is_explained() {
        // Root may write anywhere, so the words are tested on the error itself.
        let denied = explain(
            io::Error::from(ErrorKind::PermissionDenied),
            Path::new("/reports"),
        );
        assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
        assert!(
            denied
                .to_string()
                .contains("the folder /reports cannot be written to"),
            "{denied}"
        );
        let read_only = explain(
            io::Error::from(ErrorKind::ReadOnlyFilesystem),
            Path::new("/cdrom"),
        );
        assert!(
            read_only.to_string().contains("choose another output"),
            "{read_only}"
        );
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_devices_written_to() {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        let link = dir.path().join("link");
        write(&real, b"one").unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&real, &link).unwrap();
        write(&link, b"two").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(&real).unwrap(), b"two");
        assert_eq!(
            fs::metadata(&real).unwrap().permissions().mode() & 0o777,
            0o600
        );
        write(Path::new("/dev/null"), b"gone").unwrap();
        assert!(
            fs::metadata("/dev/null")
                .unwrap()
                .file_type()
                .is_char_device()
        );
    }
}
