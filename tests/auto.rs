//! `tier-plan auto` as a whole program: what it measures, solves, keeps, and learns, on the bundled
//! model with less memory than it needs.

use crate::common::{
    check_refusal, demo_model, json, listing, stderr, stdout, succeeded, tier_plan,
};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const LITTLE: &str = "40MiB";
const MORE: &str = "42MiB";

/// A machine as `tier-plan probe` describes one.
const MACHINE: &str = include_str!("data/auto/machine.toml");

/// The program with a home of its own, and a copy of the model that has nothing beside it.
struct Home {
    folder: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let home = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        fs::copy(demo_model(), home.path("m.gguf")).unwrap();
        fs::write(home.path("machine.toml"), MACHINE).unwrap();
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, command: &str, more: &[&str]) -> Command {
        let mut program = tier_plan();
        program
            .current_dir(self.folder.path())
            .env("HOME", self.path("home"))
            .env_remove("XDG_STATE_HOME")
            .args([command, "m.gguf", "--threads", "2", "-c", "256"])
            .args(more);
        program
    }

    /// Runs `auto` on a machine that is given, and returns what it printed.
    fn auto(&self, more: &[&str]) -> Output {
        let given = [
            "--machine",
            "machine.toml",
            "-p",
            "In the beginning",
            "-n",
            "100",
            "--ignore-eos",
        ];
        let output = self.command("auto", &given).args(more).output().unwrap();
        succeeded(output)
    }

    /// Runs as [`auto`](Self::auto), and returns the report.
    fn report(&self, more: &[&str]) -> (Value, String) {
        let output = self.auto(&[&["--json"], more].concat());
        let told = stderr(&output);
        let mut value = json(output);
        (value["auto"].take(), told)
    }

    /// The folder of the model's files.
    fn state(&self) -> PathBuf {
        let models = fs::read_dir(self.path("home/.local/state/tier-plan/auto")).unwrap();
        let folders: Vec<PathBuf> = models.map(|entry| entry.unwrap().path()).collect();
        assert_eq!(folders.len(), 1, "{folders:?}");
        folders[0].clone()
    }
}

/// Whether a report is of a plan that was solved now.
fn is_solved(report: &Value) -> bool {
    report["solved"].as_bool().unwrap()
}

fn no_half_files(folder: &Path) {
    let half = |path: &PathBuf| path.to_string_lossy().ends_with(".partial");
    assert!(!listing(folder).iter().any(half), "{:?}", listing(folder));
}

#[test]
fn a_machine_is_measured_once_and_a_plan_solved_once() {
    let home = Home::new();
    let start = |more: &[&str]| {
        let given = [
            "--memory",
            LITTLE,
            "--no-learn",
            "-p",
            "In the beginning",
            "-n",
            "4",
        ];
        let output = home.command("auto", &given).args(more).output().unwrap();
        stderr(&succeeded(output))
    };
    let first = start(&[]);
    assert!(
        first.contains("auto: measuring") && first.contains("auto: solving"),
        "{first}"
    );
    assert!(
        first.contains("measured just now in") && first.contains("predicted"),
        "{first}"
    );
    assert!(first.contains("assumed to be equally likely"), "{first}");
    assert!(first.contains("what would help most"), "{first}");
    let kept = listing(&home.state());
    assert_eq!(kept.len(), 3, "{kept:?}");
    no_half_files(&home.state());

    let second = start(&[]);
    assert!(
        !second.contains("measuring") && !second.contains("solving"),
        "{second}"
    );
    assert!(
        second.contains("as measured on") && second.contains("the plan of"),
        "{second}"
    );
    assert_eq!(listing(&home.state()), kept);
}

#[test]
fn plans_are_kept_for_what_they_were_made_for() {
    let home = Home::new();
    let (first, told) = home.report(&["--memory", LITTLE, "--no-learn"]);
    assert!(
        is_solved(&first) && told.contains("machine file machine.toml"),
        "{told}"
    );
    assert!(first["predicted_decode_tok_s"].as_f64().unwrap() > 0.0);
    let (again, told) = home.report(&["--memory", LITTLE, "--no-learn"]);
    assert!(!is_solved(&again) && !told.contains("solving"), "{told}");
    assert_eq!(first["plan"], again["plan"]);
    assert_eq!(first["advice"], again["advice"]);
    let (more, _) = home.report(&["--memory", MORE, "--no-learn"]);
    assert!(is_solved(&more) && more["plan"] != first["plan"]);
    fs::write(
        home.path("machine.toml"),
        MACHINE.replace("read_gbps = 1\n", "read_gbps = 2\n"),
    )
    .unwrap();
    let (other, _) = home.report(&["--memory", LITTLE, "--no-learn"]);
    assert!(is_solved(&other) && other["plan"] != first["plan"]);

    let plan = PathBuf::from(other["plan"].as_str().unwrap());
    for (path, text) in [
        (plan.clone(), "damaged"),
        (plan.with_extension("json"), "{"),
    ] {
        fs::write(&path, text).unwrap();
        let (anew, told) = home.report(&["--memory", LITTLE, "--no-learn"]);
        assert!(is_solved(&anew), "{told}");
        assert!(told.contains("note: the plan is solved again"), "{told}");
        let (kept, _) = home.report(&["--memory", LITTLE, "--no-learn"]);
        assert!(!is_solved(&kept));
    }
    let shown = stdout(&succeeded(
        home.command("auto", &["--show"]).output().unwrap(),
    ));
    assert!(shown.contains(plan.to_str().unwrap()), "{shown}");
    let explained = tier_plan()
        .args(["explain".as_ref(), plan.as_os_str(), "-m".as_ref()])
        .arg(home.path("m.gguf"))
        .output()
        .unwrap();
    assert!(stdout(&succeeded(explained)).contains("bottleneck"));
}

#[test]
fn what_texts_choose_is_learned_and_planned_with() {
    let home = Home::new();
    let plain = home.command(
        "run",
        &[
            "-p",
            "In the beginning",
            "-n",
            "100",
            "--ignore-eos",
            "--json",
        ],
    );
    let text = json({ plain }.output().unwrap())["text"].clone();
    let start = || {
        let output = home.auto(&["--memory", LITTLE, "--json"]);
        let value = json(output);
        assert_eq!(value["text"], text, "a plan never changes a text");
        value["auto"].clone()
    };
    let first = start();
    assert!(first["profile"].is_null(), "{first:#}");
    let learned = PathBuf::from(first["learns"].as_str().unwrap());
    assert!(learned.exists());
    // Until there is enough to choose by and to judge by, the first plan stays.
    let mut starts = 1;
    let planned = loop {
        let next = start();
        starts += 1;
        if !next["profile"].is_null() {
            assert!(is_solved(&next), "{next:#}");
            break next;
        }
        assert!(!is_solved(&next) && starts < 12, "{next:#}");
    };
    assert!(
        planned["basis"]
            .as_str()
            .unwrap()
            .contains("texts of earlier runs")
    );
    let profile = PathBuf::from(planned["profile"].as_str().unwrap());
    assert_eq!(profile.file_name().unwrap(), "planned.profile");
    // It stays with that plan until it has learned twice as much.
    let next = start();
    assert!(
        !is_solved(&next) && next["plan"] == planned["plan"],
        "{next:#}"
    );
    let explained = tier_plan()
        .arg("explain")
        .arg(planned["plan"].as_str().unwrap())
        .arg("-m")
        .arg(home.path("m.gguf"))
        .arg("-P")
        .arg(&profile)
        .output()
        .unwrap();
    succeeded(explained);

    // A damaged profile is made anew.
    fs::write(&learned, "damaged").unwrap();
    let output = home.auto(&["--memory", LITTLE]);
    assert!(
        stderr(&output).contains("it is made anew"),
        "{}",
        stderr(&output)
    );
    assert!(fs::metadata(&learned).unwrap().len() > 100);

    let before = fs::read(&learned).unwrap();
    home.auto(&["--memory", LITTLE, "--no-learn"]);
    assert_eq!(fs::read(&learned).unwrap(), before);
}

#[test]
fn a_model_that_fits_is_neither_measured_nor_planned() {
    let home = Home::new();
    let output = home
        .command("auto", &["-p", "In the beginning", "-n", "4"])
        .output();
    let told = stderr(&succeeded(output.unwrap()));
    assert!(
        told.contains("all ") && told.contains("fit in memory"),
        "{told}"
    );
    assert!(
        !told.contains("measuring") && !told.contains("solving"),
        "{told}"
    );
    assert!(!home.path("home").exists());
}

#[test]
fn without_a_folder_to_write_to_all_works_with_one_note() {
    let home = Home::new();
    fs::write(home.path("file"), "").unwrap();
    let blocked = home.path("file/below");
    for (name, value) in [
        ("XDG_STATE_HOME", blocked.as_path()),
        ("HOME", Path::new("")),
    ] {
        let given = [
            "--machine",
            "machine.toml",
            "--memory",
            LITTLE,
            "-p",
            "In the beginning",
            "-n",
            "4",
        ];
        let output = home
            .command("auto", &given)
            .env(name, value)
            .output()
            .unwrap();
        let told = stderr(&succeeded(output));
        assert_eq!(told.matches("note:").count(), 1, "{told}");
        assert!(
            told.contains("nothing is kept for the next start"),
            "{told}"
        );
        assert!(told.contains("predicted"), "{told}");
    }
}

#[test]
fn options_without_effect_are_refused() {
    let home = Home::new();
    let refused = |command: &str, more: &[&str], words: &[&str]| {
        let output = home
            .command(command, more)
            .args(["-p", "x"])
            .output()
            .unwrap();
        check_refusal(&output, words);
    };
    refused("run", &["--probe"], &["--probe", "--auto"]);
    refused("auto", &["--plan", "x.toml"], &["--plan", "tier-plan run"]);
    let emulated = crate::common::demo_machine();
    let emulated = ["--machine", emulated.to_str().unwrap(), "--memory", LITTLE];
    refused(
        "auto",
        &emulated,
        &["expected a measured machine", "tier-plan solve"],
    );
}
