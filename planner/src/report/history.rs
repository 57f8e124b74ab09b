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

/// Compares a record with its predictions: of one text, and of each number of texts at once. Leaves
/// out what was not predicted or not measured.
pub(super) fn past(record: &RunRecord, report: &str, is_new: bool) -> Vec<PastRun> {
    let name = |id: &Option<tier_plan_runtime::formats::SourceId>| {
        id.as_ref().map_or(String::new(), |i| i.name.clone())
    };
    let run = |plan: String, predicted_tok_s, measured_tok_s, observed_tok_s| PastRun {
        report: report.to_string(),
        plan,
        model: name(&record.model),
        machine: name(&record.machine),
        when: record.when.clone(),
        emulated: record.emulated,
        is_new,
        predicted_tok_s,
        measured_tok_s,
        observed_tok_s,
    };
    let now = record
        .conditions
        .as_ref()
        .and_then(|c| c.predicted.as_ref());
    let alone = record.predicted.as_ref().map(|predicted| {
        run(
            record.plan.clone(),
            predicted.decode_tok_s,
            record.decode_tok_s(),
            now.map(|p| p.decode_tok_s).filter(|tok_s| *tok_s > 0.0),
        )
    });
    let together = record.parallel.iter().filter_map(|steps| {
        Some(run(
            format!("{}, {} at once", record.plan, steps.texts),
            steps.predicted?.decode_tok_s,
            steps.decode_tok_s,
            steps
                .observed
                .map(|p| p.decode_tok_s)
                .filter(|tok_s| *tok_s > 0.0),
        ))
    });
    let all = alone.into_iter().chain(together);
    all.filter(PastRun::is_sound).collect()
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
    fn texts_at_once_are_runs_of_their_own() {
        use tier_plan_runtime::formats::placement::Prediction;
        use tier_plan_runtime::formats::record::{Conditions, ParallelPrediction, ParallelRecord};
        let of = |decode_tok_s| {
            Some(ParallelPrediction {
                decode_tok_s,
                gap_s: 0.1,
            })
        };
        let steps = |texts, decode_tok_s, predicted, observed| ParallelRecord {
            texts,
            decode_tok_s,
            predicted,
            observed,
            ..ParallelRecord::default()
        };
        let record = RunRecord {
            plan: "p".into(),
            decode_tokens: 10,
            decode_s: 1.0,
            predicted: Some(Prediction {
                decode_tok_s: 12.5,
                ..Prediction::default()
            }),
            conditions: Some(Conditions {
                predicted: Some(Prediction {
                    decode_tok_s: 10.0,
                    ..Prediction::default()
                }),
                ..Conditions::default()
            }),
            parallel: vec![
                steps(2, 20.0, of(25.0), of(16.0)),
                steps(4, 30.0, of(30.0), None),
                steps(8, 40.0, None, None),
            ],
            ..RunRecord::default()
        };
        let runs = past(&record, "r", true);
        let told: Vec<(&str, f64, f64)> = runs
            .iter()
            .map(|run| (run.plan.as_str(), run.error(), run.observed_error()))
            .collect();
        let (names, errors): (Vec<&str>, Vec<[f64; 2]>) =
            told.into_iter().map(|(name, a, b)| (name, [a, b])).unzip();
        assert_eq!(names, ["p", "p, 2 at once", "p, 4 at once"]);
        let wanted = [[-0.2, 0.0], [-0.2, 0.25], [0.0, 0.0]];
        for (errors, wanted) in errors.iter().zip(wanted) {
            assert!(
                errors
                    .iter()
                    .zip(wanted)
                    .all(|(a, b)| (a - b).abs() < 1e-12),
                "{errors:?}"
            );
        }
        let report = Report {
            history: runs,
            ..Report::default()
        };
        let line = super::super::history_line(&report).unwrap();
        assert_eq!(
            line,
            "Of all 3 runs that reports here have kept, 1 were predicted to 10 % or better with the rates of their \
             plans, and 2 with the rates that each run had."
        );
    }

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
