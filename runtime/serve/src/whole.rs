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
