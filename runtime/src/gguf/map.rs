//! A file in memory, read-only: the one place of this folder with `unsafe`.

use memmap2::Mmap;
use std::fs::File;
use std::io;
use std::path::Path;

/// How the bytes of a range are about to be read; a hint to the system, never needed for correctness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// No hint.
    Normal,
    /// Here and there: do not read ahead.
    Random,
    /// From front to back: read far ahead.
    Sequential,
    /// Soon: start reading now.
    WillNeed,
}

/// A regular file mapped read-only, whole. An empty file is an empty slice.
#[derive(Debug)]
pub(super) struct Map(Option<Mmap>);

impl Map {
    /// Maps the file. Nothing is read until it is looked at.
    pub(super) fn open(path: &Path) -> io::Result<Map> {
        // Asked before opening, because opening a pipe would wait for a writer.
        let metadata = std::fs::metadata(path)?;
        if metadata.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "this is a folder; name the .gguf file in it"));
        }
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "this is no regular file, so it can't be mapped"));
        }
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        if len == 0 {
            return Ok(Map(None));
        }
        if usize::try_from(len).is_err() {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "too large for this processor's address space"));
        }
        // SAFETY: the mapping is read-only and lives as long as the value that owns it. What no program can rule out is
        // another process changing the file meanwhile: the weights would change, or a shortened file would end this
        // process with a bus error. Model files are written once, by a download that renames them when whole, and the
        // documentation says not to change a model while it runs.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Map(Some(map)))
    }

    /// All bytes of the file.
    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }

    /// Passes a hint for `len` bytes from `offset` on. The hint may be ignored; so are failures to give it.
    pub(super) fn advise(&self, offset: usize, len: usize, advice: Advice) {
        #[cfg(unix)]
        if let Some(map) = &self.0 {
            let in_range = offset.checked_add(len).is_some_and(|end| end <= map.len());
            let advice = match advice {
                Advice::Normal => memmap2::Advice::Normal,
                Advice::Random => memmap2::Advice::Random,
                Advice::Sequential => memmap2::Advice::Sequential,
                Advice::WillNeed => memmap2::Advice::WillNeed,
            };
            if in_range {
                // A refused hint costs speed only.
                let _ = map.advise_range(advice, offset, len);
            }
        }
        #[cfg(not(unix))]
        let _ = (offset, len, advice);
    }
}
