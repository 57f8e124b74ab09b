//! Copy streams: host-to-device copies that run concurrently with compute.

use super::gpu::{Gpu, Pinned};
use super::side_stream::{Event, SideStream};
use super::{CudaError, device::View};
use cudarc::driver::sys::{self, CUevent_wait_flags};
use cudarc::driver::{DriverError, result};
use std::sync::Arc;

/// Staging buffers of a copy stream: one is filled while another is being copied.
pub const BUFFERS: usize = 2;

/// A stream for copies alone, with [`BUFFERS`] staging buffers in host memory.
pub trait CopyStream: Send {
    /// Returns staging buffer `which`, once the device has taken what was sent from it last.
    fn staging(&mut self, which: usize) -> Result<&mut [u8], CudaError>;

    /// Whether [`staging`](Self::staging) would return without waiting.
    fn is_free(&mut self, which: usize) -> Result<bool, CudaError>;

    /// Enqueues a copy of the first `to.len()` bytes of a staging buffer.
    ///
    /// The copy starts when everything is done that had been enqueued for compute at the last
    /// [`used`](Self::used) of this buffer. Compute that is enqueued from now on waits for the
    /// copy.
    ///
    /// # Panics
    /// When `to` is longer than the buffer.
    fn send(&mut self, which: usize, to: View<'_>) -> Result<(), CudaError>;

    /// Enqueues copies as [`send`](Self::send) does, of locked host memory in place of a staging buffer.
    ///
    /// # Safety
    /// The bytes are locked for the device, and stay mapped until the copies are done. What is written
    /// there meanwhile may reach the device or not.
    ///
    /// # Panics
    /// When a view and its bytes have different lengths.
    unsafe fn send_locked(
        &mut self,
        which: usize,
        copies: &[(View<'_>, &[u8])],
    ) -> Result<(), CudaError>;

    /// Marks that all compute is enqueued that reads what was last sent from this buffer.
    fn used(&mut self, which: usize) -> Result<(), CudaError>;
}

/// A second stream of a GPU.
struct GpuCopyStream {
    gpu: Arc<Gpu>,
    /// Dropped before the buffers: copies end before their memory is freed.
    stream: SideStream,
    buffers: Vec<StagingBuffer>,
}

/// A pinned buffer with the events of its bytes.
struct StagingBuffer {
    memory: Pinned,
    copied: Event,
    used: Event,
}

// SAFETY: driver handles may be used from any thread that has the context bound, which every
// function here ensures.
unsafe impl Send for GpuCopyStream {}

/// Opens a copy stream to a GPU with pinned staging buffers of `len` bytes.
///
/// # Errors
/// When host memory can't be pinned, too.
pub(super) fn open(gpu: Arc<Gpu>, len: usize) -> Result<Box<dyn CopyStream>, CudaError> {
    let mut copies = GpuCopyStream {
        stream: SideStream::new(&gpu)?,
        gpu,
        buffers: Vec::new(),
    };
    for _ in 0..BUFFERS {
        let (copied, used) = (Event::new(&copies.gpu)?, Event::new(&copies.gpu)?);
        copies.buffers.push(StagingBuffer {
            memory: copies.gpu.pinned(len)?,
            copied,
            used,
        });
    }
    Ok(Box::new(copies))
}

impl GpuCopyStream {
    fn done(&self, result: Result<(), DriverError>) -> Result<(), CudaError> {
        result.map_err(|e| self.gpu.failed("copying beside what it computes", e))
    }

    /// Enqueues copies in the turn of a staging buffer.
    ///
    /// # Safety
    /// The views are memory of this device, and the bytes stay mapped until the copies are done.
    unsafe fn enqueue(&self, which: usize, copies: &[(View<'_>, &[u8])]) -> Result<(), CudaError> {
        self.gpu.bind()?;
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        let (stream, compute) = (self.stream.raw(), self.gpu.stream());
        let StagingBuffer { copied, used, .. } = &self.buffers[which];
        // SAFETY: the caller's promise. Streams and events live as long as this value.
        let sent = unsafe {
            result::stream::wait_event(stream, used.raw(), flags)
                .and_then(|()| {
                    copies.iter().try_for_each(|(to, bytes)| {
                        assert_eq!(to.len(), bytes.len(), "bytes of a copy");
                        result::memcpy_htod_async(to.address(), bytes, stream)
                    })
                })
                .and_then(|()| result::event::record(copied.raw(), stream))
                .and_then(|()| result::stream::wait_event(compute, copied.raw(), flags))
        };
        self.done(sent)
    }
}

impl CopyStream for GpuCopyStream {
    fn staging(&mut self, which: usize) -> Result<&mut [u8], CudaError> {
        self.gpu.bind()?;
        // SAFETY: the event lives as long as this value.
        let waited = unsafe { sys::cuEventSynchronize(self.buffers[which].copied.raw()) }.result();
        self.done(waited)?;
        Ok(self.buffers[which].memory.bytes())
    }

    fn is_free(&mut self, which: usize) -> Result<bool, CudaError> {
        self.gpu.bind()?;
        // SAFETY: the event lives as long as this value.
        match unsafe { result::event::query(self.buffers[which].copied.raw()) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            other => self.done(other).map(|()| true),
        }
    }

    fn send(&mut self, which: usize, to: View<'_>) -> Result<(), CudaError> {
        let bytes = self.buffers[which].memory.bytes()[..to.len()].as_ptr();
        // SAFETY: the buffer is pinned, has at least as many bytes, and is neither written nor freed before
        // `copied`. The view is memory of this device, which the owner of both ensures.
        unsafe { self.enqueue(which, &[(to, std::slice::from_raw_parts(bytes, to.len()))]) }
    }

    unsafe fn send_locked(
        &mut self,
        which: usize,
        copies: &[(View<'_>, &[u8])],
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's promise, and that of the owner of the views.
        unsafe { self.enqueue(which, copies) }
    }

    fn used(&mut self, which: usize) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: event and stream live as long as this value.
        let recorded =
            unsafe { result::event::record(self.buffers[which].used.raw(), self.gpu.stream()) };
        self.done(recorded)
    }
}
