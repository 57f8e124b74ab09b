//! A chat template and a conversation, answered by the code of the process that renders templates.
//!
//! Templates are raw text, changed ones of the tests, or come from a grammar. The process bounds what
//! the system can bound; here fewer steps stand for its limits. A template must not bring the
//! renderer to a stop, overflow its stack, or take memory or time that its steps do not bound.

mod grammar;

use arbitrary::{Arbitrary, Result, Unstructured};
use serde::Deserialize;
use std::sync::OnceLock;
use tier_plan_planner::chat::jinja::worker::{Reply, answer};

/// Steps of a rendering, of 64 bytes of data each: 3 MB in all.
const FUEL: u64 = 50_000;
/// Stack of the thread, as in the process.
const STACK_BYTES: usize = 64 << 20;
/// Most bytes of a template.
const MAX_TEMPLATE_BYTES: usize = 4 << 10;
/// Most bytes of a rendered conversation and of an error.
const MAX_TEXT_BYTES: usize = 32 << 20;
const MAX_ERROR_BYTES: usize = 1000;

/// Parts of templates that end or begin something, or are read in a special way.
const FRAGMENTS: &str = "{% %} {{ }} {# #} {%- -%} {{- -}} +%} {%raw%} {%endraw%} {%endfor%} {%endif%} \
    {%else%} {%endmacro%} {%endset%} {%macro f(x)%} varargs kwargs \\ ' \" \r\n \n \u{0} é ( ) % | + - [ ]";
/// Texts of messages.
const CONTENTS: &[&str] = &[
    "",
    "Hi",
    " a\nb\t",
    "<|im_end|>",
    "{{ 1 }}",
    "<think>\nHm\n</think>\n\nYes",
    "你好 é ß ı",
    "{\"a\": [1, 2]}",
    "a,b,c",
    "\u{1c}\u{0}\u{1b}[2J",
];

/// A template of the tests.
#[derive(Deserialize)]
struct Seed {
    template: String,
}

/// Returns the templates of the tests.
fn seeds() -> &'static [String] {
    static SEEDS: OnceLock<Vec<String>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let folder = tier_plan_testing::root().join("planner/src/chat/jinja");
        let read = |name: &str| {
            let json = std::fs::read(folder.join(name)).expect("templates of the tests");
            serde_json::from_slice::<Vec<Seed>>(&json).expect("templates of the tests")
        };
        let files = ["features.json", "more_features.json"];
        let seeds = files.iter().flat_map(|name| read(name));
        seeds.map(|seed| seed.template).collect()
    })
}

/// Returns a place in a text where a character begins.
fn place(input: &mut Unstructured<'_>, text: &str) -> Result<usize> {
    let at = input.int_in_range(0..=text.len())?;
    Ok(text.floor_char_boundary(at))
}

/// Replaces a part of a template, often by nothing or an empty part by something.
fn mutate(input: &mut Unstructured<'_>, source: &mut String) -> Result<()> {
    let from = place(input, source)?;
    let len = match input.int_in_range(0..=3)? {
        0 => usize::from(u8::arbitrary(input)?),
        1 => 1,
        _ => 0,
    };
    let to = source.floor_char_boundary((from + len).min(source.len()));
    let new = match input.int_in_range(0..=5)? {
        0 => String::new(),
        1 => grammar::generate(input, 'E')?,
        2 => grammar::generate(input, 'S')?,
        3 => {
            let other = input.choose(seeds())?;
            let (a, b) = (place(input, other)?, place(input, other)?);
            other[a.min(b)..a.max(b)].to_string()
        }
        _ => {
            let fragments: Vec<&str> = FRAGMENTS.split(' ').collect();
            (*input.choose(&fragments)?).to_string()
        }
    };
    source.replace_range(from.min(to)..to, &new);
    Ok(())
}

/// Makes messages, as the program gives them to a template.
fn messages(input: &mut Unstructured<'_>) -> Result<Vec<serde_json::Value>> {
    let mut messages = Vec::new();
    for _ in 0..input.int_in_range(0..=3)? {
        let role = input.choose(&["user", "assistant", "system"])?;
        let text = *input.choose(CONTENTS)?;
        let content = match u8::arbitrary(input)? {
            0 => serde_json::json!([{ "type": "text", "text": text }]),
            1 => serde_json::json!({ "text": text }),
            _ => text.into(),
        };
        let mut message = serde_json::json!({ "role": role, "content": content });
        if u8::arbitrary(input)? == 0 {
            message["thinking"] = text.into();
        }
        messages.push(message);
    }
    Ok(messages)
}

/// Makes a template.
fn template(input: &mut Unstructured<'_>) -> Result<String> {
    let mut source = match input.int_in_range(0..=3)? {
        0 => {
            let rest = input.bytes(input.len().min(MAX_TEMPLATE_BYTES))?;
            String::from_utf8_lossy(rest).into_owned()
        }
        1 => grammar::generate(input, 'S')?,
        _ => input.choose(seeds())?.clone(),
    };
    for _ in 0..6 {
        if input.is_empty() || source.len() > MAX_TEMPLATE_BYTES {
            break;
        }
        mutate(input, &mut source)?;
    }
    Ok(source)
}

/// Has a thread with the process's stack answer a request.
fn answered(source: &str, messages: Option<&[serde_json::Value]>) -> Reply {
    let request = serde_json::json!({
        "source": source,
        "bos": "<s>",
        "eos": "</s>",
        "messages": messages,
    });
    let json = request.to_string();
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
        let thread = thread.spawn_scoped(scope, || answer(json.as_bytes(), FUEL));
        let joined = thread.expect("a thread").join();
        joined.unwrap_or_else(|_| panic!("the renderer came to a stop: {source:?}"))
    })
}

/// Checks one input.
pub fn check(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let made = messages(&mut input).and_then(|m| Ok((m, template(&mut input)?)));
    let Ok((messages, source)) = made else {
        return;
    };
    let compiled = answered(&source, None);
    let reply = answered(&source, Some(&messages));
    match &reply {
        Reply::Rendered(text) => assert!(text.len() <= MAX_TEXT_BYTES),
        Reply::Refused(reason) | Reply::Spent(reason) => {
            assert!(!reason.is_empty() && reason.len() <= MAX_ERROR_BYTES);
            assert!(!reason.contains(char::is_control), "{reason:?}");
        }
    }
    let is_refused = |reply: &Reply| matches!(reply, Reply::Refused(_));
    assert!(!is_refused(&compiled) || is_refused(&reply), "{source:?}");
    // A turn renders a conversation twice and compares what comes of it.
    if !source.contains("now") {
        let again = answered(&source, Some(&messages));
        assert_eq!(format!("{reply:?}"), format!("{again:?}"), "{source:?}");
    }
}
