//! Experts that come from files: checksums that find a single byte on every way that weights take
//! into memory, packed copies, slots that are kept from run to run, and a slow tier that is mapped.

use crate::common::{
    self, check_refusal, demo_machine, demo_model, json, refused, run_in, stderr, succeeded,
    tier_plan,
};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use tier_plan_runtime::gguf::Gguf;

const PROMPT: &str = "And it came to pass in those days";

/// A budget in which few of the bundled model's experts fit memory.
const LITTLE: &str = "40MiB";

/// A folder with a copy of the bundled model.
fn with_model() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("demo.gguf");
    fs::copy(demo_model(), &model).unwrap();
    (folder, model)
}

/// Runs greedily in the folder of the model.
fn run(model: &Path, more: &[&str]) -> Output {
    let list = [
        "-p",
        PROMPT,
        "-n",
        "16",
        "--threads",
        "2",
        "--ctx",
        "64",
        "--json",
    ];
    tier_plan()
        .current_dir(model.parent().unwrap())
        .arg("run")
        .arg(model)
        .args(list)
        .args(more)
        .output()
        .unwrap()
}

/// The tokens of a run that ended well.
fn tokens(output: Output) -> Value {
    json(output)["output"].clone()
}

/// Changes one byte in the middle of each of these experts of a tensor (of the tensor where there
/// are none); where the first of them begins.
fn damage(model: &Path, tensor: &str, n_expert: u64, experts: &[u64]) -> u64 {
    let gguf = Gguf::open(model).unwrap();
    let info = gguf.tensor(tensor).unwrap();
    let (offset, len) = (info.offset, info.n_bytes / n_expert);
    drop(gguf);
    let mut bytes = fs::read(model).unwrap();
    for expert in experts {
        bytes[(offset + expert * len + len / 2) as usize] ^= 0x10;
    }
    // As damage would come: without a sign.
    let modified = fs::metadata(model).unwrap().modified().unwrap();
    fs::write(model, bytes).unwrap();
    fs::File::options()
        .write(true)
        .open(model)
        .unwrap()
        .set_modified(modified)
        .unwrap();
    offset + experts[0] * len
}

/// Experts of the bundled model's layers.
const EXPERTS: u64 = 32;

#[test]
fn a_model_that_is_whole_runs_as_without_checksums() {
    let (folder, model) = with_model();
    let expected = tokens(run(&model, &[]));
    let first = run(&model, &["--verify"]);
    assert!(
        stderr(&first).contains("demo.sums: checksums created"),
        "{}",
        stderr(&first)
    );
    assert_eq!(tokens(first), expected);
    assert!(folder.path().join("demo.sums").exists());
    for more in [
        &["--verify"][..],
        &["--verify=demo.sums", "--dram", LITTLE],
        &["--verify", "--mmap"],
    ] {
        let output = run(&model, more);
        assert!(!stderr(&output).contains("made now"), "{}", stderr(&output));
        assert_eq!(tokens(output), expected, "{more:?}");
    }
    let made = fs::read(folder.path().join("demo.sums")).unwrap();
    let list = ["checksum", "demo.gguf", "-o", "again.sums", "--json"];
    let value = json(run_in(folder.path(), &list));
    assert!(
        value["slices"].as_u64().unwrap() > 6 * 3 * EXPERTS,
        "{value:#}"
    );
    // All but the moment at which they were made.
    let again = fs::read(folder.path().join("again.sums")).unwrap();
    assert_eq!(again.len(), made.len());
    assert_eq!(
        again[again.len() - 800..again.len() - 8],
        made[made.len() - 800..made.len() - 8]
    );
}

#[test]
fn one_byte_is_found_wherever_it_goes() {
    let (folder, model) = with_model();
    succeeded(run_in(folder.path(), &["checksum", "demo.gguf"]));
    let words = |tensor: &str, offset: u64| {
        vec![
            format!("tensor '{tensor}'"),
            format!("offset {offset}"),
            "damaged".into(),
        ]
    };
    let refuses = |more: &[&str], words: &[String]| {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        check_refusal(
            &run(&model, more),
            &[&["demo.gguf"][..], &words[..]].concat(),
        );
    };
    // In an expert: found when the whole model is loaded.
    let tensor = "blk.3.ffn_down_exps.weight";
    let offset = damage(&model, tensor, EXPERTS, &[5]);
    let expert = [&words(tensor, offset)[..], &["expert 5".into()]].concat();
    refuses(&["--verify"], &expert);
    refuses(&["--verify", "--mmap"], &expert);
    damage(&model, tensor, EXPERTS, &[5]);
    // A matrix and a vector of the dense part: on every way.
    for tensor in [
        "blk.1.attn_q.weight",
        "blk.2.ffn_norm.weight",
        "output_norm.weight",
    ] {
        let offset = damage(&model, tensor, 1, &[0]);
        for more in [
            &["--verify"][..],
            &["--verify", "--mmap"],
            &["--verify", "--dram", LITTLE],
        ] {
            refuses(more, &words(tensor, offset));
        }
        damage(&model, tensor, 1, &[0]);
    }
    // In the experts of a layer that are read as they are needed: the first that is ends the run.
    let tensor = "blk.0.ffn_up_exps.weight";
    let all: Vec<u64> = (0..EXPERTS).collect();
    damage(&model, tensor, EXPERTS, &all);
    refuses(
        &["--verify", "--dram", LITTLE],
        &[
            format!("tensor '{tensor}'"),
            "expert ".into(),
            "damaged".into(),
        ],
    );
    damage(&model, tensor, EXPERTS, &all);
    tokens(run(&model, &["--verify", "--dram", LITTLE]));
}

#[test]
fn pinned_experts_are_verified_too() {
    let (folder, model) = with_model();
    succeeded(run_in(folder.path(), &["checksum", "demo.gguf"]));
    let machine = demo_machine();
    let list = [
        "solve",
        "demo.gguf",
        "-m",
        machine.to_str().unwrap(),
        "-o",
        "plan.toml",
        "--vram",
        "3MiB",
    ];
    succeeded(run_in(
        folder.path(),
        &[&list[..], &["-b", "dram=4MiB", "--context", "64"]].concat(),
    ));
    let expected = tokens(run(&model, &["--plan", "plan.toml"]));
    assert_eq!(
        tokens(run(&model, &["--plan", "plan.toml", "--verify"])),
        expected
    );
    // Every expert of every layer: whichever is pinned.
    let all: Vec<u64> = (0..EXPERTS).collect();
    for layer in 0..6 {
        damage(
            &model,
            &format!("blk.{layer}.ffn_gate_exps.weight"),
            EXPERTS,
            &all,
        );
    }
    let output = run(&model, &["--plan", "plan.toml", "--verify"]);
    check_refusal(
        &output,
        &["demo.gguf", "expert ", "ffn_gate_exps", "damaged"],
    );
}

#[test]
fn checksums_of_something_else_are_refused() {
    let (folder, model) = with_model();
    let model = model.to_str().unwrap();
    let list = |verify: &'static str| ["run", model, "-p", "x", "-n", "1", verify];
    refused(folder.path(), &list("--verify=none.sums"), &["none.sums"]);
    refused(
        folder.path(),
        &list("--verify=demo.gguf"),
        &["demo.gguf", "not a file of checksums", "it is a GGUF model"],
    );
    fs::copy(
        common::root().join("tests/data/formats/sums.v1.sums"),
        folder.path().join("other.sums"),
    )
    .unwrap();
    refused(
        folder.path(),
        &list("--verify=other.sums"),
        &[
            "other.sums",
            "made for the model 'demo'",
            "tier-plan checksum",
        ],
    );
    refused(
        folder.path(),
        &["checksum", model, "-o", "no/such/a.sums"],
        &["no/such", "does not exist"],
    );
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
fn a_packed_copy_gives_the_same_text() {
    let (folder, model) = with_model();
    let expected = tokens(run(&model, &[]));
    let plain = json(run(&model, &["--dram", LITTLE]));
    let value = json(run_in(folder.path(), &["pack", "demo.gguf", "--json"]));
    assert_eq!(value["experts"], 6 * EXPERTS);
    assert!(
        value["read_bytes"].as_f64().unwrap() < value["read_bytes_before"].as_f64().unwrap(),
        "{value:#}"
    );
    let list = [
        "run",
        "demo.gguf",
        "-p",
        PROMPT,
        "-n",
        "16",
        "--threads",
        "2",
        "--ctx",
        "64",
        "--dram",
        LITTLE,
    ];
    let told = stderr(&succeeded(run_in(folder.path(), &list)));
    assert!(
        told.contains("demo.experts: 192 of them contiguous"),
        "{told}"
    );
    for io in ["direct", "buffered"] {
        let mut command = tier_plan();
        command
            .current_dir(folder.path())
            .env("TIER_PLAN_IO", io)
            .args(list)
            .args(["--json", "--verify"]);
        let found = json(command.output().unwrap());
        assert_eq!(found["output"], expected, "{io}");
        assert_eq!(
            sum(&found, "misses"),
            sum(&plain, "misses"),
            "where bytes come from changes no hit"
        );
    }
    // Where a plan and a profile say which experts to copy, the others come from the model.
    let machine = demo_machine();
    let list = [
        "solve",
        "demo.gguf",
        "-m",
        machine.to_str().unwrap(),
        "-o",
        "plan.toml",
        "--vram",
        "3MiB",
    ];
    succeeded(run_in(
        folder.path(),
        &[&list[..], &["-b", "dram=4MiB", "--context", "64"]].concat(),
    ));
    let some = json(run_in(
        folder.path(),
        &[
            "pack",
            "demo.gguf",
            "-o",
            "some.experts",
            "--plan",
            "plan.toml",
            "--json",
        ],
    ));
    assert!(some["experts"].as_u64().unwrap() < 6 * EXPERTS, "{some:#}");
    assert_eq!(
        tokens(run(
            &model,
            &["--plan", "plan.toml", "--pack", "some.experts"]
        )),
        expected
    );
    assert_eq!(
        tokens(run(
            &model,
            &["--dram", LITTLE, "--pack", "some.experts", "--verify"]
        )),
        expected
    );
}

#[test]
fn a_copy_of_something_else_is_not_used() {
    let (folder, model) = with_model();
    json(run_in(folder.path(), &["pack", "demo.gguf", "--json"]));
    let expected = tokens(run(&model, &["--dram", LITTLE]));
    let packed = folder.path().join("demo.experts");
    let whole = fs::read(&packed).unwrap();
    let list = |more: &[&'static str]| {
        [
            &[
                "run",
                "demo.gguf",
                "-p",
                "x",
                "-n",
                "1",
                "--dram",
                LITTLE,
                "--ctx",
                "64",
            ],
            more,
        ]
        .concat()
    };
    // Cut short; of another model; of other weights under the same names.
    fs::write(&packed, &whole[..whole.len() - 1]).unwrap();
    refused(
        folder.path(),
        &list(&["--pack", "demo.experts"]),
        &["demo.experts", "its header makes", "tier-plan pack"],
    );
    let output = run(&model, &["--dram", LITTLE]);
    assert!(
        stderr(&output).contains("its header makes") && stderr(&output).contains("it is not used")
    );
    assert_eq!(tokens(output), expected);
    fs::copy(
        common::root().join("tests/data/formats/pack.v1.experts"),
        &packed,
    )
    .unwrap();
    refused(
        folder.path(),
        &list(&["--pack", "demo.experts"]),
        &["made for the model 'demo'", "tier-plan pack"],
    );
    fs::write(&packed, &whole).unwrap();
    let gguf = Gguf::open(&model).unwrap();
    let at = gguf.tensor("blk.2.ffn_up_exps.weight").unwrap().offset as usize;
    drop(gguf);
    let mut bytes = fs::read(&model).unwrap();
    bytes[at + 7] ^= 1;
    fs::write(&model, bytes).unwrap();
    refused(
        folder.path(),
        &list(&["--pack", "demo.experts"]),
        &["expert 0 of layer 2", "was changed since"],
    );
    refused(
        folder.path(),
        &list(&["--pack", "none.experts"]),
        &["none.experts"],
    );
}

#[test]
fn slots_are_kept_from_one_run_to_the_next() {
    let (folder, model) = with_model();
    let cold = json(run(&model, &["--dram", LITTLE, "--slots", "a.slots.json"]));
    let kept = fs::read_to_string(folder.path().join("a.slots.json")).unwrap();
    let kept: Value = serde_json::from_str(&kept).unwrap();
    let layers = kept["layers"].as_array().unwrap();
    assert!(layers.len() >= 5, "{kept:#}");
    assert!(
        layers
            .iter()
            .all(|l| !l["experts"].as_array().unwrap().is_empty()),
        "{kept:#}"
    );
    let list = [
        "run",
        "demo.gguf",
        "-p",
        PROMPT,
        "-n",
        "16",
        "--threads",
        "2",
        "--ctx",
        "64",
        "--dram",
        LITTLE,
    ];
    let list = [&list[..], &["--slots", "a.slots.json"]].concat();
    let told = stderr(&succeeded(run_in(folder.path(), &list)));
    assert!(
        told.contains("slots are filled in the background"),
        "{told}"
    );
    let warm = json(run(&model, &["--dram", LITTLE, "--slots", "a.slots.json"]));
    assert_eq!(warm["output"], cold["output"]);
    // Of another model, it is neither used nor overwritten.
    fs::copy(
        common::root().join("tests/data/formats/slots.v1.json"),
        folder.path().join("other.json"),
    )
    .unwrap();
    let list = [
        "run",
        "demo.gguf",
        "-p",
        "x",
        "-n",
        "1",
        "--dram",
        LITTLE,
        "--ctx",
        "64",
        "--slots",
        "other.json",
    ];
    refused(folder.path(), &list, &["other.json", "made for the model"]);
    // Without slots there is nothing to keep, and no harm.
    assert_eq!(
        tokens(run(&model, &["--slots", "none.json"])),
        cold["output"]
    );
}

/// A machine of memory and a slow tier that is mapped, neither of them emulated.
fn mapped_machine(folder: &Path, kind: &str) {
    let tier = |name: &str, kind: &str, gbps: f64| {
        format!(
            "[[tier]]\nname = \"{name}\"\nkind = \"{kind}\"\ncapacity = \"1GiB\"\nread_gbps = {gbps}\nlatency_us = 1\n\
             source = \"a test\"\n"
        )
    };
    let text = format!(
        "format = \"tier-plan machine\"\nversion = 1\nname = \"{kind}\"\nlayer_overhead_us = 1\ntoken_overhead_us = 1\n{}{}",
        tier("dram", "dram", 10.0),
        tier("slow", kind, 2.0)
    );
    fs::write(folder.join("machine.toml"), text).unwrap();
}

#[test]
fn on_a_mapped_tier_experts_move_to_slots_or_compute_in_place() {
    let (folder, model) = with_model();
    let expected = tokens(run(&model, &[]));
    for kind in ["pmem", "cxl"] {
        mapped_machine(folder.path(), kind);
        let list = [
            "solve",
            "demo.gguf",
            "-m",
            "machine.toml",
            "-o",
            "plan.toml",
            "--context",
            "64",
            "--strategy",
        ];
        let value = json(run_in(
            folder.path(),
            &[&list[..], &["lru-only", "-b", "dram=4MiB", "--json"]].concat(),
        ));
        assert!(
            value["tiers"][0]["slot_bytes"].as_u64().unwrap() > 0,
            "{value:#}"
        );
        let found = json(run(
            &model,
            &["--plan", "plan.toml", "--verify", "--slots", "a.slots.json"],
        ));
        assert_eq!(found["output"], expected);
        assert!(
            sum(&found, "slot_hits") > 0 && sum(&found, "misses") > 0,
            "{found:#}"
        );
        for tier in found["tiers"].as_array().unwrap() {
            assert_eq!(tier["planned_bytes"], tier["resident_bytes"], "{tier:#}");
        }
        // A batch of which each expert is used, on slots that are filled from before.
        let again = json(run(
            &model,
            &["--plan", "plan.toml", "--slots", "a.slots.json"],
        ));
        assert_eq!(again["output"], expected);
    }
}
