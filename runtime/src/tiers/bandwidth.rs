//! How fast this machine's main memory can be read.

use super::arena::{Arena, ArenaError};
use std::time::Instant;
use tier_plan_kernels::Kernels;
use tier_plan_kernels::threads::ThreadPool;

/// Bytes that a thread reads at a time.
const SHARE: usize = 1 << 20;

/// Passes over the memory; the fastest counts.
const PASSES: usize = 5;

/// Gigabytes (10⁹) a second that the pool's threads read together from `bytes` bytes of main memory on huge pages: the
/// fastest of a few passes. Give more bytes than the last-level cache has.
///
/// # Errors
/// When the memory can't be had.
pub fn dram_read_gbps(pool: &ThreadPool, kernels: Kernels, bytes: u64) -> Result<f64, ArenaError> {
    let mut memory = Arena::new("memory to be measured", bytes)?.take(bytes as usize)?;
    // Untouched memory is one page of zeros.
    memory.fill(1);
    let shares: Vec<&[u8]> = memory.chunks(SHARE).collect();
    let pass = || {
        let start = Instant::now();
        pool.for_each_chunk(shares.len(), 1, |range| {
            for share in &shares[range] {
                std::hint::black_box(kernels.read_all(share));
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
