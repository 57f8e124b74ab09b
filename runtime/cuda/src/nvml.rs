//! NVML, the driver's management library: a GPU's power limit and memory. It is loaded when it is
//! first asked; nothing depends on it.

use super::CudaError;
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};

/// File names of the library.
const NAMES: [&str; 3] = ["libnvidia-ml.so.1", "libnvidia-ml.so", "nvml.dll"];

/// Longest name of a GPU in bytes, with its zero (`NVML_DEVICE_NAME_V2_BUFFER_SIZE`).
const NAME_BYTES: usize = 96;

type Status = c_int;
type Handle = *mut c_void;

/// The library, loaded and initialized.
pub struct Nvml {
    library: Library,
}

/// Name, power limit and memory of one GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// Name of the GPU.
    pub name: String,
    /// Enforced power limit in watts, if the GPU has one.
    pub limit_watts: Option<f64>,
    /// Bytes of memory, free or not.
    pub total_bytes: u64,
    /// Bytes of memory that no process has allocated.
    pub free_bytes: u64,
}

/// `nvmlMemory_t`, in bytes.
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

impl Drop for Nvml {
    fn drop(&mut self) {
        type Shutdown = unsafe extern "C" fn() -> Status;
        // SAFETY: the type is that of the function, and what it ends was begun by `open`.
        if let Ok(shutdown) = unsafe { self.library.get::<Shutdown>(b"nvmlShutdown\0") } {
            // SAFETY: the function takes no arguments.
            unsafe { shutdown() };
        }
    }
}

impl Nvml {
    /// Loads the library by its file name.
    ///
    /// # Errors
    /// When it can't be loaded or initialized.
    pub fn find() -> Result<Self, CudaError> {
        let mut why = String::new();
        for name in NAMES {
            match Self::open(&PathBuf::from(name)) {
                Ok(library) => return Ok(library),
                Err(error) if why.is_empty() => why = error.to_string(),
                Err(_) => {}
            }
        }
        Err(failed("loading it", &why))
    }

    /// Loads the library from a file.
    ///
    /// # Errors
    /// When it can't be loaded or initialized.
    pub fn open(path: &Path) -> Result<Self, CudaError> {
        type Start = unsafe extern "C" fn() -> Status;
        // SAFETY: NVML's initialization has no requirements.
        let library =
            unsafe { Library::new(path) }.map_err(|e| failed("loading it", &e.to_string()))?;
        // SAFETY: the type is that of the function.
        let status = unsafe { library.get::<Start>(b"nvmlInit_v2\0").map(|start| start()) };
        match status {
            Ok(0) => Ok(Self { library }),
            Ok(status) => Err(failed("starting it", &status_message(&library, status))),
            Err(error) => Err(failed("starting it", &error.to_string())),
        }
    }

    /// Reads the state of the GPU at a PCI address, `0000:65:00.0`.
    ///
    /// # Errors
    /// When there is no such GPU, or a query fails.
    pub fn read(&self, pci: &str) -> Result<Reading, CudaError> {
        type Find = unsafe extern "C" fn(*const c_char, *mut Handle) -> Status;
        type Name = unsafe extern "C" fn(Handle, *mut c_char, c_uint) -> Status;
        type Limit = unsafe extern "C" fn(Handle, *mut c_uint) -> Status;
        type MemoryOf = unsafe extern "C" fn(Handle, *mut Memory) -> Status;
        let c_pci = CString::new(pci).map_err(|e| failed("finding a GPU", &e.to_string()))?;
        let mut gpu: Handle = std::ptr::null_mut();
        let mut name = [0 as c_char; NAME_BYTES];
        let mut memory = Memory::default();
        let mut milliwatts = 0;
        // SAFETY: the types are those of the functions; text ends in a zero, and everything given
        // outlives the calls.
        unsafe {
            let find = self.symbol::<Find>("nvmlDeviceGetHandleByPciBusId_v2")?;
            self.ok(
                &format!("finding GPU {pci}"),
                find(c_pci.as_ptr(), &mut gpu),
            )?;
            // One less than the buffer has, so that a zero always ends the name.
            let named = self.symbol::<Name>("nvmlDeviceGetName")?(
                gpu,
                name.as_mut_ptr(),
                NAME_BYTES as c_uint - 1,
            );
            self.ok("asking for a name", named)?;
            self.ok(
                "asking for memory",
                self.symbol::<MemoryOf>("nvmlDeviceGetMemoryInfo")?(gpu, &mut memory),
            )?;
            let limit =
                self.symbol::<Limit>("nvmlDeviceGetEnforcedPowerLimit")?(gpu, &mut milliwatts);
            Ok(Reading {
                name: CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned(),
                limit_watts: (limit == 0 && milliwatts > 0).then(|| f64::from(milliwatts) / 1e3),
                total_bytes: memory.total,
                free_bytes: memory.free.min(memory.total),
            })
        }
    }

    fn symbol<T: Copy>(&self, name: &str) -> Result<T, CudaError> {
        // SAFETY: the callers' types are those of the functions, which stay as long as the library.
        let loaded = unsafe { self.library.get::<T>(name.as_bytes()) };
        loaded
            .map(|symbol| *symbol)
            .map_err(|e| failed(name, &e.to_string()))
    }

    fn ok(&self, what: &str, status: Status) -> Result<(), CudaError> {
        if status == 0 {
            Ok(())
        } else {
            Err(failed(what, &status_message(&self.library, status)))
        }
    }
}

fn failed(what: &str, why: &str) -> CudaError {
    CudaError::Call {
        device: "NVML".into(),
        what: what.into(),
        why: why.into(),
    }
}

/// Returns the library's message for a status.
fn status_message(library: &Library, status: Status) -> String {
    type Message = unsafe extern "C" fn(Status) -> *const c_char;
    // SAFETY: the type is that of the function, and its text is the library's own.
    let text = unsafe {
        library
            .get::<Message>(b"nvmlErrorString\0")
            .ok()
            .and_then(|message| {
                let text = message(status);
                (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            })
    };
    text.unwrap_or_else(|| format!("status {status}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A fake NVML with two GPUs.
    const FAKE_NVML: &str = r#"
extern "C" {
static int running = 0;
int nvmlInit_v2() { running = 1; return 0; }
int nvmlShutdown() { running = 0; return 0; }
const char* nvmlErrorString(int status) { return status == 6 ? "Not Found" : "Unknown Error"; }
static bool same(const char* a, const char* b) { while (*a && *a == *b) { ++a; ++b; } return *a == *b; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* pci, void** gpu) {
  if (!running) return 1;
  if (same(pci, "0000:65:00.0")) { *gpu = (void*)7; return 0; }
  if (same(pci, "0000:66:00.0")) { *gpu = (void*)8; return 0; }
  return 6;
}
int nvmlDeviceGetName(void* gpu, char* name, unsigned len) {
  for (unsigned i = 0; i < len; ++i) name[i] = gpu == (void*)7 && i == 3 ? 0 : 'G';
  return 0;
}
int nvmlDeviceGetEnforcedPowerLimit(void* gpu, unsigned* mw) { *mw = 350500; return gpu == (void*)7 ? 0 : 3; }
int nvmlDeviceGetMemoryInfo(void* gpu, unsigned long long* m) { m[0] = 1ull << 35; m[1] = 1ull << 34; m[2] = 5; return 0; }
}
"#;

    #[test]
    fn a_gpu_is_read_by_its_pci_address() {
        let dir = tempfile::tempdir().unwrap();
        let (source, library) = (dir.path().join("nvml.cpp"), dir.path().join("libnvml.so"));
        std::fs::write(&source, FAKE_NVML).unwrap();
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let done = Command::new(compiler)
            .args(["-shared", "-fPIC", "-o"])
            .arg(&library)
            .arg(&source)
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        let nvml = Nvml::open(&library).unwrap();
        let expected = Reading {
            name: "GGG".into(),
            limit_watts: Some(350.5),
            total_bytes: 1 << 35,
            free_bytes: 1 << 34,
        };
        assert_eq!(nvml.read("0000:65:00.0").unwrap(), expected);
        let other = nvml.read("0000:66:00.0").unwrap();
        assert_eq!(
            (other.limit_watts, other.name.len()),
            (None, NAME_BYTES - 1),
            "no limit, and an endless name"
        );
        let error = nvml.read("0000:01:00.0").unwrap_err().to_string();
        assert_eq!(error, "NVML: finding GPU 0000:01:00.0 failed: Not Found");
        let error = Nvml::open(&dir.path().join("none.so"))
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("NVML: loading it failed"), "{error}");
    }
}
