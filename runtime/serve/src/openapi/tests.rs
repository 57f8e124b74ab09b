use super::*;
use crate::http::routes::{ROUTES, Route};
use crate::request::fields::READ;
use crate::request::{Endpoint, Request};
use crate::{anthropic, llama, plan, responses, utilities};
use axum::routing::MethodFilter;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tier_plan_testing::schema::{check, target};

mod bodies;

/// Reads a body as an endpoint does, up to what needs a model.
type Read = fn(&[u8]) -> Result<(), String>;

/// Returns right bodies.
type Bodies = fn() -> Vec<Value>;

/// Kinds of bodies: the schema's name, how they are read, and right ones that have every field.
const KINDS: [(&str, Read, Bodies); 10] = [
    (
        "ChatRequest",
        |body| said(Request::from_body("id", Endpoint::Chat, body)),
        bodies::chats,
    ),
    (
        "CompletionRequest",
        |body| said(Request::from_body("id", Endpoint::Completions, body)),
        bodies::completions,
    ),
    (
        "MessageRequest",
        |body| said(anthropic::request("id", body)),
        bodies::messages,
    ),
    (
        "CountRequest",
        |body| said(anthropic::counted("id", body)),
        bodies::messages,
    ),
    (
        "ResponseRequest",
        |body| said(responses::request("id", body)),
        bodies::responses,
    ),
    (
        "LlamaRequest",
        |body| said(llama::request("id", body)),
        bodies::of_llama,
    ),
    (
        "TokenizeRequest",
        |body| said(utilities::ToTokenize::read(body)),
        bodies::to_tokenize,
    ),
    (
        "DetokenizeRequest",
        |body| said(utilities::to_detokenize(body)),
        bodies::to_detokenize,
    ),
    (
        "TemplateRequest",
        |body| said(utilities::ToRender::read(body)),
        bodies::to_render,
    ),
    ("PlanRequest", |body| said(plan::order(body)), bodies::plans),
];

fn said<T>(read: Result<T, crate::request::BadLine>) -> Result<(), String> {
    read.map(drop).map_err(|bad| bad.message)
}

fn parsed() -> Value {
    serde_json::from_str(TEXT).expect("the document is JSON")
}

fn schema<'d>(document: &'d Value, name: &str) -> &'d Value {
    &document["components"]["schemas"][name]
}

#[test]
fn the_document_has_the_endpoints_and_the_version() {
    let document = parsed();
    let paths = document["paths"].as_object().unwrap();
    let described: BTreeSet<(&str, &str)> = paths
        .iter()
        .flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap().keys();
            methods.map(|method| (path.as_str(), method.as_str()))
        })
        .collect();
    let method = |route: &Route| match route.method {
        MethodFilter::GET => "get",
        MethodFilter::POST => "post",
        other => panic!("no name for {other:?}"),
    };
    let mut routes: BTreeSet<(&str, &str)> = ROUTES
        .iter()
        .map(|route| (route.path, method(route)))
        .collect();
    assert_eq!(routes.len(), ROUTES.len());
    // The page, whose files are no interface.
    assert!(crate::page::has("/") && routes.insert(("/", "get")));
    assert_eq!(described, routes);
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn references_lead_somewhere_and_nothing_is_left_over() {
    let document = parsed();
    let mut used = BTreeSet::new();
    walk(&document, &mut |value| {
        if let Some(reference) = value.get("$ref") {
            target(&document, reference);
            used.insert(reference.as_str().unwrap().to_string());
        }
    });
    for kind in ["schemas", "responses"] {
        for name in document["components"][kind].as_object().unwrap().keys() {
            assert!(
                used.contains(&format!("#/components/{kind}/{name}")),
                "{name} is not used"
            );
        }
    }
}

fn walk<'v>(value: &'v Value, visit: &mut impl FnMut(&'v Value)) {
    visit(value);
    match value {
        Value::Array(items) => items.iter().for_each(|item| walk(item, visit)),
        Value::Object(fields) => fields.values().for_each(|field| walk(field, visit)),
        _ => {}
    }
}

#[test]
fn examples_are_right() {
    let document = parsed();
    let mut n = 0;
    walk(&document, &mut |value| {
        let Some(example) = value.get("example") else {
            return;
        };
        let name = value["schema"]["$ref"].as_str().unwrap();
        let name = name.rsplit('/').next().unwrap();
        let (_, read, _) = KINDS.iter().find(|(kind, ..)| *kind == name).expect(name);
        assert_eq!(
            check(&document, &value["schema"], example),
            Ok(()),
            "{name}"
        );
        assert_eq!(read(example.to_string().as_bytes()), Ok(()), "{name}");
        n += 1;
    });
    assert!(n >= KINDS.len(), "{n}");
}

/// Collects the places of all fields that a schema describes, such as `tools[].function.name`.
fn places(document: &Value, schema: &Value, at: &str, found: &mut BTreeSet<String>) {
    if let Some(reference) = schema.get("$ref") {
        places(document, target(document, reference), at, found);
    }
    for one in schema["anyOf"].as_array().into_iter().flatten() {
        places(document, one, at, found);
    }
    if let Some(items) = schema.get("items") {
        places(document, items, &format!("{at}[]"), found);
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let place = if at.is_empty() {
            name.clone()
        } else {
            format!("{at}.{name}")
        };
        places(document, field, &place, found);
        found.insert(place);
    }
}

/// Returns a place without the numbers of elements: `a[3].b` as `a[].b`.
fn without_numbers(place: &str) -> String {
    place.chars().filter(|c| !c.is_ascii_digit()).collect()
}

#[test]
fn every_field_that_is_read_is_described_and_the_reverse() {
    let document = parsed();
    for (name, read, bodies) in KINDS {
        READ.with_borrow_mut(BTreeSet::clear);
        for body in bodies() {
            read(body.to_string().as_bytes()).unwrap_or_else(|e| panic!("{name}: {e}: {body}"));
        }
        let read: BTreeSet<String> = READ
            .take()
            .iter()
            .map(|place| without_numbers(place))
            .collect();
        let mut described = BTreeSet::new();
        places(&document, schema(&document, name), "", &mut described);
        let missing: Vec<&String> = read.difference(&described).collect();
        let unread: Vec<&String> = described.difference(&read).collect();
        assert!(
            missing.is_empty() && unread.is_empty(),
            "{name}: read, but not described: {missing:?}; described, but not read: {unread:?}"
        );
    }
}

/// Values that are put in the place of others.
fn values() -> Vec<Value> {
    let long: Vec<u32> = (0..600).collect();
    vec![
        Value::Null,
        json!(true),
        json!(false),
        json!(0),
        json!(-1),
        json!(-2),
        json!(1),
        json!(7),
        json!(0.5),
        json!(100),
        json!(101),
        json!(-101.5),
        json!(1e30),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(""),
        json!("none"),
        json!("text"),
        json!("a b"),
        json!("x".repeat(2000)),
        json!([]),
        json!([null]),
        json!([1]),
        json!(["text"]),
        json!(["text", ""]),
        json!([["text"]]),
        json!([{}]),
        json!({}),
        json!({"x": 1}),
        json!({"7": 101}),
        json!({"messages": 1}),
        json!({"type": "text"}),
        json!(long),
    ]
}

/// Returns the JSON pointers of all values in a body but the body itself.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    let mut add = |key: &str, value: &Value| {
        let place = format!("{at}/{}", key.replace('~', "~0").replace('/', "~1"));
        pointers(value, &place, found);
        found.push(place);
    };
    match value {
        Value::Array(items) => {
            let items = items.iter().enumerate();
            items.for_each(|(i, item)| add(&i.to_string(), item));
        }
        Value::Object(fields) => fields.iter().for_each(|(key, value)| add(key, value)),
        _ => {}
    }
}

/// What a schema leaves to words: how fields depend on each other, and what texts must hold.
const IN_WORDS: [&str; 19] = [
    // A grammar's syntax.
    "grammar: line ",
    "or one of the two fields",
    "a pair",
    "expected -100 to 100",
    "a name of 1 to",
    "a tool that is among",
    "a second tool",
    "\"logprobs\": true beside it",
    "expected one form of the answer",
    "as the last message is not supported",
    "an answer as the last item",
    "a JSON schema",
    "a JSON object as text",
    "is there twice",
    "bytes, or an array of at most",
    // A number as a float, of which a few are too large for exact whole ones.
    "a whole number of 64 bits",
    "token ids, each with -100 to 100",
    "a token id with a number",
    "expected more than 0, up to 1 (all tokens)",
];

#[test]
fn what_the_schemas_refuse_is_refused_and_the_reverse() {
    let document = parsed();
    let (mut refused, mut taken) = (0, 0);
    for (name, read, bodies) in KINDS {
        for body in bodies() {
            let mut all = Vec::new();
            pointers(&body, "", &mut all);
            for pointer in all {
                for value in values().into_iter().map(Some).chain([None]) {
                    let body = changed(&body, &pointer, value);
                    let fits = check(&document, schema(&document, name), &body);
                    match (fits, read(body.to_string().as_bytes())) {
                        (Ok(()), Ok(())) => taken += 1,
                        (Err(_), Err(_)) => refused += 1,
                        (Ok(()), Err(error)) => assert!(
                            IN_WORDS.iter().any(|words| error.contains(words)),
                            "{name} at {pointer}: refused, though it fits: {error}: {body}"
                        ),
                        (Err(error), Ok(())) => {
                            panic!("{name} at {pointer}: taken, though {error}: {body}")
                        }
                    }
                }
            }
        }
    }
    assert!(refused > 1000 && taken > 1000, "{refused} {taken}");
}

/// Returns a body with another value at a place, or without what is there.
fn changed(body: &Value, pointer: &str, value: Option<Value>) -> Value {
    let mut body = body.clone();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let key = key.replace("~1", "/").replace("~0", "~");
    match (body.pointer_mut(parent).unwrap(), value) {
        (Value::Object(fields), Some(value)) => drop(fields.insert(key, value)),
        (Value::Object(fields), None) => drop(fields.remove(&key)),
        (Value::Array(items), Some(value)) => items[key.parse::<usize>().unwrap()] = value,
        (Value::Array(items), None) => drop(items.remove(key.parse().unwrap())),
        (other, _) => panic!("{other} has no elements"),
    }
    body
}
