//! Names of users taken out of texts that are meant for bug reports.

use crate::folders;
use std::path::Path;

/// Folders whose entries are named after users.
const HOMES: [&str; 5] = ["/home/", "/Users/", "/run/media/", "/media/", "/var/home/"];

/// What hides names of users.
#[derive(Debug, Clone, Default)]
pub struct Private {
    home: Option<String>,
}

impl Private {
    /// Hides the home folder of this user, and the names of all others.
    pub fn of_this_user() -> Self {
        Self::with_home(folders::home_of_user().as_deref())
    }

    /// Hides a home folder, and the names of users below the usual folders.
    pub fn with_home(home: Option<&Path>) -> Self {
        let home = home
            .and_then(Path::to_str)
            .map(|home| home.trim_end_matches('/'));
        // A home folder of "/" is in every path.
        Self {
            home: home.filter(|home| home.len() > 1).map(str::to_string),
        }
    }

    /// Returns a text with `~` for the home folder, and `…` for the names of other users.
    pub fn text(&self, text: &str) -> String {
        let mut text = match &self.home {
            Some(home) => replace_folder(text, home),
            None => text.to_string(),
        };
        for folder in HOMES {
            text = hide_entries(&text, folder);
        }
        text
    }
}

/// Replaces a folder by `~` where it ends as a whole name does.
fn replace_folder(text: &str, folder: &str) -> String {
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(folder) {
        replaced.push_str(before);
        let ends =
            !after.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.'));
        let begins =
            !before.ends_with(|c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.'));
        replaced.push_str(if ends && begins { "~" } else { folder });
        rest = after;
    }
    replaced.push_str(rest);
    replaced
}

/// Replaces what follows a folder, up to the next separator, by `…`.
fn hide_entries(text: &str, folder: &str) -> String {
    let mut hidden = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(folder) {
        hidden.push_str(before);
        hidden.push_str(folder);
        let end = after
            .find(|c: char| {
                matches!(c, '/' | '\'' | '"' | ':' | ';' | ',' | ')') || c.is_whitespace()
            })
            .unwrap_or(after.len());
        if end > 0 {
            hidden.push('…');
        }
        rest = &after[end..];
    }
    hidden.push_str(rest);
    hidden
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_of_a_user_is_left() {
        let private = Private::with_home(Some(Path::new("/home/alice/")));
        for (text, expected) in [
            ("/home/alice/m.gguf: damaged", "~/m.gguf: damaged"),
            ("in /home/alice", "in ~"),
            ("'/home/alice', /home/bob/x", "'~', /home/…/x"),
            ("/home/alice2/x", "/home/…/x"),
            ("/mnt/home/alice/x", "/mnt/home/…/x"),
            ("/media/alice/disk/m.gguf", "/media/…/disk/m.gguf"),
            ("/Users/bob: gone", "/Users/…: gone"),
            ("/run/media/bob/usb", "/run/media/…/usb"),
            ("/home/", "/home/"),
            ("/srv/models", "/srv/models"),
        ] {
            assert_eq!(private.text(text), expected);
        }
    }

    #[test]
    fn a_home_of_the_root_folder_hides_nothing_else() {
        for home in [None, Some(Path::new("/")), Some(Path::new(""))] {
            assert_eq!(Private::with_home(home).text("/srv/a /b"), "/srv/a /b");
        }
        let root = Private::with_home(Some(Path::new("/root")));
        assert_eq!(root.text("/root/m.gguf /rootfs"), "~/m.gguf /rootfs");
    }
}
