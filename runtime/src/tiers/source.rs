//! One file of the slow tier: direct I/O, retries, and detection of changes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use thiserror::Error;
use tier_plan_formats::machine::DriveIo;

/// Alignment of direct I/O in bytes: offsets, lengths, and buffer addresses are multiples of it. It
/// is the page size, which every block device accepts.
pub const ALIGN: usize = 4096;

/// Retries of one failed read. The waits in between start at 1 ms and grow fourfold.
const RETRIES: u32 = 5;

/// Interruptions by signals (`EINTR`) after which one read is repeated at once.
const MAX_INTERRUPTIONS: u32 = 1000;

/// A read that failed.
#[derive(Debug, Error)]
pub enum ReadError {
    /// A read failed, also when it was retried.
    #[error("{}: reading {len} bytes at offset {offset} failed: {source}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Bytes that were requested.
        len: usize,
        /// The system's error; part of the message, so no source of its own.
        r#source: io::Error,
    },
    /// A file could not be opened.
    #[error("{}: {source}", path.display())]
    Open {
        /// Path of the file.
        path: PathBuf,
        /// What the system said.
        r#source: io::Error,
    },
    /// A file has changed since it was opened.
    #[error("{}: {what} while the model was in use; load the model again", path.display())]
    Changed {
        /// Path of the file.
        path: PathBuf,
        /// The change, as a clause: `it was written to`.
        what: String,
    },
    /// The bytes of a slice do not have their checksum.
    #[error(
        "{}: {what} ({len} bytes at offset {offset}) is damaged: XXH3-64 {found:016x}, expected {expected:016x}; get the \
         file again, or make new checksums if it was changed on purpose",
        path.display()
    )]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// Name of the slice: the tensor, and the expert if the tensor has several.
        what: String,
        /// Offset of the slice in bytes.
        offset: u64,
        /// Length of the slice in bytes.
        len: usize,
        /// XXH3-64 of the bytes.
        found: u64,
        /// XXH3-64 of the checksum file.
        expected: u64,
    },
    /// Buffers could not be allocated.
    #[error("allocating {bytes} bytes of read buffers failed")]
    Memory {
        /// Bytes that were requested.
        bytes: usize,
    },
    /// The environment variable `TIER_PLAN_IO` names no mode.
    #[error(
        "TIER_PLAN_IO={found}: expected 'direct' (O_DIRECT) or 'buffered' (through the page cache, then dropped)"
    )]
    Mode {
        /// Value of the variable.
        found: String,
    },
    /// The system allows no thread to read with.
    #[error("starting a thread that reads files failed: {0}")]
    Thread(io::Error),
    /// The reader threads are gone.
    #[error("the reader threads have stopped")]
    Stopped,
}

/// How files are read with respect to the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadMode {
    /// Through the page cache, which keeps the bytes: for tiers that stand for memory.
    Cached,
    /// With direct I/O (`O_DIRECT`) where the file system supports it, else as
    /// [`Buffered`](Self::Buffered).
    Direct,
    /// Through the page cache, then dropped from it, so that memory does not hold the bytes twice.
    Buffered,
}

impl ReadMode {
    /// Returns the mode for block devices: that of `TIER_PLAN_IO`, or [`Direct`](Self::Direct).
    ///
    /// # Errors
    /// [`ReadError::Mode`] when the variable names no mode.
    pub fn from_env() -> Result<Self, ReadError> {
        Self::from_env_or(None)
    }

    /// Returns the mode for a block device that was measured: that of `TIER_PLAN_IO`, or `measured`, or
    /// [`Direct`](Self::Direct).
    ///
    /// # Errors
    /// [`ReadError::Mode`] when the variable names no mode.
    pub fn from_env_or(measured: Option<DriveIo>) -> Result<Self, ReadError> {
        match std::env::var_os("TIER_PLAN_IO") {
            None if measured == Some(DriveIo::Buffered) => Ok(Self::Buffered),
            None => Ok(Self::Direct),
            Some(mode) if mode == "direct" => Ok(Self::Direct),
            Some(mode) if mode == "buffered" => Ok(Self::Buffered),
            Some(mode) => Err(ReadError::Mode {
                found: mode.to_string_lossy().into_owned(),
            }),
        }
    }
}

/// Metadata that tell one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Length in bytes.
    pub len: u64,
    /// Time of the last write, where the file system records it.
    pub modified: Option<SystemTime>,
}

/// Something that is read by offset: a file, or a faulty stand-in in tests.
pub trait ReadAt: Send + Sync {
    /// Reads at most `into.len()` bytes from `offset` on, and returns how many: 0 at the end.
    ///
    /// # Errors
    /// When the system refuses.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Returns the present state.
    ///
    /// # Errors
    /// When the system refuses.
    fn stamp(&self) -> io::Result<Stamp>;

    /// Returns the alignment of offsets, lengths, and buffer addresses: 1 or [`ALIGN`].
    fn alignment(&self) -> usize;
}

/// A file of the operating system with its mode.
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
        Ok(Stamp {
            len: metadata.len(),
            modified: metadata.modified().ok(),
        })
    }

    fn alignment(&self) -> usize {
        if self.mode == ReadMode::Direct {
            ALIGN
        } else {
            1
        }
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

/// Opens a file with `O_DIRECT`, or returns `None` where that is not supported. Some file systems
/// refuse only the first read, so one is tried.
#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> Option<File> {
    use super::arena::Arena;
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .ok()?;
    let mut trial = Arena::new("", ALIGN as u64).ok()?.take(ALIGN).ok()?;
    read_some_at(&file, &mut trial, 0).ok()?;
    Some(file)
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path) -> Option<File> {
    None
}

/// Disables the system's own read-ahead.
#[cfg(target_os = "linux")]
fn disable_read_ahead(file: &File) {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open, and the call takes no memory. A refused hint costs speed
    // only.
    let _ = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
}

#[cfg(not(target_os = "linux"))]
fn disable_read_ahead(_: &File) {}

/// Drops a range of the file from the page cache.
#[cfg(target_os = "linux")]
fn drop_cached(file: &File, offset: u64, len: usize) {
    use std::os::fd::AsRawFd;
    // The system keeps pages that the range covers only partly, so it is widened to whole pages.
    let from = offset / ALIGN as u64 * ALIGN as u64;
    let to = (offset + len as u64).next_multiple_of(ALIGN as u64);
    if let (Ok(from), Ok(len)) = (
        libc::off_t::try_from(from),
        libc::off_t::try_from(to - from),
    ) {
        // SAFETY: the descriptor is open, and the call takes no memory. A refused hint costs cache
        // memory only.
        let _ =
            unsafe { libc::posix_fadvise(file.as_raw_fd(), from, len, libc::POSIX_FADV_DONTNEED) };
    }
}

#[cfg(not(target_os = "linux"))]
fn drop_cached(_: &File, _: u64, _: usize) {}

/// An open file of a model, with its state at opening.
pub(super) struct Source {
    path: PathBuf,
    reader: Box<dyn ReadAt>,
    opened: Stamp,
}

impl Source {
    /// Opens a file in a mode.
    ///
    /// # Errors
    /// [`ReadError::Open`].
    pub(super) fn open(path: &Path, mode: ReadMode) -> Result<Self, ReadError> {
        let error = |source| ReadError::Open {
            path: path.to_path_buf(),
            r#source,
        };
        let direct = if mode == ReadMode::Direct {
            open_direct(path)
        } else {
            None
        };
        let file = match (direct, mode) {
            (Some(file), _) => SystemFile {
                file,
                mode: ReadMode::Direct,
            },
            (None, ReadMode::Cached) => SystemFile {
                file: File::open(path).map_err(error)?,
                mode,
            },
            (None, _) => {
                let file = File::open(path).map_err(error)?;
                disable_read_ahead(&file);
                SystemFile {
                    file,
                    mode: ReadMode::Buffered,
                }
            }
        };
        Self::new(path, Box::new(file))
    }

    /// Wraps a reader, which errors call `path`.
    ///
    /// # Errors
    /// [`ReadError::Open`] when it has no [stamp](ReadAt::stamp).
    pub(super) fn new(path: &Path, reader: Box<dyn ReadAt>) -> Result<Self, ReadError> {
        let opened = reader.stamp().map_err(|source| ReadError::Open {
            path: path.to_path_buf(),
            r#source,
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            reader,
            opened,
        })
    }

    /// Returns the reader's [alignment](ReadAt::alignment).
    pub(super) fn alignment(&self) -> usize {
        self.reader.alignment()
    }

    /// Fails if the file has changed since it was opened.
    ///
    /// # Errors
    /// [`ReadError::Changed`].
    pub(super) fn check(&self) -> Result<(), ReadError> {
        let changed = |what: String| {
            Err(ReadError::Changed {
                path: self.path.clone(),
                what,
            })
        };
        match self.reader.stamp() {
            Ok(now) if now == self.opened => Ok(()),
            Ok(now) if now.len != self.opened.len => changed(format!(
                "its length changed from {} to {} bytes",
                self.opened.len, now.len
            )),
            Ok(_) => changed("it was written to".to_string()),
            Err(error) => changed(format!("its length can no longer be read ({error})")),
        }
    }

    /// Returns the error of a failed read of this file.
    pub(super) fn error(&self, offset: u64, len: usize, source: io::Error) -> ReadError {
        ReadError::Io {
            path: self.path.clone(),
            offset,
            len,
            r#source,
        }
    }

    /// Returns the error of a slice of this file that has the checksum `found`.
    pub(super) fn damaged(
        &self,
        offset: u64,
        len: usize,
        what: &str,
        found: u64,
        expected: u64,
    ) -> ReadError {
        ReadError::Damaged {
            path: self.path.clone(),
            what: what.to_string(),
            offset,
            len,
            found,
            expected,
        }
    }

    /// Reads at least the first `need` bytes of `into` from `offset` on; more unless the file ends
    /// there. `offset`, the length of `into`, and its address are multiples of the alignment.
    ///
    /// # Errors
    /// When the file has changed, or a read fails after all retries.
    pub(super) fn fill(&self, offset: u64, into: &mut [u8], need: usize) -> Result<(), ReadError> {
        let align = self.alignment();
        let (mut done, mut failures, mut interruptions) = (0, 0, 0);
        while done < need {
            // A short read is continued from the last aligned offset.
            let from = done / align * align;
            let error = match self.reader.read_at(&mut into[from..], offset + from as u64) {
                Ok(n) if from + n > done => {
                    done = from + n;
                    continue;
                }
                Ok(_) => io::ErrorKind::UnexpectedEof.into(),
                Err(error) => error,
            };
            if error.kind() == io::ErrorKind::Interrupted && interruptions < MAX_INTERRUPTIONS {
                interruptions += 1;
                continue;
            }
            // A change of the file explains more than the read's own error.
            self.check()?;
            if failures == RETRIES || !is_transient(&error) {
                return Err(self.error(offset, need, error));
            }
            std::thread::sleep(Duration::from_millis(1 << (2 * failures)));
            failures += 1;
        }
        Ok(())
    }
}

/// Whether a retry may succeed.
fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, UnexpectedEof, WouldBlock};
    #[cfg(unix)]
    if error.raw_os_error() == Some(libc::EIO) {
        return true;
    }
    matches!(
        error.kind(),
        Interrupted | TimedOut | UnexpectedEof | WouldBlock
    )
}
