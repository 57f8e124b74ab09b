//! Copies of host memory to a GPU that nothing waits for but what computes with them.
//!
//! The driver copies pageable memory a second time, and the caller waits. So memory that is copied
//! from is locked, and stays as it is until its copy is done.

use super::CudaError;
use super::device::View;
use super::gpu::Gpu;
use super::side_stream::{Event, SideStream};
use cudarc::driver::sys::{self, CUevent_wait_flags, CUresult};
use cudarc::driver::{DriverError, result};
use std::ffi::c_void;
use std::sync::Arc;

/// Copies in flight at most; one more waits for the oldest.
const MAX_IN_FLIGHT: u64 = 16;

/// The memory is locked for all GPUs, as several may copy from it.
const LOCK_FOR_ALL: u32 = 1;

/// The GPU only reads the memory, which may be of a mapped file.
const LOCK_TO_READ: u32 = 8;

/// A number that a transfer has, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TransferId(pub(super) u64);

/// What a transfer comes after on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransferOrder {
    /// Nothing: no compute that is enqueued reads what is overwritten.
    AtOnce,
    /// All compute that is enqueued.
    AfterCompute,
}

/// A stream for copies from locked host memory.
pub trait Transfers: Send {
    /// Locks host memory, until this value is dropped. Returns whether the device reads it directly
    /// then.
    ///
    /// # Safety
    /// The memory is mapped, and stays so until this value is dropped.
    unsafe fn lock(&mut self, start: *const u8, len: usize) -> bool;

    /// Enqueues copies as one transfer. Compute that is enqueued from now on waits for it. After an
    /// error nothing reads the bytes.
    ///
    /// # Safety
    /// The bytes are [locked](Self::lock), stay, and are not written until the transfer is done.
    ///
    /// # Panics
    /// When a view and its bytes have different lengths.
    unsafe fn send(
        &mut self,
        copies: &[(View<'_>, &[u8])],
        order: TransferOrder,
    ) -> Result<TransferId, CudaError>;

    /// Returns whether a transfer is done.
    fn is_done(&mut self, transfer: TransferId) -> Result<bool, CudaError>;

    /// Waits until a transfer is done.
    fn wait(&mut self, transfer: TransferId) -> Result<(), CudaError>;
}

/// A second stream of a GPU.
struct GpuTransfers {
    gpu: Arc<Gpu>,
    stream: SideStream,
    /// What follows each of the last transfers in their stream.
    done: Vec<Event>,
    /// What compute has come to when a transfer begins.
    computed: Event,
    /// Transfers so far, and those of them that are known to be done.
    n_sent: u64,
    n_done: u64,
    locked: Vec<*mut c_void>,
}

// SAFETY: driver handles may be used from any thread that has the context bound, which every
// function here ensures. Locked memory is not accessed through its pointers.
unsafe impl Send for GpuTransfers {}

impl Drop for GpuTransfers {
    fn drop(&mut self) {
        if self.gpu.bind().is_err() {
            return;
        }
        // SAFETY: copies have ended before the memory is unlocked, which nothing else does.
        unsafe {
            let _ = result::stream::synchronize(self.stream.raw());
            for start in self.locked.drain(..) {
                let _ = sys::cuMemHostUnregister(start);
            }
        }
    }
}

/// Opens a stream for transfers to a GPU.
pub(super) fn open(gpu: Arc<Gpu>) -> Result<Box<dyn Transfers>, CudaError> {
    let done = (0..MAX_IN_FLIGHT).map(|_| Event::new(&gpu));
    Ok(Box::new(GpuTransfers {
        stream: SideStream::new(&gpu)?,
        computed: Event::new(&gpu)?,
        done: done.collect::<Result<_, _>>()?,
        gpu,
        n_sent: 0,
        n_done: 0,
        locked: Vec::new(),
    }))
}

impl GpuTransfers {
    fn checked(&self, result: Result<(), DriverError>) -> Result<(), CudaError> {
        result.map_err(|e| self.gpu.failed("copying beside what it computes", e))
    }

    fn event_of(&self, transfer: u64) -> sys::CUevent {
        self.done[(transfer % MAX_IN_FLIGHT) as usize].raw()
    }
}

impl Transfers for GpuTransfers {
    unsafe fn lock(&mut self, start: *const u8, len: usize) -> bool {
        if self.gpu.bind().is_err() || len == 0 {
            return false;
        }
        let start = start.cast_mut().cast::<c_void>();
        // A mapped file can only be read.
        for flags in [LOCK_FOR_ALL, LOCK_FOR_ALL | LOCK_TO_READ] {
            // SAFETY: the caller's promise; the driver changes nothing in the memory.
            match unsafe { sys::cuMemHostRegister_v2(start, len, flags) }.result() {
                Ok(()) => {
                    self.locked.push(start);
                    return true;
                }
                // Another GPU's transfers have it.
                Err(DriverError(CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)) => {
                    return true;
                }
                Err(DriverError(CUresult::CUDA_ERROR_NOT_SUPPORTED)) => return false,
                Err(_) => {}
            }
        }
        false
    }

    unsafe fn send(
        &mut self,
        copies: &[(View<'_>, &[u8])],
        order: TransferOrder,
    ) -> Result<TransferId, CudaError> {
        let transfer = self.n_sent;
        if let Some(oldest) = transfer.checked_sub(MAX_IN_FLIGHT) {
            // Its event is recorded again.
            self.wait(TransferId(oldest))?;
        }
        self.gpu.bind()?;
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        let (copying, compute) = (self.stream.raw(), self.gpu.stream());
        let (computed, done) = (self.computed.raw(), self.event_of(transfer));
        // SAFETY: the views are memory of this device, which the owner of both ensures. The bytes
        // stay as they are: the caller's promise. Streams and events live as long as this value.
        let sent = unsafe {
            let ordered = match order {
                TransferOrder::AtOnce => Ok(()),
                TransferOrder::AfterCompute => result::event::record(computed, compute)
                    .and_then(|()| result::stream::wait_event(copying, computed, flags)),
            };
            ordered
                .and_then(|()| {
                    copies.iter().try_for_each(|(to, bytes)| {
                        assert_eq!(to.len(), bytes.len(), "bytes of a transfer");
                        result::memcpy_htod_async(to.address(), bytes, copying)
                    })
                })
                .and_then(|()| result::event::record(done, copying))
                .and_then(|()| result::stream::wait_event(compute, done, flags))
        };
        self.n_sent += 1;
        if sent.is_err() {
            // What was enqueued must not read the bytes any more when this returns.
            // SAFETY: the stream lives as long as this value.
            let _ = unsafe { result::stream::synchronize(self.stream.raw()) };
        }
        self.checked(sent)?;
        Ok(TransferId(transfer))
    }

    fn is_done(&mut self, transfer: TransferId) -> Result<bool, CudaError> {
        if transfer.0 < self.n_done {
            return Ok(true);
        }
        self.gpu.bind()?;
        // SAFETY: the event lives as long as this value.
        match unsafe { result::event::query(self.event_of(transfer.0)) } {
            Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            other => {
                self.checked(other)?;
                self.n_done = self.n_done.max(transfer.0 + 1);
                Ok(true)
            }
        }
    }

    fn wait(&mut self, transfer: TransferId) -> Result<(), CudaError> {
        if transfer.0 < self.n_done {
            return Ok(());
        }
        self.gpu.bind()?;
        // SAFETY: the event lives as long as this value.
        let waited = unsafe { sys::cuEventSynchronize(self.event_of(transfer.0)) }.result();
        self.checked(waited)?;
        self.n_done = self.n_done.max(transfer.0 + 1);
        Ok(())
    }
}
