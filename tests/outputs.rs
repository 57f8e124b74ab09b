//! Outputs of every command when the disk is full, a write fails, or the process is killed: what was there stays or is
//! replaced by a whole file, and nothing temporary outlives the next run.

use crate::common::{
    self, check_refusal, demo_machine, demo_model, listing, root, run_in, stderr, stdout, succeeded,
};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tier_plan_runtime::formats::safely::Temporary;
use tier_plan_testing::is_nightly;

/// A command that writes `out` or `out/`, in a folder that [`place`] has filled.
struct Writer {
    args: Vec<String>,
    /// Whether the output is a new folder instead of a file that is replaced.
    folder: bool,
    /// Whether an output that is there must be one of an earlier run.
    reads: bool,
}

fn writer(line: &str) -> Writer {
    Writer {
        args: line.split(' ').map(str::to_string).collect(),
        folder: false,
        reads: false,
    }
}

/// Every command that writes files, on little work.
fn writers() -> Vec<Writer> {
    let run = "run demo.gguf -p x -n 2 --ctx 16 --threads 1";
    let profile =
        "profile demo.gguf --prompts prompts --prompt-tokens 4 --decode-tokens 2 --threads 1";
    vec![
        writer("pack demo.gguf -o out"),
        writer("checksum demo.gguf -o out"),
        writer("solve demo.gguf -m machine.toml --context 64 --strategy uniform -o out"),
        writer(&format!("{profile} -o out")),
        writer("profile demo.gguf --from-imatrix demo.imatrix.gguf -o out"),
        writer(&format!("{run} --record out")),
        Writer {
            reads: true,
            ..writer(&format!("{run} --dram 42MiB --slots out"))
        },
        writer("logits demo.gguf --tokens 1,2 --threads 1 -o out"),
        writer(
            "perplexity demo.gguf --file text.txt --ctx 8 --windows 1 --threads 1 --save-logits-base out",
        ),
        writer("export plan.toml --model demo.gguf --to llama.cpp -o out"),
        Writer {
            folder: true,
            ..writer("compare old.record.json -o out")
        },
        writer("compare old.record.json --html out"),
        Writer {
            folder: true,
            ..writer(
                "what-if --model demo.gguf -m machine.toml --context 64 --sweep dram=4MiB..12MiB:2 --time-limit 1 -o out",
            )
        },
    ]
}

/// Makes a folder of inputs.
pub(crate) fn place() -> TempDir {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path();
    fs::copy(demo_model(), folder.join("demo.gguf")).unwrap();
    fs::copy(demo_machine(), folder.join("machine.toml")).unwrap();
    let matrix = "demo.imatrix.gguf";
    fs::copy(
        root().join("tests/data/imatrix").join(matrix),
        folder.join(matrix),
    )
    .unwrap();
    let text = fs::read_to_string(root().join("profiles/prompts/code/train-1.txt")).unwrap();
    let text: String = text.chars().take(300).collect();
    fs::create_dir_all(folder.join("prompts/some")).unwrap();
    for name in [
        "prompts/some/train-1.txt",
        "prompts/some/heldout-1.txt",
        "text.txt",
    ] {
        fs::write(folder.join(name), &text).unwrap();
    }
    let prepare = |line: &str| {
        let args: Vec<&str> = line.split(' ').collect();
        succeeded(run_in(folder, &args));
    };
    prepare("solve demo.gguf -m machine.toml --context 64 --strategy uniform -o plan.toml");
    prepare("run demo.gguf --plan plan.toml -p x -n 4 --threads 1 --record old.record.json");
    place
}

/// Compiles the library of faults, once.
pub static SHIM: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("faults.so");
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-o"])
        .arg(&library)
        .arg(root().join("tests/shim/faults.c"))
        .arg("-ldl")
        .output()
        .expect("a C compiler");
    assert!(compiled.status.success(), "{}", stderr(&compiled));
    (folder, library)
});

pub(crate) fn with_fault(folder: &Path, fault: &str, args: &[String]) -> Output {
    common::tier_plan()
        .current_dir(folder)
        .env("LD_PRELOAD", &SHIM.1)
        .env("FAULT", fault)
        .args(args)
        .output()
        .unwrap()
}

/// Returns the temporary names in a folder.
fn temporaries(folder: &Path) -> Vec<PathBuf> {
    if !folder.exists() {
        return Vec::new();
    }
    let mut found: Vec<PathBuf> = listing(folder).into_iter().collect();
    found.retain(|path| path.to_string_lossy().contains(".partial"));
    found
}

/// Returns the contents of all files below a folder.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = listing(folder).into_iter().filter(|path| path.is_file());
    files
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

#[test]
fn failed_writes_are_named_and_leave_what_was_there() {
    let place = place();
    let folder = place.path();
    for writer in writers() {
        if !writer.folder && !writer.reads {
            fs::write(folder.join("out"), "what was there").unwrap();
        }
        let before = contents(folder);
        for (fault, words) in [
            ("full", "No space left on device"),
            ("fsync", "Input/output error"),
        ] {
            let output = with_fault(folder, fault, &writer.args);
            let line = check_refusal(&output, &["out", words]);
            assert!(!line.contains(".tier-plan-"), "{line}");
            assert_eq!(contents(folder), before, "{fault}: {:?}", writer.args);
        }
        succeeded(with_fault(folder, "bumpy", &writer.args));
        assert_eq!(temporaries(folder), Vec::<PathBuf>::new());
        let out = folder.join("out");
        if writer.folder {
            fs::remove_dir_all(out).unwrap();
        } else {
            fs::remove_file(out).unwrap();
        }
    }
}

#[test]
fn a_killed_writer_leaves_nothing_for_the_run_after_the_next() {
    let place = place();
    let folder = place.path();
    let out = folder.join("out");
    for writer in writers() {
        if !writer.folder && !writer.reads {
            fs::write(&out, "what was there").unwrap();
        }
        for fault in ["kill-write", "kill-rename"] {
            let output = with_fault(folder, fault, &writer.args);
            assert_eq!(
                output.status.signal(),
                Some(9),
                "{:?}: {output:?}",
                writer.args
            );
            assert!(
                !temporaries(folder).is_empty(),
                "killed too late: {:?}",
                writer.args
            );
            if writer.folder {
                let whole = contents(folder).into_iter().map(|(path, _)| path);
                let whole = whole.filter(|path| path.starts_with(&out));
                assert!(whole.eq(temporaries(&out)), "{:?}", writer.args);
            } else if !writer.reads {
                assert_eq!(fs::read(&out).unwrap(), b"what was there");
            }
        }
        succeeded(run_in(folder, &writer.args));
        assert_eq!(
            temporaries(folder),
            Vec::<PathBuf>::new(),
            "{:?}",
            writer.args
        );
        if writer.folder {
            fs::remove_dir_all(&out).unwrap();
        } else {
            assert_ne!(fs::read(&out).unwrap(), b"what was there");
            fs::remove_file(&out).unwrap();
        }
    }
}

#[test]
fn a_kill_at_any_moment_leaves_the_old_file_or_a_whole_one() {
    let place = place();
    let folder = place.path();
    let out = folder.join("out");
    let pack = &writers()[0].args;
    let start = Instant::now();
    succeeded(run_in(folder, pack));
    let time = start.elapsed();
    let whole = fs::read(&out).unwrap();
    for round in 0..12u32 {
        fs::write(&out, "what was there").unwrap();
        let mut child = common::tier_plan()
            .current_dir(folder)
            .args(pack)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // From the start to past the end.
        std::thread::sleep(time * round / 10);
        child.kill().unwrap();
        child.wait().unwrap();
        let found = fs::read(&out).unwrap();
        assert!(found == b"what was there" || found.len() == whole.len());
    }
    succeeded(run_in(folder, pack));
    assert_eq!(temporaries(folder), Vec::<PathBuf>::new());
}

#[test]
fn what_a_live_process_writes_is_no_leftover() {
    let place = place();
    let folder = place.path();
    let live = Temporary::create(folder).unwrap();
    succeeded(run_in(folder, &writers()[0].args));
    assert_eq!(temporaries(folder), [live.path()]);
}

#[test]
fn a_pipe_gets_the_output_itself() {
    let place = place();
    let folder = place.path();
    let made = Command::new("mkfifo").arg(folder.join("pipe")).status();
    assert!(made.unwrap().success());
    let export = "export plan.toml --model demo.gguf --to llama.cpp -o";
    let to = |name: &str| format!("{export} {name}");
    let mut first = common::tier_plan()
        .current_dir(folder)
        .args(to("pipe").split(' '))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let script = fs::read_to_string(folder.join("pipe")).unwrap();
    assert!(first.wait().unwrap().success());
    succeeded(run_in(folder, &to("out").split(' ').collect::<Vec<_>>()));
    assert_eq!(script, fs::read_to_string(folder.join("out")).unwrap());
}

#[test]
fn unfinished_profiles_are_private_and_never_links() {
    let place = place();
    let folder = place.path();
    let profile = &writers()[3].args;
    let partial = folder.join("out.partial");
    fs::write(folder.join("precious"), "precious").unwrap();
    for restart in [&[][..], &["--restart".to_string()]] {
        symlink("precious", &partial).unwrap();
        let output = run_in(folder, &[profile, restart].concat());
        check_refusal(&output, &["out.partial", "this is a link", "remove it"]);
        assert_eq!(fs::read(folder.join("precious")).unwrap(), b"precious");
        fs::remove_file(&partial).unwrap();
    }
    // Opening a pipe would wait for a writer.
    let made = Command::new("mkfifo").arg(&partial).status().unwrap();
    assert!(made.success());
    check_refusal(
        &run_in(folder, profile),
        &["out.partial", "not a regular file"],
    );
}

#[test]
fn outputs_are_tried_before_any_work() {
    let place = place();
    let folder = place.path();
    fs::write(folder.join("file"), "").unwrap();
    for writer in writers() {
        for bad in ["/proc/out", "file/out"] {
            let args: Vec<&str> = writer.args.iter().map(String::as_str).collect();
            let args: Vec<&str> = args
                .into_iter()
                .map(|arg| if arg == "out" { bad } else { arg })
                .collect();
            let before = listing(folder);
            let output = run_in(folder, &args);
            check_refusal(&output, &[bad.strip_suffix("/out").unwrap()]);
            assert_eq!(stdout(&output), "", "{args:?}");
            assert_eq!(listing(folder), before, "{args:?}");
        }
    }
    let compare = "compare plan.toml -m demo.gguf --prompts prompts -n 2 --threads 1 -o /proc/out";
    let output = run_in(folder, &compare.split(' ').collect::<Vec<_>>());
    check_refusal(&output, &["/proc"]);
    assert!(!stderr(&output).contains("running"), "{}", stderr(&output));
    let probe = "probe --slow-dir /proc -o out";
    let start = Instant::now();
    check_refusal(
        &run_in(folder, &probe.split(' ').collect::<Vec<_>>()),
        &["/proc"],
    );
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn outputs_that_are_read_again_are_files() {
    let place = place();
    let folder = place.path();
    for line in [
        "pack demo.gguf -o /dev/null",
        "profile demo.gguf --prompts prompts -o /dev/stdout",
        "run demo.gguf -p x -n 1 --dram 42MiB --slots /dev/null",
    ] {
        let output = run_in(folder, &line.split(' ').collect::<Vec<_>>());
        check_refusal(&output, &["pipe or a device", "expected a file"]);
    }
    let export = "export plan.toml --model demo.gguf --to llama.cpp -o /dev/stdout";
    let output = succeeded(run_in(folder, &export.split(' ').collect::<Vec<_>>()));
    assert!(stdout(&output).starts_with("#!/bin/sh\n"));
}

/// A drive that is really full, where root may mount one.
#[test]
fn a_demo_on_a_full_drive_ends_in_words() {
    let place = place();
    // Full when the profile is written; at night, when the report is.
    let size = if is_nightly() { "1m" } else { "96k" };
    let script = format!(
        "mount -t tmpfs -o size={size} none small && cd small && \"$0\" demo; code=$?; ls -A; exit $code"
    );
    fs::create_dir(place.path().join("small")).unwrap();
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &script, env!("CARGO_BIN_EXE_tier-plan")])
        .current_dir(place.path())
        .output();
    let output = match output {
        Ok(output)
            if !stderr(&output).contains("unshare:") && !stderr(&output).contains("mount:") =>
        {
            output
        }
        _ => {
            eprintln!("skipped: no drive can be mounted here");
            return;
        }
    };
    let line = check_refusal(&output, &["No space left on device"]);
    assert!(
        !line.contains('{') && !line.contains(".tier-plan-"),
        "{line}"
    );
    assert!(!stdout(&output).contains(".partial"), "{}", stdout(&output));
}

#[test]
fn reads_that_fail_are_named_and_slow_ones_change_nothing() {
    let place = place();
    let folder = place.path();
    let run = "run demo.gguf -p x -n 6 --ctx 32 --threads 2 --temp 0";
    for memory in ["2GiB", "42MiB"] {
        let args: Vec<String> = format!("{run} --dram {memory}")
            .split(' ')
            .map(str::to_string)
            .collect();
        let expected = stdout(&succeeded(run_in(folder, &args)));
        for fault in ["read-short", "read-interrupted"] {
            let output = succeeded(with_fault(folder, fault, &args));
            assert_eq!(stdout(&output), expected, "{fault} with {memory}");
        }
        let output = with_fault(folder, "read-error", &args);
        // Weights that can't be copied to memory may stay mapped, where these reads do not fail.
        if memory == "2GiB" && output.status.success() {
            assert!(stderr(&output).contains("Input/output error"));
            assert_eq!(stdout(&output), expected);
        } else {
            check_refusal(&output, &["demo.gguf", "Input/output error"]);
        }
    }
}

#[test]
fn outputs_keep_the_mode_that_they_had() {
    let place = place();
    let folder = place.path();
    let solve = &writers()[2].args;
    fs::write(folder.join("out"), "what was there").unwrap();
    fs::set_permissions(folder.join("out"), fs::Permissions::from_mode(0o640)).unwrap();
    succeeded(run_in(folder, solve));
    let mode = fs::metadata(folder.join("out"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[test]
fn an_output_never_replaces_a_model() {
    let place = place();
    let folder = place.path();
    let before = fs::read(folder.join("demo.gguf")).unwrap();
    for writer in writers().into_iter().filter(|w| !w.folder) {
        let args: Vec<&str> = writer
            .args
            .iter()
            .map(|arg| if arg == "out" { "demo.gguf" } else { arg })
            .collect();
        check_refusal(&run_in(folder, &args), &["demo.gguf", "this is a model"]);
        assert_eq!(fs::read(folder.join("demo.gguf")).unwrap(), before);
    }
}
