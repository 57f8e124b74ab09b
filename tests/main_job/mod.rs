//! The main job from end to end on the bundled model: profile, solve, run, compare, each as a user
//! calls it.

mod context;

use crate::common::{
    demo_machine, demo_model, json, listing, run_in, stderr, stdout, succeeded, write_prompts,
};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

const PROMPT: &str = "And it came to pass in those days";
const VRAM: u64 = 3 << 20;
const DRAM: u64 = 4 << 20;

fn args<'a>(list: &[&'a str]) -> Vec<&'a str> {
    list.to_vec()
}

fn read_toml(path: &Path) -> toml::Table {
    fs::read_to_string(path).unwrap().parse().unwrap()
}

fn has_numbers(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(value[*key].is_number(), "{key} in {value:#}");
    }
}

fn has_strings(value: &Value, keys: &[&str]) {
    for key in keys {
        assert!(value[*key].is_string(), "{key} in {value:#}");
    }
}

/// The lines of a tier in a plan: `(name, budget, used)`.
fn tiers(plan: &toml::Table) -> Vec<(String, u64, u64)> {
    let number = |tier: &toml::Value, key: &str| tier[key].as_integer().unwrap() as u64;
    let lines = [
        "dense_bytes",
        "pinned_bytes",
        "slot_bytes",
        "kv_bytes",
        "staging_bytes",
        "home_bytes",
    ];
    let tiers = plan["tier"].as_array().unwrap().iter();
    tiers
        .map(|t| {
            let used = lines.iter().map(|line| number(t, line)).sum();
            (
                t["name"].as_str().unwrap().to_string(),
                number(t, "budget_bytes"),
                used,
            )
        })
        .collect()
}

/// Profiles; returns what `--json` printed.
fn profile(folder: &Path, model: &str) -> Value {
    let list = [
        "profile",
        model,
        "--prompts",
        "prompts",
        "-o",
        "demo.profile",
        "--prompt-tokens",
        "48",
    ];
    let list = [
        &list[..],
        &["--decode-tokens", "32", "--threads", "2", "--json"],
    ]
    .concat();
    let value = json(run_in(folder, &list));
    assert_eq!(
        listing(folder)
            .iter()
            .filter(|p| p.to_string_lossy().contains("demo.profile"))
            .count(),
        1
    );
    assert_eq!(value["prompts"], 4);
    assert_eq!(value["prompt_tokens"], 4 * 48);
    has_numbers(&value, &["decode_tokens", "n_expert", "n_used"]);
    has_strings(&value, &["model", "profile"]);
    for skew in value["skew"].as_array().unwrap() {
        has_numbers(skew, &["tokens", "effective_experts"]);
        has_strings(skew, &["verdict"]);
    }
    value
}

/// Solves; returns the plan files, the optimal one first.
fn solve(folder: &Path, model: &str, machine: &str) -> Vec<PathBuf> {
    let list = [
        "solve",
        model,
        "-p",
        "demo.profile",
        "-m",
        machine,
        "-o",
        "plans/optimal.toml",
        "--baselines",
    ];
    let list = [
        &list[..],
        &[
            "plans",
            "--vram",
            "3MiB",
            "-b",
            "dram=4MiB",
            "--context",
            "256",
        ],
    ]
    .concat();
    fs::create_dir(folder.join("plans")).unwrap();
    let value = json(run_in(
        folder,
        &[&list[..], &["--time-limit", "1", "--json"]].concat(),
    ));
    let keys = [
        "predicted_decode_tok_s",
        "predicted_prompt_tok_s",
        "hit_rate",
        "objective_s",
        "bound_s",
        "gap",
    ];
    has_numbers(
        &value,
        &[
            &keys[..],
            &[
                "solve_s",
                "overhead_s",
                "expert_critical_s",
                "ceiling_hit_rate",
            ],
        ]
        .concat(),
    );
    has_strings(&value, &["name", "status", "backend", "plan"]);
    for tier in value["tiers"].as_array().unwrap() {
        let keys = [
            "budget_bytes",
            "used_bytes",
            "dense_bytes",
            "pinned_bytes",
            "slot_bytes",
            "kv_bytes",
        ];
        has_numbers(
            tier,
            &[&keys[..], &["staging_bytes", "home_bytes"]].concat(),
        );
    }
    let gap = value["gap"].as_f64().unwrap();
    let objective = value["objective_s"].as_f64().unwrap();
    assert!((0.0..1.0).contains(&gap), "{gap}");
    // The bound is over slots with LRU; with another policy a plan can be faster than that.
    let lru = value["policies"]
        .as_object()
        .unwrap()
        .keys()
        .all(|policy| policy == "lru");
    assert!(!lru || value["bound_s"].as_f64().unwrap() <= objective);
    let baselines = value["baselines"].as_array().unwrap();
    assert_eq!(baselines.len(), 4, "{value:#}");
    for baseline in baselines {
        assert!(
            objective <= baseline["objective_s"].as_f64().unwrap() * (1.0 + 1e-9),
            "{baseline:#}"
        );
        assert_eq!(baseline["status"], "baseline");
    }
    let mut plans = vec![folder.join("plans/optimal.toml")];
    for path in value["baseline_plans"].as_array().unwrap() {
        plans.push(folder.join(path.as_str().unwrap()));
    }
    let on_disk: Vec<PathBuf> = listing(&folder.join("plans")).into_iter().collect();
    let mut named = plans.clone();
    named.sort();
    assert_eq!(on_disk, named, "the plans that were named and no others");
    plans
}

/// Runs greedily and returns the record as `--json` printed it, with the text; checks it against
/// the file.
fn run(folder: &Path, model: &str, plan: Option<&Path>, record: &str) -> Value {
    let mut list = args(&[
        "run",
        model,
        "-p",
        PROMPT,
        "-n",
        "24",
        "--threads",
        "2",
        "--json",
        "--record",
        record,
    ]);
    if let Some(plan) = plan {
        list.extend(["--plan", plan.to_str().unwrap()]);
    }
    let output = run_in(folder, &list);
    assert_eq!(
        stderr(&output),
        "",
        "--json says everything on standard output"
    );
    let value = json(output);
    let keys = [
        "prompt_tok_s",
        "decode_tok_s",
        "prompt_s",
        "decode_s",
        "first_token_s",
        "prompt_tokens",
    ];
    has_numbers(
        &value,
        &[&keys[..], &["decode_tokens", "threads", "version"]].concat(),
    );
    has_strings(&value, &["text", "plan", "status", "isa", "host", "when"]);
    for tier in value["tiers"].as_array().unwrap() {
        has_numbers(
            tier,
            &["planned_bytes", "resident_bytes", "read_bytes", "busy_s"],
        );
        assert_eq!(
            tier["planned_bytes"], tier["resident_bytes"],
            "{record}: {tier:#}"
        );
    }
    let mut file: Value = serde_json::from_slice(&fs::read(folder.join(record)).unwrap()).unwrap();
    assert_eq!(file["format"], "tier-plan run record");
    assert_eq!(file["version"], 5, "every record says what it ran on");
    // Of the run, not of its record.
    for key in ["text", "finish_reason"] {
        file[key] = value[key].clone();
    }
    assert_eq!(file, value);
    value
}

fn check_report(folder: &Path, names: &[String], charts: &[&str]) {
    let page = fs::read_to_string(folder.join("index.html")).unwrap();
    for name in names {
        assert!(
            page.contains(name.as_str()),
            "plan {name} is not on the page"
        );
    }
    assert!(
        !page.contains("src=\"http") && !page.contains("href=\"http"),
        "the page needs the network"
    );
    let summary: Value =
        serde_json::from_slice(&fs::read(folder.join("summary.json")).unwrap()).unwrap();
    assert!(summary.is_object());
    for chart in charts {
        for extension in ["svg", "png", "csv"] {
            let path = folder.join(format!("{chart}.{extension}"));
            assert!(
                fs::metadata(&path).unwrap().len() > 50,
                "{}",
                path.display()
            );
        }
    }
}

#[test]
fn profile_solve_run_compare() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    write_prompts(&folder.join("prompts"), 600);
    let (model, machine) = (demo_model(), demo_machine());
    let (model, machine) = (model.to_str().unwrap(), machine.to_str().unwrap());

    let inspected = json(run_in(folder, &["inspect", model, "--json"]));
    has_numbers(
        &inspected,
        &[
            "file_bytes",
            "weight_bytes",
            "token_bytes",
            "kv_bytes_per_token",
            "n_layer",
            "context",
        ],
    );
    let model_hash = inspected["hash"].as_str().unwrap();

    profile(folder, model);
    let plans = solve(folder, model, machine);

    // Without a plan: the text that all plans must give.
    let plain = run(folder, model, None, "plain.json");
    assert_eq!(plain["status"], "obvious");
    assert!(plain["predicted_decode_tok_s"].is_null(), "{plain:#}");
    assert_eq!(plain["output"].as_array().unwrap().len(), 24);
    let mut machines = Vec::new();
    let mut profiles = Vec::new();
    let mut records = Vec::new();
    let mut names = Vec::new();
    for path in &plans {
        let plan = read_toml(path);
        assert_eq!(plan["format"].as_str(), Some("tier-plan placement"));
        assert_eq!(plan["version"].as_integer(), Some(3));
        assert_eq!(plan["context"].as_integer(), Some(256));
        let made_from = |what: &str| {
            plan["made_from"][what]["hash"]
                .as_str()
                .unwrap()
                .to_string()
        };
        assert_eq!(made_from("model"), model_hash);
        machines.push(made_from("machine"));
        profiles.push(made_from("profile"));
        let tiers = tiers(&plan);
        let budgets: Vec<(&str, u64)> = tiers
            .iter()
            .map(|(name, budget, _)| (name.as_str(), *budget))
            .collect();
        assert_eq!(
            budgets,
            [("vram", VRAM), ("dram", DRAM), ("slow", 64 << 20)]
        );
        for (name, budget, used) in &tiers {
            assert!(used <= budget, "{}: tier {name}", path.display());
        }

        let name = plan["name"].as_str().unwrap().to_string();
        let record_name = format!("{name}.record.json");
        let record = run(folder, model, Some(path), &record_name);
        assert_eq!(
            record["output"], plain["output"],
            "plan {name} generates other tokens"
        );
        assert_eq!(record["text"], plain["text"], "{name}");
        assert_eq!(record["plan"], name);
        assert_eq!(record["status"].as_str(), plan["solver"]["status"].as_str());
        let gaps = (
            record["gap"].as_f64(),
            plan["solver"].get("gap").and_then(toml::Value::as_float),
        );
        // Readers of JSON and of TOML round differently in the last digit.
        assert!(
            gaps.0 == gaps.1
                || gaps
                    .0
                    .zip(gaps.1)
                    .is_some_and(|(a, b)| (a - b).abs() < 1e-12),
            "{gaps:?}"
        );
        assert_eq!(record["model"]["hash"], model_hash);
        assert_eq!(
            record["machine"]["hash"].as_str(),
            machines.last().map(String::as_str)
        );
        assert_eq!(record["emulated"], true);
        has_numbers(&record, &["predicted_decode_tok_s"]);
        let held: Vec<u64> = record["tiers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["resident_bytes"].as_u64().unwrap())
            .collect();
        assert_eq!(
            held,
            tiers.iter().map(|t| t.2).collect::<Vec<_>>(),
            "{name}"
        );
        let accesses = |l: &Value| {
            ["pinned_hits", "slot_hits", "misses"]
                .map(|k| l[k].as_u64().unwrap())
                .iter()
                .sum::<u64>()
        };
        let used = inspected["experts"][0]["n_used"].as_u64().unwrap();
        for layer in record["layers"].as_array().unwrap() {
            assert_eq!(
                accesses(layer),
                used * record["decode_tokens"].as_u64().unwrap(),
                "{name}: {layer:#}"
            );
        }
        names.push(name);
        records.push(record_name);
    }
    assert!(machines.iter().all(|hash| *hash == machines[0]));
    assert!(
        profiles
            .iter()
            .all(|hash| *hash == profiles[0] && hash != model_hash)
    );

    // The same in words: the text alone on standard output, the proof of the placement on standard
    // error.
    let optimal = plans[0].to_str().unwrap();
    let said = succeeded(run_in(
        folder,
        &[
            "run", model, "-p", PROMPT, "-n", "24", "--plan", optimal, "--stats",
        ],
    ));
    assert_eq!(
        stdout(&said).trim_end_matches('\n'),
        plain["text"].as_str().unwrap().trim_end_matches('\n')
    );
    assert_eq!(
        stderr(&said).matches(": as planned").count(),
        3,
        "{}",
        stderr(&said)
    );
    assert!(!stderr(&said).contains("NOT as planned"));

    // Plans, run again on held-out prompts.
    let paths: Vec<&str> = plans.iter().map(|p| p.to_str().unwrap()).collect();
    let options = [
        "--model",
        model,
        "--profile",
        "demo.profile",
        "--prompts",
        "prompts",
        "-o",
        "out/report",
    ];
    let list = [
        &["compare"],
        &paths[..],
        &options[..],
        &["--tokens", "6", "--threads", "2", "--json"],
    ]
    .concat();
    let value = json(run_in(folder, &list));
    assert_eq!(value["report"], "out/report/index.html");
    let rows = value["plans"].as_array().unwrap();
    assert_eq!(rows.len(), 5);
    for row in rows {
        has_numbers(
            row,
            &[
                "prompt_tok_s",
                "decode_tok_s",
                "predicted_decode_tok_s",
                "hit_rate",
            ],
        );
        has_strings(row, &["plan", "status"]);
        assert_eq!(row["emulated"], true);
        assert!(row.as_object().unwrap().contains_key("gap"));
    }
    check_report(
        &folder.join("out/report"),
        &names,
        &["speed", "layers", "bytes", "parts", "experts", "hits"],
    );

    // Records alone, which are only read; an existing report is never overwritten.
    let before = fs::read(folder.join("out/report/index.html")).unwrap();
    let list: Vec<&str> = ["compare", "-o", "out/report"]
        .into_iter()
        .chain(records.iter().map(String::as_str))
        .collect();
    let said = stdout(&succeeded(run_in(folder, &list)));
    assert!(said.contains("report: out/report-2/index.html"), "{said}");
    assert_eq!(
        fs::read(folder.join("out/report/index.html")).unwrap(),
        before
    );
    check_report(&folder.join("out/report-2"), &names, &["speed", "layers"]);

    let speed = json(run_in(
        folder,
        &[
            "bench", model, "--plan", optimal, "-p", "8", "-n", "4", "-r", "1", "--json",
        ],
    ));
    has_numbers(
        &speed,
        &[
            "prompt_tok_s",
            "decode_tok_s",
            "predicted_decode_tok_s",
            "decode_gbps",
            "threads",
        ],
    );
    has_strings(&speed, &["model", "plan", "isa"]);
    let left: Vec<_> = listing(folder)
        .into_iter()
        .filter(|p| p.to_string_lossy().contains("partial"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
