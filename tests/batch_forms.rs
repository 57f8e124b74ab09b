//! `tier-plan batch`: answers that must have a form, which are those of `serve`.

use crate::batch::{answers, arguments, batch, choice, completion, place};
use crate::common::{run_in, stderr, succeeded};
use serde_json::{Value, json};
use std::fs;

/// A template that opens a thought at the end of the prompt.
const THINKING: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                        {% if enable_thinking is defined and not enable_thinking %}<think></think>\n\
                        {% else %}<think>\n{% endif %}";

const TEMPLATE: [&str; 2] = ["--chat-template", "chat.jinja"];

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "topic": {"enum": ["billing", "delivery", "defect"]},
            "urgent": {"type": "boolean"},
        },
        "required": ["topic", "urgent"],
        "additionalProperties": false,
    })
}

fn is_label(text: &str) -> bool {
    let label: Value = serde_json::from_str(text).unwrap_or_default();
    let topics = ["billing", "delivery", "defect"].map(Value::from);
    topics.contains(&label["topic"]) && label["urgent"].is_boolean()
}

fn chat(id: &str, body: Value) -> String {
    let line = json!({"custom_id": id, "url": "/v1/chat/completions", "body": body});
    format!("{line}\n")
}

/// Bodies of requests with forms, and of some without.
fn bodies() -> Vec<(&'static str, Value)> {
    let (text, messages) = (
        "In the beginning",
        [json!({"role": "user", "content": "Hello"})],
    );
    let schema =
        json!({"type": "json_schema", "json_schema": {"name": "label", "schema": schema()}});
    let completion = |body: Value| ("/v1/completions", body);
    let chat = |body: Value| ("/v1/chat/completions", body);
    vec![
        completion(
            json!({"prompt": text, "max_tokens": 60, "temperature": 0, "response_format": schema}),
        ),
        completion(
            json!({"prompt": text, "max_tokens": 60, "temperature": 0.9, "seed": 5, "n": 3,
            "response_format": schema, "logprobs": 2}),
        ),
        completion(
            json!({"prompt": text, "max_tokens": 5, "temperature": 0, "response_format": schema}),
        ),
        completion(json!({"prompt": text, "max_tokens": 12, "temperature": 0})),
        completion(
            json!({"prompt": text, "max_tokens": 12, "temperature": 0, "guided_choice": ["yes", "no"]}),
        ),
        completion(
            json!({"prompt": text, "max_tokens": 12, "temperature": 1, "seed": 2, "guided_regex": "[ab]{2}"}),
        ),
        completion(
            json!({"prompt": text, "max_tokens": 12, "temperature": 1, "seed": 2,
            "grammar": "root ::= \"<\" [x-z]+ \">\""}),
        ),
        completion(
            json!({"prompt": text, "max_tokens": 12, "temperature": 0, "guided_grammar": "start: \"a\" \"b\"+"}),
        ),
        chat(
            json!({"messages": messages, "max_tokens": 40, "temperature": 0, "response_format": schema}),
        ),
        chat(
            json!({"messages": messages, "max_tokens": 60, "temperature": 0, "response_format": schema,
            "chat_template_kwargs": {"enable_thinking": false}}),
        ),
        chat(json!({"messages": messages, "max_tokens": 12, "temperature": 0})),
    ]
}

/// Requests with these bodies, each with its number as its name.
fn lines() -> Vec<String> {
    let line = |(id, (url, body)): (usize, (&str, Value))| match url {
        "/v1/completions" => completion(&id.to_string(), body),
        _ => chat(&id.to_string(), body),
    };
    bodies().into_iter().enumerate().map(line).collect()
}

fn place_with_template(lines: &[String]) -> tempfile::TempDir {
    let folder = place(lines);
    fs::write(folder.path().join("chat.jinja"), THINKING).unwrap();
    folder
}

#[test]
fn answers_of_a_form_are_the_same_in_any_company() {
    let lines = lines();
    let together = place_with_template(&lines);
    let summary = batch(
        together.path(),
        &[&TEMPLATE[..], &["--parallel", "8"]].concat(),
    );
    assert_eq!(summary["answered"], lines.len(), "{summary}");
    let found = answers(together.path());
    for (number, line) in lines.iter().enumerate() {
        let folder = place_with_template(std::slice::from_ref(line));
        batch(
            folder.path(),
            &[&TEMPLATE[..], &["--parallel", "1"]].concat(),
        );
        let name = number.to_string();
        assert_eq!(answers(folder.path())[&name], found[&name], "{line}");
    }
    // What is asked for is there.
    let text = |name: &str| choice(&found[name])["text"].as_str().unwrap().to_string();
    let ends = |name: &str| choice(&found[name])["finish_reason"].clone();
    assert!(
        is_label(&text("0")) && ends("0") == "stop",
        "{:?}",
        found["0"]
    );
    for choice in found["1"]["response"]["body"]["choices"]
        .as_array()
        .unwrap()
    {
        assert!(is_label(choice["text"].as_str().unwrap()), "{choice}");
    }
    // Its tokens were too few.
    assert!(!is_label(&text("2")) && ends("2") == "length");
    assert_eq!(
        found["2"]["response"]["body"]["usage"]["completion_tokens"],
        5
    );
    assert!(["yes", "no"].contains(&&*text("4")), "{}", text("4"));
    assert!(
        ["aa", "ab", "ba", "bb"].contains(&&*text("5")),
        "{}",
        text("5")
    );
    assert!(text("6").starts_with('<') && text("7").starts_with("ab"));
    let message = |name: &str| &choice(&found[name])["message"];
    // The thought that the template opens comes first, unless a request does without one.
    assert!(
        message("8")["reasoning_content"].is_string(),
        "{}",
        message("8")
    );
    let content = message("9")["content"].as_str().unwrap();
    assert!(is_label(content), "{}", message("9"));
    assert_eq!(message("9").get("reasoning_content"), None);
}

/// The server gives each answer as a batch does.
#[cfg(unix)]
#[test]
fn answers_of_a_form_are_those_of_the_server() {
    use crate::serve::client::Served;
    let folder = place_with_template(&lines());
    batch(folder.path(), &TEMPLATE);
    let found = answers(folder.path());
    let template = folder.path().join("chat.jinja");
    let server = Served::start(&[
        "--chat-template",
        template.to_str().unwrap(),
        "--parallel",
        "2",
    ]);
    for (number, (url, body)) in bodies().into_iter().enumerate() {
        let served = server.post(url, &body).ok();
        let batched = &found[&number.to_string()]["response"]["body"];
        assert_eq!(batched["choices"], served["choices"], "{body}");
        for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
            assert_eq!(
                batched["usage"][count], served["usage"][count],
                "{count}: {body}"
            );
        }
    }
}

#[test]
fn a_form_that_is_wrong_is_the_error_of_its_line() {
    let of = |id: &str, more: Value| {
        let mut body = json!({"prompt": "a", "max_tokens": 200, "temperature": 0});
        let fields = body.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        completion(id, body)
    };
    let folder = place(&[
        of("schema", json!({"guided_json": {"type": "nothing"}})),
        of("again", json!({"guided_json": {"type": "nothing"}})),
        of("good", json!({"guided_json": schema()})),
        of("gbnf", json!({"grammar": "root ::= \"a\"\n  other ::= ("})),
        of("two", json!({"guided_regex": "a", "guided_choice": ["a"]})),
        of("large", json!({"guided_regex": "a".repeat(1 << 18)})),
        of("tools", json!({"tools": [{"type": "function"}]})),
    ]);
    let output = succeeded(run_in(folder.path(), &arguments(&[])));
    let words = "6 have no answer: their lines in out.jsonl have an error";
    assert!(stderr(&output).contains(words), "{}", stderr(&output));
    let found = answers(folder.path());
    assert!(is_label(choice(&found["good"])["text"].as_str().unwrap()));
    for (name, code, words) in [
        ("schema", "invalid_request", "body.response_format: "),
        ("again", "invalid_request", "body.response_format: "),
        ("gbnf", "invalid_request", "body.grammar: line 2: the end"),
        (
            "two",
            "invalid_request",
            "body.guided_choice: beside guided_regex",
        ),
        ("large", "invalid_request", "expected at most 262144"),
        ("tools", "unsupported", "body.tools"),
    ] {
        let error = &found[name]["error"];
        let message = error["message"].as_str().unwrap();
        assert!(
            error["code"] == code && message.contains(words),
            "{name}: {error}"
        );
    }
    // A later run says that it has no answers for them, too.
    let summary = batch(folder.path(), &[]);
    let counts = ["answered", "refused", "answered_before", "refused_before"];
    assert_eq!(counts.map(|key| &summary[key]), [0, 0, 7, 6]);
    let output = succeeded(run_in(folder.path(), &arguments(&[])));
    let words = "7 were answered before, 6 of them with an error";
    assert!(stderr(&output).contains(words), "{}", stderr(&output));
}

#[test]
fn a_run_with_forms_goes_on_where_an_earlier_one_was_cut_off() {
    let line = |i: usize| {
        let body = json!({"prompt": format!("{i} In the beginning"), "max_tokens": 200, "temperature": 0.8,
            "guided_json": schema()});
        completion(&i.to_string(), body)
    };
    let lines: Vec<String> = (0..8).map(line).collect();
    let folder = place(&lines);
    batch(folder.path(), &["--parallel", "3"]);
    let whole = answers(folder.path());
    let path = folder.path().join("out.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let third: usize = text.split_inclusive('\n').take(3).map(str::len).sum();
    for torn in [third, third + 50] {
        fs::write(&path, &text[..torn]).unwrap();
        let summary = batch(folder.path(), &[]);
        let counts = ["answered_before", "refused_before", "answered", "refused"];
        assert_eq!(counts.map(|key| &summary[key]), [3, 0, 5, 0]);
        assert_eq!(answers(folder.path()), whole);
    }
    for line in whole.values() {
        assert!(is_label(choice(line)["text"].as_str().unwrap()), "{line}");
    }
}
