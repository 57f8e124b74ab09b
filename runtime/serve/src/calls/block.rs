//! Where in a text its calls are.

use super::Call;
use super::forms::Form;
use super::reader::Reader;
use crate::request::tools::Tool;
use std::ops::Range;

/// Calls in a text, and the bytes that they are written with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    pub range: Range<usize>,
    pub calls: Vec<Call>,
}

impl Block {
    /// Finds the first `n` calls of a text from `from` on, which begin outside of the ranges `plain`
    /// and have nothing but white space between them. They are read as those of an answer are.
    pub fn find(
        form: &Form,
        text: &str,
        from: usize,
        plain: &[Range<usize>],
        tools: &[Tool],
        n: usize,
    ) -> Option<Self> {
        if form.is_channels() {
            return None;
        }
        let start = first(form, text, from, plain)?;
        let (mut at, mut calls) = (start, Vec::new());
        while calls.len() < n {
            let rest = text.get(at..)?;
            let is_between =
                |c: char| c.is_whitespace() || (form.is_bare && !calls.is_empty() && c == ';');
            let rest = rest.trim_start_matches(is_between);
            let marks = form.marks.iter().find(|marks| rest.starts_with(marks[0]));
            let marks = match marks {
                Some(marks) => *marks,
                None if form.is_bare && rest.starts_with('{') => ["", ""],
                None => return None,
            };
            let mut reader = Reader::new(rest, false);
            calls.extend((form.body)(&mut reader, marks, tools).ok()?);
            at = text.len() - reader.left();
        }
        // Readers skip what may be between two calls.
        let is_after = |c: char| c.is_whitespace() || matches!(c, ',' | ';');
        let block = text.get(start..at)?.trim_end_matches(is_after);
        (calls.len() == n).then(|| Self {
            range: start..start + block.len(),
            calls,
        })
    }
}

/// Returns where the first call of a text begins.
fn first(form: &Form, text: &str, from: usize, plain: &[Range<usize>]) -> Option<usize> {
    let rest = text.get(from..)?;
    let space = rest.len() - rest.trim_start().len();
    if form.is_bare && rest[space..].starts_with('{') {
        return Some(from + space);
    }
    let is_plain = |at: &usize| plain.iter().any(|range| range.contains(at));
    let places = form.marks.iter().filter_map(|[open, _]| {
        let mut places = rest.match_indices(open).map(|(at, _)| from + at);
        places.find(|at| !is_plain(at))
    });
    places.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(name: &str, text: &str, plain: &[Range<usize>], n: usize) -> Option<(String, usize)> {
        let block = Block::find(Form::named(name), text, 1, plain, &[], n)?;
        assert!(block.calls.iter().all(|call| call.name == "f"), "{block:?}");
        Some((text[block.range.clone()].to_string(), block.calls.len()))
    }

    #[test]
    fn calls_of_every_kind_of_form_are_found() {
        for (name, call) in [
            (
                "Hermes",
                "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"</tool_call>\"}}\n</tool_call>",
            ),
            (
                "Qwen3-Coder",
                "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
            ),
            (
                "GLM",
                "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
            ),
            (
                "DeepSeek",
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            ),
            (
                "Mistral",
                "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}]",
            ),
            ("Mistral 11", "[TOOL_CALLS]f[ARGS]{\"a\": [1]}"),
            ("Llama 3", "{\"name\": \"f\", \"parameters\": {}}"),
        ] {
            let tools = [Tool {
                name: "f".into(),
                description: None,
                parameters: serde_json::json!({}),
                strict: false,
            }];
            let text = format!("T {call} more");
            let block = Block::find(Form::named(name), &text, 1, &[], &tools, 1);
            let block = block.unwrap_or_else(|| panic!("{name}"));
            assert_eq!(&text[block.range], call, "{name}");
        }
    }

    #[test]
    fn as_many_calls_as_are_wanted_are_found() {
        let call = "<tool_call>\n{\"name\": \"f\"}\n</tool_call>";
        let text = format!("T{call}\n{call} {call}x");
        let found = |n| find("Hermes", &text, &[], n);
        let two = format!("{call}\n{call}");
        assert_eq!(found(1), Some((call.to_string(), 1)));
        assert_eq!(found(2), Some((two, 2)));
        assert_eq!(found(4), None);
        // What begins in a text of a message is none.
        let plain = 1..3;
        let rest = format!("{call} {call}");
        assert_eq!(find("Hermes", &text, &[plain], 2), Some((rest, 2)));
        assert_eq!(find("gpt-oss", &text, &[], 1), None);
        assert_eq!(find("Hermes", "T<tool_call>{}", &[], 1), None);
        assert_eq!(find("Hermes", "T", &[], 1), None);
    }
}
