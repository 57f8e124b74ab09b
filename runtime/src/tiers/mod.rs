//! Memory tiers at run time: arenas that hold bytes, files that bytes are read from, memory limits,
//! NUMA nodes, and the pacing of emulated tiers.
//!
//! All `unsafe` code of this crate that talks to the operating system is in here: anonymous
//! mappings ([`arena`]), reader threads that fill one buffer together ([`mod@file`]), buffers that GPUs
//! read (`transit`), and system calls without a safe wrapper ([`numa`], [`limits`], [`source`]). It
//! knows nothing of models or layers.

pub mod arena;
pub mod bandwidth;
pub mod file;
pub(crate) mod holes;
pub mod limits;
pub mod meminfo;
pub mod mounts;
pub mod nodes;
pub mod numa;
pub mod pace;
pub mod shards;
pub mod source;
pub(crate) mod transit;
pub(crate) mod zeroed;

/// Makes a folder of small files that stands for `/sys` or `/proc` in tests.
#[cfg(test)]
fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    root
}
