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

#[test]
fn more_features_render_as_in_jinja2() {
    check(include_str!("more_features.json"));
}

#[test]
fn errors_are_one_bounded_line_with_the_line_of_the_template() {
    let error = render("a\r\n{{ 'x' % 1 }}", vec![]).unwrap_err();
    assert!(error.starts_with("failed, line 2: "), "{error}");
    let error = render("\n\n{{ raise_exception('x\\n\u{1b}[2J' * 999) }}", vec![]).unwrap_err();
    assert!(
        error.starts_with("failed, line 3: x\\n\\u001b[2J"),
        "{error}"
    );
    assert!(
        error.len() < 1000 && !error.contains(char::is_control),
        "{error}"
    );
}

#[test]
fn endless_templates_are_stopped() {
    let many = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}";
    let error = render(many, vec![]).unwrap_err();
    assert!(error.contains("too many steps"), "{error}");
}

#[test]
fn unended_tags_are_refused() {
    for source in [
        "{%}",
        "{%-}",
        "{% if true",
        "{{",
        "{{ '",
        "{#",
        "{% raw %}{{",
        "{{ a % }}",
        "{{ % }}",
        "{% %}",
    ] {
        assert!(Compiled::new(source, None).is_err(), "{source}");
    }
}

#[test]
fn dates_have_the_formats_of_python() {
    let date = render("{{ strftime_now('%d %b %Y %-H:%M') }}", vec![]);
    assert_eq!(date.as_deref(), Ok("01 Mar 2024 13:05"));
}
