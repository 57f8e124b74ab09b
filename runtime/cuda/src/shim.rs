//! A device for tests: the kernels compiled as plain C++ by the system's compiler, in main memory,
//! a block's threads one after the other. Kernels that different threads launch run at once. Writes
//! beyond a buffer and reads of what nobody wrote are found.

use super::copy_stream::{BUFFERS, CopyStream};
#[cfg(test)]
use super::device::Buffer;
use super::device::{Arg, Device, Grid, Recording};
use super::source::{MODULES, headers};
use super::transfers::{TransferId, TransferOrder, Transfers};
use super::{CudaError, View};
use libloading::Library;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::ThreadId;

/// Bytes around every buffer that must stay as they are.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;

mod sources;

type Run = unsafe extern "C" fn(*mut *mut c_void, *const c_uint) -> c_int;
type Kinds = unsafe extern "C" fn() -> *const c_char;

/// The emulated GPU: its allocations, and the kernels compiled as C++.
pub struct Shim {
    /// The compiled kernels.
    path: PathBuf,
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
    static SHIM: LazyLock<Arc<Shim>> = LazyLock::new(|| Arc::new(Shim::compile()));
    Arc::clone(&SHIM)
}

impl Shim {
    fn compile() -> Self {
        let modules: Vec<sources::ModuleText> = MODULES
            .iter()
            .map(|m| (m.name, m.text, m.kernels))
            .collect();
        let path = sources::kernels(headers(), &modules).join(sources::KERNELS_LIBRARY);
        Self {
            path,
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
        let library = self.take_library();
        self.check_kinds(&library, kernel, args)?;
        // SAFETY: the generated functions have this type.
        let run = unsafe { library.get::<Run>(format!("run_{kernel}").as_bytes()) };
        let run = run.map_err(|_| CudaError::NoKernel(kernel.into()))?;
        let mut addresses: Vec<*mut c_void> = args.iter().map(|a| a.address().cast_mut()).collect();
        let [x, y, z] = grid.blocks;
        let dims = [x, y, z, grid.threads, 1, 1];
        // SAFETY: the caller's promise about the arguments; no other kernel runs in this copy.
        let status = unsafe { run(addresses.as_mut_ptr(), dims.as_ptr()) };
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(library);
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
        Ok(Some(Box::new(ShimLane {
            staging: vec![vec![0xff; len]; BUFFERS],
            used: [true; BUFFERS],
        })))
    }
}

/// Copies at once, and is done when it is asked a second time or waited for.
#[derive(Default)]
struct ShimTransfers {
    locked: Vec<Range<usize>>,
    n_sent: u64,
    n_asked: u64,
}

impl Transfers for ShimTransfers {
    unsafe fn lock(&mut self, start: *const u8, len: usize) -> bool {
        self.locked.push(start as usize..start as usize + len);
        true
    }

    unsafe fn send(
        &mut self,
        copies: &[(View<'_>, &[u8])],
        _: TransferOrder,
    ) -> Result<TransferId, CudaError> {
        for (to, bytes) in copies {
            let from = bytes.as_ptr_range();
            let is_locked =
                |r: &Range<usize>| r.start <= from.start as usize && from.end as usize <= r.end;
            assert!(
                self.locked.iter().any(is_locked),
                "a transfer of memory that is not locked"
            );
            to.write(bytes)?;
        }
        self.n_sent += 1;
        Ok(TransferId(self.n_sent - 1))
    }

    fn is_done(&mut self, transfer: TransferId) -> Result<bool, CudaError> {
        let asked_again = transfer.0 < self.n_asked;
        self.n_asked = self.n_asked.max(transfer.0 + 1);
        Ok(asked_again)
    }

    fn wait(&mut self, transfer: TransferId) -> Result<(), CudaError> {
        assert!(transfer.0 < self.n_sent, "what was sent");
        Ok(())
    }
}

/// Sends at once; what was sent must be used before more is.
struct ShimLane {
    staging: Vec<Vec<u8>>,
    used: [bool; BUFFERS],
}

impl CopyStream for ShimLane {
    fn staging(&mut self, which: usize) -> Result<&mut [u8], CudaError> {
        Ok(&mut self.staging[which])
    }

    fn is_free(&mut self, which: usize) -> Result<bool, CudaError> {
        // Every other time, so that whoever asks has something else to do.
        Ok(which == 0)
    }

    fn send(&mut self, which: usize, to: View<'_>) -> Result<(), CudaError> {
        assert!(
            std::mem::replace(&mut self.used[which], false),
            "what was sent last is still to be used"
        );
        to.write(&self.staging[which][..to.len()])
    }

    unsafe fn send_locked(
        &mut self,
        which: usize,
        copies: &[(View<'_>, &[u8])],
    ) -> Result<(), CudaError> {
        assert!(
            std::mem::replace(&mut self.used[which], false),
            "what was sent last is still to be used"
        );
        copies.iter().try_for_each(|(to, bytes)| to.write(bytes))
    }

    fn used(&mut self, which: usize) -> Result<(), CudaError> {
        self.used[which] = true;
        Ok(())
    }
}

#[test]
fn a_write_beyond_a_buffer_is_found() {
    let device: Arc<dyn Device> = shared();
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let buffer = Buffer::new(&device, 8).unwrap();
        // SAFETY: one byte too many, which is still inside the guard.
        unsafe { device.write(buffer.view().address(), &[1; 9]) }.unwrap();
    }));
    assert!(found.is_err());
}

#[test]
fn arguments_of_other_kinds_are_refused() {
    let shim = shared();
    let x: Arc<dyn Device> = shared();
    let buffer = Buffer::of_f32(&x, &[1.0; 4]).unwrap();
    let one = Grid {
        blocks: [1, 1, 1],
        threads: 32,
    };
    let launch = |args: &[Arg]| {
        // SAFETY: with the right kinds four values of a buffer of four are cleared, with others
        // nothing is done.
        unsafe { shim.launch("clear", one, args) }
    };
    for args in [
        &[buffer.view().arg(), Arg::Int(4)][..],
        &[buffer.view().arg()],
        &[Arg::Long(0), Arg::Long(4)],
    ] {
        let error = launch(args).unwrap_err().to_string();
        assert!(
            error.contains("clear") && error.contains("of the kinds pl"),
            "{error}"
        );
        assert_eq!(buffer.view().to_f32().unwrap(), [1.0; 4]);
    }
    launch(&[buffer.view().arg(), Arg::Long(4)]).unwrap();
    assert_eq!(buffer.view().to_f32().unwrap(), [0.0; 4]);
}
