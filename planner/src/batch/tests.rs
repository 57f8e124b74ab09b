use super::*;
use crate::chat::message::{Message, Role};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::Path;
use tempfile::TempDir;
use tier_plan_runtime::sampler::{LogProbability, LogitBias, SamplerConfig, TokenLogProbabilities};

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
fn messages_are_texts_of_three_roles() {
    let request = chat(json!({"messages": [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "t", "tool_calls": []},
    ]}))
    .unwrap();
    let expected = vec![
        Message::new(Role::System, "s"),
        Message::new(Role::User, "ab"),
        Message {
            thinking: Some("t".into()),
            ..Message::new(Role::Assistant, "c")
        },
    ];
    assert_eq!(request.prompt, Prompt::Messages(expected));
    let one = |message: Value| chat(json!({ "messages": [message] }));
    for (message, words) in [
        (
            json!({"role": "tool", "content": "a"}),
            "messages[0].role: \"tool\", expected",
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
    refused(one(call), Code::Unsupported, "messages[0].tool_calls");
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
        ("response_format", json!({"type": "json_object"})),
        ("reasoning_effort", json!("low")),
        ("min_tokens", json!(4)),
        ("best_of", json!(2)),
        ("echo", json!(true)),
        ("grammar", json!("root ::= \"a\"")),
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
            "logit_bias", "top_k", "tools", "response_format", "messages"]),
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

fn line(id: &str, prompt: &str) -> String {
    json!({"custom_id": id, "url": "/v1/completions", "body": {"prompt": prompt}}).to_string()
        + "\n"
}

/// A folder with an input of these bytes.
fn input(bytes: impl AsRef<[u8]>) -> (TempDir, anyhow::Result<Input>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("in.jsonl");
    fs::write(&path, bytes).unwrap();
    let input = Input::open(&path);
    (folder, input)
}

#[test]
fn lines_are_found_again() {
    let text = format!(
        "\u{feff}{}\r\n\n  \n{{\n{}",
        line("a", "x").trim(),
        line("b", "y").trim()
    );
    let (_folder, input) = input(text);
    let mut input = input.unwrap();
    let lines = input.in_order();
    assert_eq!(
        lines.iter().map(|l| l.number).collect::<Vec<_>>(),
        [1, 4, 5]
    );
    assert_eq!(input.read(&lines[0]).unwrap().unwrap().custom_id, "a");
    assert_eq!(
        input.read(&lines[1]).unwrap().unwrap_err().code,
        Code::InvalidJson
    );
    assert_eq!(input.read(&lines[2]).unwrap().unwrap().custom_id, "b");
    assert_eq!((input.line_of("b"), input.line_of("c")), (Some(5), None));
}

#[test]
fn prompts_that_begin_alike_follow_each_other() {
    let [one, two] = ["x", "y"].map(|c| c.repeat(5000));
    let prompts = [
        &one,
        &two,
        "short",
        &format!("{one}1"),
        &format!("{two}2"),
        &format!("{}z", &one[..300]),
    ];
    let text: String = prompts
        .iter()
        .enumerate()
        .map(|(i, p)| line(&i.to_string(), p))
        .collect();
    let (_folder, input) = input(text);
    let order: Vec<usize> = input.unwrap().in_order().iter().map(|l| l.number).collect();
    assert_eq!(order, [1, 4, 6, 2, 5, 3]);
}

#[test]
fn inputs_that_make_no_batch_are_refused() {
    let refused = |bytes: &[u8], words: &str| {
        let error = format!("{:#}", input(bytes).1.unwrap_err());
        assert!(error.contains(words), "{words:?} in {error}");
    };
    refused(b"", "no requests");
    refused(b"\n \n", "no requests");
    refused(&[0xff, 0xfe, b'{', 0], "UTF-16LE");
    let twice = line("a", "x") + &line("b", "x") + &line("a", "y");
    refused(twice.as_bytes(), "line 3 has the custom_id \"a\" of line 1");
    assert!(Input::open(Path::new("/dev/null")).is_err());
    assert!(Input::open(Path::new("/no/such/file")).is_err());
}

#[test]
fn long_lines_and_changed_files_are_noticed() {
    let long = line("long", &"x".repeat(MAX_LINE_BYTES as usize));
    let (folder, opened) = input(long + &line("b", "y"));
    let mut opened = opened.unwrap();
    let lines = opened.in_order();
    let bad = opened.read(&lines[0]).unwrap().unwrap_err();
    assert!(
        bad.message.contains("expected at most 16777216"),
        "{}",
        bad.message
    );
    assert!(opened.read(&lines[1]).unwrap().is_ok());
    fs::write(folder.path().join("in.jsonl"), line("c", "y")).unwrap();
    assert!(opened.read(&lines[1]).is_err());
}

fn answer(request: &Request) -> Value {
    let choice = Choice {
        text: "b".into(),
        thinking: None,
        finish: Finish::Stop,
        n_tokens: 1,
        tokens: None,
    };
    Answered {
        request,
        model: "m",
        created: 7,
        prompt_tokens: 3,
        choices: &[choice],
        piece: &|_| Vec::new(),
    }
    .line()
}

#[test]
fn a_torn_line_is_cut_off_and_answers_are_kept() {
    let (folder, opened) = input(line("a", "x") + "{\n" + &line("b", "y"));
    let mut opened = opened.unwrap();
    let path = folder.path().join("out.jsonl");
    let mut output = Output::open(&path, &opened).unwrap();
    let lines = opened.in_order();
    let request = opened.read(&lines[0]).unwrap().unwrap();
    let bad = opened.read(&lines[1]).unwrap().unwrap_err();
    output.append(1, &answer(&request)).unwrap();
    output.append(2, &refusal(2, &bad)).unwrap();
    output.sync().unwrap();
    drop(output);
    let whole = fs::read(&path).unwrap();
    for torn in [
        "",
        "{",
        "{\"id\":\"batch_req_00",
        "{\"id\":\"batch_req_0\",\"custom_id\":\"b\"}",
    ] {
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(torn.as_bytes()).unwrap();
        let output = Output::open(&path, &opened).unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole, "{torn}");
        let answered = [1, 2, 4].map(|n| output.has_answer(n));
        assert_eq!((answered, output.n_answered()), ([true, true, false], 2));
    }
}

#[test]
fn outputs_of_others_are_left_alone() {
    let (folder, opened) = input(line("a", "x"));
    let opened = opened.unwrap();
    let path = folder.path().join("out.jsonl");
    let other = json!({"id": "batch_req_1", "custom_id": "z", "response": null, "error": null});
    for (bytes, words) in [
        (
            other.to_string() + "\n",
            "line 1 answers custom_id \"z\", which is not in",
        ),
        (line("a", "x"), "line 1 is not an answer of a batch"),
        ("notes".to_string(), "line 1 is not an answer of a batch"),
        (
            refusal(1, &Request::parse(b"").unwrap_err()).to_string() + "\nnotes",
            "line 2 is not",
        ),
    ] {
        fs::write(&path, &bytes).unwrap();
        let error = format!("{:#}", Output::open(&path, &opened).unwrap_err());
        assert!(error.contains(words), "{words:?} in {error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), bytes);
    }
}

#[test]
fn one_process_alone_writes_an_output() {
    let (folder, opened) = input(line("a", "x"));
    let opened = opened.unwrap();
    let path = folder.path().join("out.jsonl");
    let first = Output::open(&path, &opened).unwrap();
    let error = Output::open(&path, &opened).unwrap_err().to_string();
    assert!(error.contains("another process is writing"), "{error}");
    // An output without answers is not left behind.
    drop(first);
    assert!(!path.exists());
    drop(Output::open(&path, &opened).unwrap());
    fs::write(&path, "").unwrap();
    drop(Output::open(&path, &opened).unwrap());
    assert!(path.exists());
}

#[test]
fn answers_have_the_fields_of_the_interface() {
    let request = completion(json!({"logprobs": 1})).unwrap();
    let line = answer(&request);
    assert_eq!(line["custom_id"], "1");
    assert_eq!(line["error"], Value::Null);
    assert_eq!(line["response"]["status_code"], 200);
    let body = &line["response"]["body"];
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4});
    assert_eq!(body["usage"], usage);
    // Equal in every run, so that a repeated run can be compared.
    assert_eq!(line, answer(&request));
    let chat = answer(&chat(json!({})).unwrap());
    assert_eq!(
        chat["response"]["body"]["choices"][0]["message"]["content"],
        "b"
    );
}

#[test]
fn log_probabilities_are_listed_per_token() {
    let one = |token, value| LogProbability { token, value };
    let token = |start, token| TokenText {
        start,
        logprobs: TokenLogProbabilities {
            chosen: one(token, -0.5),
            top: vec![one(1, f32::NEG_INFINITY)],
        },
    };
    let choice = Choice {
        text: "éb".into(),
        thinking: Some("hm".into()),
        finish: Finish::Length,
        n_tokens: 2,
        tokens: Some(vec![token(0, 0), token(2, 1)]),
    };
    let pieces = ["é".as_bytes().to_vec(), vec![0xff]];
    let body = |request: Request| {
        Answered {
            request: &request,
            model: "m",
            created: 7,
            prompt_tokens: 3,
            choices: std::slice::from_ref(&choice),
            piece: &|token| pieces[token as usize].clone(),
        }
        .line()["response"]["body"]["choices"][0]
            .clone()
    };
    let old = body(completion(json!({})).unwrap());
    let expected = json!({
        "tokens": ["é", "bytes:\\xff"], "token_logprobs": [-0.5, -0.5], "text_offset": [0, 1],
        "top_logprobs": [{"bytes:\\xff": -9999.0}, {"bytes:\\xff": -9999.0}],
    });
    assert_eq!(old["logprobs"], expected);
    let new = body(chat(json!({})).unwrap());
    assert_eq!(new["message"]["reasoning_content"], "hm");
    let first = &new["logprobs"]["content"][0];
    assert_eq!(
        (&first["token"], &first["bytes"]),
        (&json!("é"), &json!([195, 169]))
    );
    assert_eq!(first["top_logprobs"][0]["logprob"], -9999.0);
}
