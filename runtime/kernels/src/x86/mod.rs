//! Kernels for x86-64: AVX2, AVX-512 with VNNI, and AMX.

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx512;
mod avx512_unpack;
pub(super) mod bands;
mod lanes;
pub(super) mod rows;

/// Distance in bytes at which lines are prefetched into the first-level cache.
const L1_PREFETCH_BYTES: usize = 2048;

/// Distance in bytes at which lines are prefetched into the second-level cache, which waits for
/// more lines at a time. It is further than the hardware prefetcher looks, and crosses page ends
/// too. It also exceeds a block of a band (up to 3.3 kB), whose lines are not read in their order:
/// on Zen 4, Q6_K streams at 24 GB/s with 512 bytes and 3 kB, and at 30 to 31 with both distances as
/// they are here. Earlier trials on Sapphire Rapids saw no difference (docs/performance.md).
const L2_PREFETCH_BYTES: usize = 8192;

/// Prefetches the `bytes` bytes that lie [`L1_PREFETCH_BYTES`] and [`L2_PREFETCH_BYTES`] after `p`.
#[inline(always)]
pub(super) fn prefetch(p: *const u8, bytes: usize) {
    prefetch_both(p, bytes, L2_PREFETCH_BYTES);
}

/// Prefetches the `bytes` bytes that lie [`L1_PREFETCH_BYTES`] after `p` into the first-level cache,
/// and those that lie `far` after it into the second-level cache.
#[inline(always)]
fn prefetch_both(p: *const u8, bytes: usize, far: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    for offset in (0..bytes).step_by(64) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(far + offset).cast());
            _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(L1_PREFETCH_BYTES + offset).cast());
        }
    }
}

/// Prefetches `bytes` bytes at `p` of rows that are read 16 at a time: what comes next in the row
/// into the first-level cache, and the same piece of the row `band_bytes` later, which is read
/// after this one, into the second-level cache.
#[inline(always)]
pub(super) fn prefetch_rows(p: *const u8, bytes: usize, band_bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    for offset in (0..bytes).step_by(64) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(band_bytes + offset).cast());
            _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(2 * bytes + offset).cast());
        }
    }
}
