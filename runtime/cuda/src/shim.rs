//! A device for tests: the kernels compiled as plain C++ by the system's compiler, in main memory,
//! a block's threads one after the other. Kernels that different threads launch run at once. Writes
//! beyond a buffer and reads of what nobody wrote are found. With `TIER_PLAN_SANITIZER=1` in the
//! environment every access to memory is checked, as CUDA's Compute Sanitizer does.

use super::CudaError;
use super::copy_stream::CopyStream;
use super::device::{Arg, Device, Grid, Recording};
use super::source::{MODULES, headers, most_threads};
use super::transfers::Transfers;
use libloading::Library;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::ThreadId;
use transfers::{ShimLane, ShimTransfers};

/// Bytes around every buffer that must stay as they are.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;

mod sanitizer;
mod sources;
#[cfg(test)]
mod tests;
mod transfers;

type Run = unsafe extern "C" fn(*mut *mut c_void, *const c_uint) -> c_int;
type Kinds = unsafe extern "C" fn() -> *const c_char;

/// The emulated GPU: its allocations, and the kernels compiled as C++.
pub struct Shim {
    /// The compiled kernels.
    path: PathBuf,
    /// Whether they check every access to memory.
    is_sanitized: bool,
    /// Copies of them that no kernel runs in. A copy's variables are its own, and it runs one
    /// kernel at a time.
    idle: Mutex<Vec<Library>>,
    /// Bytes of what is allocated, and the kernels that were launched.
    state: Mutex<(HashMap<u64, usize>, BTreeSet<&'static str>)>,
    /// What threads that record have launched.
    recordings: Mutex<HashMap<ThreadId, Vec<Launch>>>,
}

/// A kernel with its grid and arguments.
type Launch = (&'static str, Grid, Vec<Arg>);

/// Launches to do again.
struct Recorded {
    shim: Arc<Shim>,
    launches: Vec<Launch>,
}

impl Recording for Recorded {
    unsafe fn replay(&self) -> Result<(), CudaError> {
        // SAFETY: the caller's promise, and that of who launched them.
        self.launches
            .iter()
            .try_for_each(|(kernel, grid, args)| unsafe { self.shim.run(kernel, *grid, args) })
    }
}

/// The one device of all tests.
pub fn shared() -> Arc<Shim> {
    static SHIM: LazyLock<Arc<Shim>> = LazyLock::new(|| {
        let modules: Vec<sources::ModuleText> = MODULES
            .iter()
            .map(|m| (m.name, m.text, m.kernels))
            .collect();
        Arc::new(Shim::compile(&modules, sanitizer::is_wanted()))
    });
    Arc::clone(&SHIM)
}

impl Shim {
    fn compile(modules: &[sources::ModuleText], is_sanitized: bool) -> Self {
        let options: &[&str] = if is_sanitized {
            &sanitizer::OPTIONS
        } else {
            &[]
        };
        Self {
            path: sources::kernels(headers(), modules, options).join(sources::KERNELS_LIBRARY),
            is_sanitized,
            idle: Mutex::default(),
            state: Mutex::default(),
            recordings: Mutex::default(),
        }
    }

    /// Takes a copy of the kernels that is idle, or loads another.
    fn take_library(&self) -> Library {
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        idle.unwrap_or_else(|| {
            // What is loaded twice from one file is loaded once.
            let copy = tempfile::NamedTempFile::new().unwrap();
            std::fs::copy(&self.path, copy.path()).unwrap();
            // SAFETY: the library has no code that runs when it is loaded.
            unsafe { Library::new(copy.path()) }.unwrap()
        })
    }

    /// A real device refuses what is not a launch meanwhile.
    fn must_not_record(&self) {
        let recordings = self
            .recordings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        assert!(
            !recordings.contains_key(&std::thread::current().id()),
            "not a launch in a recording"
        );
    }

    /// Runs a kernel.
    ///
    /// # Safety
    /// As [`Device::launch`].
    unsafe fn run(&self, kernel: &'static str, grid: Grid, args: &[Arg]) -> Result<(), CudaError> {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .1
            .insert(kernel);
        if grid.threads > most_threads(kernel) {
            return Err(self.failed(kernel, format!("a block has {} threads", grid.threads)));
        }
        let library = self.take_library();
        self.check_kinds(&library, kernel, args)?;
        // SAFETY: the generated functions have this type.
        let run = unsafe { library.get::<Run>(format!("run_{kernel}").as_bytes()) };
        let run = run.map_err(|_| CudaError::NoKernel(kernel.into()))?;
        let mut addresses: Vec<*mut c_void> = args.iter().map(|a| a.address().cast_mut()).collect();
        let [x, y, z] = grid.blocks;
        let dims = [x, y, z, grid.threads, 1, 1];
        let allocations = self.is_sanitized.then(|| {
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let known = state.0.iter().map(|(&at, &len)| (at, len));
            // SAFETY: the list lives until the launch is over.
            unsafe { sanitizer::set_allocations(&library, known) }
        });
        // SAFETY: the caller's promise about the arguments; no other kernel runs in this copy.
        let status = unsafe { run(addresses.as_mut_ptr(), dims.as_ptr()) };
        let finding = allocations.and_then(|_| sanitizer::finding(&library, &self.path));
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(library);
        if let Some(finding) = finding {
            return Err(self.failed(kernel, finding));
        }
        let why = match status {
            0 => return Ok(()),
            1 => "too many threads in a block",
            2 => "no memory for threads",
            _ => "threads wait for others that never come",
        };
        Err(self.failed(kernel, why.into()))
    }

    /// A driver takes as many bytes from the address of an argument as the kernel's parameter has,
    /// whatever is there.
    fn check_kinds(
        &self,
        library: &Library,
        kernel: &'static str,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        // SAFETY: the generated functions have this type, and return constants.
        let kinds = unsafe {
            let kinds = library.get::<Kinds>(format!("kinds_{kernel}").as_bytes());
            CStr::from_ptr(kinds.map_err(|_| CudaError::NoKernel(kernel.into()))?())
        };
        let kind = |arg: &Arg| match arg {
            Arg::Pointer(_) => 'p',
            Arg::Int(_) => 'i',
            Arg::Long(_) => 'l',
            Arg::Float(_) => 'f',
        };
        let (wanted, given) = (
            kinds.to_string_lossy(),
            args.iter().map(kind).collect::<String>(),
        );
        if wanted == given {
            return Ok(());
        }
        Err(self.failed(
            kernel,
            format!("it takes arguments of the kinds {wanted}, not {given}"),
        ))
    }

    fn failed(&self, kernel: &str, why: String) -> CudaError {
        CudaError::Call {
            device: self.name().into(),
            what: kernel.into(),
            why,
        }
    }

    /// The kernels that were launched so far.
    pub fn launched(&self) -> BTreeSet<&'static str> {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .1
            .clone()
    }
}

fn layout(len: usize) -> Layout {
    Layout::from_size_align(len + 2 * GUARD, 256).unwrap()
}

impl Device for Shim {
    fn name(&self) -> &str {
        "the processor as a device"
    }

    fn free_bytes(&self) -> Result<usize, CudaError> {
        Ok(1 << 40)
    }

    fn allocate(&self, len: usize) -> Result<u64, CudaError> {
        self.must_not_record();
        // SAFETY: the size is not 0.
        let at = unsafe { alloc(layout(len)) };
        assert!(!at.is_null());
        // SAFETY: as many bytes were allocated. What nobody wrote is NaN.
        unsafe {
            at.write_bytes(GUARD_BYTE, len + 2 * GUARD);
            at.add(GUARD).write_bytes(0xff, len);
        }
        let at = at as u64 + GUARD as u64;
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .insert(at, len);
        Ok(at)
    }

    unsafe fn free(&self, at: u64) {
        self.must_not_record();
        let len = self
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .remove(&at)
            .unwrap();
        let start = (at - GUARD as u64) as *mut u8;
        // SAFETY: `allocate` made this, with guards on both sides.
        let whole = unsafe { std::slice::from_raw_parts(start, len + 2 * GUARD) };
        let mut guards = whole[..GUARD].iter().chain(&whole[GUARD + len..]);
        if !std::thread::panicking() {
            assert!(
                guards.all(|b| *b == GUARD_BYTE),
                "a kernel wrote beyond a buffer of {len} bytes"
            );
        }
        // SAFETY: as above, and it is not used afterwards.
        unsafe { dealloc(start, layout(len)) };
    }

    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
        self.must_not_record();
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.must_not_record();
        // SAFETY: the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len())
        };
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, len: usize) -> Result<(), CudaError> {
        self.must_not_record();
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, len) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Grid,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let mut recordings = self
            .recordings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(launches) = recordings.get_mut(&std::thread::current().id()) {
            launches.push((kernel, grid, args.to_vec()));
            return Ok(());
        }
        drop(recordings);
        // SAFETY: the caller's promise.
        unsafe { self.run(kernel, grid, args) }
    }

    fn wait(&self) -> Result<(), CudaError> {
        self.must_not_record();
        Ok(())
    }

    fn begin_recording(&self) -> Result<bool, CudaError> {
        let mut recordings = self
            .recordings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        assert!(
            recordings
                .insert(std::thread::current().id(), Vec::new())
                .is_none(),
            "a recording in a recording"
        );
        Ok(true)
    }

    fn end_recording(self: Arc<Self>) -> Result<Box<dyn Recording>, CudaError> {
        let launches = self
            .recordings
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&std::thread::current().id());
        Ok(Box::new(Recorded {
            launches: launches.unwrap(),
            shim: self,
        }))
    }

    fn transfers(self: Arc<Self>) -> Result<Option<Box<dyn Transfers>>, CudaError> {
        Ok(Some(Box::new(ShimTransfers::default())))
    }

    fn copy_stream(self: Arc<Self>, len: usize) -> Result<Option<Box<dyn CopyStream>>, CudaError> {
        Ok(Some(Box::new(ShimLane::new(len))))
    }
}
