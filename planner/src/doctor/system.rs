//! What the checks read: files of the system below a root folder, and what calls tell.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use tier_plan_runtime::kernels::{Isa, Kernels};
use tier_plan_runtime::os::glibc_version;
use tier_plan_runtime::threads::physical_cores;
use tier_plan_runtime::tiers::meminfo;

/// Most bytes of a system file that are read: `/proc/cpuinfo` takes about 1.5 KB per processor.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The files of a system, below a folder that stands for `/`.
#[derive(Debug, Clone)]
pub struct System {
    root: PathBuf,
}

impl System {
    /// Reads this machine's own files.
    pub fn of_this_machine() -> Self {
        Self::below("/")
    }

    /// Reads files below a folder.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Returns the folder that stands for `/`.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns where a file such as `proc/meminfo` is.
    pub fn path(&self, file: &str) -> PathBuf {
        self.root.join(file.trim_start_matches('/'))
    }

    /// Returns the text of a file without space around it; `None` where it cannot be read.
    pub fn text(&self, file: &str) -> Option<String> {
        let bytes = self.bytes(file)?;
        Some(String::from_utf8_lossy(&bytes).trim().to_string())
    }

    /// Returns the bytes of a file; `None` where it cannot be read.
    pub fn bytes(&self, file: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = File::open(self.path(file)).ok()?;
        file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// Returns the number that is all of a file.
    pub fn number(&self, file: &str) -> Option<u64> {
        self.text(file)?.parse().ok()
    }

    /// Whether there is such a file or folder.
    pub fn has(&self, file: &str) -> bool {
        self.path(file).exists()
    }

    /// Returns the names in a folder, sorted.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder))
            .into_iter()
            .flatten()
            .flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// Returns the word in square brackets of a file such as `always [madvise] never`.
    pub fn choice(&self, file: &str) -> Option<String> {
        chosen(&self.text(file)?).map(str::to_string)
    }

    /// Returns the name of the processor.
    pub fn processor_name(&self) -> Option<String> {
        field(&self.text("proc/cpuinfo")?, "model name").map(str::to_string)
    }

    /// Returns the value of a line `name: 123 kB` of `/proc/meminfo`, in bytes.
    pub fn meminfo_bytes(&self, name: &str) -> Option<u64> {
        meminfo::bytes_of(&self.text("proc/meminfo")?, name)
    }
}

/// Returns the word in square brackets.
pub(super) fn chosen(text: &str) -> Option<&str> {
    let (_, after) = text.split_once('[')?;
    Some(after.split_once(']')?.0)
}

/// Returns the value of the first line `name: value`.
pub(super) fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then_some(value.trim())
    })
}

/// What calls tell of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Instruction sets that have kernels and run here, scalar first.
    pub available: Vec<Isa>,
    /// The one whose kernels are used, or why none is.
    pub used: Result<Isa, String>,
    /// Cores that this process may use.
    pub cores: usize,
    /// Processors that this process may use.
    pub processors: usize,
    /// Version of the GNU C library.
    pub glibc: Option<String>,
    /// Value of `TIER_PLAN_IO`.
    pub io: Option<String>,
}

impl Process {
    /// Asks for what holds of this process.
    pub fn of_this() -> Self {
        Self {
            available: Kernels::available().into_iter().map(Kernels::isa).collect(),
            used: Kernels::from_env()
                .map(Kernels::isa)
                .map_err(|error| error.to_string()),
            cores: physical_cores(),
            processors: std::thread::available_parallelism().map_or(1, |n| n.get()),
            glibc: glibc_version(),
            io: std::env::var_os("TIER_PLAN_IO").map(|io| io.to_string_lossy().into_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_choices() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("none"), None);
        assert_eq!(chosen("]a["), None);
        let text = "model name\t: A: B\nflags: x\n";
        assert_eq!(field(text, "model name"), Some("A: B"));
        assert_eq!(field(text, "model"), None);
    }
}
