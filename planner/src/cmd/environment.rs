//! Environment variables and the configuration file as defaults of options, and llama.cpp's options of
//! several letters.
//!
//! The variable of `--some-option` is `TIER_PLAN_SOME_OPTION`. Where an option means different
//! things in different commands, the command is part of the name: `TIER_PLAN_SOLVE_OUTPUT`. A flag
//! is set by 1, true, yes or on. The command line wins: a variable is ignored if its option
//! conflicts with one that the command line gives, and a setting of the file also if its option
//! conflicts with one that a variable gives.

use super::config_file::{Config, Entry, is_secret, is_setting};
use clap::builder::BoolishValueParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, Command};
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};

/// Options whose variable contains the command's name: command (`*` is every command) and option.
const PER_COMMAND: &[(&str, &str)] = &[
    ("*", "output"),
    ("batch", "parallel"),
    ("bench", "parallel"),
    ("bench", "record"),
    ("bench", "repeat"),
    ("compare", "n-predict"),
    ("demo", "n-predict"),
    ("launch", "parallel"),
    ("launch", "print"),
    ("logits", "tokens"),
    ("perplexity", "context"),
    ("perplexity", "file"),
    ("profile", "seed"),
    ("profile", "temperature"),
    ("selftest", "*"),
    ("serve", "parallel"),
];

/// Returns the environment variable of an option of a command.
pub(super) fn variable(command: &str, option: &str) -> String {
    let matches = |(c, o): &&(&str, &str)| ["*", command].contains(c) && ["*", option].contains(o);
    let own = option != "json" && PER_COMMAND.iter().any(|pair| matches(&pair));
    let name = if own {
        format!("{command}-{option}")
    } else {
        option.to_string()
    };
    format!("TIER_PLAN_{}", name.replace('-', "_").to_uppercase())
}

/// Replaces llama.cpp's `-ctk` and `-ctv`, which clap would read as `-c tk`, by their long names.
pub(super) fn long_names(line: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut options = true;
    let long = |arg: OsString| {
        options &= arg != "--";
        match arg.to_str() {
            Some("-ctk") if options => "--cache-type-k".into(),
            Some("-ctv") if options => "--cache-type-v".into(),
            _ => arg,
        }
    };
    line.into_iter().map(long).collect()
}

/// Gives every option its environment variable and its setting, except where `line` already has an
/// option that conflicts.
pub(super) fn with_defaults(command: Command, config: &Config, line: &[OsString]) -> Command {
    let given = command
        .clone()
        .ignore_errors(true)
        .try_get_matches_from(line)
        .ok();
    let given = given.as_ref().and_then(clap::ArgMatches::subcommand);
    let command = command.mut_args(|arg| with_variable("", arg));
    command.mut_subcommands(|sub| {
        let mut explicit: HashSet<String> = match given {
            Some((name, matches)) if name == sub.get_name() => matches
                .ids()
                .filter(|id| matches.value_source(id.as_str()) == Some(ValueSource::CommandLine))
                .map(ToString::to_string)
                .collect(),
            _ => HashSet::new(),
        };
        let excluded = conflicting(&sub, &explicit);
        let name = sub.get_name().to_string();
        let by_variable = sub.get_arguments().filter(|arg| {
            !excluded.contains(arg.get_id().as_str())
                && value_of(&name, arg).is_some_and(|value| !is_off(arg, &value))
        });
        explicit.extend(by_variable.map(|arg| arg.get_id().to_string()));
        let not_from_file = conflicting(&sub, &explicit);
        sub.mut_args(|arg| {
            let id = arg.get_id().as_str();
            if excluded.contains(id) {
                return arg;
            }
            let is_off = value_of(&name, &arg).is_some_and(|value| is_off(&arg, &value));
            let from_file = !is_off && !not_from_file.contains(id);
            let entry = arg
                .get_long()
                .filter(|_| from_file && is_setting(&arg))
                .and_then(|long| config.entry(&name, long));
            let arg = match entry {
                Some(entry) => with_setting(arg, entry),
                None => arg,
            };
            with_variable(&name, arg)
        })
    })
}

/// Returns the value of an option's variable.
pub(super) fn value_of(command: &str, arg: &Arg) -> Option<OsString> {
    std::env::var_os(variable(command, arg.get_long()?))
}

/// Whether a variable's value leaves an option out: it is empty, or turns a flag off.
pub(super) fn is_off(arg: &Arg, value: &OsStr) -> bool {
    let is_flag = matches!(arg.get_action(), ArgAction::SetTrue);
    let optional_value = arg
        .get_num_args()
        .is_some_and(|range| range.min_values() == 0);
    value.is_empty()
        || ((is_flag || optional_value)
            && ["0", "n", "no", "f", "false", "off"]
                .iter()
                .any(|word| value.eq_ignore_ascii_case(word)))
}

/// Makes the values of a setting the default of an option.
fn with_setting(arg: Arg, entry: &Entry) -> Arg {
    match entry.values.as_slice() {
        // A flag that is off, or an empty list.
        [] => arg,
        // The help of a command shows defaults.
        values => arg
            .required(false)
            .hide_default_value(is_secret(&entry.option))
            .default_values(values.to_vec()),
    }
}

/// Returns the ids of the options that conflict with one of `explicit`, whichever of the two
/// declares it.
pub(super) fn conflicting(command: &Command, explicit: &HashSet<String>) -> HashSet<String> {
    let mut excluded = HashSet::new();
    for arg in command.get_arguments() {
        for other in command.get_arg_conflicts_with(arg) {
            let (a, b) = (arg.get_id().as_str(), other.get_id().as_str());
            for (one, two) in [(a, b), (b, a)] {
                if explicit.contains(one) {
                    excluded.insert(two.to_string());
                }
            }
        }
    }
    excluded
}

fn with_variable(command: &str, arg: Arg) -> Arg {
    let Some(option) = arg.get_long().map(str::to_string) else {
        return arg;
    };
    let is_flag = match arg.get_action() {
        ArgAction::SetTrue => true,
        ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version => {
            return arg;
        }
        _ => false,
    };
    if value_of(command, &arg).is_some_and(|value| is_off(&arg, &value)) {
        return arg;
    }
    let variable = variable(command, &option);
    let arg = if is_flag {
        arg.value_parser(BoolishValueParser::new())
    } else {
        arg
    };
    arg.env(variable).hide_env_values(true)
}
