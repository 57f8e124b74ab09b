//! Files that earlier commands wrote: the machine file, and what lies beside a model.

use super::Check;
use super::model::{Given, Opened};
use crate::hint::hint_for;
use crate::probe::MACHINE_FILE;
use crate::{host, store, verify};
use anyhow::{Error, Result};
use std::path::{Path, PathBuf};
use tier_plan_runtime::experts::checksums::Checksums;
use tier_plan_runtime::experts::pack::Pack;
use tier_plan_runtime::formats::machine::{self, Machine, TierKind};
use tier_plan_runtime::formats::{placement, profile, sums};
use tier_plan_runtime::tiers::limits::Limit;
use tier_plan_runtime::units::show_bytes;

/// Where `solve` writes unless told otherwise.
const PLAN: &str = "placement.toml";

/// The machine file of the current folder, or the one asked for.
pub(super) enum Probed {
    /// There is none.
    Missing,
    /// It cannot be read.
    Unusable { path: PathBuf, error: String },
    /// It describes a machine, perhaps another one.
    Read {
        path: PathBuf,
        machine: Box<Machine>,
    },
}

impl Probed {
    /// Returns the machine if it is this one, as its description says.
    pub(super) fn of_this_machine(&self, host: &str) -> Option<&Machine> {
        match self {
            Probed::Read { machine, .. } if machine.description.ends_with(host) => Some(machine),
            _ => None,
        }
    }
}

/// Reads the machine file that was asked for, or `machine.toml` in the current folder.
///
/// # Errors
/// When the one that was asked for is unreadable.
pub(super) fn machine(asked: Option<&Path>) -> Result<Probed> {
    let path = asked.unwrap_or(Path::new(MACHINE_FILE)).to_path_buf();
    if asked.is_none() && !path.exists() {
        return Ok(Probed::Missing);
    }
    Ok(match machine::read(&path) {
        Ok(machine) => Probed::Read {
            path,
            machine: Box::new(machine),
        },
        Err(error) if asked.is_some() => return Err(error.into()),
        Err(error) => Probed::Unusable {
            path,
            error: error.to_string(),
        },
    })
}

pub(super) fn machine_check(probed: &Probed, limit: Option<&Limit>) -> Check {
    machine_check_on(probed, limit, &host::describe())
}

/// [`machine_check`] on a host that describes itself so.
pub(super) fn machine_check_on(probed: &Probed, limit: Option<&Limit>, host: &str) -> Check {
    let id = "probe.machine_file";
    let (path, machine) = match probed {
        Probed::Missing => {
            return Check::ok(
                id,
                "none in this folder; `tier-plan probe` measures this machine and writes one",
            );
        }
        Probed::Unusable { path, error } => {
            return Check::ok(id, error.as_str())
                .failure(format!("tier-plan probe -o {}", path.display()));
        }
        Probed::Read { path, machine } => (path, machine),
    };
    let shown = path.display();
    let again = format!("tier-plan probe -o {shown}");
    let check = Check::ok(id, format!("{shown}: {}", machine.description))
        .fact("file", shown.to_string())
        .fact("description", machine.description.as_str());
    // Declared machines are those of other people on purpose.
    if !machine.description.starts_with("measured on ") {
        return check;
    }
    if probed.of_this_machine(host).is_none() {
        return check
            .warning(format!(
                "plans and predictions with it are those of another machine: this is {host}"
            ))
            .mend(again);
    }
    let dram = machine
        .tiers
        .iter()
        .filter(|t| t.kind == TierKind::Dram && !t.emulated);
    let planned = dram.fold(0u64, |sum, t| sum.saturating_add(t.capacity_bytes));
    match limit {
        Some(limit) if planned > limit.bytes => check
            .warning(format!(
                "plans count on {} of main memory, and this process may hold {} ({})",
                show_bytes(planned),
                show_bytes(limit.bytes),
                limit.source
            ))
            .mend(again),
        _ => check,
    }
}

/// Checks the files beside a model, and the plan of the current folder: whether this version reads them,
/// and whether they are of the model.
pub(super) fn beside(given: &Given<'_>, opened: &Opened) -> Vec<Check> {
    let (gguf, spec) = (&opened.gguf, &opened.spec);
    let own = gguf.id();
    let model = given.shown();
    let mut checks = Vec::new();
    let mut check = |id, file: &Path, mend: String, read: &dyn Fn() -> Result<()>| {
        if file.exists() {
            let read = read().map_err(|error| said(&error));
            checks.push(of_file(id, file, read, mend));
        }
    };
    let file = given.path.with_extension("profile");
    check(
        "model.profile",
        &file,
        format!("tier-plan profile {model}"),
        &|| Ok(profile::read(&file)?.check_model(&own, &file)?),
    );
    let file = verify::default_path(gguf);
    check(
        "model.checksums",
        &file,
        format!("tier-plan checksum {model}"),
        &|| {
            Checksums::bind(gguf, spec, &sums::read(&file)?, &file)?;
            Ok(())
        },
    );
    let file = store::default_pack(gguf);
    check(
        "model.pack",
        &file,
        format!("tier-plan pack {model}"),
        &|| {
            Pack::open(gguf, spec, &file)?;
            Ok(())
        },
    );
    let file = Path::new(PLAN);
    let solve = format!("tier-plan solve {model} -M {MACHINE_FILE}");
    check("model.plan", file, solve, &|| {
        // A plan of another model is nothing wrong.
        placement::read(file)?;
        Ok(())
    });
    checks
}

fn of_file(id: &'static str, file: &Path, read: Result<(), String>, mend: String) -> Check {
    let check = match &read {
        Ok(()) => Check::ok(id, format!("{}: readable", file.display())),
        Err(error) => Check::ok(id, error.as_str()).failure(mend),
    };
    check.fact("file", file.display().to_string())
}

/// Returns an error with its causes and its advice.
pub(super) fn said(error: &Error) -> String {
    match hint_for(error) {
        Some(hint) => format!("{error:#}; {hint}"),
        None => format!("{error:#}"),
    }
}
