//! Features of Jinja2, each with what Jinja2 renders.

use super::Compiled;
use minijinja::value::Value;
use serde::Deserialize;
use std::time::{Duration, UNIX_EPOCH};

/// A template and what Jinja2 makes of it, set up as transformers sets it up.
#[derive(Deserialize)]
struct Feature {
    name: String,
    template: String,
    messages: Vec<Value>,
    /// Absent if Jinja2 refuses it.
    rendered: Option<String>,
}

fn render(source: &str, messages: Vec<Value>) -> Result<String, String> {
    let now = UNIX_EPOCH + Duration::from_secs(1_709_298_305);
    Compiled::new(source, Some(now))?.render(messages, "<s>", "</s>")
}

fn check(json: &str) {
    let features: Vec<Feature> = serde_json::from_str(json).unwrap();
    assert!(!features.is_empty());
    let mut wrong = Vec::new();
    for Feature {
        name,
        template,
        messages,
        rendered,
    } in features
    {
        let got = render(&template, messages);
        let right = match &rendered {
            Some(text) => got.as_ref() == Ok(text),
            None => got.is_err(),
        };
        if !right {
            wrong.push(format!(
                "{name}: {template:?}\n  {got:?}\n  expected {rendered:?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn features_render_as_in_jinja2() {
    check(include_str!("features.json"));
}
