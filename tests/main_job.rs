//! The main job from end to end on the bundled model: profile, solve, run, compare, each as a user
//! calls it.

use crate::common::{
    self, demo_machine, demo_model, json, listing, run_in, stderr, stdout, succeeded, tier_plan,
};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

const PROMPT: &str = "And it came to pass in those days";
const VRAM: u64 = 3 << 20;
const DRAM: u64 = 4 << 20;

/// Two domains with two texts each, cut from the bundled prompts.
fn write_prompts(folder: &Path, chars: usize) {
    for domain in ["code", "scripture"] {
        fs::create_dir_all(folder.join(domain)).unwrap();
        for name in ["train-1.txt", "heldout-1.txt"] {
            let text = fs::read_to_string(
                common::root()
                    .join("profiles/prompts")
                    .join(domain)
                    .join(name),
            )
            .unwrap();
            let cut: String = text.chars().take(chars).collect();
            fs::write(folder.join(domain).join(name), cut).unwrap();
        }
    }
}

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
    assert_eq!(
        file["version"],
        if file["predicted"].is_null() { 1 } else { 2 }
    );
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

/// Prompts whose last batch, or whole, is one token: that is still a prompt.
#[test]
fn prompt_and_decoded_tokens_are_told_apart() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let model = demo_model();
    let model = model.to_str().unwrap();
    let tokens = |text: &str| {
        json(run_in(folder, &["tokenize", model, text, "--ids"]))
            .as_array()
            .unwrap()
            .len()
    };
    let words = |n: usize| "word ".repeat(n);
    // One more than a batch of prompt processing.
    let long = words(513 - (tokens(&words(400)) - 400));
    for (text, n) in [("a", 1), ("a text", tokens("a text")), (&long, 513)] {
        assert_eq!(tokens(text), n);
        let record = json(run_in(
            folder,
            &[
                "run",
                model,
                "-p",
                text,
                "-n",
                "4",
                "--ignore-eos",
                "--json",
            ],
        ));
        assert_eq!(record["prompt_tokens"], n, "{record:#}");
        assert_eq!(
            record["decode_tokens"], 3,
            "the fourth is drawn and not taken in"
        );
        for layer in record["layers"].as_array().unwrap() {
            let accesses: u64 = ["pinned_hits", "slot_hits", "misses"]
                .iter()
                .map(|k| layer[*k].as_u64().unwrap())
                .sum();
            assert_eq!(accesses, 3 * 4, "{layer:#}");
        }
    }
    let list = ["bench", model, "-p", "0", "-n", "3", "-r", "1", "--json"];
    let speed = json(run_in(folder, &list));
    assert_eq!(speed["prompt_tok_s"], 0.0);
    assert!(
        speed["decode_tok_s"]
            .as_f64()
            .is_some_and(|rate| rate > 0.0)
    );
}

#[test]
fn a_shorter_context_holds_under_a_plan() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let (model, machine) = (demo_model(), demo_machine());
    let (model, machine) = (model.to_str().unwrap(), machine.to_str().unwrap());
    succeeded(run_in(
        folder,
        &[
            "solve",
            model,
            "-m",
            machine,
            "--strategy",
            "lru-only",
            "--context",
            "64",
        ],
    ));
    let list = [
        "run",
        model,
        "--plan",
        "placement.toml",
        "-p",
        PROMPT,
        "-n",
        "50",
        "--ignore-eos",
        "--json",
    ];
    let long = json(run_in(folder, &list));
    let short = json(run_in(folder, &[&list[..], &["--ctx", "16"]].concat()));
    let ids = |value: &Value| value["output"].as_array().unwrap().clone();
    let prompt = short["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!(ids(&long).len(), 50);
    // One more than there is room for: the last one is drawn, but not taken in.
    assert_eq!(ids(&short).len(), 16 - prompt + 1);
    assert_eq!(ids(&short)[..], ids(&long)[..ids(&short).len()]);
    assert_eq!(
        short["tiers"][1]["planned_bytes"],
        short["tiers"][1]["resident_bytes"]
    );
}

#[test]
fn keys_and_values_take_the_bytes_that_were_planned() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let (model, machine) = (demo_model(), demo_machine());
    let (model, machine) = (model.to_str().unwrap(), machine.to_str().unwrap());
    let inspected = json(run_in(folder, &["inspect", model, "--json"]));
    let number = |key: &str| inspected[key].as_u64().unwrap();
    let bytes = [
        number("kv_bytes_per_token"),
        number("kv_q8_0_bytes_per_token"),
        2 * number("kv_bytes_per_token"),
    ];
    assert!(
        10 * bytes[1] < 6 * bytes[0],
        "{bytes:?}: eight bits and their scales are little more than half"
    );
    for (kv_type, bytes) in ["f16", "q8_0", "f32"].into_iter().zip(bytes) {
        let solve = [
            "solve",
            model,
            "-m",
            machine,
            "--strategy",
            "lru-only",
            "--context",
            "64",
        ];
        succeeded(run_in(
            folder,
            &[&solve[..], &["--kv-type", kv_type, "-o", "plan.toml"]].concat(),
        ));
        let plan = read_toml(&folder.join("plan.toml"));
        assert_eq!(plan["kv_type"].as_str(), Some(kv_type));
        let planned: i64 = plan["tier"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["kv_bytes"].as_integer().unwrap())
            .sum();
        assert_eq!(planned as u64, 64 * bytes, "{kv_type}");
        // With a plan its own type, without one the type that is asked for: the same text.
        let with = run(folder, model, Some(&folder.join("plan.toml")), "with.json");
        let list = [
            "run",
            model,
            "-p",
            PROMPT,
            "-n",
            "24",
            "--threads",
            "2",
            "--json",
            "--kv-type",
            kv_type,
        ];
        let without = json(run_in(folder, &list));
        assert_eq!(with["output"], without["output"], "{kv_type}");
        let list = [
            "bench",
            model,
            "--plan",
            "plan.toml",
            "--kv-type",
            kv_type,
            "-p",
            "4",
            "-n",
            "2",
            "-r",
            "1",
        ];
        assert_eq!(
            json(run_in(folder, &[&list[..], &["--json"]].concat()))["kv_type"],
            kv_type
        );
        let held = without["tiers"][0]["resident_bytes"].as_u64().unwrap();
        assert_eq!(
            held,
            number("weight_bytes") + number("context").min(4096) * bytes,
            "{kv_type}"
        );
    }
}

#[cfg(unix)]
mod interruption {
    use super::*;
    use std::io::Read;
    use std::process::{Child, Command, ExitStatus};

    const LIST: [&str; 10] = [
        "--prompts",
        "prompts",
        "-o",
        "x.profile",
        "--prompt-tokens",
        "16",
        "--decode-tokens",
        "160",
        "--threads",
        "1",
    ];

    fn start(folder: &Path) -> Child {
        let model = demo_model();
        let mut command = tier_plan();
        command
            .current_dir(folder)
            .arg("profile")
            .arg(model)
            .args(LIST);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Waits until the unfinished profile changes, which is after each prompt; false when the
    /// program ended before.
    fn wait_for_progress(child: &mut Child, partial: &Path) -> bool {
        let modified = || fs::metadata(partial).and_then(|m| m.modified()).ok();
        let (before, start) = (modified(), Instant::now());
        while modified() == before || modified().is_none() {
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "no prompt was finished in a minute"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    fn interrupt(child: &Child) {
        let status: ExitStatus = Command::new("sh")
            .args(["-c", &format!("kill -INT {}", child.id())])
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// Stopped after the first prompt, killed after a later one, and then left alone: the same file
    /// as in one go.
    #[test]
    fn profile_goes_on_where_it_was_stopped() {
        let temporary = tempfile::tempdir().unwrap();
        let (whole, parts) = (
            temporary.path().join("whole"),
            temporary.path().join("parts"),
        );
        for folder in [&whole, &parts] {
            fs::create_dir(folder).unwrap();
            write_prompts(&folder.join("prompts"), 200);
        }
        let output = succeeded(start(&whole).wait_with_output().unwrap());
        assert_eq!(stderr(&output), "");
        let expected = fs::read(whole.join("x.profile")).unwrap();

        let partial = parts.join("x.profile.partial");
        let mut child = start(&parts);
        assert!(
            wait_for_progress(&mut child, &partial),
            "ended before it could be interrupted"
        );
        interrupt(&child);
        let output = child.wait_with_output().unwrap();
        common::check_refusal(
            &output,
            &[
                "interrupted after ",
                " of 4 prompts",
                "goes on from x.profile.partial",
            ],
        );
        assert!(partial.exists() && !parts.join("x.profile").exists());

        let mut child = start(&parts);
        assert!(
            wait_for_progress(&mut child, &partial),
            "ended before it could be killed"
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(partial.exists() && !parts.join("x.profile").exists());

        let output = succeeded(start(&parts).wait_with_output().unwrap());
        assert!(
            stderr(&output).contains("going on from x.profile.partial"),
            "{}",
            stderr(&output)
        );
        assert!(!partial.exists());
        assert_eq!(fs::read(parts.join("x.profile")).unwrap(), expected);
    }

    /// The text so far stays, and the record says what was done.
    #[test]
    fn an_interrupted_run_keeps_what_it_has() {
        let temporary = tempfile::tempdir().unwrap();
        let mut command = tier_plan();
        command
            .current_dir(temporary.path())
            .arg("run")
            .arg(demo_model());
        command.args([
            "-p",
            PROMPT,
            "-n",
            "100000",
            "--ctx",
            "100100",
            "--ignore-eos",
            "--record",
            "r.json",
        ]);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut first)
            .unwrap();
        interrupt(&child);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
        assert!(
            !stderr(&output).contains("error") && stderr(&output).contains("tok/s"),
            "{}",
            stderr(&output)
        );
        let record: Value =
            serde_json::from_slice(&fs::read(temporary.path().join("r.json")).unwrap()).unwrap();
        let tokens = record["output"].as_array().unwrap().len();
        assert!((1..100_000).contains(&tokens), "{tokens}");
    }

    /// What is left of another run, or of no run of ours, is not gone on from.
    #[test]
    fn only_the_same_run_goes_on() {
        let temporary = tempfile::tempdir().unwrap();
        let folder = temporary.path();
        write_prompts(&folder.join("prompts"), 100);
        let list = [
            "--prompts",
            "prompts",
            "-o",
            "x.profile",
            "--decode-tokens",
            "4",
            "--prompt-tokens",
        ];
        let told = |tokens: &str, more: &[&str]| {
            let model = demo_model();
            let list = [
                &["profile", model.to_str().unwrap()],
                &list[..],
                &[tokens],
                more,
            ]
            .concat();
            stderr(&succeeded(run_in(folder, &list)))
        };
        let profile = |tokens: &str, more: &[&str]| {
            assert_eq!(told(tokens, more), "");
            fs::read(folder.join("x.profile")).unwrap()
        };
        let finished = || fs::read(folder.join("x.profile")).unwrap();
        let (eight, nine) = (profile("8", &[]), profile("9", &[]));
        assert_ne!(eight, nine);
        let partial = folder.join("x.profile.partial");
        // An unfinished profile of another run is kept, and the difference is named.
        fs::write(&partial, &nine).unwrap();
        let words = told("8", &[]);
        assert!(
            words.contains("up to 9 prompt tokens there, up to 8 prompt tokens here"),
            "{words}"
        );
        assert_eq!(finished(), eight);
        assert_eq!(
            fs::read(folder.join("x.profile.partial.old")).unwrap(),
            nine
        );
        fs::write(&partial, &eight).unwrap();
        let words = told("8", &["--tokenizer-pre", "gpt-2"]);
        assert!(
            words.contains("tokenizer qwen2 there, tokenizer gpt-2 here"),
            "{words}"
        );
        assert_ne!(finished(), eight);
        fs::write(&partial, b"not ours").unwrap();
        let words = told("8", &[]);
        assert!(words.contains("x.profile.partial"), "{words}");
        assert_eq!(finished(), eight);
        fs::write(&partial, &eight).unwrap();
        assert_eq!(profile("8", &["--restart"]), eight);
        assert!(!partial.exists());
    }
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
        command
            .current_dir(folder.path())
            .args(list)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
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
        common::check_refusal(&output, &["standard output", "No space left"]);
    }
}
