//! Input that cannot work: each is refused with exit code 1 and one line that names the thing, what
//! was expected and the mend, before any work, and with nothing written.

use crate::common::{self, demo_machine, demo_model, refused, root, run_in, stderr, succeeded};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A folder to run in, with short names for the bundled files.
struct Place {
    folder: TempDir,
    demo: String,
    machine: String,
    other: String,
}

impl Place {
    fn new() -> Self {
        let text = |path: PathBuf| path.to_str().unwrap().to_string();
        Self {
            folder: tempfile::tempdir().unwrap(),
            demo: text(demo_model()),
            machine: text(demo_machine()),
            other: text(root().join("tests/data/quant/Q4_0.gguf")),
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path().join(name), bytes).unwrap();
    }

    fn folder(&self, name: &str) {
        fs::create_dir_all(self.path().join(name)).unwrap();
    }

    fn refused(&self, args: &[&str], words: &[&str]) -> String {
        refused(self.path(), args, words)
    }

    /// A plan for the bundled model, made without a profile.
    fn plan(&self) -> String {
        let args = [
            "solve",
            &self.demo,
            "-m",
            &self.machine,
            "--strategy",
            "lru-only",
            "--context",
            "64",
        ];
        succeeded(run_in(
            self.path(),
            &[&args[..], &["-o", "plan.toml"]].concat(),
        ));
        fs::read_to_string(self.path().join("plan.toml")).unwrap()
    }

    /// One short prompt of each split.
    fn prompts(&self) {
        self.folder("prompts/a");
        self.write("prompts/a/train-1.txt", "In the beginning");
        self.write("prompts/a/heldout-1.txt", "And the earth was without form");
    }

    /// A profile of the bundled model.
    fn profile(&self) {
        self.prompts();
        let args = [
            "profile",
            &self.demo,
            "--prompts",
            "prompts",
            "-o",
            "demo.profile",
        ];
        succeeded(run_in(
            self.path(),
            &[&args[..], &["--prompt-tokens", "4", "--decode-tokens", "4"]].concat(),
        ));
    }
}

/// Replaces the first occurrence, which must be there.
fn swap(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} is not in {text}");
    text.replacen(from, to, 1)
}

/// Every place where `needle` begins.
fn places(bytes: &[u8], needle: &[u8]) -> Vec<usize> {
    bytes
        .windows(needle.len())
        .enumerate()
        .filter(|(_, w)| *w == needle)
        .map(|(at, _)| at)
        .collect()
}

#[test]
fn models_that_are_none() {
    let p = Place::new();
    let whole = fs::read(&p.demo).unwrap();
    p.folder("folder");
    p.write("empty.gguf", b"");
    p.write("text.gguf", b"hello world\n");
    p.write("zip.gguf", b"PK\x03\x04 and so on");
    p.write("page.gguf", b"<!DOCTYPE html><html>");
    p.write("magic.gguf", b"GGUF");
    p.write("header.gguf", &whole[..5000]);
    p.write("data.gguf", &whole[..9_000_000]);
    p.write("one-less.gguf", &whole[..whole.len() - 1]);
    let cases: [(&str, &[&str]); 10] = [
        ("nosuch.gguf", &["No such file"]),
        ("folder", &["folder", "name the .gguf file"]),
        ("empty.gguf", &["it is empty", "download"]),
        ("text.gguf", &["looks like text", "name a .gguf file"]),
        ("zip.gguf", &["ZIP archive", "convert"]),
        ("page.gguf", &["web page", "direct link"]),
        ("magic.gguf", &["cut short", "download it again"]),
        (
            "header.gguf",
            &["cut short", "5000 bytes", "download it again"],
        ),
        (
            "data.gguf",
            &["cut short", "9000000 bytes", "download it again"],
        ),
        (
            "one-less.gguf",
            &["1 bytes are missing", "download it again"],
        ),
    ];
    for (name, words) in cases {
        let words = [&[name], words].concat();
        p.refused(&["inspect", name], &words);
        p.refused(&["run", name, "-p", "a"], &words);
        p.refused(&["solve", name, "-m", &p.machine], &words);
        p.refused(&["profile", name], &words);
        p.refused(&["bench", name], &words);
        p.refused(&["tokenize", name, "a"], &words);
        p.refused(&["logits", name, "--tokens", "1", "-o", "l"], &words);
    }
    #[cfg(unix)]
    p.refused(
        &["inspect", "/dev/zero"],
        &["/dev/zero", "not a regular file"],
    );
}

#[test]
fn models_that_this_program_does_not_run() {
    let p = Place::new();
    let mut bytes = fs::read(&p.other).unwrap();
    for at in places(&bytes, b"qwen3moe") {
        bytes[at..at + 8].copy_from_slice(b"qwen9moe");
    }
    p.write("new.gguf", &bytes);
    p.refused(
        &["bench", "new.gguf"],
        &["new.gguf", "qwen9moe", "qwen3moe"],
    );
    p.refused(
        &["solve", "new.gguf", "-m", &p.machine],
        &["new.gguf", "qwen9moe"],
    );

    // A tensor's type follows its name, the number of dimensions and the dimensions.
    let mut bytes = fs::read(&p.other).unwrap();
    let name = b"blk.0.attn_q.weight";
    let at = places(&bytes, name)[0] + name.len();
    let n_dims = bytes[at] as usize;
    let ty = at + 4 + 8 * n_dims;
    bytes[ty..ty + 4].copy_from_slice(&35u32.to_le_bytes());
    p.write("ternary.gguf", &bytes);
    p.refused(
        &["bench", "ternary.gguf"],
        &[
            "ternary.gguf",
            "blk.0.attn_q.weight",
            "TQ2_0",
            "Q4_K",
            "choose another",
        ],
    );

    // A key that the architecture needs.
    let mut bytes = fs::read(&p.other).unwrap();
    let at = places(&bytes, b"qwen3moe.block_count")[0];
    bytes[at..at + 20].copy_from_slice(b"qwen3moe.block_xount");
    p.write("keyless.gguf", &bytes);
    p.refused(
        &["bench", "keyless.gguf"],
        &["keyless.gguf", "qwen3moe.block_count", "missing"],
    );
}

#[test]
fn a_model_without_a_tokenizer_takes_no_text() {
    let p = Place::new();
    p.prompts();
    let words = ["Q4_0.gguf", "no tokenizer", "logits --tokens"];
    p.refused(&["run", &p.other, "-p", "a"], &words);
    p.refused(&["tokenize", &p.other, "a"], &words);
    p.refused(
        &[
            "profile",
            &p.other,
            "--prompts",
            "prompts",
            "-o",
            "x.profile",
        ],
        &words,
    );
}

#[test]
fn plans_that_do_not_fit() {
    let p = Place::new();
    let plan = p.plan();
    p.refused(
        &["run", &p.other, "-p", "a", "--plan", "plan.toml"],
        &["plan.toml", "tier-plan demo", "fixture-qwen3moe"],
    );
    p.refused(
        &["bench", &p.other, "--plan", "plan.toml"],
        &["plan.toml", "tier-plan demo", "solve"],
    );
    let run = |name: &str, content: &str, words: &[&str]| {
        p.write(name, content);
        p.refused(&["run", &p.demo, "-p", "a", "--plan", name], words);
    };
    run(
        "newer.toml",
        &swap(&plan, "version = 3", "version = 7"),
        &["newer.toml", "version 7", "up to version 5", "update"],
    );
    run("cut.toml", &plan[..900], &["cut.toml", "line "]);
    run(
        "empty.toml",
        "",
        &["empty.toml", "not a placement plan", "tier-plan solve"],
    );
    let small = swap(&plan, "budget_bytes = 3145728", "budget_bytes = 100");
    run(
        "small.toml",
        &small,
        &["small.toml", "'vram'", "budget_bytes is 100"],
    );
    let long = swap(&plan, "context = 64", "context = 4096");
    run(
        "long.toml",
        &long,
        &[
            "has 196608 bytes",
            "take 12582912 with 4096 tokens of context",
            "solve",
        ],
    );
    let none = swap(&plan, "context = 64", "context = 0");
    run("none.toml", &none, &["context", "0"]);
    let odd = swap(&plan, "dense_bytes = ", "dense_bytes = 1");
    run("odd.toml", &odd, &["odd.toml"]);
    let larger = swap(&plan, "kv_type = \"f16\"", "kv_type = \"f32\"");
    run(
        "larger.toml",
        &larger,
        &[
            "has 196608 bytes",
            "take 393216 with 64 tokens of context",
            "KV cache of f32",
            "solve",
        ],
    );
    let smaller = swap(&plan, "kv_type = \"f16\"", "kv_type = \"q8_0\"");
    run(
        "smaller.toml",
        &smaller,
        &["has 196608 bytes", "KV cache of q8_0", "solve"],
    );
    let unknown = swap(&plan, "kv_type = \"f16\"", "kv_type = \"q4_0\"");
    run(
        "unknown.toml",
        &unknown,
        &["unknown.toml", "kv_type", "'q4_0'", "f16, q8_0, or f32"],
    );
    let other = [
        "run",
        &p.demo,
        "-p",
        "a",
        "--plan",
        "plan.toml",
        "--kv-type",
        "q8_0",
    ];
    p.refused(
        &other,
        &[
            "--kv-type: q8_0",
            "plan.toml",
            "f16",
            "solve again with --kv-type q8_0",
        ],
    );
    let misspelt = swap(&plan, "kv_tier", "kv_teer");
    run(
        "misspelt.toml",
        &misspelt,
        &["misspelt.toml", "kv_teer", "kv_tier"],
    );
    let machine = fs::read_to_string(&p.machine).unwrap();
    run(
        "machine.toml",
        &machine,
        &["machine.toml", "not a placement plan", "tier-plan machine"],
    );
    p.folder("folder.toml");
    p.refused(
        &["run", &p.demo, "-p", "a", "--plan", "folder.toml"],
        &["folder.toml", "directory"],
    );
    p.refused(
        &["run", &p.demo, "-p", "a", "--plan", &p.demo],
        &["demo.gguf", "GGUF model", "tier-plan solve"],
    );
    p.refused(
        &["run", &p.demo, "-p", "a", "--plan", "nosuch.toml"],
        &["nosuch.toml", "No such file"],
    );
}

#[test]
fn profiles_that_do_not_fit() {
    let p = Place::new();
    p.profile();
    let solve = |model: &str, profile: &str, words: &[&str]| {
        p.refused(
            &[
                "solve",
                model,
                "-m",
                &p.machine,
                "-p",
                profile,
                "--strategy",
                "lru-only",
            ],
            words,
        );
    };
    solve(
        &p.other,
        "demo.profile",
        &[
            "demo.profile",
            "tier-plan demo",
            "fixture-qwen3moe",
            "tier-plan profile",
        ],
    );
    let bytes = fs::read(p.path().join("demo.profile")).unwrap();
    p.write("cut.profile", &bytes[..bytes.len() / 2]);
    solve(
        &p.demo,
        "cut.profile",
        &["cut.profile", "cut short", "tier-plan profile"],
    );
    let mut damaged = bytes.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x10;
    p.write("damaged.profile", &damaged);
    solve(
        &p.demo,
        "damaged.profile",
        &["damaged.profile", "damaged", "tier-plan profile"],
    );
    solve(
        &p.demo,
        &p.machine,
        &["demo-emulated.toml", "not a profile"],
    );
    solve(
        &p.demo,
        &p.demo,
        &["demo.gguf", "not a profile", "GGUF model"],
    );
    solve(
        &p.demo,
        "nosuch.profile",
        &["nosuch.profile", "No such file"],
    );
    p.plan();
    let compare = ["compare", "plan.toml", "--model", &p.demo, "--profile"];
    p.refused(
        &[&compare[..], &["damaged.profile"]].concat(),
        &["damaged.profile", "damaged"],
    );
}

#[test]
fn profiling_that_cannot_end_is_not_begun() {
    let p = Place::new();
    p.prompts();
    p.folder("folder");
    p.folder("none");
    p.folder("bare/a");
    p.write("bare/a/train-1.txt", " \n");
    p.write("file", "");
    let profile = |args: &[&str], words: &[&str]| {
        let few = ["profile", &p.demo, "--decode-tokens", "2"];
        p.refused(&[&few[..], args].concat(), words);
    };
    let good = ["--prompts", "prompts", "--prompt-tokens", "2"];
    let with = |more: &[&'static str]| [&good[..], more].concat();
    profile(
        &with(&["-o", "folder"]),
        &["folder", "name a file inside it"],
    );
    profile(
        &with(&["-o", "no/x.profile"]),
        &["no/x.profile", "does not exist", "create it"],
    );
    profile(
        &with(&["-o", "file/x.profile"]),
        &["file/x.profile", "not a folder"],
    );
    profile(&with(&["-o", ".."]), &["..", "folder"]);
    profile(&with(&["--threads", "0"]), &["--threads: 0", "1 to 1024"]);
    profile(
        &with(&["--temperature", "1e9"]),
        &["--temperature: 1000000000", "to 100"],
    );
    profile(
        &["--prompts", "none", "-o", "x"],
        &["none", "one folder a domain"],
    );
    profile(
        &["--prompts", "nosuch", "-o", "x"],
        &["nosuch", "No such file"],
    );
    profile(
        &["--prompts", "file", "-o", "x"],
        &["file", "ot a directory"],
    );
    profile(
        &["--prompts", "bare", "-o", "x"],
        &["bare/a/train-1.txt", "no text"],
    );
    profile(
        &["--prompts", "prompts", "-o", "x", "--prompt-tokens", "0"],
        &["--prompt-tokens: 0", "1 or more"],
    );
    let most = [
        "--prompts",
        "prompts",
        "-o",
        "x",
        "--prompt-tokens",
        "4294967295",
    ];
    profile(&most, &["--prompt-tokens", "--decode-tokens", "fewer"]);
    p.write("prompts/a/train-2.txt", [0xff, 0xfe, 0]);
    profile(&with(&["-o", "x"]), &["prompts/a/train-2.txt", "UTF-8"]);
}

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
        &swap(&good, "version = 1", "version = 5"),
        &["version 5", "up to version 4", "update"],
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

#[test]
fn outputs_that_cannot_be_written() {
    let p = Place::new();
    p.plan();
    p.folder("folder");
    p.write("file", "");
    let solve = ["solve", &p.demo, "-m", &p.machine, "--strategy", "lru-only"];
    let run = ["run", &p.demo, "-p", "a", "-n", "2", "--record"];
    let logits = ["logits", &p.demo, "--tokens", "1", "-o"];
    for (place, words) in [
        ("folder", &["folder", "name a file inside it"][..]),
        ("no/x", &["no/x", "does not exist", "create it"]),
        ("file/x", &["file/x", "not a folder"]),
    ] {
        p.refused(&[&solve[..], &["-o", place]].concat(), words);
        let line = p.refused(&[&run[..], &[place]].concat(), words);
        assert!(!line.contains("planned"), "{line}");
        p.refused(&[&logits[..], &[place]].concat(), words);
    }
    p.refused(
        &[&solve[..], &["-o", "x", "--baselines", "file"]].concat(),
        &["file", "folder"],
    );
    p.refused(
        &[&solve[..], &["-o", "x", "--baselines", "file/plans"]].concat(),
        &["file/plans"],
    );
    let compare = [
        "compare",
        "plan.toml",
        "--model",
        &p.demo,
        "--tokens",
        "2",
        "-o",
    ];
    p.refused(
        &[&compare[..], &["file/report"]].concat(),
        &["file/report", "not a folder", "--output"],
    );
    p.refused(&[&compare[..], &["/"]].concat(), &["'/'", "reports/today"]);
    p.refused(&["demo", "-o", "folder"], &["folder exists", "--output"]);
    p.refused(&["demo", "-o", "file/x"], &["file/x"]);
}

#[test]
fn options_out_of_range() {
    let p = Place::new();
    p.plan();
    let run = |args: &[&str], words: &[&str]| {
        p.refused(&[&["run", &p.demo, "-p", "a text"], args].concat(), words);
    };
    run(&["--threads", "0"], &["--threads: 0", "1 to 1024"]);
    run(&["--threads", "1025"], &["--threads: 1025", "1 to 1024"]);
    run(
        &["--ctx", "4294967295"],
        &["no memory", "4294967295 tokens", "smaller --context"],
    );
    run(
        &["--ctx", "65", "--plan", "plan.toml"],
        &["--context: 65", "64 tokens", "plan.toml", "--context 65"],
    );
    run(&["--temperature=-1"], &["--temperature: -1", "expected 0"]);
    run(&["--temperature", "nan"], &["--temperature: NaN"]);
    run(&["--top-p", "0"], &["--top-p: 0", "more than 0"]);
    run(&["--top-p", "1.5"], &["--top-p: 1.5"]);
    run(&["--min-p", "2"], &["--min-p: 2", "0 (all tokens) to 1"]);
    run(
        &["--repeat-penalty", "0"],
        &["--repeat-penalty: 0", "no penalty"],
    );
    p.refused(
        &["bench", &p.demo, "-r", "0"],
        &["--repeat: 0", "1 or more"],
    );
    p.refused(
        &["bench", &p.demo, "-p", "0", "-n", "0"],
        &["something to measure"],
    );
    p.refused(
        &["bench", &p.demo, "-p", "4294967295", "-n", "1"],
        &["--n-prompt", "--n-gen", "fewer"],
    );
    p.refused(
        &["bench", &p.demo, "-p", "4294967294", "-n", "1"],
        &["no memory", "context"],
    );
    p.refused(
        &[
            "bench",
            &p.demo,
            "-p",
            "64",
            "-n",
            "1",
            "--plan",
            "plan.toml",
        ],
        &["64", "--context 65"],
    );
    p.refused(&["demo", "--tokens", "0"], &["--n-predict: 0", "1 or more"]);
}

#[test]
fn prompts_that_cannot_be_continued() {
    let p = Place::new();
    p.plan();
    p.write("empty.txt", "");
    p.write("bytes.txt", [0xff, 0xfe, 0xfd]);
    let long = "In the beginning God created the heaven and the earth. ".repeat(10);
    p.write("long.txt", &long);
    p.refused(
        &["run", &p.demo, "-p", ""],
        &["prompt is empty", "--prompt or --file"],
    );
    p.refused(&["run", &p.demo, "-f", "empty.txt"], &["prompt is empty"]);
    // Standard input, which is empty here.
    p.refused(&["run", &p.demo], &["prompt is empty"]);
    p.refused(&["run", &p.demo, "-f", "-"], &["prompt is empty"]);
    p.refused(
        &["run", &p.demo, "-f", "nosuch.txt"],
        &["nosuch.txt", "No such file"],
    );
    p.refused(
        &["run", &p.demo, "-f", "bytes.txt"],
        &["bytes.txt", "UTF-8"],
    );
    p.refused(
        &["run", &p.demo, "-f", "long.txt", "--ctx", "8"],
        &["context full", "8 available", "larger --context"],
    );
    let planned = ["run", &p.demo, "-f", "long.txt", "--plan", "plan.toml"];
    p.refused(
        &planned,
        &["context full", "64 available", "larger --context"],
    );
    p.refused(
        &[&planned[..], &["--json", "--record", "r.json"]].concat(),
        &["context full"],
    );
}

#[test]
fn texts_that_cannot_be_scored() {
    let p = Place::new();
    p.plan();
    p.folder("folder");
    p.write("empty.txt", "");
    p.write("bytes.txt", [0xff, 0xfe, 0xfd]);
    let text = "In the beginning God created the heaven and the earth. ".repeat(10);
    p.write("text.txt", &text);
    p.write("other.txt", text.replace("heaven", "sea"));
    let args = [
        "perplexity",
        &p.demo,
        "--file",
        "text.txt",
        "--ctx",
        "16",
        "--windows",
        "2",
    ];
    succeeded(run_in(
        p.path(),
        &[&args[..], &["--save-logits-base", "base.logprobs"]].concat(),
    ));
    let score = |args: &[&str], words: &[&str]| {
        p.refused(&[&["perplexity", &p.demo], args].concat(), words);
    };
    score(&["--file", "nosuch.txt"], &["nosuch.txt", "No such file"]);
    score(&["--file", "bytes.txt"], &["bytes.txt", "UTF-8"]);
    score(&["--file", "empty.txt"], &["0 tokens", "longer text"]);
    score(
        &["--file", "text.txt"],
        &["one window of 512", "smaller --context"],
    );
    score(
        &["--file", "text.txt", "--ctx", "0"],
        &["--context: 0", "4 or more"],
    );
    score(
        &["--file", "text.txt", "--windows", "0"],
        &["--windows: 0", "1 or more"],
    );
    score(
        &["--file", "text.txt", "--ctx", "128", "--plan", "plan.toml"],
        &["--context: 128", "64 tokens", "--context 128"],
    );
    let save = ["--file", "text.txt", "--ctx", "16", "--save-logits-base"];
    score(
        &[&save[..], &["folder"]].concat(),
        &["folder", "name a file inside it"],
    );
    score(&[&save[..], &["no/x"]].concat(), &["no/x", "create it"]);
    let base = fs::read(p.path().join("base.logprobs")).unwrap();
    p.write("cut.logprobs", &base[..base.len() / 2]);
    score(
        &["--logits-base", "cut.logprobs"],
        &["cut.logprobs", "cut short", "tier-plan perplexity"],
    );
    score(
        &["--logits-base", &p.machine],
        &["demo-emulated.toml", "tier-plan perplexity"],
    );
    score(
        &["--logits-base", "base.logprobs", "--ctx", "8"],
        &["--context: 8", "16 tokens"],
    );
    let other = ["--logits-base", "base.logprobs", "--file", "other.txt"];
    score(&other, &["base.logprobs", "differs", "leave --file out"]);
    p.refused(
        &["perplexity", &p.other, "--logits-base", "base.logprobs"],
        &["4096", "96"],
    );
    p.refused(
        &["perplexity", &p.other, "--file", "text.txt", "--ctx", "16"],
        &["Q4_0.gguf", "no tokenizer"],
    );
}

#[test]
fn conversations_that_cannot_begin() {
    let p = Place::new();
    p.plan();
    p.write("open.jinja", "{{ messages");
    let chat = |args: &[&str], words: &[&str]| {
        p.refused(&[&["run", &p.demo, "--chat"], args].concat(), words);
    };
    chat(&["-n", "0"], &["--n-predict: 0", "1 or more"]);
    chat(&["--ctx", "1"], &["one token", "larger --context"]);
    chat(
        &["--ctx", "1", "--plan", "plan.toml"],
        &["one token", "larger --context"],
    );
    chat(&["--threads", "0"], &["--threads: 0"]);
    chat(&["--temperature", "nan"], &["--temperature: NaN"]);
    chat(
        &["--chat-template", "nosuch.jinja"],
        &["nosuch.jinja", "No such file"],
    );
    chat(
        &["--chat-template", "open.jinja"],
        &["template", "line 1", "--chat-template FILE"],
    );
    chat(&["--tokenizer-pre", "nosuch"], &["'nosuch'", "qwen2"]);
    p.refused(&["run", &p.other, "--chat"], &["Q4_0.gguf", "no tokenizer"]);
}

#[test]
fn tokens_that_are_none() {
    let p = Place::new();
    p.plan();
    let logits = |args: &[&str], words: &[&str]| {
        p.refused(&[&["logits", &p.demo, "-o", "l"], args].concat(), words);
    };
    logits(&["--tokens", "1,4096"], &["token 4096", "0 to 4095"]);
    logits(
        &["--tokens", "4294967295"],
        &["token 4294967295", "0 to 4095"],
    );
    logits(
        &["--tokens", "1", "--greedy", "4294967295"],
        &["--greedy", "fewer"],
    );
    logits(
        &[
            "--tokens",
            "1",
            "--greedy",
            "64",
            "--plan",
            "plan.toml",
            "--threads",
            "0",
        ],
        &["--threads: 0"],
    );
    logits(
        &["--tokens", "1", "--greedy", "65", "--plan", "plan.toml"],
        &["--greedy", "at most 64", "--context 66"],
    );
}

#[test]
fn comparisons_of_what_cannot_be_compared() {
    let p = Place::new();
    let plan = p.plan();
    p.prompts();
    p.folder("untried/a");
    p.write("untried/a/train-1.txt", "text");
    p.write("object.json", "{}");
    p.write("cut.json", "[1");
    succeeded(run_in(
        p.path(),
        &["run", &p.demo, "-p", "a", "-n", "2", "--record", "r.json"],
    ));
    let record = fs::read_to_string(p.path().join("r.json")).unwrap();
    p.write(
        "newer.json",
        swap(&record, "\"version\": 1", "\"version\": 9"),
    );
    p.write("cut-record.json", &record[..record.len() / 2]);
    p.write("plan.other", &plan);
    let compare = |args: &[&str], words: &[&str]| {
        p.refused(&[&["compare", "-o", "report"], args].concat(), words);
    };
    compare(&["plan.toml"], &["--model FILE"]);
    compare(
        &["plan.toml", "--model", &p.other],
        &["plan.toml", "tier-plan demo", "fixture-qwen3moe"],
    );
    compare(
        &["plan.toml", "--model", &p.demo, "--tokens", "0"],
        &["--n-predict: 0", "1 or more"],
    );
    compare(
        &["plan.toml", "--model", &p.demo],
        &["--n-predict: 64", "fewer than 64"],
    );
    let tried = ["plan.toml", "--model", &p.demo, "--tokens", "2"];
    let trial = |args: &[&str], words: &[&str]| compare(&[&tried[..], args].concat(), words);
    trial(&["--threads", "0"], &["--threads: 0", "1 to 1024"]);
    trial(&["--prompts", "untried"], &["untried", "heldout*.txt"]);
    trial(&["--prompts", "nosuch"], &["nosuch", "No such file"]);
    compare(&["plan.other"], &["plan.other", "(.toml)", "(.json)"]);
    compare(
        &[&p.machine, "--model", &p.demo],
        &["demo-emulated.toml", "not a placement plan"],
    );
    compare(
        &["object.json"],
        &["object.json", "not a run record", "tier-plan run"],
    );
    compare(&["cut.json"], &["cut.json", "not a run record"]);
    compare(&["cut-record.json"], &["cut-record.json", "line "]);
    compare(
        &["newer.json"],
        &["newer.json", "version 9", "up to version 2", "update"],
    );
    compare(&["nosuch.json"], &["nosuch.json", "No such file"]);
    compare(&["r.json", "nosuch.toml"], &["nosuch.toml", "No such file"]);
}

/// What the command line itself cannot be is clap's to refuse: exit code 2, and how to ask for
/// help.
#[test]
fn lines_that_are_no_commands() {
    let p = Place::new();
    let lines: [&[&str]; 6] = [
        &["solve", &p.demo],
        &["run", &p.demo, "--no-such-option"],
        &["run", &p.demo, "-p", "a", "-f", "b"],
        &["logits", &p.demo, "-o", "x", "--tokens", "1,x"],
        &["run", &p.demo, "-n", "-2"],
        &["nosuch"],
    ];
    for line in lines {
        let output = run_in(p.path(), line);
        assert_eq!(output.status.code(), Some(2), "{line:?}");
        assert!(
            stderr(&output).starts_with("error: ") && stderr(&output).contains("--help"),
            "{}",
            stderr(&output)
        );
    }
    assert!(common::listing(p.path()).is_empty());
}

/// Variables are defaults of options: the command line wins, and empty variables count as unset.
#[test]
fn environment_variables_set_defaults() {
    let p = Place::new();
    let inspect = |variables: &[(&str, &str)], args: &[&str]| {
        let mut command = common::tier_plan();
        command
            .current_dir(p.path())
            .envs(variables.iter().copied())
            .arg("inspect")
            .args(args);
        command.output().unwrap()
    };
    let model = ("TIER_PLAN_MODEL", p.demo.as_str());
    let value = common::json(inspect(&[model, ("TIER_PLAN_JSON", "true")], &[]));
    assert_eq!(
        value["arch"],
        common::json(inspect(&[], &[&p.demo, "--json"]))["arch"]
    );
    for off in ["0", "false", ""] {
        let said = common::stdout(&succeeded(inspect(&[model, ("TIER_PLAN_JSON", off)], &[])));
        assert!(!said.starts_with('{'), "{off}: {said}");
    }
    // The argument conflicts with --model, and wins.
    common::json(inspect(
        &[("TIER_PLAN_MODEL", "none.gguf")],
        &[&p.demo, "--json"],
    ));
    common::check_refusal(
        &inspect(&[("TIER_PLAN_MODEL", "none.gguf")], &[]),
        &["none.gguf"],
    );
    assert_eq!(
        inspect(&[model, ("TIER_PLAN_JSON", "maybe")], &[])
            .status
            .code(),
        Some(2)
    );
}
