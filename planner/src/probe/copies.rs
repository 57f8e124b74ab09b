//! Measures drives that have copies of the model.

use super::CopyRate;
use super::disk::{Disk, DiskRate};
use super::machine::rounded;
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::time::Duration;
use tier_plan_runtime::formats::placement::ExpertCopy;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::spec::ModelSpec;

/// An open copy.
pub(super) struct Copied {
    path: PathBuf,
    pub(super) disk: Disk,
}

/// Opens copies of a model.
///
/// # Errors
/// When one cannot be read, is of another model, or is the model itself.
pub(super) fn open(gguf: &Gguf, spec: &ModelSpec, paths: &[PathBuf]) -> Result<Vec<Copied>> {
    let own = (0..gguf.n_parts()).filter_map(|part| gguf.part_path(part).canonicalize().ok());
    let mut seen: Vec<PathBuf> = own.collect();
    let mut open = |path: &PathBuf| {
        let same = path
            .canonicalize()
            .with_context(|| format!("--copy {}", path.display()))?;
        ensure!(
            !seen.contains(&same),
            "--copy {}: this file is read already; expected a copy on another drive",
            path.display()
        );
        seen.push(same);
        let path = std::path::absolute(path)?;
        ensure!(
            path.to_str().is_some(),
            "--copy {}: a machine file names copies in UTF-8; rename the file",
            path.display()
        );
        Ok(Copied {
            disk: Disk::of_copy(gguf, spec, &path)?,
            path,
        })
    };
    paths.iter().map(&mut open).collect()
}

/// Measures the drive of each copy alone.
pub(super) fn measure(
    copies: &mut [Copied],
    time: Duration,
    doubts: &mut Vec<String>,
) -> Result<Vec<DiskRate>> {
    let mut rates = Vec::new();
    for copy in copies {
        let rate = copy.disk.measure(time)?;
        doubts.extend(rate.doubts(&copy.path));
        rates.push(rate);
    }
    Ok(rates)
}

/// Returns what was measured of each copy: alone, and while memory and all drives were in use.
pub(super) fn rates(
    copies: Vec<Copied>,
    alone: Vec<DiskRate>,
    together_gbps: &[f64],
) -> Vec<CopyRate> {
    let rates = alone.into_iter().zip(together_gbps);
    let copies = copies.into_iter().zip(rates);
    let rate = |(copy, (disk, &together_gbps)): (Copied, (DiskRate, &f64))| CopyRate {
        path: copy.path,
        disk,
        together_gbps,
    };
    copies.map(rate).collect()
}

/// Returns the copies with their parts of the rate of all drives, of which the model's own has `own_gbps`.
pub(super) fn shares(copies: &[CopyRate], own_gbps: f64) -> Vec<ExpertCopy> {
    let all = own_gbps + copies.iter().map(CopyRate::gbps).sum::<f64>();
    let share = |copy: &CopyRate| ExpertCopy {
        file: copy.path.display().to_string(),
        share: rounded(copy.gbps() / all.max(f64::MIN_POSITIVE)),
    };
    copies.iter().map(share).collect()
}
