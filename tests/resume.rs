//! Profiles that were interrupted and are gone on with.

use crate::common::{
    check_refusal_with, demo_model, piped, run_in, send, stderr, succeeded, tier_plan,
    write_prompts,
};
use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

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
    piped(&mut command)
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
    send("-INT", &child);
    let output = child.wait_with_output().unwrap();
    check_refusal_with(
        &output,
        130,
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
