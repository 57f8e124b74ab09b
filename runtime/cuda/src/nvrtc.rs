//! NVRTC, the run-time compiler of kernels. It is loaded when it is first needed, and needs no GPU.

use super::source::{Module, headers};
use super::{CudaError, Version};
use libloading::Library;
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// Environment variable with the path of NVRTC's library.
pub const NVRTC_VARIABLE: &str = "TIER_PLAN_NVRTC";

/// File names of the library, the newest first.
const NAMES: [&str; 4] = [
    "libnvrtc.so.13",
    "libnvrtc.so.12",
    "libnvrtc.so",
    "nvrtc64_120_0.dll",
];

/// Compiler options besides the architecture; part of the cache key of a compiled kernel.
pub(super) const OPTIONS: [&str; 2] = ["--std=c++17", "--ptxas-options=-v"];

type Status = c_int;
type Program = *mut c_void;

/// A loaded NVRTC, ready to compile.
pub struct Compiler {
    library: Library,
    /// Libraries that NVRTC opens by name, held open.
    _builtins: Vec<Library>,
    path: PathBuf,
    version: Version,
}

/// Compiled kernels of one module.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// Machine code (CUBIN), or zero-terminated PTX for an architecture newer than the compiler.
    pub image: Vec<u8>,
    /// Compiler output: registers and memory of every kernel.
    pub log: String,
}

/// Opens the `libnvrtc-builtins` beside NVRTC, which NVRTC itself opens by name only and so doesn't
/// find outside of the system's library folders.
fn open_builtins(path: &Path) -> Vec<Library> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let files = folder
        .and_then(|folder| std::fs::read_dir(folder).ok())
        .into_iter()
        .flatten()
        .flatten();
    let builtins =
        |name: &std::ffi::OsStr| name.to_string_lossy().starts_with("libnvrtc-builtins.so");
    let files = files.filter(|file| builtins(&file.file_name()));
    // SAFETY: they hold data. NVRTC reports what can't be loaded.
    files
        .filter_map(|file| unsafe { Library::new(file.path()) }.ok())
        .collect()
}

impl Compiler {
    /// Loads the compiler that [`NVRTC_VARIABLE`] names, or else the newest one on the system.
    ///
    /// # Errors
    /// When no compiler can be loaded.
    pub fn find() -> Result<Self, CudaError> {
        Self::find_for(i32::MAX)
    }

    /// Loads a compiler for a driver of CUDA `major`: the one that [`NVRTC_VARIABLE`] names, or
    /// else preferably one that is not newer than the driver. An older driver may reject the output
    /// of a newer compiler.
    ///
    /// # Errors
    /// When no compiler can be loaded.
    pub fn find_for(major: i32) -> Result<Self, CudaError> {
        if let Some(path) = std::env::var_os(NVRTC_VARIABLE).filter(|p| !p.is_empty()) {
            return Self::open(Path::new(&path));
        }
        let mut paths: Vec<PathBuf> = NAMES.iter().map(PathBuf::from).collect();
        for variable in ["CUDA_HOME", "CUDA_PATH"] {
            if let Some(home) = std::env::var_os(variable).filter(|p| !p.is_empty()) {
                paths.push(Path::new(&home).join("lib64/libnvrtc.so"));
            }
        }
        paths.push("/usr/local/cuda/lib64/libnvrtc.so".into());
        let mut newer = None;
        for path in &paths {
            match Self::open(path) {
                Ok(compiler) if compiler.version.major <= major => return Ok(compiler),
                Ok(compiler) => newer = newer.or(Some(compiler)),
                Err(_) => {}
            }
        }
        let looked = || {
            paths
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
                .join(", ")
        };
        newer.ok_or_else(|| CudaError::NoCompiler { looked: looked() })
    }

    /// Loads the compiler from a file.
    ///
    /// # Errors
    /// When it can't be loaded, or is older than 12.0.
    pub fn open(path: &Path) -> Result<Self, CudaError> {
        let bad = |e: libloading::Error| CudaError::NoCompiler {
            looked: format!("{}: {e}", path.display()),
        };
        let builtins = open_builtins(path);
        // SAFETY: NVRTC's initialization has no requirements.
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
            let looked = format!(
                "{} is version {major}.{minor}, expected 12.0 or newer",
                path.display()
            );
            return Err(CudaError::NoCompiler { looked });
        }
        Ok(Self {
            library,
            _builtins: builtins,
            path: path.to_path_buf(),
            version: Version { major, minor },
        })
    }

    /// Returns the version of the compiler.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Returns the architectures that it has machine code for, ascending: 86 for `sm_86`.
    ///
    /// # Errors
    /// When the query fails.
    pub fn architectures(&self) -> Result<Vec<i32>, CudaError> {
        type Count = unsafe extern "C" fn(*mut c_int) -> Status;
        let mut n = 0;
        // SAFETY: the types are those of the functions, and the buffer is as long as they say.
        unsafe {
            self.ok(self.symbol::<Count>("nvrtcGetNumSupportedArchs")?(&mut n))?;
            let mut architectures = vec![0; usize::try_from(n).unwrap_or(0)];
            self.ok(self.symbol::<Count>("nvrtcGetSupportedArchs")?(
                architectures.as_mut_ptr(),
            ))?;
            architectures.sort_unstable();
            Ok(architectures)
        }
    }

    /// Compiles a module for a GPU of this compute capability: to machine code, or to PTX of the
    /// newest architecture that the compiler knows if it knows none of that generation.
    ///
    /// # Errors
    /// When the module does not compile, or the compiler knows no architecture that is old enough.
    pub fn compile(&self, module: &Module, capability: Version) -> Result<Compiled, CudaError> {
        let wanted = 10 * capability.major + capability.minor;
        let known = self.architectures()?;
        // Code for an older minor number runs on a newer one of the same generation.
        let same = known
            .iter()
            .copied()
            .filter(|a| a / 10 == capability.major && *a <= wanted)
            .max();
        let older = known.iter().copied().filter(|a| *a <= wanted).max();
        let Some(arch) = same
            .map(|a| format!("sm_{a}"))
            .or(older.map(|a| format!("compute_{a}")))
        else {
            let looked = format!(
                "{} knows no architecture as old as {wanted}",
                self.path.display()
            );
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
        let bad = |log: String| CudaError::Compile {
            module: module.name,
            arch: arch.to_string(),
            log,
        };
        let c_text =
            |text: &str| CString::new(text).map_err(|_| bad("a zero byte in its text".into()));
        let (text, name) = (c_text(module.text)?, c_text(module.name)?);
        let contents = headers()
            .iter()
            .map(|(_, text)| c_text(text))
            .collect::<Result<Vec<_>, _>>()?;
        let names = headers()
            .iter()
            .map(|(name, _)| c_text(name))
            .collect::<Result<Vec<_>, _>>()?;
        let mut options = vec![c_text(&format!("--gpu-architecture={arch}"))?];
        for option in OPTIONS {
            options.push(c_text(option)?);
        }
        let pointers = |texts: &[CString]| -> Vec<*const c_char> {
            texts.iter().map(|t| t.as_ptr()).collect()
        };
        let (contents, names, options) =
            (pointers(&contents), pointers(&names), pointers(&options));
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: the types are those of the functions; all texts end with zeros and outlive the
        // program.
        unsafe {
            let (create, compile) = (
                self.symbol::<Create>("nvrtcCreateProgram")?,
                self.symbol("nvrtcCompileProgram")?,
            );
            let compile: libloading::Symbol<'_, Compile> = compile;
            let destroy = self.symbol::<Destroy>("nvrtcDestroyProgram")?;
            let n_headers = contents.len() as c_int;
            self.ok(create(
                &mut program,
                text.as_ptr(),
                name.as_ptr(),
                n_headers,
                contents.as_ptr(),
                names.as_ptr(),
            ))?;
            let status = compile(program, options.len() as c_int, options.as_ptr());
            let log = self.output(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog");
            let kind = if arch.starts_with("sm_") {
                "CUBIN"
            } else {
                "PTX"
            };
            let image = match status {
                0 => self.output(
                    program,
                    &format!("nvrtcGet{kind}Size"),
                    &format!("nvrtcGet{kind}"),
                ),
                _ => Ok(Vec::new()),
            };
            destroy(&mut program);
            let log = String::from_utf8_lossy(&log?)
                .trim_end_matches('\0')
                .trim()
                .to_string();
            if status != 0 {
                return Err(bad(format!("{}: {log}", self.name_of(status))));
            }
            Ok(Compiled { image: image?, log })
        }
    }

    /// Returns an output of a program: its log, PTX or CUBIN.
    ///
    /// # Safety
    /// `size` and `get` name the functions that return the length and the bytes of the output.
    unsafe fn output(&self, program: Program, size: &str, get: &str) -> Result<Vec<u8>, CudaError> {
        type Size = unsafe extern "C" fn(Program, *mut usize) -> Status;
        type Get = unsafe extern "C" fn(Program, *mut c_char) -> Status;
        let mut len = 0;
        // SAFETY: the caller's promise; the buffer is as long as `size` said.
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
        let symbol = unsafe { self.library.get(name.as_bytes()) };
        symbol.map_err(|e| CudaError::NoCompiler {
            looked: format!("{}: {e}", self.path.display()),
        })
    }

    fn ok(&self, status: Status) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        Err(CudaError::NoCompiler {
            looked: format!("{}: {}", self.path.display(), self.name_of(status)),
        })
    }

    fn name_of(&self, status: Status) -> String {
        type Name = unsafe extern "C" fn(Status) -> *const c_char;
        // SAFETY: the type is that of the function, which returns a constant.
        unsafe {
            match self.symbol::<Name>("nvrtcGetErrorString") {
                Ok(name) => std::ffi::CStr::from_ptr(name(status))
                    .to_string_lossy()
                    .into_owned(),
                Err(_) => format!("status {status}"),
            }
        }
    }
}
