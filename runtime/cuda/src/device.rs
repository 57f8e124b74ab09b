//! A device: memory of its own, and kernels launched on it, all in one order.

use super::CudaError;
use super::lane::Lane;
use std::ops::Range;
use std::sync::Arc;

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// An address in the device's memory; 0 is null.
    Pointer(u64),
    /// `int`.
    Int(i32),
    /// `long long`.
    Long(i64),
    /// `float`.
    Float(f32),
}

impl Arg {
    /// Where the value is.
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
    /// Blocks.
    pub blocks: [u32; 3],
    /// Threads of a block, whole warps of 32.
    pub threads: u32,
}

/// Memory and launches. What is asked of a device happens in the order that it was asked in.
pub trait Device: Send + Sync {
    /// What it is called.
    fn name(&self) -> &str;

    /// Bytes of its memory that are free now.
    ///
    /// # Errors
    /// When the device fails.
    fn free_bytes(&self) -> Result<usize, CudaError>;

    /// Memory that begins at a multiple of 256 and goes on for at least 16 bytes after its end.
    ///
    /// # Errors
    /// When there is not enough.
    fn allocate(&self, len: usize) -> Result<u64, CudaError>;

    /// Gives memory back.
    ///
    /// # Safety
    /// `at` came from `allocate` of this device and is not used afterwards.
    unsafe fn free(&self, at: u64);

    /// Copies bytes to the device; they have been taken when this returns.
    ///
    /// # Errors
    /// When the device fails, now or at something that was asked of it before.
    ///
    /// # Safety
    /// `to..to + bytes.len()` is memory of this device.
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError>;

    /// Copies bytes from the device, after everything that was asked before.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    ///
    /// # Safety
    /// `from..from + bytes.len()` is memory of this device.
    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError>;

    /// Copies bytes from one place of its memory to another, which does not overlap it: by itself where it can, else by way
    /// of main memory.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    ///
    /// # Safety
    /// `to..to + len` and `from..from + len` are memory of this device, and have nothing in common.
    unsafe fn copy(&self, to: u64, from: u64, len: usize) -> Result<(), CudaError> {
        let mut bytes = vec![0; len];
        // SAFETY: the caller's promise.
        unsafe {
            self.read(from, &mut bytes)?;
            self.write(to, &bytes)
        }
    }

    /// Starts a kernel.
    ///
    /// # Errors
    /// When it can't be compiled or started.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and with them it touches only memory of this device.
    unsafe fn launch(&self, kernel: &'static str, grid: Grid, args: &[Arg]) -> Result<(), CudaError>;

    /// Waits until everything that was asked is done.
    ///
    /// # Errors
    /// When any of it failed.
    fn wait(&self) -> Result<(), CudaError>;

    /// A way for bytes to it beside what it computes, with host buffers of so many bytes; `None` where there is none.
    ///
    /// # Errors
    /// When the system has not got the memory, or the device fails.
    fn lane(self: Arc<Self>, _len: usize) -> Result<Option<Box<dyn Lane>>, CudaError> {
        Ok(None)
    }

    /// Begins to record what this thread launches, instead of doing it; false where that can't be done. Until
    /// [`end_recording`](Self::end_recording) this thread may do nothing but launch kernels that were launched before.
    ///
    /// # Errors
    /// When the device fails.
    fn begin_recording(&self) -> Result<bool, CudaError> {
        Ok(false)
    }

    /// Ends the recording that this thread began.
    ///
    /// # Errors
    /// When the device fails, or did something else meanwhile than launch kernels.
    fn end_recording(self: Arc<Self>) -> Result<Box<dyn Recording>, CudaError> {
        let (device, what) = (self.name().to_string(), "ending a recording".to_string());
        Err(CudaError::Call { device, what, why: "none was begun".into() })
    }
}

/// Launches that were recorded, with their arguments.
pub trait Recording: Send {
    /// Does them all in their order.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Safety
    /// The memory that the launches touch is still that of this device.
    unsafe fn replay(&self) -> Result<(), CudaError>;
}

impl std::fmt::Debug for dyn Device + '_ {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Memory of a device, given back when dropped. Kernels change what a shared reference names: their order is that of the
/// calls.
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
    /// `len` bytes, of which nothing is known yet.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn new(device: &Arc<dyn Device>, len: usize) -> Result<Self, CudaError> {
        Ok(Self { device: Arc::clone(device), at: device.allocate(len)?, len })
    }

    /// A copy of bytes.
    ///
    /// # Errors
    /// When there is not enough memory, or copying fails.
    pub fn of_bytes(device: &Arc<dyn Device>, bytes: &[u8]) -> Result<Self, CudaError> {
        let buffer = Self::new(device, bytes.len())?;
        buffer.view().write(bytes)?;
        Ok(buffer)
    }

    /// A copy of floats.
    ///
    /// # Errors
    /// As [`of_bytes`](Self::of_bytes).
    pub fn of_f32(device: &Arc<dyn Device>, values: &[f32]) -> Result<Self, CudaError> {
        let buffer = Self::new(device, size_of_val(values))?;
        buffer.view().write_f32(values)?;
        Ok(buffer)
    }

    /// A copy of whole numbers.
    ///
    /// # Errors
    /// As [`of_bytes`](Self::of_bytes).
    pub fn of_i32(device: &Arc<dyn Device>, values: &[i32]) -> Result<Self, CudaError> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
        Self::of_bytes(device, &bytes)
    }

    /// Room for floats.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn room_f32(device: &Arc<dyn Device>, values: usize) -> Result<Self, CudaError> {
        Self::new(device, values.saturating_mul(4))
    }

    /// All of it.
    pub fn view(&self) -> View<'_> {
        View { buffer: self, at: 0, len: self.len }
    }

    /// The device it is on.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }
}

/// Some bytes of a [`Buffer`].
#[derive(Clone, Copy)]
pub struct View<'a> {
    buffer: &'a Buffer,
    at: usize,
    len: usize,
}

impl<'a> View<'a> {
    /// Bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// 32-bit values that there is room for.
    pub fn words(self) -> usize {
        self.len / 4
    }

    /// Some of the bytes.
    ///
    /// # Panics
    /// When they are not all there.
    pub fn part(self, bytes: Range<usize>) -> View<'a> {
        assert!(bytes.start <= bytes.end && bytes.end <= self.len, "bytes {bytes:?} of {} on a device", self.len);
        View { buffer: self.buffer, at: self.at + bytes.start, len: bytes.len() }
    }

    /// Some of the floats.
    ///
    /// # Panics
    /// When they are not all there.
    pub fn floats(self, values: Range<usize>) -> View<'a> {
        self.part(values.start.saturating_mul(4)..values.end.saturating_mul(4))
    }

    /// Itself, if it begins where kernels may read 16 bytes at once.
    ///
    /// # Panics
    /// When it does not.
    pub(super) fn aligned(self) -> View<'a> {
        assert!(self.address().is_multiple_of(16), "a matrix or a row of floats that begins at {:#x}", self.address());
        self
    }

    /// The address.
    pub(super) fn address(self) -> u64 {
        self.buffer.at + self.at as u64
    }

    /// The address as an argument.
    pub(super) fn arg(self) -> Arg {
        Arg::Pointer(self.address())
    }

    /// Overwrites the first bytes.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there are too many.
    pub fn write(self, bytes: &[u8]) -> Result<(), CudaError> {
        let room = self.part(0..bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the part is inside a buffer of this device.
        unsafe { self.buffer.device.write(room.address(), bytes) }
    }

    /// Copies the first bytes back.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there are too few.
    pub fn read(self, bytes: &mut [u8]) -> Result<(), CudaError> {
        let from = self.part(0..bytes.len());
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the part is inside a buffer of this device.
        unsafe { self.buffer.device.read(from.address(), bytes) }
    }

    /// Overwrites all of it with bytes of another buffer of the device, as many.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there are more or fewer, or they are of the same buffer or of another device.
    pub fn copy_from(self, from: View<'_>) -> Result<(), CudaError> {
        assert_eq!(self.len, from.len, "bytes of a copy");
        assert!(!std::ptr::eq(self.buffer, from.buffer), "a copy within a buffer");
        assert!(Arc::ptr_eq(&self.buffer.device, &from.buffer.device), "a copy between devices");
        if self.is_empty() {
            return Ok(());
        }
        // SAFETY: both are inside buffers of this device, which are two.
        unsafe { self.buffer.device.copy(self.address(), from.address(), self.len) }
    }

    /// Overwrites the first floats.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there are too many.
    pub fn write_f32(self, values: &[f32]) -> Result<(), CudaError> {
        // SAFETY: floats are bytes without gaps.
        self.write(unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) })
    }

    /// Copies the first floats back.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there are too few.
    pub fn read_f32(self, values: &mut [f32]) -> Result<(), CudaError> {
        // SAFETY: floats are bytes without gaps, and any bytes are floats.
        self.read(unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) })
    }

    /// All floats.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_f32(self) -> Result<Vec<f32>, CudaError> {
        let mut values = vec![0.0; self.words()];
        self.read_f32(&mut values)?;
        Ok(values)
    }

    /// All 32-bit whole numbers.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_i32(self) -> Result<Vec<i32>, CudaError> {
        let values = self.to_f32()?;
        Ok(values.into_iter().map(|v| v.to_bits() as i32).collect())
    }

    /// All bytes.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_bytes(self) -> Result<Vec<u8>, CudaError> {
        let mut bytes = vec![0; self.len];
        self.read(&mut bytes)?;
        Ok(bytes)
    }
}
