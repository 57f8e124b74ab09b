mod drafts;
mod files;

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use tier_plan_runtime::sampler::{LogitBias, SamplerConfig};
use tier_plan_serve::request::format::Format;
use tier_plan_serve::request::{Message, Role};

/// A request for a completion with these fields in its body.
fn completion(body: Value) -> Result<Request, BadLine> {
    let mut body = body;
    if body.get("prompt").is_none() {
        body["prompt"] = "a".into();
    }
    let line = json!({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body});
    Request::parse(line.to_string().as_bytes())
}

fn chat(body: Value) -> Result<Request, BadLine> {
    let mut body = body;
    if body.get("messages").is_none() {
        body["messages"] = json!([{"role": "user", "content": "a"}]);
    }
    let line = json!({"custom_id": "1", "url": "/v1/chat/completions", "body": body});
    Request::parse(line.to_string().as_bytes())
}

/// The error must have these words.
fn refused<T: std::fmt::Debug>(result: Result<T, BadLine>, code: Code, words: &str) {
    let bad = result.unwrap_err();
    assert!(bad.message.contains(words), "{words:?} in {}", bad.message);
    assert_eq!(bad.code, code, "{}", bad.message);
}

#[test]
fn a_whole_request_is_read() {
    let request = completion(json!({
        "model": "m", "prompt": "Once", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9,
        "top_k": 40.0, "min_p": 0.1, "seed": -1, "stop": ["\n", "END"], "n": 2, "logprobs": 3,
        "logit_bias": {"7": -100, "3": 1.5}, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.1, "user": "u", "stream": false, "echo": false, "suffix": null,
    }))
    .unwrap();
    assert_eq!(request.prompt, Prompt::Text("Once".into()));
    assert_eq!(
        (request.max_tokens, request.n, request.logprobs),
        (Some(7), 2, Some(3))
    );
    assert_eq!(request.stop, ["\n", "END"]);
    let bias = |token, bias| LogitBias { token, bias };
    let config = request.sampling.over(&SamplerConfig::default());
    let expected = SamplerConfig {
        temperature: 0.5,
        top_k: 40,
        top_p: 0.9,
        min_p: 0.1,
        repeat_penalty: 1.1,
        repeat_last_n: usize::MAX,
        presence_penalty: 1.0,
        frequency_penalty: -1.0,
        logit_bias: vec![bias(3, 1.5), bias(7, -100.0)],
        seed: u64::MAX,
    };
    assert_eq!(config, expected);
    // What a request does not say is the command's.
    let plain = completion(json!({})).unwrap().sampling;
    assert_eq!(plain.over(&expected).temperature, 0.5);
    assert_eq!(plain.over(&expected).repeat_last_n, usize::MAX);
}

#[test]
fn prompts_have_many_forms() {
    let prompt = |value: Value| completion(json!({ "prompt": value })).map(|r| r.prompt);
    let text = || Ok(Prompt::Text("a".into()));
    assert_eq!(prompt(json!("a")), text());
    assert_eq!(prompt(json!(["a"])), text());
    let tokens = || Ok(Prompt::Tokens(vec![1, 2]));
    assert_eq!(prompt(json!([1, 2])), tokens());
    assert_eq!(prompt(json!([[1, 2.0]])), tokens());
    for bad in [
        json!(1),
        json!([]),
        json!([[]]),
        json!([1, "a"]),
        json!([-1]),
        json!([1.5]),
        json!({}),
    ] {
        refused(prompt(bad), Code::InvalidRequest, "body.prompt");
    }
    refused(prompt(json!(["a", "b"])), Code::Unsupported, "2 prompts");
    refused(
        prompt(json!([4_294_967_296u64])),
        Code::InvalidRequest,
        "body.prompt[0]",
    );
}

#[test]
fn messages_are_texts_of_four_roles() {
    let request = chat(json!({"messages": [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "t", "tool_calls": []},
        {"role": "tool", "tool_call_id": "i", "content": "r"},
    ]}))
    .unwrap();
    let expected = vec![
        Message::new(Role::System, "s"),
        Message::new(Role::User, "ab"),
        Message {
            thinking: Some("t".into()),
            ..Message::new(Role::Assistant, "c")
        },
        Message {
            call_id: Some("i".into()),
            ..Message::new(Role::Tool, "r")
        },
    ];
    assert_eq!(request.prompt, Prompt::Messages(expected));
    let one = |message: Value| chat(json!({ "messages": [message] }));
    for (message, words) in [
        (
            json!({"role": "tool", "content": "a"}),
            "messages[0].tool_call_id: missing, expected",
        ),
        (json!({"content": "a"}), "messages[0].role: missing"),
        (
            json!({"role": "user", "content": 1}),
            "messages[0].content: 1, expected a string",
        ),
        (
            json!({"role": "user", "content": [7]}),
            "messages[0].content[0]: 7",
        ),
        (
            json!({"role": "user", "content": [{"type": "text"}]}),
            "content[0].text: missing",
        ),
        (json!("a"), "messages[0]: \"a\", expected an object"),
    ] {
        refused(one(message), Code::InvalidRequest, words);
    }
    let image = json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]});
    refused(
        one(image),
        Code::Unsupported,
        "content[0].type: \"image_url\" is not supported",
    );
    let call = json!({"role": "assistant", "content": "", "tool_calls": [{}]});
    let words = "messages[0].tool_calls[0].function: missing";
    refused(one(call), Code::InvalidRequest, words);
    refused(
        chat(json!({"messages": []})),
        Code::InvalidRequest,
        "body.messages",
    );
}

#[test]
fn values_outside_their_range_are_named() {
    for (body, words) in [
        (
            json!({"temperature": 101}),
            "body.temperature: 101, expected 0",
        ),
        (
            json!({"temperature": "hot"}),
            "body.temperature: \"hot\", expected a number",
        ),
        (json!({"temperature": 1e300}), "body.temperature: inf"),
        (json!({"top_p": 0}), "body.top_p: 0, expected more than 0"),
        (json!({"min_p": 2}), "body.min_p"),
        (json!({"top_k": -2}), "body.top_k: -2"),
        (
            json!({"repetition_penalty": 0}),
            "body.repetition_penalty: 0",
        ),
        (
            json!({"presence_penalty": 3}),
            "body.presence_penalty: 3, expected -2 to 2",
        ),
        (
            json!({"frequency_penalty": []}),
            "body.frequency_penalty: an array",
        ),
        (
            json!({"max_tokens": 0}),
            "body.max_tokens: 0, expected a whole number from 1",
        ),
        (json!({"max_tokens": 1.5}), "body.max_tokens: 1.5"),
        (
            json!({"max_tokens": 5, "max_completion_tokens": 6}),
            "body.max_completion_tokens: 6",
        ),
        (
            json!({"n": 129}),
            "body.n: 129, expected a whole number from 1 to 128",
        ),
        (json!({"seed": 1e300}), "body.seed"),
        (json!({"stop": ""}), "body.stop: \"\""),
        (json!({"stop": vec!["a"; 17]}), "body.stop: an array"),
        (json!({"logprobs": 21}), "body.logprobs: 21"),
        (json!({"logit_bias": {"x": 1}}), "body.logit_bias[\"x\"]: 1"),
        (
            json!({"logit_bias": {"1": 101}}),
            "body.logit_bias[\"1\"]: 101, expected -100 to 100",
        ),
        (
            json!({"logit_bias": {"1": 1, "01": 1}}),
            "token 1 is there twice",
        ),
        (json!({"model": 7}), "body.model: 7"),
        (json!({"ignore_eos": "yes"}), "body.ignore_eos: \"yes\""),
    ] {
        refused(completion(body), Code::InvalidRequest, words);
    }
    refused(
        chat(json!({"logprobs": 1})),
        Code::InvalidRequest,
        "body.logprobs: 1",
    );
    refused(
        chat(json!({"top_logprobs": 1})),
        Code::InvalidRequest,
        "body.top_logprobs: 1",
    );
    let both = chat(json!({"logprobs": true, "top_logprobs": 2})).unwrap();
    assert_eq!(both.logprobs, Some(2));
}

#[test]
fn fields_that_would_change_the_result_are_refused() {
    for (name, value) in [
        ("tools", json!([{"type": "function"}])),
        ("tool_choice", json!("required")),
        ("reasoning_effort", json!("low")),
        ("min_tokens", json!(4)),
        ("best_of", json!(2)),
        ("echo", json!(true)),
        ("suffix", json!("end")),
    ] {
        let words = format!("body.{name}: ");
        refused(
            completion(json!({ name: value })),
            Code::Unsupported,
            &words,
        );
    }
    for body in [
        json!({"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}),
        json!({"best_of": 1.0, "min_tokens": 0, "echo": null, "suffix": "", "length_penalty": 1}),
        json!({"no_such_field": {"a": [1]}, "metadata": {"a": "b"}, "store": true}),
    ] {
        assert!(completion(body.clone()).is_ok(), "{body}");
    }
}

#[test]
fn answers_may_have_to_have_a_form() {
    let schema = || json!({"type": "object"});
    let forms = [
        (
            json!({"response_format": {"type": "json_object"}}),
            Format::Json(schema()),
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema()}}}),
            Format::Json(schema()),
        ),
        (json!({"json_schema": schema()}), Format::Json(schema())),
        (
            json!({"guided_json": schema().to_string()}),
            Format::Json(schema()),
        ),
        (
            json!({"guided_regex": "[0-9]"}),
            Format::Regex("[0-9]".into()),
        ),
        (
            json!({"guided_choice": ["a", "b"]}),
            Format::Choice(vec!["a".into(), "b".into()]),
        ),
        (
            json!({"structured_outputs": {"choice": ["a"]}}),
            Format::Choice(vec!["a".into()]),
        ),
        (
            json!({"guided_grammar": "start: \"a\""}),
            Format::Lark("start: \"a\"".into()),
        ),
        (json!({"response_format": {"type": "text"}}), Format::Text),
        (json!({"grammar": ""}), Format::Text),
    ];
    for (body, expected) in forms {
        assert_eq!(completion(body.clone()).unwrap().format, expected, "{body}");
        assert_eq!(chat(body.clone()).unwrap().format, expected, "{body}");
    }
    let gbnf = completion(json!({"grammar": "root ::= \"a\""})).unwrap();
    assert!(matches!(gbnf.format, Format::Lark(_)));
    let long = format!("[{}]", "a".repeat(1 << 18));
    for (body, words) in [
        (
            json!({"response_format": {"type": "json_schema"}}),
            "body.response_format.json_schema: missing",
        ),
        (json!({"grammar": "root ::= ("}), "body.grammar: line 1"),
        (json!({"guided_regex": long}), "expected at most 262144"),
        (json!({"guided_choice": []}), "body.guided_choice: "),
        (
            json!({"guided_choice": ["a"], "guided_regex": "a"}),
            "body.guided_choice: beside guided_regex",
        ),
    ] {
        refused(completion(body.clone()), Code::InvalidRequest, words);
        refused(chat(body), Code::InvalidRequest, words);
    }
}

#[test]
fn chats_may_set_variables_of_their_template() {
    let body =
        json!({"chat_template_kwargs": {"enable_thinking": false}, "reasoning_effort": "low"});
    let expected = json!({"enable_thinking": false, "reasoning_effort": "low"});
    assert_eq!(
        Value::Object(chat(body.clone()).unwrap().variables),
        expected
    );
    refused(
        completion(body),
        Code::Unsupported,
        "body.reasoning_effort: ",
    );
    refused(
        chat(json!({"chat_template_kwargs": {"messages": []}})),
        Code::InvalidRequest,
        "body.chat_template_kwargs: \"messages\"",
    );
    refused(
        chat(json!({"tools": [{"type": "function"}]})),
        Code::Unsupported,
        "body.tools: ",
    );
}

#[test]
fn lines_that_are_no_requests_are_named() {
    let parse = |line: &str| Request::parse(line.as_bytes());
    for (line, code, words) in [
        ("", Code::InvalidJson, "expected a JSON object"),
        ("[1]", Code::InvalidJson, "an array, expected a JSON object"),
        ("{\"custom_id\":\"1\"} x", Code::InvalidJson, "trailing"),
        (
            "{\"a\":1,\"a\":2}",
            Code::InvalidJson,
            "the key \"a\" is there twice",
        ),
        ("{}", Code::InvalidRequest, "custom_id: missing"),
        (
            "{\"custom_id\":7}",
            Code::InvalidRequest,
            "custom_id: 7, expected a string",
        ),
        (
            "{\"custom_id\":\"\"}",
            Code::InvalidRequest,
            "custom_id: \"\"",
        ),
        (
            "{\"custom_id\":\"1\"}",
            Code::InvalidRequest,
            "url: missing, expected \"/v1/chat",
        ),
        (
            "{\"custom_id\":\"1\",\"method\":\"GET\"}",
            Code::InvalidRequest,
            "method: \"GET\"",
        ),
        (
            "{\"custom_id\":\"1\",\"url\":\"/v1/embeddings\"}",
            Code::InvalidRequest,
            "url",
        ),
        (
            "{\"custom_id\":\"1\",\"url\":\"/v1/completions\",\"body\":1}",
            Code::InvalidRequest,
            "body: 1",
        ),
    ] {
        refused(parse(line), code, words);
    }
    // The name is known as soon as it can be.
    assert_eq!(
        parse("{\"custom_id\":\"1\"}")
            .unwrap_err()
            .custom_id
            .as_deref(),
        Some("1")
    );
    assert!(Request::parse(b"{\"custom_id\": \"\xff\"}").is_err());
    let long = json!({"custom_id": "x".repeat(MAX_ID_BYTES + 1)}).to_string();
    refused(parse(&long), Code::InvalidRequest, "custom_id: \"xxx");
}

#[test]
fn lines_that_would_take_much_memory_are_refused() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    refused(
        Request::parse(deep.as_bytes()),
        Code::InvalidJson,
        "recursion limit",
    );
    let wide = format!("[{}0]", "0,".repeat(1 << 20));
    refused(
        Request::parse(wide.as_bytes()),
        Code::InvalidJson,
        "values in one line",
    );
    let keys: String = (0..400_000).map(|i| format!("\"{i}\":0,")).collect();
    let wide = format!("{{{keys}\"x\":0}}");
    refused(
        Request::parse(wide.as_bytes()),
        Code::InvalidJson,
        "values in one line",
    );
    // No error is long, whatever it quotes.
    let url = json!({"custom_id": "1", "url": "\u{1b}".repeat(1 << 20)}).to_string();
    let bad = Request::parse(url.as_bytes()).unwrap_err();
    assert!(
        bad.message.len() < 1000 && !bad.message.contains('\u{1b}'),
        "{}",
        bad.message
    );
}

proptest! {
    #[test]
    fn any_bytes_give_a_request_or_one_line(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Err(bad) = Request::parse(&bytes) {
            prop_assert!(!bad.message.chars().any(char::is_control));
        }
    }

    #[test]
    fn any_value_of_any_field_gives_a_request_or_one_line(
        name in prop::sample::select(vec!["prompt", "max_tokens", "temperature", "stop", "n", "seed", "logprobs",
            "logit_bias", "top_k", "tools", "response_format", "messages", "guided_json", "guided_choice",
            "guided_grammar", "grammar", "structured_outputs"]),
        value in prop_oneof![
            any::<i64>().prop_map(Value::from), any::<f64>().prop_map(Value::from), ".{0,8}".prop_map(Value::from),
            prop::collection::vec(".{0,3}", 0..3).prop_map(Value::from),
            prop::collection::vec(any::<i32>(), 0..3).prop_map(Value::from),
            (".{0,3}", any::<f32>()).prop_map(|(key, value)| json!({ key: value })),
        ],
    ) {
        for result in [completion(json!({ name: value })), chat(json!({ name: value }))] {
            if let Err(bad) = result {
                prop_assert!(bad.message.contains(name), "{}", bad.message);
            }
        }
    }
}
