//! Bodies of completions in llama.cpp's own form, checked.

use crate::request::fields::{Fields, bad, whole};
use crate::request::read::{MAX_TOKENS, MAX_TOP_LOGPROBS, checked};
use crate::request::unsupported::{Unsupported, never, refuse};
use crate::request::{BadLine, Endpoint, Request, Sender, object};
use serde_json::{Value, json};

/// Most names of fields that an answer is cut to.
const MAX_NAMES: usize = 64;

/// Recent tokens that a request with a penalty of its own counts, as in llama.cpp.
const REPEAT_LAST_N: usize = 64;

/// Fields of this form alone that would change an answer in a way that is not implemented.
const UNSUPPORTED: &[Unsupported] = &[
    Unsupported {
        name: "n_cmpl",
        neutral: || vec![json!(1)],
    },
    Unsupported {
        name: "top_n_sigma",
        neutral: || vec![json!(-1)],
    },
    Unsupported {
        name: "adaptive_target",
        neutral: || vec![json!(-1)],
    },
    Unsupported {
        name: "t_max_predict_ms",
        neutral: || vec![json!(-1)],
    },
    never("n_indent"),
    never("min_keep"),
    never("samplers"),
    never("post_sampling_probs"),
    never("lora"),
    never("image_data"),
    never("multimodal_data"),
];

/// What an answer in this form has beside its text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Form {
    /// Names of the fields that are wanted, as paths; all where there are none.
    pub names: Vec<String>,
    /// Whether the answer has its tokens. A stream has them always.
    pub has_tokens: bool,
    /// Whether tokens have the most likely ones beside them.
    pub has_probs: bool,
}

/// Checks the body of a request.
pub(crate) fn request(id: &str, bytes: &[u8]) -> Result<(Request, Form), BadLine> {
    let body = object(bytes)?;
    let body = Fields::new(&body, "");
    refuse(body, UNSUPPORTED)?;
    let mut request = checked(id, Endpoint::Completions, body, Sender::Client)?;
    if request.n != 1 {
        return Err(body.bad("n", "1 answer in this form; /v1/completions gives several"));
    }
    if body.get("seed").and_then(whole).is_some_and(is_any_seed) {
        request.sampling.seed = None;
    }
    let last_n = repeat_last_n(body)?;
    let has_penalty = request.sampling.repetition_penalty.is_some();
    request.sampling.repeat_last_n = last_n.or(has_penalty.then_some(REPEAT_LAST_N));
    let n_probs = body.count("n_probs", 0..=MAX_TOP_LOGPROBS)?;
    let n_probs = n_probs.or(request.logprobs).filter(|n| *n > 0);
    let form = Form {
        names: names(body)?,
        has_tokens: body.flag("return_tokens")?.unwrap_or(false) || request.stream.wanted,
        has_probs: n_probs.is_some(),
    };
    // Tokens come with their log-probabilities.
    request.logprobs = n_probs.or(form.has_tokens.then_some(0));
    Ok((request, form))
}

/// Whether a seed asks for another one each time.
fn is_any_seed(seed: i128) -> bool {
    seed == -1 || seed == i128::from(u32::MAX)
}

/// Reads the number of recent tokens that the penalty counts; -1 is all.
fn repeat_last_n(body: Fields<'_>) -> Result<Option<usize>, BadLine> {
    let expected = format!("a whole number up to {MAX_TOKENS}, or -1 for the whole text");
    let read = |value: &Value| match whole(value) {
        Some(-1) => Ok(usize::MAX),
        Some(n) if (0..=MAX_TOKENS as i128).contains(&n) => Ok(n as usize),
        _ => Err(body.bad("repeat_last_n", &expected)),
    };
    body.get("repeat_last_n").map(read).transpose()
}

/// Reads the names of the fields that an answer is cut to.
fn names(body: Fields<'_>) -> Result<Vec<String>, BadLine> {
    let name = "response_fields";
    let expected = format!("an array of at most {MAX_NAMES} names");
    let one = |item: &Value| match item.as_str() {
        Some(name) => Ok(name.to_string()),
        None => Err(bad(&body.place(name), Some(item), &expected)),
    };
    match body.get(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() <= MAX_NAMES => items.iter().map(one).collect(),
        Some(_) => Err(body.bad(name, &expected)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<(Request, Form), BadLine> {
        request("id", body.to_string().as_bytes())
    }

    #[test]
    fn names_of_llama_cpp_are_understood() {
        let body = json!({
            "prompt": "a", "n_predict": 7, "seed": 3, "repeat_penalty": 1.1, "n_probs": 2, "return_tokens": true,
            "typical_p": 1.0, "mirostat": 0, "top_n_sigma": -1.0, "cache_prompt": true, "id_slot": 0,
        });
        let (request, form) = read(body).unwrap();
        assert_eq!((request.max_tokens, request.logprobs), (Some(7), Some(2)));
        assert_eq!(
            (request.sampling.seed, request.sampling.repeat_last_n),
            (Some(3), Some(64))
        );
        assert!(form.has_tokens && form.has_probs && form.names.is_empty());

        let (request, form) =
            read(json!({"prompt": "a", "n_predict": -1, "seed": -1, "repeat_last_n": -1})).unwrap();
        assert_eq!(
            (request.max_tokens, request.logprobs),
            (Some(MAX_TOKENS), None)
        );
        assert_eq!(
            (request.sampling.seed, request.sampling.repeat_last_n),
            (None, Some(usize::MAX))
        );
        assert_eq!(form, Form::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, words) in [
            (json!({}), "prompt: missing"),
            (
                json!({"prompt": "a", "n_predict": 0}),
                "n_predict: 0, expected",
            ),
            (json!({"prompt": "a", "n_predict": "7"}), "n_predict: \"7\""),
            (
                json!({"prompt": "a", "n_predict": 7, "max_tokens": 8}),
                "n_predict: 7, expected 8 as in max_tokens",
            ),
            (json!({"prompt": "a", "n_probs": 21}), "n_probs: 21"),
            (json!({"prompt": "a", "n": 2}), "n: 2, expected 1 answer"),
            (
                json!({"prompt": "a", "samplers": ["top_k"]}),
                "samplers: an array is not supported",
            ),
            (json!({"prompt": "a", "grammar": "root = a"}), "grammar: "),
            (
                json!({"prompt": "a", "response_fields": [7]}),
                "response_fields: 7",
            ),
            (
                json!({"prompt": "a", "repeat_last_n": -2}),
                "repeat_last_n: -2",
            ),
        ] {
            let bad = read(body).unwrap_err();
            assert!(bad.message.starts_with(words), "{words} in {}", bad.message);
        }
    }
}
