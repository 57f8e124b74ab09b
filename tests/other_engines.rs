//! Measuring a machine, comparing plans and saying them in other engines' words, as users type
//! them.

use crate::common::{demo_machine, demo_model, json, refused, run_in, stderr, stdout, succeeded};
use std::fs;
use std::path::Path;

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

#[test]
fn a_probed_machine_is_planned_for_and_runs() {
    let dir = tempfile::tempdir().unwrap();
    let demo = text(&demo_model());
    fs::write(dir.path().join("machine.toml"), "of last year").unwrap();
    let is_quick = !tier_plan_testing::is_nightly();
    let mut probe = vec!["probe", "--model", &demo, "--threads", "1", "--json"];
    probe.extend(is_quick.then_some("--quick"));
    let found = json(run_in(dir.path(), &probe));
    let positive = |value: &serde_json::Value| value.as_f64().is_some_and(|v| v > 0.0);
    for key in [
        "dram_read_gbps",
        "compute_gbps",
        "dram_bytes",
        "layer_overhead_us",
        "token_overhead_us",
    ] {
        assert!(positive(&found[key]), "{key}: {}", found[key]);
    }
    assert!(
        positive(&found["disk"]["gbps"]) && positive(&found["disk"]["latency_us"]),
        "{}",
        found["disk"]
    );
    let shares: f64 = found["kernels"]
        .as_array()
        .unwrap()
        .iter()
        .map(|k| k["share"].as_f64().unwrap())
        .sum();
    // Quickly, what most of the bytes have alone.
    let least = if is_quick { 0.5 } else { 1.0 - 1e-9 };
    assert!((least..=1.0 + 1e-9).contains(&shares), "{shares}");
    let machine = fs::read_to_string(dir.path().join("machine.toml")).unwrap();
    assert!(
        machine.contains("measured") && !machine.contains("emulated = true"),
        "{machine}"
    );
    // It takes the place of an older one, and leaves nothing else.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    let solve = [
        "solve",
        &demo,
        "-m",
        "machine.toml",
        "--dram",
        "8MiB",
        "--context",
        "128",
        "-o",
        "p.toml",
    ];
    let words = stdout(&succeeded(run_in(dir.path(), &solve)));
    assert!(!words.contains("emulated"), "{words}");
    succeeded(run_in(
        dir.path(),
        &[
            "bench", &demo, "--plan", "p.toml", "-p", "8", "-n", "8", "-r", "1",
        ],
    ));
}

#[test]
fn reads_are_shared_with_copies_that_were_measured() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| text(&dir.path().join(name));
    for name in ["m.gguf", "b.gguf"] {
        fs::copy(demo_model(), path(name)).unwrap();
    }
    succeeded(run_in(dir.path(), &["pack", "m.gguf", "-o", "c.experts"]));
    let probe = [
        "probe",
        "--model",
        "m.gguf",
        "--threads",
        "1",
        "--copy",
        "b.gguf",
        "--copy",
        "c.experts",
        "--quick",
        "--json",
    ];
    let found = json(run_in(dir.path(), &probe));
    let copies = found["copies"].as_array().unwrap();
    assert_eq!(copies.len(), 2);
    for (copy, name) in copies.iter().zip(["b.gguf", "c.experts"]) {
        assert_eq!(copy["path"], path(name).as_str());
        assert!(
            copy["gbps"].as_f64().unwrap() > 0.0 && copy["together_gbps"].as_f64().unwrap() > 0.0
        );
    }

    let solve = |output: &str| {
        let solve = [
            "solve",
            "m.gguf",
            "-m",
            "machine.toml",
            "--dram",
            "6MiB",
            "-c",
            "128",
            "-o",
            output,
        ];
        let output = succeeded(run_in(dir.path(), &solve));
        String::from_utf8(output.stderr).unwrap()
    };
    let run = |plan: &[&str]| {
        let run = [
            "run",
            "m.gguf",
            "-p",
            "In the beginning",
            "-n",
            "24",
            "--json",
        ];
        json(run_in(dir.path(), &[&run, plan].concat()))
    };
    let text = run(&[])["text"].clone();
    assert!(!solve("both.toml").contains("warning"));
    let plan = fs::read_to_string(dir.path().join("both.toml")).unwrap();
    assert!(
        plan.contains(&path("b.gguf")) && plan.contains(&path("c.experts")),
        "{plan}"
    );
    let shared = run(&["--plan", "both.toml"]);
    assert_eq!(
        shared["text"], text,
        "where experts are read from never changes a text"
    );

    // A copy that is gone takes its part of the rate with it.
    let gbps = |plan: &str| {
        let text = fs::read_to_string(dir.path().join(plan)).unwrap();
        let drive = text.split("kind = \"nvme\"").nth(1).unwrap().to_string();
        let rate = drive.split("read_gbps = ").nth(1).unwrap();
        rate.split('\n').next().unwrap().parse::<f64>().unwrap()
    };
    fs::remove_file(path("b.gguf")).unwrap();
    let told = solve("one.toml");
    assert!(
        told.contains("b.gguf") && told.contains("the plan reads nothing from it"),
        "{told}"
    );
    let plan = fs::read_to_string(dir.path().join("one.toml")).unwrap();
    assert!(
        !plan.contains("b.gguf") && plan.contains("c.experts"),
        "{plan}"
    );
    assert!(
        gbps("one.toml") < gbps("both.toml"),
        "{} {}",
        gbps("one.toml"),
        gbps("both.toml")
    );
    assert_eq!(run(&["--plan", "one.toml"])["text"], text);
}

#[test]
fn what_cannot_be_probed_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let demo = text(&demo_model());
    refused(
        dir.path(),
        &["probe", "--model", &demo, "--copy", &demo],
        &["--copy", "this file is read already"],
    );
    let alone = run_in(dir.path(), &["probe", "--copy", &demo]);
    assert_eq!(alone.status.code(), Some(2));
    assert!(stderr(&alone).contains("--model"), "{}", stderr(&alone));
    refused(
        dir.path(),
        &["probe", "--model", &demo, "--copy", "no.gguf"],
        &["--copy no.gguf"],
    );
    refused(dir.path(), &["probe", "--model", "no.gguf"], &["no.gguf"]);
    refused(
        dir.path(),
        &["probe", "--model", &demo, "--threads", "0"],
        &["--threads: 0"],
    );
    refused(
        dir.path(),
        &["probe", "--model", &demo, "-o", "no/machine.toml"],
        &["no"],
    );
}

#[test]
fn plans_are_compared_and_exported() {
    let dir = tempfile::tempdir().unwrap();
    let (demo, machine) = (text(&demo_model()), text(&demo_machine()));
    let solve = [
        "solve",
        &demo,
        "-m",
        &machine,
        "--context",
        "64",
        "-o",
        "a.toml",
        "--baselines",
        "plans",
    ];
    succeeded(run_in(dir.path(), &solve));
    let same = json(run_in(dir.path(), &["diff", "a.toml", "a.toml", "--json"]));
    assert_eq!(
        (&same["same"], &same["experts_moved"]),
        (&true.into(), &0.into())
    );
    let other = json(run_in(
        dir.path(),
        &["diff", "a.toml", "plans/lru-only.toml", "--json"],
    ));
    assert_eq!(other["same"], false);
    assert!(
        other["before"]["emulated"] == true && other["tiers"].as_array().unwrap().len() == 3,
        "{other}"
    );
    let words = stdout(&succeeded(run_in(
        dir.path(),
        &["diff", "a.toml", "plans/lru-only.toml"],
    )));
    assert!(
        words.contains("predicted: ")
            && words.contains(", emulated")
            && words.contains("layer 0: "),
        "{words}"
    );

    let export = ["export", "a.toml", "--model", &demo, "--to", "llama.cpp"];
    let words = stdout(&succeeded(run_in(
        dir.path(),
        &[&export[..], &["-o", "run.sh"]].concat(),
    )));
    assert!(
        words.starts_with("llama-server -m ") && words.contains(" -ngl "),
        "{words}"
    );
    let script = fs::read_to_string(dir.path().join("run.sh")).unwrap();
    assert!(
        script.starts_with("#!/bin/sh\nexec llama-server -m ") && words.contains("wrote run.sh"),
        "{script}"
    );
    refused(
        dir.path(),
        &["export", "a.toml", "--model", &demo, "--to", "sglang"],
        &["--profile"],
    );
    refused(
        dir.path(),
        &[
            "export",
            "a.toml",
            "--model",
            "kimi-k2",
            "--to",
            "llama.cpp",
        ],
        &["a.toml", "was made for"],
    );

    let profile = [
        "profile",
        &demo,
        "--prompt-tokens",
        "4",
        "--decode-tokens",
        "4",
        "-o",
        "d.profile",
    ];
    succeeded(run_in(dir.path(), &profile));
    let export = [
        "export",
        "a.toml",
        "--model",
        &demo,
        "-p",
        "d.profile",
        "--to",
    ];
    let said = json(run_in(
        dir.path(),
        &[&export[..], &["sglang", "-o", "counts.json", "--json"]].concat(),
    ));
    assert_eq!((&said["layers"], &said["experts"]), (&6.into(), &32.into()));
    let file = fs::read_to_string(dir.path().join("counts.json")).unwrap();
    let counts: serde_json::Value = serde_json::from_str(&file).unwrap();
    let first: u64 = counts["logical_count"][0]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_u64().unwrap())
        .sum();
    assert!(
        first > 0 && first.is_multiple_of(4),
        "four choices a token: {first}"
    );
    let words = stdout(&succeeded(run_in(
        dir.path(),
        &[&export[..], &["ktransformers"]].concat(),
    )));
    assert!(
        words.contains("torch.save") && words.contains("--kt-expert-placement-strategy frequency"),
        "{words}"
    );
}
