//! Plans and profiles that do not fit.

use super::{Place, swap};
use std::fs;

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
        &swap(&plan, "version = 3", "version = 13"),
        &["newer.toml", "version 13", "up to version 12", "update"],
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
