//! Kernels for x86-64: AVX2, AVX-512 with VNNI, and AMX.

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx512;
mod avx512_few_bits;
mod avx512_grids;
mod avx512_unpack;
mod lanes;
pub(super) mod rows;

/// Distance in bytes at which lines are prefetched into the first-level cache.
const L1_PREFETCH_BYTES: usize = 512;

/// Distance in bytes at which lines are prefetched into the second-level cache, which waits for
/// more lines at a time. It is further than the hardware prefetcher looks, and crosses page ends
/// too.
const L2_PREFETCH_BYTES: usize = 3072;

/// Prefetches the `bytes` bytes that lie [`L1_PREFETCH_BYTES`] and [`L2_PREFETCH_BYTES`] after `p`.
#[inline(always)]
pub(super) fn prefetch(p: *const u8, bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    let mut offset = 0;
    while offset < bytes {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(L2_PREFETCH_BYTES + offset).cast());
            _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(L1_PREFETCH_BYTES + offset).cast());
        }
        offset += 64;
    }
}
