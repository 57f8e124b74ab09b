//! Answers of models that reason first: what of an answer is thought, and what is answer.

use super::message::{Message, Role};
use std::ops::Range;
use tier_plan_runtime::tokenizer::ThoughtMark;
use tier_plan_serve::THOUGHT_TAGS;

/// A generated answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Its tokens, without an end token.
    pub tokens: Vec<u32>,
    /// Its whole text, with marks.
    pub text: String,
    /// Tokens that mark a thought, by where they are in the text.
    pub marks: Vec<(Range<usize>, ThoughtMark)>,
}

impl Answer {
    /// Returns the answer as a message of the conversation. `prompt` is the text that it continues;
    /// some templates open the thought there.
    pub fn message(&self, prompt: &str) -> Message {
        let parts = channels(&self.text)
            .or_else(|| self.marked())
            .or_else(|| self.spelled(prompt));
        match parts {
            Some((thinking, content)) => Message {
                thinking: Some(thinking.trim().to_string()).filter(|t| !t.is_empty()),
                ..Message::new(Role::Assistant, content.trim())
            },
            None => Message::new(Role::Assistant, &self.text),
        }
    }

    /// Returns thought and content by the first tokens that mark a thought. A model that has such
    /// tokens writes the same letters otherwise where it only speaks of them.
    fn marked(&self) -> Option<(String, String)> {
        let is = |kind| move |(_, mark): &&(Range<usize>, ThoughtMark)| *mark == kind;
        let close = self.marks.iter().find(is(ThoughtMark::Closes));
        let open = self.marks.iter().find(is(ThoughtMark::Opens));
        // Where the template opens the thought, the answer only closes it.
        let open = open.filter(|(open, _)| close.is_none_or(|(close, _)| open.end <= close.start));
        let (before, start) = match (open, close) {
            (Some((open, _)), _) => (&self.text[..open.start], open.end),
            (None, Some(_)) => ("", 0),
            (None, None) => return None,
        };
        // A thought without an end was cut off.
        let (end, after) = close.map_or((self.text.len(), self.text.len()), |(close, _)| {
            (close.start, close.end)
        });
        Some((
            self.text[start..end].to_string(),
            format!("{before}{}", &self.text[after..]),
        ))
    }

    /// Returns thought and content by marks that are text. They count at the start of an answer
    /// only, so that an answer may speak of them.
    fn spelled(&self, prompt: &str) -> Option<(String, String)> {
        let text = self.text.trim_start();
        THOUGHT_TAGS.iter().find_map(|[open, close]| {
            let in_prompt = prompt.trim_end().ends_with(open).then_some(text);
            let thought = text.strip_prefix(open).or(in_prompt)?;
            let (thinking, content) = thought.split_once(close).unwrap_or((thought, ""));
            Some((thinking.to_string(), content.to_string()))
        })
    }
}

/// Returns thought and content of an answer in the channels of gpt-oss: `analysis` is thought,
/// `final` is content, and so is `commentary` where there is nothing final.
fn channels(text: &str) -> Option<(String, String)> {
    let (before, _) = text.split_once("<|channel|>")?;
    if !matches!(before.trim(), "" | "<|start|>assistant") {
        return None;
    }
    let (mut thinking, mut commentary, mut content) = (String::new(), String::new(), String::new());
    for part in text.split("<|channel|>").skip(1) {
        let (header, body) = part.split_once("<|message|>").unwrap_or((part, ""));
        let body = body.split_once("<|start|>").map_or(body, |(body, _)| body);
        let body = ["<|end|>", "<|return|>", "<|call|>"]
            .iter()
            .fold(body, |body, end| body.trim_end_matches(end));
        let channel = match header.split_whitespace().next() {
            Some("final") => &mut content,
            Some("commentary") => &mut commentary,
            _ => &mut thinking,
        };
        if !channel.is_empty() {
            channel.push('\n');
        }
        channel.push_str(body);
    }
    if content.is_empty() {
        content = commentary;
    }
    Some((thinking, content))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The message of an answer in which these texts are tokens.
    fn message(text: &str, tokens: &[(&str, ThoughtMark)], prompt: &str) -> Message {
        let mut marks: Vec<_> = tokens
            .iter()
            .flat_map(|(token, mark)| {
                text.match_indices(token)
                    .map(|(at, t)| (at..at + t.len(), *mark))
            })
            .collect();
        marks.sort_by_key(|(range, _)| range.start);
        let text = text.to_string();
        let answer = Answer {
            text,
            marks,
            ..Answer::default()
        };
        answer.message(prompt)
    }

    /// Content and thought of an answer whose marks are ordinary text.
    fn spelled(text: &str, prompt: &str) -> (String, Option<String>) {
        let message = message(text, &[], prompt);
        (message.content, message.thinking)
    }

    fn parts(content: &str, thinking: &str) -> (String, Option<String>) {
        let thinking = (!thinking.is_empty()).then(|| thinking.to_string());
        (content.to_string(), thinking)
    }

    #[test]
    fn spelled_marks_count_at_the_start() {
        let (hm, yes) = ("<think>\nHm.\n</think>\n\nYes.", parts("Yes.", "Hm."));
        assert_eq!(spelled(hm, ""), yes);
        assert_eq!(spelled("Hm.</think>Yes.", "Q<think>\n"), yes);
        assert_eq!(spelled("[THINK]Hm.[/THINK]Yes.", ""), yes);
        assert_eq!(spelled("◁think▷Hm.◁/think▷Yes.", ""), yes);
        // Cut off, by a limit or by the user.
        assert_eq!(spelled("<think>Hm", ""), parts("", "Hm"));
        // Speaking of marks is no thought, and nothing is trimmed.
        for text in [
            "Close it with </think>. ",
            "A <think> b </think> c",
            "Yes. ",
        ] {
            assert_eq!(spelled(text, "Q"), parts(text, ""));
        }
    }

    #[test]
    fn tokens_mark_thoughts_anywhere() {
        use ThoughtMark::{Closes, Opens};
        let tokens = [("[THINK]", Opens), ("[/THINK]", Closes)];
        let read = |text: &str| {
            let message = message(text, &tokens, "");
            (message.content, message.thinking)
        };
        assert_eq!(
            read("[THINK]Greet.[/THINK]Hello!"),
            parts("Hello!", "Greet.")
        );
        assert_eq!(read("Hm.[/THINK]Yes."), parts("Yes.", "Hm."));
        assert_eq!(
            read("Well, [THINK]hm[/THINK]yes."),
            parts("Well, yes.", "hm")
        );
        assert_eq!(read("[THINK]Hm"), parts("", "Hm"));
        assert_eq!(read("Yes."), parts("Yes.", ""));
    }

    #[test]
    fn channels_are_told_apart() {
        let analysis = "<|channel|>analysis<|message|>They greet.<|end|>";
        let answer = "<|start|>assistant<|channel|>final<|message|>Hello!";
        let whole = format!("{analysis}{answer}");
        assert_eq!(spelled(&whole, ""), parts("Hello!", "They greet."));
        assert_eq!(spelled(analysis, ""), parts("", "They greet."));
        assert_eq!(
            spelled("<|channel|>final<|message|>Hello!<|return|>", ""),
            parts("Hello!", "")
        );
        let call = "<|start|>assistant<|channel|>commentary to=f <|constrain|>json<|message|>{}";
        assert_eq!(
            spelled(&format!("{analysis}{call}<|call|>"), ""),
            parts("{}", "They greet.")
        );
        let told = "It writes <|channel|>final<|message|>.";
        assert_eq!(spelled(told, ""), parts(told, ""));
    }
}
