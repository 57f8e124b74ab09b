//! Spellings of options: old and new ones, llama.cpp's, and the environment variables.

use super::environment::variable;
use super::{Command, command, parse_alone};
use std::collections::BTreeMap;

fn parse(line: &str) -> Result<Command, clap::Error> {
    parse_alone(
        ["tier-plan"]
            .into_iter()
            .chain(line.split_whitespace())
            .map(Into::into),
    )
}

fn parsed(line: &str) -> String {
    parse(line).map_or_else(
        |error| panic!("{line}: {error}"),
        |command| format!("{command:?}"),
    )
}

#[test]
fn clap_accepts_the_definitions() {
    command().debug_assert();
}

/// Lines that must mean the same: the current spelling, then older ones and llama.cpp's.
const SPELLINGS: &[&[&str]] = &[
    &[
        "run m --context 9",
        "run m --ctx 9",
        "run m -c 9",
        "run m --ctx-size 9",
    ],
    &["run m --memory 1GiB", "run m --dram 1GiB"],
    &[
        "run m --n-predict 9",
        "run m --tokens 9",
        "run m -n 9",
        "run m --predict 9",
    ],
    &["run m --prompt a", "run m -p a"],
    &["run m --file a", "run m -f a"],
    &["run m --temperature 0.5", "run m --temp 0.5"],
    &["run m --seed 3", "run m -s 3"],
    &["run m --threads 3", "run m -t 3"],
    &["run m --profile a", "run m -P a"],
    &["run m --chat", "run m --conversation"],
    &["run m --system a", "run m --system-prompt a"],
    &["run m --chat-template a", "run m --chat-template-file a"],
    &["run -m m", "run --model m"],
    &[
        "run m --cache-type-k q8_0 --cache-type-v q8_0",
        "run m -ctk q8_0 -ctv q8_0",
    ],
    &["bench m --n-prompt 9", "bench m -p 9", "bench m --prompt 9"],
    &[
        "bench m --n-gen 9",
        "bench m -n 9",
        "bench m --tokens 9",
        "bench m --n-predict 9",
    ],
    &[
        "bench m --repeat 9",
        "bench m -r 9",
        "bench m --repetitions 9",
    ],
    &["bench m --memory 1GiB", "bench m --dram 1GiB"],
    &[
        "perplexity m -f t --context 9",
        "perplexity m -f t --ctx 9",
        "perplexity m -f t -c 9",
    ],
    &[
        "perplexity m -f t --windows 9",
        "perplexity m -f t --chunks 9",
    ],
    &["profile m --temperature 1", "profile m --temp 1"],
    &["solve m --machine a", "solve m -M a", "solve m -m a"],
    &[
        "solve m -M a --profile b",
        "solve m -M a -P b",
        "solve m -M a -p b",
    ],
    &[
        "solve m -M a --context 9",
        "solve m -M a -c 9",
        "solve m -M a --ctx 9",
    ],
    &[
        "solve m -M a --budget x=1 --budget y=2",
        "solve m -M a -b x=1 -b y=2",
        "solve m -M a -b x=1,y=2",
    ],
    &[
        "what-if --model m --machine a",
        "what-if --model m -M a",
        "what-if --model m -m a",
    ],
    &[
        "what-if m -M a --profile b",
        "what-if m -M a -P b",
        "what-if m -M a -p b",
    ],
    &[
        "explain a --model m --profile b",
        "explain a -m m -P b",
        "explain a -m m -p b",
    ],
    &[
        "export a --to vllm --model m --profile b",
        "export a --to vllm -m m -P b",
        "export a --to vllm -m m -p b",
    ],
    &["pack m --profile b", "pack m -P b", "pack m -p b"],
    &[
        "calibrate r --machine a",
        "calibrate r -M a",
        "calibrate r -m a",
    ],
    &[
        "compare a --n-predict 9",
        "compare a --tokens 9",
        "compare a -n 9",
    ],
    &["compare a --model m --profile b", "compare a -m m -P b"],
    &["demo --n-predict 9", "demo --tokens 9", "demo -n 9"],
    &["probe --model m", "probe -m m"],
];

#[test]
fn every_spelling_means_the_same() {
    for spellings in SPELLINGS {
        let [current, others @ ..] = spellings else {
            panic!("an empty row")
        };
        let expected = parsed(current);
        others
            .iter()
            .for_each(|other| assert_eq!(parsed(other), expected, "{other}"));
    }
}

#[test]
fn the_model_is_an_argument_or_an_option() {
    let model = |line: &str| match parse(line).unwrap() {
        Command::Run(args) => args.model.path().unwrap().to_path_buf(),
        Command::Bench(args) => args.model.path().unwrap().to_path_buf(),
        Command::Solve(args) => args.model.path().unwrap().to_path_buf(),
        Command::WhatIf(args) => args.model.path().unwrap().to_path_buf(),
        other => panic!("{other:?}"),
    };
    for line in [
        "run a",
        "run -m a",
        "bench a",
        "bench --model a",
        "solve a -m x",
        "solve --model a -M x",
    ] {
        assert_eq!(model(line).to_str(), Some("a"), "{line}");
    }
    assert_eq!(model("what-if a -m x").to_str(), Some("a"));
    for line in ["run", "run a -m a", "solve -M x", "explain p"] {
        assert!(parse(line).is_err(), "{line}");
    }
}

#[test]
fn tokenize_takes_model_and_text_either_way() {
    for line in [
        "m a",
        "m --ids a",
        "-m m a",
        "-m m -p a",
        "m -p a",
        "--model m --prompt a",
    ] {
        let Command::Tokenize(args) = parse(&format!("tokenize {line}")).unwrap() else {
            panic!()
        };
        let (model, text) = args.inputs().unwrap();
        assert_eq!((model.to_str(), text), (Some("m"), "a"), "{line}");
    }
    let Command::Tokenize(args) = parse("tokenize m").unwrap() else {
        panic!()
    };
    assert!(args.inputs().is_err());
}

#[test]
fn minus_one_is_unlimited_or_random() {
    use super::args::TokenLimit;
    let Command::Run(args) = parse("run m -n -1 --seed -1 --repeat-last-n -1 --temp -1").unwrap()
    else {
        panic!()
    };
    assert_eq!(args.n_predict, Some(TokenLimit::Unlimited));
    assert_eq!(args.sampling.seed, super::args::Seed::Random);
    assert_eq!(args.sampling.repeat_last_n.0, usize::MAX);
    assert_eq!(args.sampling.temperature, -1.0);
    for line in [
        "run m -n -2",
        "run m --seed -2",
        "run m -c -1",
        "run m --repeat-last-n -2",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
}

#[test]
fn keys_and_values_have_one_type() {
    let kv_type = |line: &str| {
        let Command::Run(args) = parse(line).unwrap() else {
            panic!()
        };
        args.kv
            .checked()
            .map(|ty| ty.map(|ty| ty.name()))
            .map_err(|error| {
                format!(
                    "{error:#} {}",
                    crate::hint::hint_for(&error).unwrap_or_default()
                )
            })
    };
    assert_eq!(kv_type("run m"), Ok(None));
    assert_eq!(kv_type("run m --kv-type q8_0"), Ok(Some("q8_0")));
    assert_eq!(kv_type("run m -ctk q8_0 -ctv q8_0"), Ok(Some("q8_0")));
    assert_eq!(kv_type("run m -ctk f16"), Ok(Some("f16")));
    let mixed = kv_type("run m -ctk q8_0").unwrap_err();
    assert!(
        mixed.contains("q8_0 for keys and f16 for values") && mixed.contains("--kv-type q8_0"),
        "{mixed}"
    );
}

/// A variable that two commands share must be one option with one meaning, so with one kind of
/// value.
#[test]
fn shared_variables_are_of_shared_options() {
    let mut kinds: BTreeMap<String, (String, String)> = BTreeMap::new();
    for sub in command().get_subcommands() {
        let options = sub
            .get_arguments()
            .filter_map(|arg| Some((arg, arg.get_long()?)));
        for (arg, long) in options {
            let name = variable(sub.get_name(), long);
            let kind = format!("{long} {:?}", arg.get_value_parser());
            let (first, expected) = kinds
                .entry(name.clone())
                .or_insert((sub.get_name().into(), kind.clone()));
            assert_eq!(kind, *expected, "{name} of {first} and {}", sub.get_name());
        }
    }
    // Variables with meanings of their own.
    for taken in [
        "CONFIG",
        "ISA",
        "IO",
        "NVRTC",
        "SHIM",
        "BENCH_MODEL",
        "SOAK_S",
        "SOAK_MODEL",
    ] {
        assert!(
            !kinds.contains_key(&format!("TIER_PLAN_{taken}")),
            "{taken}"
        );
    }
    for expected in [
        "TIER_PLAN_MEMORY",
        "TIER_PLAN_CONTEXT",
        "TIER_PLAN_SOLVE_OUTPUT",
        "TIER_PLAN_SELFTEST_MODEL",
    ] {
        assert!(kinds.contains_key(expected), "{expected}");
    }
}

#[test]
fn help_shows_examples_exit_codes_and_headings() {
    for sub in command().get_subcommands_mut() {
        let help = sub.render_long_help().to_string();
        assert!(
            help.contains("Example:\n") && help.contains("Exit codes:\n"),
            "{}",
            sub.get_name()
        );
    }
    let help = command()
        .find_subcommand_mut("run")
        .unwrap()
        .render_long_help()
        .to_string();
    for heading in [
        "Model:",
        "Generation:",
        "Chat:",
        "Sampling:",
        "Memory:",
        "Storage:",
        "Compute:",
        "Output:",
    ] {
        assert!(
            help.contains(&format!("\n{heading}\n")),
            "{heading}: {help}"
        );
    }
}
