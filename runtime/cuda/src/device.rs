//! A device: its own memory, and kernels that are launched on it in one order.

use super::CudaError;
use super::copy_stream::CopyStream;
use super::transfers::Transfers;
use std::ops::Range;
use std::sync::Arc;

/// Argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// Device address; 0 is null.
    Pointer(u64),
    /// `int`.
    Int(i32),
    /// `long long`.
    Long(i64),
    /// `float`.
    Float(f32),
}

impl Arg {
    /// Returns the host address of the value.
    pub(super) fn address(&self) -> *const std::ffi::c_void {
        match self {
            Arg::Pointer(v) => std::ptr::from_ref(v).cast(),
            Arg::Int(v) => std::ptr::from_ref(v).cast(),
            Arg::Long(v) => std::ptr::from_ref(v).cast(),
            Arg::Float(v) => std::ptr::from_ref(v).cast(),
        }
    }
}

/// Blocks and threads of a launch.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks in x, y and z.
    pub blocks: [u32; 3],
    /// Threads per block: whole warps of 32.
    pub threads: u32,
}

/// Memory and kernel launches. A device executes requests in the order in which they are made, but for
/// those of its [copy streams](Device::copy_stream) and [transfers](Device::transfers).
pub trait Device: Send + Sync {
    /// Returns the name of the device.
    fn name(&self) -> &str;

    /// Returns the free bytes of device memory.
    fn free_bytes(&self) -> Result<usize, CudaError>;

    /// Allocates memory that is aligned to 256 bytes and readable for at least 16 bytes after its
    /// end.
    fn allocate(&self, len: usize) -> Result<u64, CudaError>;

    /// Frees memory.
    ///
    /// # Safety
    /// `at` came from `allocate` of this device and is not used afterwards.
    unsafe fn free(&self, at: u64);

    /// Copies bytes to the device. `bytes` may be overwritten when this returns.
    ///
    /// # Safety
    /// `to..to + bytes.len()` is memory of this device.
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError>;

    /// Copies bytes from the device, after everything that was enqueued before.
    ///
    /// # Safety
    /// `from..from + bytes.len()` is memory of this device.
    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError>;

    /// Copies bytes within device memory. The default implementation goes through main memory.
    ///
    /// # Safety
    /// `to..to + len` and `from..from + len` are memory of this device and do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, len: usize) -> Result<(), CudaError> {
        let mut bytes = vec![0; len];
        // SAFETY: the caller's promise.
        unsafe {
            self.read(from, &mut bytes)?;
            self.write(to, &bytes)
        }
    }

    /// Launches a kernel, which is compiled first where it was not yet.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and with them it touches only memory of this device.
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Grid,
        args: &[Arg],
    ) -> Result<(), CudaError>;

    /// Waits until everything that was enqueued is done, and reports whether any of it failed.
    fn wait(&self) -> Result<(), CudaError>;

    /// Opens a copy stream that runs concurrently with compute, with pinned host buffers of `len`
    /// bytes. Returns `None` if unsupported.
    fn copy_stream(self: Arc<Self>, _len: usize) -> Result<Option<Box<dyn CopyStream>>, CudaError> {
        Ok(None)
    }

    /// Opens a stream for copies that nothing waits for but what computes with them. Returns `None`
    /// if unsupported.
    fn transfers(self: Arc<Self>) -> Result<Option<Box<dyn Transfers>>, CudaError> {
        Ok(None)
    }

    /// Starts to record this thread's launches instead of executing them. Returns `false` if
    /// unsupported. Until [`end_recording`](Self::end_recording), this thread may only launch
    /// kernels that were launched before.
    fn begin_recording(&self) -> Result<bool, CudaError> {
        Ok(false)
    }

    /// Ends the recording that this thread began.
    ///
    /// # Errors
    /// When the thread did anything but launch kernels meanwhile.
    fn end_recording(self: Arc<Self>) -> Result<Box<dyn Recording>, CudaError> {
        let (device, what) = (self.name().to_string(), "ending a recording".to_string());
        Err(CudaError::Call {
            device,
            what,
            why: "none was begun".into(),
        })
    }
}

/// Recorded launches with their arguments: a CUDA graph.
pub trait Recording: Send {
    /// Executes all recorded launches in their order.
    ///
    /// # Safety
    /// The memory that the launches touch is still allocated on this device.
    unsafe fn replay(&self) -> Result<(), CudaError>;
}

impl std::fmt::Debug for dyn Device + '_ {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Device memory, freed when dropped. Kernels write through shared references: the order of the
/// calls is the order of the accesses.
pub struct Buffer {
    device: Arc<dyn Device>,
    at: u64,
    len: usize,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the address came from this device, and views of it borrow this value.
        unsafe { self.device.free(self.at) };
    }
}

impl Buffer {
    /// Allocates `len` uninitialized bytes.
    pub fn new(device: &Arc<dyn Device>, len: usize) -> Result<Self, CudaError> {
        Ok(Self {
            device: Arc::clone(device),
            at: device.allocate(len)?,
            len,
        })
    }

    /// Copies bytes to the device.
    pub fn of_bytes(device: &Arc<dyn Device>, bytes: &[u8]) -> Result<Self, CudaError> {
        let buffer = Self::new(device, bytes.len())?;
        buffer.view().write(bytes)?;
        Ok(buffer)
    }

    /// Copies floats to the device.
    pub fn of_f32(device: &Arc<dyn Device>, values: &[f32]) -> Result<Self, CudaError> {
        let buffer = Self::new(device, size_of_val(values))?;
        buffer.view().write_f32(values)?;
        Ok(buffer)
    }

    /// Copies integers to the device.
    pub fn of_i32(device: &Arc<dyn Device>, values: &[i32]) -> Result<Self, CudaError> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
        Self::of_bytes(device, &bytes)
    }

    /// Allocates uninitialized memory for `values` 32-bit values.
    pub fn new_f32(device: &Arc<dyn Device>, values: usize) -> Result<Self, CudaError> {
        Self::new(device, values.saturating_mul(4))
    }

    /// Returns a view of the whole buffer.
    pub fn view(&self) -> View<'_> {
        View {
            buffer: self,
            at: 0,
            len: self.len,
        }
    }

    /// Returns the device that owns the memory.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }
}

/// A range of bytes of a [`Buffer`].
///
/// Every access panics where it goes beyond the view.
#[derive(Clone, Copy)]
pub struct View<'a> {
    buffer: &'a Buffer,
    at: usize,
    len: usize,
}

impl<'a> View<'a> {
    /// Returns the length in bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether the view has no bytes.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Returns the number of whole 32-bit values.
    pub fn words(self) -> usize {
        self.len / 4
    }

    /// Returns the view of a range of bytes.
    pub fn part(self, bytes: Range<usize>) -> View<'a> {
        assert!(
            bytes.start <= bytes.end && bytes.end <= self.len,
            "bytes {bytes:?} of {} on a device",
            self.len
        );
        View {
            buffer: self.buffer,
            at: self.at + bytes.start,
            len: bytes.len(),
        }
    }

    /// Returns the view of a range of 32-bit values.
    pub fn floats(self, values: Range<usize>) -> View<'a> {
        self.part(values.start.saturating_mul(4)..values.end.saturating_mul(4))
    }

    /// Whether this is memory of a buffer.
    pub(super) fn is_of(self, buffer: &Buffer) -> bool {
        std::ptr::eq(self.buffer, buffer)
    }

    /// Returns the view itself.
    ///
    /// # Panics
    /// When the view is not aligned to the 16 bytes that kernels read at once.
    pub(super) fn aligned(self) -> View<'a> {
        assert!(
            self.address().is_multiple_of(16),
            "a matrix or a row of floats that begins at {:#x}",
            self.address()
        );
        self
    }

    /// Returns the device address.
    pub(super) fn address(self) -> u64 {
        self.buffer.at + self.at as u64
    }

    /// Returns the device address as an argument of a kernel.
    pub(super) fn arg(self) -> Arg {
        Arg::Pointer(self.address())
    }

    /// Overwrites the first bytes.
    pub fn write(self, bytes: &[u8]) -> Result<(), CudaError> {
        let to = self.part(0..bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the part is inside a buffer of this device.
        unsafe { self.buffer.device.write(to.address(), bytes) }
    }

    /// Copies the first bytes to the host.
    pub fn read(self, bytes: &mut [u8]) -> Result<(), CudaError> {
        let from = self.part(0..bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the part is inside a buffer of this device.
        unsafe { self.buffer.device.read(from.address(), bytes) }
    }

    /// Overwrites the whole view with another view of the same length.
    ///
    /// # Panics
    /// When the views overlap, or are of different devices.
    pub fn copy_from(self, from: View<'_>) -> Result<(), CudaError> {
        assert_eq!(self.len, from.len, "bytes of a copy");
        assert!(
            !std::ptr::eq(self.buffer, from.buffer) || self.at.abs_diff(from.at) >= self.len,
            "a copy of bytes onto themselves"
        );
        assert!(
            Arc::ptr_eq(&self.buffer.device, &from.buffer.device),
            "a copy between devices"
        );
        if self.is_empty() {
            return Ok(());
        }
        // SAFETY: both are inside buffers of this device, and apart.
        unsafe {
            self.buffer
                .device
                .copy(self.address(), from.address(), self.len)
        }
    }

    /// Overwrites the first floats.
    pub fn write_f32(self, values: &[f32]) -> Result<(), CudaError> {
        // SAFETY: floats are bytes without gaps.
        self.write(unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values))
        })
    }

    /// Copies the first floats to the host.
    pub fn read_f32(self, values: &mut [f32]) -> Result<(), CudaError> {
        // SAFETY: floats are bytes without gaps, and any bytes are floats.
        self.read(unsafe {
            std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values))
        })
    }

    /// Returns a host copy of all 32-bit floats.
    pub fn to_f32(self) -> Result<Vec<f32>, CudaError> {
        let mut values = vec![0.0; self.words()];
        self.read_f32(&mut values)?;
        Ok(values)
    }

    /// Returns a host copy of all 32-bit integers.
    pub fn to_i32(self) -> Result<Vec<i32>, CudaError> {
        let values = self.to_f32()?;
        Ok(values.into_iter().map(|v| v.to_bits() as i32).collect())
    }

    /// Returns a host copy of all bytes.
    pub fn to_bytes(self) -> Result<Vec<u8>, CudaError> {
        let mut bytes = vec![0; self.len];
        self.read(&mut bytes)?;
        Ok(bytes)
    }
}
