//! Bytes on their way to a device while it computes.

use super::gpu::{Gpu, Pinned};
use super::{CudaError, device::View};
use cudarc::driver::sys::{self, CUevent_flags, CUevent_wait_flags};
use cudarc::driver::{DriverError, result};
use std::sync::Arc;

/// Buffers of a lane: one is filled while the other is sent.
pub const BUFFERS: usize = 2;

/// Host buffers, [`BUFFERS`] of them, from which bytes go to a device beside what it computes.
pub trait Lane: Send {
    /// A buffer, once the device has taken what was sent from it last.
    ///
    /// # Errors
    /// When the device fails.
    fn staging(&mut self, which: usize) -> Result<&mut [u8], CudaError>;

    /// Whether [`staging`](Self::staging) would not wait.
    ///
    /// # Errors
    /// When the device fails.
    fn is_free(&mut self, which: usize) -> Result<bool, CudaError>;

    /// Sends the first bytes of a buffer, as many as there is room for, as soon as all is done that had been asked of the
    /// device when [`used`](Self::used) was last called for this buffer. What is asked of the device from now on comes
    /// after the bytes.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there is more room than bytes.
    fn send(&mut self, which: usize, to: View<'_>) -> Result<(), CudaError>;

    /// All has been asked of the device that needs what was sent from this buffer last.
    ///
    /// # Errors
    /// When the device fails.
    fn used(&mut self, which: usize) -> Result<(), CudaError>;
}

/// A second stream of a GPU, for copies alone.
struct GpuLane {
    gpu: Arc<Gpu>,
    stream: sys::CUstream,
    sides: Vec<Side>,
}

/// One buffer, and the events of its bytes.
struct Side {
    staging: Pinned,
    copied: Event,
    used: Event,
}

/// A point of a stream.
struct Event {
    gpu: Arc<Gpu>,
    raw: sys::CUevent,
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: nothing else has it.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

impl Event {
    fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        let raw = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Self { raw: raw.map_err(|e| gpu.failed("an event", e))?, gpu: Arc::clone(gpu) })
    }
}

// SAFETY: the driver's handles may be used from any thread whose context is this one, which every function sees to.
unsafe impl Send for GpuLane {}

impl Drop for GpuLane {
    fn drop(&mut self) {
        if self.gpu.bind().is_err() {
            return;
        }
        // SAFETY: nothing else has the stream; copies end before their memory goes.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
        }
    }
}

/// A lane to a GPU with buffers of so many bytes.
///
/// # Errors
/// When the system has not got the memory, or the GPU fails.
pub(super) fn open(gpu: Arc<Gpu>, len: usize) -> Result<Box<dyn Lane>, CudaError> {
    gpu.bind()?;
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
    let mut lane = GpuLane { stream: stream.map_err(|e| gpu.failed("a stream", e))?, gpu, sides: Vec::new() };
    for _ in 0..BUFFERS {
        let (copied, used) = (Event::new(&lane.gpu)?, Event::new(&lane.gpu)?);
        lane.sides.push(Side { staging: lane.gpu.pinned(len)?, copied, used });
    }
    Ok(Box::new(lane))
}

impl GpuLane {
    fn done(&self, result: Result<(), DriverError>) -> Result<(), CudaError> {
        result.map_err(|e| self.gpu.failed("copying beside what it computes", e))
    }
}

impl Lane for GpuLane {
    fn staging(&mut self, which: usize) -> Result<&mut [u8], CudaError> {
        self.gpu.bind()?;
        // SAFETY: the event lives as long as this value.
        let waited = unsafe { sys::cuEventSynchronize(self.sides[which].copied.raw) }.result();
        self.done(waited)?;
        Ok(self.sides[which].staging.bytes())
    }

    fn is_free(&mut self, which: usize) -> Result<bool, CudaError> {
        self.gpu.bind()?;
        // SAFETY: as above.
        match unsafe { result::event::query(self.sides[which].copied.raw) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            other => self.done(other).map(|()| true),
        }
    }

    fn send(&mut self, which: usize, to: View<'_>) -> Result<(), CudaError> {
        self.gpu.bind()?;
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        let (stream, computing) = (self.stream, self.gpu.stream());
        let side = &mut self.sides[which];
        let bytes = &side.staging.bytes()[..to.len()];
        // SAFETY: the view is memory of this device, as whoever made both sees to; the buffer is pinned, and nobody
        // writes to it before `copied`. Streams and events live as long as this value.
        let sent = unsafe {
            result::stream::wait_event(stream, side.used.raw, flags)
                .and_then(|()| result::memcpy_htod_async(to.address(), bytes, stream))
                .and_then(|()| result::event::record(side.copied.raw, stream))
                .and_then(|()| result::stream::wait_event(computing, side.copied.raw, flags))
        };
        self.done(sent)
    }

    fn used(&mut self, which: usize) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: as above.
        let recorded = unsafe { result::event::record(self.sides[which].used.raw, self.gpu.stream()) };
        self.done(recorded)
    }
}
