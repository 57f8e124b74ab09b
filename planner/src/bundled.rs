//! The files that come with the source: the demo model, its machine and the calibration prompts.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// A file or folder under `profiles/`: in the current folder or one above it, else where this program was built.
pub fn path(relative: &str) -> Result<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let here = std::env::current_dir().unwrap_or_default();
    let candidates = here.ancestors().map(Path::to_path_buf).chain([built]);
    let found = candidates.map(|root| root.join("profiles").join(relative)).find(|p| p.exists());
    found.with_context(|| {
        format!(
            "profiles/{relative} was not found in this folder or above it; run tier-plan from a clone of its source"
        )
    })
}
