//! Finds the files that come with the source: demo model, machine, calibration prompts and golden
//! values.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// Returns the path of a file or folder under `profiles/`: in the current folder or one above, else
/// in the build tree.
///
/// # Errors
/// When there is none.
pub fn path(relative: &str) -> Result<PathBuf> {
    find(&Path::new("profiles").join(relative)).with_context(|| {
        format!(
            "profiles/{relative} was not found in this folder or above it; run tier-plan from a clone of its source"
        )
    })
}

/// Returns the folder of small models with golden logits of another engine.
///
/// # Errors
/// When there is none.
pub fn golden() -> Result<PathBuf> {
    find(Path::new("tests/data")).filter(|folder| folder.join("arch").is_dir()).context(
        "tests/data, small models with golden logits, was not found in this folder or above it; run tier-plan from a clone of \
         its source, or give --golden FOLDER",
    )
}

fn find(relative: &Path) -> Option<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let here = std::env::current_dir().unwrap_or_default();
    let candidates = here.ancestors().map(Path::to_path_buf).chain([built]);
    candidates
        .map(|root| root.join(relative))
        .find(|p| p.exists())
}
