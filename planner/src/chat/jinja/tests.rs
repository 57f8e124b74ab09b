//! Features of Jinja2, each with what Jinja2 renders.

use super::{Compiled, Surroundings};
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
    Compiled::new(source, Some(now))?.render(messages, &Surroundings::default(), "<s>", "</s>")
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

/// One call could make more than there is memory for, of texts of a few thousand bytes.
#[test]
fn texts_that_are_too_long_are_refused_before_they_are_made() {
    const VALUES: &str = "{% set a = 'a' * 9000 %}{% set b = 'b' * 9000 %}{% set ns = namespace(x=['x']) %}\
        {% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{% set x = ns.x %}";
    for expression in [
        "a.replace('a', b)",
        "a|replace('a', b)",
        "a.replace('', b)",
        "b.join(a|list)",
        r"('\t' * 100).expandtabs(1000000)",
        r"('\n' * 9000)|indent(b, true, true)",
        "('a b ' * 9000)|wordwrap(1, true, b)",
        "a.translate({97: b})",
        "a|tojson(indent=b * 90)",
        "a|list|tojson(separators=[b, ':'])",
        "'%9999999d' % 1",
        "'%99999999999999999999d' % 1",
        "'%.9999999f' % 1",
        "'%*d' % (99999999, 1)",
        "('%(a)s' * 9000) % {'a': b}",
        "('{a}' * 9000).format(a=b)",
        "('{a}' * 9000).format_map({'a': b})",
        "'{:>99999999}'.format(1)",
        "x",
        "x|string",
        "x|pprint",
        "x|tojson",
        "x|forceescape",
        "'%s' % x",
        "'{}'.format(x)",
        "raise_exception(x)",
    ] {
        let error = render(&format!("{VALUES}{{{{ {expression} }}}}"), vec![]).unwrap_err();
        assert!(error.len() < 1000, "{expression}: {error}");
    }
    let asked = render(&format!("{VALUES}{{{{ x is callable }}}}"), vec![]);
    assert_eq!(asked.as_deref(), Ok("False"));
    let long = render(
        &format!("{VALUES}{{{{ a.replace('a', b[:99])|length }}}}"),
        vec![],
    );
    assert_eq!(long.as_deref(), Ok("891000"));
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
