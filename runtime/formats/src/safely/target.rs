//! Where an output goes: over a file by renaming, or straight into a pipe or a device.

use super::{explain, parent, temporary};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Links that are followed before a loop is assumed, as many as Linux follows.
const MAX_LINKS: usize = 40;

/// The way in which a path is written to.
pub(super) enum Target {
    /// A device or a pipe: as it is.
    Direct(Stream),
    /// A file, there or not, by renaming another in its folder.
    Replace {
        target: PathBuf,
        old: Option<Metadata>,
    },
}

/// What is written to directly.
pub(super) enum Stream {
    /// Standard output or error, whatever is behind it.
    Inherited(File),
    /// A device or a named pipe.
    Path(PathBuf),
}

impl Stream {
    pub(super) fn open(self) -> io::Result<File> {
        match self {
            Stream::Inherited(file) => Ok(file),
            Stream::Path(path) => OpenOptions::new().write(true).open(path),
        }
    }
}

fn refusal(words: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, words.into())
}

/// Decides how a path is written to. Links are followed, as a shell's `>` does: the file at their
/// end is replaced, in its own folder, and need not exist.
pub(super) fn target(path: &Path) -> io::Result<Target> {
    if let Some(file) = inherited(path) {
        return Ok(Target::Direct(Stream::Inherited(file?)));
    }
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(refusal("this names a folder; name a file inside it"));
    }
    let old = match fs::metadata(path) {
        Ok(old) => Some(old),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(explain(error, parent(path))),
    };
    if let Some(old) = &old {
        if old.is_dir() {
            return Err(io::Error::new(
                ErrorKind::IsADirectory,
                "this is a folder; name a file inside it",
            ));
        }
        if let Some(kind) = unwritable(old) {
            return Err(refusal(format!("this is a {kind}; name a file or a pipe")));
        }
        if !old.is_file() {
            return Ok(Target::Direct(Stream::Path(path.to_path_buf())));
        }
    }
    let target = if is_link(path) {
        fs::canonicalize(path).or_else(|_| follow(path))?
    } else {
        path.to_path_buf()
    };
    match target.file_name() {
        None => return Err(refusal("this is not the name of a file")),
        Some(name) if temporary::is_temporary(name) => {
            return Err(refusal("temporary files have such names; choose another"));
        }
        Some(_) => {}
    }
    if old.is_some() && is_model(&target) {
        return Err(refusal(
            "this is a model (GGUF), which no output replaces; choose another output",
        ));
    }
    check_replaceable(&target, old.as_ref())?;
    Ok(Target::Replace { target, old })
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink())
}

/// Whether a file is a model. Nothing here writes models, and some can't be had again.
fn is_model(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && magic == *b"GGUF"
}

/// Follows links to a file that need not exist.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        if !is_link(&path) {
            return Ok(path);
        }
        path = parent(&path).join(fs::read_link(&path)?);
    }
    Err(refusal(
        "links lead in a circle; remove them or choose another output",
    ))
}

/// Returns another handle of standard output or error, if the path means one of them. Opening the
/// path would begin again at the start of a file that the shell has opened.
#[cfg(unix)]
fn inherited(path: &Path) -> Option<io::Result<File>> {
    use std::io::Write;
    use std::os::fd::{AsFd, BorrowedFd};
    let handle = |fd: BorrowedFd<'_>| {
        // What was printed before comes first.
        io::stdout().flush()?;
        fd.try_clone_to_owned().map(File::from)
    };
    match path.to_str()? {
        "/dev/stdout" | "/dev/fd/1" | "/proc/self/fd/1" => Some(handle(io::stdout().as_fd())),
        "/dev/stderr" | "/dev/fd/2" | "/proc/self/fd/2" => Some(handle(io::stderr().as_fd())),
        _ => None,
    }
}

#[cfg(not(unix))]
fn inherited(_: &Path) -> Option<io::Result<File>> {
    None
}

/// Names kinds of files that no output is written to. A drive would lose all that it holds.
#[cfg(unix)]
fn unwritable(old: &Metadata) -> Option<&'static str> {
    use std::os::unix::fs::FileTypeExt;
    let kind = old.file_type();
    if kind.is_block_device() {
        Some("drive")
    } else if kind.is_socket() {
        Some("socket")
    } else {
        None
    }
}

#[cfg(not(unix))]
fn unwritable(_: &Metadata) -> Option<&'static str> {
    None
}

/// Checks what creating a file in the folder does not show: a sticky folder such as `/tmp` lets
/// only owners replace their files.
#[cfg(unix)]
fn check_replaceable(target: &Path, old: Option<&Metadata>) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    const STICKY: u32 = 0o1000;
    let (Some(old), Ok(folder)) = (old, fs::metadata(parent(target))) else {
        return Ok(());
    };
    let Some(user) = user() else { return Ok(()) };
    if folder.mode() & STICKY == 0 || user == 0 || [old.uid(), folder.uid()].contains(&user) {
        return Ok(());
    }
    Err(io::Error::new(
        ErrorKind::PermissionDenied,
        "this file is another user's, and its folder lets only owners replace files; choose another output",
    ))
}

#[cfg(not(unix))]
fn check_replaceable(_: &Path, _: Option<&Metadata>) -> io::Result<()> {
    Ok(())
}

/// Returns the number of the user that this process acts for.
#[cfg(unix)]
fn user() -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").ok().map(|own| own.uid())
}
