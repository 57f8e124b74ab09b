//! Weights striped over all NUMA nodes, each read by threads of its own node.
//!
//! Memory is interleaved in stripes of a huge page, so that the node of an address follows from the
//! address ([`node_of_address`]). Without huge pages Linux interleaves small pages; threads then read
//! from all nodes alike. [`Shards::share_at_home`] tells how much is where it should be.

use super::nodes::{self, Node, Pages};
use super::numa::{NumaError, NumaPolicy, node_of_pages};
use std::sync::{Mutex, PoisonError};
use tier_plan_kernels::shards::{NodeThreads, STRIPE_BYTES, node_of_address};
use tier_plan_kernels::threads::{ThreadPool, physical_cores};

/// Stripes per region whose node is asked for, at most.
const MAX_SAMPLES: usize = 4096;

/// The NUMA nodes that weights are striped over.
#[derive(Debug)]
pub struct Shards {
    nodes: Vec<Node>,
    is_emulated: bool,
    /// First address and length of the memory that holds weights.
    regions: Mutex<Vec<Region>>,
}

#[derive(Debug, Clone, Copy)]
struct Region {
    start: usize,
    len: usize,
}

impl Shards {
    /// Returns the nodes that a policy stripes weights over; `None` where it doesn't, and on a
    /// machine with one node.
    ///
    /// # Errors
    /// When the system lists no nodes.
    pub fn of(policy: NumaPolicy) -> Result<Option<Self>, NumaError> {
        let (nodes, is_emulated) = match policy {
            NumaPolicy::Shard => (nodes::computing()?, false),
            NumaPolicy::EmulatedShards(n) => (vec![Node::default(); n as usize], true),
            NumaPolicy::Interleave | NumaPolicy::Node(_) => return Ok(None),
        };
        let several = nodes.len() > 1;
        Ok(several.then(|| Self {
            nodes,
            is_emulated,
            regions: Mutex::default(),
        }))
    }

    /// Returns the number of nodes.
    pub fn n_nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Returns whether the nodes are emulated: threads and addresses are divided, memory is where it
    /// was.
    pub fn is_emulated(&self) -> bool {
        self.is_emulated
    }

    /// Returns a pool with threads on every node: as many in all as asked for, but at least one per
    /// node, else as there are physical cores. All but the caller's are pinned to their node.
    pub fn pool(&self, threads: Option<usize>) -> ThreadPool {
        let threads = threads.unwrap_or_else(physical_cores);
        let weights: Vec<usize> = self.nodes.iter().map(|n| n.processors.len()).collect();
        let counts = spread(threads.max(self.nodes.len()), &weights);
        let on_node = |(node, threads): (&Node, usize)| NodeThreads {
            threads,
            processors: node.processors.clone(),
        };
        let nodes: Vec<_> = self.nodes.iter().zip(counts).map(on_node).collect();
        ThreadPool::on_nodes(&nodes)
    }

    /// Returns the placement of memory that holds weights.
    pub fn pages(&self) -> Pages {
        if self.is_emulated {
            Pages::Anywhere
        } else {
            Pages::Interleaved(self.nodes.iter().map(|n| n.number).collect())
        }
    }

    /// Counts these bytes in [`share_at_home`](Self::share_at_home) from now on.
    pub(crate) fn watch(&self, start: *const u8, len: usize) {
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        regions.push(Region {
            start: start.addr(),
            len,
        });
    }

    /// Returns the part of the memory in use, from 0 to 1, that is on the node whose threads read it;
    /// `None` where nodes are emulated, or the system does not tell.
    pub fn share_at_home(&self) -> Option<f64> {
        if self.is_emulated {
            return None;
        }
        let regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pages = Vec::new();
        for region in regions.iter() {
            let stripes = region.len / STRIPE_BYTES;
            let step = stripes.div_ceil(MAX_SAMPLES).max(1);
            let first = region.start.next_multiple_of(STRIPE_BYTES);
            pages.extend(
                (0..stripes)
                    .step_by(step)
                    .map(|n| first + n * STRIPE_BYTES)
                    .filter(|page| page + STRIPE_BYTES <= region.start + region.len),
            );
        }
        let found = node_of_pages(&pages).ok()?;
        let is_home = |(page, node): (&usize, &Option<u32>)| {
            let home = &self.nodes[node_of_address(*page, self.nodes.len())];
            node.map(|node| node == home.number)
        };
        let known: Vec<bool> = pages.iter().zip(&found).filter_map(is_home).collect();
        let home = known.iter().filter(|is_home| **is_home).count();
        (!known.is_empty()).then(|| home as f64 / known.len() as f64)
    }
}

/// Spreads threads over nodes in proportion to their processors, at least one each.
fn spread(threads: usize, processors: &[usize]) -> Vec<usize> {
    let all: usize = processors.iter().sum();
    let mut counts = vec![1; processors.len()];
    for _ in processors.len()..threads {
        // The node that is furthest below its share gets the next.
        let load = |node: &usize| {
            let share = if all == 0 {
                1
            } else {
                processors[*node].max(1)
            };
            (counts[*node] + 1) as f64 / share as f64
        };
        let next = (0..counts.len()).min_by(|a, b| load(a).total_cmp(&load(b)));
        if let Some(next) = next {
            counts[next] += 1;
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_follow_processors() {
        assert_eq!(spread(4, &[8, 8]), [2, 2]);
        assert_eq!(spread(12, &[16, 8]), [8, 4]);
        assert_eq!(spread(5, &[0, 0]), [3, 2]);
        assert_eq!(spread(1, &[4, 4]), [1, 1]);
    }

    #[test]
    fn emulated_nodes_have_threads_and_no_pages() {
        let shards = Shards::of(NumaPolicy::EmulatedShards(2)).unwrap().unwrap();
        let pool = shards.pool(Some(3));
        assert_eq!((pool.n_nodes(), pool.n_threads()), (2, 3));
        assert_eq!(
            (shards.pages(), shards.share_at_home()),
            (Pages::Anywhere, None)
        );
        assert!(Shards::of(NumaPolicy::Interleave).unwrap().is_none());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_on_the_machines_only_node_is_half_at_home() {
        let Ok(nodes) = nodes::nodes() else { return };
        let [node] = &nodes[..] else { return };
        // The second node is this one's number plus one: nothing can be there.
        let other = Node {
            number: node.number + 1,
            ..node.clone()
        };
        let shards = Shards {
            nodes: vec![node.clone(), other],
            is_emulated: false,
            regions: Mutex::default(),
        };
        let bytes = vec![1u8; 32 * STRIPE_BYTES];
        shards.watch(bytes.as_ptr(), bytes.len());
        // Where a container forbids the call, nothing is told.
        if let Some(share) = shards.share_at_home() {
            assert!((0.4..=0.6).contains(&share), "{share}");
        }
    }
}
