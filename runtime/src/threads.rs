//! A pool of persistent threads that run one closure together.
//!
//! A decode step enters the pool some hundred times, so entering must cost about a microsecond: workers spin for a
//! moment after each task and only then sleep. The caller is one of the threads.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Spins before a worker goes to sleep: some 50 µs, longer than any serial stretch of a decode step.
const SPINS: u32 = 20_000;

/// The task all threads run: a borrowed closure with its lifetime erased while [`ThreadPool::run`] waits.
#[derive(Clone, Copy)]
struct Task(*const (dyn Fn(usize) + Sync));

// SAFETY: the closure behind the pointer is `Sync`, and `run` does not return before every thread has left it.
unsafe impl Send for Task {}

struct Shared {
    /// Number of the current task; workers wait for it to change.
    epoch: AtomicUsize,
    /// Workers that have not finished the current task.
    busy: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
    task: Mutex<Option<Task>>,
    wake: Condvar,
}

/// Cores of this machine that this process may use, two hardware threads of one core counting once.
pub fn physical_cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    siblings_per_core().map_or(allowed, |siblings| (allowed / siblings).max(1))
}

/// Hardware threads that share the first core, where the system tells.
fn siblings_per_core() -> Option<usize> {
    let list = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list").ok()?;
    let count = |part: &str| match part.split_once('-') {
        Some((a, b)) => Some(b.trim().parse::<usize>().ok()?.checked_sub(a.trim().parse().ok()?)? + 1),
        None => part.trim().parse::<usize>().ok().map(|_| 1),
    };
    list.trim().split(',').map(count).sum::<Option<usize>>().filter(|n| *n > 0)
}

/// A fixed set of threads.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One task at a time: a second caller waits here.
    entry: Mutex<()>,
}

impl ThreadPool {
    /// A pool of `threads` threads, the caller of [`run`](Self::run) being one of them; at least one.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            task: Mutex::new(None),
            wake: Condvar::new(),
        });
        let workers = (1..threads.max(1))
            .filter_map(|index| {
                let shared = Arc::clone(&shared);
                let name = format!("compute-{index}");
                std::thread::Builder::new().name(name).spawn(move || worker(&shared, index)).ok()
            })
            .collect();
        Self { shared, workers, entry: Mutex::new(()) }
    }

    /// Threads that take part, the caller included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `work(thread)` on every thread at once and returns when all are done.
    ///
    /// # Panics
    /// When `work` panicked on any thread.
    pub fn run<F: Fn(usize) + Sync>(&self, work: F) {
        if self.workers.is_empty() {
            return work(0);
        }
        let _entry = self.entry.lock().unwrap_or_else(|e| e.into_inner());
        let shared = &*self.shared;
        let borrowed: *const (dyn Fn(usize) + Sync + '_) = &work;
        // SAFETY: only the lifetime changes; `Finish` waits for every worker before `work` goes out of scope, also
        // when the caller's own share panics.
        let erased: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(borrowed) };
        shared.busy.store(self.workers.len(), Ordering::Relaxed);
        {
            let mut task = shared.task.lock().unwrap_or_else(|e| e.into_inner());
            *task = Some(Task(erased));
            shared.epoch.fetch_add(1, Ordering::Release);
        }
        shared.wake.notify_all();
        let finish = Finish(shared);
        work(0);
        drop(finish);
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a compute thread panicked");
    }

    /// Runs `work` for each index below `n`, the threads taking the next `chunk` indices as they become free.
    pub fn for_each_chunk<F: Fn(std::ops::Range<usize>) + Sync>(&self, n: usize, chunk: usize, work: F) {
        let chunk = chunk.max(1);
        if n <= chunk {
            if n > 0 {
                work(0..n);
            }
            return;
        }
        let next = AtomicUsize::new(0);
        self.run(|_| {
            loop {
                let start = next.fetch_add(chunk, Ordering::Relaxed);
                if start >= n {
                    break;
                }
                work(start..(start + chunk).min(n));
            }
        });
    }

    /// Cuts `data` into slices of `len` values (the last may be shorter) and runs `work(index, slice)` on each.
    pub fn for_each_slice<F: Fn(usize, &mut [f32]) + Sync>(&self, data: &mut [f32], len: usize, work: F) {
        let total = data.len();
        let base = Base(data.as_mut_ptr());
        self.for_each_chunk(total.div_ceil(len.max(1)), 1, |range| {
            for index in range {
                let start = index * len;
                let end = (start + len).min(total);
                // SAFETY: indices are handed out once, so the ranges are disjoint parts of `data`, which is borrowed
                // for the whole call.
                let slice = unsafe { std::slice::from_raw_parts_mut(base.at(start), end - start) };
                work(index, slice);
            }
        });
    }
}

/// Start of a buffer that threads write disjoint parts of.
struct Base(*mut f32);

// SAFETY: used in `for_each_slice` only, for disjoint parts.
unsafe impl Sync for Base {}

impl Base {
    /// # Safety
    /// `offset` must be within the buffer.
    unsafe fn at(&self, offset: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut spins = 0u32;
        while self.0.busy.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        {
            let _task = self.shared.task.lock().unwrap_or_else(|e| e.into_inner());
            self.shared.epoch.fetch_add(1, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

fn worker(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Ordering::Acquire) == seen && spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        }
        let task = {
            let mut task = shared.task.lock().unwrap_or_else(|e| e.into_inner());
            while shared.epoch.load(Ordering::Acquire) == seen {
                task = shared.wake.wait(task).unwrap_or_else(|e| e.into_inner());
            }
            seen = shared.epoch.load(Ordering::Acquire);
            *task
        };
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        if let Some(Task(work)) = task {
            // SAFETY: `run` keeps the closure alive until `busy` has reached zero, which happens below.
            let work = unsafe { &*work };
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(index))).is_err() {
                shared.panicked.store(true, Ordering::Relaxed);
            }
            shared.busy.fetch_sub(1, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_once() {
        for threads in [1, 2, 5] {
            let pool = ThreadPool::new(threads);
            for n in [0, 1, 7, 1000] {
                let hits: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                pool.for_each_chunk(n, 3, |range| {
                    for i in range {
                        hits[i].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = ThreadPool::new(3);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(|thread| assert_ne!(thread, 1, "deliberate"));
        }));
        assert!(caught.is_err());
        let count = AtomicUsize::new(0);
        pool.run(|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn workers_wake_after_sleeping() {
        let pool = ThreadPool::new(2);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            let count = AtomicUsize::new(0);
            pool.run(|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 2);
        }
    }
}
