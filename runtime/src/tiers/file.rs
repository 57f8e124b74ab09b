//! The slow tier as files: reads run on threads of their own, so that several are in flight while others compute.

use super::arena::Piece;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use thiserror::Error;

/// Reads that may be in flight at once.
const READERS: usize = 4;

/// A read that failed.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The system refused.
    #[error("{}: reading {len} bytes at offset {offset}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// How much.
        len: usize,
        /// What the system said.
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
    /// The threads that read are gone.
    #[error("the reader threads have stopped")]
    Stopped,
}

/// A stretch of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Index of the file.
    pub part: usize,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

struct Request {
    key: u64,
    extents: Vec<Extent>,
    into: Piece,
}

/// A finished read: its buffer comes back filled, or with the reason why not.
pub struct Arrival {
    /// What [`FileTier::submit`] was given.
    pub key: u64,
    /// The buffer.
    pub piece: Piece,
    /// Whether the bytes are good.
    pub result: Result<(), ReadError>,
}

#[derive(Default)]
struct Queue {
    requests: VecDeque<Request>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
    files: Vec<(PathBuf, File)>,
}

/// Files that expert-sized pieces are read from.
pub struct FileTier {
    shared: Arc<Shared>,
    arrivals: Receiver<Arrival>,
    readers: Vec<JoinHandle<()>>,
}

impl FileTier {
    /// Opens the files and starts the readers.
    pub fn open(paths: &[PathBuf]) -> Result<Self, ReadError> {
        let open = |path: &PathBuf| {
            let file = File::open(path).map_err(|source| ReadError::Open { path: path.clone(), r#source })?;
            Ok((path.clone(), file))
        };
        let files = paths.iter().map(open).collect::<Result<_, ReadError>>()?;
        let shared = Arc::new(Shared { queue: Mutex::default(), ready: Condvar::new(), files });
        let (sender, arrivals) = channel();
        let readers = (0..READERS)
            .filter_map(|i| {
                let (shared, sender) = (Arc::clone(&shared), sender.clone());
                std::thread::Builder::new().name(format!("read-{i}")).spawn(move || read_loop(&shared, &sender)).ok()
            })
            .collect();
        Ok(Self { shared, arrivals, readers })
    }

    /// Reads the extents one after the other into `into`, whose length is their sum; [`wait`](Self::wait) gives it back.
    pub fn submit(&self, key: u64, extents: Vec<Extent>, into: Piece) {
        debug_assert_eq!(extents.iter().map(|e| e.len).sum::<usize>(), into.len());
        lock(&self.shared.queue).requests.push_back(Request { key, extents, into });
        self.shared.ready.notify_one();
    }

    /// The next finished read, in whatever order they finish.
    pub fn wait(&self) -> Result<Arrival, ReadError> {
        self.arrivals.recv().map_err(|_| ReadError::Stopped)
    }

    /// Reads an extent on the calling thread.
    pub fn read_now(&self, extent: Extent, into: &mut [u8]) -> Result<(), ReadError> {
        read(&self.shared.files, extent, into)
    }
}

impl Drop for FileTier {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.ready.notify_all();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn read_loop(shared: &Shared, arrivals: &Sender<Arrival>) {
    loop {
        let mut queue = lock(&shared.queue);
        let request = loop {
            if queue.closed {
                return;
            }
            match queue.requests.pop_front() {
                Some(request) => break request,
                None => queue = shared.ready.wait(queue).unwrap_or_else(|e| e.into_inner()),
            }
        };
        drop(queue);
        let Request { key, extents, into: mut piece } = request;
        let mut at = 0;
        let result = extents.iter().try_for_each(|extent| {
            let target = &mut piece[at..at + extent.len];
            at += extent.len;
            read(&shared.files, *extent, target)
        });
        if arrivals.send(Arrival { key, piece, result }).is_err() {
            return;
        }
    }
}

fn read(files: &[(PathBuf, File)], extent: Extent, into: &mut [u8]) -> Result<(), ReadError> {
    let (path, file) = &files[extent.part];
    read_exact_at(file, into, extent.offset).map_err(|source| ReadError::Io {
        path: path.clone(),
        offset: extent.offset,
        len: extent.len,
        r#source,
    })
}

#[cfg(unix)]
fn read_exact_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, into, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !into.is_empty() {
        match file.seek_read(into, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                into = &mut into[n..];
                offset += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::arena::Arena;
    use super::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn many_reads_come_back_with_their_own_bytes() {
        let content: Vec<u8> = (0..=255).collect();
        let file = file(&content);
        let tier = FileTier::open(&[file.path().to_path_buf()]).unwrap();
        let mut arena = Arena::new("dram", 1000).unwrap();
        for key in 0..50u64 {
            let extents = vec![Extent { part: 0, offset: key, len: 5 }, Extent { part: 0, offset: 200, len: 5 }];
            tier.submit(key, extents, arena.take(10).unwrap());
        }
        let mut seen = [false; 50];
        for _ in 0..50 {
            let arrival = tier.wait().unwrap();
            arrival.result.unwrap();
            let first = arrival.key as u8;
            assert_eq!(arrival.piece[0], first);
            assert_eq!(arrival.piece[4], first + 4);
            assert_eq!(arrival.piece[5], 200);
            seen[arrival.key as usize] = true;
        }
        assert!(seen.iter().all(|s| *s));
    }

    #[test]
    fn a_short_file_is_named_with_the_offset() {
        let file = file(&[0; 10]);
        let tier = FileTier::open(&[file.path().to_path_buf()]).unwrap();
        let mut arena = Arena::new("dram", 8).unwrap();
        tier.submit(1, vec![Extent { part: 0, offset: 6, len: 8 }], arena.take(8).unwrap());
        let message = tier.wait().unwrap().result.unwrap_err().to_string();
        assert!(message.contains(&file.path().display().to_string()), "{message}");
        assert!(message.contains("offset 6"), "{message}");
    }
}
