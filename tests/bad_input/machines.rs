//! Machine files and budgets that make no sense.

use super::{Place, swap};
use std::fs;

#[test]
fn machine_files_that_make_no_sense() {
    let p = Place::new();
    let good = fs::read_to_string(&p.machine).unwrap();
    let solve = |name: &str, content: &str, words: &[&str]| {
        p.write(name, content);
        p.refused(
            &["solve", &p.demo, "-m", name, "--strategy", "lru-only"],
            &[&[name], words].concat(),
        );
    };
    let head = "format = \"tier-plan machine\"\nversion = 1\n";
    solve("bare.toml", head, &["missing", "name"]);
    solve("text.toml", "hello", &["not a machine file"]);
    solve(
        "newer.toml",
        &swap(&good, "version = 1", "version = 8"),
        &["version 8", "up to version 7", "update"],
    );
    solve(
        "lacks.toml",
        &swap(&good, "read_gbps = 8\n", ""),
        &["read_gbps"],
    );
    solve(
        "words.toml",
        &swap(&good, "read_gbps = 8\n", "read_gbps = \"fast\"\n"),
        &["line 14", "fast"],
    );
    solve(
        "below.toml",
        &swap(&good, "read_gbps = 8\n", "read_gbps = -8\n"),
        &["'vram'", "-8", "positive"],
    );
    solve(
        "nan.toml",
        &swap(&good, "read_gbps = 8\n", "read_gbps = nan\n"),
        &["'vram'", "positive"],
    );
    solve(
        "typo.toml",
        &swap(&good, "read_gbps = 8\n", "read_gpbs = 8\n"),
        &["read_gpbs", "read_gbps"],
    );
    solve(
        "kind.toml",
        &swap(&good, "kind = \"vram\"", "kind = \"sram\""),
        &["sram", "vram"],
    );
    solve(
        "size.toml",
        &swap(&good, "\"3MiB\"", "\"much\""),
        &["much", "3.4GiB"],
    );
    solve(
        "twice.toml",
        &swap(&good, "name = \"dram\"", "name = \"vram\""),
        &["vram"],
    );
    solve(
        "tierless.toml",
        good.split("[[tier]]").next().unwrap(),
        &["tier"],
    );
    p.refused(
        &["solve", &p.demo, "-m", "nosuch.toml"],
        &["nosuch.toml", "No such file"],
    );
    p.refused(
        &["solve", &p.demo, "-m", &p.demo],
        &["demo.gguf", "not a machine file", "GGUF"],
    );
}

#[test]
fn budgets_that_cannot_hold() {
    let p = Place::new();
    let solve = |args: &[&str], words: &[&str]| {
        p.refused(
            &[&["solve", &p.demo, "-m", &p.machine], args].concat(),
            words,
        );
    };
    solve(
        &["--dram", "1KiB"],
        &[
            "'dram'",
            "1.00 KiB",
            "experts in flight",
            "raise the budget of 'dram' by",
        ],
    );
    solve(
        &["--vram", "0", "--dram", "400KiB"],
        &["'dram'", "1024 tokens", "or give --context 28"],
    );
    solve(
        &["--vram", "0", "--dram", "2MiB", "--context", "16"],
        &["dense tensors", "raise the budget of 'dram' by"],
    );
    solve(
        &["-b", "slow=1MiB"],
        &["the weights", "raise the budget of 'slow' by"],
    );
    solve(&["-b", "nonsense"], &["--budget nonsense", "TIER=SIZE"]);
    solve(
        &["-b", "dram="],
        &["--budget dram=", "not a size", "3.4GiB"],
    );
    solve(&["-b", "dram=-3"], &["'-3' is not a size"]);
    solve(&["-b", "dram=99999999999999TiB"], &["not a size"]);
    solve(&["-b", "=3"], &["no tier ''", "vram, dram, slow"]);
    solve(&["-b", "gpu=1GiB"], &["no tier 'gpu'", "vram, dram, slow"]);
    solve(&["--vram", "1GiB"], &["--vram 1GiB", "holds 3.00 MiB"]);
    solve(
        &["-b", "dram=1MiB", "--dram", "1MiB"],
        &["--dram 1MiB", "expected one"],
    );
    solve(
        &["--context", "4294967295"],
        &["4294967295 tokens", "give --context"],
    );
    solve(&["--time-limit=-1"], &["--time-limit -1", "between 0"]);
    solve(&["--time-limit", "nan"], &["--time-limit NaN"]);
    solve(&["--time-limit", "1e300"], &["--time-limit", "million"]);
}
