//! Run records that reports keep, and the records that earlier reports kept.
//!
//! Every report stores its run records in a folder of its own, so that predictions can be held
//! against everything that was ever measured, and machine files can be fitted to it.

use super::{PastRun, Report};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::record::{self, RunRecord};

/// Folder of records inside a report.
const FOLDER: &str = "records";

/// File name ending of records.
const ENDING: &str = ".record.json";

/// Most reports, and most records, that are read: the newest by name.
const MOST_REPORTS: usize = 1000;
const MOST_RECORDS: usize = 4000;

/// Writes the records of a report into its folder.
///
/// # Errors
/// When the file system refuses.
pub(super) fn keep(dir: &Path, report: &Report) -> Result<()> {
    let folder = dir.join(FOLDER);
    for (at, plan) in report.plans.iter().enumerate() {
        for (run, record) in plan.records.iter().enumerate() {
            fs::create_dir_all(&folder).with_context(|| format!("making the folder {FOLDER}"))?;
            // Plan names are user input; these file names are not.
            let name = format!("{:02}-{:03}{ENDING}", at + 1, run + 1);
            super::save(&folder, &name, record.encode())?;
        }
    }
    Ok(())
}

/// Compares a record with its prediction. `None` without a prediction or a measurement.
pub(super) fn past(record: &RunRecord, report: &str, is_new: bool) -> Option<PastRun> {
    let predicted = record.predicted.as_ref()?;
    let name = |id: &Option<tier_plan_runtime::formats::SourceId>| {
        id.as_ref().map_or(String::new(), |i| i.name.clone())
    };
    let run = PastRun {
        report: report.to_string(),
        plan: record.plan.clone(),
        model: name(&record.model),
        machine: name(&record.machine),
        when: record.when.clone(),
        emulated: record.emulated,
        is_new,
        predicted_tok_s: predicted.decode_tok_s,
        measured_tok_s: record.decode_tok_s(),
    };
    run.is_sound().then_some(run)
}

/// Reads the runs that the reports in a folder have kept. Returns them with the number of
/// unreadable files.
pub fn read(reports: &Path) -> (Vec<PastRun>, usize) {
    let (mut runs, mut unread, mut looked_at) = (Vec::new(), 0, 0);
    let mut folders = names(reports);
    folders.sort();
    for folder in folders.iter().rev().take(MOST_REPORTS) {
        let mut files = names(&folder.join(FOLDER));
        files.retain(|f| {
            f.file_name()
                .is_some_and(|n| n.to_string_lossy().ends_with(ENDING))
        });
        files.sort();
        let name = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        for file in files {
            if looked_at == MOST_RECORDS {
                return (runs, unread);
            }
            looked_at += 1;
            match record::read(&file) {
                Ok(record) => runs.extend(past(&record, &name, false)),
                Err(_) => unread += 1,
            }
        }
    }
    (runs, unread)
}

/// Lists a folder; empty where there is none.
fn names(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn what_a_report_keeps_the_next_one_finds() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let report = sample::report(4, 16, 2, 3, 2, false);
        let runs: usize = report.plans.iter().map(|p| p.records.len()).sum();
        keep(&folder.path().join("first"), &report)?;
        keep(&folder.path().join("second"), &report)?;
        fs::create_dir(folder.path().join("empty"))?;
        fs::write(folder.path().join("second/records/99-001.record.json"), "{")?;
        fs::write(
            folder.path().join("second/records/notes.txt"),
            "none of ours",
        )?;
        let (found, unread) = read(folder.path());
        assert_eq!((found.len(), unread), (2 * runs, 1));
        assert!(
            found
                .iter()
                .all(|r| !r.is_new && !r.emulated && r.error().is_finite())
        );
        assert_eq!(found.iter().filter(|r| r.report == "first").count(), runs);
        assert_eq!(read(&folder.path().join("nowhere")), (Vec::new(), 0));
        Ok(())
    }
}
