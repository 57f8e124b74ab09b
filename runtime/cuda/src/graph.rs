//! CUDA graphs: launches that are recorded once and replayed.

use super::CudaError;
use super::device::Recording;
use super::gpu::Gpu;
use cudarc::driver::{result, sys};
use std::sync::Arc;

/// An instantiated graph of the GPU's stream.
struct Graph {
    gpu: Arc<Gpu>,
    executable: sys::CUgraphExec,
}

// SAFETY: the handle may be used from any thread that has the GPU's context bound, which every
// function here ensures.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.wait_for_stream().is_ok() {
            // SAFETY: `end_capture` made it, and nothing of it is running.
            let _ = unsafe { sys::cuGraphExecDestroy(self.executable) }.result();
        }
    }
}

impl Recording for Graph {
    unsafe fn replay(&self) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: the caller's promise; graph and stream live as long as this value.
        let launched = unsafe { sys::cuGraphLaunch(self.executable, self.gpu.stream()) }.result();
        launched.map_err(|e| self.gpu.failed("recorded launches", e))
    }
}

/// Starts to capture what this thread enqueues in the GPU's stream.
pub(super) fn begin_capture(gpu: &Gpu) -> Result<(), CudaError> {
    gpu.bind()?;
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: the stream lives as long as the GPU.
    let begun = unsafe { result::stream::begin_capture(gpu.stream(), mode) };
    begun.map_err(|e| gpu.failed("recording launches", e))
}

/// Ends the capture and instantiates the graph.
pub(super) fn end_capture(gpu: Arc<Gpu>) -> Result<Box<dyn Recording>, CudaError> {
    gpu.bind()?;
    // SAFETY: the stream lives as long as the GPU, and was capturing.
    let captured = unsafe { result::stream::end_capture(gpu.stream()) };
    let graph = captured.map_err(|e| gpu.failed("recording launches", e))?;
    let mut executable = std::ptr::null_mut();
    // SAFETY: the graph is complete. The executable is made from it, and no longer needs it.
    let instantiated = unsafe {
        let instantiated = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result();
        let _ = sys::cuGraphDestroy(graph).result();
        instantiated
    };
    instantiated.map_err(|e| gpu.failed("preparing recorded launches", e))?;
    Ok(Box::new(Graph { gpu, executable }))
}
