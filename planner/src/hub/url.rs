//! Addresses: their origin, where a redirect leads, and how paths are written in them.

use crate::printable::printable;
use anyhow::{Result, bail, ensure};

/// Returns an address for a message: without its query, which may hold a signature.
pub fn shown(url: &str) -> String {
    let plain = url.split('?').next().unwrap_or(url);
    printable(plain).into_owned()
}

/// Returns scheme and host of an address; `None` if it is not one, or has a user's name in it.
pub fn origin(url: &str) -> Option<&str> {
    let start = ["https://", "http://"]
        .iter()
        .find(|scheme| url.starts_with(**scheme))?
        .len();
    let length = url[start..]
        .find(['/', '?', '#'])
        .unwrap_or(url.len() - start);
    let host = &url[start..start + length];
    (!host.is_empty() && !host.contains('@')).then(|| &url[..start + length])
}

/// Returns the address that a redirect leads to.
pub fn redirected(from: &str, location: &str) -> Result<String> {
    let base = origin(from).unwrap_or_default();
    let scheme = base.split("//").next().unwrap_or_default();
    let to = if origin(location).is_some() {
        location.to_string()
    } else if location.starts_with("//") {
        format!("{scheme}{location}")
    } else if location.starts_with('/') {
        format!("{base}{location}")
    } else if location.contains("://") || location.is_empty() {
        bail!(
            "{}: a redirect to {}, expected http:// or https://",
            shown(from),
            shown(location)
        );
    } else {
        let path = from.split(['?', '#']).next().unwrap_or(from);
        let folder = path.rsplit_once('/').map_or(path, |(folder, _)| folder);
        format!(
            "{}/{location}",
            if folder.len() < base.len() {
                base
            } else {
                folder
            }
        )
    };
    ensure!(
        !(from.starts_with("https://") && to.starts_with("http://")),
        "{}: a redirect to {}, which is not encrypted, expected https://",
        shown(from),
        shown(&to)
    );
    Ok(to)
}

/// Escapes what an address cannot have; slashes stay if `keeps_slashes`.
pub fn escaped(path: &str, keeps_slashes: bool) -> String {
    let mut out = String::with_capacity(path.len());
    for b in path.bytes() {
        if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) || (keeps_slashes && b == b'/') {
            out.push(char::from(b));
        } else {
            out.push_str(&format!("%{b:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_lead_where_they_say() {
        let from = "https://a.example/x/y?q=/1";
        for (location, expected) in [
            ("https://b.example/z", "https://b.example/z"),
            ("/z?s=1", "https://a.example/z?s=1"),
            ("//b.example/z", "https://b.example/z"),
            ("z", "https://a.example/x/z"),
        ] {
            assert_eq!(redirected(from, location).unwrap(), expected);
        }
        assert_eq!(redirected("http://h:1", "z").unwrap(), "http://h:1/z");
        for bad in [
            "http://a.example/z",
            "file:///etc/passwd",
            "ftp://x/y",
            "https://u@x/",
            "",
        ] {
            assert!(redirected(from, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn origins_are_compared_whole() {
        assert_eq!(origin("http://h:1/a?b"), Some("http://h:1"));
        assert_eq!(origin("https://h?x"), Some("https://h"));
        for bad in ["h", "ftp://h", "http://", "http:///x", "http://u:p@h/"] {
            assert_eq!(origin(bad), None, "{bad}");
        }
        assert_ne!(origin("https://h.evil/"), origin("https://h/"));
    }

    #[test]
    fn paths_are_escaped() {
        assert_eq!(escaped("a b/ü#?.gguf", true), "a%20b/%C3%BC%23%3F.gguf");
        assert_eq!(escaped("refs/pr/1", false), "refs%2Fpr%2F1");
    }
}
