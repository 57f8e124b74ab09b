//! What strangers hand in and models say, apart from engines and connections, for the fuzz target.

use crate::calls::add;
use crate::calls::forms;
use crate::grammar::gbnf;
use crate::request::tools::Tool;
use crate::request::{self, BadLine, Endpoint, Request};
use crate::thought::{CallOptions, Splitter};
use crate::{anthropic, llama, plan, responses, utilities};
use serde_json::json;
use std::sync::Arc;

/// A check of a body.
pub type Check = fn(&[u8]) -> Result<(), BadLine>;

/// Checks of the bodies of all kinds of requests.
pub const BODIES: [Check; 11] = [
    |body| Request::from_body("id", Endpoint::Chat, body).map(drop),
    |body| Request::from_body("id", Endpoint::Completions, body).map(drop),
    |body| anthropic::request("id", body).map(drop),
    |body| anthropic::counted("id", body).map(drop),
    |body| responses::request("id", body).map(drop),
    |body| llama::request("id", body).map(drop),
    |body| utilities::ToTokenize::read(body).map(drop),
    |body| utilities::to_detokenize(body).map(drop),
    |body| utilities::ToRender::read(body).map(drop),
    |body| plan::order(body).map(drop),
    |body| request::object(body).map(drop),
];

/// Reads a grammar in GBNF.
///
/// # Errors
/// What is wrong with it.
pub fn grammar(text: &str) -> Result<String, String> {
    gbnf::to_lark(text)
}

/// Returns what is thought, content, and calls of an answer that comes in pieces, from a model that
/// calls tools in the form of this number. `prompt` is what it answers.
#[must_use]
pub fn parts(form: u8, prompt: &str, pieces: &[&str]) -> String {
    let tool = |name: &str| Tool {
        name: name.into(),
        description: None,
        parameters: json!({"type": "object", "properties": {
            "a": {"type": "integer"}, "b": {"type": ["string", "null"]}, "c": {"type": "array"},
        }}),
        strict: false,
    };
    let options = CallOptions {
        form: forms::numbered(form.into()),
        tools: Arc::new([tool("f"), tool("g")]),
        only_one: false,
    };
    let mut splitter = Splitter::new(prompt, Some(options));
    let mut parts = Vec::new();
    for piece in pieces {
        let came = splitter.push(piece, None);
        came.into_iter().for_each(|part| add(&mut parts, part));
    }
    let came = splitter.finish();
    came.into_iter().for_each(|part| add(&mut parts, part));
    format!("{parts:?}")
}

#[cfg(test)]
#[path = "../../fuzz/src/serve/mod.rs"]
mod checks;

#[cfg(test)]
mod tests {
    use super::checks::check;
    use crate::calls::forms;
    use proptest::prelude::*;

    /// Words of calls, JSON, grammars, and bodies.
    const WORDS: [&str; 64] = [
        "{",
        "}",
        "[",
        "]",
        "\"",
        "\\",
        ":",
        ",",
        " ",
        "\n",
        "f",
        "g",
        "a",
        "1",
        "null",
        "\"a\"",
        "{}",
        "\"name\": \"f\"",
        "\"arguments\": {",
        "\"parameters\": {}",
        "<function=f>",
        "</function>",
        "<parameter=a>",
        "</parameter>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "<invoke name=\"f\">",
        "</invoke>",
        "<parameter name=\"b\">",
        "<think>",
        "</think>",
        "<|channel|>",
        "commentary to=functions.f",
        "<|message|>",
        "<|call|>",
        "<|end|>",
        "<|start|>assistant",
        "[CALL_ID]",
        "[ARGS]",
        "call:f{",
        "<|\"|>",
        "```json",
        "root ::= ",
        "\nx ::= ",
        "x",
        "root",
        "(",
        ")",
        "|",
        "*",
        "+",
        "?",
        "{2,3}",
        "[^a-c]",
        ".",
        "# ",
        "\\x41",
        "{\"prompt\":",
        "{\"messages\":[",
        "\"tools\":[",
        "\"grammar\":",
        "é",
    ];

    fn any_input() -> impl Strategy<Value = Vec<u8>> {
        let word = proptest::sample::select(&WORDS[..]).prop_map(String::from);
        let mark = any::<(u8, u8)>().prop_map(|(form, mark)| {
            let marks: Vec<&str> = forms::numbered(form.into()).shown().collect();
            let mark = marks.get(usize::from(mark) % marks.len().max(1));
            mark.copied().unwrap_or_default().to_string()
        });
        let part = prop_oneof![4 => word, 2 => mark, 1 => "\\PC{0,3}"];
        let text = proptest::collection::vec(part, 0..40);
        let head = proptest::option::of(any::<[u8; 2]>());
        (head, text).prop_map(|(head, text)| {
            let mut bytes: Vec<u8> = head.into_iter().flatten().collect();
            bytes.extend(text.concat().into_bytes());
            bytes
        })
    }

    #[test]
    fn words_of_all_forms_in_any_order_are_taken_or_refused() {
        let n_cases = if tier_plan_testing::is_nightly() {
            200_000
        } else {
            400
        };
        proptest!(ProptestConfig::with_cases(n_cases), |(bytes in any_input())| check(&bytes));
    }
}
