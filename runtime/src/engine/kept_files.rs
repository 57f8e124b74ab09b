//! Kept beginnings of texts in a folder, so that they survive the program.
//!
//! A page of 64 tokens is one file, and so are the recurrent states after it. A file's name is a
//! hash of the model, the type of the cache, and all tokens up to the page's last; the file says
//! the same in full, before the values. So there is no index that could be wrong: what a text
//! begins with is found by its name and proven by its head. A file is whole or not there, and a
//! checksum proves its values. Programs that share a folder write the same files.

use crate::error::LoadError;
use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::SystemTime;
use tier_plan_cuda::CudaError;
use tier_plan_formats::safely;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// First line of every file.
const FORMAT: &str = "tier-plan kept text 1";

/// Share of the folder that stays when there is too much in it, in percent. What is removed at once
/// is not removed again and again.
const KEPT_PERCENT: u64 = 90;

/// Bytes of files that are read at once, ahead of the one that is wanted next.
const AHEAD_BYTES: usize = 32 << 20;

/// Files that are read at once at most: enough for a drive's full rate.
const MAX_AHEAD: usize = 8;

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Keys and values of a page, in every layer that attends.
    Page,
    /// The recurrent states after a page.
    State,
}

impl Kept {
    fn extension(self) -> &'static str {
        match self {
            Self::Page => "page",
            Self::State => "state",
        }
    }
}

/// A folder of kept beginnings of texts.
#[derive(Debug)]
pub(crate) struct KeptFiles {
    folder: PathBuf,
    most_bytes: u64,
    /// What the values depend on besides the tokens.
    depends_on: String,
    /// Bytes of all files, as far as this program knows.
    bytes: u64,
    /// Sentences on files that could not be used or written.
    notes: Vec<String>,
}

impl KeptFiles {
    /// Opens a folder for up to `most_bytes`, and makes it if it is missing. Values depend on
    /// `depends_on`: the model, the type of the cache, and the kernels.
    ///
    /// # Errors
    /// When the folder can't be made or listed.
    pub(crate) fn open(
        folder: &Path,
        most_bytes: u64,
        depends_on: String,
    ) -> Result<Self, LoadError> {
        let failed = |source| LoadError::Kept {
            folder: folder.to_path_buf(),
            source,
        };
        make_private(folder).map_err(failed)?;
        let mut files = Self {
            folder: folder.to_path_buf(),
            most_bytes,
            depends_on,
            bytes: 0,
            notes: Vec::new(),
        };
        files.bytes = files.list().map_err(failed)?.iter().map(|f| f.bytes).sum();
        files.make_room(0);
        Ok(files)
    }

    /// Returns what the last calls have to say, and forgets it.
    pub(crate) fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// Returns what a file begins with.
    fn head(&self, kept: Kept, tokens: &[u32]) -> Vec<u8> {
        let (what, n) = (kept.extension(), tokens.len());
        let mut head = format!("{FORMAT}\n{}\n{what} {n}\n", self.depends_on).into_bytes();
        head.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        head
    }

    fn path(&self, kept: Kept, head: &[u8]) -> PathBuf {
        let name = format!("{:032x}.{}", xxh3_128(head), kept.extension());
        self.folder.join(name)
    }

    /// Returns whether there is a file of what follows from these tokens.
    pub(crate) fn has(&self, kept: Kept, tokens: &[u32]) -> bool {
        self.path(kept, &self.head(kept, tokens)).is_file()
    }

    /// Returns the `len` bytes that follow from these tokens, if they are there and whole.
    pub(crate) fn read(&mut self, kept: Kept, tokens: &[u32], len: usize) -> Option<Vec<u8>> {
        let head = self.head(kept, tokens);
        let path = self.path(kept, &head);
        let found = read_whole(&path, &head, len);
        self.judge(&path, found)
    }

    /// Reads the `len` bytes that follow from each of some beginnings, several files at once, and
    /// hands them to `take` in order: up to the first that is not there and whole, or that is not
    /// taken.
    pub(crate) fn read_each<'t>(
        &mut self,
        kept: Kept,
        beginnings: impl Iterator<Item = &'t [u32]>,
        len: usize,
        mut take: impl FnMut(Vec<u8>) -> bool,
    ) {
        let at_once = (AHEAD_BYTES / len.max(1)).clamp(1, MAX_AHEAD);
        thread::scope(|scope| {
            let (mut reads, mut next) = (VecDeque::new(), beginnings);
            loop {
                while reads.len() < at_once
                    && let Some(tokens) = next.next()
                {
                    let head = self.head(kept, tokens);
                    let file = Arc::new((self.path(kept, &head), head));
                    let of = file.clone();
                    let read = move || read_whole(&of.0, &of.1, len);
                    // Without a thread, it is read when it is wanted.
                    let read = thread::Builder::new().spawn_scoped(scope, read).ok();
                    reads.push_back((file, read));
                }
                let Some((file, read)) = reads.pop_front() else {
                    break;
                };
                let (path, head) = &*file;
                let found = match read {
                    Some(read) => read.join().unwrap_or(Ok(None)),
                    None => read_whole(path, head, len),
                };
                if !self.judge(path, found).is_some_and(&mut take) {
                    break;
                }
            }
        });
    }

    /// Returns the values that were found in a file. One that can't be used goes, and is noted.
    fn judge(&mut self, path: &Path, found: io::Result<Option<Vec<u8>>>) -> Option<Vec<u8>> {
        match found {
            Ok(values) => values,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                self.note(path, "is not used", &error);
                // It would be found damaged again.
                let _ = fs::remove_file(path);
                None
            }
        }
    }

    /// Writes what follows from these tokens, unless it is there already, or a GPU that has it fails.
    pub(crate) fn write(
        &mut self,
        kept: Kept,
        tokens: &[u32],
        values: impl FnOnce() -> Result<Vec<u8>, CudaError>,
    ) {
        let mut bytes = self.head(kept, tokens);
        let path = self.path(kept, &bytes);
        if let Ok(file) = File::open(&path) {
            // It was used now.
            let _ = file.set_modified(SystemTime::now());
            return;
        }
        match values() {
            Ok(values) => bytes.extend(values),
            Err(error) => return self.note(&path, "is not kept", &error),
        }
        bytes.extend(xxh3_64(&bytes).to_le_bytes());
        let n = bytes.len() as u64;
        if n > self.most_bytes {
            return;
        }
        if self.bytes + n > self.most_bytes {
            self.make_room(n);
        }
        match safely::write(&path, &bytes) {
            Ok(()) => self.bytes += n,
            Err(error) => self.note(&path, "is not kept", &error),
        }
    }

    fn note(&mut self, path: &Path, what: &str, error: &dyn std::fmt::Display) {
        // One sentence says enough where all fail alike.
        if self.notes.is_empty() {
            self.notes
                .push(format!("{} {what}: {error}", path.display()));
        }
    }

    /// Removes the files that were used least recently, until there is room for `bytes` more.
    fn make_room(&mut self, bytes: u64) {
        if self.bytes + bytes <= self.most_bytes {
            return;
        }
        let Ok(mut files) = self.list() else { return };
        self.bytes = files.iter().map(|file| file.bytes).sum();
        files.sort_by_key(|file| file.used);
        let wanted = (self.most_bytes / 100 * KEPT_PERCENT).saturating_sub(bytes);
        for file in files {
            if self.bytes <= wanted {
                break;
            }
            // Another program may have removed it.
            let _ = fs::remove_file(&file.path);
            self.bytes -= file.bytes;
        }
    }

    fn list(&self) -> io::Result<Vec<Listed>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let Ok(metadata) = fs::symlink_metadata(&path) else {
                continue;
            };
            if is_kept(&path) && metadata.is_file() {
                files.push(Listed {
                    bytes: metadata.len(),
                    used: metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                    path,
                });
            }
        }
        Ok(files)
    }
}

/// A file of a folder.
struct Listed {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// Returns whether a file has such a name as [`KeptFiles`] gives: other files stay untouched.
fn is_kept(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    let is_hash = |stem: &str| stem.len() == 32 && stem.bytes().all(|b| b.is_ascii_hexdigit());
    let extension = path.extension().and_then(|extension| extension.to_str());
    stem.is_some_and(is_hash) && matches!(extension, Some("page" | "state"))
}

/// Makes a folder that others can't read, since what was kept tells what the texts were.
fn make_private(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// Returns the `len` bytes of a file between its head and its checksum; `None` where its head is
/// another.
fn read_whole(path: &Path, head: &[u8], len: usize) -> io::Result<Option<Vec<u8>>> {
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it is damaged or cut short");
    let mut file = File::open(path)?;
    let expected = head.len() + len + size_of::<u64>();
    if file.metadata()?.len() != expected as u64 {
        return Err(damaged());
    }
    let mut bytes = vec![0; expected];
    file.read_exact(&mut bytes)
        .map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged(),
            _ => error,
        })?;
    let (whole, sum) = bytes.split_at(expected - size_of::<u64>());
    if xxh3_64(whole).to_le_bytes() != sum {
        return Err(damaged());
    }
    if !whole.starts_with(head) {
        return Ok(None);
    }
    let _ = file.set_modified(SystemTime::now());
    bytes.truncate(expected - size_of::<u64>());
    bytes.drain(..head.len());
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &Path, most_bytes: u64) -> KeptFiles {
        KeptFiles::open(folder, most_bytes, "model f16".into()).unwrap()
    }

    #[test]
    fn values_come_back_for_the_same_tokens_only() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("new/one");
        let mut files = open(&folder, 1 << 20);
        files.write(Kept::Page, &[1, 2], || Ok(vec![7; 100]));
        files.write(Kept::Page, &[1, 2], || unreachable!("it is there"));
        assert!(files.has(Kept::Page, &[1, 2]) && !files.has(Kept::State, &[1, 2]));
        let mut again = open(&folder, 1 << 20);
        assert_eq!(again.bytes, files.bytes);
        assert_eq!(again.read(Kept::Page, &[1, 2], 100), Some(vec![7; 100]));
        assert_eq!(again.read(Kept::Page, &[1, 3], 100), None);
        assert_eq!(again.read(Kept::State, &[1, 2], 100), None);
        let mut other = KeptFiles::open(&folder, 1 << 20, "model q8_0".into()).unwrap();
        assert_eq!(other.read(Kept::Page, &[1, 2], 100), None);
        assert!(again.take_notes().is_empty() && other.take_notes().is_empty());
    }

    #[test]
    fn a_damaged_file_is_named_once_and_goes() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = open(folder.path(), 1 << 20);
        files.write(Kept::Page, &[1], || Ok(vec![7; 50]));
        let path = files.list().unwrap().remove(0).path;
        let good = fs::read(&path).unwrap();
        let mut cases = vec![
            Vec::new(),
            good[..good.len() - 1].to_vec(),
            [&good[..], b"x"].concat(),
        ];
        for at in [0, 10, good.len() - 30, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            cases.push(bad);
        }
        for bad in cases {
            fs::write(&path, &bad).unwrap();
            assert_eq!(files.read(Kept::Page, &[1], 50), None);
            let notes = files.take_notes();
            assert_eq!(notes.len(), 1);
            assert!(
                notes[0].ends_with("is not used: it is damaged or cut short"),
                "{notes:?}"
            );
            assert!(!path.exists());
        }
        // A file of another text under this one's name is none of it.
        files.write(Kept::Page, &[2], || Ok(vec![7; 50]));
        let other = files.list().unwrap().remove(0).path;
        fs::rename(other, &path).unwrap();
        assert_eq!(files.read(Kept::Page, &[1], 50), None);
        assert!(files.take_notes().is_empty());
    }

    #[test]
    fn many_files_are_read_in_order_up_to_the_first_that_is_bad() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = open(folder.path(), 1 << 20);
        let tokens: Vec<u32> = (0..40).collect();
        for n in 1..=40 {
            files.write(Kept::Page, &tokens[..n], || Ok(vec![n as u8; 70]));
        }
        let read = |files: &mut KeptFiles, most: usize| {
            let mut found = Vec::new();
            let beginnings = (1..=50).map(|n: usize| &tokens[..n.min(40)]);
            files.read_each(Kept::Page, beginnings.take(40), 70, |bytes| {
                assert!(bytes.len() == 70 && bytes.iter().all(|b| *b == bytes[0]));
                found.push(usize::from(bytes[0]));
                found.len() < most
            });
            found
        };
        let up_to = |n: usize| (1..=n).collect::<Vec<_>>();
        assert_eq!(read(&mut files, 99), up_to(40));
        assert_eq!(read(&mut files, 11), up_to(11));
        let head = files.head(Kept::Page, &tokens[..30]);
        let path = files.path(Kept::Page, &head);
        fs::write(&path, b"short").unwrap();
        assert_eq!(read(&mut files, 99), up_to(29));
        assert!(files.take_notes().len() == 1 && !path.exists());
        assert_eq!(read(&mut files, 99), up_to(29), "it is missing now");
        assert!(files.take_notes().is_empty());
        assert!(files.has(Kept::Page, &tokens[..31]));
        files.read_each(
            Kept::State,
            [&tokens[..1]].into_iter(),
            70,
            |_| unreachable!(),
        );
        files.read_each(Kept::Page, std::iter::empty(), 0, |_| unreachable!());
    }

    #[test]
    fn the_folder_stays_within_its_size_and_keeps_what_was_used() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("notes.txt"), vec![0; 5000]).unwrap();
        let mut files = open(folder.path(), 4000);
        for token in 0..20 {
            files.write(Kept::Page, &[token], || Ok(vec![token as u8; 400]));
            std::thread::sleep(std::time::Duration::from_millis(5));
            assert!(files.has(Kept::Page, &[token]));
            assert!(files.read(Kept::Page, &[0], 400).is_some(), "{token}");
        }
        let bytes: u64 = files.list().unwrap().iter().map(|file| file.bytes).sum();
        assert!(bytes <= 4000 && bytes == files.bytes, "{bytes}");
        assert!(!files.has(Kept::Page, &[1]));
        assert!(folder.path().join("notes.txt").exists());
        files.write(Kept::Page, &[99], || Ok(vec![0; 5000]));
        assert!(!files.has(Kept::Page, &[99]), "more than all");
        let smaller = open(folder.path(), 1000);
        assert!(smaller.bytes <= 1000);
    }

    #[test]
    fn what_cannot_be_written_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = open(folder.path(), 1 << 20);
        fs::remove_dir(folder.path()).unwrap();
        files.write(Kept::Page, &[1], || Ok(vec![0; 10]));
        files.write(Kept::Page, &[2], || Ok(vec![0; 10]));
        let notes = files.take_notes();
        assert!(
            notes.len() == 1 && notes[0].contains("is not kept"),
            "{notes:?}"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(KeptFiles::open(file.path(), 1, String::new()).is_err());
    }
}
