//! Whether this process may use tiles: the processor has them, and the operating system permits
//! them.

use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Whether the processor has tiles and the operating system permits them, which is requested once.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        /// `amx-tile` and `amx-int8` in EDX of leaf 7.
        const TILE_AND_INT8: u32 = 0b11 << 24;
        /// Bits of XCR0: tile configuration and tile data.
        const STATE: u64 = 0b11 << 17;
        if __cpuid(0).eax < 7
            || __cpuid_count(7, 0).edx & TILE_AND_INT8 != TILE_AND_INT8
            || !is_x86_feature_detected!("xsave")
        {
            return false;
        }
        // SAFETY: the system has enabled XSAVE, so the register can be read.
        let enabled = unsafe { xcr0() };
        enabled & STATE == STATE && request_tiles()
    })
}

/// Returns the extended state that the operating system has enabled.
///
/// # Safety
/// The system has enabled XSAVE.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller's promise.
    unsafe { _xgetbv(0) }
}

/// Requests permission for tile data from the kernel; returns whether it is granted.
#[cfg(target_os = "linux")]
fn request_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

/// Tiles are only requested on Linux.
#[cfg(not(target_os = "linux"))]
fn request_tiles() -> bool {
    false
}
