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
