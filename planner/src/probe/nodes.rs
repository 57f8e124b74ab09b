//! Measures main memory by NUMA node: the compute rate of all threads from each.

use super::memory::{Memory, STAGE};
use super::{MAX_MEMORY_BYTES, MIN_MEMORY_BYTES, RESERVE_DIVISOR, rounded};
use anyhow::{Context, Result, ensure};
use tier_plan_runtime::formats::machine::{Accelerator, Tier, TierKind};
use tier_plan_runtime::kernels::Kernels;
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::threads::ThreadPool;
use tier_plan_runtime::threads::pin_thread_to_cpus;
use tier_plan_runtime::tiers::nodes::{Node, Pages};
use tier_plan_runtime::units::show_bytes;

/// The rates of one node's memory.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeRate {
    /// Node and its processors.
    pub node: Node,
    /// Compute rate of all threads with only this node's memory in use, in 10⁹ bytes per second.
    pub alone_gbps: f64,
    /// Compute rate of the node's own processors from its memory, in 10⁹ bytes per second; `None`
    /// without processors.
    pub own_gbps: Option<f64>,
    /// The node's share of the rate when all threads use all nodes with processors.
    pub gbps: f64,
    /// Bytes that plans may use.
    pub capacity_bytes: u64,
}

/// Measures each node with matvecs of `formats`, weighted by their shares. `limit_bytes` bounds the
/// process's memory on all nodes.
///
/// # Errors
/// When too little memory is free, or the system refuses to place it.
pub fn measure(
    nodes: Vec<Node>,
    kernels: Kernels,
    pool: &ThreadPool,
    formats: &[(TensorType, f64)],
    limit_bytes: u64,
) -> Result<Vec<NodeRate>> {
    let capacities = capacities(&nodes, limit_bytes);
    let rate = |pages: &Pages, bytes: u64, pool: &ThreadPool| -> Result<f64> {
        let bytes = MAX_MEMORY_BYTES.min(bytes / 4) / STAGE * STAGE;
        ensure!(
            bytes >= MIN_MEMORY_BYTES,
            "there are only {} of memory to measure with on {pages}; free {} or more",
            show_bytes(bytes),
            show_bytes(4 * MIN_MEMORY_BYTES)
        );
        let mut memory = Memory::on(kernels, bytes, pages)?;
        Ok(mean(formats, |ty| memory.matvec_gbps(pool, ty).value))
    };
    let mut found = Vec::new();
    for (node, capacity_bytes) in nodes.into_iter().zip(capacities) {
        let pages = Pages::Node(node.number);
        let alone_gbps = rate(&pages, capacity_bytes, pool)?;
        let own_gbps = if node.processors.is_empty() {
            None
        } else {
            // Threads inherit the node of the thread that starts them.
            let own = std::thread::scope(|scope| {
                let run = || -> Result<f64> {
                    pin_thread_to_cpus(&node.processors)
                        .context("keeping threads on a memory node's processors")?;
                    rate(
                        &pages,
                        capacity_bytes,
                        &ThreadPool::new(pool.n_threads().min(node.processors.len())),
                    )
                };
                std::thread::Builder::new()
                    .spawn_scoped(scope, run)
                    .map(|thread| thread.join())
            })
            .context("starting a thread on a memory node's processors")?;
            Some(own.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?)
        };
        found.push(NodeRate {
            node,
            alone_gbps,
            own_gbps,
            gbps: alone_gbps,
            capacity_bytes,
        });
    }
    let next: Vec<&NodeRate> = found.iter().filter(|n| n.own_gbps.is_some()).collect();
    if next.len() > 1 {
        let least = next.iter().map(|n| n.capacity_bytes).min().unwrap_or(0);
        let in_turn = Pages::Interleaved(next.iter().map(|n| n.node.number).collect());
        let together = rate(&in_turn, least.saturating_mul(next.len() as u64), pool)?;
        share(&mut found, together);
    }
    Ok(found)
}

/// Returns the bytes that plans may use per node: free memory less a reserve, and in total at most
/// the process's limit.
fn capacities(nodes: &[Node], limit_bytes: u64) -> Vec<u64> {
    let usable = |bytes: u64| bytes - bytes / RESERVE_DIVISOR;
    let free: u128 = nodes.iter().map(|n| u128::from(usable(n.free_bytes))).sum();
    let allowed = u128::from(usable(limit_bytes)).min(free);
    let part = |n: &Node| (u128::from(usable(n.free_bytes)) * allowed / free.max(1)) as u64;
    nodes.iter().map(|n| part(n) >> 20 << 20).collect()
}

/// Shares out the combined rate among nodes with processors. The cost model takes the time of the
/// slowest node, so their rates are those of combined use.
fn share(nodes: &mut [NodeRate], together_gbps: f64) {
    let alone: f64 = nodes
        .iter()
        .filter(|n| n.own_gbps.is_some())
        .map(|n| n.alone_gbps)
        .sum();
    for n in nodes.iter_mut().filter(|n| n.own_gbps.is_some()) {
        n.gbps = n.alone_gbps * (together_gbps / alone.max(1e-9)).min(1.0);
    }
}

/// Returns the mean rate of all formats, weighted by share.
fn mean(formats: &[(TensorType, f64)], mut rate: impl FnMut(TensorType) -> f64) -> f64 {
    let seconds: f64 = formats
        .iter()
        .map(|(ty, share)| share / rate(*ty).max(1e-9))
        .sum();
    let shares: f64 = formats.iter().map(|(_, share)| share).sum();
    shares / seconds.max(1e-12)
}

impl NodeRate {
    /// Describes the node as a tier; `how` names the work that was measured.
    pub fn tier(&self, day: &str, how: &str) -> Tier {
        // Memory without processors is behind a link.
        let kind = if self.node.processors.is_empty() {
            TierKind::Cxl
        } else {
            TierKind::Dram
        };
        let own = self.own_gbps.map_or(String::new(), |own| {
            format!(", from its own processors {own:.1} GB/s")
        });
        let number = self.node.number;
        Tier {
            name: format!("{kind}{number}"),
            kind,
            capacity_bytes: self.capacity_bytes.max(1),
            read_gbps: rounded(self.gbps),
            latency_us: 0.0,
            emulated: false,
            unit: Some(number),
            accelerator: Accelerator::default(),
            source: format!(
                "measured {day}: {how}, with all nodes in use; memory node {number} alone {:.1} GB/s{own}; capacity: {} free \
                 of {}, less a {RESERVE_DIVISOR}th",
                self.alone_gbps,
                show_bytes(self.node.free_bytes),
                show_bytes(self.node.total_bytes)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u32, free_gib: u64, processors: u32) -> Node {
        Node {
            number,
            total_bytes: 64 << 30,
            free_bytes: free_gib << 30,
            processors: (0..processors).collect(),
        }
    }

    #[test]
    fn capacities_keep_within_nodes_and_the_process() {
        let nodes = [node(0, 32, 4), node(1, 16, 4)];
        assert_eq!(capacities(&nodes, 1 << 40), [30 << 30, 15 << 30]);
        assert_eq!(capacities(&nodes, 24 << 30), [15 << 30, 15 << 29]);
        assert_eq!(capacities(&[node(0, 0, 4)], 1 << 30), [0]);
    }

    #[test]
    fn nodes_in_common_use_have_their_part() {
        let rate = |number, gbps, processors: u32| NodeRate {
            node: node(number, 1, processors),
            alone_gbps: gbps,
            own_gbps: (processors > 0).then_some(gbps),
            gbps,
            capacity_bytes: 1 << 30,
        };
        let mut nodes = [rate(0, 60.0, 4), rate(1, 40.0, 4), rate(2, 20.0, 0)];
        share(&mut nodes, 80.0);
        assert_eq!(nodes.clone().map(|n| n.gbps), [48.0, 32.0, 20.0]);
        share(&mut nodes, 200.0);
        assert_eq!(
            nodes.clone().map(|n| n.gbps),
            [60.0, 40.0, 20.0],
            "no node is faster than alone"
        );
        let [dram, _, cxl] = nodes.map(|n| n.tier("2026-11-22", "matvecs of Q4_K"));
        assert_eq!(
            (dram.name.as_str(), dram.kind, dram.unit),
            ("dram0", TierKind::Dram, Some(0))
        );
        assert_eq!(
            (cxl.name.as_str(), cxl.kind, cxl.unit),
            ("cxl2", TierKind::Cxl, Some(2))
        );
        assert!(
            dram.source.contains("from its own processors 60.0 GB/s"),
            "{}",
            dram.source
        );
    }

    #[test]
    fn this_machines_nodes_are_measured() {
        // Without NUMA support, or where memory may not be bound, there is nothing to measure.
        let Ok(nodes) = tier_plan_runtime::tiers::nodes::nodes() else {
            return;
        };
        let pool = ThreadPool::new(2);
        let formats = [(TensorType::Q8_0, 1.0)];
        match measure(nodes, Kernels::best(), &pool, &formats, 1 << 29) {
            Ok(found) => assert!(
                found
                    .iter()
                    .all(|n| n.gbps > 0.0 && n.capacity_bytes < 1 << 29),
                "{found:?}"
            ),
            Err(error) => assert!(format!("{error:#}").contains("refused"), "{error:#}"),
        }
    }
}
