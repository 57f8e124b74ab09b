//! The configuration file, `tier-plan config`, and `tier-plan models` as whole programs.

use crate::common::{
    check_refusal, demo_model, json, listing, stderr, stdout, succeeded, tier_plan,
};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The program with a configuration folder of its own.
fn program(folder: &Path) -> Command {
    let mut command = tier_plan();
    command
        .current_dir(folder)
        .env_remove("TIER_PLAN_CONFIG")
        .env("XDG_CONFIG_HOME", folder.join("config"))
        .env("HF_HUB_CACHE", folder.join("hub"));
    command
}

fn write(folder: &Path, text: &str) {
    let path = folder.join("config/tier-plan/config.toml");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

#[test]
fn settings_are_shown_with_their_origin() {
    let folder = tempfile::tempdir().unwrap();
    write(
        folder.path(),
        "memory = \"3GiB\"\nthreads = 2\n\n[serve]\nport = 81\napi-key = \"secret\"\n",
    );
    let run = |args: &[&str]| {
        let mut command = program(folder.path());
        command.args(args).env("TIER_PLAN_THREADS", "3");
        succeeded(command.output().unwrap())
    };
    let found = json(run(&["config", "--json"]));
    let setting = |command: Option<&str>, option: &str| {
        let all = found["settings"].as_array().unwrap();
        let command = serde_json::json!(command);
        let found = all
            .iter()
            .find(|s| s["option"] == option && s["command"] == command);
        found
            .unwrap_or_else(|| panic!("{option} in {all:?}"))
            .clone()
    };
    let memory = setting(None, "memory");
    assert_eq!(
        (&memory["value"], &memory["origin"], &memory["line"]),
        (&"3GiB".into(), &"file".into(), &1.into())
    );
    let threads = setting(None, "threads");
    assert_eq!(
        (&threads["value"], &threads["origin"], &threads["variable"]),
        (
            &"3".into(),
            &"environment".into(),
            &"TIER_PLAN_THREADS".into()
        )
    );
    assert_eq!(setting(Some("serve"), "port")["line"], 5);
    assert_eq!(setting(Some("serve"), "api-key")["value"], "***");
    let text = stdout(&run(&["config"]));
    assert!(
        text.contains("serve.port") && text.contains("line 5 of the file"),
        "{text}"
    );
    assert!(!text.contains("secret"), "{text}");
    let help = program(folder.path())
        .args(["serve", "--help"])
        .output()
        .unwrap();
    let help = stdout(&help);
    assert!(
        help.contains("[default: 81]") && !help.contains("secret"),
        "{help}"
    );
    let text = stdout(&run(&["config", "serve"]));
    assert!(
        text.contains("host") && text.contains("127.0.0.1") && text.contains("built in"),
        "{text}"
    );
}

#[test]
fn a_setting_is_what_a_command_runs_with() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "json = true\n");
    let inspect = |variable: Option<&str>| {
        let mut command = program(folder.path());
        command.arg("inspect").arg(demo_model());
        variable.inspect(|value| {
            command.env("TIER_PLAN_JSON", value);
        });
        stdout(&succeeded(command.output().unwrap()))
    };
    assert!(inspect(None).starts_with('{'));
    assert!(!inspect(Some("0")).starts_with('{'), "a variable wins");
    let other = folder.path().join("other.toml");
    fs::write(&other, "").unwrap();
    let mut command = program(folder.path());
    command
        .env("TIER_PLAN_CONFIG", &other)
        .arg("inspect")
        .arg(demo_model());
    assert!(!stdout(&succeeded(command.output().unwrap())).starts_with('{'));
}

#[test]
fn mistakes_end_the_program_but_not_its_help() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "\nmemroy = 1\n");
    let output = program(folder.path())
        .arg("inspect")
        .arg(demo_model())
        .output()
        .unwrap();
    check_refusal(
        &output,
        &[
            "config.toml:2: unknown key 'memroy', expected 'memory'",
            "tier-plan config",
        ],
    );
    succeeded(
        program(folder.path())
            .args(["inspect", "--help"])
            .output()
            .unwrap(),
    );
    // What is wrong on the line is said first.
    let output = program(folder.path())
        .args(["inspect", "--nonsense"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let mut missing = program(folder.path());
    missing.env("TIER_PLAN_CONFIG", "none.toml").arg("config");
    check_refusal(
        &missing.output().unwrap(),
        &["TIER_PLAN_CONFIG: none.toml: no such file"],
    );
    write(folder.path(), "a = \u{1b}[31m\n");
    let output = program(folder.path()).arg("config").output().unwrap();
    check_refusal(&output, &["config.toml:1: "]);
    assert!(!stderr(&output).contains('\u{1b}'));
    succeeded(
        program(folder.path())
            .env("TIER_PLAN_CONFIG", "")
            .arg("config")
            .output()
            .unwrap(),
    );
}

#[test]
fn models_are_listed_and_cached_ones_removed() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = folder.path().join("hub/models--owner--repo/snapshots/r1");
    fs::create_dir_all(&snapshot).unwrap();
    fs::copy(demo_model(), snapshot.join("cached.gguf")).unwrap();
    fs::create_dir(folder.path().join("mine")).unwrap();
    fs::copy(demo_model(), folder.path().join("mine/own.gguf")).unwrap();
    write(folder.path(), "models-dir = ['mine']\n");
    let models = || {
        json(succeeded(
            program(folder.path())
                .args(["models", "--json"])
                .output()
                .unwrap(),
        ))
    };
    let names = |found: &serde_json::Value| -> Vec<String> {
        let all = found["models"].as_array().unwrap();
        all.iter()
            .map(|m| m["name"].as_str().unwrap().to_string())
            .collect()
    };
    let found = models();
    assert_eq!(names(&found), ["mine/own.gguf", "owner/repo/cached.gguf"]);
    assert_eq!(found["models"][1]["cached"], true);
    assert!(found["models"][0]["parameters"].as_u64().unwrap() > 1_000_000);
    let text = stdout(&succeeded(
        program(folder.path()).arg("models").output().unwrap(),
    ));
    assert_eq!(text.lines().count(), 2, "{text}");
    assert!(text.contains("parameters"), "{text}");

    let remove = |args: &[&str]| {
        program(folder.path())
            .args(["models", "rm"])
            .args(args)
            .output()
            .unwrap()
    };
    let before = listing(folder.path());
    check_refusal(
        &remove(&["owner/repo/cached.gguf"]),
        &["not removed without a yes", "--force"],
    );
    check_refusal(
        &remove(&["mine/own.gguf", "--force"]),
        &["a file of yours", "rm mine/own.gguf"],
    );
    check_refusal(
        &remove(&["nothing", "--force"]),
        &["no such model", "tier-plan models"],
    );
    assert_eq!(listing(folder.path()), before);
    let text = stdout(&succeeded(remove(&["cached.gguf", "--force"])));
    assert!(
        text.contains("removed owner/repo/cached.gguf: 1 file(s)"),
        "{text}"
    );
    assert_eq!(names(&models()), ["mine/own.gguf"]);
}
