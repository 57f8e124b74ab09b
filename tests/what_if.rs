//! Planning without weights: shapes by name, counts of importance matrices, and `what-if`, as users
//! type them.

use crate::common::{demo_machine, demo_model, json, refused, root, run_in, stdout, succeeded};
use std::fs;
use std::path::Path;

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}

#[test]
fn a_shape_is_inspected_by_name_and_by_file() {
    let dir = tempfile::tempdir().unwrap();
    let by_name = json(run_in(
        dir.path(),
        &["inspect", "kimi-k2.5", "--quant", "q4_k_m", "--json"],
    ));
    let file = root().join("profiles/models/kimi-k2.5.toml");
    let by_file = json(run_in(dir.path(), &["inspect", &text(&file), "--json"]));
    assert_eq!(by_name, by_file);
    assert_eq!(by_name["parameters"], 1_026_408_232_448u64);
    assert_eq!(by_name["approximate"], true);
    let bits = by_name["bits_per_weight"].as_f64().unwrap();
    assert!((4.7..5.0).contains(&bits), "{bits}");
    let words = stdout(&succeeded(run_in(
        dir.path(),
        &["inspect", "gpt-oss-20b", "--quant", "mxfp4"],
    )));
    assert!(
        words.contains("a shape without weights") && words.contains("4.19e9 active"),
        "{words}"
    );
}

#[test]
fn a_plan_of_a_shape_says_so_and_runs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let machine = "desktop-4090-ddr5-nvme";
    let solve = [
        "solve",
        "gpt-oss-120b",
        "--quant",
        "mxfp4",
        "-m",
        machine,
        "--time-limit",
        "2",
        "-o",
        "p.toml",
    ];
    let words = stdout(&succeeded(run_in(dir.path(), &solve)));
    assert!(
        words.contains("note: 'gpt-oss-120b' is a shape without weights"),
        "{words}"
    );
    assert!(words.contains("times its efficiency of 0.58"), "{words}");
    let plan = fs::read_to_string(dir.path().join("p.toml")).unwrap();
    assert!(
        plan.contains("gpt-oss-120b at mxfp4, a shape without weights"),
        "{plan}"
    );
    let run = [
        "run",
        &text(&demo_model()),
        "--plan",
        "p.toml",
        "-p",
        "Hello",
    ];
    refused(
        dir.path(),
        &run,
        &[
            "p.toml",
            "was made for the model 'gpt-oss-120b at mxfp4, a shape without weights'",
        ],
    );
}

#[test]
fn wrong_names_are_refused_with_the_right_ones() {
    let dir = tempfile::tempdir().unwrap();
    let demo = text(&demo_model());
    let cases: [(&[&str], &[&str]); 9] = [
        (
            &["inspect", "kimi"],
            &["no shape of that name", "kimi-k2.5"],
        ),
        (
            &["inspect", "kimi-k2", "--quant", "q4"],
            &["--quant: q4", "q4_k_m"],
        ),
        (
            &["inspect", "kimi-k2", "--tensors"],
            &["is a shape, which has no tensors"],
        ),
        (
            &["inspect", &demo, "--quant", "q4_k_m"],
            &["--quant applies to shapes"],
        ),
        (
            &["solve", "kimi-k2", "-m", "cray-1"],
            &["no machine of that name", "optane-768"],
        ),
        (
            &["solve", &demo, "--quant", "q4_k_m", "-m", "optane-768"],
            &["is a model file"],
        ),
        (
            &["profile", "kimi-k2"],
            &["no weights to run", "--from-imatrix"],
        ),
        (&["bench", "kimi-k2"], &["kimi-k2"]),
        (
            &[
                "what-if",
                "--model",
                "kimi-k2",
                "-m",
                "optane-768",
                "--sweep",
                "dram",
            ],
            &["TIER=FROM..TO"],
        ),
    ];
    for (args, words) in cases {
        refused(dir.path(), args, words);
    }
    fs::write(
        dir.path().join("bad.toml"),
        "format = \"tier-plan shape\"\nversion = 1\nname = 3\n",
    )
    .unwrap();
    refused(
        dir.path(),
        &["inspect", "bad.toml"],
        &["bad.toml", "line 3"],
    );
    fs::copy(demo_machine(), dir.path().join("machine.toml")).unwrap();
    refused(
        dir.path(),
        &["inspect", "machine.toml"],
        &["not a model shape: its format is \"tier-plan machine\""],
    );
}

#[test]
fn an_importance_matrix_is_a_profile_of_counts() {
    let dir = tempfile::tempdir().unwrap();
    let (matrix, demo) = (
        text(&root().join("tests/data/imatrix/demo.imatrix.gguf")),
        text(&demo_model()),
    );
    let made = json(run_in(
        dir.path(),
        &[
            "profile",
            "--from-imatrix",
            &matrix,
            &demo,
            "-o",
            "a.profile",
            "--json",
        ],
    ));
    assert_eq!(
        (&made["counted"], &made["n_used"]),
        (&true.into(), &4.into())
    );
    assert!(
        made["made"]
            .as_str()
            .unwrap()
            .starts_with("marginal counts, prompt processing only")
    );
    let shown = stdout(&succeeded(run_in(dir.path(), &["inspect", "a.profile"])));
    assert!(shown.contains("counts have no order"), "{shown}");

    let machine = text(&demo_machine());
    let solve = [
        "solve",
        &demo,
        "-p",
        "a.profile",
        "-m",
        &machine,
        "-o",
        "p.toml",
    ];
    let words = stdout(&succeeded(run_in(dir.path(), &solve)));
    assert!(
        words.contains("note: the profile has only marginal counts of prompt processing"),
        "{words}"
    );
    assert!(
        words.contains("1024 independent tokens drawn from them (seed 1)"),
        "{words}"
    );
    assert!(!words.contains("knowing the future"), "{words}");
    let plan = fs::read_to_string(dir.path().join("p.toml")).unwrap();
    assert!(
        plan.contains("tier-plan demo, marginal counts of prompt processing"),
        "{plan}"
    );
    // The same counts give the same plan.
    let again = [
        "solve",
        &demo,
        "-p",
        "a.profile",
        "-m",
        &machine,
        "-o",
        "q.toml",
    ];
    succeeded(run_in(dir.path(), &again));
    let choices = |name: &str| {
        let plan = fs::read_to_string(dir.path().join(name)).unwrap();
        plan[plan.find("[dense]").unwrap()..].to_string()
    };
    assert_eq!(choices("p.toml"), choices("q.toml"));
    // And the plan runs.
    let run = [
        "run",
        &demo,
        "--plan",
        "p.toml",
        "-p",
        "The",
        "-n",
        "4",
        "--ignore-eos",
    ];
    succeeded(run_in(dir.path(), &run));

    let compare = [
        "compare",
        "p.toml",
        "--model",
        &demo,
        "--profile",
        "a.profile",
    ];
    refused(
        dir.path(),
        &compare,
        &["a.profile", "has only counts of an importance matrix"],
    );
    refused(
        dir.path(),
        &["profile", "--from-imatrix", &demo],
        &["no importance matrix"],
    );
    refused(
        dir.path(),
        &["profile", "--from-imatrix", &matrix, "glm-4.5-air"],
        &["is of another model"],
    );
    let legacy = [
        &2i32.to_le_bytes()[..],
        &12i32.to_le_bytes(),
        b"blk.0.ffn_up",
        &[0; 40],
    ]
    .concat();
    fs::write(dir.path().join("old.dat"), legacy).unwrap();
    refused(
        dir.path(),
        &["profile", "--from-imatrix", "old.dat"],
        &["old.dat", "the old .dat format", "llama-imatrix"],
    );
}

#[test]
fn a_plan_is_explained_from_what_it_was_made_from() {
    let dir = tempfile::tempdir().unwrap();
    let solve = [
        "solve",
        "gpt-oss-120b",
        "--quant",
        "mxfp4",
        "-m",
        "desktop-4090-ddr5-nvme",
        "--time-limit",
        "2",
    ];
    succeeded(run_in(
        dir.path(),
        &[&solve[..], &["-o", "p.toml"]].concat(),
    ));
    let explain = [
        "explain",
        "p.toml",
        "--model",
        "gpt-oss-120b",
        "--quant",
        "mxfp4",
    ];
    let words = stdout(&succeeded(run_in(dir.path(), &explain)));
    for expected in [
        "The bottleneck is dram",
        "shadow prices",
        "attention: 36 of 36 on vram",
        "layer",
    ] {
        assert!(words.contains(expected), "{expected}: {words}");
    }
    let found = json(run_in(dir.path(), &[&explain[..], &["--json"]].concat()));
    assert_eq!(
        (&found["bound_by"], found["layers"].as_array().map(Vec::len)),
        (&"dram".into(), Some(36))
    );
    assert!(found["tiers"][0]["tok_s_per_gib"].as_f64().unwrap() > 0.0);
    assert_eq!(found["tiers"][2]["tok_s_per_gib"].as_f64(), Some(0.0));
    refused(
        dir.path(),
        &["explain", "p.toml", "--model", "gpt-oss-120b"],
        &["gpt-oss-120b at q4_k_m"],
    );
    let matrix = text(&root().join("tests/data/imatrix/demo.imatrix.gguf"));
    succeeded(run_in(
        dir.path(),
        &["profile", "--from-imatrix", &matrix, "-o", "a.profile"],
    ));
    refused(
        dir.path(),
        &[&explain[..], &["-p", "a.profile"]].concat(),
        &["was made without a profile"],
    );
}

#[test]
fn what_if_answers_in_words_and_in_json() {
    let dir = tempfile::tempdir().unwrap();
    let ask = [
        "what-if",
        "--model",
        "glm-4.5-air",
        "--quant",
        "q4_k_m",
        "--time-limit",
        "1",
    ];
    let one = json(run_in(
        dir.path(),
        &[&ask[..], &["-m", "desktop-4090-ddr5-nvme", "--json"]].concat(),
    ));
    let speed = |key: &str| one[key].as_f64().unwrap();
    assert!(
        speed("decode_tok_s_low") <= speed("decode_tok_s")
            && speed("decode_tok_s") <= speed("decode_tok_s_high")
    );
    assert!(speed("gap") < 0.05 && speed("load_s") > 0.0);
    assert_eq!(one["bound_by"], "dram");
    let several = [
        &ask[..],
        &[
            "-m",
            "desktop-4090-ddr5-nvme",
            "-m",
            "article-optane-4090",
            "-m",
            "demo-emulated",
        ],
    ]
    .concat();
    let words = stdout(&succeeded(run_in(dir.path(), &several)));
    assert!(
        words.contains("predicted decode: ") && words.contains("J per token"),
        "{words}"
    );
    assert!(
        words.contains("demo-emulated") && words.contains("no plan: "),
        "{words}"
    );
    assert!(words.contains("predicted:\nmachine"), "{words}");
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "what-if writes nothing that was not asked for"
    );
}

#[test]
fn what_if_of_a_file_needs_no_more_than_its_header() {
    let dir = tempfile::tempdir().unwrap();
    let (demo, machine) = (text(&demo_model()), text(&demo_machine()));
    let words = stdout(&succeeded(run_in(
        dir.path(),
        &[
            "what-if",
            "--model",
            &demo,
            "-m",
            &machine,
            "--context",
            "256",
            "--time-limit",
            "1",
        ],
    )));
    assert!(words.contains("emulated tiers"), "{words}");
    let sweep = [
        "--sweep",
        "dram=2MiB..12MiB:5",
        "-o",
        "out",
        "--context",
        "256",
        "--time-limit",
        "1",
        "--json",
    ];
    let found = json(run_in(
        dir.path(),
        &[&["what-if", "--model", &demo, "-m", &machine][..], &sweep].concat(),
    ));
    assert_eq!(found["points"].as_array().unwrap().len(), 5);
    let csv = fs::read_to_string(dir.path().join("out/sweep.csv")).unwrap();
    assert_eq!(csv.lines().count(), 6);
    assert!(
        fs::read_to_string(dir.path().join("out/sweep.svg"))
            .unwrap()
            .contains("<svg")
    );
    let saved: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.path().join("out/sweep.json")).unwrap()).unwrap();
    assert_eq!(saved, found);
}

/// A machine with a drive, of which nothing is emulated; its rates are invented.
const MACHINE: &str = r#"format = "tier-plan machine"
version = 1
name = "here"
layer_overhead_us = 20
token_overhead_us = 10

[[tier]]
name = "dram"
kind = "dram"
capacity = "1GiB"
read_gbps = 30
latency_us = 0
source = "invented"

[[tier]]
name = "nvme"
kind = "nvme"
capacity = "1TB"
read_gbps = 2
latency_us = 90
source = "invented"
"#;

#[test]
fn a_machine_file_is_fitted_to_runs_of_its_plans() {
    let dir = tempfile::tempdir().unwrap();
    let demo = text(&demo_model());
    fs::write(dir.path().join("here.toml"), MACHINE).unwrap();
    for (dram, record) in [("8MiB", "a.json"), ("12MiB", "b.json"), ("1GiB", "c.json")] {
        let solve = [
            "solve",
            &demo,
            "-m",
            "here.toml",
            "--dram",
            dram,
            "--context",
            "128",
            "-o",
            "p.toml",
        ];
        succeeded(run_in(dir.path(), &solve));
        let run = [
            "run",
            &demo,
            "--plan",
            "p.toml",
            "-p",
            "In the beginning",
            "-n",
            "24",
            "--record",
            record,
        ];
        succeeded(run_in(dir.path(), &run));
    }
    let calibrate = ["calibrate", "a.json", "b.json", "c.json", "-m", "here.toml"];
    let found = json(run_in(
        dir.path(),
        &[&calibrate[..], &["-o", "fitted.toml", "--json"]].concat(),
    ));
    let error = |key: &str| found[key].as_f64().unwrap();
    // Runs in bad weather change nothing rather than make it worse.
    assert!(
        error("error_left_out") <= error("error_before") + 1e-9,
        "{found}"
    );
    assert_eq!(found["records"].as_array().map(Vec::len), Some(3));
    assert!(found["records"][0]["measured_tok_s"].as_f64().unwrap() > 0.0);
    let fitted = fs::read_to_string(dir.path().join("fitted.toml")).unwrap();
    assert!(
        fitted.contains("version = 2")
            && fitted.contains("[calibration]")
            && fitted.contains("records = 3"),
        "{fitted}"
    );
    assert_eq!(
        fs::read_to_string(dir.path().join("here.toml")).unwrap(),
        MACHINE,
        "the file itself is as it was"
    );
    let path = dir.path().join("a.json");
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["version"] = 6.into();
    record["layers"][0]["streamed"] = 3.into();
    fs::write(dir.path().join("s.json"), record.to_string()).unwrap();
    let streamed = "calibrate s.json b.json c.json -m here.toml -o other.toml";
    let streamed: Vec<&str> = streamed.split(' ').collect();
    let words = stdout(&succeeded(run_in(dir.path(), &streamed)));
    assert!(
        words.contains("note: 1 of the 3 runs streamed experts to a GPU: "),
        "{words}"
    );
    let words = stdout(&succeeded(run_in(dir.path(), &calibrate)));
    assert!(
        words.contains("mean error: ") && words.contains("note: 3 runs say little"),
        "{words}"
    );
    // The file was replaced, so its runs are those of another now.
    refused(
        dir.path(),
        &calibrate,
        &["a.json", "was made for the machine 'here'", "solve again"],
    );
    refused(
        dir.path(),
        &["calibrate", "a.json", "-m", "optane-768"],
        &["comes with the program", "--output"],
    );
}

#[test]
fn runs_on_emulated_tiers_fit_no_machine() {
    let dir = tempfile::tempdir().unwrap();
    let demo = text(&demo_model());
    fs::copy(demo_machine(), dir.path().join("demo.toml")).unwrap();
    succeeded(run_in(
        dir.path(),
        &[
            "solve",
            &demo,
            "-m",
            "demo.toml",
            "--context",
            "64",
            "-o",
            "p.toml",
        ],
    ));
    let run = [
        "run",
        &demo,
        "--plan",
        "p.toml",
        "-p",
        "In the beginning",
        "-n",
        "4",
        "--record",
        "r.json",
    ];
    succeeded(run_in(dir.path(), &run));
    refused(
        dir.path(),
        &["calibrate", "r.json", "-m", "demo.toml"],
        &["r.json", "emulated tiers"],
    );
}

#[test]
fn what_vllm_reads_is_said_plainly() {
    let dir = tempfile::tempdir().unwrap();
    let export = ["export", "p.toml", "--model", "kimi-k2", "--to", "vllm"];
    refused(
        dir.path(),
        &export,
        &[
            "vLLM reads neither a placement of experts nor counts",
            "--to sglang",
        ],
    );
}
