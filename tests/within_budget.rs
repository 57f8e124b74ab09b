//! A model that is larger than the memory it may have: it says what it does, the text stays the
//! same, and what can't be is refused with the numbers.

use crate::common::{
    self, check_refusal, demo_model, refused, run_in, stderr, stdout, succeeded, tier_plan,
};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Output;

const PROMPT: &str = "And it came to pass in those days";

/// What the program takes by itself is no less than this, and with the whole of the bundled model
/// no more than that.
const NONE: &str = "5MiB";
const LITTLE: &str = "40MiB";
const MORE: &str = "43MiB";
const PLENTY: &str = "2GiB";

/// Runs greedily, with these arguments more, and files read so.
fn run(folder: &Path, more: &[&str], io: Option<&str>) -> Output {
    let model = demo_model();
    let mut command = tier_plan();
    command.current_dir(folder).arg("run").arg(&model).args([
        "-p",
        PROMPT,
        "-n",
        "24",
        "--threads",
        "2",
        "--ctx",
        "64",
        "--json",
    ]);
    if let Some(io) = io {
        command.env("TIER_PLAN_IO", io);
    }
    command.args(more).output().unwrap()
}

fn record(output: Output) -> Value {
    let value: Value = serde_json::from_str(&stdout(&succeeded(output))).unwrap();
    for tier in value["tiers"].as_array().unwrap() {
        assert_eq!(tier["planned_bytes"], tier["resident_bytes"], "{tier:#}");
    }
    value
}

fn sum(record: &Value, key: &str) -> u64 {
    record["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer[key].as_u64().unwrap())
        .sum()
}

#[test]
fn the_text_is_the_same_within_any_budget() {
    let folder = tempfile::tempdir().unwrap();
    let expected = record(run(folder.path(), &[], None));
    assert_eq!(expected["plan"], "all-in-dram");
    let whole = record(run(folder.path(), &["--dram", PLENTY], None));
    assert_eq!(
        whole["plan"], "all-in-dram",
        "a model that fits is left where it is"
    );
    for budget in [LITTLE, MORE] {
        for io in [None, Some("direct"), Some("buffered")] {
            let output = run(folder.path(), &["--dram", budget], io);
            let told = stderr(&output);
            assert!(
                told.contains("do not fit") && told.contains("slots in 6 layers"),
                "{told}"
            );
            let found = record(output);
            assert_eq!(found["plan"], "within-budget");
            assert_eq!(found["text"], expected["text"], "{budget} {io:?}");
            assert_eq!(found["output"], expected["output"], "{budget} {io:?}");
            assert!(sum(&found, "slot_hits") > 0 && sum(&found, "misses") > 0);
            assert_eq!(found["tiers"].as_array().unwrap().len(), 2);
        }
    }
}

#[test]
fn a_profile_pins_what_is_used_most() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts/some");
    fs::create_dir_all(&prompts).unwrap();
    for name in ["train-1.txt", "heldout-1.txt"] {
        let text = fs::read_to_string(common::root().join("profiles/prompts/scripture").join(name))
            .unwrap();
        fs::write(
            prompts.join(name),
            text.chars().take(600).collect::<String>(),
        )
        .unwrap();
    }
    let model = demo_model();
    let list = [
        "profile",
        model.to_str().unwrap(),
        "--prompts",
        "prompts",
        "-o",
        "demo.profile",
        "--prompt-tokens",
    ];
    succeeded(run_in(
        folder.path(),
        &[
            &list[..],
            &["48", "--decode-tokens", "16", "--threads", "2"],
        ]
        .concat(),
    ));
    let expected = record(run(folder.path(), &[], None));
    let found = record(run(
        folder.path(),
        &["--dram", MORE, "--profile", "demo.profile"],
        None,
    ));
    assert_eq!(found["output"], expected["output"]);
    assert_eq!(found["tiers"].as_array().unwrap().len(), 2);
    assert!(sum(&found, "pinned_hits") + sum(&found, "slot_hits") > 0);
    assert_eq!(
        found["predicted"],
        Value::Null,
        "rates that were not measured predict nothing"
    );
}

#[test]
fn what_cannot_be_is_refused_with_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let model = demo_model();
    let model = model.to_str().unwrap();
    let list = ["bench", model, "-p", "4", "-n", "4", "-r", "1", "--dram"];
    let line = refused(
        folder.path(),
        &[&list[..], &[NONE]].concat(),
        &["5.00 MiB", "dense weights", "needs at least"],
    );
    // The least that the message names is enough.
    let least = line
        .split("needs at least ")
        .nth(1)
        .unwrap()
        .split(" of memory")
        .next()
        .unwrap()
        .replace(' ', "");
    let least: f64 = least.strip_suffix("MiB").unwrap().parse().unwrap();
    succeeded(run_in(
        folder.path(),
        &[&list[..], &[&format!("{}MiB", least.ceil())]].concat(),
    ));
    refused(
        folder.path(),
        &[&list[..], &["plenty"]].concat(),
        &["--memory plenty"],
    );
    check_refusal(
        &run(folder.path(), &["--dram", MORE], Some("fast")),
        &["TIER_PLAN_IO=fast", "buffered"],
    );
    refused(
        folder.path(),
        &[&list[..], &[MORE, "--profile", "none.profile"]].concat(),
        &["none.profile"],
    );
}
