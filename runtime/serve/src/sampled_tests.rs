use super::*;
use crate::request::Role;
use crate::request::tools::ToolCall;
use serde_json::json;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::tokenizer::TokenizerSource;

const PROMPT: &str = "user: What now?\nassistant:";
const ANSWER: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\":1,   \"b\": [\"x\\u0079\"]}}\n</tool_call>";

fn tokenizer() -> Tokenizer {
    let gguf = Gguf::open(&tier_plan_testing::demo_model()).unwrap();
    Tokenizer::new(TokenizerSource::from_gguf(&gguf).unwrap()).unwrap()
}

/// Spells a text letter by letter, as its tokenizer would not.
fn letters(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let one = |c: char| tokenizer.encode(&c.to_string(), false).unwrap();
    let ids: Vec<u32> = text.chars().flat_map(one).collect();
    assert_ne!(ids, tokenizer.encode(text, false).unwrap());
    ids
}

fn message(id: &str, arguments: Value) -> Message {
    let Value::Object(arguments) = arguments else {
        panic!("{arguments}");
    };
    Message {
        calls: vec![ToolCall {
            id: id.into(),
            name: "f".into(),
            arguments,
        }],
        ..Message::new(Role::Assistant, "")
    }
}

/// A conversation as a template prints it, and where `plain` texts are in it.
fn rendered(before: &str, call: &str, plain: &[&str]) -> Rendered {
    let text = format!("{before}{call}\nuser: It is {call}.\nassistant:");
    let mut plain: Vec<_> = plain
        .iter()
        .map(|part| {
            let start = text.rfind(part).unwrap();
            start..start + part.len()
        })
        .collect();
    plain.sort_by_key(|range: &Range<usize>| range.start);
    Rendered { text, plain }
}

struct Case {
    tokenizer: Tokenizer,
    sampled: Sampled,
    ids: Vec<u32>,
}

impl Case {
    fn new() -> Self {
        let tokenizer = tokenizer();
        let sampled = Sampled::default();
        let ids = letters(&tokenizer, ANSWER);
        let call = Call {
            id: Some("i".into()),
            name: "f".into(),
            arguments: "{\"a\":1,\"b\":[\"xy\"]}".into(),
        };
        sampled.keep_calls(&[call], sampled.origin(PROMPT), ids.clone());
        Self {
            tokenizer,
            sampled,
            ids,
        }
    }

    fn apply(&self, rendered: Rendered, message: Message) -> Replayed {
        let replay = Replay {
            sampled: &self.sampled,
            form: Form::named("Hermes"),
            shown: &[],
            tokenizer: &self.tokenizer,
        };
        replay.apply(rendered, &[message], &[])
    }
}

const PRINTED: &str =
    "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\": [\"xy\"], \"a\": 1}}\n</tool_call>";

#[test]
fn a_call_has_the_tokens_that_the_model_drew() {
    let case = Case::new();
    let user = format!("It is {PRINTED}.");
    let before = rendered(PROMPT, PRINTED, &[&user]);
    let message = message("i", json!({"b": ["xy"], "a": 1}));
    let replayed = case.apply(before, message);
    // The call that a user speaks of is as it was.
    let expected = format!("{PROMPT}{ANSWER}\nuser: {user}\nassistant:");
    assert_eq!(replayed.text, expected);
    assert_eq!(replayed.text[replayed.plain[0].clone()], user);
    let (text, plain) = (&replayed.text, &replayed.plain);
    let encoded = case
        .tokenizer
        .encode_known(text, plain, &replayed.known(), usize::MAX);
    let mut start = case.tokenizer.encode(PROMPT, true).unwrap();
    start.extend(&case.ids);
    assert_eq!(encoded.unwrap()[..start.len()], start);
}

#[test]
fn what_differs_is_as_the_template_prints_it() {
    let case = Case::new();
    let same = json!({"b": ["xy"], "a": 1});
    let user = format!("It is {PRINTED}.");
    let other = PRINTED.replace("1}", "2}");
    for (prompt, printed, message) in [
        // Another conversation, another call, and a call of another name.
        (
            "user: What then?\nassistant:",
            PRINTED,
            message("i", same.clone()),
        ),
        (PROMPT, &other, message("i", json!({"b": ["xy"], "a": 2}))),
        (PROMPT, PRINTED, message("j", same.clone())),
        // A template that prints something else than the call.
        (PROMPT, &other, message("i", same.clone())),
        (PROMPT, "f(a = 1)", message("i", same.clone())),
        (
            PROMPT,
            "<tool_call>\n{\"name\": \"f\"",
            message("i", same.clone()),
        ),
    ] {
        let user = format!("It is {printed}.");
        let before = rendered(prompt, printed, &[&user]);
        let replayed = case.apply(before.clone(), message);
        assert_eq!(replayed, before.into(), "{prompt} {printed}");
    }
    // Only what a user said looks like the call.
    let mut before = rendered(PROMPT, "", &[]);
    before.text = format!("{PROMPT}\nuser: {user}\nassistant:");
    let start = before.text.find(&user).unwrap();
    let of_user = start..start + user.len();
    before.plain = Vec::from([of_user]);
    let replayed = case.apply(before.clone(), message("i", same.clone()));
    assert_eq!(replayed, before.into());
    // Where nothing is known of the texts, nothing is put back.
    let before = rendered(PROMPT, PRINTED, &[]);
    let replayed = case.apply(before.clone(), message("i", same));
    assert_eq!(replayed, before.into());
}

#[test]
fn the_oldest_answers_go_first() {
    let sampled = Sampled::default();
    let origin = sampled.origin("");
    let n = MAX_BYTES / 10 / size_of::<u32>();
    for key in 0..20 {
        sampled.keep(key, origin, vec![0; n]);
        // The first one is in use.
        assert!(sampled.find(0).is_some());
    }
    assert!(sampled.find(19).is_some() && sampled.find(1).is_none());
    sampled.keep(20, origin, vec![0; MAX_BYTES]);
    assert!(sampled.find(20).is_none());
    let table = sampled.table.lock().unwrap();
    let n_bytes: usize = table
        .answers
        .values()
        .map(|(answer, _)| answer.n_bytes())
        .sum();
    assert_eq!(table.n_bytes, n_bytes);
    assert!(n_bytes <= MAX_BYTES && table.answers.len() >= 8);
}

#[test]
fn keys_know_no_order_of_fields() {
    let sampled = Sampled::default();
    let key = |id: &str, arguments: Value| {
        let call = CallKey {
            id,
            name: "f",
            arguments: &arguments,
        };
        sampled.key([call].into_iter())
    };
    let one = key("i", json!({"a": 1, "b": {"c": null, "d": [1, "x"]}}));
    assert_eq!(
        one,
        key("i", json!({"b": {"d": [1, "x"], "c": null}, "a": 1}))
    );
    for other in [
        key("j", json!({"a": 1, "b": {"c": null, "d": [1, "x"]}})),
        key("i", json!({"a": 1, "b": {"c": null, "d": ["x", 1]}})),
        key("i", json!({"a": "1", "b": {"c": null, "d": [1, "x"]}})),
        key("i", json!({"a": 1, "b": {"c": "null", "d": [1, "x"]}})),
    ] {
        assert_ne!(one, other);
    }
}
