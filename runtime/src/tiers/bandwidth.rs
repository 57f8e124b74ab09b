//! Measures the read bandwidth of main memory.

use super::arena::{Arena, ArenaError};
use super::nodes::Pages;
use std::time::Instant;
use tier_plan_kernels::Kernels;
use tier_plan_kernels::shards::node_of_address;
use tier_plan_kernels::threads::ThreadPool;

/// Bytes per work item of a thread.
const CHUNK_BYTES: usize = 1 << 20;

/// Passes over the memory, of which the fastest counts.
const PASSES: usize = 5;

/// Returns the GB/s (10⁹ bytes) at which the pool's threads together read `bytes` of main memory on
/// huge pages, placed as `pages` says, from the fastest of a few passes. `bytes` should exceed the last-level cache.
///
/// # Errors
/// When the memory can't be allocated.
pub fn dram_read_gbps(
    pool: &ThreadPool,
    kernels: Kernels,
    bytes: u64,
    pages: &Pages,
) -> Result<f64, ArenaError> {
    let mut memory = Arena::on("memory to be measured", bytes, pages)?.take(bytes as usize)?;
    // Untouched memory is one page of zeros.
    memory.fill(1);
    let mut by_node = vec![Vec::new(); pool.n_nodes()];
    for chunk in memory.chunks(CHUNK_BYTES) {
        let middle = chunk.as_ptr().addr() + chunk.len() / 2;
        by_node[node_of_address(middle, pool.n_nodes())].push(chunk);
    }
    let pass = || {
        let start = Instant::now();
        let read = |chunk: &&[u8]| _ = std::hint::black_box(kernels.read_all(chunk));
        pool.for_each_by_node(&by_node, |chunk| chunk.len(), read);
        start.elapsed().as_secs_f64()
    };
    let fastest = (0..PASSES).map(|_| pass()).fold(f64::INFINITY, f64::min);
    Ok(bytes as f64 / fastest.max(1e-9) / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_measured() {
        let pool = ThreadPool::new(2);
        let gbps = dram_read_gbps(&pool, Kernels::best(), 3 << 20, &Pages::Anywhere).unwrap();
        assert!(gbps.is_finite() && gbps > 0.0, "{gbps}");
    }
}
