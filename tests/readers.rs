//! Standard output whose reader has gone, or that is full.

use crate::common::{check_refusal, demo_model, piped, stderr, tier_plan};
use std::fs;
use std::io::Read;

#[test]
fn a_reader_that_has_gone_leaves_the_record() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = tier_plan();
    command
        .current_dir(folder.path())
        .arg("run")
        .arg(demo_model());
    command.args([
        "-p",
        "In the beginning",
        "-n",
        "200",
        "--ignore-eos",
        "--record",
        "r.json",
    ]);
    let mut child = piped(&mut command);
    let mut output = child.stdout.take().unwrap();
    output.read_exact(&mut [0]).unwrap();
    drop(output);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let record = fs::read_to_string(folder.path().join("r.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    assert!(!record["output"].as_array().unwrap().is_empty());
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    let model = demo_model();
    let model = model.to_str().unwrap();
    for list in [
        &["inspect", model, "--tensors"][..],
        &["tokenize", model, "a text"],
        &["run", model, "-p", "a", "-n", "4"],
    ] {
        let mut command = tier_plan();
        command.current_dir(folder.path()).args(list);
        let mut child = piped(&mut command);
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{list:?}: {}", stderr(&output));
        assert!(
            !stderr(&output).contains("error") && !stderr(&output).contains("panicked"),
            "{}",
            stderr(&output)
        );
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_behind_standard_output_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = demo_model();
    let model = model.to_str().unwrap();
    for list in [
        &["inspect", model][..],
        &["run", model, "-p", "a", "-n", "4"],
    ] {
        let full = fs::OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let output = tier_plan()
            .current_dir(folder.path())
            .args(list)
            .stdout(full)
            .output()
            .unwrap();
        check_refusal(&output, &["standard output", "No space left"]);
    }
}
