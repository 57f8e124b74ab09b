//! Checksums for `--verify`: read from a file, or created on first use.

use crate::hint::HintExt;
use crate::opening::naming;
use crate::progress;
use anyhow::Result;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tier_plan_runtime::experts::checksums::{Checksums, compute_checksums};
use tier_plan_runtime::formats::sums::Sums;
use tier_plan_runtime::formats::{safely, sums};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::units::show_utc;

/// Returns the default path of a model's checksums, beside the model.
pub fn default_path(gguf: &Gguf) -> PathBuf {
    gguf.path().with_extension("sums")
}

/// Reads the whole model and writes its checksums.
///
/// # Errors
/// When the model is unreadable or the file not writable.
pub fn make(gguf: &Gguf, spec: &ModelSpec, output: &Path) -> Result<Sums> {
    // Before reading hundreds of gigabytes.
    safely::check(output).hint(
        "write them elsewhere with `tier-plan checksum MODEL -o FILE`, then pass --verify=FILE",
    )?;
    let bar = progress::bytes("making checksums");
    let made = compute_checksums(
        gguf,
        spec,
        show_utc(SystemTime::now()),
        &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
            true
        },
    );
    bar.finish_and_clear();
    let sums = made.map_err(|e| naming(gguf.path(), e))?;
    sums.write(output)?;
    Ok(sums)
}

/// Returns the checksums of `--verify` or `--verify=FILE`, `None` if not asked for. Missing
/// checksums beside the model are created.
///
/// # Errors
/// When they cannot be read or created, or are of another model.
pub fn checks(
    gguf: &Gguf,
    spec: &ModelSpec,
    asked: Option<Option<&Path>>,
) -> Result<Option<Arc<Checksums>>> {
    let Some(asked) = asked else { return Ok(None) };
    let beside = default_path(gguf);
    let path = asked.unwrap_or(&beside);
    let sums = if asked.is_some() || path.exists() {
        sums::read(path)?
    } else {
        let sums = make(gguf, spec, path)?;
        eprintln!(
            "{}: checksums created; from now on they reveal whether the model's bytes change",
            path.display()
        );
        sums
    };
    Ok(Some(Arc::new(Checksums::bind(gguf, spec, &sums, path)?)))
}
