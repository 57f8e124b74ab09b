//! Small writes to a GPU that nobody waits for. The driver promises of its asynchronous copies from pageable memory only
//! that they might be over when they return, so the bytes go by way of pinned memory of our own.

use cudarc::driver::sys::{self, CUevent_flags};
use cudarc::driver::{DriverError, result};

/// Bytes of a half: one is filled while copies from the other are still to come. What is larger doesn't go this way.
pub(super) const HALF: usize = 1 << 20;

/// Where the bytes of a write begin: at multiples of this.
const ALIGNED: usize = 64;

/// Pinned memory in two halves, each with the event after its last copy.
pub(super) struct Outbox {
    start: *mut u8,
    done: Vec<sys::CUevent>,
    which: usize,
    /// Bytes of this half that copies come from.
    used: usize,
}

impl Outbox {
    /// An empty one of the current context.
    pub(super) fn new() -> Result<Self, DriverError> {
        // SAFETY: whoever calls this has made a context current, without which the driver refuses.
        let start = unsafe { result::malloc_host(2 * HALF, 0) }?;
        let mut made = Self { start: start.cast(), done: Vec::new(), which: 0, used: 0 };
        for _ in 0..2 {
            match result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING) {
                Ok(event) => made.done.push(event),
                Err(error) => {
                    // SAFETY: nothing was copied from it.
                    unsafe { made.close() };
                    return Err(error);
                }
            }
        }
        Ok(made)
    }

    /// Copies at most [`HALF`] bytes to the device in the order of a stream; they have been taken when this returns.
    ///
    /// # Safety
    /// The context that this was made in is current, `to..to + bytes.len()` is memory of its device, and all sends are in
    /// the same stream.
    pub(super) unsafe fn send(&mut self, to: u64, bytes: &[u8], stream: sys::CUstream) -> Result<(), DriverError> {
        assert!(bytes.len() <= HALF, "{} bytes in a half of {HALF}", bytes.len());
        // SAFETY: the caller's promise; the part of the half is inside it, and no copy from it is still to come: those of
        // this half since it was begun have other parts, and those before were waited for.
        unsafe {
            if self.used + bytes.len() > HALF {
                result::event::record(self.done[self.which], stream)?;
                // An event that was never recorded is nothing to wait for.
                sys::cuEventSynchronize(self.done[1 - self.which]).result()?;
                (self.which, self.used) = (1 - self.which, 0);
            }
            let at = self.start.add(self.which * HALF + self.used);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len());
            self.used = (self.used + bytes.len()).next_multiple_of(ALIGNED);
            result::memcpy_htod_async(to, std::slice::from_raw_parts(at, bytes.len()), stream)
        }
    }

    /// Gives everything back.
    ///
    /// # Safety
    /// The context that this was made in is current, no copy is still to come, and this is not used afterwards.
    pub(super) unsafe fn close(&mut self) {
        // SAFETY: the caller's promise.
        unsafe {
            for event in self.done.drain(..) {
                let _ = result::event::destroy(event);
            }
            let _ = result::free_host(self.start.cast());
        }
    }
}
