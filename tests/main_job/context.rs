//! Tokens that are counted, a shorter context, and the KV cache under a plan.

use super::*;

/// Prompts whose last batch, or whole, is one token: that is still a prompt.
#[test]
fn prompt_and_decoded_tokens_are_told_apart() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let model = demo_model();
    let model = model.to_str().unwrap();
    let tokens = |text: &str| {
        json(run_in(folder, &["tokenize", model, text, "--ids"]))
            .as_array()
            .unwrap()
            .len()
    };
    let words = |n: usize| "word ".repeat(n);
    // One more than a batch of prompt processing.
    let long = words(513 - (tokens(&words(400)) - 400));
    for (text, n) in [("a", 1), ("a text", tokens("a text")), (&long, 513)] {
        assert_eq!(tokens(text), n);
        let record = json(run_in(
            folder,
            &[
                "run",
                model,
                "-p",
                text,
                "-n",
                "4",
                "--ignore-eos",
                "--json",
            ],
        ));
        assert_eq!(record["prompt_tokens"], n, "{record:#}");
        assert_eq!(
            record["decode_tokens"], 3,
            "the fourth is drawn and not taken in"
        );
        for layer in record["layers"].as_array().unwrap() {
            let accesses: u64 = ["pinned_hits", "slot_hits", "misses"]
                .iter()
                .map(|k| layer[*k].as_u64().unwrap())
                .sum();
            assert_eq!(accesses, 3 * 4, "{layer:#}");
        }
    }
    let list = ["bench", model, "-p", "0", "-n", "3", "-r", "1", "--json"];
    let speed = json(run_in(folder, &list));
    assert_eq!(speed["prompt_tok_s"], 0.0);
    assert!(
        speed["decode_tok_s"]
            .as_f64()
            .is_some_and(|rate| rate > 0.0)
    );
}

#[test]
fn a_shorter_context_holds_under_a_plan() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let (model, machine) = (demo_model(), demo_machine());
    let (model, machine) = (model.to_str().unwrap(), machine.to_str().unwrap());
    succeeded(run_in(
        folder,
        &[
            "solve",
            model,
            "-m",
            machine,
            "--strategy",
            "lru-only",
            "--context",
            "64",
        ],
    ));
    let list = [
        "run",
        model,
        "--plan",
        "placement.toml",
        "-p",
        PROMPT,
        "-n",
        "50",
        "--ignore-eos",
        "--json",
    ];
    let long = json(run_in(folder, &list));
    let short = json(run_in(folder, &[&list[..], &["--ctx", "16"]].concat()));
    let ids = |value: &Value| value["output"].as_array().unwrap().clone();
    let prompt = short["prompt_tokens"].as_u64().unwrap() as usize;
    assert_eq!(ids(&long).len(), 50);
    // One more than there is room for: the last one is drawn, but not taken in.
    assert_eq!(ids(&short).len(), 16 - prompt + 1);
    assert_eq!(ids(&short)[..], ids(&long)[..ids(&short).len()]);
    assert_eq!(
        short["tiers"][1]["planned_bytes"],
        short["tiers"][1]["resident_bytes"]
    );
}

#[test]
fn keys_and_values_take_the_bytes_that_were_planned() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path();
    let (model, machine) = (demo_model(), demo_machine());
    let (model, machine) = (model.to_str().unwrap(), machine.to_str().unwrap());
    let inspected = json(run_in(folder, &["inspect", model, "--json"]));
    let number = |key: &str| inspected[key].as_u64().unwrap();
    let bytes = [
        number("kv_bytes_per_token"),
        number("kv_q8_0_bytes_per_token"),
        2 * number("kv_bytes_per_token"),
    ];
    assert!(
        10 * bytes[1] < 6 * bytes[0],
        "{bytes:?}: eight bits and their scales are little more than half"
    );
    for (kv_type, bytes) in ["f16", "q8_0", "f32"].into_iter().zip(bytes) {
        let solve = [
            "solve",
            model,
            "-m",
            machine,
            "--strategy",
            "lru-only",
            "--context",
            "64",
        ];
        succeeded(run_in(
            folder,
            &[&solve[..], &["--kv-type", kv_type, "-o", "plan.toml"]].concat(),
        ));
        let plan = read_toml(&folder.join("plan.toml"));
        assert_eq!(plan["kv_type"].as_str(), Some(kv_type));
        let planned: i64 = plan["tier"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["kv_bytes"].as_integer().unwrap())
            .sum();
        assert_eq!(planned as u64, 64 * bytes, "{kv_type}");
        // With a plan its own type, without one the type that is asked for: the same text.
        let with = run(folder, model, Some(&folder.join("plan.toml")), "with.json");
        let list = [
            "run",
            model,
            "-p",
            PROMPT,
            "-n",
            "24",
            "--threads",
            "2",
            "--json",
            "--kv-type",
            kv_type,
        ];
        let without = json(run_in(folder, &list));
        assert_eq!(with["output"], without["output"], "{kv_type}");
        let list = [
            "bench",
            model,
            "--plan",
            "plan.toml",
            "--kv-type",
            kv_type,
            "-p",
            "4",
            "-n",
            "2",
            "-r",
            "1",
        ];
        assert_eq!(
            json(run_in(folder, &[&list[..], &["--json"]].concat()))["kv_type"],
            kv_type
        );
        let held = without["tiers"][0]["resident_bytes"].as_u64().unwrap();
        assert_eq!(
            held,
            number("weight_bytes") + number("context").min(4096) * bytes,
            "{kv_type}"
        );
    }
}
