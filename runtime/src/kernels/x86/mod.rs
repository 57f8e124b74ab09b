//! Kernels for x86-64.

pub(super) mod avx2;
pub(super) mod avx512;
mod avx512_grids;
mod avx512_unpack;
pub(super) mod rows;

/// Bytes ahead of the ones in use that are asked for: further than the processor looks by itself at a row's end.
const AHEAD: usize = 4608;

/// Asks for the lines of `bytes` bytes that lie [`AHEAD`] of `p`.
#[inline(always)]
fn prefetch(p: *const u8, bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    let mut offset = 0;
    while offset < bytes {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(AHEAD + offset).cast()) };
        offset += 64;
    }
}
