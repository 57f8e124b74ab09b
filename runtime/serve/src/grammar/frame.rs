//! The parts of a grammar, written down in the syntax of Lark.

use crate::calls::forms::{Arguments, Frame};
use crate::calls::typed::{MAX_REFERENCES, gather};
use crate::request::format::Format;
use crate::request::tools::Tool;
use crate::thought::Before;
use serde_json::{Map, Value, json};
use std::fmt::Write;

/// White space that JSON of an answer may have between its parts: enough to be indented, and so little
/// that no model goes on with it for long.
const SPACE: &str = r" |\r?\n(?: {0,24}|\t{0,12})";

/// A grammar that is being written.
pub(super) struct Lark<C> {
    rules: String,
    n_rules: usize,
    /// Returns the control token that a text begins with, and the bytes of it.
    control: C,
}

impl<C: Fn(&str) -> Option<(u32, usize)>> Lark<C> {
    pub fn new(control: C) -> Self {
        Self {
            rules: String::new(),
            n_rules: 0,
            control,
        }
    }

    /// Returns the grammar whose answers are `start`.
    pub fn finish(self, start: &str) -> String {
        format!("start: {start}\n{}", self.rules)
    }

    /// Adds a rule, and returns its name.
    fn rule(&mut self, attributes: &str, body: &str) -> String {
        self.n_rules += 1;
        let name = format!("r{}", self.n_rules);
        // Writing to a string does not fail.
        let _ = writeln!(self.rules, "{name}{attributes}: {body}");
        name
    }

    /// Returns what a text is in the grammar. Where the vocabulary has a part of it as a control
    /// token, that is meant.
    pub fn text(&self, text: &str) -> String {
        let mut parts = Vec::new();
        let (mut done, mut at) = (0, 0);
        while at < text.len() {
            if let Some((token, len)) = (self.control)(&text[at..]) {
                parts.extend(quoted(&text[done..at]));
                parts.push(format!("<[{token}]>"));
                at += len;
                done = at;
            } else {
                at += text[at..].chars().next().map_or(1, char::len_utf8);
            }
        }
        parts.extend(quoted(&text[done..]));
        if parts.is_empty() {
            "\"\"".to_string()
        } else {
            parts.join(" ")
        }
    }

    /// Returns what JSON by a schema is in the grammar.
    fn json(schema: &Value, options: Value) -> String {
        let mut schema = schema.clone();
        if let Value::Object(fields) = &mut schema {
            fields.insert("x-guidance".into(), options);
        }
        format!("%json {schema}")
    }

    /// Returns what an answer of a form is in the grammar.
    pub fn format(&mut self, format: &Format) -> String {
        match format {
            Format::Text => self.rule("", "/(?s:.*)/"),
            Format::Json(schema) => {
                let options = json!({ "whitespace_pattern": SPACE });
                let json = Self::json(schema, options);
                self.rule("", &json)
            }
            Format::Regex(regex) => {
                let regex = llguidance::regex_to_lark(regex, "");
                self.rule("", &format!("/{regex}/"))
            }
            Format::Choice(texts) => {
                let texts: Vec<String> = texts.iter().flat_map(|text| quoted(text)).collect();
                self.rule("", &texts.join(" | "))
            }
            Format::Lark(text) => self.rule("", &format!("%lark {{\n{text}\n}}")),
        }
    }

    /// Returns what comes before an answer.
    pub fn thought(&mut self, before: &Before) -> String {
        let gap = |lark: &mut Self| lark.rule("", r"/[ \t\r\n]{1,16}/");
        match before {
            Before::Nothing => String::new(),
            Before::Open(close) => {
                let (thought, gap) = (self.up_to(close), gap(self));
                format!("{thought} {gap}?")
            }
            Before::Maybe([open, close]) => {
                let (thought, gap) = (self.up_to(close), gap(self));
                let open = self.text(open);
                format!("({open} {thought} {gap}?)?")
            }
            Before::Channels => {
                let thought = self.up_to("<|end|>");
                let open = self.text("<|channel|>analysis<|message|>");
                let role = self.text("<|start|>assistant");
                format!("({open} {thought} {role})?")
            }
        }
    }

    /// Returns any text with `end` at its end, and nowhere else.
    fn up_to(&mut self, end: &str) -> String {
        if let Some((token, len)) = (self.control)(end)
            && len == end.len()
        {
            return self.rule("", &format!("/(?s:.*)/ <[{token}]>"));
        }
        self.rule("[lazy]", &format!("/(?s:.*){}/", escaped(end)))
    }

    /// Returns what calls of some tools are in the grammar.
    pub fn calls(&mut self, frame: &Frame, tools: &[&Tool], parallel: bool) -> String {
        let calls: Vec<String> = tools.iter().map(|tool| self.call(frame, tool)).collect();
        let call = self.rule("", &calls.join(" | "));
        let [open, close] = frame.all.map(|text| self.text(text));
        match frame.between {
            Some(between) if parallel => {
                let between = self.text(between);
                format!("{open} {call} ({between} {call})* {close}")
            }
            _ => format!("{open} {call} {close}"),
        }
    }

    fn call(&mut self, frame: &Frame, tool: &Tool) -> String {
        let [open, close] = frame.each;
        let open = open.replace("{name}", &tool.name);
        let open = match open.split_once("{number}") {
            None => self.text(&open),
            Some((before, after)) => {
                format!("{} /[0-9]{{1,3}}/ {}", self.text(before), self.text(after))
            }
        };
        let arguments = match frame.arguments {
            Arguments::Object => {
                let mut schema = tool.parameters.clone();
                if let Value::Object(fields) = &mut schema {
                    fields.entry("type").or_insert_with(|| "object".into());
                }
                self.compact(&schema)
            }
            Arguments::Each(marks) => self.parameters(marks, tool),
        };
        let close = self.text(close);
        self.rule("", &format!("{open} {arguments} {close}"))
    }

    /// Returns JSON as templates print it: on one line, with spaces after commas and colons.
    fn compact(&mut self, schema: &Value) -> String {
        let options = json!({
            "whitespace_flexible": false,
            "item_separator": ", ",
            "key_separator": ": ",
        });
        let json = Self::json(schema, options);
        self.rule("", &json)
    }

    /// Returns the parameters of a tool one by one, in the order of its schema.
    fn parameters(&mut self, [open, close]: [&str; 2], tool: &Tool) -> String {
        let none = Map::new();
        let of = |name: &str| tool.parameters.get(name);
        let properties = of("properties").and_then(Value::as_object).unwrap_or(&none);
        let required = of("required").and_then(Value::as_array);
        let is_required =
            |key: &str| required.is_some_and(|all| all.iter().any(|name| name == key));
        let mut all = Vec::new();
        for (key, schema) in properties {
            let open = self.text(&open.replace("{key}", key));
            let value = self.value(schema, close, &tool.parameters);
            let parameter = self.rule("", &format!("{open} {value}"));
            let or_none = if is_required(key) { "" } else { "?" };
            all.push(format!("{parameter}{or_none}"));
        }
        all.join(" ")
    }

    /// Returns the value of a parameter with the text after it. A string has no quotes.
    fn value(&mut self, schema: &Value, close: &str, root: &Value) -> String {
        let mut types = Vec::new();
        gather(schema, root, MAX_REFERENCES, &mut types);
        let is_string = types.is_empty() || types.contains(&"string");
        let words = schema.get("enum").and_then(Value::as_array);
        let words =
            words.and_then(|words| words.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        match words {
            Some(words) if is_string && words.iter().all(|word| !word.is_empty()) => {
                let words: Vec<String> = words.iter().flat_map(|word| quoted(word)).collect();
                format!("({}) {}", words.join(" | "), self.text(close))
            }
            _ if is_string => self.up_to(close),
            _ => {
                let mut schema = schema.clone();
                if let Value::Object(fields) = &mut schema {
                    for name in ["$defs", "definitions"] {
                        if let Some(definitions) = root.get(name) {
                            fields.entry(name).or_insert_with(|| definitions.clone());
                        }
                    }
                }
                let value = self.compact(&schema);
                format!("{value} {}", self.text(close))
            }
        }
    }
}

/// Returns a text as the grammar quotes it, nothing for no text.
fn quoted(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| Value::from(text).to_string())
}

/// Returns a text as a part of a regular expression between slashes.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\n' => escaped.push_str("\\n"),
            '\t' => escaped.push_str("\\t"),
            // Others have a meaning with a backslash before them.
            '.' | '+' | '*' | '?' | '(' | ')' | '|' | '[' | ']' | '{' | '}' | '^' | '$' | '/'
            | '\\' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c => escaped.push(c),
        }
    }
    escaped
}
