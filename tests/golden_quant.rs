//! One small model in several tensor types against golden logits, with every instruction set of
//! this processor.

use crate::common::{self, root, stderr, stdout, succeeded, tier_plan};
use std::fs;
use std::process::Output;
use tier_plan_testing::{Golden, floats, nmse};

/// `None` where this processor lacks the instruction set, and the program says so.
fn on_isa(isa: &str, args: &[&str]) -> Option<Output> {
    let output = tier_plan()
        .current_dir(root())
        .env("TIER_PLAN_ISA", isa)
        .args(args)
        .output()
        .unwrap();
    if stderr(&output).contains("run on this processor") {
        assert_ne!(isa, "scalar", "every processor runs the plain kernels");
        common::check_refusal(&output, &["TIER_PLAN_ISA", isa, "scalar"]);
        return None;
    }
    Some(succeeded(output))
}

fn top(row: &[f32]) -> usize {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0
}

/// Checks one file on every instruction set; `bound` is of the NMSE.
fn check(name: &str, bound: f64, same_greedy: bool) {
    let golden = Golden::read(&format!("quant/{name}"));
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("logits");
    let model = format!("tests/data/quant/{name}.gguf");
    let tokens: Vec<String> = golden.tokens.iter().map(u32::to_string).collect();
    let tokens = tokens.join(",");
    for isa in ["scalar", "avx2", "avx512", "amx", "neon"] {
        let output_s = output.to_str().unwrap();
        let args = [
            "logits",
            &model,
            "--tokens",
            &tokens,
            "-o",
            output_s,
            "--greedy",
            "16",
            "--threads",
            "2",
        ];
        let Some(ran) = on_isa(isa, &args) else {
            continue;
        };
        let found = floats(&fs::read(&output).unwrap());
        assert_eq!(
            found.len(),
            golden.tokens.len() * golden.n_vocab,
            "{name} {isa}"
        );
        let error = nmse(&found, &golden.logits);
        assert!(error <= bound, "{name} {isa}: NMSE {error:.2e}");
        let rows = found
            .chunks_exact(golden.n_vocab)
            .zip(golden.logits.chunks_exact(golden.n_vocab));
        let agreed =
            rows.filter(|(a, b)| top(a) == top(b)).count() as f64 / golden.tokens.len() as f64;
        assert!(
            agreed >= 0.9,
            "{name} {isa}: the likeliest token agrees in {agreed:.3} of the rows"
        );
        let greedy: Vec<u32> = serde_json::from_str(&stdout(&ran)).unwrap();
        assert_eq!(greedy.len(), golden.greedy.len(), "{name} {isa}");
        assert!(
            !same_greedy || greedy == golden.greedy,
            "{name} {isa}: {greedy:?}"
        );
    }
}

#[test]
fn bf16() {
    // Weights and activations as they are: only the order of sums differs.
    check("BF16", 1e-9, true);
}

#[test]
fn q8_0() {
    check("Q8_0", 1e-2, false);
}

#[test]
fn q4_0() {
    check("Q4_0", 1e-2, false);
}

#[test]
fn q5_0() {
    check("Q5_0", 1e-2, false);
}

#[test]
fn q4_k_m() {
    check("Q4_K_M", 1e-2, false);
}

#[test]
fn q5_k_m() {
    check("Q5_K_M", 1e-2, false);
}

#[test]
fn q6_k() {
    check("Q6_K", 1e-2, false);
}

#[test]
fn q1_0() {
    check("Q1_0", 1e-2, false);
}

#[test]
fn q2_0() {
    check("Q2_0", 1e-2, false);
}

#[test]
fn tq1_0() {
    check("TQ1_0", 1e-2, false);
}

#[test]
fn tq2_0() {
    check("TQ2_0", 1e-2, false);
}

/// With a factor on each matrix and on each expert, in tensors beside them.
#[test]
fn nvfp4() {
    check("NVFP4", 1e-2, false);
}

#[test]
fn an_unknown_instruction_set_is_refused() {
    let args = [
        "logits",
        "tests/data/quant/Q4_0.gguf",
        "--tokens",
        "1",
        "-o",
        "/dev/null",
    ];
    let output = tier_plan()
        .current_dir(root())
        .env("TIER_PLAN_ISA", "sse9")
        .args(args)
        .output()
        .unwrap();
    common::check_refusal(
        &output,
        &["TIER_PLAN_ISA", "'sse9'", "scalar, avx2, avx512, amx"],
    );
    // Empty is as good as unset.
    let output = tier_plan()
        .current_dir(root())
        .env("TIER_PLAN_ISA", "")
        .args(args)
        .output()
        .unwrap();
    succeeded(output);
}
