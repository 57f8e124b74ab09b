//! The slow tier as files: reads run on threads of their own, so that many are in flight while others compute.
//!
//! A request reads some [spans](Span) into one buffer. Each is cut at [`CHUNK`] into jobs that the readers take in
//! order. Past the page cache only whole pages are read: into place where the buffer has room for them at the right
//! address, otherwise by way of a reader's own page-aligned buffer, at the price of a copy.

mod check;
mod stream;

pub use check::{Check, compare};
pub use stream::stream;

use super::arena::{Arena, Piece};
use super::source::{ALIGN, ReadAt, Source};
pub use super::source::{ReadError, ReadMode};
use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

/// Reads that may be in flight at once: enough for a drive that is fast only when asked for much, and threads that wait
/// for a drive cost little.
const READERS: usize = 16;

/// Most bytes of one read.
const CHUNK: usize = 1 << 20;

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

impl Extent {
    /// Bytes from the beginning of the page that the first byte is in.
    pub fn head(&self) -> usize {
        (self.offset % ALIGN as u64) as usize
    }

    /// Bytes of the pages that it touches.
    pub fn pages_bytes(&self) -> usize {
        (self.head() + self.len).next_multiple_of(ALIGN)
    }
}

/// Where in a buffer an extent's bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// What is read.
    pub extent: Extent,
    /// Its first byte's place in the buffer.
    pub at: usize,
    /// Whether the buffer has room for whole pages there: the [`head`](Extent::head) before `at`, and
    /// [`pages_bytes`](Extent::pages_bytes) in all. What is in that room besides the extent's bytes may be overwritten.
    pub whole_pages: bool,
}

impl Span {
    /// The part of the buffer that the read may write.
    fn room(&self) -> Option<Range<usize>> {
        if self.whole_pages {
            let from = self.at.checked_sub(self.extent.head())?;
            Some(from..from.checked_add(self.extent.pages_bytes())?)
        } else {
            Some(self.at..self.at.checked_add(self.extent.len)?)
        }
    }
}

/// Which of the waiting reads come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// Somebody waits for it.
    Now,
    /// It may be of use later; done while nothing that somebody waits for is being read.
    Idle,
    /// As [`Idle`](Self::Idle), but after all of those, a few at once, and never given up.
    Background,
}

/// [Background](Urgency::Background) reads that are done at once, so that what is asked for meanwhile finds the device
/// little occupied.
const BACKGROUND: usize = 2;

/// A finished read: its buffer comes back filled, or with the reason why not.
pub struct Arrival {
    /// What [`FileTier::submit`] was given.
    pub key: u64,
    /// The buffer.
    pub piece: Piece,
    /// Whether the bytes are good.
    pub result: Result<(), ReadError>,
    /// From its submission to the end of its last part.
    pub during: (Instant, Instant),
}

/// A buffer being filled by several jobs.
struct Request {
    key: u64,
    submitted: Instant,
    /// Taken out by the last job to end.
    piece: UnsafeCell<Option<Piece>>,
    /// Start of the piece.
    base: *mut u8,
    /// Jobs that have not ended.
    left: AtomicUsize,
    error: Mutex<Option<ReadError>>,
    /// What the bytes must be once they have all come.
    checks: Vec<Check>,
}

// SAFETY: `base` points into `piece`, which stays until the last job has ended; jobs write disjoint ranges of it (checked
// in `submit`), and `piece` itself is touched by the last job only, after all others (`left`).
unsafe impl Send for Request {}
// SAFETY: as above.
unsafe impl Sync for Request {}

/// One read.
struct Job {
    request: Arc<Request>,
    source: usize,
    /// Offset in the file, a multiple of the source's alignment.
    from: u64,
    /// Bytes to ask for, likewise.
    len: usize,
    /// Bytes from `from` on that must come; the file may end after them.
    need: usize,
    /// Bytes before the wanted ones: to be left out when they are copied.
    skip: usize,
    /// Where the wanted bytes go in the request's buffer.
    at: usize,
    /// Whether the read goes by way of the reader's buffer.
    copied: bool,
}

#[derive(Default)]
struct Queue {
    now: VecDeque<Job>,
    idle: VecDeque<Job>,
    background: VecDeque<Job>,
    /// Jobs of `now` that are being done.
    busy: usize,
    /// Jobs of `background` that are being done.
    behind: usize,
    closed: bool,
}

impl Queue {
    /// The next job, and whether somebody waits for it. What nobody waits for is left while anything else is read.
    fn next(&mut self) -> Option<(Job, Urgency)> {
        if let Some(job) = self.now.pop_front() {
            self.busy += 1;
            return Some((job, Urgency::Now));
        }
        if self.busy > 0 {
            return None;
        }
        if let Some(job) = self.idle.pop_front() {
            return Some((job, Urgency::Idle));
        }
        if self.behind >= BACKGROUND {
            return None;
        }
        let job = self.background.pop_front()?;
        self.behind += 1;
        Some((job, Urgency::Background))
    }

    /// Counts a job out; whether others may begin for that.
    fn end(&mut self, urgency: Urgency) -> bool {
        match urgency {
            Urgency::Now => self.busy -= 1,
            Urgency::Idle => {}
            Urgency::Background => self.behind -= 1,
        }
        self.busy == 0 && !(self.idle.is_empty() && self.background.is_empty())
    }
}

struct Shared {
    queue: Mutex<Queue>,
    ready: Condvar,
    sources: Vec<Source>,
}

/// Files that expert-sized pieces are read from.
pub struct FileTier {
    shared: Arc<Shared>,
    sender: Sender<Arrival>,
    arrivals: Receiver<Arrival>,
    readers: Vec<JoinHandle<()>>,
}

impl FileTier {
    /// Opens the files and starts the readers.
    pub fn open(paths: &[PathBuf], mode: ReadMode) -> Result<Self, ReadError> {
        Ok(Self::start(paths.iter().map(|path| Source::open(path, mode)).collect::<Result<_, _>>()?))
    }

    /// The same over anything that can be read, with its name for errors.
    pub fn of(sources: Vec<(PathBuf, Box<dyn ReadAt>)>) -> Result<Self, ReadError> {
        let source = |(path, reader): (PathBuf, _)| Source::new(&path, reader);
        Ok(Self::start(sources.into_iter().map(source).collect::<Result<_, _>>()?))
    }

    fn start(sources: Vec<Source>) -> Self {
        let shared = Arc::new(Shared { queue: Mutex::default(), ready: Condvar::new(), sources });
        let (sender, arrivals) = channel();
        let readers = (0..READERS)
            .filter_map(|i| {
                let (shared, sender) = (Arc::clone(&shared), sender.clone());
                std::thread::Builder::new().name(format!("read-{i}")).spawn(move || read_loop(&shared, &sender)).ok()
            })
            .collect();
        Self { shared, sender, arrivals, readers }
    }

    /// Bytes of memory that the readers have of their own, at most.
    pub fn working_bytes() -> u64 {
        // A buffer each, and the part of its stack that a thread touches.
        READERS as u64 * (CHUNK + 2 * ALIGN + (16 << 10)) as u64
    }

    /// Whether reads go past the page cache, so that buffers with room for whole pages spare a copy.
    pub fn is_direct(&self) -> bool {
        self.shared.sources.iter().any(|s| s.alignment() > 1)
    }

    /// Fails if a file is not what it was when it was opened.
    pub fn check(&self) -> Result<(), ReadError> {
        self.shared.sources.iter().try_for_each(Source::check)
    }

    /// Reads the spans into `into`; [`wait`](Self::wait) gives it back.
    ///
    /// # Panics
    /// When a span does not fit the buffer, or two overlap.
    pub fn submit(&self, key: u64, spans: &[Span], into: Piece, urgency: Urgency) {
        self.submit_checked(key, spans, Vec::new(), into, urgency);
    }

    /// The same, where what was read must have these checksums: it comes back with an error otherwise.
    ///
    /// # Panics
    /// As [`submit`](Self::submit), and when a check reaches past the buffer.
    pub fn submit_checked(&self, key: u64, spans: &[Span], checks: Vec<Check>, mut into: Piece, urgency: Urgency) {
        let mut rooms: Vec<Range<usize>> = spans
            .iter()
            .map(|s| s.room().filter(|r| r.end <= into.len()).unwrap_or_else(|| panic!("{s:?} in {}", into.len())))
            .collect();
        rooms.sort_by_key(|r| r.start);
        assert!(rooms.windows(2).all(|w| w[0].end <= w[1].start), "{spans:?} overlap");
        let fits = |c: &Check| c.at.checked_add(c.extent.len).is_some_and(|end| end <= into.len());
        assert!(checks.iter().all(fits), "{checks:?} in {}", into.len());
        let base = into.as_mut_ptr();
        let request = Arc::new(Request {
            key,
            submitted: Instant::now(),
            piece: UnsafeCell::new(Some(into)),
            base,
            left: AtomicUsize::new(0),
            error: Mutex::default(),
            checks,
        });
        let jobs: Vec<Job> = spans.iter().flat_map(|span| self.jobs(&request, span)).collect();
        request.left.store(jobs.len(), Ordering::Release);
        if jobs.is_empty() {
            self.sender.send(finished(&request)).unwrap_or_else(|_| unreachable!("the receiver is in this value"));
            return;
        }
        let mut queue = lock(&self.shared.queue);
        let queue = match urgency {
            Urgency::Now => &mut queue.now,
            Urgency::Idle => &mut queue.idle,
            Urgency::Background => &mut queue.background,
        };
        let n = jobs.len();
        queue.extend(jobs);
        for _ in 0..n.min(READERS) {
            self.shared.ready.notify_one();
        }
    }

    /// Cuts a span into reads.
    fn jobs(&self, request: &Arc<Request>, span: &Span) -> Vec<Job> {
        let Extent { part, offset, len } = span.extent;
        let align = self.shared.sources[part].alignment() as u64;
        let end = offset + len as u64;
        let mut jobs = Vec::with_capacity(len.div_ceil(CHUNK) + 1);
        let mut from = offset / align * align;
        while from < end {
            let to = (from + CHUNK as u64).min(end);
            let skip = offset.saturating_sub(from) as usize;
            let at = span.at + (from.max(offset) - offset) as usize;
            // With whole pages the head lies in the buffer, as `submit` checked.
            let in_place =
                align == 1 || (span.whole_pages && (request.base as usize + at - skip).is_multiple_of(ALIGN));
            let need = (to - from) as usize;
            let request = Arc::clone(request);
            let len = need.next_multiple_of(align as usize);
            jobs.push(Job { request, source: part, from, len, need, skip, at, copied: !in_place });
            from = to;
        }
        jobs
    }

    /// Decides about the [idle](Urgency::Idle) reads that have not begun: those with these keys are wanted now, all others
    /// no longer. Requests come back all the same, those that are cut short with an error.
    pub fn settle_idle(&self, wanted: &[u64]) {
        let mut queue = lock(&self.shared.queue);
        let idle = std::mem::take(&mut queue.idle);
        let (kept, cancelled): (Vec<Job>, Vec<Job>) = idle.into_iter().partition(|j| wanted.contains(&j.request.key));
        let n = kept.len();
        queue.now.extend(kept);
        drop(queue);
        for _ in 0..n.min(READERS) {
            self.shared.ready.notify_one();
        }
        for job in cancelled {
            lock(&job.request.error).get_or_insert(ReadError::Stopped);
            if job.request.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.sender
                    .send(finished(&job.request))
                    .unwrap_or_else(|_| unreachable!("the receiver is in this value"));
            }
        }
    }

    /// The next finished read, in whatever order they finish.
    pub fn wait(&self) -> Result<Arrival, ReadError> {
        if self.readers.is_empty() {
            return Err(ReadError::Stopped);
        }
        self.arrivals.recv().map_err(|_| ReadError::Stopped)
    }

    /// A read that has finished already, if there is one.
    pub fn poll(&self) -> Option<Arrival> {
        self.arrivals.try_recv().ok()
    }

    /// Reads the spans and waits for them; only while nothing else is in flight.
    pub fn read(&self, spans: &[Span], into: Piece) -> Result<Piece, ReadError> {
        self.read_checked(spans, Vec::new(), into)
    }

    /// The same, where what was read must have these checksums.
    pub fn read_checked(&self, spans: &[Span], checks: Vec<Check>, into: Piece) -> Result<Piece, ReadError> {
        self.submit_checked(0, spans, checks, into, Urgency::Now);
        let arrival = self.wait()?;
        arrival.result.map(|()| arrival.piece)
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

/// Compares what was read with its checksums; for the last job of a request, before it gives back the buffer.
fn verify(sources: &[Source], request: &Request) {
    let mut error = lock(&request.error);
    if error.is_some() || request.checks.is_empty() {
        return;
    }
    // SAFETY: no job is left, so nobody else touches the piece.
    let piece = unsafe { (*request.piece.get()).as_ref() };
    let piece = piece.unwrap_or_else(|| unreachable!("a request has its buffer until it ends"));
    *error = request.checks.iter().find_map(|check| check.of(piece, &sources[check.extent.part]).err());
}

/// What the last job of a request gives back.
fn finished(request: &Request) -> Arrival {
    // SAFETY: no job is left, so nobody else touches the piece.
    let piece = unsafe { (*request.piece.get()).take() };
    let piece = piece.unwrap_or_else(|| unreachable!("a request ends once"));
    let result = lock(&request.error).take().map_or(Ok(()), Err);
    Arrival { key: request.key, piece, result, during: (request.submitted, Instant::now()) }
}

fn read_loop(shared: &Shared, arrivals: &Sender<Arrival>) {
    let mut buffer = None;
    loop {
        let mut queue = lock(&shared.queue);
        let (job, urgency) = loop {
            if queue.closed {
                return;
            }
            match queue.next() {
                Some(next) => break next,
                None => queue = shared.ready.wait(queue).unwrap_or_else(|e| e.into_inner()),
            }
        };
        drop(queue);
        let spoilt = lock(&job.request.error).is_some();
        if !spoilt && let Err(error) = run(&shared.sources[job.source], &job, &mut buffer) {
            lock(&job.request.error).get_or_insert(error);
        }
        if lock(&shared.queue).end(urgency) {
            shared.ready.notify_all();
        }
        if job.request.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            verify(&shared.sources, &job.request);
            if arrivals.send(finished(&job.request)).is_err() {
                return;
            }
        }
    }
}

/// Reads for one job; `buffer` is the reader's own, made when it is first needed.
fn run(source: &Source, job: &Job, buffer: &mut Option<Piece>) -> Result<(), ReadError> {
    if !job.copied {
        // SAFETY: `submit` checked that the span's room lies in the piece and overlaps no other's; jobs of one span are
        // consecutive parts of it. The piece lives until this job has counted itself out.
        let into = unsafe { std::slice::from_raw_parts_mut(job.request.base.add(job.at - job.skip), job.len) };
        return source.fill(job.from, into, job.need);
    }
    let own = match buffer {
        Some(piece) => piece,
        None => {
            let made = Arena::new("", (CHUNK + ALIGN) as u64).and_then(|mut arena| arena.take(CHUNK + ALIGN));
            let made = made.map_err(|_| source.error(job.from, job.len, std::io::ErrorKind::OutOfMemory.into()))?;
            buffer.insert(made)
        }
    };
    source.fill(job.from, &mut own[..job.len], job.need)?;
    let wanted = &own[job.skip..job.need];
    // SAFETY: as above; the wanted bytes alone fit the span.
    let into = unsafe { std::slice::from_raw_parts_mut(job.request.base.add(job.at), wanted.len()) };
    into.copy_from_slice(wanted);
    Ok(())
}

#[cfg(test)]
mod tests;
