//! The compiler of kernels: NVRTC, loaded when it is needed. It needs no GPU.

use super::CudaError;
use super::source::{Module, headers};
use libloading::Library;
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// The environment variable with the path of the compiler's library.
pub const NVRTC_VARIABLE: &str = "TIER_PLAN_NVRTC";

/// Names that the library goes by where the system looks for libraries, the newest first.
const NAMES: [&str; 4] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "nvrtc64_120_0.dll"];

/// Options beside the architecture. Also part of what a compiled kernel is remembered by.
pub(super) const OPTIONS: [&str; 2] = ["--std=c++17", "--ptxas-options=-v"];

type Status = c_int;
type Program = *mut c_void;

/// NVRTC.
pub struct Compiler {
    library: Library,
    /// Held open for it.
    _parts: Vec<Library>,
    path: PathBuf,
    version: (i32, i32),
}

/// Compiled kernels.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// Machine code, or, for an architecture that the compiler knows no machine code of, PTX that ends with a zero.
    pub image: Vec<u8>,
    /// What the compiler had to say: registers and memory of every kernel.
    pub log: String,
}

/// Opens what NVRTC opens by name only, and so doesn't find where the system doesn't look: the libraries of built-in
/// things beside it.
fn parts(path: &Path) -> Vec<Library> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let files = folder.and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let builtins = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("libnvrtc-builtins.so");
    let found = files.filter(|file| builtins(&file.file_name()));
    // SAFETY: they hold data; what can't be loaded NVRTC will miss by itself.
    found.filter_map(|file| unsafe { Library::new(file.path()) }.ok()).collect()
}

impl Compiler {
    /// The compiler that [`NVRTC_VARIABLE`] names, or else the one that the system finds.
    ///
    /// # Errors
    /// When there is none.
    pub fn find() -> Result<Self, CudaError> {
        Self::find_for(i32::MAX)
    }

    /// The same for a driver of this generation of CUDA: of those that the system finds one that is not newer, if there is
    /// any, since an older driver need not take what a newer compiler makes.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn find_for(major: i32) -> Result<Self, CudaError> {
        if let Some(path) = std::env::var_os(NVRTC_VARIABLE).filter(|p| !p.is_empty()) {
            return Self::open(Path::new(&path));
        }
        let mut places: Vec<PathBuf> = NAMES.iter().map(PathBuf::from).collect();
        for variable in ["CUDA_HOME", "CUDA_PATH"] {
            if let Some(home) = std::env::var_os(variable).filter(|p| !p.is_empty()) {
                places.push(Path::new(&home).join("lib64/libnvrtc.so"));
            }
        }
        places.push("/usr/local/cuda/lib64/libnvrtc.so".into());
        let mut newer = None;
        for place in &places {
            match Self::open(place) {
                Ok(found) if found.version.0 <= major => return Ok(found),
                Ok(found) => newer = newer.or(Some(found)),
                Err(_) => {}
            }
        }
        let looked = || places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ");
        newer.ok_or_else(|| CudaError::NoCompiler { looked: looked() })
    }

    /// The compiler in a file.
    ///
    /// # Errors
    /// When it can't be loaded.
    pub fn open(path: &Path) -> Result<Self, CudaError> {
        let bad = |e: libloading::Error| CudaError::NoCompiler { looked: format!("{}: {e}", path.display()) };
        let parts = parts(path);
        // SAFETY: NVRTC's initialisation has no requirements.
        let library = unsafe { Library::new(path) }.map_err(bad)?;
        let (mut major, mut minor) = (0, 0);
        {
            type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status;
            // SAFETY: the type is that of the function.
            let version = unsafe { library.get::<Version>(b"nvrtcVersion\0") }.map_err(bad)?;
            // SAFETY: both numbers outlive the call.
            unsafe { version(&mut major, &mut minor) };
        }
        if major < 12 {
            let looked = format!("{} is version {major}.{minor}, 12.0 or newer is needed", path.display());
            return Err(CudaError::NoCompiler { looked });
        }
        Ok(Self { library, _parts: parts, path: path.to_path_buf(), version: (major, minor) })
    }

    /// Its version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The architectures that it makes machine code for, as ten times the capability's first number plus the second,
    /// ascending.
    ///
    /// # Errors
    /// When it doesn't say.
    pub fn architectures(&self) -> Result<Vec<i32>, CudaError> {
        type Count = unsafe extern "C" fn(*mut c_int) -> Status;
        let mut n = 0;
        // SAFETY: the types are those of the functions, and the room is as large as they say.
        unsafe {
            self.ok(self.symbol::<Count>("nvrtcGetNumSupportedArchs")?(&mut n))?;
            let mut all = vec![0; usize::try_from(n).unwrap_or(0)];
            self.ok(self.symbol::<Count>("nvrtcGetSupportedArchs")?(all.as_mut_ptr()))?;
            all.sort_unstable();
            Ok(all)
        }
    }

    /// Compiles a module for a GPU of this capability: machine code, or PTX of the newest architecture that the compiler
    /// knows where it knows none of that generation.
    ///
    /// # Errors
    /// When it does not compile.
    pub fn compile(&self, module: &Module, capability: (i32, i32)) -> Result<Compiled, CudaError> {
        let wanted = 10 * capability.0 + capability.1;
        let known = self.architectures()?;
        // Code for an older minor number runs on a newer one of the same generation.
        let same = known.iter().copied().filter(|a| a / 10 == capability.0 && *a <= wanted).max();
        let older = known.iter().copied().filter(|a| *a <= wanted).max();
        let Some(arch) = same.map(|a| format!("sm_{a}")).or(older.map(|a| format!("compute_{a}"))) else {
            let looked = format!("{} knows no architecture as old as {wanted}", self.path.display());
            return Err(CudaError::NoCompiler { looked });
        };
        self.compile_for(module, &arch)
    }

    fn compile_for(&self, module: &Module, arch: &str) -> Result<Compiled, CudaError> {
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> Status;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status;
        type Destroy = unsafe extern "C" fn(*mut Program) -> Status;
        let bad = |log: String| CudaError::Compile { module: module.name, arch: arch.to_string(), log };
        let c_text = |text: &str| CString::new(text).map_err(|_| bad("a zero byte in its text".into()));
        let (text, name) = (c_text(module.text)?, c_text(module.name)?);
        let contents = headers().iter().map(|(_, text)| c_text(text)).collect::<Result<Vec<_>, _>>()?;
        let names = headers().iter().map(|(name, _)| c_text(name)).collect::<Result<Vec<_>, _>>()?;
        let mut options = vec![c_text(&format!("--gpu-architecture={arch}"))?];
        for option in OPTIONS {
            options.push(c_text(option)?);
        }
        let pointers = |all: &[CString]| -> Vec<*const c_char> { all.iter().map(|t| t.as_ptr()).collect() };
        let (contents, names, options) = (pointers(&contents), pointers(&names), pointers(&options));
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: the types are those of the functions; all texts end with zeros and outlive the program.
        unsafe {
            let (create, compile) = (self.symbol::<Create>("nvrtcCreateProgram")?, self.symbol("nvrtcCompileProgram")?);
            let compile: libloading::Symbol<'_, Compile> = compile;
            let destroy = self.symbol::<Destroy>("nvrtcDestroyProgram")?;
            let n_headers = contents.len() as c_int;
            self.ok(create(&mut program, text.as_ptr(), name.as_ptr(), n_headers, contents.as_ptr(), names.as_ptr()))?;
            let status = compile(program, options.len() as c_int, options.as_ptr());
            let log = self.output(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog");
            let kind = if arch.starts_with("sm_") { "CUBIN" } else { "PTX" };
            let image = match status {
                0 => self.output(program, &format!("nvrtcGet{kind}Size"), &format!("nvrtcGet{kind}")),
                _ => Ok(Vec::new()),
            };
            destroy(&mut program);
            let log = String::from_utf8_lossy(&log?).trim_end_matches('\0').trim().to_string();
            if status != 0 {
                return Err(bad(format!("{}: {log}", self.name_of(status))));
            }
            Ok(Compiled { image: image?, log })
        }
    }

    /// # Safety
    /// `size` and `get` are functions that say how long, and what, something of the program is.
    unsafe fn output(&self, program: Program, size: &str, get: &str) -> Result<Vec<u8>, CudaError> {
        type Size = unsafe extern "C" fn(Program, *mut usize) -> Status;
        type Get = unsafe extern "C" fn(Program, *mut c_char) -> Status;
        let mut len = 0;
        // SAFETY: the caller's promise; the room is as large as was said.
        unsafe {
            self.ok(self.symbol::<Size>(size)?(program, &mut len))?;
            let mut bytes = vec![0u8; len];
            self.ok(self.symbol::<Get>(get)?(program, bytes.as_mut_ptr().cast()))?;
            Ok(bytes)
        }
    }

    /// # Safety
    /// `T` is the function's type.
    unsafe fn symbol<T>(&self, name: &str) -> Result<libloading::Symbol<'_, T>, CudaError> {
        // SAFETY: the caller's promise.
        let found = unsafe { self.library.get(name.as_bytes()) };
        found.map_err(|e| CudaError::NoCompiler { looked: format!("{}: {e}", self.path.display()) })
    }

    fn ok(&self, status: Status) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        Err(CudaError::NoCompiler { looked: format!("{}: {}", self.path.display(), self.name_of(status)) })
    }

    fn name_of(&self, status: Status) -> String {
        type Name = unsafe extern "C" fn(Status) -> *const c_char;
        // SAFETY: the type is that of the function, which returns a constant.
        unsafe {
            match self.symbol::<Name>("nvrtcGetErrorString") {
                Ok(name) => std::ffi::CStr::from_ptr(name(status)).to_string_lossy().into_owned(),
                Err(_) => format!("status {status}"),
            }
        }
    }
}
