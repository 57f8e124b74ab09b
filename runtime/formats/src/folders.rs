//! The user's folders for configuration, state, and caches, as the XDG base directory specification
//! names them.
//!
//! An empty variable counts as missing, and `~` at the beginning of a value is the home folder. A
//! folder that is relative then is ignored, as the specification says.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Looks up an environment variable.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Variables that name the home folder, the preferred one first; the second is that of Windows.
const HOMES: [&str; 2] = ["HOME", "USERPROFILE"];

/// Returns the home folder; `None` where no variable has an absolute path.
pub fn home(env: Environment<'_>) -> Option<PathBuf> {
    HOMES.iter().find_map(|name| {
        let path = PathBuf::from(env(name)?);
        path.is_absolute().then_some(path)
    })
}

/// Returns a path with the home folder in place of `~` at its beginning.
pub fn expanded(path: &Path, env: Environment<'_>) -> PathBuf {
    match (path.strip_prefix("~"), home(env)) {
        (Ok(rest), Some(home)) if rest.as_os_str().is_empty() => home,
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_path_buf(),
    }
}

/// Returns the path that a variable names, if it names one.
pub fn path(variable: &str, env: Environment<'_>) -> Option<PathBuf> {
    let value = env(variable).filter(|value| !value.is_empty())?;
    Some(expanded(Path::new(&value), env))
}

/// Returns the folder of settings: `~/.config`.
pub fn config(env: Environment<'_>) -> Option<PathBuf> {
    base("XDG_CONFIG_HOME", ".config", env)
}

/// Returns the folder of what programs keep between runs: `~/.local/state`.
pub fn state(env: Environment<'_>) -> Option<PathBuf> {
    base("XDG_STATE_HOME", ".local/state", env)
}

/// Returns the folder of what can be made again: `~/.cache`.
pub fn cache(env: Environment<'_>) -> Option<PathBuf> {
    base("XDG_CACHE_HOME", ".cache", env)
}

fn base(variable: &str, below_home: &str, env: Environment<'_>) -> Option<PathBuf> {
    let given = path(variable, env).filter(|path| path.is_absolute());
    given.or_else(|| Some(home(env)?.join(below_home)))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn relative_and_empty_variables_are_ignored() {
        let state = |variables: &[(&str, &str)]| {
            let found = state(&|name| {
                let found = variables.iter().find(|(n, _)| *n == name)?;
                Some(found.1.into())
            });
            found.map(|path| path.display().to_string())
        };
        let home = ("HOME", "/home/me");
        for (given, expected) in [
            ("/s", "/s"),
            ("~/s", "/home/me/s"),
            ("~", "/home/me"),
            ("s", "/home/me/.local/state"),
            ("~you/s", "/home/me/.local/state"),
            ("", "/home/me/.local/state"),
        ] {
            let found = state(&[home, ("XDG_STATE_HOME", given)]);
            assert_eq!(found.as_deref(), Some(expected), "{given}");
        }
        assert_eq!(
            state(&[("USERPROFILE", "/u")]).as_deref(),
            Some("/u/.local/state")
        );
        for none in ["", "me"] {
            assert_eq!(state(&[("HOME", none), ("XDG_STATE_HOME", "~/s")]), None);
        }
        assert_eq!(state(&[("XDG_STATE_HOME", "/s")]).as_deref(), Some("/s"));
    }
}
