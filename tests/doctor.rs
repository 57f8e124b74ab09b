//! `tier-plan doctor` as a whole program, on whatever machine the tests run on.

use crate::common::{demo_model, json, refused, run_in, stderr, stdout, succeeded, tier_plan};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Output;

/// The report of a run that may have found failures, which its exit code says.
fn report(output: &Output) -> Value {
    let report: Value = serde_json::from_str(&stdout(output)).unwrap();
    let failures = report["failures"].as_u64().unwrap();
    let expected = if failures > 0 { 1 } else { 0 };
    assert_eq!(output.status.code(), Some(expected), "{}", stderr(output));
    if failures > 0 {
        assert!(
            stderr(output).contains("checks failed"),
            "{}",
            stderr(output)
        );
    }
    report
}

fn check<'r>(report: &'r Value, group: &str, name: &str) -> &'r Value {
    let checks = report["checks"].as_array().unwrap();
    let found = checks
        .iter()
        .find(|check| check["group"] == group && check["check"] == name);
    found.unwrap_or_else(|| panic!("{group}.{name} in {report:#}"))
}

#[test]
fn every_check_has_its_form() {
    let folder = tempfile::tempdir().unwrap();
    let report = report(&run_in(folder.path(), &["doctor", "--json"]));
    assert_eq!(report["version"], 1);
    let page = fs::read_to_string(crate::common::root().join("docs/doctor.md")).unwrap();
    let mut names = BTreeSet::new();
    for check in report["checks"].as_array().unwrap() {
        let keys: Vec<&String> = check.as_object().unwrap().keys().collect();
        assert_eq!(
            keys,
            ["group", "check", "status", "found", "cost", "mend", "facts"]
        );
        let text = |key: &str| {
            check[key]
                .as_str()
                .unwrap_or_else(|| panic!("{key}: {check}"))
        };
        match text("status") {
            "ok" => assert!(check["cost"].is_null(), "{check}"),
            "warning" => assert!(
                !check["cost"]["words"].as_str().unwrap().is_empty(),
                "{check}"
            ),
            "failure" => assert!(check["mend"].is_string(), "{check}"),
            other => panic!("{other}"),
        }
        assert!(!text("found").is_empty(), "{check}");
        let name = format!("{}.{}", text("group"), text("check"));
        assert!(
            page.contains(&format!("`{name}`")),
            "docs/doctor.md lacks {name}"
        );
        assert!(names.insert(name), "{check}");
    }
    for (group, name) in [
        ("processor", "kernels"),
        ("memory", "huge_pages"),
        ("gpu", "devices"),
    ] {
        check(&report, group, name);
    }
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        0,
        "nothing is left behind"
    );
}

#[test]
fn lines_are_one_per_check() {
    let folder = tempfile::tempdir().unwrap();
    let output = run_in(folder.path(), &["doctor"]);
    let text = stdout(&output);
    let (last, lines) = text
        .lines()
        .collect::<Vec<_>>()
        .split_last()
        .map(|(l, r)| (l.to_string(), r.to_vec()))
        .unwrap();
    assert!(
        last.starts_with(&format!("{} checks: ", lines.len())),
        "{last}"
    );
    for line in lines {
        let word = line.split_whitespace().next().unwrap();
        assert!(["ok", "warning", "failure"].contains(&word), "{line}");
    }
}

#[test]
fn a_model_that_fits_has_a_predicted_speed() {
    let folder = tempfile::tempdir().unwrap();
    let model = demo_model();
    let report = report(
        &tier_plan()
            .current_dir(folder.path())
            .arg("doctor")
            .arg(&model)
            .args(["--json", "--threads", "2"])
            .output()
            .unwrap(),
    );
    assert_eq!(check(&report, "model", "file")["status"], "ok");
    assert_eq!(check(&report, "model", "fit")["status"], "ok");
    let speed = check(&report, "model", "speed");
    assert!(
        speed["facts"]["decode_tok_s"].as_f64().unwrap() > 0.0,
        "{speed}"
    );
    let types = check(&report, "model", "types")["facts"]["types"]
        .as_array()
        .unwrap()
        .clone();
    assert!(!types.is_empty());
    assert_eq!(report["checks"].as_array().unwrap()[0]["check"], "model");
}

#[test]
fn a_model_with_a_missing_part_fails() {
    let folder = tempfile::tempdir().unwrap();
    let split = Path::new("tests/data/gguf");
    let parts = crate::common::root().join(split);
    let first = fs::read_dir(&parts)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().contains("-00001-of-"))
        .expect("a split model");
    let copy = folder.path().join(first.file_name().unwrap());
    fs::copy(&first, &copy).unwrap();
    let output = run_in(folder.path(), &["doctor", "--json", copy.to_str().unwrap()]);
    let report = report(&output);
    let file = check(&report, "model", "file");
    assert_eq!(file["status"], "failure");
    assert!(
        file["found"].as_str().unwrap().contains("is missing"),
        "{file}"
    );
}

#[test]
fn wrong_variables_and_files_are_failures() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(
        folder.path().join("machine.toml"),
        "format = \"tier-plan machine\"\nversion = 99\n",
    )
    .unwrap();
    let output = tier_plan()
        .current_dir(folder.path())
        .args(["doctor", "--json"])
        .env("TIER_PLAN_ISA", "sse9")
        .env("TIER_PLAN_IO", "sideways")
        .output()
        .unwrap();
    let report = report(&output);
    assert_eq!(output.status.code(), Some(1));
    for (group, name, mend) in [
        ("processor", "kernels", "unset TIER_PLAN_ISA"),
        ("drive", "direct_io", "unset TIER_PLAN_IO"),
        ("probe", "machine_file", "tier-plan probe -o machine.toml"),
    ] {
        let check = check(&report, group, name);
        assert_eq!(
            (&check["status"], &check["mend"]),
            (&"failure".into(), &mend.into())
        );
    }
}

#[test]
fn a_machine_file_that_is_asked_for_must_be_there() {
    let folder = tempfile::tempdir().unwrap();
    refused(
        folder.path(),
        &["doctor", "-M", "none.toml"],
        &["none.toml: No such file"],
    );
    refused(
        folder.path(),
        &["doctor", "--threads", "0"],
        &["--threads: 0"],
    );
}

#[test]
fn the_home_folder_is_not_named() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("models of alice");
    fs::create_dir(&folder).unwrap();
    fs::copy(demo_model(), folder.join("m.gguf")).unwrap();
    fs::write(folder.join("m.profile"), "no profile").unwrap();
    let real = home.path().canonicalize().unwrap();
    let output = tier_plan()
        .current_dir(&folder)
        .arg("doctor")
        .arg(folder.canonicalize().unwrap().join("m.gguf"))
        .env("HOME", &real)
        .arg("--json")
        .output()
        .unwrap();
    let text = stdout(&output);
    assert!(!text.contains(real.to_str().unwrap()), "{text}");
    let report = report(&output);
    let folder = &check(&report, "drive", "file_system")["facts"]["folder"];
    assert!(
        folder.is_null() || *folder == "~/models of alice",
        "{folder}"
    );
    let profile = check(&report, "model", "profile");
    assert_eq!(profile["status"], "failure");
    assert!(
        profile["found"]
            .as_str()
            .unwrap()
            .contains("~/models of alice/m.profile"),
        "{profile}"
    );
}

#[test]
#[cfg(target_os = "linux")]
fn a_drive_is_measured_when_asked() {
    let folder = tempfile::tempdir().unwrap();
    let output = tier_plan()
        .current_dir(folder.path())
        .arg("doctor")
        .arg(demo_model())
        .args(["--measure", "--json"])
        .output()
        .unwrap();
    let report = report(&output);
    let rate = check(&report, "drive", "rate");
    assert!(rate["facts"]["gbps"].as_f64().unwrap() > 0.0, "{rate}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    succeeded(run_in(folder.path(), &["doctor", "--help"]));
    json(run_in(folder.path(), &["config", "doctor", "--json"]));
}
