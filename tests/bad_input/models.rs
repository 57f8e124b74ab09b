//! Models that are none, or that this program does not run.

use super::{Place, places};
use std::fs;

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
    bytes[ty..ty + 4].copy_from_slice(&139u32.to_le_bytes());
    p.write("foreign.gguf", &bytes);
    p.refused(
        &["bench", "foreign.gguf"],
        &[
            "foreign.gguf",
            "blk.0.attn_q.weight",
            "IQ4_K of ik_llama.cpp",
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
