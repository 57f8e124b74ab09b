//! A GPU's streams beside the one that computes, and points in them.

use super::CudaError;
use super::gpu::Gpu;
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUevent_flags};
use std::sync::Arc;

/// A stream, whose work has ended when it is dropped.
pub(super) struct SideStream {
    gpu: Arc<Gpu>,
    raw: sys::CUstream,
}

impl Drop for SideStream {
    fn drop(&mut self) {
        if self.gpu.bind().is_err() {
            return;
        }
        // SAFETY: nothing else has the stream.
        unsafe {
            let _ = result::stream::synchronize(self.raw);
            let _ = result::stream::destroy(self.raw);
        }
    }
}

impl SideStream {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        gpu.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(Self {
            raw: raw.map_err(|e| gpu.failed("a stream", e))?,
            gpu: Arc::clone(gpu),
        })
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }
}

/// A point in a stream.
pub(super) struct Event {
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
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        let raw = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Self {
            raw: raw.map_err(|e| gpu.failed("an event", e))?,
            gpu: Arc::clone(gpu),
        })
    }

    pub(super) fn raw(&self) -> sys::CUevent {
        self.raw
    }
}
