use super::*;
use crate::calls::{Parser, Part};
use crate::request::tools::{Choice, Tool};
use serde_json::{Value, json};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::tokenizer::TokenizerSource;

/// The tokenizer of the bundled model.
pub(super) fn tokenizer() -> Arc<Tokenizer> {
    let gguf = Gguf::open("../../profiles/demo/demo.gguf".as_ref()).unwrap();
    let source = TokenizerSource::from_gguf(&gguf).unwrap();
    Arc::new(Tokenizer::new(source).unwrap())
}

fn tools(choice: Choice, parallel: bool) -> Tools {
    let tool = |name: &str, parameters| Tool {
        name: name.into(),
        description: None,
        parameters,
        strict: false,
    };
    Tools {
        list: Arc::new([
            tool(
                "weather",
                json!({
                    "type": "object",
                    "properties": {
                        "city": {"type": "string"},
                        "unit": {"type": "string", "enum": ["C", "F"]},
                        "days": {"$ref": "#/$defs/days"},
                    },
                    "required": ["city", "days"],
                    "additionalProperties": false,
                    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
                }),
            ),
            tool(
                "now",
                json!({"type": "object", "properties": {}, "additionalProperties": false}),
            ),
        ]),
        choice,
        parallel,
    }
}

/// Whether a grammar takes a whole text, and nothing that it only begins.
pub(super) fn takes(grammar: &Grammar, tokenizer: &Tokenizer, text: &str) -> bool {
    let mut guide = grammar.begin();
    let is_allowed = |mask: &[u32], token: u32| mask[token as usize / 32] >> (token % 32) & 1 == 1;
    for token in tokenizer.encode(text, false).unwrap() {
        let mask = guide.mask().unwrap();
        if !is_allowed(&mask, token) || guide.accept(token).is_err() {
            return false;
        }
    }
    let mask = guide.mask().unwrap();
    (0..tokenizer.n_vocab() as u32).any(|id| tokenizer.is_eog(id) && is_allowed(&mask, id))
}

fn grammar(
    format: &Format,
    tools: &Tools,
    form: Option<&'static Form>,
) -> Result<Grammar, BadLine> {
    let wanted = Wanted {
        format,
        tools,
        is_chat: true,
        prompt: "",
    };
    let grammars = Grammars::with_form(tokenizer(), form);
    grammars.wanted(&wanted).map(Option::unwrap)
}

#[test]
fn answers_have_their_form() {
    let tokenizer = tokenizer();
    let schema = json!({
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": false,
    });
    let texts = vec!["yes".to_string(), "no \"!\"".to_string()];
    let lark = "start: \"a\" b*\nb: \"b\"".to_string();
    for (format, good, bad) in [
        (
            Format::Json(schema),
            vec!["{\"a\": 12}", "{\"a\":1,\"b\":\"x\"}", "{\n  \"a\": 1\n}"],
            vec![
                "{}",
                "{\"a\": \"1\"}",
                "{\"a\": 1, \"b\": \"z\"}",
                "12",
                "{\"a\": 1} text",
            ],
        ),
        (
            Format::Json(json!({"type": "object"})),
            vec!["{}", "{\"any\": [1, {\"thing\": null}]}"],
            vec!["[]", "text", ""],
        ),
        (
            Format::Regex("[0-9]+/[a-f]".into()),
            vec!["12/a"],
            vec!["12", "/a", "12/g"],
        ),
        (
            Format::Choice(texts),
            vec!["yes", "no \"!\""],
            vec!["no", "yes!", ""],
        ),
        (Format::Lark(lark), vec!["a", "abb"], vec!["b", "ac"]),
    ] {
        let grammar = grammar(&format, &Tools::default(), None).unwrap();
        for text in good {
            assert!(takes(&grammar, &tokenizer, text), "{format:?}: {text}");
        }
        for text in bad {
            assert!(!takes(&grammar, &tokenizer, text), "{format:?}: {text}");
        }
    }
}

#[test]
fn what_cannot_be_compiled_is_refused() {
    for format in [
        Format::Json(json!({"type": "nothing"})),
        Format::Json(json!({"$ref": "#/$defs/missing"})),
        Format::Regex("(".into()),
        Format::Lark("start: nothing".into()),
        Format::Lark("start: start start".into()),
        Format::Lark("} start: \"a\" {".into()),
    ] {
        let error = grammar(&format, &Tools::default(), None).unwrap_err();
        assert!(error.message.starts_with("response_format: "), "{error:?}");
        assert!(error.message.len() < 2000);
    }
}

/// Calls that a form must take, as the family writes them, each with what the parser makes of it.
#[test]
fn demanded_calls_are_those_that_the_parser_reads() {
    let tokenizer = tokenizer();
    let arguments = json!({"city": "Paris", "days": 2});
    let object = "{\"city\": \"Paris\", \"days\": 2}";
    let cases = [
        ("Hermes", format!("<tool_call>\n{{\"name\": \"weather\", \"arguments\": {object}}}\n</tool_call>")),
        ("Qwen3-Coder", "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>".into()),
        ("GLM", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>".into()),
        ("MiniMax M2", "<minimax:tool_call>\n<invoke name=\"weather\">\n<parameter name=\"city\">Paris</parameter>\n<parameter name=\"days\">2</parameter>\n</invoke>\n</minimax:tool_call>".into()),
        ("Seed-OSS", "<seed:tool_call>\n<function=weather>\n<parameter=city>Paris</parameter>\n<parameter=days>2</parameter>\n</function>\n</seed:tool_call>".into()),
        ("DeepSeek", format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{object}<｜tool▁call▁end｜><｜tool▁calls▁end｜>")),
        ("DeepSeek V3", format!("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{object}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>")),
        ("Kimi K2", format!("<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{object}<|tool_call_end|><|tool_calls_section_end|>")),
        ("Mistral", format!("[TOOL_CALLS][{{\"name\": \"weather\", \"arguments\": {object}}}]")),
        ("Mistral 11", format!("[TOOL_CALLS]weather[ARGS]{object}")),
        ("Phi-4", format!("<|tool_call|>[{{\"name\": \"weather\", \"arguments\": {object}}}]<|/tool_call|>")),
        ("Granite 3", format!("<|tool_call|>[{{\"name\": \"weather\", \"arguments\": {object}}}]")),
        ("Nemotron", format!("<TOOLCALL>[{{\"name\": \"weather\", \"arguments\": {object}}}]</TOOLCALL>")),
        ("LongCat", format!("<longcat_tool_call>\n{{\"name\": \"weather\", \"arguments\": {object}}}\n</longcat_tool_call>")),
        ("MiniMax M1", format!("<tool_calls>\n{{\"name\": \"weather\", \"arguments\": {object}}}\n</tool_calls>")),
        ("Functionary", format!("<function=weather>{object}</function>")),
        ("Llama 3", format!("{{\"name\": \"weather\", \"parameters\": {object}}}")),
    ];
    for (name, text) in cases {
        let form = Form::named(name);
        let wanted = tools(Choice::Required, true);
        let any = grammar(&Format::Text, &wanted, Some(form)).unwrap();
        assert!(takes(&any, &tokenizer, &text), "{name}: {text}");
        assert!(!takes(&any, &tokenizer, "It rains."), "{name}");
        let wrong = text
            .replace(": 2", ": 12")
            .replace(">2<", ">12<")
            .replace("\n2\n", "\n12\n");
        assert!(!takes(&any, &tokenizer, &wrong), "{name}: {wrong}");
        let named = tools(Choice::Named("now".into()), true);
        let other = grammar(&Format::Text, &named, Some(form)).unwrap();
        assert!(!takes(&other, &tokenizer, &text), "{name}: {text}");
        let mut parser = Parser::new(form, Arc::clone(&wanted.list), false);
        let mut parts = Vec::new();
        parser.push(&text, &mut parts);
        parser.finish(&mut parts);
        match parts.as_slice() {
            [Part::Call(call)] => {
                let read: Value = serde_json::from_str(&call.arguments).unwrap();
                assert_eq!(
                    (call.name.as_str(), &read),
                    ("weather", &arguments),
                    "{name}"
                );
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn channels_have_a_thought_and_then_a_call_or_an_answer() {
    let tokenizer = tokenizer();
    let format = Format::Json(json!({"type": "object"}));
    let form = Some(Form::named("gpt-oss"));
    let either = grammar(&format, &tools(Choice::Auto, true), form).unwrap();
    let thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant";
    let call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}";
    let answer = "<|channel|>final<|message|>{\"a\": 1}";
    for text in [
        format!("{thought}{call}"),
        format!("{thought}{answer}"),
        call.into(),
        answer.into(),
    ] {
        assert!(takes(&either, &tokenizer, &text), "{text}");
    }
    let demanded = grammar(&Format::Text, &tools(Choice::Required, true), form).unwrap();
    assert!(takes(&demanded, &tokenizer, call) && !takes(&demanded, &tokenizer, answer));
    assert!(!takes(&either, &tokenizer, thought));
}

#[test]
fn a_choice_is_free_between_calls_and_the_form_of_the_answer() {
    let tokenizer = tokenizer();
    let format = Format::Json(json!({"type": "object"}));
    let either = grammar(
        &format,
        &tools(Choice::Auto, true),
        Some(Form::named("Hermes")),
    )
    .unwrap();
    let call = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    for text in [call, "{\"a\": 1}", &format!("{call}\n{call}")] {
        assert!(takes(&either, &tokenizer, text), "{text}");
    }
    assert!(!takes(&either, &tokenizer, "text"));
    let alone = grammar(
        &Format::Text,
        &tools(Choice::Required, false),
        Some(Form::named("Hermes")),
    )
    .unwrap();
    assert!(
        takes(&alone, &tokenizer, call) && !takes(&alone, &tokenizer, &format!("{call}\n{call}"))
    );
    // A form without a frame can't be demanded.
    let error = grammar(
        &Format::Text,
        &tools(Choice::Required, true),
        Some(Form::named("Command R")),
    );
    assert!(error.unwrap_err().message.starts_with("tool_choice: "));
}

#[test]
fn a_thought_comes_before() {
    let tokenizer = tokenizer();
    let format = Format::Json(json!({"type": "object"}));
    let wanted = Wanted {
        format: &format,
        tools: &Tools::default(),
        is_chat: true,
        prompt: "Q<think>\n",
    };
    let grammar = Grammars::with_form(Arc::clone(&tokenizer), None)
        .wanted(&wanted)
        .unwrap()
        .unwrap();
    for text in [
        "Hm.</think>{}",
        "It is < 1.\n</think>\n\n{\"a\": 1}",
        "</think>{}",
    ] {
        assert!(takes(&grammar, &tokenizer, text), "{text}");
    }
    for text in ["{}", "Hm.</think>text", "Hm"] {
        assert!(!takes(&grammar, &tokenizer, text), "{text}");
    }
}

#[test]
fn equal_requests_share_what_was_compiled() {
    let request = |url: &str, body: &str| {
        let prompt = match url {
            "/v1/completions" => r#""prompt": "a""#,
            _ => r#""messages": [{"role": "user", "content": "a"}]"#,
        };
        let line = format!(r#"{{"custom_id": "1", "url": "{url}", "body": {{{prompt}{body}}}}}"#);
        Request::parse(line.as_bytes()).unwrap()
    };
    let completion = |body: &str| request("/v1/completions", body);
    let grammars = Grammars::new(tokenizer(), Some("<think>"), "body.");
    let one = r#", "guided_json": {"properties": {"a": {"type": "integer"}}}"#;
    let of = |request: &Request, prompt: &str| grammars.of(request, prompt).unwrap();
    assert_eq!(of(&completion(""), ""), None);
    let made = of(&completion(one), "");
    assert!(made.is_some());
    // One grammar is equal to itself only.
    assert_eq!(of(&completion(one), "another"), made);
    let same = r#", "response_format": {"type": "json_object",
        "schema": {"properties": {"a": {"type": "integer"}}}}, "max_tokens": 7, "seed": 1"#;
    assert_eq!(of(&completion(same), ""), made);
    assert_ne!(of(&completion(r#", "guided_choice": ["a"]"#), ""), made);
    // In a chat, a thought may come before.
    let chat = request("/v1/chat/completions", one);
    let after = of(&chat, "Q<think>\n");
    assert_ne!(after, made);
    assert_eq!(of(&chat, "R<think>\n"), after);
    assert_eq!(of(&completion(one), ""), made);
    // What is wrong is told each time, with the field.
    let wrong = completion(r#", "guided_regex": "(a""#);
    for _ in 0..2 {
        let bad = grammars.of(&wrong, "").unwrap_err();
        assert_eq!(bad.code, Code::InvalidRequest);
        assert!(
            bad.message.starts_with("body.response_format: "),
            "{}",
            bad.message
        );
    }
}
