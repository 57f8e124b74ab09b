//! Measures the read bandwidth of main memory.

use super::arena::{Arena, ArenaError};
use std::time::Instant;
use tier_plan_kernels::Kernels;
use tier_plan_kernels::threads::ThreadPool;

/// Bytes per work item of a thread.
const CHUNK_BYTES: usize = 1 << 20;

/// Passes over the memory, of which the fastest counts.
const PASSES: usize = 5;

/// Returns the GB/s (10⁹ bytes) at which the pool's threads together read `bytes` of main memory on
/// huge pages, from the fastest of a few passes. `bytes` should exceed the last-level cache.
///
/// # Errors
/// When the memory can't be allocated.
pub fn dram_read_gbps(pool: &ThreadPool, kernels: Kernels, bytes: u64) -> Result<f64, ArenaError> {
    let mut memory = Arena::new("memory to be measured", bytes)?.take(bytes as usize)?;
    // Untouched memory is one page of zeros.
    memory.fill(1);
    let chunks: Vec<&[u8]> = memory.chunks(CHUNK_BYTES).collect();
    let pass = || {
        let start = Instant::now();
        pool.for_each_chunk(chunks.len(), 1, |range| {
            for chunk in &chunks[range] {
                std::hint::black_box(kernels.read_all(chunk));
            }
        });
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
        let gbps = dram_read_gbps(&ThreadPool::new(2), Kernels::best(), 3 << 20).unwrap();
        assert!(gbps.is_finite() && gbps > 0.0, "{gbps}");
    }
}
