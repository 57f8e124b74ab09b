//! The machine that plans are made for: as a file says, as an earlier start measured it, or measured
//! now.

use super::place::{DIGITS, Place, age, modified};
use super::{Asked, Auto};
use crate::catalogue;
use crate::hint::HintExt;
use crate::host;
use crate::print::digits;
use crate::printable::printable;
use crate::probe::{Settings, measure};
use anyhow::{Context, Result, anyhow};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::{self, Machine, Medium, Tier, TierKind};
use tier_plan_runtime::kernels::Kernels;
use tier_plan_runtime::threads::physical_cores;
use tier_plan_runtime::tiers::limits::cgroup_limit;
use tier_plan_runtime::units::show_utc;

/// Age at which a machine is measured again.
const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 3600);

/// A machine, and where it is from.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub machine: Machine,
    /// Its file, if it has one.
    pub path: Option<PathBuf>,
    /// Clause on where it is from.
    pub from: String,
    /// Whether it was measured now.
    pub is_new: bool,
}

/// Returns the machine for a model's plans. Measures it where no file says anything that still holds.
///
/// # Errors
/// When the file that was asked for is unusable, or a measurement fails.
pub(super) fn find(place: &Place, asked: &Asked<'_>, notes: &mut Vec<String>) -> Result<Found> {
    let Auto { machine, probe, .. } = asked.auto;
    if let Some(path) = machine {
        return given(path, asked.model);
    }
    let name = name(asked)?;
    if !probe && let Some(kept) = place.found(&name).and_then(|path| kept(&path, notes)) {
        return Ok(kept);
    }
    eprintln!("auto: measuring memory, processor, and drive once; a busy machine takes minutes");
    let started = Instant::now();
    let machine = measure(&Settings {
        model: Some(asked.model),
        threads: asked.threads,
        numa: asked.numa,
        shards: asked.shards,
        is_quick: true,
        ..Settings::default()
    })
    .context("measuring this machine")?
    .machine();
    let path = place.keep(&name, notes, |path| machine.write(path));
    Ok(Found {
        machine,
        path,
        from: format!(
            "this machine as measured just now in {} s",
            digits(started.elapsed().as_secs_f64())
        ),
        is_new: true,
    })
}

/// Reads the machine file of an earlier start, unless it is too old or no longer usable.
fn kept(path: &Path, notes: &mut Vec<String>) -> Option<Found> {
    if age(path) >= MAX_AGE {
        return None;
    }
    match machine::read(path) {
        Ok(machine) if is_plain(&machine) => {
            let when = modified(path).map_or_else(String::new, show_utc);
            let day = when.split('T').next().unwrap_or_default();
            return Some(Found {
                machine,
                from: format!("this machine as measured on {day}"),
                path: Some(path.to_path_buf()),
                is_new: false,
            });
        }
        Ok(_) => notes.push(format!(
            "note: {}: expected main memory and a drive; the machine is measured again",
            path.display()
        )),
        Err(error) => notes.push(format!(
            "note: the machine is measured again: {}",
            printable(&error.to_string())
        )),
    }
    None
}

/// Reads a machine file that was asked for.
fn given(path: &Path, model: &Path) -> Result<Found> {
    let machine = catalogue::machine_for(path, model)?;
    if !is_plain(&machine) {
        let other = anyhow!(
            "{}: expected a measured machine: GPUs, one tier of main memory, and a drive as the last tier",
            path.display()
        );
        return Err(other).hint("plan for other machines with `tier-plan solve`, and pass --plan");
    }
    Ok(Found {
        machine,
        path: Some(path.to_path_buf()),
        from: format!("machine file {}", path.display()),
        is_new: false,
    })
}

/// Whether a machine has tiers that a process's memory can be divided among without being asked.
fn is_plain(machine: &Machine) -> bool {
    let Some((drive, upper)) = machine.tiers.split_last() else {
        return false;
    };
    let is_memory = |tier: &&Tier| tier.medium() != Medium::Gpu;
    let mut memory = upper.iter().filter(is_memory);
    let is_one = memory
        .next()
        .is_some_and(|tier| tier.kind == TierKind::Dram && tier.unit.is_none());
    let is_real = machine.tiers.iter().all(|tier| !tier.emulated);
    drive.is_drive() && is_one && memory.next().is_none() && is_real
}

/// Returns the name of the file of this machine, which another machine does not have.
pub(super) fn name(asked: &Asked<'_>) -> Result<String> {
    let text = fingerprint(asked)?;
    let hash = SourceId::of_bytes("", text.as_bytes()).hash;
    Ok(format!("machine-{}.toml", &hash[..DIGITS.min(hash.len())]))
}

/// Returns in lines what measurements depend on.
fn fingerprint(asked: &Asked<'_>) -> Result<String> {
    let cores = physical_cores();
    let numa = asked
        .numa
        .map_or_else(|| "system".to_string(), |policy| policy.to_string());
    let kernels = Kernels::from_env()?;
    let lines = [
        format!("program {}", env!("CARGO_PKG_VERSION")),
        format!("host {}", host::describe()),
        format!("cores {cores}, used {}", asked.threads.unwrap_or(cores)),
        format!("numa {numa}"),
        format!("kernels {}", kernels.isa()),
        format!("limit {:?}", cgroup_limit()),
        format!("drive {:?}", device(asked.model)),
        format!("reads {:?}", std::env::var_os("TIER_PLAN_IO")),
        format!("gpus {:?}", gpus()),
    ];
    Ok(lines.join("\n"))
}

/// Returns the number of the device that a file is on.
#[cfg(unix)]
fn device(file: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(std::fs::metadata(file).ok()?.dev())
}

/// Returns the folder of a file: other systems do not tell devices apart.
#[cfg(not(unix))]
fn device(file: &Path) -> Option<PathBuf> {
    Some(file.canonicalize().ok()?.parent()?.to_path_buf())
}

/// Returns the addresses of NVIDIA's GPUs, and which of them programs may use.
fn gpus() -> (Vec<std::ffi::OsString>, Option<std::ffi::OsString>) {
    let entries = std::fs::read_dir("/proc/driver/nvidia/gpus");
    let entries = entries.into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
    names.sort();
    (names, std::env::var_os("CUDA_VISIBLE_DEVICES"))
}

/// Returns the day of a moment.
pub(super) fn today() -> String {
    let now = show_utc(SystemTime::now());
    now.split('T').next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    /// A machine that `probe` could have written.
    const MEASURED: &str = include_str!("../../../tests/data/auto/machine.toml");

    #[test]
    fn a_measured_machine_is_taken_as_long_as_it_is_young_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine.toml");
        let mut notes = Vec::new();
        fs::write(&path, MEASURED).unwrap();
        let found = kept(&path, &mut notes).unwrap();
        assert!(!found.is_new && found.from.contains("as measured on 20"));
        assert_eq!(found.path.as_ref(), Some(&path));
        assert_eq!(found.machine.tiers.len(), 2);

        let old = SystemTime::now() - MAX_AGE;
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(old)
            .unwrap();
        assert!(kept(&path, &mut notes).is_none());
        assert_eq!(notes, [""; 0], "age is no fault");

        for (text, why) in [
            ("damaged".to_string(), "the machine is measured again"),
            (
                MEASURED.replace("\"nvme\"", "\"cxl\""),
                "expected main memory and a drive",
            ),
        ] {
            fs::write(&path, text).unwrap();
            assert!(kept(&path, &mut notes).is_none());
            let note = notes.pop().unwrap();
            assert!(note.contains(why), "{note}");
        }
    }
}
