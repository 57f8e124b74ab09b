//! Memory tiers at run time: arenas that hold bytes, files that bytes are read from, the memory that there is, and the
//! pacing of emulated tiers.

pub mod arena;
pub mod bandwidth;
pub mod file;
pub mod limits;
pub mod nodes;
pub mod numa;
pub mod pace;
pub mod source;

/// A folder of small files, as the system shows itself in `/sys` and `/proc`, for tests.
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
