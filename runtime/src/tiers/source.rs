//! One file of the slow tier: how it is opened, read past the page cache, tried again, and watched for changes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use thiserror::Error;

/// Reads past the page cache have offsets, lengths and buffers that are multiples of this: the page size, which every
/// block device takes.
pub const ALIGN: usize = 4096;

/// Failures of one read that are tried again, with waits in between that grow fourfold from a millisecond.
const RETRIES: u32 = 5;

/// Interruptions by signals that one read puts up with.
const INTERRUPTIONS: u32 = 1000;

/// A read that failed.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The system refused, also when asked again.
    #[error("{}: reading {len} bytes at offset {offset}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// How much.
        len: usize,
        /// What the system said; part of the message, so no source of its own.
        r#source: io::Error,
    },
    /// A file could not be opened.
    #[error("{}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        r#source: io::Error,
    },
    /// A file is not what it was when it was opened.
    #[error("{}: {what} while the model was in use; load the model again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// How.
        what: String,
    },
    /// What was read is not what its checksum was made of.
    #[error(
        "{}: {what} ({len} bytes at offset {offset}) is damaged: its XXH3-64 is {found:016x}, expected {expected:016x}; get \
         the file again or, if it was changed on purpose, make new checksums with `tier-plan checksum`",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Tensor, and expert if it is one.
        what: String,
        /// Where it begins.
        offset: u64,
        /// Bytes.
        len: usize,
        /// Of what is there.
        found: u64,
        /// As it should be.
        expected: u64,
    },
    /// No memory for buffers.
    #[error("no memory for {bytes} bytes of buffers")]
    Memory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The environment names a way to read that there is not.
    #[error("TIER_PLAN_IO={found}: expected 'direct' (past the page cache) or 'buffered' (through it, then dropped)")]
    Mode {
        /// What it names.
        found: String,
    },
    /// The threads that read are gone.
    #[error("the reader threads have stopped")]
    Stopped,
}

/// How files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadMode {
    /// Through the page cache, which keeps what was read: for tiers that stand for memory.
    Cached,
    /// Past the page cache (`O_DIRECT`) where the file system allows that, else as [`Buffered`](Self::Buffered).
    Direct,
    /// Through the page cache, then dropped from it, so that memory does not hold the same bytes twice.
    Buffered,
}

impl ReadMode {
    /// How a block device is read: what `TIER_PLAN_IO` says, or past the page cache.
    ///
    /// # Errors
    /// When the variable says something else.
    pub fn from_env() -> Result<Self, ReadError> {
        match std::env::var_os("TIER_PLAN_IO") {
            None => Ok(Self::Direct),
            Some(mode) if mode == "direct" => Ok(Self::Direct),
            Some(mode) if mode == "buffered" => Ok(Self::Buffered),
            Some(mode) => Err(ReadError::Mode { found: mode.to_string_lossy().into_owned() }),
        }
    }
}

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Bytes.
    pub len: u64,
    /// When it was last written to, where the file system says.
    pub modified: Option<SystemTime>,
}

/// Something that is read from by offset: a file, or in tests one that fails.
pub trait ReadAt: Send + Sync {
    /// Reads at most `into.len()` bytes from `offset` on and says how many; none at the end.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;

    /// What it is now.
    fn stamp(&self) -> io::Result<Stamp>;

    /// What offsets, lengths and buffer addresses must be multiples of: 1 or [`ALIGN`].
    fn alignment(&self) -> usize;
}

/// A file of the operating system.
struct SystemFile {
    file: File,
    mode: ReadMode,
}

impl ReadAt for SystemFile {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = read_some_at(&self.file, into, offset)?;
        if self.mode == ReadMode::Buffered {
            drop_cached(&self.file, offset, n);
        }
        Ok(n)
    }

    fn stamp(&self) -> io::Result<Stamp> {
        let metadata = self.file.metadata()?;
        Ok(Stamp { len: metadata.len(), modified: metadata.modified().ok() })
    }

    fn alignment(&self) -> usize {
        if self.mode == ReadMode::Direct { ALIGN } else { 1 }
    }
}

#[cfg(unix)]
fn read_some_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, into, offset)
}

#[cfg(windows)]
fn read_some_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, into, offset)
}

/// Opens a file so that reads go past the page cache, if they really do: some file systems refuse to open it so, others
/// only to read.
#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> Option<File> {
    use super::arena::Arena;
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(path).ok()?;
    let mut trial = Arena::new("", ALIGN as u64).ok()?.take(ALIGN).ok()?;
    read_some_at(&file, &mut trial, 0).ok()?;
    Some(file)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path) -> Option<File> {
    None
}

/// Asks the system not to read ahead of what is asked for.
#[cfg(target_os = "linux")]
fn no_read_ahead(file: &File) {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open; the call takes no memory. A refused hint costs speed only.
    let _ = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
}

#[cfg(not(target_os = "linux"))]
fn no_read_ahead(_: &File) {}

/// Drops a range that was read from the page cache.
#[cfg(target_os = "linux")]
fn drop_cached(file: &File, offset: u64, len: usize) {
    use std::os::fd::AsRawFd;
    // Pages that the range only touches are kept, unless it is widened to whole ones.
    let from = offset / ALIGN as u64 * ALIGN as u64;
    let to = (offset + len as u64).next_multiple_of(ALIGN as u64);
    if let (Ok(from), Ok(len)) = (libc::off_t::try_from(from), libc::off_t::try_from(to - from)) {
        // SAFETY: the descriptor is open; the call takes no memory. A refused hint costs memory of the cache only.
        let _ = unsafe { libc::posix_fadvise(file.as_raw_fd(), from, len, libc::POSIX_FADV_DONTNEED) };
    }
}

#[cfg(not(target_os = "linux"))]
fn drop_cached(_: &File, _: u64, _: usize) {}

/// An open file of a model, with the state it was opened in.
pub(super) struct Source {
    path: PathBuf,
    reader: Box<dyn ReadAt>,
    opened: Stamp,
}

impl Source {
    /// Opens a file.
    pub(super) fn open(path: &Path, mode: ReadMode) -> Result<Self, ReadError> {
        let error = |source| ReadError::Open { path: path.to_path_buf(), r#source };
        let direct = if mode == ReadMode::Direct { open_direct(path) } else { None };
        let file = match (direct, mode) {
            (Some(file), _) => SystemFile { file, mode: ReadMode::Direct },
            (None, ReadMode::Cached) => SystemFile { file: File::open(path).map_err(error)?, mode },
            (None, _) => {
                let file = File::open(path).map_err(error)?;
                no_read_ahead(&file);
                SystemFile { file, mode: ReadMode::Buffered }
            }
        };
        Self::new(path, Box::new(file))
    }

    /// Anything that can be read, called `path` in errors.
    pub(super) fn new(path: &Path, reader: Box<dyn ReadAt>) -> Result<Self, ReadError> {
        let opened = reader.stamp().map_err(|source| ReadError::Open { path: path.to_path_buf(), r#source })?;
        Ok(Self { path: path.to_path_buf(), reader, opened })
    }

    /// See [`ReadAt::alignment`].
    pub(super) fn alignment(&self) -> usize {
        self.reader.alignment()
    }

    /// Fails if the file is not what it was when it was opened.
    pub(super) fn check(&self) -> Result<(), ReadError> {
        let changed = |what: String| Err(ReadError::Changed { path: self.path.clone(), what });
        match self.reader.stamp() {
            Ok(now) if now == self.opened => Ok(()),
            Ok(now) if now.len != self.opened.len => {
                changed(format!("its length changed from {} to {} bytes", self.opened.len, now.len))
            }
            Ok(_) => changed("it was written to".to_string()),
            Err(error) => changed(format!("its length can no longer be read ({error})")),
        }
    }

    /// An error of reading this file.
    pub(super) fn error(&self, offset: u64, len: usize, source: io::Error) -> ReadError {
        ReadError::Io { path: self.path.clone(), offset, len, r#source }
    }

    /// The error of bytes of this file that have the checksum `found`.
    pub(super) fn damaged(&self, offset: u64, len: usize, what: &str, found: u64, expected: u64) -> ReadError {
        ReadError::Damaged { path: self.path.clone(), what: what.to_string(), offset, len, found, expected }
    }

    /// Reads at least the first `need` bytes of `into`, which holds the file from `offset` on: `offset`, the length of
    /// `into` and its address are multiples of the alignment. Less than all of `into` is filled only at the file's end.
    ///
    /// # Errors
    /// When the file changed, or a read fails again and again.
    pub(super) fn fill(&self, offset: u64, into: &mut [u8], need: usize) -> Result<(), ReadError> {
        let align = self.alignment();
        let (mut done, mut failures, mut interruptions) = (0, 0, 0);
        while done < need {
            // A read that stopped short goes on where its alignment allows.
            let from = done / align * align;
            let error = match self.reader.read_at(&mut into[from..], offset + from as u64) {
                Ok(n) if from + n > done => {
                    done = from + n;
                    continue;
                }
                Ok(_) => io::ErrorKind::UnexpectedEof.into(),
                Err(error) => error,
            };
            if error.kind() == io::ErrorKind::Interrupted && interruptions < INTERRUPTIONS {
                interruptions += 1;
                continue;
            }
            // What is wrong with the file explains more than what the read said.
            self.check()?;
            if failures == RETRIES || !may_pass(&error) {
                return Err(self.error(offset, need, error));
            }
            std::thread::sleep(Duration::from_millis(1 << (2 * failures)));
            failures += 1;
        }
        Ok(())
    }
}

/// Whether asking again may help.
fn may_pass(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, UnexpectedEof, WouldBlock};
    #[cfg(unix)]
    if error.raw_os_error() == Some(libc::EIO) {
        return true;
    }
    matches!(error.kind(), Interrupted | TimedOut | UnexpectedEof | WouldBlock)
}
