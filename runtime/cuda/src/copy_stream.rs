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
        self.gpu.bind()?;
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        let (copies, compute) = (self.stream.raw(), self.gpu.stream());
        let buffer = &mut self.buffers[which];
        let bytes = &buffer.memory.bytes()[..to.len()];
        // SAFETY: the view is memory of this device, which the owner of both ensures. The buffer is
        // pinned, and not written before `copied`. Streams and events live as long as this value.
        let sent = unsafe {
            result::stream::wait_event(copies, buffer.used.raw(), flags)
                .and_then(|()| result::memcpy_htod_async(to.address(), bytes, copies))
                .and_then(|()| result::event::record(buffer.copied.raw(), copies))
                .and_then(|()| result::stream::wait_event(compute, buffer.copied.raw(), flags))
        };
        self.done(sent)
    }

    fn used(&mut self, which: usize) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: event and stream live as long as this value.
        let recorded =
            unsafe { result::event::record(self.buffers[which].used.raw(), self.gpu.stream()) };
        self.done(recorded)
    }
}
