//! The parts of an answer that is there as a whole: what a stream of it would have.

use crate::calls::Part;
use crate::thought::Splitter;
use std::ops::Range;
use tier_plan_runtime::tokenizer::ThoughtMark;

/// The parts of an answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts {
    /// Reasoning, if there is any.
    pub thinking: Option<String>,
    /// The answer itself.
    pub content: String,
}

/// Returns the parts of an answer. `marks` are the tokens that mark a thought, by where they are in
/// the text, in order. `prompt` is the text that the answer continues, as a chat template made it;
/// some open the thought there.
#[must_use]
pub fn split(text: &str, marks: &[(Range<usize>, ThoughtMark)], prompt: &str) -> Parts {
    let mut splitter = Splitter::new(prompt, None);
    let mut all = Vec::new();
    for mark in marks {
        all.extend(splitter.push("", Some(mark.clone())));
    }
    all.extend(splitter.push(text, None));
    all.extend(splitter.finish());
    let mut parts = Parts::default();
    for part in all {
        match part {
            Part::Thinking(text) if text.is_empty() => {}
            Part::Thinking(text) => parts.thinking.get_or_insert_default().push_str(&text),
            Part::Content(text) => parts.content.push_str(&text),
            // Without tools there are no calls.
            Part::Call(_) => {}
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use ThoughtMark::{Closes, Opens};

    #[test]
    fn a_whole_answer_has_the_parts_of_a_stream() {
        let tokens = [("[THINK]", Opens), ("[/THINK]", Closes)];
        let channels = "<|channel|>analysis<|message|>A.<|end|><|start|>assistant<|channel|>";
        let call = format!("{channels}commentary to=f <|constrain|>json<|message|>{{}}<|call|>");
        let answer = format!("{channels}final<|message|>B<|return|>");
        for (text, prompt, thinking, content) in [
            ("<think>\nA.\n</think>\n\nB.", "", Some("A."), "B."),
            ("A.</think>B.", "Q<think>\n", Some("A."), "B."),
            ("<think>A", "", Some("A"), ""),
            ("<think></think>B", "", None, "B"),
            ("B </think>. ", "Q", None, "B </think>. "),
            ("[THINK]A[/THINK]B", "", Some("A"), "B"),
            ("B, [THINK]A[/THINK]b", "", Some("A"), "B, b"),
            ("[THINK]A", "", Some("A"), ""),
            // A stream has given out the beginning as content before the mark comes.
            ("A.[/THINK]B", "", None, "A.B"),
            (&answer, "", Some("A."), "B"),
            (&call, "", Some("A."), "{}"),
            ("", "", None, ""),
        ] {
            let mut marks: Vec<_> = tokens
                .iter()
                .flat_map(|(token, mark)| {
                    let places = text.match_indices(token);
                    places.map(|(at, token)| (at..at + token.len(), *mark))
                })
                .collect();
            marks.sort_by_key(|(range, _)| range.start);
            let expected = Parts {
                thinking: thinking.map(str::to_string),
                content: content.to_string(),
            };
            assert_eq!(split(text, &marks, prompt), expected, "{text:?}");
        }
    }
}
