//! The dashboard for Grafana shows what `/metrics` has, all of it, and nothing else.

use super::*;
use crate::common::root;
use std::collections::BTreeSet;

/// Begins the name of every metric.
const PREFIX: &str = "tier_plan_";

/// A metric as `# TYPE` announces it, and the names of its samples.
fn announced(text: &str) -> Vec<(String, Vec<String>)> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types
        .map(|line| {
            let (name, kind) = line.split_once(' ').unwrap();
            let endings: &[&str] = match kind {
                "counter" => &["_total"],
                "gauge" => &[""],
                "histogram" => &["_bucket", "_sum", "_count"],
                other => panic!("{name} is a {other}"),
            };
            let samples = endings.iter().map(|ending| format!("{name}{ending}"));
            (name.to_string(), samples.collect())
        })
        .collect()
}

/// Returns the names of metrics in an expression.
fn named(expression: &str) -> impl Iterator<Item = &str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = expression.split(move |c| !is_part(c));
    words.filter(|word| word.starts_with(PREFIX))
}

/// Returns every text under the name `key`.
fn texts<'v>(value: &'v Value, key: &str, onto: &mut Vec<&'v str>) {
    match value {
        Value::Object(fields) => {
            onto.extend(fields.get(key).and_then(Value::as_str));
            fields.values().for_each(|value| texts(value, key, onto));
        }
        Value::Array(items) => items.iter().for_each(|value| texts(value, key, onto)),
        _ => {}
    }
}

#[test]
fn the_dashboard_has_every_metric_and_no_other() {
    let server = Served::start(&[]);
    server.post("/v1/completions", &completion(PROMPT, 4)).ok();
    let text = server.get("/metrics").text();
    let metrics = announced(&text);
    assert!(metrics.len() > 15, "{text}");
    let has_sample = |sample: &String| {
        let mut values = text
            .lines()
            .filter_map(|line| line.strip_prefix(sample.as_str()));
        values.any(|rest| rest.starts_with([' ', '{']))
    };
    for (name, samples) in &metrics {
        assert!(name.starts_with(PREFIX), "{name}");
        assert!(samples.iter().all(has_sample), "{samples:?} in {text}");
    }
    let page = std::fs::read_to_string(root().join("docs/grafana.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&page).unwrap();
    let mut expressions = Vec::new();
    for key in ["expr", "definition"] {
        texts(&dashboard, key, &mut expressions);
    }
    let used: BTreeSet<&str> = expressions.iter().flat_map(|e| named(e)).collect();
    let known: BTreeSet<&str> = metrics
        .iter()
        .flat_map(|(_, samples)| samples.iter().map(String::as_str))
        .collect();
    let unknown: Vec<_> = used.difference(&known).collect();
    assert!(unknown.is_empty(), "not in /metrics: {unknown:?}");
    let mut shown = Vec::new();
    texts(&dashboard["panels"], "expr", &mut shown);
    let shown: BTreeSet<&str> = shown.iter().flat_map(|e| named(e)).collect();
    for (name, samples) in &metrics {
        let is_shown = samples.iter().any(|sample| shown.contains(sample.as_str()));
        assert!(is_shown, "{name} is in no panel");
    }
    let manual = std::fs::read_to_string(root().join("docs/SERVING.md")).unwrap();
    for (name, samples) in &metrics {
        let row = format!("| `{}`", samples[0].trim_end_matches("_bucket"));
        assert!(manual.contains(&row), "{name}: no {row:?} in SERVING.md");
    }
}

#[test]
fn the_dashboard_can_be_imported() {
    let page = std::fs::read_to_string(root().join("docs/grafana.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&page).unwrap();
    let input = &dashboard["__inputs"][0];
    assert_eq!(
        (&input["name"], &input["type"], &input["pluginId"]),
        (
            &json!("DS_PROMETHEUS"),
            &json!("datasource"),
            &json!("prometheus")
        )
    );
    let mut sources = Vec::new();
    texts(&dashboard["panels"], "uid", &mut sources);
    texts(&dashboard["templating"], "uid", &mut sources);
    assert!(!sources.is_empty());
    assert!(
        sources.iter().all(|uid| *uid == "${DS_PROMETHEUS}"),
        "{sources:?}"
    );
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<u64> = panels.iter().map(|p| p["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "two panels have one id");
    // No two panels take one place of the 24 columns.
    let mut taken = BTreeSet::new();
    for panel in panels {
        let at = |name: &str| panel["gridPos"][name].as_u64().unwrap();
        assert!(at("x") + at("w") <= 24 && at("w") > 0 && at("h") > 0);
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(
                    taken.insert((x, y)),
                    "{} lies on another panel",
                    panel["title"]
                );
            }
        }
    }
}
