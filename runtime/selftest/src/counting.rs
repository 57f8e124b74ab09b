//! A device that counts the launches of another one, those of replayed recordings included.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::copy_stream::CopyStream;
use tier_plan_cuda::device::{Arg, Device, Grid, Recording};
use tier_plan_cuda::transfers::Transfers;

/// Wraps a device and counts its launches.
pub struct CountingDevice {
    inner: Arc<dyn Device>,
    launches: Arc<AtomicU64>,
    /// Launches so far of threads that are recording.
    recording: Mutex<HashMap<ThreadId, u64>>,
}

impl CountingDevice {
    /// Wraps a device. Launches that bypass the wrapper are not counted.
    pub fn new(inner: Arc<dyn Device>) -> Self {
        Self {
            inner,
            launches: Arc::default(),
            recording: Mutex::default(),
        }
    }

    /// Returns the number of kernels launched so far. A recorded kernel counts at every replay.
    pub fn launches(&self) -> u64 {
        self.launches.load(Ordering::Relaxed)
    }

    fn recording(&self) -> std::sync::MutexGuard<'_, HashMap<ThreadId, u64>> {
        self.recording
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for CountingDevice {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn free_bytes(&self) -> Result<usize, CudaError> {
        self.inner.free_bytes()
    }

    fn allocate(&self, len: usize) -> Result<u64, CudaError> {
        self.inner.allocate(len)
    }

    unsafe fn free(&self, at: u64) {
        // SAFETY: the caller's promise; this device's memory is the wrapped device's.
        unsafe { self.inner.free(at) }
    }

    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
        // SAFETY: the caller's promise; this device's memory is the wrapped device's.
        unsafe { self.inner.write(to, bytes) }
    }

    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        // SAFETY: the caller's promise; this device's memory is the wrapped device's.
        unsafe { self.inner.read(from, bytes) }
    }

    unsafe fn copy(&self, to: u64, from: u64, len: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's promise; this device's memory is the wrapped device's.
        unsafe { self.inner.copy(to, from, len) }
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Grid,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        match self.recording().get_mut(&std::thread::current().id()) {
            Some(recorded) => *recorded += 1,
            None => {
                self.launches.fetch_add(1, Ordering::Relaxed);
            }
        }
        // SAFETY: the caller's promise; this device's memory is the wrapped device's.
        unsafe { self.inner.launch(kernel, grid, args) }
    }

    fn wait(&self) -> Result<(), CudaError> {
        self.inner.wait()
    }

    fn transfers(self: Arc<Self>) -> Result<Option<Box<dyn Transfers>>, CudaError> {
        Arc::clone(&self.inner).transfers()
    }

    fn copy_stream(self: Arc<Self>, len: usize) -> Result<Option<Box<dyn CopyStream>>, CudaError> {
        Arc::clone(&self.inner).copy_stream(len)
    }

    fn begin_recording(&self) -> Result<bool, CudaError> {
        let begun = self.inner.begin_recording()?;
        if begun {
            self.recording().insert(std::thread::current().id(), 0);
        }
        Ok(begun)
    }

    fn end_recording(self: Arc<Self>) -> Result<Box<dyn Recording>, CudaError> {
        let launches = self
            .recording()
            .remove(&std::thread::current().id())
            .unwrap_or(0);
        let inner = Arc::clone(&self.inner).end_recording()?;
        Ok(Box::new(CountedRecording {
            inner,
            launches,
            total: Arc::clone(&self.launches),
        }))
    }
}

/// A recording whose replays are counted.
struct CountedRecording {
    inner: Box<dyn Recording>,
    launches: u64,
    total: Arc<AtomicU64>,
}

impl Recording for CountedRecording {
    unsafe fn replay(&self) -> Result<(), CudaError> {
        self.total.fetch_add(self.launches, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { self.inner.replay() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_cuda::{Ops, shim};

    #[test]
    fn launches_are_counted_when_they_run() {
        let device = Arc::new(CountingDevice::new(shim::shared()));
        let ops = Ops::new(Arc::clone(&device) as Arc<dyn Device>);
        ops.nothing().unwrap();
        assert_eq!(device.launches(), 1);
        let recorded = ops
            .record(|| (0..3).try_for_each(|_| ops.nothing()))
            .unwrap()
            .unwrap();
        assert_eq!(device.launches(), 1, "nothing ran");
        recorded.replay().unwrap();
        recorded.replay().unwrap();
        ops.nothing().unwrap();
        assert_eq!(device.launches(), 8);
    }
}
