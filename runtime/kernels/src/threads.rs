//! A pool of persistent threads that share the indices of a loop.
//!
//! A decode step enters the pool some hundred times, so entering must cost about a microsecond:
//! workers spin for a moment after each task and only then sleep. The caller is one of the threads,
//! and it never waits for a worker that has not begun. On a busy machine a worker may be off its
//! core for milliseconds, and the other threads then do its share.
//!
//! # Protocol
//!
//! One atomic `state` orders everything: the number of the task, whether the task is open, and how
//! many workers are inside.
//!
//! ```text
//! caller:  write the task; state = (number + 1, open, 0 inside); wake sleepers; work;
//!          close; wait until 0 are inside                         # also when its own work panics
//! worker:  wait for an open state with a new number; compare-exchange inside + 1, else look again;
//!          work; inside - 1
//! ```
//!
//! A worker can only enter an open task, and a closed task is never opened again. So after the
//! caller has seen 0 inside, no worker can read the borrowed closure.

use crate::shards::{NodeThreads, Reads, enter_node, node_of_cpu};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

pub use crate::cores::{physical_cores, pin_thread_to_cpus};

/// Reads of the state before a worker sleeps: about 50 us, longer than any serial stretch of a
/// decode step.
const SPINS_BEFORE_SLEEP: u32 = 20_000;

/// Mask of the workers inside the current task.
const INSIDE_MASK: u64 = (1 << 16) - 1;
/// Flag: workers may enter the current task.
const OPEN_FLAG: u64 = 1 << 16;
/// Unit of the task's number, which is in the bits above.
const TASK_UNIT: u64 = 1 << 17;

/// Threads of a pool per hardware thread that the process may use, at most.
const MAX_THREADS_PER_HARDWARE_THREAD: usize = 4;
/// Threads that any pool may have, however few hardware threads there are.
const MIN_THREAD_LIMIT: usize = 64;

/// A borrowed closure with its lifetime erased.
type Task = *const (dyn Fn() + Sync);

/// What the caller and the workers share.
struct Shared {
    /// Task number, [`OPEN_FLAG`], and workers inside.
    state: AtomicU64,
    /// Written only while the state is closed with no workers inside; read only by workers inside.
    task: UnsafeCell<Option<Task>>,
    stop: AtomicBool,
    panicked: AtomicBool,
    asleep: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `task` is the only field that is not `Sync`; the protocol of `state` orders its accesses,
// see there, and the closure behind the pointer is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: `task` is the only field that is not `Send`; what holds for `Sync` holds here.
unsafe impl Send for Shared {}

/// Returns the most threads that a pool has: more than a few per hardware thread only wait for each
/// other, and their stacks take address space.
fn most_threads() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    (allowed * MAX_THREADS_PER_HARDWARE_THREAD).clamp(MIN_THREAD_LIMIT, INSIDE_MASK as usize)
}

/// A fixed set of threads that run loops together.
///
/// ```
/// use tier_plan_kernels::threads::ThreadPool;
///
/// let pool = ThreadPool::new(4);
/// let mut squares = vec![0.0; 1000];
/// pool.for_each_slice(&mut squares, 100, |index, slice| {
///     for (i, out) in slice.iter_mut().enumerate() {
///         *out = ((100 * index + i) as f32).powi(2);
///     }
/// });
/// assert_eq!(squares[31], 961.0);
/// ```
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held during a task: a second caller waits here.
    entry: Mutex<()>,
    /// Loops are left early while it is set.
    give_up: Option<Arc<AtomicBool>>,
    /// Whether a loop was left early.
    gave_up: AtomicBool,
    /// Threads on each NUMA node; one entry where nodes don't matter.
    pub(crate) nodes: Vec<usize>,
    /// The node of each processor; empty where nodes are emulated or don't matter.
    pub(crate) node_of_cpu: Vec<usize>,
    /// Bytes of weights by the node that they were read from.
    pub(crate) reads: Reads,
}

impl ThreadPool {
    /// Returns a pool of `threads` threads, at least one: the caller of a loop is one of them.
    pub fn new(threads: usize) -> Self {
        Self::on_nodes(&[NodeThreads {
            threads,
            processors: Vec::new(),
        }])
    }

    /// Returns a pool with threads on each of these NUMA nodes, pinned there. The caller of a loop
    /// counts as one of the first, and is not pinned: threads that it starts would be, too.
    pub fn on_nodes(nodes: &[NodeThreads]) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            task: UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let start = |(index, node): (usize, usize)| {
            let shared = Arc::clone(&shared);
            let processors = nodes[node].processors.clone();
            std::thread::Builder::new()
                .name(format!("compute-{index}"))
                .spawn(move || {
                    enter_node(node, &processors);
                    worker(&shared);
                })
                .ok()
                .map(|handle| (node, handle))
        };
        let of_node = |(node, n): (usize, &NodeThreads)| std::iter::repeat_n(node, n.threads);
        let places = nodes.iter().enumerate().flat_map(of_node);
        // The first that the system refuses ends it: what is left is for other uses.
        let started: Vec<(usize, JoinHandle<()>)> = (0..most_threads())
            .zip(places)
            .skip(1)
            .map_while(start)
            .collect();
        let mut counts = vec![0; nodes.len().max(1)];
        counts[0] = 1;
        let mut workers = Vec::with_capacity(started.len());
        for (node, worker) in started {
            counts[node] += 1;
            workers.push(worker);
        }
        Self {
            shared,
            workers,
            entry: Mutex::new(()),
            give_up: None,
            gave_up: AtomicBool::new(false),
            nodes: counts,
            node_of_cpu: node_of_cpu(nodes),
            reads: Reads::default(),
        }
    }

    /// Has loops be left early while `flag` is set: what they should have written is unspecified
    /// then. [`take_gave_up`](Self::take_gave_up) tells.
    pub fn give_up_when(&mut self, flag: Arc<AtomicBool>) {
        self.give_up = Some(flag);
    }

    /// Returns whether a loop was left early since the last call.
    pub fn take_gave_up(&self) -> bool {
        self.gave_up.load(Ordering::Relaxed) && self.gave_up.swap(false, Ordering::Relaxed)
    }

    /// Returns whether to leave a loop, and remembers it.
    #[inline]
    pub(crate) fn gives_up(&self) -> bool {
        let gives_up = self
            .give_up
            .as_ref()
            .is_some_and(|flag| flag.load(Ordering::Relaxed));
        if gives_up {
            self.gave_up.store(true, Ordering::Relaxed);
        }
        gives_up
    }

    /// Returns the number of threads, the caller included.
    #[inline]
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `work` on this thread and on every worker that comes in time; returns when all of those
    /// are done.
    ///
    /// # Panics
    /// When `work` panicked on any thread.
    pub(crate) fn run_on_all<F: Fn() + Sync>(&self, work: F) {
        if self.workers.is_empty() {
            return work();
        }
        let _entry = self.entry.lock().unwrap_or_else(|e| e.into_inner());
        let shared = &*self.shared;
        let borrowed: *const (dyn Fn() + Sync + '_) = &work;
        // SAFETY: only the lifetime changes; `Finish` closes the task and waits for every worker
        // inside before `work` goes out of scope, also when the caller's own share panics.
        let erased: Task = unsafe { std::mem::transmute(borrowed) };
        // SAFETY: the last task was closed and left by all (`Finish`), and `entry` keeps other
        // callers out.
        unsafe { *shared.task.get() = Some(erased) };
        let number = shared.state.load(Ordering::Relaxed) / TASK_UNIT;
        shared
            .state
            .store((number + 1) * TASK_UNIT + OPEN_FLAG, Ordering::SeqCst);
        if shared.asleep.load(Ordering::SeqCst) > 0 {
            let _lock = shared.lock.lock().unwrap_or_else(|e| e.into_inner());
            shared.wake.notify_all();
        }
        let finish = Finish(shared);
        work();
        drop(finish);
        assert!(
            !shared.panicked.swap(false, Ordering::Relaxed),
            "a compute thread panicked"
        );
    }

    /// Runs `work` for all indices below `n`. A thread takes the next `chunk` indices whenever it
    /// is free.
    #[inline]
    pub fn for_each_chunk<F: Fn(std::ops::Range<usize>) + Sync>(
        &self,
        n: usize,
        chunk: usize,
        work: F,
    ) {
        let chunk = chunk.max(1);
        if n <= chunk {
            if n > 0 {
                work(0..n);
            }
            return;
        }
        let next = AtomicUsize::new(0);
        self.run_on_all(|| {
            loop {
                let start = next.fetch_add(chunk, Ordering::Relaxed);
                if start >= n || self.gives_up() {
                    break;
                }
                work(start..(start + chunk).min(n));
            }
        });
    }

    /// Cuts `data` into slices of `len` values, the last possibly shorter, and runs
    /// `work(index, slice)` on each.
    #[inline]
    pub fn for_each_slice<T: Send, F: Fn(usize, &mut [T]) + Sync>(
        &self,
        data: &mut [T],
        len: usize,
        work: F,
    ) {
        let total = data.len();
        let base = SharedPtr(data.as_mut_ptr());
        self.for_each_chunk(total.div_ceil(len.max(1)), 1, |range| {
            for index in range {
                let start = index * len;
                let end = (start + len).min(total);
                // SAFETY: indices are handed out once, so the ranges are disjoint parts of `data`,
                // which is borrowed for the whole call.
                let slice = unsafe { std::slice::from_raw_parts_mut(base.at(start), end - start) };
                work(index, slice);
            }
        });
    }

    /// Copies bytes; every thread copies some parts.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn copy(&self, to: &mut [u8], from: &[u8]) {
        /// Bytes per part.
        const PART: usize = 256 << 10;
        assert_eq!(to.len(), from.len(), "bytes to be copied");
        let base = SharedPtr(to.as_mut_ptr());
        self.for_each_chunk(from.len().div_ceil(PART), 1, |range| {
            for index in range {
                let part = &from[index * PART..from.len().min((index + 1) * PART)];
                // SAFETY: indices are handed out once, so the ranges are disjoint parts of `to`,
                // which is borrowed for the whole call and as long as `from`.
                unsafe {
                    std::ptr::copy_nonoverlapping(part.as_ptr(), base.at(index * PART), part.len())
                };
            }
        });
    }

    /// Cuts `a` and `b` each into `n` slices of equal length and runs `work(index, slice of a,
    /// slice of b)` on each pair.
    ///
    /// # Panics
    /// When `n` does not divide both lengths.
    pub fn for_each_pair<F>(&self, n: usize, a: &mut [f32], b: &mut [f32], work: F)
    where
        F: Fn(usize, &mut [f32], &mut [f32]) + Sync,
    {
        if n == 0 {
            return;
        }
        assert!(
            a.len().is_multiple_of(n) && b.len().is_multiple_of(n),
            "equal slices"
        );
        let (a_len, b_len) = (a.len() / n, b.len() / n);
        let (a, b) = (SharedPtr(a.as_mut_ptr()), SharedPtr(b.as_mut_ptr()));
        self.for_each_chunk(n, 1, |range| {
            for index in range {
                // SAFETY: indices are handed out once and are below `n`, so the ranges are disjoint
                // parts of `a` and of `b`, which are borrowed for the whole call.
                let (a, b) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(a.at(index * a_len), a_len),
                        std::slice::from_raw_parts_mut(b.at(index * b_len), b_len),
                    )
                };
                work(index, a, b);
            }
        });
    }
}

/// Start of a buffer of which threads write disjoint parts.
pub(crate) struct SharedPtr<T>(pub(crate) *mut T);

// SAFETY: the pointer is only read through `SharedPtr::at`, whose callers write disjoint parts.
unsafe impl<T: Send> Sync for SharedPtr<T> {}

impl<T> SharedPtr<T> {
    /// Returns the address of an element.
    ///
    /// # Safety
    /// `offset` must be within the buffer or at its end.
    pub(crate) unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

/// Closes the task and waits for the workers inside.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.fetch_and(!OPEN_FLAG, Ordering::AcqRel);
        let mut spins = 0u32;
        while state & INSIDE_MASK != 0 {
            spins += 1;
            if spins < SPINS_BEFORE_SLEEP {
                std::hint::spin_loop()
            } else {
                std::thread::yield_now()
            }
            state = self.0.state.load(Ordering::Acquire);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _lock = self.shared.lock.lock().unwrap_or_else(|e| e.into_inner());
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// Runs tasks until the pool is dropped.
fn worker(shared: &Shared) {
    let mut done = 0;
    let is_new = |state: u64, done: u64| state & OPEN_FLAG != 0 && state / TASK_UNIT != done;
    let mut spins = 0;
    loop {
        let state = shared.state.load(Ordering::Acquire);
        if is_new(state, done) {
            spins = 0;
            if shared
                .state
                .compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            done = state / TASK_UNIT;
            // SAFETY: inside an open task, so the pointer was written before the task opened, and
            // `Finish` keeps the closure alive until this worker has left.
            let work = unsafe { (*shared.task.get()).map(|task| &*task) };
            if let Some(work) = work
                && std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err()
            {
                shared.panicked.store(true, Ordering::Relaxed);
            }
            shared.state.fetch_sub(1, Ordering::Release);
        } else if shared.stop.load(Ordering::Relaxed) {
            return;
        } else if spins < SPINS_BEFORE_SLEEP {
            spins += 1;
            std::hint::spin_loop();
        } else {
            let mut lock = shared.lock.lock().unwrap_or_else(|e| e.into_inner());
            shared.asleep.fetch_add(1, Ordering::SeqCst);
            // The state is read after `asleep` is raised, and a caller raises the state before it
            // reads `asleep`: one of the two sees the other.
            while !is_new(shared.state.load(Ordering::SeqCst), done)
                && !shared.stop.load(Ordering::SeqCst)
            {
                lock = shared.wake.wait(lock).unwrap_or_else(|e| e.into_inner());
            }
            shared.asleep.fetch_sub(1, Ordering::SeqCst);
            spins = 0;
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
    fn every_pair_of_slices_once() {
        for threads in [1, 4] {
            let pool = ThreadPool::new(threads);
            let (mut a, mut b) = (vec![0.0f32; 3 * 50], vec![0.0f32; 2 * 50]);
            pool.for_each_pair(50, &mut a, &mut b, |i, a, b| {
                a.iter_mut().for_each(|v| *v += i as f32);
                b.iter_mut().for_each(|v| *v += 2.0 * i as f32);
            });
            assert!(a.iter().enumerate().all(|(i, v)| *v == (i / 3) as f32));
            assert!(
                b.iter()
                    .enumerate()
                    .all(|(i, v)| *v == 2.0 * (i / 2) as f32)
            );
            pool.for_each_pair(5, &mut a, &mut [], |_, a, b| {
                assert_eq!((a.len(), b.len()), (30, 0))
            });
            pool.for_each_pair(0, &mut a, &mut b, |_, _, _| unreachable!("no slices"));
        }
    }

    #[test]
    fn a_loop_is_left_when_it_should_be_and_that_is_told_once() {
        for threads in [1, 3] {
            let (mut pool, flag) = (ThreadPool::new(threads), Arc::new(AtomicBool::new(false)));
            pool.give_up_when(Arc::clone(&flag));
            let count = AtomicUsize::new(0);
            let run = |pool: &ThreadPool| {
                count.store(0, Ordering::SeqCst);
                pool.for_each_chunk(1000, 1, |range| {
                    if range.start == 10 {
                        flag.store(true, Ordering::SeqCst);
                    }
                    count.fetch_add(1, Ordering::SeqCst);
                });
                count.load(Ordering::SeqCst)
            };
            assert!(run(&pool) < 1000);
            assert!(pool.take_gave_up() && !pool.take_gave_up());
            assert_eq!(run(&pool), 0);
            flag.store(false, Ordering::SeqCst);
            assert!(pool.take_gave_up());
            pool.for_each_chunk(1000, 1, |_| {});
            assert!(!pool.take_gave_up());
        }
    }

    /// Runs a loop of `threads` indices that ends only when every thread has one.
    fn meet(pool: &ThreadPool, and_then: impl Fn(usize) + Sync) {
        let inside = AtomicUsize::new(0);
        pool.for_each_chunk(pool.n_threads(), 1, |range| {
            inside.fetch_add(1, Ordering::SeqCst);
            while inside.load(Ordering::SeqCst) < pool.n_threads() {
                std::thread::yield_now();
            }
            and_then(range.start);
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = ThreadPool::new(3);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            meet(&pool, |index| assert_ne!(index, 1, "deliberate"));
        }));
        assert!(caught.is_err());
        meet(&pool, |_| {});
    }

    #[test]
    fn workers_wake_after_sleeping() {
        let pool = ThreadPool::new(3);
        for _ in 0..3 {
            // Without work all of them must come to sleep, however busy the machine is.
            let start = std::time::Instant::now();
            while pool.shared.asleep.load(Ordering::SeqCst) < pool.workers.len() {
                assert!(
                    start.elapsed().as_secs() < 60,
                    "workers that have nothing to do stay awake"
                );
                std::thread::yield_now();
            }
            // And all must wake: this ends when each has an index.
            meet(&pool, |_| {});
        }
    }

    #[test]
    fn many_short_loops_lose_nothing() {
        let pool = ThreadPool::new(4);
        let total = AtomicUsize::new(0);
        for _ in 0..20_000 {
            pool.for_each_chunk(8, 1, |range| {
                total.fetch_add(range.len(), Ordering::Relaxed);
            });
        }
        assert_eq!(total.load(Ordering::Relaxed), 160_000);
    }
}
