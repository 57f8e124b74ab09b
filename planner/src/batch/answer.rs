//! Lines of answers.

use super::{Answered, BadLine};
use serde_json::{Value, json};
use std::hash::{DefaultHasher, Hasher};

/// What the id of every answer begins with.
pub(super) const ID_PREFIX: &str = "batch_req_";

/// Returns the line of the output for an answered request.
pub fn line(answered: &Answered<'_>) -> Value {
    let name = &answered.request.custom_id;
    let id = number(name);
    json!({
        "id": format!("{ID_PREFIX}{id}"),
        "custom_id": name,
        "response": {
            "status_code": 200,
            "request_id": format!("req_{id}"),
            "body": answered.body(),
        },
        "error": null,
    })
}

/// Returns the line of the output for a line that has no answer.
pub fn refusal(line: usize, bad: &BadLine) -> Value {
    let name = bad.custom_id.clone();
    let id = number(name.as_deref().unwrap_or(&format!("line {line}")));
    json!({
        "id": format!("{ID_PREFIX}{id}"),
        "custom_id": name,
        "line": line,
        "response": null,
        "error": { "code": bad.code.name(), "message": bad.message },
    })
}

/// Returns a number that a name has in every run.
pub(super) fn number(name: &str) -> String {
    let mut hasher = DefaultHasher::new();
    hasher.write(name.as_bytes());
    format!("{:016x}", hasher.finish())
}
