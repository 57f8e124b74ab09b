//! A real GPU: the driver's first context, one stream, and kernels compiled when they are first launched and kept on
//! disk.

use super::device::{Arg, Device, Grid, Recording};
use super::lane::{self, Lane};
use super::nvrtc::{Compiler, NVRTC_VARIABLE};
use super::outbox::{HALF, Outbox};
use super::source::{MODULES, Module, module_of};
use super::{CudaError, View, kept};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};
use cudarc::driver::{CudaContext, DriverError, result};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, PoisonError};
use tier_plan_formats::safely;

/// The oldest driver interface that everything here is in, as the driver numbers it.
const LEAST_DRIVER: i32 = 12_000;

/// The oldest capability that the kernels are compiled for.
const LEAST_CAPABILITY: (i32, i32) = (7, 5);

/// What a GPU says of itself.
#[derive(Debug, Clone)]
pub struct Properties {
    /// Its name.
    pub name: String,
    /// Number among the GPUs that the driver shows, from 0.
    pub ordinal: usize,
    /// Compute capability.
    pub capability: (i32, i32),
    /// All memory.
    pub total_bytes: usize,
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
    /// Second-level cache.
    pub l2_bytes: usize,
    /// The interface that the driver has, 12040 for 12.4.
    pub driver: i32,
}

/// An open GPU.
pub struct Gpu {
    context: Arc<CudaContext>,
    stream: sys::CUstream,
    /// What allocations come from, where the device has such.
    pool: Option<sys::CUmemoryPool>,
    properties: Properties,
    state: Mutex<State>,
    outbox: Mutex<Option<Outbox>>,
}

#[derive(Default)]
struct State {
    compiler: Option<Compiler>,
    modules: HashMap<&'static str, sys::CUmodule>,
    kernels: HashMap<&'static str, sys::CUfunction>,
}

// SAFETY: the driver's handles may be used from any thread whose context is this one, which every function sees to.
unsafe impl Send for Gpu {}
// SAFETY: as above; what changes is behind a mutex, and the stream puts work in one order.
unsafe impl Sync for Gpu {}

impl Drop for Gpu {
    fn drop(&mut self) {
        // A device that failed can't be tidied up.
        if self.context.bind_to_thread().is_err() {
            return;
        }
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let outbox = self.outbox.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nothing that borrows the device is left.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            if let Some(outbox) = outbox {
                outbox.close();
            }
            for module in state.modules.values() {
                let _ = result::module::unload(*module);
            }
            let _ = result::stream::destroy(self.stream);
        }
    }
}

impl Gpu {
    /// Opens a GPU by its number.
    ///
    /// # Errors
    /// When there is no driver, no such GPU, or it or the driver is too old.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        // SAFETY: loading the driver has no requirements.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let failed = |what: &str| {
            let what = what.to_string();
            move |e: DriverError| CudaError::Call { device: format!("GPU {ordinal}"), what, why: words(e) }
        };
        let mut driver = 0;
        // SAFETY: the number outlives the call.
        match unsafe { sys::cuDriverGetVersion(&mut driver) }.result() {
            Err(DriverError(CUresult::CUDA_ERROR_STUB_LIBRARY)) => return Err(CudaError::StubDriver),
            done => done.map_err(failed("asking for the driver's version"))?,
        }
        if driver < LEAST_DRIVER {
            return Err(CudaError::OldDriver { major: driver / 1000, minor: driver % 1000 / 10 });
        }
        match result::init() {
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => {
                return Err(CudaError::NoDevice { ordinal, found: 0 });
            }
            Err(DriverError(CUresult::CUDA_ERROR_STUB_LIBRARY)) => return Err(CudaError::StubDriver),
            done => done.map_err(failed("starting the driver"))?,
        }
        let count = result::device::get_count().map_err(failed("counting GPUs"))?;
        let found = usize::try_from(count).unwrap_or(0);
        if ordinal >= found {
            return Err(CudaError::NoDevice { ordinal, found });
        }
        let context = CudaContext::new(ordinal).map_err(failed("opening it"))?;
        let name = context.name().map_err(failed("asking for its name"))?;
        let capability = context.compute_capability().map_err(failed("asking for its capability"))?;
        if capability < LEAST_CAPABILITY {
            return Err(CudaError::TooOld { name, major: capability.0, minor: capability.1 });
        }
        let attribute = |a| context.attribute(a).map_err(failed("asking for its properties"));
        let properties = Properties {
            name,
            ordinal,
            capability,
            total_bytes: context.total_mem().map_err(failed("asking for its memory"))?,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.try_into().unwrap_or(0),
            driver,
        };
        let pool = context.has_async_alloc().then(|| keep_freed_memory(&context)).transpose();
        let pool = pool.map_err(failed("setting up its memory pool"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("a stream"))?;
        let (state, outbox) = (Mutex::default(), Mutex::default());
        Ok(Arc::new(Self { context, stream, pool, properties, state, outbox }))
    }

    /// What it says of itself.
    pub fn properties(&self) -> &Properties {
        &self.properties
    }

    /// Bytes of its memory that are free now, once all is done that was asked of it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn free_bytes(&self) -> Result<usize, CudaError> {
        self.give_back()?;
        Ok(self.context.mem_get_info().map_err(|e| self.failed("asking for free memory", e))?.0)
    }

    /// Has the pool give back what nobody has: the driver counts what a pool keeps as taken.
    fn give_back(&self) -> Result<(), CudaError> {
        let Some(pool) = self.pool else { return Ok(()) };
        // What was freed is the pool's only when the stream has come that far.
        self.wait()?;
        // SAFETY: the pool is the device's own.
        let done = unsafe { sys::cuMemPoolTrimTo(pool, 0) }.result();
        done.map_err(|e| self.failed("giving back free memory", e))
    }

    /// Its place on the PCI bus, `0000:65:00.0`, by which other libraries know it.
    ///
    /// # Errors
    /// When the device fails.
    pub fn pci(&self) -> Result<String, CudaError> {
        let attribute = |a| self.context.attribute(a).map_err(|e| self.failed("asking for its place", e));
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
    /// When one can't be.
    pub fn prepare(&self) -> Result<(), CudaError> {
        for kernel in MODULES.iter().flat_map(|m| m.kernels) {
            self.kernel(kernel)?;
        }
        Ok(())
    }

    /// Host memory that the GPU reads and writes by itself.
    ///
    /// # Errors
    /// When the system has not got it.
    pub fn pinned(self: &Arc<Self>, len: usize) -> Result<Pinned, CudaError> {
        self.bind()?;
        // SAFETY: the context is current.
        let start = unsafe { result::malloc_host(len.max(1), 0) }.map_err(|e| self.failed("pinning host memory", e))?;
        // SAFETY: as many bytes were allocated.
        unsafe { start.cast::<u8>().write_bytes(0, len) };
        Ok(Pinned { gpu: Arc::clone(self), start: start.cast(), len })
    }

    pub(super) fn bind(&self) -> Result<(), CudaError> {
        self.context.bind_to_thread().map_err(|e| self.failed("choosing the device", e))
    }

    /// The stream that it computes in.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    pub(super) fn failed(&self, what: impl Into<String>, error: DriverError) -> CudaError {
        CudaError::Call { device: self.properties.name.clone(), what: what.into(), why: words(error) }
    }

    fn kernel(&self, name: &'static str) -> Result<sys::CUfunction, CudaError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = state.kernels.get(name) {
            return Ok(*kernel);
        }
        let module = module_of(name).ok_or_else(|| CudaError::NoKernel(name.into()))?;
        let loaded = match state.modules.get(module.name) {
            Some(loaded) => *loaded,
            None => {
                let loaded = self.load(module, &mut state.compiler)?;
                state.modules.insert(module.name, loaded);
                loaded
            }
        };
        // All of them at once: where launches are recorded, the driver loads nothing.
        for name in module.kernels {
            let c_name = CString::new(*name).map_err(|_| CudaError::NoKernel((*name).into()))?;
            // SAFETY: the module is loaded and stays so.
            let kernel = unsafe { result::module::get_function(loaded, c_name) };
            let kernel = kernel.map_err(|e| self.failed(format!("finding kernel {name}"), e))?;
            state.kernels.insert(name, kernel);
        }
        state.kernels.get(name).copied().ok_or_else(|| CudaError::NoKernel(name.into()))
    }

    /// Loads a module from the cache, or compiles it.
    fn load(&self, module: &'static Module, compiler: &mut Option<Compiler>) -> Result<sys::CUmodule, CudaError> {
        let kept = kept::path(module, self.properties.capability, self.properties.driver);
        if let Some(image) = kept.as_ref().and_then(|path| std::fs::read(path).ok()).and_then(|b| kept::unseal(&b))
            && let Ok(loaded) = load_image(&image)
        {
            return Ok(loaded);
        }
        let compiler = match compiler {
            Some(compiler) => compiler,
            None => compiler.insert(Compiler::find_for(self.properties.driver / 1000)?),
        };
        let compiled = compiler.compile(module, self.properties.capability)?;
        let loaded = load_image(&compiled.image).map_err(|e| self.not_loaded(module, compiler, e))?;
        if let Some(path) = kept {
            // A cache that can't be written costs time at the next start, nothing else.
            let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
            let _ = made.is_ok() && safely::write(&path, &kept::seal(&compiled.image)).is_ok();
        }
        Ok(loaded)
    }
}

impl Gpu {
    /// Why the driver takes no kernels that were just compiled.
    fn not_loaded(&self, module: &Module, compiler: &Compiler, error: DriverError) -> CudaError {
        let ((major, minor), driver) = (compiler.version(), self.properties.driver);
        let mut why = words(error);
        if major > driver / 1000 {
            why += &format!(
                "; NVRTC {major}.{minor} made them, which is newer than the driver, of CUDA {}.{}: update the driver, or set \
                 {NVRTC_VARIABLE} to the path of a libnvrtc.so of CUDA {}",
                driver / 1000,
                driver % 1000 / 10,
                driver / 1000
            );
        }
        let (device, what) = (self.properties.name.clone(), format!("loading the kernels of {}", module.name));
        CudaError::Call { device, what, why }
    }

    /// Allocates once.
    fn try_to_allocate(&self, room: usize) -> Result<u64, DriverError> {
        // SAFETY: the context is current, as the caller has seen to.
        unsafe {
            match self.pool {
                Some(_) => result::malloc_async(self.stream, room),
                None => result::malloc_sync(room),
            }
        }
    }
}

/// Loads machine code or PTX into the current context.
fn load_image(image: &[u8]) -> Result<sys::CUmodule, DriverError> {
    // SAFETY: the compiler made it, and what came from disk has the sum that it was written with.
    unsafe { result::module::load_data(image.as_ptr().cast()) }
}

/// Lets the device's pool keep what is freed, for the next allocation; returns it.
fn keep_freed_memory(context: &CudaContext) -> Result<sys::CUmemoryPool, DriverError> {
    let mut pool = std::ptr::null_mut();
    let mut all = u64::MAX;
    let name = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device exists, and the attribute is a 64-bit number.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()).result()?;
        sys::cuMemPoolSetAttribute(pool, name, std::ptr::from_mut(&mut all).cast()).result()?;
    }
    Ok(pool)
}

/// What the driver says about an error.
fn words(error: DriverError) -> String {
    let name = error.error_name().map(|n| n.to_string_lossy().into_owned());
    let text = error.error_string().map(|t| t.to_string_lossy().into_owned());
    format!("{} ({})", text.unwrap_or_else(|_| "unknown error".into()), name.unwrap_or_else(|_| "no name".into()))
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
        // Kernels may look at a few bytes after the end of what they read.
        let room = len.saturating_add(16).max(256);
        let mut made = self.try_to_allocate(room);
        // What was freed in pieces may do as a whole.
        if matches!(made, Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))) && self.give_back().is_ok() {
            made = self.try_to_allocate(room);
        }
        made.map_err(|error| match error {
            DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => CudaError::OutOfMemory {
                device: self.properties.name.clone(),
                wanted: len,
                free: self.free_bytes().unwrap_or(0),
            },
            error => self.failed(format!("allocating {len} bytes"), error),
        })
    }

    unsafe fn free(&self, at: u64) {
        // On a device that failed there is nothing left to free.
        if self.bind().is_err() {
            return;
        }
        // SAFETY: the caller's promise; work that uses the memory was asked for before.
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
        if bytes.len() > HALF {
            // SAFETY: the caller's promise; the bytes stay until the stream has come this far.
            unsafe { result::memcpy_htod_async(to, bytes, self.stream) }.map_err(failed)?;
            return self.wait();
        }
        let mut outbox = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        let outbox = match &mut *outbox {
            Some(outbox) => outbox,
            none => none.insert(Outbox::new().map_err(|e| self.failed("pinning host memory", e))?),
        };
        // SAFETY: the caller's promise; the context is current, and the stream always this one.
        unsafe { outbox.send(to, bytes, self.stream) }.map_err(failed)
    }

    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise; the bytes are there when the stream has come this far.
        let done = unsafe { result::memcpy_dtoh_async(bytes, from, self.stream) };
        done.map_err(|e| self.failed(format!("copying {} bytes from it", bytes.len()), e))?;
        self.wait()
    }

    unsafe fn copy(&self, to: u64, from: u64, len: usize) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the caller's promise.
        let done = unsafe { result::memcpy_dtod_async(to, from, len, self.stream) };
        done.map_err(|e| self.failed(format!("copying {len} bytes within it"), e))
    }

    unsafe fn launch(&self, kernel: &'static str, grid: Grid, args: &[Arg]) -> Result<(), CudaError> {
        self.bind()?;
        let function = self.kernel(kernel)?;
        let [x, y, z] = grid.blocks;
        let mut addresses: Vec<*mut c_void> = args.iter().map(|a| a.address().cast_mut()).collect();
        // SAFETY: the caller's promise about the arguments, which the driver copies.
        let done =
            unsafe { result::launch_kernel(function, (x, y, z), (grid.threads, 1, 1), 0, self.stream, &mut addresses) };
        done.map_err(|e| self.failed(format!("launching {kernel}"), e))
    }

    fn wait(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the stream lives as long as this value.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|e| self.failed("what was asked of it", e))
    }

    fn lane(self: Arc<Self>, len: usize) -> Result<Option<Box<dyn Lane>>, CudaError> {
        lane::open(self, len).map(Some)
    }

    fn begin_recording(&self) -> Result<bool, CudaError> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as this value.
        unsafe { result::stream::begin_capture(self.stream, mode) }
            .map_err(|e| self.failed("recording launches", e))?;
        Ok(true)
    }

    fn end_recording(self: Arc<Self>) -> Result<Box<dyn Recording>, CudaError> {
        self.bind()?;
        // SAFETY: the stream lives as long as this value, and was recording.
        let graph =
            unsafe { result::stream::end_capture(self.stream) }.map_err(|e| self.failed("recording launches", e))?;
        let mut made = std::ptr::null_mut();
        // SAFETY: the graph is whole; what can be launched is made from it, and no longer needs it.
        let done = unsafe {
            let done = sys::cuGraphInstantiateWithFlags(&mut made, graph, 0).result();
            let _ = sys::cuGraphDestroy(graph).result();
            done
        };
        done.map_err(|e| self.failed("preparing recorded launches", e))?;
        Ok(Box::new(Graph { gpu: self, made }))
    }
}

/// Launches that the driver has put together.
struct Graph {
    gpu: Arc<Gpu>,
    made: sys::CUgraphExec,
}

// SAFETY: the handle may be used from any thread whose context is the GPU's, which every function sees to.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.wait().is_ok() {
            // SAFETY: `end_recording` made it, and nothing of it is running.
            let _ = unsafe { sys::cuGraphExecDestroy(self.made) }.result();
        }
    }
}

impl Recording for Graph {
    unsafe fn replay(&self) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: the caller's promise; graph and stream live as long as this value.
        let done = unsafe { sys::cuGraphLaunch(self.made, self.gpu.stream) }.result();
        done.map_err(|e| self.gpu.failed("recorded launches", e))
    }
}

/// Host memory that a GPU copies to and from without the processor.
pub struct Pinned {
    gpu: Arc<Gpu>,
    start: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: `pinned` allocated it, and every copy has been waited for.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
    }
}

impl Pinned {
    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: as many bytes were allocated and set to 0.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    /// Copies all of it to the device, and waits.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there is no room.
    pub fn send(&mut self, to: View<'_>) -> Result<(), CudaError> {
        let to = to.part(0..self.len);
        self.gpu.bind()?;
        let stream = self.gpu.stream;
        // SAFETY: there is room, and the bytes stay until the stream has come this far.
        let done = unsafe { result::memcpy_htod_async(to.address(), self.bytes(), stream) };
        done.map_err(|e| self.gpu.failed(format!("copying {} bytes to it", self.len), e))?;
        self.gpu.wait()
    }

    /// Fills it from the device.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there are too few bytes.
    pub fn receive(&mut self, from: View<'_>) -> Result<(), CudaError> {
        from.read(self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_the_error_says_what_is_missing() {
        // SAFETY: loading the driver has no requirements.
        if unsafe { sys::is_culib_present() } {
            return;
        }
        let message = Gpu::open(0).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("libcuda.so.1") && message.contains("install the driver"), "{message}");
    }
}
