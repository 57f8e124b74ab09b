//! Folders of the user's files, as the XDG base directory specification names them.

use std::ffi::OsString;
use std::path::PathBuf;

/// Returns the folder that a variable such as `XDG_STATE_HOME` names, else one below the home folder.
/// `None` where neither is known.
pub fn folder(
    variable: &str,
    below_home: &str,
    env: impl Fn(&str) -> Option<OsString>,
) -> Option<PathBuf> {
    // The specification has relative paths ignored.
    let absolute = |name: &str| {
        env(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute(variable).or_else(|| Some(absolute("HOME")?.join(below_home)))
}

/// Returns the folder for what programs keep between runs: `~/.local/state`.
pub fn state(env: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    folder("XDG_STATE_HOME", ".local/state", env)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_variable_is_preferred_unless_it_is_relative() {
        let with = |variables: &[(&str, &str)]| {
            state(|name| {
                let found = variables.iter().find(|(n, _)| *n == name)?;
                Some(found.1.into())
            })
        };
        let home = ("HOME", "/home/me");
        let of_home = Some(Path::new("/home/me/.local/state").to_path_buf());
        assert_eq!(
            with(&[home, ("XDG_STATE_HOME", "/s")]),
            Some(Path::new("/s").to_path_buf())
        );
        assert_eq!(with(&[home]), of_home);
        assert_eq!(with(&[home, ("XDG_STATE_HOME", "s")]), of_home);
        assert_eq!(with(&[("HOME", "")]), None);
    }
}
