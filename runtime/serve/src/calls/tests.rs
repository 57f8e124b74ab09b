use super::*;
use crate::request::tools::Tool;
use proptest::prelude::*;
use serde_json::json;

fn tools() -> Arc<[Tool]> {
    let tool = |name: &str, parameters| Tool {
        name: name.into(),
        description: None,
        parameters,
        strict: false,
    };
    let weather = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "when": {"type": "object"},
    }});
    Arc::new([
        tool("get_weather", weather),
        tool("now", json!({"type": "object"})),
    ])
}

fn call(name: &str, arguments: serde_json::Value) -> Part {
    Part::Call(Call {
        id: None,
        name: name.into(),
        arguments: arguments.to_string(),
    })
}

fn content(text: &str) -> Part {
    Part::Content(text.into())
}

/// The parts of an answer that is cut after these numbers of characters.
fn parsed(form: &str, text: &str, cuts: &[usize]) -> Vec<Part> {
    let mut parser = Parser::new(Form::named(form), tools(), false);
    let (mut parts, mut rest) = (Vec::new(), text);
    for cut in cuts {
        let at = rest.char_indices().nth(*cut).map_or(rest.len(), |(i, _)| i);
        let (now, after) = rest.split_at(at);
        let mut came = Vec::new();
        parser.push(now, &mut came);
        came.into_iter().for_each(|part| add(&mut parts, part));
        rest = after;
    }
    let mut came = Vec::new();
    parser.push(rest, &mut came);
    parser.finish(&mut came);
    came.into_iter().for_each(|part| add(&mut parts, part));
    parts
}

/// Checks the parts of an answer, cut at every place and into single characters.
fn check(form: &str, text: &str, expected: &[Part]) {
    let n = text.chars().count();
    for cut in 0..=n {
        assert_eq!(
            parsed(form, text, &[cut]),
            expected,
            "{form}: {text:?} at {cut}"
        );
    }
    assert_eq!(
        parsed(form, text, &vec![1; n]),
        expected,
        "{form}: {text:?}"
    );
}

fn paris() -> Part {
    call("get_weather", json!({"city": "Paris", "days": 2}))
}

#[test]
fn hermes() {
    let one = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 2}}\n</tool_call>";
    check("Hermes", one, &[paris()]);
    check(
        "Hermes",
        &format!("Let me see.\n\n{one}\n"),
        &[content("Let me see."), paris()],
    );
    let two =
        format!("{one}\n<tool_call>\n{{\"name\": \"now\", \"arguments\": {{}}}}\n</tool_call>");
    check("Hermes", &two, &[paris(), call("now", json!({}))]);
    let odd = "<tool_call>{\"name\": \"now\", \"arguments\": \"{\\\"a\\\": \\\"</tool_call>\\\"}\"}</tool_call> done";
    check(
        "Hermes",
        odd,
        &[call("now", json!({"a": "</tool_call>"})), content(" done")],
    );
    // An answer may end without the mark.
    check("Hermes", &one[..one.len() - 13], &[paris()]);
    check("Hermes", &one[..one.len() - 5], &[paris()]);
}

#[test]
fn what_is_no_call_is_content() {
    for text in [
        "plain text",
        " text with space \n",
        "a < b <tool",
        "<tool_call>",
        "<tool_call>\nno JSON\n</tool_call>",
        "<tool_call>{\"name\": \"now\", \"arguments\": [1]}</tool_call> text",
        "<tool_call>{\"name\": \"\"}</tool_call>",
        "<tool_call>{\"name\": \"now\", \"arguments\": {\"a\": 1}",
        "<tool_call>{\"name\": \"now\"}</tool_call",
        "</tool_call>",
    ] {
        // The last but one is whole but for its mark.
        let expected = match text {
            "<tool_call>{\"name\": \"now\"}</tool_call" => call("now", json!({})),
            _ => content(text),
        };
        check("Hermes", text, &[expected]);
    }
    let nested = "<tool_call> see <tool_call>{\"name\": \"now\"}</tool_call>";
    check(
        "Hermes",
        nested,
        &[content("<tool_call> see"), call("now", json!({}))],
    );
    check("Hermes", "", &[]);
}

#[test]
fn qwen3_coder() {
    let one = "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>";
    let marked = format!("<tool_call>\n{one}\n</tool_call>");
    check("Qwen3-Coder", &marked, &[paris()]);
    check(
        "Qwen3-Coder",
        &format!("Ok.\n{one}\n"),
        &[content("Ok."), paris()],
    );
    check(
        "Qwen3-Coder",
        &format!("{marked}\n{marked}"),
        &[paris(), paris()],
    );
    let lines = "<tool_call>\n<function=get_weather>\n<parameter=city>\na\n</tool_call>\n\nb\n</parameter>\n</function>\n</tool_call>";
    check(
        "Qwen3-Coder",
        lines,
        &[call("get_weather", json!({"city": "a\n</tool_call>\n\nb"}))],
    );
    check(
        "Qwen3-Coder",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        &[call("now", json!({}))],
    );
    check(
        "Qwen3-Coder",
        "<tool_call>{\"name\": \"now\"}</tool_call>",
        &[call("now", json!({}))],
    );
    check(
        "Qwen3-Coder",
        "<tool_call>\n<function=now",
        &[content("<tool_call>\n<function=now")],
    );
    let seed = format!("<seed:tool_call>{one}</seed:tool_call>");
    check("Seed-OSS", &seed, &[paris()]);
}

#[test]
fn deepseek() {
    let fenced = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\"city\": \"Paris\", \"days\": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    check("DeepSeek", fenced, &[paris(), call("now", json!({}))]);
    let plain = "Hm.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"Paris\", \"days\": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>";
    check("DeepSeek", plain, &[content("Hm."), paris()]);
    let cut = plain
        .strip_suffix("<｜tool▁call▁end｜><｜tool▁calls▁end｜>")
        .unwrap();
    check("DeepSeek", cut, &[content("Hm."), paris()]);
    let dsml = "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">Paris</｜DSML｜parameter>\n<｜DSML｜parameter name=\"days\" string=\"false\">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>";
    check("DeepSeek V3.2", dsml, &[paris()]);
    check(
        "DeepSeek V3.2",
        &dsml.replace("function_calls", "tool_calls"),
        &[paris()],
    );
}

#[test]
fn kimi_keeps_its_identifiers() {
    let text = "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{\"city\": \"Paris\", \"days\": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>";
    let named = |id: &str, part: Part| match part {
        Part::Call(call) => Part::Call(Call {
            id: Some(id.into()),
            ..call
        }),
        other => other,
    };
    let expected = [
        named("functions.get_weather:0", paris()),
        named("functions.now:1", call("now", json!({}))),
    ];
    check("Kimi K2", text, &expected);
}

#[test]
fn glm() {
    let text = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>";
    check("GLM", &format!("\n{text}"), &[paris()]);
    check("GLM", &text.replace('\n', ""), &[paris()]);
    check(
        "GLM",
        "<tool_call>now</tool_call>",
        &[call("now", json!({}))],
    );
    check("GLM", "<tool_call>now", &[content("<tool_call>now")]);
}

#[test]
fn minimax() {
    let text = "<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">Paris</parameter>\n<parameter name=\"days\">2</parameter>\n</invoke>\n<invoke name=\"now\">\n</invoke>\n</minimax:tool_call>";
    check("MiniMax M2", text, &[paris(), call("now", json!({}))]);
    let lines = "<tool_calls>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 2}}\n{\"name\": \"now\", \"arguments\": {}}\n</tool_calls>";
    check("MiniMax M1", lines, &[paris(), call("now", json!({}))]);
}

#[test]
fn mistral() {
    let array = "[TOOL_CALLS][{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 2}}, {\"name\": \"now\", \"arguments\": {}}]";
    check("Mistral", array, &[paris(), call("now", json!({}))]);
    check(
        "Mistral",
        &array.replace("[{", " [ {"),
        &[paris(), call("now", json!({}))],
    );
    let named = "Hm. [TOOL_CALLS]get_weather[ARGS]{\"city\": \"Paris\", \"days\": 2}[TOOL_CALLS]now[CALL_ID]abc123456[ARGS]{}";
    let now = Part::Call(Call {
        id: Some("abc123456".into()),
        name: "now".into(),
        arguments: "{}".into(),
    });
    check("Mistral", named, &[content("Hm."), paris(), now]);
    check("Mistral", "[TOOL_CALLS]now{}", &[call("now", json!({}))]);
    for text in [
        "[TOOL_CALLS]",
        "[TOOL_CALLS][ARGS]{}",
        "[TOOL_CALLS]now[ARGS]{\"a\": 1",
        "[TOOL_CALLS] no call",
    ] {
        check("Mistral", text, &[content(text)]);
    }
}

#[test]
fn llama_3_calls_only_tools_that_there_are() {
    let one = "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\", \"days\": 2}}";
    check("Llama 3", one, &[paris()]);
    check("Llama 3", &format!("<|python_tag|>{one}"), &[paris()]);
    check("Llama 3", &format!("\n{one}; {one}"), &[paris(), paris()]);
    check(
        "Llama 3",
        &format!("I say {one}"),
        &[content(&format!("I say {one}"))],
    );
    for text in [
        "{\"name\": \"other\", \"parameters\": {}}",
        "{\"name\": \"now\"}",
        "{\"a\": 1} and text",
        "{ code }",
        "{\"name\": \"now\", \"parameters\": {",
        "[1, 2]",
        " Text.\n",
    ] {
        check("Llama 3", text, &[content(text)]);
    }
}

#[test]
fn others_have_json_between_marks() {
    let json = "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 2}}";
    for (form, open, close) in [
        ("Phi-4", "<|tool_call|>[", "]<|/tool_call|>"),
        ("Granite 3", "<|tool_call|>[", "]"),
        ("Nemotron", "<TOOLCALL>[", "]</TOOLCALL>"),
        ("LongCat", "<longcat_tool_call>", "</longcat_tool_call>"),
    ] {
        check(form, &format!("{open}{json}{close}"), &[paris()]);
    }
    let command = "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"now\", \"parameters\": {}}\n]<|END_ACTION|>";
    let now = Part::Call(Call {
        id: Some("0".into()),
        name: "now".into(),
        arguments: "{}".into(),
    });
    check("Command R", command, &[now]);
}

#[test]
fn gemma() {
    let text = "Hm.<|tool_call>call:get_weather{city:<|\"|>Paris<|\"|>,days:2}<tool_call|><|tool_call>call:now{}<tool_call|>";
    check(
        "Gemma 4",
        text,
        &[content("Hm."), paris(), call("now", json!({}))],
    );
    let nested = "<|tool_call>call:now{a:[1, true,{b:null,<|\"|>c d<|\"|>:\"e\\\"}\"}],f:<|\"|>{<tool_call|>,}<|\"|>,g:word}<tool_call|>";
    let expected =
        json!({"a": [1, true, {"b": null, "c d": "e\"}"}], "f": "{<tool_call|>,}", "g": "word"});
    check("Gemma 4", nested, &[call("now", expected)]);
    for text in [
        "<|tool_call>call:now{a:1<tool_call|>",
        "<|tool_call>now{}<tool_call|>",
        "<|tool_call>call:now{a:",
        // What ends an object is in a list.
        "<|tool_call>call:now{a:[}<tool_call|>",
        "<|tool_call>call:now{a:[1,}]}<tool_call|>",
    ] {
        check("Gemma 4", text, &[content(text)]);
    }
    let deep = format!("<|tool_call>call:now{{a:{}}}<tool_call|>", "[".repeat(500));
    assert_eq!(parsed("Gemma 4", &deep, &[]), [content(&deep)]);
    let text = "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:2}<end_function_call>";
    check("FunctionGemma", text, &[paris()]);
}

#[test]
fn one_call_is_the_first() {
    let one = "<tool_call>{\"name\": \"now\"}</tool_call>";
    let mut parser = Parser::new(Form::named("Hermes"), tools(), true);
    let mut parts = Vec::new();
    parser.push(&format!("{one}{one}"), &mut parts);
    parser.finish(&mut parts);
    assert_eq!(parts, [call("now", json!({}))]);
}

#[test]
fn a_form_is_known_by_the_template() {
    for (source, name) in [
        ("{{ '<|channel|>' }}{{ '<|call|>' }}", Some("gpt-oss")),
        ("'<｜tool▁calls▁begin｜>'", Some("DeepSeek")),
        ("<｜tool▁calls▁begin｜>```json", Some("DeepSeek V3")),
        ("[TOOL_CALLS][ARGS]", Some("Mistral 11")),
        ("<|tool_calls_section_begin|>", Some("Kimi K2")),
        ("<tool_call>\\n<function=", Some("Qwen3-Coder")),
        ("<tool_call>{name}\\n<arg_key>", Some("GLM")),
        ("<tool_call>\\n{\"name\": <function-name>", Some("Hermes")),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", Some("Mistral")),
        ("<|python_tag|>", Some("Llama 3")),
        ("<|tool_call>call: <tool_call|>", Some("Gemma 4")),
        ("<minimax:tool_call>", Some("MiniMax M2")),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    ] {
        assert_eq!(
            forms::of_template(source).map(|form| form.name),
            name,
            "{source}"
        );
    }
}

/// Pieces of answers in all forms.
const PIECES: [&str; 39] = [
    "<tool_call>",
    "</tool_call>",
    "{\"name\": \"now\", \"arguments\": {}}",
    "{\"name\": \"now\", \"parameters\": {\"a\": [\"}\"]}}",
    "<function=now>",
    "<parameter=a>",
    "</parameter>",
    "</function>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "now",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "{}",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[",
    "]",
    "{",
    "}",
    "\"",
    " ",
    "\n",
    "é",
    "<|python_tag|>",
    ";",
    "<minimax:tool_call>",
    "<invoke name=\"now\">",
    "</invoke>",
    "<|tool_call>",
    "<tool_call|>",
    "call:now{",
    "<|\"|>",
    "a:",
];

proptest! {
    #[test]
    fn cuts_change_nothing(
        form in 0usize..11,
        pieces in prop::collection::vec(prop::sample::select(PIECES.to_vec()), 0..14),
        cuts in prop::collection::vec(0usize..12, 0..20),
    ) {
        let names = ["Hermes", "Qwen3-Coder", "GLM", "DeepSeek", "Mistral", "Llama 3", "MiniMax M2", "Kimi K2", "Granite 3",
            "Seed-OSS", "Gemma 4"];
        let text = pieces.concat();
        let whole = parsed(names[form], &text, &[]);
        prop_assert_eq!(&parsed(names[form], &text, &cuts), &whole);
        // Nothing is lost where there is no call.
        if !whole.iter().any(|part| matches!(part, Part::Call(_))) {
            let text_of: String = whole.iter().map(|part| match part {
                Part::Content(text) | Part::Thinking(text) => text.as_str(),
                Part::Call(_) => "",
            }).collect();
            prop_assert_eq!(text_of, text);
        }
    }
}
