//! The configuration file: defaults of options that users repeat.
//!
//! `$XDG_CONFIG_HOME/tier-plan/config.toml` has options by their long names: at the top for every
//! command that has the option, and in the table of a command for that one. It becomes clap's default
//! values before a line is parsed, so that nothing else knows of it. The command line wins over
//! environment variables, these over a command's table, that over the top, and that over what is built
//! in.

use super::environment::{conflicting, variable};
use crate::folders;
use crate::hint::HintExt;
use anyhow::{Context, Result, anyhow, ensure};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, Command};
use std::any::TypeId;
use std::collections::{BTreeMap, HashSet};
use std::error::Error as _;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Variable that names another file; empty for none.
pub const VARIABLE: &str = "TIER_PLAN_CONFIG";

/// Most bytes of the file.
const MAX_BYTES: u64 = 1 << 20;

/// What a call is for, and so no setting.
const NOT_SETTINGS: [&str; 9] = [
    "file", "help", "model", "probe", "prompt", "serve", "show", "version", "yes",
];

/// Options whose values are nobody else's to read.
const SECRETS: [&str; 1] = ["api-key"];

/// Whether the value of an option is not to be shown.
pub(super) fn is_secret(option: &str) -> bool {
    SECRETS.contains(&option)
}

/// The settings of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// The file, whether it is there or not; `None` where there is no place for one.
    pub path: Option<PathBuf>,
    /// Whether it is there.
    pub exists: bool,
    entries: Vec<Entry>,
}

/// One setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Command whose table it is in; `None` at the top.
    pub command: Option<String>,
    /// Long name of the option.
    pub option: String,
    /// Its values as the command line would have them; none for a flag that is off.
    pub values: Vec<String>,
    /// Line in the file, from 1.
    pub line: usize,
}

/// Whether an option may be in the file.
pub(super) fn is_setting(arg: &Arg) -> bool {
    arg.get_long()
        .is_some_and(|long| !NOT_SETTINGS.contains(&long))
        && matches!(
            arg.get_action(),
            ArgAction::Set | ArgAction::Append | ArgAction::SetTrue
        )
}

/// Whether an option means the same in all commands that have it, so that it may be at the top.
pub(super) fn is_shared(command: &str, option: &str) -> bool {
    variable(command, option) == variable("", option)
}

/// Returns the options of a command that may be in the file.
pub(super) fn settings(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| is_setting(arg))
}

/// Reads the configuration file. One that is missing has no settings, unless it was asked for.
///
/// # Errors
/// When it is unreadable, or has an unknown key or a value of the wrong type.
pub fn load(command: &Command) -> Result<Config> {
    match std::env::var_os(VARIABLE) {
        Some(path) if path.is_empty() => Ok(Config::default()),
        Some(path) => {
            let path = PathBuf::from(path);
            let text = text(&path)?.with_context(|| {
                format!(
                    "{VARIABLE}: {}: no such file, expected a configuration file",
                    path.display()
                )
            })?;
            Config::parse(&text, &path, command)
        }
        None => {
            let Some(path) = folders::configuration(&folders::variable) else {
                return Ok(Config::default());
            };
            match text(&path)? {
                Some(text) => Config::parse(&text, &path, command),
                None => Ok(Config {
                    path: Some(path),
                    ..Config::default()
                }),
            }
        }
    }
}

/// Returns the text of the file; `None` where it is missing.
fn text(path: &Path) -> Result<Option<String>> {
    let shown = path.display();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        // A file in the place of a folder of the path.
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("{shown}")),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("{shown}"))?;
    ensure!(
        bytes.len() as u64 <= MAX_BYTES,
        "{shown}: more than {MAX_BYTES} bytes, expected a configuration file"
    );
    let text = String::from_utf8(bytes)
        .map_err(|_| anyhow!("{shown}: no UTF-8, expected a configuration file in TOML"))?;
    Ok(Some(text))
}

impl Config {
    /// Returns the setting of a command's option.
    pub fn entry(&self, command: &str, option: &str) -> Option<&Entry> {
        let of = |wanted: Option<&str>| {
            self.entries
                .iter()
                .find(|e| e.option == option && e.command.as_deref() == wanted)
        };
        of(Some(command)).or_else(|| of(None).filter(|_| is_shared(command, option)))
    }

    /// Parses the text of a file, and checks it against the options of `command`'s subcommands.
    ///
    /// # Errors
    /// When it is no TOML, or has an unknown key or a value of the wrong type.
    pub fn parse(text: &str, path: &Path, command: &Command) -> Result<Self> {
        let place = Place { text, path };
        let table = DeTable::parse(text).map_err(|error| {
            let line = place.line(error.span().unwrap_or(0..0));
            anyhow!("{}:{line}: {}", path.display(), error.message())
        })?;
        let mut entries = Vec::new();
        for (key, value) in table.get_ref() {
            let name = key.get_ref().as_ref();
            match (command.find_subcommand(name), value.get_ref()) {
                (Some(sub), DeValue::Table(table)) => {
                    for (key, value) in table {
                        entries.push(place.entry(Some(sub), command, key, value)?);
                    }
                }
                _ => entries.push(place.entry(None, command, key, value)?),
            }
        }
        entries.sort_by_key(|entry| entry.line);
        let config = Self {
            path: Some(path.to_path_buf()),
            exists: true,
            entries,
        };
        config.check_conflicts(command, path)?;
        Ok(config)
    }

    /// Fails if two settings exclude each other in a command that has both.
    fn check_conflicts(&self, command: &Command, path: &Path) -> Result<()> {
        for sub in command.get_subcommands() {
            let mut found: BTreeMap<String, &Entry> = BTreeMap::new();
            for arg in settings(sub) {
                let entry = self.entry(sub.get_name(), arg.get_long().unwrap_or_default());
                if let Some(entry) = entry.filter(|entry| !entry.values.is_empty()) {
                    found.insert(arg.get_id().to_string(), entry);
                }
            }
            for (id, entry) in &found {
                let excluded = conflicting(sub, &HashSet::from([id.clone()]));
                let other = excluded.iter().find_map(|other| found.get(other));
                if let Some(other) = other {
                    let (first, last) = if entry.line < other.line {
                        (entry, other)
                    } else {
                        (other, entry)
                    };
                    anyhow::bail!(
                        "{}:{}: '{}' excludes '{}' of line {} in `tier-plan {}`, expected one of them",
                        path.display(),
                        last.line,
                        last.option,
                        first.option,
                        first.line,
                        sub.get_name()
                    );
                }
            }
        }
        Ok(())
    }
}

/// A file that is being parsed.
struct Place<'t> {
    text: &'t str,
    path: &'t Path,
}

impl Place<'_> {
    fn line(&self, span: Range<usize>) -> usize {
        let before = self.text.as_bytes().get(..span.start).unwrap_or_default();
        before.iter().filter(|byte| **byte == b'\n').count() + 1
    }

    /// Makes an entry of a key, at the top or in the table of `sub`.
    fn entry(
        &self,
        sub: Option<&Command>,
        command: &Command,
        key: &Spanned<impl AsRef<str>>,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<Entry> {
        let (name, line) = (key.get_ref().as_ref(), self.line(key.span()));
        let at = format!("{}:{line}", self.path.display());
        let has = |sub: &&Command| settings(sub).any(|arg| arg.get_long() == Some(name));
        let owner = match sub {
            Some(sub) => Some(sub).filter(has),
            None => command
                .get_subcommands()
                .filter(|sub| is_shared(sub.get_name(), name))
                .find(has),
        };
        let Some((owner, arg)) = owner.and_then(|owner| {
            Some((
                owner,
                settings(owner).find(|arg| arg.get_long() == Some(name))?,
            ))
        }) else {
            return Err(unknown(&at, name, sub, command))
                .hint("`tier-plan config` lists the settings");
        };
        let values = values(arg, value.get_ref())
            .map_err(|expected| anyhow!("{at}: '{name}' {expected}"))?;
        if let Some(why) = refused(command, owner, arg, &values) {
            return Err(anyhow!("{at}: '{name}': {why}"));
        }
        Ok(Entry {
            command: sub.map(|sub| sub.get_name().to_string()),
            option: name.to_string(),
            values,
            line,
        })
    }
}

/// Returns the error of a key that no command has there.
fn unknown(at: &str, name: &str, sub: Option<&Command>, command: &Command) -> anyhow::Error {
    let has = |sub: &Command| settings(sub).any(|arg| arg.get_long() == Some(name));
    if sub.is_none() && command.find_subcommand(name).is_some() {
        return anyhow!("{at}: '{name}' is a command, expected a table [{name}] with its settings");
    }
    if NOT_SETTINGS.contains(&name) {
        return anyhow!(
            "{at}: '{name}' belongs to a single call, expected a setting that calls share"
        );
    }
    if sub.is_none()
        && let Some(other) = command.get_subcommands().find(|sub| has(sub))
    {
        let table = other.get_name();
        return anyhow!(
            "{at}: '{name}' means something else in each command, expected it in a table such as [{table}]"
        );
    }
    let mut known: Vec<&str> = match sub {
        Some(sub) => settings(sub).filter_map(Arg::get_long).collect(),
        None => command
            .get_subcommands()
            .flat_map(|sub| {
                let shared = |long: &&str| is_shared(sub.get_name(), long);
                settings(sub).filter_map(Arg::get_long).filter(shared)
            })
            .chain(command.get_subcommands().map(Command::get_name))
            .collect(),
    };
    known.sort_unstable();
    let nearest = nearest(name, &known).map_or("a setting".to_string(), |near| format!("'{near}'"));
    let of = sub.map_or(String::new(), |sub| format!(" of [{}]", sub.get_name()));
    anyhow!("{at}: unknown key '{name}'{of}, expected {nearest}")
}

/// Returns the known name with the fewest changed letters, unless none is near.
fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let distances = known.iter().map(|known| (distance(name, known), *known));
    let (distance, nearest) = distances.min_by_key(|(distance, _)| *distance)?;
    (distance <= nearest.len().max(name.len()) / 2).then_some(nearest)
}

/// Returns how many letters have to be added, left out, or changed (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    // Names are short; a longer one is near to none.
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, letter) in a.chars().take(256).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, other) in b.iter().enumerate() {
            let changed = diagonal + usize::from(letter != *other);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Returns a value as the command line would have it; what is wrong and expected otherwise.
fn values(arg: &Arg, value: &DeValue<'_>) -> Result<Vec<String>, String> {
    let found = |value: &DeValue<'_>| match value {
        DeValue::Table(_) => "is a table".to_string(),
        other => format!("is a {}", other.type_str()),
    };
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return match value {
            DeValue::Boolean(true) => Ok(vec!["true".into()]),
            DeValue::Boolean(false) => Ok(Vec::new()),
            other => Err(format!("{}, expected true or false", found(other))),
        };
    }
    // An option whose value may be left out, such as --verify.
    let may_be_bare = arg
        .get_num_args()
        .is_some_and(|range| range.min_values() == 0);
    let one = |value: &DeValue<'_>| -> Result<String, String> {
        match value {
            DeValue::String(text) => Ok(expanded(arg, text)),
            DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                .map(|number| number.to_string())
                .map_err(|_| "is too large a number, expected a smaller one".to_string()),
            DeValue::Float(number) => Ok(number.as_str().to_string()),
            other => Err(format!("{}, expected a string or a number", found(other))),
        }
    };
    match value {
        DeValue::Boolean(true) if may_be_bare => Ok(vec!["1".into()]),
        DeValue::Boolean(false) if may_be_bare => Ok(Vec::new()),
        DeValue::Array(list) if takes_list(arg) => {
            list.iter().map(|value| one(value.get_ref())).collect()
        }
        DeValue::Array(_) => Err("is a list, expected one value".to_string()),
        other => Ok(vec![one(other)?]),
    }
}

fn takes_list(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append) || arg.get_value_delimiter().is_some()
}

/// Puts the home folder in place of `~` at the beginning of a path, as a shell does.
fn expanded(arg: &Arg, text: &str) -> String {
    let is_path = arg.get_value_parser().type_id() == TypeId::of::<PathBuf>();
    let path = is_path.then(|| folders::expanded(Path::new(text), &folders::variable));
    let path = path.and_then(|path| path.into_os_string().into_string().ok());
    path.unwrap_or_else(|| text.to_string())
}

/// Returns why clap refuses the values of an option.
fn refused(command: &Command, owner: &Command, arg: &Arg, values: &[String]) -> Option<String> {
    if matches!(arg.get_action(), ArgAction::SetTrue) {
        return None;
    }
    let long = arg.get_long()?;
    let options = values.iter().map(|value| format!("--{long}={value}"));
    let line = ["tier-plan".to_string(), owner.get_name().to_string()].into_iter();
    let error = command
        .clone()
        .try_get_matches_from(line.chain(options))
        .err()?;
    // Others say that arguments are missing, which is no matter of the file.
    matches!(
        error.kind(),
        ErrorKind::ValueValidation | ErrorKind::InvalidValue
    )
    .then(|| {
        error.source().map_or_else(
            || {
                let text = error.to_string();
                let lines = text
                    .lines()
                    .map(|line| line.trim().trim_start_matches("error: "));
                lines
                    .take_while(|line| !line.is_empty())
                    .collect::<Vec<_>>()
                    .join(" ")
            },
            ToString::to_string,
        )
    })
}
