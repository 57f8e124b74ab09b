//! Reports that are sent to others: run records of several models and machines, one file, nothing
//! private in it, and units that fit the model.

use crate::common::{demo_machine, demo_model, json, refused, root, run_in, stdout, succeeded};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A name that no shared file may have.
const NAME: &str = "ann-of-green-gables";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn others() -> PathBuf {
    root().join("tests/data/records")
}

/// A home folder with a model, a plan, and records of two runs; all are named by their whole paths.
struct Home {
    _place: TempDir,
    folder: PathBuf,
    records: Vec<PathBuf>,
}

impl Home {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("home").join(NAME).join("models");
        fs::create_dir_all(&folder).unwrap();
        let [model, machine] = ["private.gguf", "machine.toml"].map(|name| folder.join(name));
        fs::copy(demo_model(), &model).unwrap();
        fs::copy(demo_machine(), &machine).unwrap();
        let plan = folder.join("plan.toml");
        let solve = ["solve", text(&model), "-m", text(&machine)];
        let solve = [
            &solve[..],
            &[
                "--context",
                "64",
                "--strategy",
                "uniform",
                "-o",
                text(&plan),
            ],
        ];
        succeeded(run_in(&folder, &solve.concat()));
        let run = [
            "run",
            text(&model),
            "-p",
            "x",
            "-n",
            "6",
            "--ignore-eos",
            "--threads",
            "1",
        ];
        let run = [&run[..], &["--ctx", "64", "--record"]].concat();
        let records = ["plain.record.json", "planned.record.json"].map(|name| folder.join(name));
        succeeded(run_in(&folder, &[&run[..], &[text(&records[0])]].concat()));
        let planned = [&run[..], &[text(&records[1]), "--plan", text(&plan)]].concat();
        succeeded(run_in(&folder, &planned));
        Self {
            _place: place,
            folder,
            records: records.into(),
        }
    }

    /// Adds records of other machines and of another model.
    fn with_others(mut self) -> Self {
        for name in ["workstation-ilp", "workstation-lru", "older"] {
            self.records
                .push(others().join(format!("{name}.record.json")));
        }
        self
    }

    fn compare(&self, more: &[&str]) -> Vec<String> {
        let records = self.records.iter().map(|path| text(path).to_string());
        let more = more.iter().map(|arg| arg.to_string());
        std::iter::once("compare".to_string())
            .chain(records)
            .chain(more)
            .collect()
    }
}

#[test]
fn a_record_says_what_it_ran_on_and_nothing_private() {
    let home = Home::new();
    for path in &home.records {
        let text = fs::read_to_string(path).unwrap();
        assert!(!text.contains(NAME) && !text.contains("/home"), "{text}");
        let record: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(record["version"], 5);
        let setup = &record["setup"];
        assert_eq!(setup["context"], 64, "{setup:#}");
        assert!(
            setup["model_bytes"].as_u64().unwrap() > 1 << 20,
            "{setup:#}"
        );
        assert!(setup["system"]["processor"].is_string(), "{setup:#}");
        let tiers = setup["tiers"].as_array().unwrap();
        assert_eq!(tiers.len(), record["tiers"].as_array().unwrap().len());
    }
    let planned = fs::read_to_string(&home.records[1]).unwrap();
    let planned: Value = serde_json::from_str(&planned).unwrap();
    assert_eq!(planned["setup"]["tiers"][0]["budget_bytes"], 3 << 20);
}

#[test]
fn records_of_several_models_and_machines_make_one_file() {
    let home = Home::new().with_others();
    let shared = home.folder.join("shared.html");
    let value = json(run_in(
        &home.folder,
        &home.compare(&["--html", text(&shared), "--json"]),
    ));
    assert_eq!(value["html"], text(&shared));
    assert!(value["report"].is_null(), "no folder without --output");
    assert!(!home.folder.join("reports").exists());
    assert_eq!(value["title"], "2 models on 4 machines");
    let plans = value["plans"].as_array().unwrap();
    assert_eq!(plans.len(), 5);
    let of = |host: &str| {
        let is_of = |p: &&Value| p["host"].as_str().unwrap().starts_with(host);
        plans.iter().filter(is_of).collect::<Vec<_>>()
    };
    let workstation = of("Example Processor 9950");
    assert_eq!(workstation.len(), 2);
    assert_eq!(workstation[0]["plan"], "ilp", "the fastest is first");
    assert_eq!(workstation[0]["limited_by"], "nvme");
    assert_eq!(workstation[0]["threads"], 16);
    assert_eq!(workstation[0]["context"], 4096);
    assert_eq!(
        workstation[0]["tiers"][0]["budget_bytes"],
        51_539_607_552u64
    );
    let older = of("Example Board");
    assert_eq!(older.len(), 1);
    assert!(older[0]["model_bytes"].is_null() && older[0]["hit_rate"].is_number());

    let html = fs::read_to_string(&shared).unwrap();
    for words in [
        "Example MoE 120B on Example Processor 9950, 32 threads, 61.9 GiB (machine file workstation)",
        "tier-plan demo on Example Board CPU",
        "59.0 GiB",
        "of 48.0 GiB",
        "nvme, 60\u{a0}%",
        "one text of 4096 tokens",
        "machine file demo-emulated",
    ] {
        assert!(html.contains(words), "{words}");
    }
    assert!(html.contains("default-src 'none'") && !html.contains("https://"));
    assert!(html.len() < 4 << 20);
}

#[test]
fn nothing_private_is_in_what_is_shared() {
    let mut home = Home::new().with_others();
    // A record of a stranger whose names are paths and markup.
    let mut evil: Value =
        serde_json::from_slice(&fs::read(others().join("older.record.json")).unwrap()).unwrap();
    let path = format!("/home/{NAME}/plan.toml");
    evil["plan"] = path.clone().into();
    evil["isa"] = format!("avx2 {path}").into();
    evil["host"] = format!(r"C:\Users\{NAME}\x").into();
    evil["model"]["name"] = "</script><script>alert(1)</script><img src=x onerror=alert(2)>".into();
    evil["model"]["hash"] = "0".repeat(32).into();
    let stranger = home.folder.join("stranger.json");
    fs::write(&stranger, evil.to_string()).unwrap();
    home.records.push(stranger);
    let plan = home.folder.join("plan.toml");
    let model = home.folder.join("private.gguf");
    let prompts = home.folder.join("prompts");
    crate::common::write_prompts(&prompts, 120);
    let more = [
        text(&plan),
        "-m",
        text(&model),
        "--prompts",
        text(&prompts),
        "-n",
        "2",
    ];
    let more = [
        &more[..],
        &["--threads", "1", "--html", "shared.html", "-o", "report"],
    ]
    .concat();
    let said = stdout(&succeeded(run_in(&home.folder, &home.compare(&more))));
    assert!(said.contains("html: shared.html"), "{said}");
    let report = home.folder.join("report");
    let mut shared: Vec<PathBuf> = crate::common::listing(&report).into_iter().collect();
    shared.push(home.folder.join("shared.html"));
    for path in shared.iter().filter(|path| path.is_file()) {
        let bytes = fs::read(path).unwrap();
        let found = String::from_utf8_lossy(&bytes);
        assert!(!found.contains(NAME), "{}", path.display());
    }
    let html = fs::read_to_string(home.folder.join("shared.html")).unwrap();
    assert_eq!(html.matches("<script>").count(), 1);
    assert!(html.contains("&lt;script&gt;alert(1)") && !html.contains("<img"));
}

#[test]
fn an_input_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let from = others().join("older.record.json");
    fs::copy(&from, folder.path().join("r.json")).unwrap();
    let compare = ["compare", "r.json", "--html", "./r.json"];
    refused(folder.path(), &compare, &["--html", "r.json is an input"]);
    let compare = ["compare", "r.json", "--html", "no/such/r.html"];
    refused(folder.path(), &compare, &["no/such"]);
    // A report that was there is replaced as a whole.
    fs::write(folder.path().join("old.html"), "old").unwrap();
    succeeded(run_in(
        folder.path(),
        &["compare", "r.json", "--html", "old.html"],
    ));
    let html = fs::read_to_string(folder.path().join("old.html")).unwrap();
    assert!(html.starts_with("<!DOCTYPE html>") && html.ends_with("</html>\n"));
}

/// Returns the numbers before a unit of percent in what a command says.
fn percents(words: &str) -> Vec<f64> {
    let parts = words
        .split(" %")
        .map(|part| part.rsplit([' ', '(']).next().unwrap());
    parts.filter_map(|number| number.parse().ok()).collect()
}

#[test]
fn what_memory_is_worth_is_said_in_units_that_fit_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let demo = demo_model();
    // A machine with prices, of which the model needs a hundred-thousandth.
    let solve = [
        "solve",
        text(&demo),
        "-m",
        "article-4090x4",
        "--time-limit",
        "2",
    ];
    let small = ["--vram", "2MiB", "--dram", "4MiB", "-o", "small.toml"];
    let said = stdout(&succeeded(run_in(
        folder.path(),
        &[&solve[..], &small].concat(),
    )));
    let worth: Vec<&str> = said
        .lines()
        .filter(|l| l.starts_with("what would help most") || l.starts_with("for the money"))
        .collect();
    assert!(!worth.is_empty(), "{said}");
    for line in &worth {
        assert!(!line.contains("a GiB more"), "{line}");
        assert!(percents(line).iter().all(|p| *p <= 100.0), "{line}");
    }
    let explain = ["explain", "small.toml", "--model", text(&demo)];
    let said = stdout(&succeeded(run_in(folder.path(), &explain)));
    assert!(said.contains("What a MiB more of each budget"), "{said}");

    let large = [
        "solve",
        "kimi-k2.5",
        "-m",
        "article-4090x4",
        "--strategy",
        "optimal",
    ];
    let large = [
        &large[..],
        &["--time-limit", "2", "--dram", "96GiB", "-o", "large.toml"],
    ]
    .concat();
    succeeded(run_in(folder.path(), &large));
    let explain = ["explain", "large.toml", "--model", "kimi-k2.5"];
    let said = stdout(&succeeded(run_in(folder.path(), &explain)));
    assert!(said.contains("What a GiB more of each budget"), "{said}");
    let what_if = [
        "what-if",
        "--model",
        "kimi-k2.5",
        "-m",
        "article-4090x4",
        "--time-limit",
        "1",
    ];
    let said = stdout(&succeeded(run_in(folder.path(), &what_if)));
    assert!(
        said.contains(" GiB") && !said.contains(" KiB more"),
        "{said}"
    );
}
