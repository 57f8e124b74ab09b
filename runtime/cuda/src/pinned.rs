//! Pinned host memory.

use super::CudaError;
use super::device::View;
use super::gpu::Gpu;
use cudarc::driver::result;
use std::sync::Arc;

/// Page-locked host memory, which a GPU reads and writes by direct memory access.
pub struct Pinned {
    gpu: Arc<Gpu>,
    start: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: `new` allocated it, and every copy has been waited for.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
    }
}

impl Pinned {
    /// Allocates `len` bytes of zeros.
    pub(super) fn new(gpu: &Arc<Gpu>, len: usize) -> Result<Self, CudaError> {
        gpu.bind()?;
        // SAFETY: the context is current.
        let start = unsafe { result::malloc_host(len.max(1), 0) }
            .map_err(|e| gpu.failed("pinning host memory", e))?;
        // SAFETY: as many bytes were allocated.
        unsafe { start.cast::<u8>().write_bytes(0, len) };
        Ok(Self {
            gpu: Arc::clone(gpu),
            start: start.cast(),
            len,
        })
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the bytes as a slice.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: as many bytes were allocated and initialized.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    /// Copies all bytes to the device, and waits.
    pub fn send(&mut self, to: View<'_>) -> Result<(), CudaError> {
        let to = to.part(0..self.len);
        self.gpu.bind()?;
        let stream = self.gpu.stream();
        // SAFETY: `to` is long enough, and the bytes stay until the copy is done.
        let enqueued = unsafe { result::memcpy_htod_async(to.address(), self.bytes(), stream) };
        enqueued.map_err(|e| {
            self.gpu
                .failed(format!("copying {} bytes to it", self.len), e)
        })?;
        self.gpu.wait_for_stream()
    }

    /// Fills all bytes from the device.
    pub fn receive(&mut self, from: View<'_>) -> Result<(), CudaError> {
        from.read(self.bytes())
    }
}
