//! Kernels for x86-64.

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx512;
mod avx512_grids;
mod avx512_unpack;
pub(super) mod rows;

/// Bytes ahead of the ones in use that are asked into the first-level cache.
const NEAR: usize = 512;

/// Bytes ahead of the ones in use that are asked into the second-level cache, which waits for more lines at a time; and
/// further than the processor looks by itself, across a page's end too.
const FAR: usize = 3072;

/// Asks for `bytes` bytes that lie [`NEAR`] and [`FAR`] ahead of `p`.
#[inline(always)]
pub(super) fn prefetch(p: *const u8, bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    let mut offset = 0;
    while offset < bytes {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(p.wrapping_add(FAR + offset).cast());
            _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(NEAR + offset).cast());
        }
        offset += 64;
    }
}
