//! A file in memory, read-only: the one place of this folder with `unsafe`.

use super::bus::Watched;
use memmap2::{Mmap, MmapMut};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
#[cfg(target_os = "linux")]
use tier_plan_kernels::shards::STRIPE_BYTES;

/// How the bytes of a range are about to be read; a hint to the system, never needed for
/// correctness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// No hint: what the system does by default.
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
pub(super) struct Map {
    // Dropped first: once the range is free, another mapping may lie there.
    _watched: Option<Watched>,
    map: Option<Mmap>,
}

impl Map {
    /// Maps the file. Nothing is read until it is looked at.
    pub(super) fn open(path: &Path) -> io::Result<Map> {
        // Asked before opening, because opening a pipe would wait for a writer.
        let metadata = std::fs::metadata(path)?;
        if metadata.is_dir() {
            return Err(io::Error::new(
                io::ErrorKind::IsADirectory,
                "this is a folder; name the .gguf file in it",
            ));
        }
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file, so it can't be mapped",
            ));
        }
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        if len == 0 {
            return Ok(Map {
                _watched: None,
                map: None,
            });
        }
        if usize::try_from(len).is_err() {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "too large for this processor's address space",
            ));
        }
        // SAFETY: the mapping is read-only and lives as long as the value that owns it. What no
        // program can rule out is another process changing the file meanwhile: the weights would
        // change, or a shortened file would end this process with a bus error, which `bus` reports.
        // Model files are written once, by a download that renames them when whole, and the
        // documentation says not to change a model while it runs.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Map {
            _watched: Watched::new(&map, path),
            map: Some(map),
        })
    }

    /// Returns all bytes of the file.
    pub(super) fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }

    /// Passes a hint for `len` bytes from `offset` on. The hint may be ignored; so are failures to
    /// give it.
    pub(super) fn advise(&self, offset: usize, len: usize, advice: Advice) {
        #[cfg(unix)]
        if let Some(map) = &self.map {
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

/// Bytes that a thread copies at a time.
const COPY_BYTES: usize = 8 << 20;

/// A file's bytes in memory of this process, on huge pages where the system has them.
#[derive(Debug)]
pub(super) struct Copied(MmapMut);

impl Copied {
    /// Copies a file that `map` has mapped, with several threads; `copied` is told how many bytes
    /// were added, on the calling thread only.
    pub(super) fn read(
        path: &Path,
        map: &Map,
        threads: usize,
        copied: &mut dyn FnMut(u64),
    ) -> io::Result<Copied> {
        let source = map.bytes();
        let file = File::open(path)?;
        if file.metadata()?.len() != source.len() as u64 {
            return Err(io::Error::other(
                "the file has changed since it was opened; run again",
            ));
        }
        let mut memory = MmapMut::map_anon(source.len().max(1))?;
        #[cfg(target_os = "linux")]
        let _ = {
            // From the first whole huge page on: Linux interleaves those over NUMA nodes by their
            // addresses if a range of memory begins at one.
            let start = memory.as_ptr().align_offset(STRIPE_BYTES);
            let len = memory.len().saturating_sub(start);
            memory.advise_range(memmap2::Advice::HugePage, start.min(memory.len()), len)
        };
        let chunks = Mutex::new(
            memory[..source.len()]
                .chunks_mut(COPY_BYTES)
                .zip(source.chunks(COPY_BYTES))
                .enumerate(),
        );
        let done = AtomicU64::new(0);
        let next = || chunks.lock().unwrap_or_else(|e| e.into_inner()).next();
        let copy_one = |at: usize, to: &mut [u8], from: &[u8]| {
            done.fetch_add(to.len() as u64, Ordering::Relaxed);
            read_at(&file, (at * COPY_BYTES) as u64, to, from)
        };
        let result = std::thread::scope(|scope| {
            let work = || {
                while let Some((at, (to, from))) = next() {
                    copy_one(at, to, from)?;
                }
                Ok(())
            };
            let others: Vec<_> = (1..threads.max(1))
                .map_while(|_| std::thread::Builder::new().spawn_scoped(scope, work).ok())
                .collect();
            let mut own = Ok(());
            while let Some((at, (to, from))) = next() {
                own = copy_one(at, to, from);
                copied(done.swap(0, Ordering::Relaxed));
                if own.is_err() {
                    break;
                }
            }
            let joined = others.into_iter().map(|t| {
                t.join()
                    .unwrap_or_else(|_| Err(io::Error::other("a thread failed")))
            });
            joined.fold(own, |result: io::Result<()>, other| result.and(other))
        });
        result.map_err(cut_short)?;
        copied(done.load(Ordering::Relaxed));
        Ok(Copied(memory))
    }

    /// Returns all bytes of the file.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns all bytes of the file, to be arranged anew.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Says what it means that a read ended before its bytes came.
fn cut_short(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the file has become shorter since it was opened; run again once it is whole",
        ),
        _ => error,
    }
}

/// Fills `to` from `offset` of the file; `mapped` are the same bytes as the system maps them.
fn read_at(file: &File, offset: u64, to: &mut [u8], mapped: &[u8]) -> io::Result<()> {
    #[cfg(unix)]
    {
        let _ = mapped;
        std::os::unix::fs::FileExt::read_exact_at(file, to, offset)
    }
    #[cfg(not(unix))]
    {
        let _ = (file, offset);
        to.copy_from_slice(mapped);
        Ok(())
    }
}
