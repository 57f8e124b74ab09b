//! The profile of real use that `--profile-out` records.

use super::*;
use crate::common::stderr;

/// Counts the texts of a profile, and their tokens: of prompts, and decoded.
fn recorded(path: &std::path::Path) -> (usize, u64, u64) {
    let profile = tier_plan_runtime::formats::profile::read(path).unwrap();
    let tokens = |phase| profile.n_tokens(Some(phase), None);
    use tier_plan_runtime::formats::profile::Phase::{Decode, Prompt};
    (profile.prompts.len(), tokens(Prompt), tokens(Decode))
}

#[test]
fn real_use_is_a_profile_that_plans_are_made_with() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("use.profile");
    let options = ["--parallel", "2", "--profile-out", path.to_str().unwrap()];
    let mut server = Served::start(&options);
    let usage = |answer: Value, key: &str| answer["usage"][key].as_u64().unwrap();
    let first = server.post("/v1/completions", &completion(&long(), 8)).ok();
    let n_prompt = usage(first, "prompt_tokens");
    // The second begins with what is kept of the first, which is not recorded again.
    let second = server.post("/v1/completions", &completion(&long(), 8)).ok();
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    let log = server.stop();
    assert!(log.contains("has the choices of 2 texts"), "{log}");
    // The last token that is drawn is not computed.
    let expected = (2, 2 * n_prompt - cached.unwrap(), 14);
    assert_eq!(recorded(&path), expected);

    // A later server adds to it, and draws with drafts: what was wrong of them is no choice.
    let mut server = Served::start(&[&options[..], &["--draft", "4"]].concat());
    server.post("/v1/completions", &completion(PROMPT, 40)).ok();
    server.stop();
    let (n_texts, _, n_decoded) = recorded(&path);
    assert_eq!((n_texts, n_decoded), (3, 14 + 39));

    let (model, plan) = (demo_model(), folder.path().join("placement.toml"));
    let args = [
        "solve",
        model.to_str().unwrap(),
        "--machine",
        "demo-emulated",
        "--profile",
        path.to_str().unwrap(),
        "--output",
        plan.to_str().unwrap(),
    ];
    let solved = run_in(folder.path(), &args);
    assert!(solved.status.success(), "{}", stderr(&solved));

    // What is measured on the emulated tiers of this plan says so.
    let mut server = Served::start(&["--plan", plan.to_str().unwrap()]);
    let answer = server.post("/v1/completions", &completion(PROMPT, 4)).ok();
    assert_eq!(answer["tier_plan"]["emulated"], true, "{answer}");
    assert_eq!(server.get("/props").ok()["emulated"], true);
    let live = server.get("/tier-plan/live").ok();
    assert_eq!(live["tiers"][0]["emulated"], true, "{live}");
    assert!(
        server
            .get("/metrics")
            .text()
            .contains("tier_plan_emulated 1")
    );
    let log = server.stop();
    assert!(log.contains(" tok/s on emulated tiers"), "{log}");
}

#[test]
fn a_profile_that_was_made_otherwise_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.profile");
    std::fs::write(&path, "something else").unwrap();
    let model = demo_model();
    let args = [
        "serve",
        model.to_str().unwrap(),
        "--port",
        "0",
        "--profile-out",
        path.to_str().unwrap(),
    ];
    let refused = run_in(folder.path(), &args);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains("other.profile"),
        "{}",
        stderr(&refused)
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "something else");
}
