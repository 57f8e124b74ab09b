//! Models by name, as users type them, against a hub on this machine.

use crate::common::{
    check_refusal, demo_machine, demo_model, json, root, stdout, succeeded, tier_plan,
};
#[cfg(unix)]
use crate::common::{piped, send};
use ring::digest::{SHA256, digest};
use std::fs;
use std::path::Path;
use std::process::Command;
#[cfg(unix)]
use std::time::Duration;
use tier_plan_testing::http::{Reply, Request, Server};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The bundled model's SHA-256.
fn model_hash() -> String {
    let hash = digest(&SHA256, &fs::read(demo_model()).unwrap());
    hash.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// A hub that has the bundled model as `hf:me/m:Q8_0`.
fn hub(weights: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static) -> Server {
    let (model, hash) = (fs::read(demo_model()).unwrap(), model_hash());
    Server::start(move |request| {
        if request.path.starts_with("/api/models/me/m/") {
            let size = model.len();
            let listing = serde_json::json!({"sha": COMMIT, "siblings": [
                {"rfilename": "demo-Q8_0.gguf", "size": size, "lfs": {"sha256": hash, "size": size}},
                {"rfilename": "mmproj-Q8_0.gguf", "size": 4, "lfs": {"sha256": hash, "size": 4}},
            ]});
            Reply::whole(listing.to_string().as_bytes())
        } else if request.path.ends_with("/demo-Q8_0.gguf") {
            weights(request, Reply::ranged(request, &model))
        } else {
            Reply::status(404)
        }
    })
}

/// The program with a cache in a folder.
fn program(folder: &Path, server: &Server, line: &str) -> Command {
    let mut command = tier_plan();
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("HF_")) {
            command.env_remove(name);
        }
    }
    command
        .current_dir(folder)
        .env("HF_HOME", folder.join("hf"))
        .env("HOME", folder)
        .env("HF_ENDPOINT", server.address())
        .args(line.split_whitespace());
    command
}

fn unchanged(_: &Request, reply: Reply) -> Reply {
    reply
}

#[test]
fn a_model_is_fetched_run_and_run_again_offline() {
    let folder = tempfile::tempdir().unwrap();
    let server = hub(unchanged);
    let program = |line: &str| program(folder.path(), &server, line);
    let line = "run hf:me/m:Q8_0 -p In -n 4 --temp 0 --threads 1";
    // Nobody can be asked in a pipe.
    let words = [
        "10.5 MiB to fetch to",
        "hf/hub",
        "--yes",
        "what-if hf:me/m:Q8_0",
    ];
    check_refusal(&program(line).output().unwrap(), &words);
    assert!(!folder.path().join("hf").exists());
    let fetched = stdout(&succeeded(
        program(&format!("{line} --yes")).output().unwrap(),
    ));
    let by_path = format!(
        "run {} -p In -n 4 --temp 0 --threads 1",
        demo_model().display()
    );
    assert_eq!(
        fetched,
        stdout(&succeeded(program(&by_path).output().unwrap()))
    );
    let asked = server.requests().len();
    for name in ["hf:me/m:q8_0", "hf:me/m:demo-Q8_0.gguf"] {
        let line = line.replace("hf:me/m:Q8_0", name);
        let again = program(&line).env("HF_HUB_OFFLINE", "1").output().unwrap();
        assert_eq!(stdout(&succeeded(again)), fetched);
    }
    assert_eq!(server.requests().len(), asked);
}

#[test]
fn predictions_and_inspection_fetch_no_weights() {
    let folder = tempfile::tempdir().unwrap();
    let server = hub(unchanged);
    let run = |line: &str| program(folder.path(), &server, line).output().unwrap();
    let by_name = json(run("inspect hf:me/m --json --tensors"));
    let by_path = json(run(&format!(
        "inspect {} --json --tensors",
        demo_model().display()
    )));
    assert_eq!(by_name, by_path);
    let machine = demo_machine();
    let machine = machine.display();
    let what_if = json(run(&format!(
        "what-if hf:me/m -c 512 -M {machine} --json --time-limit 2"
    )));
    assert_eq!(what_if["fits"], true, "{what_if}");
    // Without -M it is this machine's file.
    let desktop = root().join("profiles/machines/desktop-5070-ddr5.toml");
    fs::copy(desktop, folder.path().join("machine.toml")).unwrap();
    let here = json(run("what-if hf:me/m --json --time-limit 2"));
    assert_eq!(
        (&here["machine"], &here["fits"]),
        (&"desktop-5070-ddr5".into(), &true.into())
    );
    let words = ["predicted", "tok/s here", "--yes"];
    check_refusal(&run("bench hf:me/m:Q8_0 -n 1"), &words);
    succeeded(run("tokenize hf:me/m hello"));
    succeeded(run(&format!(
        "solve hf:me/m -M {machine} --time-limit 2 -o p.toml"
    )));
    assert!(!folder.path().join("hf").exists());
    let model_bytes = fs::metadata(demo_model()).unwrap().len() as usize;
    for request in server.requests() {
        if let Some((first, last)) = request.range {
            assert!(last.unwrap() - first < model_bytes / 2, "{request:?}");
        }
    }
}

#[test]
fn a_fetched_model_is_removed_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let server = hub(unchanged);
    let run = |line: &str| program(folder.path(), &server, line).output().unwrap();
    succeeded(run("checksum hf:me/m --yes -o sums"));
    let asked = server.requests().len();
    let words = ["not removed without a yes", "--force"];
    check_refusal(&run("models rm hf:me/m:Q8_0"), &words);
    let removed = stdout(&succeeded(run("models rm hf:me/m:Q8_0 --force")));
    assert!(
        removed.contains("removed me/m/demo-Q8_0.gguf: 1 file(s), 10.5 MiB"),
        "{removed}"
    );
    let again = run("models rm hf:me/m:Q8_0 --force");
    check_refusal(
        &again,
        &["hf:me/m:Q8_0 in the cache at", "tier-plan models"],
    );
    assert_eq!(server.requests().len(), asked);
    let blobs = folder.path().join("hf/hub/models--me--m/blobs");
    assert_eq!(fs::read_dir(blobs).unwrap().count(), 0);
}

#[test]
fn doctor_judges_the_folder_that_a_model_would_go_to() {
    let folder = tempfile::tempdir().unwrap();
    let server = hub(unchanged);
    let report = json(
        program(folder.path(), &server, "doctor hf:me/m:Q8_0 --json")
            .output()
            .unwrap(),
    );
    let check = |name: &str| {
        let checks = report["checks"].as_array().unwrap();
        let of = |c: &&serde_json::Value| c["group"] == "model" && c["check"] == name;
        checks.iter().find(of).unwrap().clone()
    };
    let bytes = fs::metadata(demo_model()).unwrap().len();
    let fetch = &check("fetch")["facts"];
    assert_eq!(
        (&fetch["folder"], &fetch["missing_bytes"]),
        (&"~/hf/hub".into(), &bytes.into()),
        "{fetch}"
    );
    assert_eq!(check("file")["facts"]["bytes"], bytes);
    let shown = stdout(&succeeded(
        program(folder.path(), &server, "auto hf:me/m:Q8_0 --show")
            .output()
            .unwrap(),
    ));
    for text in [report.to_string(), shown] {
        assert!(!text.contains(".tier-plan-"), "{text}");
    }
    assert!(!folder.path().join("hf").exists());
}

#[test]
fn what_a_repository_has_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let server = hub(unchanged);
    let run = |line: &str| program(folder.path(), &server, line).output().unwrap();
    let words = ["no model fits 'Q2_K'", "Q8_0 (10.5 MiB)", "hf:me/m:"];
    check_refusal(&run("run hf:me/m:Q2_K -p a"), &words);
    check_refusal(
        &run("run hf:me/other -p a"),
        &["status 404", "check the names"],
    );
    check_refusal(&run("run hf:me -p a"), &["expected hf:OWNER/REPO"]);
    check_refusal(
        &run("run ollama:none -p a"),
        &["no such model", "OLLAMA_MODELS"],
    );
    check_refusal(&run("run lmstudio:a/b -p a"), &["no such folder"]);
}

#[test]
fn models_of_other_programs_are_used_where_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let server = hub(unchanged);
    let run = |line: &str| program(folder.path(), &server, line).output().unwrap();
    let models = folder.path().join(".ollama/models");
    let hash = model_hash();
    let manifest = models.join("manifests/registry.ollama.ai/library/tiny/latest");
    fs::create_dir_all(manifest.parent().unwrap()).unwrap();
    fs::create_dir_all(models.join("blobs")).unwrap();
    fs::copy(demo_model(), models.join(format!("blobs/sha256-{hash}"))).unwrap();
    let layer = "application/vnd.ollama.image.model";
    let layers =
        serde_json::json!({"layers": [{"mediaType": layer, "digest": format!("sha256:{hash}")}]});
    fs::write(manifest, layers.to_string()).unwrap();
    let studio = folder.path().join(".lmstudio/models/me/m");
    fs::create_dir_all(&studio).unwrap();
    fs::copy(demo_model(), studio.join("demo.gguf")).unwrap();
    let by_path = json(run(&format!("inspect {} --json", demo_model().display())));
    for name in ["ollama:tiny", "lmstudio:me/m", "lmstudio:me/m/demo.gguf"] {
        assert_eq!(
            json(run(&format!("inspect {name} --json"))),
            by_path,
            "{name}"
        );
        // What is written beside a model does not go to the other program.
        succeeded(run(&format!("checksum {name}")));
    }
    assert_eq!(fs::read_dir(models.join("blobs")).unwrap().count(), 1);
    assert_eq!(fs::read_dir(studio).unwrap().count(), 1);
    assert!(server.requests().is_empty());
}

#[test]
#[cfg(unix)]
fn an_interrupted_fetch_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    // The header comes at once; of the weights 5 MB, and then nothing more.
    let stalls = hub(|request, reply| match request.range {
        Some((_, None)) => Reply {
            cut: Some(5_000_000),
            hangs: true,
            ..reply
        },
        _ => reply,
    });
    let mut child = piped(&mut program(
        folder.path(),
        &stalls,
        "checksum hf:me/m --yes",
    ));
    let blobs = folder.path().join("hf/hub/models--me--m/blobs");
    let incomplete = blobs.join(format!("{}.incomplete", model_hash()));
    while fs::metadata(&incomplete).map_or(0, |m| m.len()) < 5_000_000 {
        assert!(child.try_wait().unwrap().is_none(), "it ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    send("-INT", &child);
    assert!(!child.wait().unwrap().success());
    assert_eq!(fs::metadata(&incomplete).unwrap().len(), 5_000_000);
    let server = hub(unchanged);
    let line = "checksum hf:me/m --yes -o sums";
    succeeded(program(folder.path(), &server, line).output().unwrap());
    let weights: Vec<_> = server
        .requests()
        .into_iter()
        .filter_map(|r| r.range.filter(|(_, last)| last.is_none()))
        .collect();
    assert_eq!(weights, [(5_000_000, None)]);
    assert!(!incomplete.exists());
    let snapshot = folder
        .path()
        .join("hf/hub/models--me--m/snapshots")
        .join(COMMIT);
    assert!(fs::read(snapshot.join("demo-Q8_0.gguf")).unwrap() == fs::read(demo_model()).unwrap());
}
