//! Inputs of every kind on a drive that fails: the file is named. Reads that come short or are
//! interrupted change nothing.

use crate::common::{check_refusal, run_in, stdout, succeeded};
use crate::outputs::{place, with_fault};
use std::fs;
use std::path::Path;

/// Makes an input of every kind in a folder that [`place`] has filled. Their names begin with
/// `in.`, which the faults go by.
fn make_inputs(folder: &Path) {
    for (from, to) in [
        ("plan.toml", "in.plan.toml"),
        ("machine.toml", "in.machine.toml"),
        ("old.record.json", "in.record.json"),
        ("text.txt", "in.txt"),
    ] {
        fs::copy(folder.join(from), folder.join(to)).unwrap();
    }
    let run = "run demo.gguf -p x -n 4 --ctx 16 --threads 1";
    for line in [
        "checksum demo.gguf -o in.sums",
        "pack demo.gguf -o in.experts",
        &format!("{run} --dram 42MiB --slots in.slots.json"),
        "profile demo.gguf --prompts prompts --prompt-tokens 4 --decode-tokens 2 --threads 1 -o in.profile",
        "perplexity demo.gguf --file text.txt --ctx 8 --windows 1 --threads 1 --save-logits-base in.logits",
    ] {
        succeeded(run_in(folder, &line.split(' ').collect::<Vec<_>>()));
    }
}

/// An input, and a command that reads it.
fn readers() -> Vec<(&'static str, String)> {
    let run = "run demo.gguf -n 2 --threads 1 --temp 0";
    let solve = "solve demo.gguf --context 64 --strategy uniform -o out";
    [
        (
            "in.plan.toml",
            "explain in.plan.toml -m demo.gguf".to_string(),
        ),
        ("in.plan.toml", "diff in.plan.toml plan.toml".to_string()),
        ("in.plan.toml", format!("{run} -p x --plan in.plan.toml")),
        ("in.machine.toml", format!("{solve} -m in.machine.toml")),
        (
            "in.profile",
            format!("{solve} -m machine.toml -P in.profile"),
        ),
        ("in.profile", "inspect in.profile".to_string()),
        (
            "in.record.json",
            "compare in.record.json -o out".to_string(),
        ),
        ("in.txt", format!("{run} --file in.txt --ctx 400")),
        (
            "in.txt",
            "perplexity demo.gguf --file in.txt --ctx 8 --windows 1 --threads 1".to_string(),
        ),
        (
            "in.logits",
            "perplexity demo.gguf --logits-base in.logits --threads 1".to_string(),
        ),
        ("in.sums", format!("{run} -p x --verify=in.sums")),
        (
            "in.slots.json",
            format!("{run} -p x --dram 42MiB --slots in.slots.json"),
        ),
        (
            "in.experts",
            format!("{run} -p x --dram 42MiB --pack in.experts"),
        ),
    ]
    .into()
}

#[test]
fn inputs_that_cannot_be_read_are_named_and_slow_ones_change_nothing() {
    let place = place();
    let folder = place.path();
    make_inputs(folder);
    for (name, line) in readers() {
        let args: Vec<String> = line.split(' ').map(str::to_string).collect();
        let forget = || {
            let out = folder.join("out");
            let _ = fs::remove_file(&out).or_else(|_| fs::remove_dir_all(out));
        };
        let input = fs::read(folder.join(name)).unwrap();
        for fault in ["input-error", "input-breaks"] {
            let output = with_fault(folder, fault, &args);
            check_refusal(&output, &[name, "Input/output error"]);
            assert!(!folder.join("out").exists(), "{fault}: {line}");
            assert!(
                fs::read(folder.join(name)).unwrap() == input,
                "{fault}: {line}"
            );
        }
        let expected = stdout(&succeeded(run_in(folder, &args)));
        forget();
        for fault in ["input-interrupted", "input-short"] {
            fs::write(folder.join(name), &input).unwrap();
            let output = succeeded(with_fault(folder, fault, &args));
            // Other commands print times.
            if args[0] == "run" {
                assert_eq!(stdout(&output), expected, "{fault}: {line}");
            }
            forget();
        }
    }
}
