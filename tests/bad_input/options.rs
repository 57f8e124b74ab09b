//! Outputs that cannot be written, options out of range, and files that cannot be compared.

use super::{Place, swap};
use crate::common::{self, run_in, stderr, succeeded};
use std::fs;

#[test]
fn outputs_that_cannot_be_written() {
    let p = Place::new();
    p.plan();
    p.folder("folder");
    p.write("file", "");
    let solve = ["solve", &p.demo, "-m", &p.machine, "--strategy", "lru-only"];
    let run = ["run", &p.demo, "-p", "a", "-n", "2", "--record"];
    let logits = ["logits", &p.demo, "--tokens", "1", "-o"];
    for (place, words) in [
        ("folder", &["folder", "name a file inside it"][..]),
        ("no/x", &["no/x", "does not exist", "create it"]),
        ("file/x", &["file/x", "not a folder"]),
    ] {
        p.refused(&[&solve[..], &["-o", place]].concat(), words);
        let line = p.refused(&[&run[..], &[place]].concat(), words);
        assert!(!line.contains("planned"), "{line}");
        p.refused(&[&logits[..], &[place]].concat(), words);
    }
    p.refused(
        &[&solve[..], &["-o", "x", "--baselines", "file"]].concat(),
        &["file", "folder"],
    );
    p.refused(
        &[&solve[..], &["-o", "x", "--baselines", "file/plans"]].concat(),
        &["file/plans"],
    );
    let compare = [
        "compare",
        "plan.toml",
        "--model",
        &p.demo,
        "--tokens",
        "2",
        "-o",
    ];
    p.refused(
        &[&compare[..], &["file/report"]].concat(),
        &["file/report", "not a folder", "--output"],
    );
    p.refused(&[&compare[..], &["/"]].concat(), &["'/'", "reports/today"]);
    p.refused(&["demo", "-o", "folder"], &["folder exists", "--output"]);
    p.refused(&["demo", "-o", "file/x"], &["file/x"]);
}

#[test]
fn options_out_of_range() {
    let p = Place::new();
    p.plan();
    let run = |args: &[&str], words: &[&str]| {
        p.refused(&[&["run", &p.demo, "-p", "a text"], args].concat(), words);
    };
    run(&["--threads", "0"], &["--threads: 0", "1 to 1024"]);
    run(&["--threads", "1025"], &["--threads: 1025", "1 to 1024"]);
    run(
        &["--ctx", "4294967295"],
        &["no memory", "4294967295 tokens", "smaller --context"],
    );
    run(
        &["--ctx", "65", "--plan", "plan.toml"],
        &["--context: 65", "64 tokens", "plan.toml", "--context 65"],
    );
    run(&["--temperature=-1"], &["--temperature: -1", "expected 0"]);
    run(&["--temperature", "nan"], &["--temperature: NaN"]);
    run(&["--top-p", "0"], &["--top-p: 0", "more than 0"]);
    run(&["--top-p", "1.5"], &["--top-p: 1.5"]);
    run(
        &["--presence-penalty", "3"],
        &["--presence-penalty: 3", "-2 to 2"],
    );
    run(
        &["--logit-bias", "7+101"],
        &["--logit-bias: 101", "-100 to 100"],
    );
    run(
        &["--logit-bias", "99999999+1"],
        &["--logit-bias: token 99999999", "0 to "],
    );
    run(&["--min-p", "2"], &["--min-p: 2", "0 (all tokens) to 1"]);
    run(
        &["--repeat-penalty", "0"],
        &["--repeat-penalty: 0", "no penalty"],
    );
    p.refused(
        &["bench", &p.demo, "-r", "0"],
        &["--repeat: 0", "1 or more"],
    );
    p.refused(
        &["bench", &p.demo, "-p", "0", "-n", "0"],
        &["something to measure"],
    );
    p.refused(
        &["bench", &p.demo, "-p", "4294967295", "-n", "1"],
        &["--n-prompt", "--n-gen", "fewer"],
    );
    p.refused(
        &["bench", &p.demo, "-p", "4294967294", "-n", "1"],
        &["no memory", "context"],
    );
    p.refused(
        &[
            "bench",
            &p.demo,
            "-p",
            "64",
            "-n",
            "1",
            "--plan",
            "plan.toml",
        ],
        &["64", "--context 65"],
    );
    p.refused(&["demo", "--tokens", "0"], &["--n-predict: 0", "1 or more"]);
}

#[test]
fn comparisons_of_what_cannot_be_compared() {
    let p = Place::new();
    let plan = p.plan();
    p.prompts();
    p.folder("untried/a");
    p.write("untried/a/train-1.txt", "text");
    p.write("object.json", "{}");
    p.write("cut.json", "[1");
    succeeded(run_in(
        p.path(),
        &["run", &p.demo, "-p", "a", "-n", "2", "--record", "r.json"],
    ));
    let record = fs::read_to_string(p.path().join("r.json")).unwrap();
    p.write(
        "newer.json",
        swap(&record, "\"version\": 5", "\"version\": 9"),
    );
    p.write("cut-record.json", &record[..record.len() / 2]);
    p.write("plan.other", &plan);
    let compare = |args: &[&str], words: &[&str]| {
        p.refused(&[&["compare", "-o", "report"], args].concat(), words);
    };
    compare(&["plan.toml"], &["--model FILE"]);
    compare(
        &["plan.toml", "--model", &p.other],
        &["plan.toml", "tier-plan demo", "fixture-qwen3moe"],
    );
    compare(
        &["plan.toml", "--model", &p.demo, "--tokens", "0"],
        &["--n-predict: 0", "1 or more"],
    );
    compare(
        &["plan.toml", "--model", &p.demo],
        &["--n-predict: 64", "fewer than 64"],
    );
    let tried = ["plan.toml", "--model", &p.demo, "--tokens", "2"];
    let trial = |args: &[&str], words: &[&str]| compare(&[&tried[..], args].concat(), words);
    trial(&["--threads", "0"], &["--threads: 0", "1 to 1024"]);
    trial(&["--prompts", "untried"], &["untried", "heldout*.txt"]);
    trial(&["--prompts", "nosuch"], &["nosuch", "No such file"]);
    compare(&["plan.other"], &["plan.other", "(.toml)", "(.json)"]);
    compare(
        &[&p.machine, "--model", &p.demo],
        &["demo-emulated.toml", "not a placement plan"],
    );
    compare(
        &["object.json"],
        &["object.json", "not a run record", "tier-plan run"],
    );
    compare(&["cut.json"], &["cut.json", "not a run record"]);
    compare(&["cut-record.json"], &["cut-record.json", "line "]);
    compare(
        &["newer.json"],
        &["newer.json", "version 9", "up to version 6", "update"],
    );
    compare(&["nosuch.json"], &["nosuch.json", "No such file"]);
    compare(&["r.json", "nosuch.toml"], &["nosuch.toml", "No such file"]);
}

/// What the command line itself cannot be is clap's to refuse: exit code 2, and how to ask for
/// help.
#[test]
fn lines_that_are_no_commands() {
    let p = Place::new();
    let lines: [&[&str]; 6] = [
        &["solve", &p.demo],
        &["run", &p.demo, "--no-such-option"],
        &["run", &p.demo, "-p", "a", "-f", "b"],
        &["logits", &p.demo, "-o", "x", "--tokens", "1,x"],
        &["run", &p.demo, "-n", "-2"],
        &["nosuch"],
    ];
    for line in lines {
        let output = run_in(p.path(), line);
        assert_eq!(output.status.code(), Some(2), "{line:?}");
        assert!(
            stderr(&output).starts_with("error: ") && stderr(&output).contains("--help"),
            "{}",
            stderr(&output)
        );
    }
    assert!(common::listing(p.path()).is_empty());
}

/// Variables are defaults of options: the command line wins, and empty variables count as unset.
#[test]
fn environment_variables_set_defaults() {
    let p = Place::new();
    let inspect = |variables: &[(&str, &str)], args: &[&str]| {
        let mut command = common::tier_plan();
        command
            .current_dir(p.path())
            .envs(variables.iter().copied())
            .arg("inspect")
            .args(args);
        command.output().unwrap()
    };
    let model = ("TIER_PLAN_MODEL", p.demo.as_str());
    let value = common::json(inspect(&[model, ("TIER_PLAN_JSON", "true")], &[]));
    assert_eq!(
        value["arch"],
        common::json(inspect(&[], &[&p.demo, "--json"]))["arch"]
    );
    for off in ["0", "false", ""] {
        let said = common::stdout(&succeeded(inspect(&[model, ("TIER_PLAN_JSON", off)], &[])));
        assert!(!said.starts_with('{'), "{off}: {said}");
    }
    // The argument conflicts with --model, and wins.
    common::json(inspect(
        &[("TIER_PLAN_MODEL", "none.gguf")],
        &[&p.demo, "--json"],
    ));
    common::check_refusal(
        &inspect(&[("TIER_PLAN_MODEL", "none.gguf")], &[]),
        &["none.gguf"],
    );
    assert_eq!(
        inspect(&[model, ("TIER_PLAN_JSON", "maybe")], &[])
            .status
            .code(),
        Some(2)
    );
}
