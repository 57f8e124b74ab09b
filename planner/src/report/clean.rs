//! Takes what is private out of a report before it is written: reports are sent to others.
//!
//! Records and plans name no host and no user. But their names are free text, in which a path can
//! stand.

use super::Report;
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::Path;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::record::{self, RunRecord};

/// Most characters of a name in a report.
const MAX_CHARS: usize = 300;

/// Stands for a path.
const GONE: &str = "…";

/// Whether a character ends a path in running text.
fn ends_path(c: char) -> bool {
    c.is_whitespace()
        || matches!(
            c,
            '"' | '\'' | '`' | '<' | '>' | '|' | ',' | ';' | ')' | ']'
        )
}

/// Returns the length of an absolute path at the start of a text, 0 where there is none. One name
/// after a single slash says nothing private.
fn path_len(text: &str) -> usize {
    let len = text.find(ends_path).unwrap_or(text.len());
    let word = &text[..len];
    let bytes = word.as_bytes();
    let drive = bytes.len() > 3
        && bytes[0].is_ascii_alphabetic()
        && bytes[1] == b':'
        && matches!(bytes[2], b'\\' | b'/')
        && bytes[3] != b'/';
    let unix = word.strip_prefix('/').is_some_and(|rest| {
        let mut parts = rest.split('/').filter(|part| !part.is_empty());
        !rest.starts_with('/') && parts.next().is_some() && parts.next().is_some()
    });
    let is_path = drive
        || unix
        || word.len() > 2 && (word.starts_with("~/") || word.starts_with(r"\\"))
        || word.starts_with("file://");
    if is_path { len } else { 0 }
}

/// Returns a text with `…` for each absolute path, and cut to [`MAX_CHARS`].
pub(super) fn text(text: &str) -> String {
    let mut clean = String::with_capacity(text.len().min(4 * MAX_CHARS));
    let (mut rest, mut before, mut left) = (text, None, MAX_CHARS);
    while let Some(c) = rest.chars().next() {
        if left == 0 {
            clean.push('…');
            break;
        }
        left -= 1;
        let begins = before.is_none_or(|b: char| !b.is_alphanumeric() && !"/\\.~_-".contains(b));
        let len = if begins { path_len(rest) } else { 0 };
        if len > 0 {
            clean.push_str(GONE);
            before = Some('…');
            rest = &rest[len..];
        } else {
            clean.push(c);
            before = Some(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    clean
}

fn clean(of: &mut String) {
    let new = text(of);
    if new != *of {
        *of = new;
    }
}

fn clean_id(id: &mut SourceId) {
    clean(&mut id.name);
    clean(&mut id.hash);
}

/// Cleans every text in a JSON value.
fn clean_json(value: &mut Value) {
    match value {
        Value::String(text) => clean(text),
        Value::Array(items) => items.iter_mut().for_each(clean_json),
        Value::Object(map) => map.values_mut().for_each(clean_json),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Cleans a record by its file, so that no text of it is forgotten.
fn clean_record(of: &mut RunRecord) -> Result<()> {
    let mut value: Value = serde_json::from_str(&of.encode()).context("reading a run record")?;
    let before = value.clone();
    clean_json(&mut value);
    if value != before {
        *of = record::decode(value.to_string().as_bytes(), Path::new("run record"))?;
    }
    Ok(())
}

/// Takes paths out of a report, and cuts its names.
///
/// # Errors
/// When a record cannot be encoded.
pub(super) fn report(of: &mut Report) -> Result<()> {
    for text in [&mut of.title, &mut of.host]
        .into_iter()
        .chain(&mut of.notes)
    {
        clean(text);
    }
    for plan in &mut of.plans {
        clean(&mut plan.name);
        for record in &mut plan.records {
            clean_record(record)?;
        }
        let Some(placement) = &mut plan.placement else {
            continue;
        };
        clean(&mut placement.name);
        clean(&mut placement.solver.status);
        clean_id(&mut placement.model);
        clean_id(&mut placement.machine);
        placement.profile.iter_mut().for_each(clean_id);
        for copy in &mut placement.reads.copies {
            clean(&mut copy.file);
        }
        for tier in &mut placement.tiers {
            clean(&mut tier.tier.name);
            clean(&mut tier.tier.source);
        }
    }
    if let Some(profile) = &mut of.profile {
        clean(&mut profile.made);
        clean_id(&mut profile.model);
        clean_id(&mut profile.id);
    }
    for curve in &mut of.curves {
        clean(&mut curve.label);
    }
    for run in &mut of.history {
        for text in [
            &mut run.report,
            &mut run.plan,
            &mut run.model,
            &mut run.machine,
        ] {
            clean(text);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;
    use tier_plan_runtime::formats::placement::ExpertCopy;

    #[test]
    fn paths_are_taken_out() {
        for (found, wanted) in [
            ("/home/ann/models/x.gguf", "…"),
            ("made of /home/ann/x.gguf, by hand", "made of …, by hand"),
            ("\"/srv/ann\"", "\"…\""),
            ("--from=/mnt/ann/y", "--from=…"),
            (r"C:\Users\ann\x.gguf", "…"),
            ("C:/Users/ann", "…"),
            (r"\\server\ann\x", "…"),
            ("~/ann/x", "…"),
            ("file:///home/ann/x", "…"),
        ] {
            assert_eq!(text(found), wanted);
        }
    }

    #[test]
    fn other_texts_stay() {
        for same in [
            "",
            "tokens/s, 12/24",
            "org/model-7b-q4",
            "https://example.com/a/b",
            "a / b",
            "/data",
            "ilp",
            "Intel(R) Xeon(R) CPU @ 2.20GHz, 2 threads, 15.6 GiB",
            "50 % of 1/2",
        ] {
            assert_eq!(text(same), same);
        }
        let long = "é".repeat(10_000);
        assert_eq!(text(&long).chars().count(), MAX_CHARS + 1);
    }

    #[test]
    fn no_text_of_a_report_keeps_a_path() {
        let mut full = sample::report(4, 16, 2, 3, 2, false);
        let path = "/home/ann/private/x";
        full.title = path.into();
        full.host = path.into();
        full.notes.push(path.into());
        for plan in &mut full.plans {
            plan.name = path.into();
            for record in &mut plan.records {
                record.plan = path.into();
                record.host = path.into();
                record.isa = path.into();
                record.machine.as_mut().unwrap().name = path.into();
                record.tiers[0].name = path.into();
            }
            let placement = plan.placement.as_mut().unwrap();
            placement.name = path.into();
            placement.machine.name = path.into();
            placement.reads.copies.push(ExpertCopy {
                file: path.into(),
                share: 0.5,
            });
            placement
                .tiers
                .iter_mut()
                .for_each(|t| t.tier.source = path.into());
        }
        full.profile.as_mut().unwrap().made = path.into();
        full.curves[0].label = path.into();
        full.add_own_runs();
        report(&mut full).unwrap();
        assert!(!format!("{full:?}").contains("/home"));
    }
}
