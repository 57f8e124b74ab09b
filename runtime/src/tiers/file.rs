//! The slow tier as files: reader threads keep many reads in flight while other threads compute.
//!
//! A request reads some [spans](Span) into one buffer. Each span is cut at 1 MiB into
//! jobs, which the readers take in order of [priority](Priority). Files may be on several drives, each
//! with readers of its own, so that a slow drive keeps none of another one's readers.
//!
//! Direct I/O (`O_DIRECT`) reads whole pages only. They go straight into the buffer where it has
//! room for them at an aligned address. Otherwise they go through the reader's own page-aligned
//! bounce buffer, at the price of a copy.

mod check;
mod clock;
mod drive;
mod finish;
mod stream;

pub use check::{SliceChecksum, compare};
pub use clock::DriveUse;
pub use finish::{BandsInBuffer, Finish};
pub use stream::stream;

use super::arena::{Arena, ArenaSlice};
use super::source::{ALIGN, ReadAt, Source};
pub use super::source::{ReadError, ReadMode};
use drive::{Drive, READER_THREADS, read_loop};
use std::cell::UnsafeCell;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tier_plan_formats::gguf::TensorInfo;

/// Most bytes that one read asks the system for.
const MAX_READ_BYTES: usize = 1 << 20;

/// A contiguous byte range of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Index of the file among those of the [`FileTier`].
    pub part: usize,
    /// Offset of the first byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: usize,
}

impl Extent {
    /// Returns the location of slice `index` of a tensor's `n` slices.
    pub fn of_slice(tensor: &TensorInfo, index: usize, n: usize) -> Self {
        let place = tensor.slice(index, n);
        Self {
            part: place.part,
            offset: place.offset,
            len: place.n_bytes as usize,
        }
    }

    /// Returns the distance of the first byte from the beginning of its page.
    pub fn head(&self) -> usize {
        (self.offset % ALIGN as u64) as usize
    }

    /// Returns the bytes of all pages that the extent touches.
    pub fn pages_bytes(&self) -> usize {
        (self.head() + self.len).next_multiple_of(ALIGN)
    }
}

/// An extent, and where in a buffer its bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The bytes that are read.
    pub extent: Extent,
    /// Offset of the extent's first byte in the buffer.
    pub at: usize,
    /// Whether the buffer has room for whole pages there: [`head`](Extent::head) bytes before `at`,
    /// and [`pages_bytes`](Extent::pages_bytes) in all. A read may overwrite all of that room.
    pub whole_pages: bool,
}

impl Span {
    /// Returns the range of the buffer that the read may write, or `None` if it begins before 0.
    fn writable(&self) -> Option<Range<usize>> {
        if self.whole_pages {
            let from = self.at.checked_sub(self.extent.head())?;
            Some(from..from.checked_add(self.extent.pages_bytes())?)
        } else {
            Some(self.at..self.at.checked_add(self.extent.len)?)
        }
    }
}

/// Order in which waiting reads are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// A computation waits for the read.
    Demand,
    /// A step that is about to begin will need the read. Served once no [demand](Self::Demand) read
    /// waits, beside those in flight, so that the device never runs empty between two steps.
    Next,
    /// The read may be useful later. Served only while no [demand](Self::Demand) read is pending.
    Idle,
    /// Served after all [idle](Self::Idle) reads, a few at once. Never canceled.
    Background,
}

/// The time that a request took: from its submission to the end of its last job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ReadTime {
    pub submitted: Instant,
    pub ended: Instant,
}

impl ReadTime {
    /// Returns the shortest time that covers both.
    pub fn union(self, other: Self) -> Self {
        Self {
            submitted: self.submitted.min(other.submitted),
            ended: self.ended.max(other.ended),
        }
    }

    /// Returns the time from submission to end.
    pub fn duration(self) -> Duration {
        self.ended - self.submitted
    }
}

/// A finished request. Its buffer comes back whether the read succeeded or not.
pub struct Completion {
    /// The key that was given to [`FileTier::submit`].
    pub key: u64,
    /// The request's buffer; its content is undefined after an error.
    pub buffer: ArenaSlice,
    /// Whether all bytes were read and have the expected checksums.
    pub result: Result<(), ReadError>,
    /// When the request was in flight.
    pub time: ReadTime,
}

/// A buffer that several jobs fill.
struct Request {
    key: u64,
    submitted: Instant,
    /// Taken out by the last job to end.
    buffer: UnsafeCell<Option<ArenaSlice>>,
    /// Address of the buffer's first byte.
    base: *mut u8,
    /// Jobs that have not ended.
    jobs_left: AtomicUsize,
    /// The first error of a job.
    error: Mutex<Option<ReadError>>,
    /// Done by the last job, once all bytes are there.
    finish: Finish,
}

// SAFETY: `base` points into `buffer`, which stays until the last job has ended. Jobs write
// disjoint ranges of it (checked in `submit_finished`). Only the last job touches `buffer` itself,
// after all others have counted themselves out of `jobs_left` (acquire-release).
unsafe impl Send for Request {}
// SAFETY: the fields that threads share are atomics, mutexes, or governed by the rule above.
unsafe impl Sync for Request {}

/// One read of a request.
struct Job {
    request: Arc<Request>,
    /// Index of the file.
    source: usize,
    /// Offset in the file, a multiple of the source's alignment.
    from: u64,
    /// Bytes to ask for, a multiple of the source's alignment.
    len: usize,
    /// Bytes from `from` on that must come; the file may end after them.
    need: usize,
    /// Bytes between `from` and the first wanted byte.
    skip: usize,
    /// Offset of the wanted bytes in the request's buffer.
    at: usize,
    /// Whether the read goes through the reader's bounce buffer.
    bounced: bool,
}

/// What readers and submitters share.
struct Shared {
    drives: Vec<Drive>,
    sources: Vec<Source>,
    /// `[sources]`: the drive that each is on.
    drive_of: Vec<usize>,
}

/// Something to read from, and the path that names it in errors.
#[allow(missing_docs)]
pub struct NamedReader {
    pub path: PathBuf,
    pub reader: Box<dyn ReadAt>,
}

/// Readers of files on one drive.
pub struct DriveReaders {
    /// The files, in the order of their indices.
    pub files: Vec<NamedReader>,
    /// Rate of the drive, in 10⁹ bytes per second. Only its relation to other drives' matters.
    pub read_gbps: f64,
}

/// Files on one drive.
#[derive(Debug, Clone)]
pub struct DriveFiles {
    /// Paths of the files, in the order of their indices.
    pub paths: Vec<PathBuf>,
    /// How they are read.
    pub mode: ReadMode,
    /// As in [`DriveReaders`].
    pub read_gbps: f64,
}

/// Open files with the threads that read them.
pub struct FileTier {
    shared: Arc<Shared>,
    sender: Sender<Completion>,
    completions: Receiver<Completion>,
    readers: Vec<JoinHandle<()>>,
}

impl FileTier {
    /// Opens the files and starts the reader threads.
    ///
    /// # Errors
    /// When a file can't be opened, or the system allows no thread.
    pub fn open(paths: &[PathBuf], mode: ReadMode) -> Result<Self, ReadError> {
        Self::open_on(&[DriveFiles {
            paths: paths.to_vec(),
            mode,
            read_gbps: 1.0,
        }])
    }

    /// Opens files on several drives, and starts the reader threads of each. The files of the first
    /// drive have the first indices, and so on.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(drives: &[DriveFiles]) -> Result<Self, ReadError> {
        let mut all = Vec::new();
        for drive in drives {
            let open = |path: &PathBuf| Source::open(path, drive.mode);
            let sources = drive.paths.iter().map(open).collect::<Result<_, _>>()?;
            all.push((sources, drive.read_gbps));
        }
        Self::start(all)
    }

    /// Starts reader threads over anything that implements [`ReadAt`].
    ///
    /// # Errors
    /// When a reader has no [stamp](ReadAt::stamp).
    pub fn from_readers(readers: Vec<NamedReader>) -> Result<Self, ReadError> {
        Self::from_drives(vec![DriveReaders {
            files: readers,
            read_gbps: 1.0,
        }])
    }

    /// Starts reader threads like [`open_on`](Self::open_on), over anything that implements
    /// [`ReadAt`].
    ///
    /// # Errors
    /// As [`from_readers`](Self::from_readers).
    pub fn from_drives(drives: Vec<DriveReaders>) -> Result<Self, ReadError> {
        let source = |named: NamedReader| Source::new(&named.path, named.reader);
        let mut all = Vec::new();
        for drive in drives {
            let sources = drive.files.into_iter().map(source);
            all.push((sources.collect::<Result<_, _>>()?, drive.read_gbps));
        }
        Self::start(all)
    }

    fn start(all: Vec<(Vec<Source>, f64)>) -> Result<Self, ReadError> {
        let (mut drives, mut sources, mut drive_of) = (Vec::new(), Vec::new(), Vec::new());
        for (of_drive, read_gbps) in all {
            drive_of.extend(std::iter::repeat_n(drives.len(), of_drive.len()));
            sources.extend(of_drive);
            drives.push(Drive::new(read_gbps));
        }
        let n_drives = drives.len();
        let shared = Arc::new(Shared {
            drives,
            sources,
            drive_of,
        });
        let (sender, completions) = channel();
        let start = |drive, i| {
            let (shared, sender) = (Arc::clone(&shared), sender.clone());
            std::thread::Builder::new()
                .name(format!("read-{drive}.{i}"))
                .spawn(move || read_loop(&shared, drive, &sender))
        };
        let mut readers = Vec::new();
        for drive in 0..n_drives {
            // Fewer readers are slower; without any, no request would ever complete.
            readers.push(start(drive, 0).map_err(ReadError::Thread)?);
            readers.extend((1..READER_THREADS).map_while(|i| start(drive, i).ok()));
        }
        Ok(Self {
            shared,
            sender,
            completions,
            readers,
        })
    }

    /// Returns the seconds after which `bytes` of a file that are requested now will have been read, by
    /// what its drive still has to read and the rate of that drive.
    pub fn seconds_until_read(&self, part: usize, bytes: u64) -> f64 {
        self.shared.drives[self.shared.drive_of[part]].seconds_until(bytes)
    }

    /// Returns the most memory, in bytes, that the reader threads of one drive take beside the callers'
    /// buffers.
    pub fn working_bytes() -> u64 {
        // Per thread: a bounce buffer, and the part of its stack that it touches.
        READER_THREADS as u64 * (MAX_READ_BYTES + 2 * ALIGN + (16 << 10)) as u64
    }

    /// Whether any file is read with direct I/O, so that buffers with room for whole pages save a
    /// copy.
    pub fn is_direct(&self) -> bool {
        self.shared.sources.iter().any(|s| s.alignment() > 1)
    }

    /// Returns what all reads so far brought, and how long they took.
    pub fn usage(&self) -> DriveUse {
        let now = Instant::now();
        let drives = self.shared.drives.iter().map(|drive| drive.usage(now));
        drives.fold(DriveUse::default(), |mut all, one| {
            all += one;
            all
        })
    }

    /// Fails if a file has changed since it was opened.
    ///
    /// # Errors
    /// [`ReadError::Changed`].
    pub fn check(&self) -> Result<(), ReadError> {
        self.shared.sources.iter().try_for_each(Source::check)
    }

    /// Submits a request that reads the spans into `into`; [`wait`](Self::wait) gives the buffer
    /// back.
    ///
    /// # Panics
    /// When a span does not fit the buffer, or two overlap.
    pub fn submit(&self, key: u64, spans: &[Span], into: ArenaSlice, priority: Priority) {
        self.submit_finished(key, spans, Finish::default(), into, priority);
    }

    /// Submits a request like [`submit`](Self::submit) whose bytes are finished once they are
    /// there. The request completes with [`ReadError::Damaged`] if a checksum differs.
    ///
    /// # Panics
    /// When a span does not fit the buffer, two overlap, or `finish` reaches past the buffer.
    pub fn submit_finished(
        &self,
        key: u64,
        spans: &[Span],
        finish: Finish,
        mut into: ArenaSlice,
        priority: Priority,
    ) {
        let fitting = |s: &Span| s.writable().filter(|range| range.end <= into.len());
        let writable = |s: &Span| fitting(s).unwrap_or_else(|| panic!("{s:?} in {}", into.len()));
        let mut ranges: Vec<Range<usize>> = spans.iter().map(writable).collect();
        ranges.sort_by_key(|r| r.start);
        assert!(
            ranges.windows(2).all(|w| w[0].end <= w[1].start),
            "{spans:?} overlap"
        );
        assert!(finish.fits(into.len()), "{finish:?} in {}", into.len());
        let base = into.as_mut_ptr();
        let request = Arc::new(Request {
            key,
            submitted: Instant::now(),
            buffer: UnsafeCell::new(Some(into)),
            base,
            jobs_left: AtomicUsize::new(0),
            error: Mutex::default(),
            finish,
        });
        let jobs: Vec<Job> = spans
            .iter()
            .flat_map(|span| self.jobs(&request, span))
            .collect();
        request.jobs_left.store(jobs.len(), Ordering::Release);
        if jobs.is_empty() {
            self.sender
                .send(finished(&request))
                .unwrap_or_else(|_| unreachable!("the receiver is in this value"));
            return;
        }
        // An expert is on one drive, as a rule.
        let mut jobs = jobs;
        while let Some(drive) = jobs.first().map(|job| self.shared.drive_of[job.source]) {
            let of_drive = |job: &Job| self.shared.drive_of[job.source] == drive;
            let (here, elsewhere) = jobs.into_iter().partition(of_drive);
            self.shared.drives[drive].submit(here, priority);
            jobs = elsewhere;
        }
    }

    /// Cuts a span into jobs of at most [`MAX_READ_BYTES`].
    fn jobs(&self, request: &Arc<Request>, span: &Span) -> Vec<Job> {
        let Extent { part, offset, len } = span.extent;
        let align = self.shared.sources[part].alignment() as u64;
        let end = offset + len as u64;
        let mut jobs = Vec::with_capacity(len.div_ceil(MAX_READ_BYTES) + 1);
        let mut from = offset / align * align;
        while from < end {
            let to = (from + MAX_READ_BYTES as u64).min(end);
            let skip = offset.saturating_sub(from) as usize;
            let at = span.at + (from.max(offset) - offset) as usize;
            // With whole pages the head lies in the buffer, as `submit_finished` has checked.
            let in_place = align == 1
                || (span.whole_pages && (request.base as usize + at - skip).is_multiple_of(ALIGN));
            let need = (to - from) as usize;
            let request = Arc::clone(request);
            let len = need.next_multiple_of(align as usize);
            jobs.push(Job {
                request,
                source: part,
                from,
                len,
                need,
                skip,
                at,
                bounced: !in_place,
            });
            from = to;
        }
        jobs
    }

    /// Promotes the requests with these keys that wait at the priorities [next](Priority::Next) and
    /// [idle](Priority::Idle) to [demand](Priority::Demand), and cancels the jobs of all others there
    /// that have not begun.
    ///
    /// A canceled request still completes, with [`ReadError::Stopped`].
    pub fn resolve_predicted(&self, promoted: &[u64]) {
        let drives = self.shared.drives.iter();
        for job in drives.flat_map(|drive| drive.promote(promoted)) {
            lock(&job.request.error).get_or_insert(ReadError::Stopped);
            if job.request.jobs_left.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.sender
                    .send(finished(&job.request))
                    .unwrap_or_else(|_| unreachable!("the receiver is in this value"));
            }
        }
    }

    /// Waits for the next finished request, in the order in which they finish.
    ///
    /// # Errors
    /// [`ReadError::Stopped`] when no reader thread runs. A failed read is no error of this call.
    pub fn wait(&self) -> Result<Completion, ReadError> {
        if self.readers.is_empty() {
            return Err(ReadError::Stopped);
        }
        self.completions.recv().map_err(|_| ReadError::Stopped)
    }

    /// Returns a request that has already finished, if there is one.
    pub fn poll(&self) -> Option<Completion> {
        self.completions.try_recv().ok()
    }

    /// Reads the spans and waits for them. May be called only while nothing else is in flight.
    ///
    /// # Errors
    /// When the read fails.
    pub fn read(&self, spans: &[Span], into: ArenaSlice) -> Result<ArenaSlice, ReadError> {
        self.read_finished(spans, Finish::default(), into)
    }

    /// Reads the spans like [`read`](Self::read) and finishes the bytes.
    ///
    /// # Errors
    /// When the read fails, or a checksum differs.
    pub fn read_finished(
        &self,
        spans: &[Span],
        finish: Finish,
        into: ArenaSlice,
    ) -> Result<ArenaSlice, ReadError> {
        self.submit_finished(0, spans, finish, into, Priority::Demand);
        let completion = self.wait()?;
        completion.result.map(|()| completion.buffer)
    }
}

impl Drop for FileTier {
    fn drop(&mut self) {
        self.shared.drives.iter().for_each(Drive::close);
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Finishes a request's bytes. Called by its last job, before it gives back the buffer.
fn finish(sources: &[Source], request: &Request) {
    let mut error = lock(&request.error);
    if error.is_some() {
        return;
    }
    // SAFETY: no job is left, so no other thread touches the buffer.
    let buffer = unsafe { (*request.buffer.get()).as_mut() };
    let buffer = buffer.unwrap_or_else(|| unreachable!("a request has its buffer until it ends"));
    *error = request.finish.run(buffer, sources).err();
}

/// Takes a finished request's buffer and result. Called by its last job.
fn finished(request: &Request) -> Completion {
    // SAFETY: no job is left, so no other thread touches the buffer.
    let buffer = unsafe { (*request.buffer.get()).take() };
    let buffer = buffer.unwrap_or_else(|| unreachable!("a request ends once"));
    let result = lock(&request.error).take().map_or(Ok(()), Err);
    let time = ReadTime {
        submitted: request.submitted,
        ended: Instant::now(),
    };
    Completion {
        key: request.key,
        buffer,
        result,
        time,
    }
}

/// Reads for one job; `bounce` is the reader's own buffer, allocated when it is first needed.
fn run(source: &Source, job: &Job, bounce: &mut Option<ArenaSlice>) -> Result<(), ReadError> {
    if !job.bounced {
        // SAFETY: `submit_finished` has checked that the span's writable range lies in the buffer
        // and overlaps no other span's. Jobs of one span are consecutive parts of it. The buffer
        // lives until this job has counted itself out.
        let into = unsafe {
            std::slice::from_raw_parts_mut(job.request.base.add(job.at - job.skip), job.len)
        };
        return source.fill(job.from, into, job.need);
    }
    let bounce = match bounce {
        Some(buffer) => buffer,
        None => {
            let allocated = Arena::new("", (MAX_READ_BYTES + ALIGN) as u64)
                .and_then(|mut arena| arena.take(MAX_READ_BYTES + ALIGN));
            let allocated = allocated.map_err(|_| {
                source.error(job.from, job.len, std::io::ErrorKind::OutOfMemory.into())
            })?;
            bounce.insert(allocated)
        }
    };
    source.fill(job.from, &mut bounce[..job.len], job.need)?;
    let wanted = &bounce[job.skip..job.need];
    // SAFETY: the range holds the job's wanted bytes only, which lie in its span; the rest as
    // above.
    let into =
        unsafe { std::slice::from_raw_parts_mut(job.request.base.add(job.at), wanted.len()) };
    into.copy_from_slice(wanted);
    Ok(())
}

#[cfg(test)]
mod tests;
