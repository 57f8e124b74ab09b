//! Several texts at once: planned by `solve` and `what-if`, measured by `bench`, charted by
//! `compare`.

use crate::common::{
    demo_machine, demo_model, json, listing, refused, run_in, stderr, stdout, succeeded,
};
use serde_json::Value;
use std::fs;
use std::path::Path;

fn texts(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().unwrap().to_string()
}

fn numbers(value: &Value, key: &str) -> Vec<f64> {
    let rows = value["parallel"].as_array().unwrap();
    rows.iter().map(|row| row[key].as_f64().unwrap()).collect()
}

/// Solves for the bundled model on its emulated machine.
fn solve(folder: &Path, more: &[&str]) -> Value {
    let (model, machine) = (texts(demo_model()), texts(demo_machine()));
    let list = [
        "solve",
        &model,
        "-M",
        &machine,
        "--time-limit",
        "1",
        "--json",
    ];
    json(run_in(folder, &[&list[..], more].concat()))
}

#[test]
fn texts_are_planned_measured_and_charted() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let (model, machine) = (texts(demo_model()), texts(demo_machine()));
    let planned = solve(folder, &["--context", "64", "--parallel", "4"]);
    assert_eq!(numbers(&planned, "texts"), [1.0, 2.0, 4.0]);
    let predicted = numbers(&planned, "predicted_tok_s");
    assert!(
        predicted[0] < predicted[1] && predicted[1] < predicted[2],
        "{predicted:?}"
    );
    let plan: toml::Table = fs::read_to_string(folder.join("placement.toml"))
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(plan["sequences"].as_integer(), Some(4));

    // A cache of four texts is four times as large as one's, and the plan says so.
    let kv = |plan: &toml::Table| -> i64 {
        let tiers = plan["tier"].as_array().unwrap();
        tiers
            .iter()
            .map(|tier| tier["kv_bytes"].as_integer().unwrap())
            .sum()
    };
    solve(folder, &["--context", "64", "-o", "one.toml"]);
    let one: toml::Table = fs::read_to_string(folder.join("one.toml"))
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(kv(&plan), 4 * kv(&one));

    let explained = stdout(&succeeded(run_in(
        folder,
        &[
            "explain",
            "placement.toml",
            "-m",
            &model,
            "--time-limit",
            "1",
        ],
    )));
    assert!(
        explained.contains("room for 4 texts at once"),
        "{explained}"
    );
    assert!(explained.contains("8 tokens per step: "), "{explained}");

    let bench = [
        "bench",
        &model,
        "--plan",
        "placement.toml",
        "-p",
        "8",
        "-n",
        "8",
        "-r",
        "1",
        "--parallel",
        "4,1,2,2",
        "--record",
        "bench.record.json",
        "--json",
    ];
    let measured = json(run_in(folder, &bench));
    assert_eq!(numbers(&measured, "texts"), [1.0, 2.0, 4.0]);
    let rates = numbers(&measured, "decode_tok_s");
    let gaps = numbers(&measured, "gap_s");
    for key in [
        "gap_p95_s",
        "prompt_tok_s",
        "distinct_experts",
        "predicted_decode_tok_s",
    ] {
        assert!(
            numbers(&measured, key).iter().all(|n| *n > 0.0),
            "{key}: {measured:#}"
        );
    }
    for ((rate, gap), texts) in rates.iter().zip(&gaps).zip([1.0, 2.0, 4.0]) {
        // At least half of the steps take the median or longer.
        assert!(*rate < 2.1 * texts / gap, "{measured:#}");
    }
    let distinct = numbers(&measured, "distinct_experts");
    assert_eq!(distinct[0], 4.0, "a token uses four");
    assert!(distinct[1] > 4.0 && distinct[1] <= 8.0 && distinct[2] <= 16.0);
    let predicted = numbers(&measured, "predicted_decode_tok_s");
    for (rate, predicted) in rates.iter().zip(predicted) {
        // Emulated tiers never run ahead of their declared time by more than the text explains: eight
        // tokens per text, under a plan that a second's search found.
        assert!(*rate < 2.0 * predicted, "{measured:#}");
    }

    let compared = run_in(folder, &["compare", "bench.record.json", "-o", "report"]);
    succeeded(compared);
    let files = listing(&folder.join("report"));
    for name in ["parallel.svg", "parallel.csv"] {
        assert!(
            files.iter().any(|path| path.ends_with(name)),
            "{name}: {files:?}"
        );
    }

    let what_if = json(run_in(
        folder,
        &[
            "what-if",
            &model,
            "-M",
            &machine,
            "-c",
            "64",
            "--parallel",
            "3",
            "--time-limit",
            "1",
            "--json",
        ],
    ));
    assert_eq!(numbers(&what_if, "texts"), [1.0, 2.0, 3.0]);
}

#[test]
fn the_number_of_texts_and_the_longest_step_follow_the_prediction() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let model = texts(demo_model());
    let planned = solve(folder, &["--context", "64", "--parallel", "4"]);
    let predicted = numbers(&planned, "predicted_tok_s");
    let line =
        r#"{"custom_id": "1", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 3}}"#;
    fs::write(folder.join("in.jsonl"), line).unwrap();
    let batch = |more: &[&str]| {
        let list = ["batch", &model, "in.jsonl", "-o", "out.jsonl"];
        let _ = fs::remove_file(folder.join("out.jsonl"));
        stderr(&succeeded(run_in(folder, &[&list[..], more].concat())))
    };
    let chosen = batch(&["--plan", "placement.toml", "--max-step-ms", "auto"]);
    // The prediction is for the middle of the context.
    let words =
        "4 texts at once of up to 4 that there is room for: the most predicted tokens per second, ";
    let rest = chosen.split_once(words).expect(&chosen).1;
    let rate: f64 = rest.split_whitespace().next().unwrap().parse().unwrap();
    assert!(
        (rate / predicted[2] - 1.0).abs() < 0.05,
        "{rate} {predicted:?}"
    );
    assert!(chosen.contains("; a step that reads prompts beside them takes up to"));
    // No step of several is as short as asked for.
    let alone = batch(&["--plan", "placement.toml", "--max-step-ms", "1"]);
    assert!(alone.contains("1 text at once of up to 4"), "{alone}");
    assert!(alone.contains("up to 1 ms"), "{alone}");
    let asked = batch(&["--plan", "placement.toml", "--parallel", "2"]);
    assert!(
        asked.contains("up to 2 texts at once, as asked for"),
        "{asked}"
    );
    let unknown = batch(&["--context", "64"]);
    assert!(
        unknown.contains("16 texts at once, as many as there is room for"),
        "{unknown}"
    );

    let bench = |more: &[&str]| {
        let list = ["bench", &model, "-p", "40", "-n", "20", "-r", "1", "--json"];
        json(run_in(folder, &[&list[..], more].concat()))
    };
    let measured = bench(&[
        "--plan",
        "placement.toml",
        "--parallel",
        "auto,2",
        "--max-step-ms",
        "40",
    ]);
    assert_eq!(numbers(&measured, "texts"), [2.0, 4.0]);
    let joining = measured["joining"].as_array().unwrap();
    assert_eq!(joining.len(), 2);
    for of in joining {
        assert_eq!(of["max_step_s"], 0.04);
        // One step of the prompt's at least, and no gap longer than the longest.
        assert!(of["steps"].as_u64().unwrap() >= 1, "{of}");
        assert!(of["gap_p95_s"].as_f64() <= of["gap_max_s"].as_f64(), "{of}");
        assert!(of["prompt_tok_s"].as_f64().unwrap() > 0.0, "{of}");
    }
    let whole = bench(&["--parallel", "2"]);
    assert_eq!(whole["joining"], Value::Array(Vec::new()));
    refused(
        folder,
        &["bench", &model, "--max-step-ms", "50"],
        &["--max-step-ms", "expected --parallel"],
    );
    let bad = run_in(folder, &["bench", &model, "--parallel", "few"]);
    assert!(stderr(&bad).contains("expected auto, or numbers of texts"));
}

#[test]
fn throughput_plans_room_for_its_batch() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let goal = [
        "--context",
        "64",
        "--objective",
        "throughput",
        "--batch",
        "4",
    ];
    solve(folder, &goal);
    let plan = fs::read_to_string(folder.join("placement.toml")).unwrap();
    assert!(plan.contains("\nsequences = 4\n"), "{plan}");
    // Without a plan, the cache has room for the largest number.
    let model = texts(demo_model());
    let measured = json(run_in(
        folder,
        &[
            "bench",
            &model,
            "-p",
            "4",
            "-n",
            "3",
            "-r",
            "1",
            "--parallel",
            "2,5",
            "--json",
        ],
    ));
    assert_eq!(
        (&measured["sequences"], &measured["plan"]),
        (&5.into(), &"all-in-dram".into())
    );
    assert!(measured["parallel"][0]["predicted_decode_tok_s"].is_null());
    assert!(
        numbers(&measured, "decode_tok_s")
            .iter()
            .all(|rate| *rate > 0.0)
    );
    // Where memory is short, too.
    let measured = json(run_in(
        folder,
        &[
            "bench",
            &model,
            "-p",
            "4",
            "-n",
            "3",
            "-r",
            "1",
            "--parallel",
            "5",
            "--memory",
            "40MiB",
            "--json",
        ],
    ));
    assert_eq!(measured["sequences"], 5);
}

#[test]
fn texts_without_room_are_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let (model, machine) = (texts(demo_model()), texts(demo_machine()));
    solve(folder, &["--context", "64", "--parallel", "2"]);
    let bench = |more: &[&str], words: &[&str]| {
        let list = ["bench", &model, "-p", "4", "-n", "4", "-r", "1"];
        refused(folder, &[&list[..], more].concat(), words);
    };
    bench(
        &["--plan", "placement.toml", "--parallel", "1,8"],
        &[
            "--parallel: 8",
            "at most 2",
            "placement.toml",
            "solve again with --parallel 8",
        ],
    );
    bench(&["--parallel", "0"], &["--parallel: 0", "1 or more"]);
    bench(
        &["--parallel", "4294967295"],
        &["--parallel: 4294967295", "at most 67108863"],
    );
    bench(
        &["--parallel", "60000000"],
        &["no memory", "60000000 texts", "fewer texts"],
    );
    bench(
        &[
            "--parallel",
            "2",
            "--plan",
            "placement.toml",
            "--routing",
            "nosuch.profile",
        ],
        &["nosuch.profile", "without a profile"],
    );
    bench(
        &["--parallel", "2", "--record", "nosuch/r.json"],
        &["nosuch"],
    );
    bench(
        &["--record", "r.json"],
        &["--record", "expected --parallel"],
    );
    bench(
        &["--routing", "r.profile", "--parallel", "2"],
        &["--routing", "expected --plan"],
    );
    let solve = |more: &[&str], words: &[&str]| {
        let list = ["solve", &model, "-M", &machine, "--context", "64"];
        refused(folder, &[&list[..], more].concat(), words);
    };
    solve(&["--parallel", "0"], &["--parallel: 0", "1 or more"]);
    solve(
        &["--parallel", "4294967295"],
        &["--parallel: 4294967295", "at most"],
    );
    // More texts than the machine holds; fewer would do.
    solve(
        &["--parallel", "100000"],
        &["key and value cache", "texts at once"],
    );
    let throughput = [
        "--objective",
        "throughput",
        "--batch",
        "4",
        "--parallel",
        "2",
    ];
    solve(&throughput, &["--batch: 4", "at most 2"]);
    refused(
        folder,
        &["what-if", &model, "-M", &machine, "--parallel", "0"],
        &["--parallel: 0", "1 or more"],
    );
}
