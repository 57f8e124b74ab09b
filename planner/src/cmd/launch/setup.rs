//! What a client is started with: variables, arguments, and a temporary file of settings.

use crate::export::llama_cpp::quoted;
use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use std::ffi::OsString;
use std::fs;
use std::process::Command;
use tier_plan_runtime::formats::safely::TemporaryFolder;

/// What an argument is that stands for the path of the temporary file.
pub(super) const SETTINGS: &str = "SETTINGS";

/// Name of that file.
const FILE: &str = "settings.json";

/// What is printed instead of a secret.
const MASK: &str = "***";

/// Longest name of a model that is handed on.
const MAX_MODEL_BYTES: usize = 128;

/// Variables with a proxy for requests to other hosts.
const PROXIES: [&str; 4] = ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];

/// Variables with the hosts that no proxy is used for.
const DIRECT: [&str; 2] = ["NO_PROXY", "no_proxy"];

/// A server that a client talks to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// Address without a path, such as `http://127.0.0.1:8080`.
    pub url: String,
    /// Name of the host in it.
    pub host: String,
    pub key: Option<String>,
    /// Name of the model.
    pub model: String,
    /// Tokens per text, if known.
    pub context: Option<usize>,
    /// Why the server refuses tools, if it does.
    pub refusal: Option<String>,
}

/// Returns the name of a model as clients get it. Names that a client may read as something else are
/// replaced; the server answers to any.
pub(super) fn model(name: &str) -> String {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._:/@+-".contains(&b);
    let fits = (1..=MAX_MODEL_BYTES).contains(&name.len())
        && name.bytes().all(is_plain)
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if fits { name } else { "model" }.to_string()
}

/// Returns the host of a URL, an IPv6 address without brackets.
pub(super) fn host(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let place = rest.split('/').next().unwrap_or(rest);
    match place
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
    {
        Some((address, _)) => address,
        None => place.split(':').next().unwrap_or(place),
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Setup {
    variables: Vec<Variable>,
    removed: Vec<&'static str>,
    options: Vec<String>,
    args: Vec<OsString>,
    has_settings: bool,
    folder: Option<TemporaryFolder>,
}

#[derive(Debug)]
struct Variable {
    name: &'static str,
    value: String,
    is_secret: bool,
}

impl Setup {
    /// Creates a setup with the user's own arguments.
    pub fn new(args: &[OsString]) -> Self {
        Self {
            variables: Vec::new(),
            removed: Vec::new(),
            options: Vec::new(),
            args: args.to_vec(),
            has_settings: false,
            folder: None,
        }
    }

    /// Sets a variable.
    pub fn variable(&mut self, name: &'static str, value: &str) {
        self.variables.push(Variable {
            name,
            value: value.to_string(),
            is_secret: false,
        });
    }

    /// Sets a variable that is not printed.
    pub fn secret(&mut self, name: &'static str, value: &str) {
        self.variable(name, value);
        if let Some(last) = self.variables.last_mut() {
            last.is_secret = true;
        }
    }

    /// Removes a variable of the caller.
    pub fn remove(&mut self, name: &'static str) {
        self.removed.push(name);
    }

    /// Adds an argument before the user's.
    pub fn option(&mut self, option: &str) {
        self.options.push(option.to_string());
    }

    /// Whether the user's arguments have an option, as `--name VALUE` or `--name=VALUE`.
    pub fn has_option(&self, name: &str) -> bool {
        let is_it = |arg: &OsString| {
            let rest = arg.to_str().and_then(|arg| arg.strip_prefix(name));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        };
        self.args.iter().any(is_it)
    }

    /// Has requests to a host go past the proxy, if there is one.
    pub fn leave_proxy(&mut self, host: &str) {
        if PROXIES.iter().all(|name| std::env::var_os(name).is_none()) {
            return;
        }
        for name in DIRECT {
            let old = std::env::var(name).unwrap_or_default();
            let hosts = if old.is_empty() {
                host.to_string()
            } else {
                format!("{old},{host}")
            };
            self.variable(name, &hosts);
        }
    }

    /// Asks for a temporary file with the variables, whose path takes the place of [`SETTINGS`].
    pub fn settings(&mut self) {
        self.has_settings = true;
    }

    /// Writes the file as Claude Code's settings, if one was asked for. Only this user can read it.
    ///
    /// # Errors
    /// When the system refuses the file.
    pub fn write(&mut self) -> Result<()> {
        if !self.has_settings {
            return Ok(());
        }
        let mut variables: Map<String, Value> = Map::new();
        for variable in &self.variables {
            variables.insert(variable.name.into(), variable.value.as_str().into());
        }
        for name in &self.removed {
            variables.insert((*name).into(), "".into());
        }
        let text = json!({ "env": variables }).to_string();
        let make = || {
            let folder = TemporaryFolder::create(&std::env::temp_dir())?;
            fs::write(folder.path().join(FILE), text)?;
            Ok::<_, std::io::Error>(folder)
        };
        self.folder = Some(make().context("a temporary file for the client's settings")?);
        Ok(())
    }

    /// Returns an argument with the path of the temporary file in its place.
    fn placed(&self, option: &str) -> OsString {
        match &self.folder {
            Some(folder) if option == SETTINGS => folder.path().join(FILE).into(),
            _ => option.into(),
        }
    }

    /// Gives a command the variables and the arguments.
    pub fn apply(&self, command: &mut Command) {
        for name in &self.removed {
            command.env_remove(name);
        }
        for variable in &self.variables {
            command.env(variable.name, &variable.value);
        }
        command.args(self.options.iter().map(|option| self.placed(option)));
        command.args(&self.args);
    }

    /// Returns the same as lines of a shell, without secrets.
    pub fn shown(&self, program: &str) -> String {
        let mut lines = String::new();
        for name in &self.removed {
            lines += &format!("unset {name}\n");
        }
        for variable in &self.variables {
            let value = match variable.is_secret {
                true => MASK.to_string(),
                false => quoted(&variable.value),
            };
            lines += &format!("export {}={value}\n", variable.name);
        }
        if self.has_settings {
            lines += &format!(
                "# {SETTINGS} is a temporary file that has the same variables under \"env\"\n"
            );
        }
        lines += program;
        for option in &self.options {
            lines += &format!(" {}", quoted(option));
        }
        for arg in &self.args {
            lines += &format!(" {}", quoted(&arg.to_string_lossy()));
        }
        lines + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_a_client_reads_as_something_else_are_replaced() {
        for name in ["Qwen3-30B-A3B.Q4_K_M", "org/model:7b", "a"] {
            assert_eq!(model(name), name);
        }
        // A file of opencode's, a mark of Claude Code's, an option, more than a line.
        let long = "a".repeat(129);
        for name in [
            "", "{file:x}", "x[1m]", "-x", "a b", "a\nb", "\u{e9}", "$x", &long,
        ] {
            assert_eq!(model(name), "model", "{name}");
        }
    }

    #[test]
    fn hosts_are_those_of_the_url() {
        for (url, expected) in [
            ("http://127.0.0.1:8080", "127.0.0.1"),
            ("http://box", "box"),
            ("http://box/prefix:1", "box"),
            ("http://[::1]:8080", "::1"),
        ] {
            assert_eq!(host(url), expected, "{url}");
        }
    }

    #[test]
    fn only_the_file_and_the_process_have_the_secret() {
        let mut setup = Setup::new(&["it's".into(), "--x=1".into()]);
        setup.secret("KEY", "s3cret");
        setup.variable("URL", "a b");
        setup.remove("OLD");
        setup.option(SETTINGS);
        setup.settings();
        assert!(setup.has_option("--x") && !setup.has_option("--y") && !setup.has_option("it"));
        let shown = setup.shown("client");
        let expected = "unset OLD\nexport KEY=***\nexport URL='a b'\n\
            # SETTINGS is a temporary file that has the same variables under \"env\"\n\
            client SETTINGS 'it'\\''s' '--x=1'\n";
        assert_eq!(shown, expected.replace("'--x=1'", &quoted("--x=1")));
        setup.write().unwrap();
        let path = setup.placed(SETTINGS);
        let file: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(
            file,
            json!({"env": {"KEY": "s3cret", "URL": "a b", "OLD": ""}})
        );
        let mut command = Command::new("client");
        setup.apply(&mut command);
        let args: Vec<_> = command.get_args().collect();
        assert_eq!(args, [path.as_os_str(), "it's".as_ref(), "--x=1".as_ref()]);
        drop(setup);
        assert!(!std::path::Path::new(&path).exists());
    }
}
