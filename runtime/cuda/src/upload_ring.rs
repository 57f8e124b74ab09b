//! Asynchronous writes to a GPU, by way of a ring of pinned memory.
//!
//! The driver's asynchronous copies from pageable memory may return before they have read it, and it
//! refuses memory of which a part is locked. So the bytes are first copied to pinned memory that this
//! module owns.

use cudarc::driver::sys::{self, CUevent_flags};
use cudarc::driver::{DriverError, result};

/// Bytes of one half of the ring, and of the longest piece of a write. One half is filled
/// while copies from the other are in flight.
pub(super) const HALF_BYTES: usize = 1 << 20;

/// Alignment of a write's first byte in the ring.
const ALIGNMENT: usize = 64;

/// Pinned memory in two halves, each with the event that follows its last copy.
pub(super) struct UploadRing {
    start: *mut u8,
    half_copied: Vec<sys::CUevent>,
    current_half: usize,
    /// Bytes of the current half that copies read from.
    used: usize,
}

impl UploadRing {
    /// Allocates an empty ring in the current context.
    pub(super) fn new() -> Result<Self, DriverError> {
        // SAFETY: the caller has made a context current, without which the driver refuses.
        let start = unsafe { result::malloc_host(2 * HALF_BYTES, 0) }?;
        let mut ring = Self {
            start: start.cast(),
            half_copied: Vec::new(),
            current_half: 0,
            used: 0,
        };
        for _ in 0..2 {
            match result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING) {
                Ok(event) => ring.half_copied.push(event),
                Err(error) => {
                    // SAFETY: nothing was copied from it.
                    unsafe { ring.close() };
                    return Err(error);
                }
            }
        }
        Ok(ring)
    }

    /// Enqueues a copy of at most [`HALF_BYTES`] bytes to the device in a stream. `bytes` may be
    /// overwritten when this returns.
    ///
    /// # Safety
    /// The context of this ring is current, `to..to + bytes.len()` is memory of its device, and all
    /// sends are in the same stream.
    pub(super) unsafe fn send(
        &mut self,
        to: u64,
        bytes: &[u8],
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        assert!(
            bytes.len() <= HALF_BYTES,
            "{} bytes in a half of {HALF_BYTES}",
            bytes.len()
        );
        // SAFETY: the caller's promise. The range lies inside the half, and no copy from it is in
        // flight: copies from this half since it was begun have other ranges, and earlier ones were
        // waited for.
        unsafe {
            if self.used + bytes.len() > HALF_BYTES {
                result::event::record(self.half_copied[self.current_half], stream)?;
                // An event that was never recorded counts as completed.
                sys::cuEventSynchronize(self.half_copied[1 - self.current_half]).result()?;
                (self.current_half, self.used) = (1 - self.current_half, 0);
            }
            let staged = self.start.add(self.current_half * HALF_BYTES + self.used);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), staged, bytes.len());
            self.used = (self.used + bytes.len()).next_multiple_of(ALIGNMENT);
            result::memcpy_htod_async(to, std::slice::from_raw_parts(staged, bytes.len()), stream)
        }
    }

    /// Frees the memory and the events.
    ///
    /// # Safety
    /// The context of this ring is current, no copy is in flight, and the ring is not used
    /// afterwards.
    pub(super) unsafe fn close(&mut self) {
        // SAFETY: the caller's promise.
        unsafe {
            for event in self.half_copied.drain(..) {
                let _ = result::event::destroy(event);
            }
            let _ = result::free_host(self.start.cast());
        }
    }
}
