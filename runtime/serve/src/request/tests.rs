use super::*;
use proptest::prelude::*;

fn body(endpoint: Endpoint, body: &str) -> Result<Request, BadLine> {
    Request::from_body("id", endpoint, body.as_bytes())
}

#[test]
fn fields_of_a_body_have_no_path() {
    for (text, words) in [
        (
            r#"{"messages":[{"role":"user"}]}"#,
            "messages[0].content: missing",
        ),
        (r#"{"messages":[]}"#, "messages: an array, expected"),
        (
            r#"{"messages":[{"role":"user","content":"a"}],"stop":[1]}"#,
            "stop: 1, expected",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"}],"logit_bias":{"x":1}}"#,
            "logit_bias[\"x\"]: 1",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"}],"stream_options":{"include_usage":1}}"#,
            "stream_options.include_usage: 1, expected true or false",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"}],"tools":[{}]}"#,
            "tools[0].type: missing",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"}],"tools":[{"type":"function","function":{"name":"a b"}}]}"#,
            "tools[0].function.name: \"a b\"",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"}],"tool_choice":"required"}"#,
            "tool_choice: \"required\", expected a tool",
        ),
        (
            r#"{"messages":[{"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":"["}}]}]}"#,
            "messages[0].tool_calls[0].function.arguments: \"[\"",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"}],"response_format":{"type":"xml"}}"#,
            "response_format.type: \"xml\" is not supported",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"messages":1}}"#,
            "chat_template_kwargs: \"messages\" is set",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"}],"guided_regex":"a","guided_choice":["a"]}"#,
            "guided_choice: beside guided_regex",
        ),
        ("[1]", "the body: an array, expected a JSON object"),
        ("{", "the body: EOF"),
    ] {
        let bad = body(Endpoint::Chat, text).unwrap_err();
        assert!(
            bad.message.starts_with(words),
            "{words:?} in {}",
            bad.message
        );
    }
    let bad = body(Endpoint::Completions, r#"{"prompt":["a","b"]}"#).unwrap_err();
    assert!(
        bad.message.starts_with("prompt: 2 prompts"),
        "{}",
        bad.message
    );
}

#[test]
fn a_stream_is_asked_for() {
    let stream = |more: &str| {
        body(Endpoint::Completions, &format!(r#"{{"prompt":"a"{more}}}"#)).map(|r| r.stream)
    };
    let asked = |wanted, usage| Ok(Stream { wanted, usage });
    assert_eq!(stream(""), asked(false, false));
    assert_eq!(stream(r#","stream":true"#), asked(true, false));
    let usage = r#","stream":true,"stream_options":{"include_usage":true,"x":1}"#;
    assert_eq!(stream(usage), asked(true, true));
    assert!(stream(r#","stream":1"#).is_err());
}

#[test]
fn a_seed_depends_on_the_name_unless_it_is_given() {
    let of = |id: &str, text: &str| {
        Request::from_body(id, Endpoint::Completions, text.as_bytes())
            .unwrap()
            .seed(3)
    };
    assert_eq!(of("a", r#"{"prompt":"a","seed":7}"#), 7);
    assert_eq!(of("a", r#"{"prompt":"a"}"#), of("a", r#"{"prompt":"b"}"#));
    assert_ne!(of("a", r#"{"prompt":"a"}"#), of("b", r#"{"prompt":"a"}"#));
}

#[test]
fn names_and_forms_of_llama_cpp_are_taken() {
    let of = |more: &str| {
        body(
            Endpoint::Completions,
            &format!(r#"{{"prompt":"a",{more}}}"#),
        )
    };
    assert_eq!(of(r#""n_predict":7"#).unwrap().max_tokens, Some(7));
    let all = of(r#""n_predict":-1"#).unwrap().max_tokens;
    assert_eq!(all, Some(read::MAX_TOKENS));
    let other = of(r#""n_predict":7,"max_completion_tokens":8"#).unwrap_err();
    assert!(
        other
            .message
            .starts_with("n_predict: 7, expected 8 as in max_completion_tokens"),
        "{}",
        other.message
    );
    let biases = of(r#""logit_bias":[[9,1.5],[7,false],[9,1.5]]"#).unwrap();
    let expected = [(7, -100.0), (9, 1.5)].map(|(token, bias)| LogitBias { token, bias });
    assert_eq!(biases.sampling.logit_bias, expected);
    for (pairs, words) in [
        ("[[7,1],[7,2]]", "logit_bias: token 7 is there twice"),
        ("[[7]]", "logit_bias[0]: an array, expected a pair"),
        ("[[-7,1]]", "logit_bias[0]: 1, expected a token id"),
        ("[[7,101]]", "logit_bias[0]: 101, expected -100 to 100"),
        ("{\"+7\":1}", "logit_bias[\"+7\"]: 1, expected a token id"),
    ] {
        let bad = of(&format!(r#""logit_bias":{pairs}"#)).unwrap_err();
        assert!(bad.message.starts_with(words), "{words} in {}", bad.message);
    }
    let refused = body(
        Endpoint::Chat,
        r#"{"messages":[{"role":"user","content":"a"}],"add_generation_prompt":false}"#,
    );
    let refused = refused.unwrap_err();
    assert_eq!(refused.code, Code::Unsupported, "{}", refused.message);
}

proptest! {
    #[test]
    fn any_bytes_give_a_request_or_one_line(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for endpoint in [Endpoint::Chat, Endpoint::Completions] {
            if let Err(bad) = Request::from_body("id", endpoint, &bytes) {
                prop_assert!(!bad.message.chars().any(char::is_control));
            }
        }
    }
}
