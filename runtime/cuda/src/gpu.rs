//! A real GPU: the driver's primary context and one stream. Kernels are compiled when they are
//! first wanted, and cached on disk.

use super::copy_stream::{self, CopyStream};
use super::device::{Arg, Device, Grid, Recording};
use super::kernel_images::KernelImages;
use super::nvrtc::NVRTC_VARIABLE;
use super::source::{MODULES, Module, module_of};
use super::transfers::{self, Transfers};
use super::upload_ring::{HALF_BYTES, UploadRing};
use super::{CudaError, Version, graph};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};
use cudarc::driver::{CudaContext, DriverError, result};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};

pub use super::pinned::Pinned;

/// Oldest supported driver interface, as the driver numbers it: CUDA 12.0.
const MIN_DRIVER: i32 = 12_000;

/// Oldest compute capability that the kernels are compiled for.
const MIN_CAPABILITY: Version = Version { major: 7, minor: 5 };

/// Smallest allocation in bytes.
const MIN_ALLOCATION: usize = 256;

/// Bytes after the end of an allocation that kernels may read.
const OVERREAD: usize = 16;

/// Properties of a GPU.
#[derive(Debug, Clone)]
pub struct Properties {
    /// Name of the GPU.
    pub name: String,
    /// Number among the GPUs that the driver shows, from 0.
    pub ordinal: usize,
    /// Compute capability, `8.6`.
    pub capability: Version,
    /// Bytes of memory, free or not.
    pub total_bytes: usize,
    /// Number of streaming multiprocessors.
    pub multiprocessors: i32,
    /// Bytes of second-level cache.
    pub l2_bytes: usize,
    /// Version of the driver's interface, 12040 for 12.4.
    pub driver: i32,
}

/// An open GPU with its stream and its loaded kernels.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    /// Memory pool of the allocations, where the device supports one.
    pool: Option<sys::CUmemoryPool>,
    properties: Properties,
    loaded: Mutex<LoadedKernels>,
    /// Made at the first write.
    upload_ring: Mutex<Option<UploadRing>>,
}

struct LoadedKernels {
    images: KernelImages,
    modules: HashMap<&'static str, sys::CUmodule>,
    kernels: HashMap<&'static str, sys::CUfunction>,
}

// SAFETY: driver handles may be used from any thread that has the context bound, which every
// function here ensures.
unsafe impl Send for Gpu {}
// SAFETY: driver handles may be shared for the same reason. Mutable state is behind a mutex, and
// the stream puts work in one order.
unsafe impl Sync for Gpu {}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Nothing can be freed on a device that failed.
        if self.context.bind_to_thread().is_err() {
            return;
        }
        let loaded = self
            .loaded
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let upload_ring = self
            .upload_ring
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nothing that borrows the device is left.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            if let Some(ring) = upload_ring {
                ring.close();
            }
            for module in loaded.modules.values() {
                let _ = result::module::unload(*module);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}

impl Gpu {
    /// Opens a GPU by its ordinal.
    ///
    /// # Errors
    /// When there is no driver, no such GPU, or either is too old.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        let failed = |what: &str| open_failed(ordinal, what);
        let driver = start_driver(ordinal)?;
        let count = result::device::get_count().map_err(failed("counting GPUs"))?;
        let found = usize::try_from(count).unwrap_or(0);
        if ordinal >= found {
            return Err(CudaError::NoDevice { ordinal, found });
        }
        let context = CudaContext::new(ordinal).map_err(failed("opening it"))?;
        let name = context.name().map_err(failed("asking for its name"))?;
        let (major, minor) = context
            .compute_capability()
            .map_err(failed("asking for its capability"))?;
        let capability = Version { major, minor };
        if capability < MIN_CAPABILITY {
            return Err(CudaError::TooOld { name, capability });
        }
        let attribute = |a| {
            context
                .attribute(a)
                .map_err(failed("asking for its properties"))
        };
        let properties = Properties {
            name,
            ordinal,
            capability,
            total_bytes: context
                .total_mem()
                .map_err(failed("asking for its memory"))?,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?
                .try_into()
                .unwrap_or(0),
            driver,
        };
        let pool = context
            .has_async_alloc()
            .then(|| keep_freed_memory(&context))
            .transpose();
        let pool = pool.map_err(failed("setting up its memory pool"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("a stream"))?;
        let loaded = LoadedKernels {
            images: KernelImages::new(capability, driver),
            modules: HashMap::new(),
            kernels: HashMap::new(),
        };
        Ok(Arc::new(Self {
            context,
            stream,
            pool,
            properties,
            loaded: Mutex::new(loaded),
            upload_ring: Mutex::default(),
        }))
    }

    /// Returns the properties of the GPU.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Returns the free bytes of memory, after everything is done that was enqueued.
    pub fn free_bytes(&self) -> Result<usize, CudaError> {
        self.trim_pool()?;
        Ok(self
            .context
            .mem_get_info()
            .map_err(|e| self.failed("asking for free memory", e))?
            .0)
    }

    /// Returns the pool's unused memory to the driver, which counts it as allocated.
    fn trim_pool(&self) -> Result<(), CudaError> {
        let Some(pool) = self.pool else { return Ok(()) };
        // Freed memory is unused only when the stream has come that far.
        self.wait_for_stream()?;
        // SAFETY: the pool is the device's own.
        let trimmed = unsafe { sys::cuMemPoolTrimTo(pool, 0) }.result();
        trimmed.map_err(|e| self.failed("giving back free memory", e))
    }

    /// Returns the PCI address, `0000:65:00.0`, by which other libraries identify the GPU.
    pub fn pci(&self) -> Result<String, CudaError> {
        let attribute = |a| {
            self.context
                .attribute(a)
                .map_err(|e| self.failed("asking for its place", e))
        };
        Ok(format!(
            "{:04x}:{:02x}:{:02x}.0",
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?
        ))
    }

    /// Compiles and loads every kernel that is not loaded yet.
    ///
    /// # Errors
    /// When a kernel can't be compiled or loaded.
    pub fn prepare(&self) -> Result<(), CudaError> {
        for kernel in MODULES.iter().flat_map(|m| m.kernels) {
            self.kernel(kernel)?;
        }
        Ok(())
    }

    /// Allocates page-locked host memory.
    ///
    /// # Errors
    /// When the system can't pin `len` bytes.
    pub fn pinned(self: &Arc<Self>, len: usize) -> Result<Pinned, CudaError> {
        Pinned::new(self, len)
    }

    /// Makes the GPU's context current on this thread.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        self.context
            .bind_to_thread()
            .map_err(|e| self.failed("choosing the device", e))
    }

    /// Returns the compute stream.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Waits until everything in the compute stream is done.
    pub(super) fn wait_for_stream(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the stream lives as long as this value.
        unsafe { result::stream::synchronize(self.stream) }
            .map_err(|e| self.failed("what was asked of it", e))
    }

    pub(super) fn failed(&self, what: impl Into<String>, error: DriverError) -> CudaError {
        CudaError::Call {
            device: self.properties.name.clone(),
            what: what.into(),
            why: driver_message(error),
        }
    }

    fn kernel(&self, name: &'static str) -> Result<sys::CUfunction, CudaError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = loaded.kernels.get(name) {
            return Ok(*kernel);
        }
        let module = module_of(name).ok_or_else(|| CudaError::NoKernel(name.into()))?;
        let handle = match loaded.modules.get(module.name) {
            Some(handle) => *handle,
            None => {
                let handle = self.load(module, &mut loaded.images)?;
                loaded.modules.insert(module.name, handle);
                handle
            }
        };
        // All kernels at once, as the driver loads nothing while launches are recorded.
        for name in module.kernels {
            let c_name = CString::new(*name).map_err(|_| CudaError::NoKernel((*name).into()))?;
            // SAFETY: the module is loaded and stays so.
            let kernel = unsafe { result::module::get_function(handle, c_name) };
            let kernel = kernel.map_err(|e| self.failed(format!("finding kernel {name}"), e))?;
            loaded.kernels.insert(name, kernel);
        }
        loaded
            .kernels
            .get(name)
            .copied()
            .ok_or_else(|| CudaError::NoKernel(name.into()))
    }

    /// Loads a module from the cache on disk, or compiles it.
    fn load(
        &self,
        module: &'static Module,
        images: &mut KernelImages,
    ) -> Result<sys::CUmodule, CudaError> {
        if let Some(image) = images.find(module)
            && let Ok(handle) = load_image(&image)
        {
            return Ok(handle);
        }
        let image = images.compile(module)?;
        load_image(&image).map_err(|e| self.not_loaded(module, images, e))
    }

    /// Explains why the driver rejected kernels that were just compiled.
    fn not_loaded(&self, module: &Module, images: &KernelImages, error: DriverError) -> CudaError {
        let driver = Version::of_driver(self.properties.driver);
        let mut why = driver_message(error);
        if let Some(nvrtc) = images
            .compiler_version()
            .filter(|nvrtc| nvrtc.major > driver.major)
        {
            why += &format!(
                "; NVRTC {nvrtc} made them, which is newer than the driver, of CUDA {driver}: update the driver, or set \
                 {NVRTC_VARIABLE} to the path of a libnvrtc.so of CUDA {}",
                driver.major
            );
        }
        let (device, what) = (
            self.properties.name.clone(),
            format!("loading the kernels of {}", module.name),
        );
        CudaError::Call { device, what, why }
    }

    /// Allocates from the pool, where there is one. The caller has bound the context.
    fn try_to_allocate(&self, len: usize) -> Result<u64, DriverError> {
        // SAFETY: the context is current.
        unsafe {
            match self.pool {
                Some(_) => result::malloc_async(self.stream, len),
                None => result::malloc_sync(len),
            }
        }
    }
}

/// Loads machine code or PTX into the current context.
fn load_image(image: &[u8]) -> Result<sys::CUmodule, DriverError> {
    // SAFETY: the compiler made the image; one from disk has the checksum that it was written with.
    unsafe { result::module::load_data(image.as_ptr().cast()) }
}

/// Sets the device's memory pool to keep freed memory for the next allocation, and returns it.
fn keep_freed_memory(context: &CudaContext) -> Result<sys::CUmemoryPool, DriverError> {
    let mut pool = std::ptr::null_mut();
    let mut threshold = u64::MAX;
    let name = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device exists, and the attribute is a 64-bit number.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()).result()?;
        sys::cuMemPoolSetAttribute(pool, name, std::ptr::from_mut(&mut threshold).cast())
            .result()?;
    }
    Ok(pool)
}

/// Initializes the driver, and returns the version of its interface as the driver numbers it.
fn start_driver(ordinal: usize) -> Result<i32, CudaError> {
    // SAFETY: loading the driver has no requirements.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let mut driver = 0;
    // SAFETY: the number outlives the call.
    match unsafe { sys::cuDriverGetVersion(&mut driver) }.result() {
        Err(DriverError(CUresult::CUDA_ERROR_STUB_LIBRARY)) => return Err(CudaError::StubDriver),
        done => done.map_err(open_failed(ordinal, "asking for the driver's version"))?,
    }
    if driver < MIN_DRIVER {
        return Err(CudaError::OldDriver {
            found: Version::of_driver(driver),
        });
    }
    match result::init() {
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => {
            Err(CudaError::NoDevice { ordinal, found: 0 })
        }
        Err(DriverError(CUresult::CUDA_ERROR_STUB_LIBRARY)) => Err(CudaError::StubDriver),
        done => done
            .map(|()| driver)
            .map_err(open_failed(ordinal, "starting the driver")),
    }
}

/// Makes an error of a GPU whose name is not known yet.
fn open_failed(ordinal: usize, what: &str) -> impl Fn(DriverError) -> CudaError + use<> {
    let what = what.to_string();
    move |e| CudaError::Call {
        device: format!("GPU {ordinal}"),
        what: what.clone(),
        why: driver_message(e),
    }
}

/// Returns the driver's message and name of an error.
fn driver_message(error: DriverError) -> String {
    let name = error.error_name().map(|n| n.to_string_lossy().into_owned());
    let text = error
        .error_string()
        .map(|t| t.to_string_lossy().into_owned());
    format!(
        "{} ({})",
        text.unwrap_or_else(|_| "unknown error".into()),
        name.unwrap_or_else(|_| "no name".into())
    )
}

impl Device for Gpu {
    fn name(&self) -> &str {
        &self.properties.name
    }

    fn free_bytes(&self) -> Result<usize, CudaError> {
        Gpu::free_bytes(self)
    }

    fn allocate(&self, len: usize) -> Result<u64, CudaError> {
        self.bind()?;
        let padded = len.saturating_add(OVERREAD).max(MIN_ALLOCATION);
        let mut allocated = self.try_to_allocate(padded);
        // Memory that the pool keeps in pieces may suffice once the driver has joined them.
        if matches!(
            allocated,
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))
        ) && self.trim_pool().is_ok()
        {
            allocated = self.try_to_allocate(padded);
        }
        allocated.map_err(|error| match error {
            DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => CudaError::OutOfMemory {
                device: self.properties.name.clone(),
                wanted: len,
                free: self.free_bytes().unwrap_or(0),
            },
            error => self.failed(format!("allocating {len} bytes"), error),
        })
    }

    unsafe fn free(&self, at: u64) {
        // Nothing can be freed on a device that failed.
        if self.bind().is_err() {
            return;
        }
        // SAFETY: the caller's promise; work that uses the memory was enqueued before.
        unsafe {
            let _ = match self.pool {
                Some(_) => result::free_async(at, self.stream),
                None => result::free_sync(at),
            };
        }
    }

    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
        self.bind()?;
        let failed = |e| self.failed(format!("copying {} bytes to it", bytes.len()), e);
        let mut upload_ring = self
            .upload_ring
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let ring = match &mut *upload_ring {
            Some(ring) => ring,
            none => {
                none.insert(UploadRing::new().map_err(|e| self.failed("pinning host memory", e))?)
            }
        };
        // Never from where they are: the driver copies from no memory of which it has locked a part.
        let mut to = to;
        bytes.chunks(HALF_BYTES).try_for_each(|piece| {
            // SAFETY: the caller's promise; the context is current, and the stream always this one.
            unsafe { ring.send(to, piece, self.stream) }.map_err(failed)?;
            to += piece.len() as u64;
            Ok(())
        })
    }

    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise; the bytes stay until the copy is done.
        let enqueued = unsafe { result::memcpy_dtoh_async(bytes, from, self.stream) };
        enqueued.map_err(|e| self.failed(format!("copying {} bytes from it", bytes.len()), e))?;
        self.wait_for_stream()
    }

    unsafe fn copy(&self, to: u64, from: u64, len: usize) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise.
        let enqueued = unsafe { result::memcpy_dtod_async(to, from, len, self.stream) };
        enqueued.map_err(|e| self.failed(format!("copying {len} bytes within it"), e))
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Grid,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        self.bind()?;
        let function = self.kernel(kernel)?;
        let [x, y, z] = grid.blocks;
        let mut addresses: Vec<*mut c_void> = args.iter().map(|a| a.address().cast_mut()).collect();
        // SAFETY: the caller's promise about the arguments, which the driver copies.
        let launched = unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (grid.threads, 1, 1),
                0,
                self.stream,
                &mut addresses,
            )
        };
        launched.map_err(|e| self.failed(format!("launching {kernel}"), e))
    }

    fn wait(&self) -> Result<(), CudaError> {
        self.wait_for_stream()
    }

    fn copy_stream(self: Arc<Self>, len: usize) -> Result<Option<Box<dyn CopyStream>>, CudaError> {
        copy_stream::open(self, len).map(Some)
    }

    fn transfers(self: Arc<Self>) -> Result<Option<Box<dyn Transfers>>, CudaError> {
        transfers::open(self).map(Some)
    }

    fn begin_recording(&self) -> Result<bool, CudaError> {
        graph::begin_capture(self).map(|()| true)
    }

    fn end_recording(self: Arc<Self>) -> Result<Box<dyn Recording>, CudaError> {
        graph::end_capture(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_is_named_in_the_error() {
        // SAFETY: loading the driver has no requirements.
        if unsafe { sys::is_culib_present() } {
            return;
        }
        let message = Gpu::open(0)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(
            message.contains("libcuda.so.1") && message.contains("install the driver"),
            "{message}"
        );
    }
}
