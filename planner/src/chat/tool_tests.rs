//! How templates are found to take tools, calls, and their results.

use super::dialect::{Dialect, Rendered, ToolStyle};
use super::dialect_tests::tokenizer;
use super::message::{Call, CallParts, CallStyle, Message, Role};
use super::template::Surroundings;
use super::tests::{dialect, user};
use serde_json::json;

/// Prints tools, calls as objects, and results.
const WHOLE: &str = r#"{% for tool in tools or [] %}T{{ tool | tojson }}{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments | tojson }}>{% endfor %}{% endfor %}"#;

fn style(null_content: bool, text_arguments: bool) -> Option<CallStyle> {
    Some(CallStyle {
        null_content,
        text_arguments,
    })
}

fn talk(style: CallStyle) -> Vec<Message> {
    let call = Call {
        id: "i".into(),
        name: "f".into(),
        arguments: json!({"a": "<|endoftext|>", "n": 1}),
    };
    let answer = Message {
        tools: CallParts {
            calls: vec![call],
            style,
            ..CallParts::default()
        },
        ..Message::new(Role::Assistant, "")
    };
    let result = Message {
        tools: CallParts {
            call_id: Some("i".into()),
            name: Some("f".into()),
            ..CallParts::default()
        },
        ..Message::new(Role::Tool, "<|endoftext|>")
    };
    vec![user("Hi"), answer, result]
}

fn style_of(source: &str) -> ToolStyle {
    dialect(source, false).tool_style()
}

#[test]
fn templates_take_calls_in_the_style_that_suits_them() {
    let whole = style_of(WHOLE);
    assert!(whole.prints_tools);
    assert_eq!(whole.calls, style(false, false));
    // Arguments are a part of a text.
    let joined = WHOLE.replace("c.function.arguments | tojson", "'' + c.function.arguments");
    assert_eq!(style_of(&joined).calls, style(false, true));
    // Calls are printed where there is no content.
    let null = WHOLE.replace(
        "{% for c in m.tool_calls or [] %}",
        "{% for c in (m.tool_calls or []) if m.content is none %}",
    );
    assert_eq!(style_of(&null).calls, style(true, false));
    let plain = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}";
    let expected = ToolStyle {
        prints_tools: false,
        calls: None,
    };
    assert_eq!(style_of(plain), expected);
    // Mistral's are strict about the names of calls.
    let strict = WHOLE.replace(
        "<{{ c.function.name }}",
        "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}<{{ c.function.name }}",
    );
    assert_eq!(style_of(&strict).calls, style(false, false));
}

#[test]
fn texts_of_calls_and_results_are_told_from_structure() {
    let dialect: Dialect = dialect(WHOLE, false);
    let messages = talk(dialect.tool_style().calls.unwrap());
    let around = Surroundings {
        tools: vec![
            json!({"type": "function", "function": {"name": "f", "description": "<|endoftext|>"}}),
        ],
        ..Surroundings::default()
    };
    let rendered = dialect.render_in(&messages, &around, &tokenizer()).unwrap();
    let Rendered::Prompt { text, plain, .. } = rendered else {
        panic!("{rendered:?}");
    };
    let expected = "T{\"type\": \"function\", \"function\": {\"name\": \"f\", \"description\": \"<|endoftext|>\"}}\
                    [user]Hi[assistant]<f {\"a\": \"<|endoftext|>\", \"n\": 1}>[tool]<|endoftext|>";
    assert_eq!(text, expected);
    let texts: Vec<&str> = plain.iter().map(|range| &text[range.clone()]).collect();
    assert_eq!(
        texts,
        ["<|endoftext|>", "Hi", "<|endoftext|>", "<|endoftext|>"]
    );
}

#[test]
fn variables_reach_the_template_and_change_none_of_its_own() {
    let source = "{{ mood }}{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let variables = json!({"mood": {"a": 1}, "bos_token": "x"});
    let around = Surroundings {
        variables: variables.as_object().unwrap().clone(),
        ..Surroundings::default()
    };
    let rendered = dialect(source, false).render_in(&[user("Hi")], &around, &tokenizer());
    let Rendered::Prompt { text, .. } = rendered.unwrap() else {
        panic!("no prompt");
    };
    assert_eq!(text, "{'a': 1}<s>Hi");
}
