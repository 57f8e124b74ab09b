//! `docs/ERRORS.md` quotes messages as the source has them.

use crate::common::root;
use std::fs;
use std::path::Path;

/// Every source file that prints or returns messages, tests left out, with strings on one line and
/// `…` for each placeholder.
fn messages(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if path.is_dir() {
            if !matches!(
                name.as_str(),
                "tests" | "target" | "fuzz" | "testing" | "benches"
            ) {
                messages(&path, text);
            }
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") {
            let source = fs::read_to_string(&path).unwrap();
            let code = source.split("#[cfg(test)]\nmod tests {").next().unwrap();
            text.push_str(&plain(code));
            text.push('\n');
        }
    }
}

/// Joins strings that go over several lines, and puts `…` for `{placeholders}`.
fn plain(code: &str) -> String {
    let mut joined = String::with_capacity(code.len());
    let mut rest = code;
    while let Some((before, after)) = rest.split_once("\\\n") {
        joined.push_str(before);
        rest = after.trim_start();
    }
    joined.push_str(rest);
    let mut plain = String::with_capacity(joined.len());
    let mut rest = joined.as_str();
    while let Some((before, after)) = rest.split_once('{') {
        plain.push_str(before);
        match after.split_once('}') {
            Some((name, after)) if !name.contains(['{', '\n', '"', ' ']) => {
                plain.push('…');
                rest = after;
            }
            _ => {
                plain.push('{');
                rest = after;
            }
        }
    }
    plain.push_str(rest);
    plain
}

/// The quotes in the first cells of the page's tables.
fn quotes(page: &str) -> Vec<&str> {
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| row.split('`').nth(1).unwrap()).collect()
}

#[test]
fn every_quoted_message_is_in_the_source() {
    let mut text = String::new();
    for folder in ["planner/src", "runtime"] {
        messages(&root().join(folder), &mut text);
    }
    let page = fs::read_to_string(root().join("docs/ERRORS.md")).unwrap();
    let quotes = quotes(&page);
    assert!(quotes.len() > 60, "{}", quotes.len());
    let missing: Vec<&&str> = quotes
        .iter()
        .filter(|quote| !text.contains(**quote))
        .collect();
    assert!(missing.is_empty(), "{missing:#?}");
    for link in ["README.md", "docs/SECURITY.md", "docs/CONTRIBUTING.md"] {
        let linking = fs::read_to_string(root().join(link)).unwrap();
        assert!(linking.contains("ERRORS.md"), "{link}");
    }
}

#[test]
fn placeholders_and_broken_lines_are_read_through() {
    let code = "bail!(\n    \"{}: {what} of {n:>3} \\\n     tokens\", f({ x })\n)";
    assert_eq!(plain(code), "bail!(\n    \"…: … of … tokens\", f({ x })\n)");
    assert_eq!(quotes("| a |\n| `b …` | `c` |\n`d`"), ["b …"]);
}
