//! Weights striped over NUMA nodes, each read by the threads of its own node.
//!
//! On a machine with several sockets a core reads the memory of its own node at full rate, and that
//! of another through a slower link. So memory is placed in stripes, and loops over weights hand the
//! rows of a stripe to a thread of the node that holds it. Which node that is follows from the
//! address alone: nothing is looked up, and slots that are filled anew keep their node.
//!
//! Rows are computed one by one, so the node that computes one doesn't change a bit of it.

use crate::cores::pin_thread_to_cpus;
use crate::threads::ThreadPool;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Bytes per stripe: a huge page on x86-64, the unit in which Linux interleaves memory that has
/// huge pages.
pub const STRIPE_BYTES: usize = 2 << 20;

/// Threads of a pool on one NUMA node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeThreads {
    /// Number of threads.
    pub threads: usize,
    /// Processors that they are pinned to; none for any.
    pub processors: Vec<u32>,
}

/// Bytes of weights that loops have read, by the node of the thread that read them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeReads {
    /// All bytes.
    pub bytes: u64,
    /// Those that a thread of another node read.
    pub remote_bytes: u64,
}

/// Counters behind [`NodeReads`].
#[derive(Debug, Default)]
pub(crate) struct Reads {
    bytes: AtomicU64,
    remote_bytes: AtomicU64,
}

/// A counter on a cache line of its own.
#[repr(align(128))]
struct Apart(AtomicUsize);

thread_local! {
    /// Position of this thread's node in its pool.
    static NODE: Cell<usize> = const { Cell::new(0) };
}

/// Makes the current thread one of a pool's node.
pub(crate) fn enter_node(node: usize, processors: &[u32]) {
    NODE.set(node);
    if !processors.is_empty() {
        // A thread that may run elsewhere is slower, never wrong.
        let _ = pin_thread_to_cpus(processors);
    }
}

/// Returns the position of each processor's node.
pub(crate) fn node_of_cpu(nodes: &[NodeThreads]) -> Vec<usize> {
    let mut node_of_cpu = Vec::new();
    for (node, of) in nodes.iter().enumerate() {
        for cpu in &of.processors {
            let cpu = *cpu as usize;
            node_of_cpu.resize(node_of_cpu.len().max(cpu + 1), 0);
            node_of_cpu[cpu] = node;
        }
    }
    node_of_cpu
}

/// Returns the processor that this thread runs on, where the system tells.
fn current_cpu() -> Option<usize> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the call takes nothing and returns a number.
        usize::try_from(unsafe { libc::sched_getcpu() }).ok()
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// Returns the position of the node, of `nodes`, whose memory holds an address.
pub fn node_of_address(address: usize, nodes: usize) -> usize {
    address / STRIPE_BYTES % nodes.max(1)
}

impl ThreadPool {
    /// Returns the number of NUMA nodes that this pool has threads on; 1 where nodes don't matter.
    #[inline]
    pub fn n_nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Returns how many bytes of weights were read so far; zeros where nodes don't matter.
    pub fn node_reads(&self) -> NodeReads {
        NodeReads {
            bytes: self.reads.bytes.load(Ordering::Relaxed),
            remote_bytes: self.reads.remote_bytes.load(Ordering::Relaxed),
        }
    }

    /// Runs `work` for every item of `by_node`, whose outer index is the node that holds the item's
    /// `bytes`. A thread takes the items of its own node first, in order, and then helps the others.
    pub fn for_each_by_node<T: Sync>(
        &self,
        by_node: &[Vec<T>],
        bytes: impl Fn(&T) -> usize + Sync,
        work: impl Fn(&T) + Sync,
    ) {
        let all: usize = by_node.iter().flatten().map(&bytes).sum();
        self.reads.bytes.fetch_add(all as u64, Ordering::Relaxed);
        // The caller is not pinned: it counts to the node that it happens to be on.
        if !self.node_of_cpu.is_empty() {
            let here = current_cpu().and_then(|cpu| self.node_of_cpu.get(cpu));
            NODE.set(here.copied().unwrap_or(0));
        }
        let next: Vec<Apart> = by_node.iter().map(|_| Apart(AtomicUsize::new(0))).collect();
        self.run_on_all(|| {
            for step in 0..by_node.len() {
                let node = (NODE.get() + step) % by_node.len();
                while !self.gives_up() {
                    let index = next[node].0.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = by_node[node].get(index) else {
                        break;
                    };
                    if step > 0 {
                        let remote = bytes(item) as u64;
                        self.reads.remote_bytes.fetch_add(remote, Ordering::Relaxed);
                    }
                    work(item);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    fn pool(threads: &[usize]) -> ThreadPool {
        let nodes: Vec<_> = threads
            .iter()
            .map(|threads| NodeThreads {
                threads: *threads,
                processors: Vec::new(),
            })
            .collect();
        ThreadPool::on_nodes(&nodes)
    }

    #[test]
    fn every_item_is_taken_once_whatever_the_threads() {
        for threads in [&[1][..], &[1, 1], &[2, 0, 3], &[0, 2]] {
            let pool = pool(threads);
            let hits: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            let mut by_node = vec![Vec::new(); threads.len()];
            for item in 0..100 {
                by_node[item % 7 % threads.len()].push(item);
            }
            let work = |item: &usize| _ = hits[*item].fetch_add(1, Ordering::Relaxed);
            pool.for_each_by_node(&by_node, |_| 3, work);
            assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
            assert_eq!(pool.node_reads().bytes, 300);
        }
    }

    #[test]
    fn threads_read_their_own_node_first_and_help_is_counted() {
        let pool = pool(&[1, 1]);
        assert_eq!((pool.n_nodes(), pool.n_threads()), (2, 2));
        // Both threads are at work at once, so each has the item of its own node.
        let both = Barrier::new(2);
        pool.for_each_by_node(
            &[vec![0], vec![1]],
            |_| 10,
            |node| {
                assert_eq!(NODE.get(), *node);
                both.wait();
            },
        );
        let own = NodeReads {
            bytes: 20,
            remote_bytes: 0,
        };
        assert_eq!(pool.node_reads(), own);
        // Both items are of the first node: the other's thread takes one.
        pool.for_each_by_node(&[vec![0, 1], vec![]], |_| 10, |_| _ = both.wait());
        let helped = NodeReads {
            bytes: 40,
            remote_bytes: 10,
        };
        assert_eq!(pool.node_reads(), helped);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_caller_is_of_the_node_that_it_runs_on() {
        // Wherever this thread runs, it is the second node.
        let all = NodeThreads {
            threads: 1,
            processors: (0..1024).collect(),
        };
        let pool = ThreadPool::on_nodes(&[NodeThreads::default(), all]);
        assert_eq!(pool.node_of_cpu.len(), 1024);
        pool.for_each_by_node(&[vec![], vec![()]], |_| 10, |_| assert_eq!(NODE.get(), 1));
        assert_eq!(pool.node_reads().remote_bytes, 0);
        NODE.set(0);
    }

    #[test]
    fn stripes_go_round_the_nodes() {
        let nodes: Vec<usize> = (0..5)
            .map(|stripe| node_of_address(stripe * STRIPE_BYTES + 7, 3))
            .collect();
        assert_eq!(nodes, [0, 1, 2, 0, 1]);
        assert_eq!(node_of_address(usize::MAX, 0), 0);
    }
}
