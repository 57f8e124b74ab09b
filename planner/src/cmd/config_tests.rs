//! The configuration file: what it may say, what it does, and what wins over it.

use super::config_file::{Config, is_shared};
use super::environment::with_defaults;
use super::{Cli, Command, command};
use clap::FromArgMatches;
use std::ffi::OsString;
use std::path::Path;

fn config(text: &str) -> Config {
    parsed(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn parsed(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("c.toml"), &command()).map_err(|error| {
        let hint = crate::hint::hint_for(&error).unwrap_or_default();
        format!("{error:#} {hint}")
    })
}

/// Parses a line with a file, and with the variables of the tests' own environment.
fn line(text: &str, line: &str) -> Command {
    let words: Vec<OsString> = ["tier-plan"]
        .into_iter()
        .chain(line.split_whitespace())
        .map(Into::into)
        .collect();
    let command = with_defaults(command(), &config(text), &words);
    let matches = command
        .try_get_matches_from(words)
        .unwrap_or_else(|error| panic!("{line}: {error}"));
    Cli::from_arg_matches(&matches).unwrap().command
}

macro_rules! args {
    ($kind:ident, $text:expr, $line:expr) => {
        match line($text, $line) {
            Command::$kind(args) => args,
            other => panic!("{other:?}"),
        }
    };
}

#[test]
fn settings_are_defaults_and_the_line_wins() {
    let text = "memory = \"3GiB\"\nthreads = 0x3\ntemperature = 0.5\nkv-type = 'q8_0'\n\
                [run]\nthreads = 5\n[serve]\nport = 81\nparallel = 4\ncors = [\"a\", \"b\"]\n";
    let run = args!(Run, text, "run m");
    assert_eq!(run.memory.memory.as_deref(), Some("3GiB"));
    assert_eq!(
        run.compute.threads.threads,
        Some(5),
        "a table wins over the top"
    );
    assert_eq!(run.sampling.temperature, 0.5);
    assert_eq!(run.kv.kv_type.map(|ty| ty.name()), Some("q8_0"));
    let run = args!(Run, text, "run m -t 7 --memory 1GiB");
    assert_eq!(run.compute.threads.threads, Some(7));
    assert_eq!(run.memory.memory.as_deref(), Some("1GiB"));
    let serve = args!(Serve, text, "serve m");
    assert_eq!(
        (serve.port, serve.cors),
        (81, vec!["a".to_string(), "b".to_string()])
    );
    assert_eq!(serve.texts.compute.threads.threads, Some(3));
    let serve = args!(Serve, text, "serve m --cors c --port 82");
    assert_eq!((serve.port, serve.cors), (82, vec!["c".to_string()]));
}

#[test]
fn flags_are_set_and_left_out() {
    assert!(args!(Run, "mmap = true", "run m").memory.mmap);
    assert!(!args!(Run, "mmap = false", "run m").memory.mmap);
    assert!(
        !args!(Run, "mmap = true\n[run]\nmmap = false", "run m")
            .memory
            .mmap
    );
    let verify = |text| args!(Run, text, "run m").store.verify;
    assert_eq!(verify("verify = true").asked(), Some(None));
    assert_eq!(verify("verify = false").asked(), None);
    assert_eq!(
        verify("verify = 'a.sums'").asked(),
        Some(Some(Path::new("a.sums")))
    );
}

#[test]
fn a_setting_gives_way_to_a_line_that_excludes_it() {
    let run = args!(Run, "memory = '3GiB'", "run m --plan p");
    assert_eq!((run.memory.memory, run.memory.plan.is_some()), (None, true));
    let run = args!(Run, "memory = '3GiB'", "run m --mmap");
    assert!(run.memory.memory.is_none() && run.memory.mmap);
}

#[test]
fn required_options_may_come_from_the_file() {
    let solve = args!(Solve, "machine = 'm.toml'", "solve m");
    assert_eq!(solve.machine, Path::new("m.toml"));
}

#[test]
fn the_home_folder_of_paths_is_put_in() {
    let Some(home) = std::env::var_os("HOME") else {
        return;
    };
    let run = args!(Run, "cache-dir = '~/x'\nmemory = '~/x'", "run m");
    assert_eq!(run.kept.cache_dir, Some(Path::new(&home).join("x")));
    assert_eq!(run.memory.memory.as_deref(), Some("~/x"), "no path");
}

#[test]
fn mistakes_name_the_line_and_what_was_expected() {
    let refused = |text: &str, words: &[&str]| {
        let error = parsed(text).expect_err(text);
        for word in words {
            assert!(error.contains(word), "{word:?} in {error:?}");
        }
    };
    refused(
        "\nmemroy = 1",
        &[
            "c.toml:2: unknown key 'memroy', expected 'memory'",
            "tier-plan config",
        ],
    );
    refused(
        "kv_type = 'f16'",
        &["c.toml:1: unknown key 'kv_type', expected 'kv-type'"],
    );
    refused(
        "[serve]\n\nprot = 1",
        &["c.toml:3: unknown key 'prot' of [serve], expected 'port'"],
    );
    refused(
        "[srve]\nport = 1",
        &["c.toml:1: unknown key 'srve', expected 'serve'"],
    );
    refused("zzzzzzzzzzzz = 1", &["expected a setting"]);
    refused(
        "serve = 1",
        &["'serve' is a command, expected a table [serve]"],
    );
    refused("model = 'a'", &["'model' belongs to a single call"]);
    refused(
        "[run]\nprompt = 'a'",
        &["c.toml:2: 'prompt' belongs to a single call"],
    );
    refused(
        "output = 'x'",
        &["'output' means something else", "a table such as ["],
    );
    refused(
        "port = true",
        &["'port' is a boolean, expected a string or a number"],
    );
    refused(
        "mmap = 'yes'",
        &["'mmap' is a string, expected true or false"],
    );
    refused("memory = [1]", &["'memory' is a list, expected one value"]);
    refused(
        "memory = 1979-05-27",
        &["'memory' is a datetime, expected a string or a number"],
    );
    refused("threads = 99999999999999999999", &["c.toml:1: "]);
    refused(
        "threads = 'many'",
        &["c.toml:1: 'threads': expected a count"],
    );
    refused("kv-type = 'q3'", &["c.toml:1: 'kv-type': ", "q3"]);
    refused("[serve]\nhost = 'here'", &["c.toml:2: 'host': "]);
    refused("memory = ", &["c.toml:1: "]);
    refused("a = 1\na = 2", &["c.toml:"]);
    refused(
        "memory = '1GiB'\nmmap = true",
        &["c.toml:2: 'mmap' excludes 'memory' of line 1 in `tier-plan "],
    );
    assert!(parsed("memory = '1GiB'\nmmap = false").is_ok());
}

#[test]
fn an_empty_file_is_fine() {
    for text in ["", "# nothing\n", "[run]\n"] {
        assert!(config(text).entry("run", "memory").is_none(), "{text:?}");
    }
}

#[test]
fn what_differs_between_commands_is_not_shared() {
    assert!(is_shared("run", "memory") && is_shared("serve", "threads"));
    assert!(!is_shared("solve", "output") && !is_shared("serve", "parallel"));
    assert!(!is_shared("selftest", "gpu"));
}

/// Every option can be given to clap as a default, which panics over contradictory definitions.
#[test]
fn every_option_can_be_a_setting() {
    let command = command();
    for sub in command.get_subcommands() {
        for arg in super::config_file::settings(sub) {
            let value = match arg.get_action() {
                clap::ArgAction::SetTrue => "true".to_string(),
                _ => match arg.get_default_values().first() {
                    Some(value) => format!("'{}'", value.to_string_lossy()),
                    None => continue,
                },
            };
            let (name, long) = (sub.get_name(), arg.get_long().unwrap());
            let config = config(&format!("[{name}]\n{long} = {value}\n"));
            with_defaults(command.clone(), &config, &[]).debug_assert();
        }
    }
}
