//! `tier-plan config`: the settings in effect, and where each comes from.

use super::config_file::{self, Config, is_secret, is_shared, settings};
use super::environment::{is_off, value_of, variable};
use crate::cmd::args::JsonArgs;
use crate::json::path_json;
use anyhow::{Result, bail};
use clap::{Arg, Args};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Version of the JSON form.
const VERSION: u64 = 1;

/// Options of `tier-plan config`.
#[derive(Debug, Args)]
#[command(
    about = "Show the settings in effect, and where each comes from",
    after_long_help = "Example:\n  tier-plan config\n  tier-plan config serve\n\n\
                       docs/config.md has the file. Order: command line, environment, file, built in."
)]
pub struct ConfigArgs {
    /// Command whose settings to show [default: those that are set in any command]
    #[arg(value_name = "COMMAND")]
    pub of: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Where a setting comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    /// The variable of this name.
    Environment(String),
    /// The line of the file.
    File(usize),
    BuiltIn,
}

/// One setting of one command, or of all that have it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    /// `None` where it is of all commands that have the option.
    command: Option<String>,
    option: String,
    /// `None` where nothing is set.
    value: Option<String>,
    origin: Origin,
}

/// Runs the command.
///
/// # Errors
/// When the file is invalid, or there is no such command.
pub fn run(args: &ConfigArgs) -> Result<()> {
    let command = super::command();
    let config = config_file::load(&command)?;
    let found = match &args.of {
        None => set_anywhere(&command, &config),
        Some(name) => {
            let Some(sub) = command.find_subcommand(name) else {
                let names: Vec<&str> = command
                    .get_subcommands()
                    .map(clap::Command::get_name)
                    .collect();
                bail!(
                    "{name}: no such command, expected one of {}",
                    names.join(", ")
                );
            };
            settings(sub)
                .map(|arg| setting(&config, sub.get_name(), arg))
                .collect()
        }
    };
    if args.format.json {
        println!(
            "{}",
            serde_json::to_string_pretty(&as_json(&config, &found))?
        );
    } else {
        print_text(&config, &found);
    }
    Ok(())
}

/// Returns every setting that a variable or the file makes, those of all commands first.
fn set_anywhere(command: &clap::Command, config: &Config) -> Vec<Setting> {
    let mut found: BTreeMap<(Option<String>, String), Setting> = BTreeMap::new();
    for sub in command.get_subcommands() {
        for arg in settings(sub) {
            let mut setting = setting(config, sub.get_name(), arg);
            if setting.origin == Origin::BuiltIn {
                continue;
            }
            let in_table = match setting.origin {
                Origin::File(_) => config
                    .entry(sub.get_name(), &setting.option)
                    .is_some_and(|entry| entry.command.is_some()),
                _ => false,
            };
            if is_shared(sub.get_name(), &setting.option) && !in_table {
                setting.command = None;
            }
            found.insert((setting.command.clone(), setting.option.clone()), setting);
        }
    }
    found.into_values().collect()
}

/// Returns the setting of a command's option.
fn setting(config: &Config, command: &str, arg: &Arg) -> Setting {
    let option = arg.get_long().unwrap_or_default().to_string();
    let built_in = || {
        let values = arg.get_default_values().iter();
        let values: Vec<String> = values.map(|v| v.to_string_lossy().into_owned()).collect();
        (!values.is_empty()).then(|| values.join(", "))
    };
    let entry = config.entry(command, &option);
    let (value, origin) = match (value_of(command, arg), entry) {
        (Some(value), _) if !value.is_empty() => {
            let value = if is_off(arg, &value) {
                "false".to_string()
            } else {
                value.to_string_lossy().into_owned()
            };
            (Some(value), Origin::Environment(variable(command, &option)))
        }
        // An empty variable leaves the option out, whatever the file says.
        (None, Some(entry)) => {
            let value = match entry.values.as_slice() {
                [] => "false".to_string(),
                values => values.join(", "),
            };
            (Some(value), Origin::File(entry.line))
        }
        _ => (built_in(), Origin::BuiltIn),
    };
    let is_secret = is_secret(&option);
    Setting {
        command: Some(command.to_string()),
        value: value.map(|value| if is_secret { "***".to_string() } else { value }),
        option,
        origin,
    }
}

fn print_text(config: &Config, found: &[Setting]) {
    match &config.path {
        Some(path) if config.exists => println!("file: {}", path.display()),
        Some(path) => println!("file: {}, which does not exist", path.display()),
        None => println!("file: none"),
    }
    if found.is_empty() {
        println!("nothing is set; `tier-plan config run` shows what is built in");
        return;
    }
    let name = |s: &Setting| match &s.command {
        Some(command) => format!("{command}.{}", s.option),
        None => s.option.clone(),
    };
    let width = found.iter().map(|s| name(s).len()).max().unwrap_or(0);
    for s in found {
        let origin = match &s.origin {
            Origin::Environment(name) => name.clone(),
            Origin::File(line) => format!("line {line} of the file"),
            Origin::BuiltIn => "built in".to_string(),
        };
        let value = s.value.as_deref().unwrap_or("not set");
        println!("{:<width$}  {value:<24}  {origin}", name(s));
    }
}

fn as_json(config: &Config, found: &[Setting]) -> Value {
    let each = |s: &Setting| {
        let (origin, variable, line) = match &s.origin {
            Origin::Environment(name) => ("environment", Some(name), None),
            Origin::File(line) => ("file", None, Some(*line)),
            Origin::BuiltIn => ("built-in", None, None),
        };
        json!({
            "command": s.command,
            "option": s.option,
            "value": s.value,
            "origin": origin,
            "variable": variable,
            "line": line,
        })
    };
    json!({
        "version": VERSION,
        "file": config.path.as_ref().map(path_json),
        "exists": config.exists,
        "settings": found.iter().map(each).collect::<Vec<_>>(),
    })
}
