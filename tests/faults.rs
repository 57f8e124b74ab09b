//! What goes wrong around a run: disks that are full, files that shrink, and Ctrl-C. Nothing that
//! was there is harmed, nothing half-written is left, and what was said so far is right.

use crate::common::{
    self, check_refusal, demo_machine, demo_model, json, listing, run_in, stdout, succeeded,
    tier_plan,
};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

const PROMPT: &str = "And it came to pass in those days";

/// A budget in which few of the bundled model's experts fit memory.
const LITTLE: &str = "42MiB";

/// Runs the program where no file may be written to, as on a disk without room.
fn run_without_room(folder: &Path, args: &[&str]) -> Output {
    let script = "ulimit -f 0; exec \"$0\" \"$@\"";
    Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_tier-plan")])
        .args(args)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn a_full_disk_is_named_and_what_was_there_stays() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("demo.gguf");
    fs::copy(demo_model(), &model).unwrap();
    let prompts = folder.path().join("prompts/some");
    fs::create_dir_all(&prompts).unwrap();
    for name in ["train-1.txt", "heldout-1.txt"] {
        let text =
            fs::read_to_string(common::root().join("profiles/prompts/code").join(name)).unwrap();
        fs::write(
            prompts.join(name),
            text.chars().take(200).collect::<String>(),
        )
        .unwrap();
    }
    let machine = demo_machine();
    let run = [
        "run",
        "demo.gguf",
        "-p",
        "x",
        "-n",
        "2",
        "--ctx",
        "16",
        "--threads",
        "1",
    ];
    let with = |more: &[&'static str]| [&run[..], more].concat();
    let cases: Vec<(&str, Vec<&str>)> = vec![
        ("a.record.json", with(&["--record", "a.record.json"])),
        (
            "a.slots.json",
            with(&["--dram", LITTLE, "--slots", "a.slots.json"]),
        ),
        ("a.sums", vec!["checksum", "demo.gguf", "-o", "a.sums"]),
        ("a.experts", vec!["pack", "demo.gguf", "-o", "a.experts"]),
        ("a.toml", {
            let machine = machine.to_str().unwrap();
            vec![
                "solve",
                "demo.gguf",
                "-m",
                machine,
                "-o",
                "a.toml",
                "--context",
                "64",
                "--strategy",
                "uniform",
            ]
        }),
        ("a.profile", {
            let list = [
                "profile",
                "demo.gguf",
                "--prompts",
                "prompts",
                "-o",
                "a.profile",
                "--restart",
            ];
            [
                &list[..],
                &[
                    "--prompt-tokens",
                    "8",
                    "--decode-tokens",
                    "4",
                    "--threads",
                    "1",
                ],
            ]
            .concat()
        }),
    ];
    for (name, args) in cases {
        // A file of slots is read as well, so what is there must be one.
        let there = if name == "a.slots.json" {
            succeeded(run_in(folder.path(), &args));
            fs::read(folder.path().join(name)).unwrap()
        } else {
            b"what was there".to_vec()
        };
        fs::write(folder.path().join(name), &there).unwrap();
        let before = listing(folder.path());
        check_refusal(
            &run_without_room(folder.path(), &args),
            &[name, "File too large"],
        );
        assert_eq!(listing(folder.path()), before, "{name}");
        assert_eq!(fs::read(folder.path().join(name)).unwrap(), there, "{name}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_device_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = demo_model();
    let list = [
        "run",
        model.to_str().unwrap(),
        "-p",
        "x",
        "-n",
        "1",
        "--ctx",
        "16",
        "--record",
        "/dev/full",
    ];
    check_refusal(
        &run_in(folder.path(), &list),
        &["/dev/full", "No space left on device"],
    );
}

/// A long run on a copy of the bundled model, of which the first words have come.
fn long_run(folder: &Path, more: &[&str]) -> (Child, Vec<u8>) {
    fs::copy(demo_model(), folder.join("demo.gguf")).unwrap();
    let mut child = tier_plan()
        .current_dir(folder)
        .args([
            "run",
            "demo.gguf",
            "-p",
            PROMPT,
            "-n",
            "900",
            "--ignore-eos",
            "--threads",
            "2",
            "--dram",
            LITTLE,
        ])
        .args(more)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = vec![0; 12];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    (child, first)
}

/// What the run says when nobody disturbs it.
fn whole(folder: &Path) -> String {
    let list = [
        "run",
        "demo.gguf",
        "-p",
        PROMPT,
        "-n",
        "900",
        "--ignore-eos",
        "--threads",
        "2",
        "--dram",
        "2GiB",
    ];
    stdout(&succeeded(run_in(folder, &list)))
}

fn rest(child: Child, mut first: Vec<u8>) -> Output {
    let mut output = child.wait_with_output().unwrap();
    first.append(&mut output.stdout);
    Output {
        stdout: first,
        ..output
    }
}

#[test]
fn ctrl_c_in_the_middle_of_reads_keeps_what_there_is() {
    let folder = tempfile::tempdir().unwrap();
    let (child, first) = long_run(
        folder.path(),
        &["--record", "a.record.json", "--slots", "a.slots.json"],
    );
    assert!(
        Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status()
            .unwrap()
            .success()
    );
    let output = rest(child, first);
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let said = stdout(&output);
    let whole = whole(folder.path());
    assert!(whole.trim_end().starts_with(said.trim_end()), "{said:?}");
    assert!(
        said.trim_end().len() < whole.trim_end().len(),
        "the run was over before the signal came"
    );
    let record: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.path().join("a.record.json")).unwrap()).unwrap();
    assert!(record["decode_tokens"].as_u64().unwrap() > 0);
    assert!(
        fs::read_to_string(folder.path().join("a.slots.json"))
            .unwrap()
            .contains("tier-plan slots")
    );
    assert_eq!(
        listing(folder.path()).len(),
        3,
        "the model, the record and the slots"
    );
}

#[test]
fn a_file_that_shrinks_under_a_run_ends_it() {
    let folder = tempfile::tempdir().unwrap();
    let (child, first) = long_run(folder.path(), &[]);
    let model = fs::File::options()
        .write(true)
        .open(folder.path().join("demo.gguf"))
        .unwrap();
    model
        .set_len(model.metadata().unwrap().len() - 100_000)
        .unwrap();
    let output = rest(child, first);
    check_refusal(
        &output,
        &["demo.gguf", "length changed", "load the model again"],
    );
    fs::copy(demo_model(), folder.path().join("demo.gguf")).unwrap();
    let said = stdout(&output);
    assert!(
        whole(folder.path()).trim_end().starts_with(said.trim_end()),
        "{said:?}"
    );
}

#[test]
fn a_copy_that_shrinks_under_a_run_ends_it_too() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(demo_model(), folder.path().join("demo.gguf")).unwrap();
    json(run_in(folder.path(), &["pack", "demo.gguf", "--json"]));
    let (child, first) = long_run(folder.path(), &["--pack", "demo.experts"]);
    fs::File::options()
        .write(true)
        .open(folder.path().join("demo.experts"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    check_refusal(&rest(child, first), &["demo.experts", "length changed"]);
}
