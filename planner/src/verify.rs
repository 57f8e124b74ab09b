//! Checksums for `--verify`: those of a file, or made when they are first wanted.

use crate::progress;
use crate::session::naming;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tier_plan_runtime::experts::checksums::{Checksums, compute_checksums};
use tier_plan_runtime::formats::sums::Sums;
use tier_plan_runtime::formats::{safely, sums};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::units::show_utc;

/// Where a model's checksums are unless somebody says otherwise: beside it.
pub fn default_path(gguf: &Gguf) -> PathBuf {
    gguf.path().with_extension("sums")
}

/// Reads the whole model and writes its checksums.
///
/// # Errors
/// When the model can't be read or the file not be written.
pub fn make(gguf: &Gguf, spec: &ModelSpec, output: &Path) -> Result<Sums> {
    // Not after reading hundreds of gigabytes.
    safely::check(output)
        .with_context(|| "checksums can go elsewhere: `tier-plan checksum MODEL -o FILE`, then --verify=FILE")?;
    let bar = progress::bytes("making checksums");
    let made = compute_checksums(gguf, spec, show_utc(SystemTime::now()), &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        true
    });
    bar.finish_and_clear();
    let sums = made.map_err(|e| naming(gguf.path(), e))?;
    sums.write(output)?;
    Ok(sums)
}

/// What `--verify` or `--verify=FILE` compares with; nothing where it was not `asked` for. Checksums that should be
/// beside the model and are not are made.
///
/// # Errors
/// When they can't be read or made, or are of another model.
pub fn checks(gguf: &Gguf, spec: &ModelSpec, asked: Option<Option<&Path>>) -> Result<Option<Arc<Checksums>>> {
    let Some(asked) = asked else { return Ok(None) };
    let beside = default_path(gguf);
    let path = asked.unwrap_or(&beside);
    let sums = if asked.is_some() || path.exists() {
        sums::read(path)?
    } else {
        let sums = make(gguf, spec, path)?;
        eprintln!("{}: checksums made now; from here on they tell whether the model's bytes change", path.display());
        sums
    };
    Ok(Some(Arc::new(Checksums::bind(gguf, spec, &sums, path)?)))
}
