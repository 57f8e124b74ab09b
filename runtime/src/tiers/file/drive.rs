//! One drive: the reads that wait for it, and the threads that make them.

use super::clock::{DriveClock, DriveUse};
use super::{Completion, Job, Priority, Shared, finish, finished, lock, run};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Condvar, Mutex};
use std::time::Instant;

/// Reader threads per drive, and so reads in flight at once. Drives reach their rate only at high
/// queue depths, and a thread that waits for a drive costs little.
pub(super) const READER_THREADS: usize = 16;

/// [Background](Priority::Background) reads in flight at once: few, so that a demand read that
/// comes meanwhile finds the device nearly idle.
const MAX_BACKGROUND_READS: usize = 2;

/// Waiting jobs by priority, and what the readers are doing.
#[derive(Default)]
struct Queue {
    demand: VecDeque<Job>,
    next: VecDeque<Job>,
    idle: VecDeque<Job>,
    background: VecDeque<Job>,
    demand_in_flight: usize,
    background_in_flight: usize,
    clock: DriveClock,
    closed: bool,
}

impl Queue {
    /// Takes the next job with its priority. Returns `None` while a demand read is in flight and only
    /// idle and background reads wait, which must not delay it.
    fn take(&mut self) -> Option<(Job, Priority)> {
        if let Some(job) = self.demand.pop_front() {
            self.demand_in_flight += 1;
            return Some((job, Priority::Demand));
        }
        if let Some(job) = self.next.pop_front() {
            return Some((job, Priority::Next));
        }
        if self.demand_in_flight > 0 {
            return None;
        }
        if let Some(job) = self.idle.pop_front() {
            return Some((job, Priority::Idle));
        }
        if self.background_in_flight >= MAX_BACKGROUND_READS {
            return None;
        }
        let job = self.background.pop_front()?;
        self.background_in_flight += 1;
        Some((job, Priority::Background))
    }

    /// Counts a finished job out. Returns whether lower-priority jobs may begin now.
    fn end(&mut self, priority: Priority) -> bool {
        match priority {
            Priority::Demand => self.demand_in_flight -= 1,
            Priority::Next | Priority::Idle => {}
            Priority::Background => self.background_in_flight -= 1,
        }
        self.demand_in_flight == 0 && !(self.idle.is_empty() && self.background.is_empty())
    }
}

/// A drive, which several files may be on.
pub(super) struct Drive {
    queue: Mutex<Queue>,
    ready: Condvar,
    /// Bytes of jobs that wait or are under way, background reads left out.
    pending_bytes: AtomicU64,
    read_gbps: f64,
}

impl Drive {
    /// Makes a drive that reads at `read_gbps`, in 10⁹ bytes per second.
    pub(super) fn new(read_gbps: f64) -> Self {
        Self {
            queue: Mutex::default(),
            ready: Condvar::new(),
            pending_bytes: AtomicU64::new(0),
            read_gbps,
        }
    }

    /// Returns the seconds after which `bytes` that are submitted now will have been read: after all
    /// that waits, at the drive's rate.
    pub(super) fn seconds_until(&self, bytes: u64) -> f64 {
        let pending = self.pending_bytes.load(Ordering::Relaxed);
        pending.saturating_add(bytes) as f64 / (self.read_gbps * 1e9)
    }

    /// Has jobs wait for a reader.
    pub(super) fn submit(&self, jobs: Vec<Job>, priority: Priority) {
        let n = jobs.len();
        self.count(&jobs, priority);
        let mut queue = lock(&self.queue);
        let queue = match priority {
            Priority::Demand => &mut queue.demand,
            Priority::Next => &mut queue.next,
            Priority::Idle => &mut queue.idle,
            Priority::Background => &mut queue.background,
        };
        queue.extend(jobs);
        for _ in 0..n.min(READER_THREADS) {
            self.ready.notify_one();
        }
    }

    fn count(&self, jobs: &[Job], priority: Priority) {
        if priority != Priority::Background {
            let bytes = jobs.iter().map(|job| job.len as u64).sum();
            self.pending_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Counts the bytes of a job out that has ended or was canceled.
    fn count_out(&self, job: &Job, priority: Priority) {
        if priority != Priority::Background {
            self.pending_bytes
                .fetch_sub(job.len as u64, Ordering::Relaxed);
        }
    }

    /// Has the jobs of requests with these keys that wait at the priorities next and idle wait at
    /// demand. Returns all others that waited there.
    pub(super) fn promote(&self, promoted: &[u64]) -> Vec<Job> {
        let mut queue = lock(&self.queue);
        let (next, idle) = (
            std::mem::take(&mut queue.next),
            std::mem::take(&mut queue.idle),
        );
        let waiting = next.into_iter().chain(idle);
        let (kept, canceled): (Vec<Job>, Vec<Job>) =
            waiting.partition(|j| promoted.contains(&j.request.key));
        let n_kept = kept.len();
        queue.demand.extend(kept);
        drop(queue);
        for _ in 0..n_kept.min(READER_THREADS) {
            self.ready.notify_one();
        }
        canceled
            .iter()
            .for_each(|job| self.count_out(job, Priority::Idle));
        canceled
    }

    /// Returns what all reads so far brought, and how long they took.
    pub(super) fn usage(&self, now: Instant) -> DriveUse {
        lock(&self.queue).clock.usage(now)
    }

    /// Ends the reader threads once they have ended what they are at.
    pub(super) fn close(&self) {
        lock(&self.queue).closed = true;
        self.ready.notify_all();
    }

    /// Waits for the next job. Returns `None` when the drive is closed.
    fn next(&self) -> Option<(Job, Priority)> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            match queue.take() {
                Some(next) => {
                    queue.clock.begin(Instant::now());
                    return Some(next);
                }
                None => queue = self.ready.wait(queue).unwrap_or_else(|e| e.into_inner()),
            }
        }
    }

    /// Counts a job out that brought `bytes`.
    fn end(&self, job: &Job, priority: Priority, bytes: u64) {
        self.count_out(job, priority);
        let mut queue = lock(&self.queue);
        queue.clock.end(Instant::now(), bytes);
        if queue.end(priority) {
            self.ready.notify_all();
        }
    }
}

/// Runs one reader thread of a drive until that is closed or the receiver is gone.
pub(super) fn read_loop(shared: &Shared, drive: usize, completions: &Sender<Completion>) {
    let mut bounce = None;
    let drive = &shared.drives[drive];
    while let Some((job, priority)) = drive.next() {
        let has_failed = lock(&job.request.error).is_some();
        let mut bytes = 0;
        if !has_failed {
            match run(&shared.sources[job.source], &job, &mut bounce) {
                Ok(()) => bytes = (job.need - job.skip) as u64,
                Err(error) => {
                    lock(&job.request.error).get_or_insert(error);
                }
            }
        }
        drive.end(&job, priority, bytes);
        if job.request.jobs_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            finish(&shared.sources, &job.request);
            if completions.send(finished(&job.request)).is_err() {
                return;
            }
        }
    }
}
