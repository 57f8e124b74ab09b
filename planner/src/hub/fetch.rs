//! Fetches a file into the cache: goes on where an earlier fetch ended, and checks what came.
//!
//! What has come is kept in a file of its own until it is complete. So a signal may end the program
//! at any moment, and none is caught here.

use super::cache::RepoCache;
use super::choose::{Digest, Listed};
use super::client::{Client, MAX_TRIES, Ranged, Unreachable};
use crate::hint::HintExt;
use crate::printable::printable;
use anyhow::{Context, Result, anyhow, bail, ensure};
use ring::digest::{Context as Hasher, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;
use tier_plan_runtime::tiers::limits::file_system_space;
use tier_plan_runtime::units::show_bytes;

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Free bytes that a fetch must leave on its file system, since full ones work badly.
const SPARE_BYTES: u64 = 64 << 20;

/// Receives the bytes of the file that are there, and those of them that came just now.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Returns the bytes of a file that an earlier fetch has left.
pub fn kept_bytes(cache: &RepoCache, file: &Listed) -> u64 {
    let path = file.digest.as_ref().map(|digest| cache.incomplete(digest));
    let length = path
        .and_then(|path| fs::metadata(path).ok())
        .map_or(0, |m| m.len());
    if length > file.bytes { 0 } else { length }
}

/// Whether files of so many bytes may be fetched to a file system.
pub fn fits(bytes: u64, free_bytes: u64) -> bool {
    bytes.saturating_add(SPARE_BYTES) <= free_bytes
}

/// What helps where they do not fit.
pub const SPACE_HINT: &str = "free space, or set HF_HUB_CACHE to a folder on another drive";

/// Checks that files fit the file system of a folder, which may not exist yet.
///
/// # Errors
/// When they do not; says the numbers.
pub fn check_space(folder: &Path, bytes: u64) -> Result<()> {
    let there = folder.ancestors().find(|path| path.is_dir());
    let space = there.and_then(file_system_space);
    let Some(free) = space.map(|space| space.free_bytes) else {
        return Ok(());
    };
    if fits(bytes, free) {
        return Ok(());
    }
    let full = anyhow!(
        "{}: {} to fetch, but {} are free there",
        folder.display(),
        show_bytes(bytes),
        show_bytes(free)
    );
    Err(full).hint(SPACE_HINT)
}

/// Fetches a file of a repository unless its blob is there.
///
/// # Errors
/// When the server fails again and again, sends something else, or the file system refuses. What
/// came is kept.
pub fn fetch(
    client: &Client,
    cache: &RepoCache,
    url: &str,
    file: &Listed,
    progress: Progress<'_>,
) -> Result<Digest> {
    let Some(digest) = &file.digest else {
        bail!(
            "{}: the listing has no checksum, expected one",
            printable(&file.path)
        );
    };
    let (blob, incomplete) = (cache.blob(digest), cache.incomplete(digest));
    for path in [&blob, &cache.lock(digest)] {
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let _lock = lock(&cache.lock(digest))?;
    if cache.has_blob(file) {
        return Ok(digest.clone());
    }
    let mut partial = Partial::open(&incomplete, file, digest, progress)?;
    receive(client, url, &mut partial, progress)?;
    if let Err(found) = partial.check() {
        drop(partial);
        fs::remove_file(&incomplete).with_context(|| incomplete.display().to_string())?;
        let wrong = anyhow!(
            "{}: checksum {found}, expected {}; what was fetched is removed",
            printable(&file.path),
            digest.hex()
        );
        return Err(wrong).hint("run the same command again");
    }
    partial
        .file
        .sync_all()
        .and_then(|()| fs::rename(&incomplete, &blob))
        .with_context(|| format!("completing {}", blob.display()))?;
    Ok(digest.clone())
}

/// Takes the lock that other programs take, too; `None` where the file system has no locks.
fn lock(path: &Path) -> Result<Option<File>> {
    let file = File::create(path).with_context(|| path.display().to_string())?;
    let mut is_told = !std::io::stderr().is_terminal();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) => {
                if !std::mem::replace(&mut is_told, true) {
                    eprintln!("another program fetches this file; waiting for it");
                }
                std::thread::sleep(Duration::from_millis(200));
            }
            Err(TryLockError::Error(_)) => return Ok(None),
        }
    }
}

/// The part of a file that is there, and its checksum so far.
struct Partial<'f> {
    file: File,
    listed: &'f Listed,
    digest: &'f Digest,
    hasher: Hasher,
    /// Bytes written and hashed.
    have: u64,
}

impl<'f> Partial<'f> {
    /// Opens what an earlier fetch has left.
    fn open(
        path: &Path,
        listed: &'f Listed,
        digest: &'f Digest,
        progress: Progress<'_>,
    ) -> Result<Self> {
        let failed = || path.display().to_string();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(path).with_context(failed)?;
        let length = file.metadata().with_context(failed)?.len();
        let mut partial = Self {
            file,
            listed,
            digest,
            hasher: hasher(listed, digest),
            have: 0,
        };
        if length > listed.bytes {
            partial.restart()?;
        }
        partial.hash_kept(progress).with_context(failed)?;
        Ok(partial)
    }

    /// Hashes the bytes that are there already.
    fn hash_kept(&mut self, progress: Progress<'_>) -> Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            match self.file.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    self.hasher.update(&chunk[..n]);
                    self.have += n as u64;
                    progress(self.have, 0);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Drops what is there.
    fn restart(&mut self) -> Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hasher = hasher(self.listed, self.digest);
        self.have = 0;
        Ok(())
    }

    /// Adds bytes at the end.
    fn add(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .with_context(|| format!("writing {}", printable(&self.listed.path)))?;
        self.hasher.update(bytes);
        self.have += bytes.len() as u64;
        Ok(())
    }

    /// Compares the checksum of all bytes.
    fn check(&self) -> Result<(), String> {
        let found = self.hasher.clone().finish();
        let found: String = found.as_ref().iter().map(|b| format!("{b:02x}")).collect();
        if found == self.digest.hex() {
            Ok(())
        } else {
            Err(found)
        }
    }
}

/// Returns a hasher for the checksum of a file.
fn hasher(file: &Listed, digest: &Digest) -> Hasher {
    match digest {
        Digest::Sha256(_) => Hasher::new(&SHA256),
        Digest::Git(_) => {
            let mut hasher = Hasher::new(&SHA1_FOR_LEGACY_USE_ONLY);
            hasher.update(format!("blob {}\0", file.bytes).as_bytes());
            hasher
        }
    }
}

/// Receives the bytes that are missing, with tries as long as something comes in between.
fn receive(
    client: &Client,
    url: &str,
    partial: &mut Partial<'_>,
    progress: Progress<'_>,
) -> Result<()> {
    let expected = partial.listed.bytes;
    let (mut failures, mut furthest) = (0, partial.have);
    progress(partial.have, 0);
    while partial.have < expected {
        let name = printable(&partial.listed.path);
        let Some(ranged) = client.range(url, partial.have, None)? else {
            // No such range: what is there cannot be the beginning of what the server has.
            let short = partial.have == 0;
            ensure!(
                !short,
                "{name}: the server has no byte of it, expected {expected} bytes"
            );
            partial.restart()?;
            failures += 1;
            ensure!(
                failures < MAX_TRIES,
                "{name}: the server refuses every range"
            );
            continue;
        };
        check_length(partial, &ranged)?;
        if ranged.start == 0 && partial.have > 0 {
            // A server without ranges sends everything again.
            partial.restart()?;
        }
        let why = match copy(ranged.body, partial, progress)? {
            Stopped::Complete => break,
            Stopped::Short => "the connection ended".to_string(),
            Stopped::Failed(why) => why,
        };
        if partial.have > furthest {
            (furthest, failures) = (partial.have, 0);
        }
        failures += 1;
        if failures >= MAX_TRIES {
            let lost = format!(
                "{name}: {why} after {} of {expected} bytes, {failures} times",
                partial.have
            );
            return Err(Unreachable(lost).into());
        }
        client.wait(failures, None);
    }
    Ok(())
}

/// Checks that the server sends the file that was listed, from where it was asked for or from its
/// beginning.
fn check_length(partial: &Partial<'_>, ranged: &Ranged) -> Result<()> {
    let name = printable(&partial.listed.path);
    let expected = partial.listed.bytes;
    if let Some(total) = ranged.total {
        ensure!(
            total == expected,
            "{name}: the server sends {total} bytes, expected {expected} as listed"
        );
    }
    ensure!(
        ranged.start == partial.have || ranged.start == 0,
        "{name}: the server sends bytes from {} on, expected {}",
        ranged.start,
        partial.have
    );
    Ok(())
}

/// Why no more bytes came.
enum Stopped {
    /// All are there.
    Complete,
    /// The answer ended too early.
    Short,
    /// The connection failed.
    Failed(String),
}

/// Copies an answer to the end of the file.
fn copy(
    mut body: Box<dyn Read>,
    partial: &mut Partial<'_>,
    progress: Progress<'_>,
) -> Result<Stopped> {
    let expected = partial.listed.bytes;
    let mut chunk = vec![0; CHUNK_BYTES];
    while partial.have < expected {
        let n = match body.read(&mut chunk) {
            Ok(0) => return Ok(Stopped::Short),
            Ok(n) => n,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Ok(Stopped::Failed(printable(&error.to_string()).into_owned())),
        };
        ensure!(
            n as u64 <= expected - partial.have,
            "{}: the server sends more than the {expected} bytes listed",
            printable(&partial.listed.path)
        );
        partial.add(&chunk[..n])?;
        progress(partial.have, n as u64);
    }
    Ok(Stopped::Complete)
}
